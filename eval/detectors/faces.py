"""Faces: where they are in a picture, and numbers that tell whose they are.

Two networks of the project face-api, whose weights come with this package (6.6 MB), converted by
`assets/build/detectors.py`: its "tiny face detector" (a small YOLO v2), and dlib's descriptor of faces (a ResNet of 29
layers), with which two pictures of one person are less than 0.6 apart.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from erasure import assets
from erasure.eval.detectors.findings import Box
from erasure.eval.detectors.weights import load_into, read_eight_bits

FINDER_FILE = assets.ROOT / "detectors" / "faces.safetensors"
DESCRIPTOR_FILE = assets.ROOT / "detectors" / "descriptor.safetensors"
KNOWN = {
    "faces.safetensors": "c4085954ca6ac0db6e2aae9f2229e3f28a5b0d05861bc5d300e6343ed6c67bea",
    "descriptor.safetensors": "93310301214e6a87179df7a9ddec50a3342caa2fca6eb03a8ee81a00a525755d",
}
"""sha256 of the files."""

ANCHORS = (
    (1.603231, 2.094468),
    (6.041143, 7.080126),
    (2.882459, 3.518061),
    (4.266906, 5.178857),
    (9.041765, 10.66308),
)
"""Width and height of the five shapes that a face may have at first, in cells."""
FINDER_SIDE, FINDER_MEANS = 416, (117.001, 114.697, 97.404)
OVERLAP = 0.4
"""Intersection over union above which the less certain of two faces is dropped."""
LEAST = 0.2
"""Smallest score of a face that is kept."""
SIDE, MEANS = 150, (122.782, 117.001, 104.298)
"""Pixels on a side of a face that is described, and the means of its colours."""
NUMBERS = 128
"""Numbers that describe a face."""


class SeparableConvolution(nn.Module):
    """Depthwise convolution, followed by a pointwise one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, inputs, h, w)` -> `(batch, outputs, h, w)`."""
        return F.leaky_relu(self.pointwise(self.depthwise(x)), 0.1)


class Finder(nn.Module):
    """Finds, for each of 13 x 13 cells, the faces whose middle is there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3)
        self.steps = nn.ModuleList([SeparableConvolution(width, 2 * width) for width in (16, 32, 64, 128, 256)])
        self.last = nn.Conv2d(512, 5 * len(ANCHORS), 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `(batch, 3, 416, 416)` -> `(batch, 13, 13, anchors, 5)`: place, size and score, ahead of sigmoids."""
        x = F.leaky_relu(self.first(pixels), 0.1)
        for step in self.steps:
            x = step(F.max_pool2d(x, 2, ceil_mode=True))
        x = self.last(F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 2, 1))
        return x.permute(0, 2, 3, 1).unflatten(-1, (len(ANCHORS), 5))


class Scaled(nn.Module):
    """Convolution followed by a trained batch norm, as a scale and an offset per channel."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding)
        self.scale = nn.Parameter(torch.empty(outputs))
        self.shift = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, inputs, h, w)` -> `(batch, outputs, h/stride, w/stride)`."""
        return self.conv(x) * self.scale[:, None, None] + self.shift[:, None, None]


class Residual(nn.Module):
    """Residual block of two convolutions.

    Where they halve the size, what came in is averaged, and zeros fill what one of the two lacks in channels, or at
    the right and at the bottom.
    """

    def __init__(self, inputs: int, outputs: int, halves: bool = False) -> None:
        super().__init__()
        self.halves = halves
        self.conv1 = Scaled(inputs, outputs, stride=2 if halves else 1)
        self.conv2 = Scaled(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, inputs, h, w)` -> `(batch, outputs, h, w)`, or half of h and w."""
        y = self.conv2(F.relu(self.conv1(x)))
        if self.halves:
            x = F.avg_pool2d(x, 2)
            y = F.pad(y, (0, x.shape[3] - y.shape[3], 0, x.shape[2] - y.shape[2]))
            x = F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        return F.relu(x + y)


class Descriptor(nn.Module):
    """dlib's network that describes a face by 128 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv32_down = Scaled(3, 32, 7, 2)
        self.conv32_1, self.conv32_2, self.conv32_3 = (Residual(32, 32) for _ in range(3))
        self.conv64_down = Residual(32, 64, halves=True)
        self.conv64_1, self.conv64_2, self.conv64_3 = (Residual(64, 64) for _ in range(3))
        self.conv128_down = Residual(64, 128, halves=True)
        self.conv128_1, self.conv128_2 = (Residual(128, 128) for _ in range(2))
        self.conv256_down = Residual(128, 256, halves=True)
        self.conv256_1, self.conv256_2 = (Residual(256, 256) for _ in range(2))
        self.conv256_down_out = Residual(256, 256, halves=True)
        self.fc = nn.Linear(256, NUMBERS, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `(faces, 3, 150, 150)` -> `(faces, 128)`."""
        x = F.max_pool2d(F.relu(self.conv32_down(pixels)), 3, 2)
        for name, layer in self.named_children():
            if name not in ("conv32_down", "fc"):
                x = layer(x)
        return self.fc(x.mean(dim=(2, 3)))


class Faces:
    """Finds faces and describes them."""

    @cached_property
    def finder(self) -> Finder:
        """Network that finds, loaded on first use.

        Raises:
            ArtifactError: Its weights are missing or damaged.
        """
        with torch.device("meta"):
            network = Finder()
        return load_into(network, read_eight_bits(FINDER_FILE), FINDER_FILE)

    @cached_property
    def descriptor(self) -> Descriptor:
        """Network that describes, loaded on first use.

        Raises:
            ArtifactError: Its weights are missing or damaged.
        """
        with torch.device("meta"):
            network = Descriptor()
        return load_into(network, read_eight_bits(DESCRIPTOR_FILE), DESCRIPTOR_FILE)

    @torch.no_grad()
    def find(self, image: Image.Image) -> list[tuple[float, Box]]:
        """Find the score and place of every face in an RGB picture, the most certain first."""
        longer = max(image.size)
        values = F.pad(_values(image), (0, longer - image.width, 0, longer - image.height))
        rows = self.finder(_prepared(values, FINDER_SIDE, FINDER_MEANS))[0]
        cells = rows.shape[0]
        place = torch.stack(torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="xy"), -1)
        # In whole pictures' sides; the network's cells are those of the square.
        centres = (place[:, :, None] + rows[..., :2].sigmoid()) / cells * longer
        halves = rows[..., 2:4].exp() * torch.tensor(ANCHORS) / cells * longer / 2
        corners = torch.cat([centres - halves, centres + halves], -1).flatten(0, 2)
        scores = rows[..., 4].sigmoid().flatten()
        corners, scores = corners[scores >= LEAST], scores[scores >= LEAST]
        chosen = nms(corners, scores, OVERLAP)
        limits = torch.tensor([image.width, image.height] * 2, dtype=corners.dtype)
        clipped = torch.minimum(corners[chosen].clamp(min=0), limits).tolist()
        return [(score, Box(*box)) for score, box in zip(scores[chosen].tolist(), clipped, strict=True)]

    @torch.no_grad()
    def describe(self, faces: list[Image.Image]) -> Tensor:
        """Describe pictures that a face fills, `(faces, 128)`."""
        if not faces:
            return torch.zeros(0, NUMBERS)
        return self.descriptor(torch.cat([_prepared(_centred(_values(face)), SIDE, MEANS) for face in faces]))


def cut_out(image: Image.Image, box: Box) -> Image.Image | None:
    """Cut a box out of a picture, in whole pixels; `None` where it is empty."""
    left, top, right, bottom = (int(value) for value in box)
    return image.crop((left, top, right, bottom)) if right > left and bottom > top else None


def _values(image: Image.Image) -> Tensor:
    """Give the values of a picture, `(1, 3, height, width)` in 0-255."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float()


def _centred(values: Tensor) -> Tensor:
    """Pad a picture to a black square, in its middle."""
    height, width = values.shape[2:]
    missing = abs(height - width)
    behind = (missing + 1) // 2
    ends = (missing - behind, behind)
    return F.pad(values, (0, 0, *ends) if width > height else ends)


def _prepared(values: Tensor, side: int, means: tuple[float, float, float]) -> Tensor:
    """Resize a square picture as early TensorFlow did, which aligns pixels' corners and not their middles."""
    scaled = values
    for axis in (2, 3):
        size = scaled.shape[axis]
        places = torch.arange(side) * (size / side)
        before = places.floor().long().clamp(max=size - 1)
        share = (places - before).view(-1, *(1,) * (3 - axis))
        behind = (before + 1).clamp(max=size - 1)
        scaled = scaled.index_select(axis, before) * (1 - share) + scaled.index_select(axis, behind) * share
    return (scaled - torch.tensor(means)[:, None, None]) / 255
