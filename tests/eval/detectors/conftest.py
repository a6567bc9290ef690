"""Detectors that are ready to be asked, and pictures to ask them about."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure import assets
from erasure.errors import MissingExtraError
from erasure.eval.detectors import DETECTORS, NamedDetector
from erasure.extras import locate
from erasure.images import read_rgb
from tests.eval.detectors.stand_ins import timm_folder

GOLDEN: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "golden.json").read_text())
"""What the originals say about pictures; see `golden.py`."""

STAND_INS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "clip_zero_shot": lambda folder: {"flags": ("cat",), "others": ("dog", "a blank page")},
    "identity": lambda folder: {"gallery": gallery(folder / "gallery", astronaut=["control.webp"])},
    "image_classifier": lambda folder: {"model": timm_folder(folder / "timm"), "flags": ("ink",)},
}
"""Options without which a detector does not work, made in a folder."""


def photograph(name: str) -> Image.Image:
    """The control picture, or one that comes with scikit-image."""
    if name == "control.webp":
        return read_rgb(assets.ROOT / "detectors" / name)
    try:
        return read_rgb(locate("skimage", f"data/{name}"))
    except MissingExtraError as error:
        pytest.skip(str(error))


def gallery(folder: Path, **people: list[str | Image.Image]) -> Path:
    """A folder with a folder of pictures for each person."""
    for name, pictures in people.items():
        (folder / name).mkdir(parents=True)
        for index, picture in enumerate(pictures):
            shown = photograph(picture) if isinstance(picture, str) else picture
            shown.save(folder / name / f"{index}.png")
    return folder


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NamedDetector]:
    """Give a detector by name; skips where what it needs is not installed."""
    made: dict[str, NamedDetector] = {}

    def give(name: str) -> NamedDetector:
        if name not in made:
            options = STAND_INS[name](tmp_path_factory.mktemp(name)) if name in STAND_INS else {}
            made[name] = DETECTORS.get(name)(**options)
        detector = made[name]
        try:
            detector.recipe()
        except MissingExtraError as error:
            pytest.skip(str(error))
        return detector

    return give
