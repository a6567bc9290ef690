"""Write `golden.json`: what the originals say about the control picture and pictures of scikit-image.

    python tests/eval/detectors/golden.py FOLDER

FOLDER holds the packages of npm that `golden.mjs` names.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from erasure import assets
from erasure.extras import locate
from erasure.images import read_rgb

HERE = Path(__file__).parent
PICTURES = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "rocket.jpg")
"""Photographs in scikit-image's wheel; NASA's and others in the public domain or CC0."""


def picture(name: str) -> Image.Image:
    """A picture of scikit-image, or the control picture."""
    return read_rgb(assets.ROOT / "detectors" / name if name == "control.webp" else locate("skimage", f"data/{name}"))


def main(folder: str) -> None:
    given = {}
    for name in ("control.webp", *PICTURES):
        pixels = np.asarray(picture(name))
        rgb = base64.b64encode(pixels.tobytes()).decode()
        given[name] = {"width": pixels.shape[1], "height": pixels.shape[0], "rgb": rgb}
    done = subprocess.run(
        ["node", str(HERE / "golden.mjs")], cwd=folder, input=json.dumps({"pictures": given}), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    rounded = json.loads(done.stdout, parse_float=lambda text: round(float(text), 6))
    (HERE / "golden.json").write_text(json.dumps(rounded, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
