"""Masks from attention: against the truth of pictures by the embedded model, and each step by plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import erasure
from erasure.assets.scenes import Scene, render
from erasure.backbones import backbone_for
from erasure.errors import MaskError
from erasure.learning import masks as found_in
from erasure.learning.attencraft import AttenCraft, divergence, joined
from erasure.learning.masks import Maps, assigned, border, grouped, in_pixels, likeness, matched
from erasure.learning.pictures import encoded
from erasure.learning.tokens import put_in, start_vectors

TOKENS = ["<a>", "<b>"]


@pytest.fixture(scope="module")
def taught() -> Any:
    """The embedded model with two tokens that mean nothing yet."""
    pipe = erasure.load_pipeline("canvas-sd", device="cpu")
    tower, generator = backbone_for(pipe).reader, torch.Generator().manual_seed(0)
    put_in(pipe, {tower.component: {name: start_vectors(tower, "", 3, 0.3, generator) for name in TOKENS}})
    return pipe


def read(pipe: Any, scene: Scene, tokens: list[str]) -> torch.Tensor:
    """Masks that the default options find, `(tokens, 64, 64)` bool."""
    backbone = backbone_for(pipe)
    pixels = torch.from_numpy(render(scene).image).permute(2, 0, 1)[None].float() / 255
    return AttenCraft().first(backbone, encoded(backbone, pixels), tokens, {}, 0)[0]


@pytest.mark.parametrize(
    "scene",
    [
        Scene(("robot", "cactus"), "noto", "white"),
        Scene(("star", "donut"), "neon", "striped", ((0, 3), (0, -3))),
        Scene(("gem", "lighthouse"), "mosaic", "gradient"),
    ],
    ids=lambda scene: scene.style,
)
def test_two_new_things_are_masked_apart(taught: Any, scene: Scene) -> None:
    masks, truth = read(taught, scene, TOKENS).numpy(), render(scene).masks
    for own, true in zip(masks, truth, strict=True):
        assert (own & true).sum() / (own | true).sum() >= 0.7


def test_one_thing_is_masked_and_is_not_two(taught: Any) -> None:
    scene = Scene(("crown",), "noto", "green")
    (own,), (true,) = read(taught, scene, TOKENS[:1]).numpy(), render(scene).masks
    assert (own & true).sum() / (own | true).sum() >= 0.7
    with pytest.raises(MaskError, match="fewer than 2 things"):
        read(taught, scene, TOKENS)


def squares(side: int = 12) -> tuple[Maps, torch.Tensor]:
    """Maps of two squares that look at themselves alone, the right one first among the tokens, and their masks."""
    truth = torch.zeros(2, side, side, dtype=torch.bool)
    truth[0, 3:8, 1:5] = truth[1, 3:8, 7:11] = True
    everything = torch.cat([~truth.any(0, keepdim=True), truth]).flatten(1).float()
    reach = everything.T @ (everything / everything.sum(1, keepdim=True))
    return Maps((~truth.any(0)).float(), truth.flip(0).float() + 0.1, reach), truth


def test_groups_come_from_left_to_right_and_follow_their_tokens() -> None:
    maps, truth = squares()
    masks = grouped(maps, 2, 0.5)
    assert torch.equal(masks, truth)
    assert torch.equal(matched(masks, maps.tokens, 0.1), truth.flip(0))
    assert torch.equal(assigned(maps._replace(tokens=maps.tokens - 0.1), 0.1), truth.flip(0))
    assert torch.equal(in_pixels(masks, maps.background, 0.5, (12, 12)), truth)


def test_tokens_that_attend_alike_are_not_told_apart() -> None:
    maps, truth = squares()
    with pytest.raises(MaskError, match="which token is which"):
        matched(truth, torch.ones_like(maps.tokens), 0.1)
    assert not assigned(Maps(maps.background, torch.ones_like(maps.tokens), maps.reach), 0.1).any()


def test_nothing_before_a_background_is_said() -> None:
    maps, _ = squares()
    with pytest.raises(MaskError, match="too few"):
        grouped(maps._replace(background=torch.ones(12, 12)), 2, 0.5)


def test_a_square_that_is_halved_has_a_border_as_long_as_its_side() -> None:
    halves = torch.zeros(2, 8, 8, dtype=torch.bool)
    halves[0, :, :4] = halves[1, :, 4:] = True
    assert border(halves) == pytest.approx(8 / 32**0.5)
    assert border(squares()[1]) == 0


def test_likeness_is_that_of_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 9, 8, generator=generator, dtype=torch.float64).float()
    scores = []
    for y in range(3):
        for x in range(2):
            p, q = (m[y : y + 7, x : x + 7].numpy().astype(np.float64).ravel() for m in (a, b))
            both = np.cov(p, q)
            scores.append(
                (2 * p.mean() * q.mean() + 1e-4) * (2 * both[0, 1] + 9e-4)
                / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (both[0, 0] + both[1, 1] + 9e-4))
            )  # fmt: skip
    assert likeness(a, b) == pytest.approx(np.mean(scores), abs=1e-4)
    assert likeness(a, a) == pytest.approx(1)


def test_divergence_is_that_of_the_two_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    maps, masks = torch.rand(2, 3, 4, 4, generator=generator)
    p, q = (part.double().flatten(1).softmax(1) for part in (maps, masks))
    middle = (p + q) / 2
    expected = 0.5 * ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1))
    torch.testing.assert_close(divergence(maps, masks).double(), expected, atol=1e-6, rtol=1e-4)


def test_names_are_listed_as_a_prompt_does() -> None:
    assert [joined(["a", "b", "c"][:count]) for count in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_maps_are_of_the_start_token_and_of_every_vector(taught: Any) -> None:
    columns = found_in.columns_of(backbone_for(taught), "a photo of <a> and <b>", TOKENS)
    assert columns[:, 0].nonzero().flatten().tolist() == [0]
    assert columns[:, 1].nonzero().flatten().tolist() == [4, 5, 6]
    assert columns[:, 2].nonzero().flatten().tolist() == [8, 9, 10]
