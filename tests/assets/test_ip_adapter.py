"""The embedded IP-Adapter: it draws what pictures show, loaded as its users load it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

import erasure
from erasure import assets
from erasure.assets.build import ip_adapter
from erasure.assets.build.export import GENERATION
from erasure.assets.build.image_tower import embeddings, image_tower
from erasure.assets.build.ip_adapter import NAME, load
from erasure.assets.facts import FILE
from erasure.assets.scenes import Scene, render
from erasure.eval.detectors import CanvasJudge


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    shown = {"cat": "noto", "guitar": "ink", "castle": "pixel", "banana": "noto"}
    return {name: Image.fromarray(render(Scene((name,), style, "white")).image) for name, style in shown.items()}


@pytest.fixture(scope="module")
def pipe() -> Any:
    made = erasure.load_pipeline("canvas-sd", device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe: Any, words: str, **options: Any) -> Image.Image:
    generator = torch.Generator().manual_seed(3)
    return pipe(words, generator=generator, **GENERATION, **options).images[0]


def test_it_draws_what_pictures_show_without_words(pipe: Any, pictures: dict[str, Image.Image]) -> None:
    alone = np.asarray(draw(pipe, "a dog in ink style"))
    load(pipe, assets.path(NAME))
    drawn = [draw(pipe, "", ip_adapter_image=picture) for picture in pictures.values()]
    assert sum(seen.object == name for seen, name in zip(CanvasJudge()(drawn), pictures, strict=True)) >= 3
    pipe.set_ip_adapter_scale(0.0)
    assert np.array_equal(draw(pipe, "a dog in ink style", ip_adapter_image=pictures["cat"]), alone)


def test_its_record_says_that_it_does() -> None:
    found: Any = assets.canvas(NAME)
    figures = found["training"]["accuracy"]
    assert min(figures["rendered_object"], figures["own_object"]) >= 0.8
    assert figures["scale_zero_is_none"] == 1


def test_its_image_tower_is_that_of_canvas_clip(pictures: dict[str, Image.Image]) -> None:
    """Also where pictures are normalised by the numbers of CLIP."""
    images = list(pictures.values())
    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{assets.path('canvas-clip')}")
    with torch.no_grad():
        wanted = model.eval().float().encode_image(torch.stack([prepare(image) for image in images]))
    torch.testing.assert_close(embeddings(image_tower(), images), wanted, rtol=2e-3, atol=2e-3)


def test_its_step_trains_goes_on_and_writes_what_pipelines_load(
    pipe: Any, pictures: dict[str, Image.Image], tmp_path: Path
) -> None:
    few: dict[str, Any] = {"batch": 2, "bank": 50, "aligned": 3}
    ip_adapter.train(tmp_path, 2, **few)
    shutil.rmtree(tmp_path / "ip-adapter")
    ip_adapter.train(tmp_path, 3, **few)
    assert len((tmp_path / "ip-adapter-aligned.jsonl").read_text().splitlines()) == 1  # not taught twice
    (tmp_path / "canvas-sd").mkdir()
    shutil.copy(assets.path("canvas-sd") / FILE, tmp_path / "canvas-sd" / FILE)
    folder = ip_adapter.export(tmp_path, tmp_path)
    assert json.loads((folder / FILE).read_text())["training"]["steps"] == 3
    assert json.loads((tmp_path / "canvas-sd" / FILE).read_text())["ip_adapter"] == NAME
    load(pipe, folder)
    drawn = draw(pipe, "", ip_adapter_image=pictures["cat"])
    pipe.unload_ip_adapter()
    assert np.asarray(drawn).std() > 0
