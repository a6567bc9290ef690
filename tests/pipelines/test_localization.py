"""Where named things are: names in one prompt, maps along an image's edges, and masks on the embedded model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import erasure
from erasure.assets.scenes import Scene, render
from erasure.backbones import text_towers
from erasure.errors import MaskError
from erasure.pipelines import StableDiffusionObjectRemovalPipeline
from erasure.pipelines.localization import EDGE, along_edges, belongs, localization_sites, prompt_of


def test_the_nouns_of_all_names_are_found_in_one_prompt(tiny_pipe: Any) -> None:
    tower = text_towers(tiny_pipe)[0]
    prompt, spans = prompt_of(tower, ["cat", "the dog", "old apple"])
    assert prompt == "a cat and the dog and an old apple"
    ids = tower.prompt_ids(prompt)
    assert [ids[span] for span in spans] == [tower.word_ids(noun) for noun in ("cat", "dog", "old apple")]


def test_more_names_than_the_text_encoder_reads_are_refused(tiny_pipe: Any) -> None:
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(tiny_pipe)
    with pytest.raises(MaskError, match=r"41 names take .* name fewer things"):
        pipe.localize(Image.new("RGB", (32, 32)), "cat", others=["dog"] * 40)


def filtered(values: np.ndarray, image: np.ndarray, radius: int) -> np.ndarray:
    """The guided filter in float64, place by place, as He et al. (2010) write it."""
    rows, columns = values.shape
    around = lambda y, x: (  # noqa: E731
        slice(max(0, y - radius), y + radius + 1), slice(max(0, x - radius), x + radius + 1)
    )  # fmt: skip
    slope, offset = np.zeros((rows, columns, 3)), np.zeros((rows, columns))
    for y, x in np.ndindex(rows, columns):
        colours, wanted = image[around(y, x)].reshape(-1, 3), values[around(y, x)].ravel()
        covariance = np.cov(colours.T, bias=True) + EDGE * np.eye(3)
        shared = (colours * wanted[:, None]).mean(0) - colours.mean(0) * wanted.mean()
        slope[y, x] = np.linalg.solve(covariance, shared)
        offset[y, x] = wanted.mean() - slope[y, x] @ colours.mean(0)
    made = np.zeros((rows, columns))
    for y, x in np.ndindex(rows, columns):
        made[y, x] = slope[around(y, x)].reshape(-1, 3).mean(0) @ image[y, x] + offset[around(y, x)].mean()
    return made


def test_maps_follow_edges_as_the_guided_filter_says() -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, 12, 10, generator=generator)
    maps = torch.rand(2, 2, 12, 10, generator=generator)
    made = along_edges(maps, image, 2).double().numpy()
    for row, column in np.ndindex(2, 2):
        wanted = filtered(maps[row, column].double().numpy(), image[row].permute(1, 2, 0).double().numpy(), 2)
        assert np.abs(made[row, column] - wanted).max() < 1e-4
    assert (
        along_edges(maps.sum(1, keepdim=True), image, 2) - along_edges(maps, image, 2).sum(1, True)
    ).abs().max() < (1e-4)
    assert along_edges(maps, torch.rand(2, 3, 48, 40), 2).shape == (2, 2, 48, 40)


def test_every_place_belongs_to_one_name() -> None:
    assert torch.equal(belongs(torch.zeros(1, 3, 2, 2)).sum(1), torch.ones(1, 2, 2, dtype=torch.long))


def test_words_are_read_at_the_coarsest_grid_and_image_tokens_at_the_finest(canvas: Any) -> None:
    cross, own = localization_sites(canvas.unet, (16, 16))
    assert {site.grid(16, 16) for site in cross} == {(8, 8)}
    assert {site.grid(16, 16) for site in own} == {(16, 16)}


@pytest.fixture(scope="module")
def canvas() -> Any:
    pipe = StableDiffusionObjectRemovalPipeline.from_pipe(erasure.load_pipeline("canvas-sd", device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


def test_masks_do_not_depend_on_the_order_of_names(canvas: Any) -> None:
    drawn = render(Scene(("cat", "umbrella"), "noto", "blue"))
    image = Image.fromarray(drawn.image)
    found = canvas.localize(image, ["cat", "umbrella"]).masks[0]
    turned = canvas.localize(image, ["umbrella", "cat"]).masks[0]
    assert (found != turned.flip(0)).float().mean() < 1e-3
    assert min(overlap(*pair) for pair in zip(found.numpy(), drawn.masks, strict=True)) > 0.75


def test_the_strokes_of_a_drawing_are_found_without_what_is_between_them(canvas: Any) -> None:
    """A token of the attention's finest grid is four pixels wide, a stroke two."""
    drawn = render(Scene(("boat",), "ink", "green"))
    image = Image.fromarray(drawn.image)
    along, smooth = (canvas.localize(image, "boat", edge_radius=radius).masks[0, 0].numpy() for radius in (2, 0))
    assert overlap(along, drawn.masks[0]) > overlap(smooth, drawn.masks[0]) + 0.1
