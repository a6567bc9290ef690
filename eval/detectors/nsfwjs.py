"""NSFW classifier of the project nsfwjs: a MobileNetV2 that tells five kinds of pictures apart.

The weights come with this package (2.7 MB, MIT), converted by `assets/build/detectors.py`, so that nothing needs to be
installed. Scores are those of the original to four decimals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from erasure import assets
from erasure.eval.detectors import register
from erasure.eval.detectors.base import Golden, NamedDetector, Reading, Recipe
from erasure.eval.detectors.findings import Finding
from erasure.eval.detectors.weights import load_into, read_eight_bits, sha256
from erasure.options import ZeroToOne

FILE = assets.ROOT / "detectors" / "nsfwjs.safetensors"
KNOWN = "ce0ae5dbc06a8a48a7dd50d71ae42434c703c8feaa20a0f7c18246f8346960b6"
"""sha256 of the file."""
CLASSES = ("drawing", "hentai", "neutral", "porn", "sexy")
"""In the order of the network's outputs."""
FLAGS = ("hentai", "porn")
"""Classes whose probabilities are added up."""
SIDE = 224
GOLDEN: Golden = {
    "whole": {"drawing": 0.0019, "neutral": 0.9980},
    # What the network is less sure of tells more: turned, in other colours, or scaled otherwise, it scores otherwise.
    "quarter": {"drawing": 0.0134, "neutral": 0.9398, "porn": 0.0390},
}

BLOCKS = (
    (16, 1), (24, 2), (24, 1), (32, 2), (32, 1), (32, 1), (64, 2), (64, 1), (64, 1), (64, 1), (96, 1), (96, 1),
    (96, 1), (160, 2), (160, 1), (160, 1), (320, 1),
)  # fmt: skip
"""Channels and stride of each block (MobileNetV2, arXiv 1801.04381, table 2)."""


class Step(nn.Module):
    """Convolution with batch norm, and a ReLU that ends at 6 where wanted.

    Where it halves the size, zeros are added at the right and at the bottom alone, as Keras does it.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, apart: bool = False, relu: bool = True
    ) -> None:
        super().__init__()
        groups = inputs if apart else 1
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        reach = kernel - 1
        self.padding = (0, reach, 0, reach) if stride > 1 else (reach // 2,) * 4
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, inputs, h, w)` -> `(batch, outputs, h/stride, w/stride)`."""
        y = self.norm(self.conv(F.pad(x, self.padding)))
        return F.relu6(y) if self.relu else y


class Block(nn.Module):
    """Inverted residual: widen six times, filter each channel apart, narrow again."""

    def __init__(self, inputs: int, outputs: int, stride: int, widen: int) -> None:
        super().__init__()
        inside = inputs * widen
        self.expand = Step(inputs, inside) if widen > 1 else nn.Identity()
        self.depthwise = Step(inside, inside, 3, stride, apart=True)
        self.project = Step(inside, outputs, relu=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, inputs, h, w)` -> `(batch, outputs, h/stride, w/stride)`."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class MobileNet(nn.Module):
    """MobileNetV2 with two hidden layers in front of the answer, as nsfwjs trained it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Step(3, 32, 3, 2)
        widths = (32, *(outputs for outputs, _ in BLOCKS))
        self.blocks = nn.Sequential(
            *(Block(widths[i], outputs, stride, 6 if i else 1) for i, (outputs, stride) in enumerate(BLOCKS))
        )
        self.last = Step(widths[-1], 1280)
        self.hidden = nn.ModuleList([nn.Linear(1280, 256), nn.Linear(256, 128)])
        self.head = nn.Linear(128, len(CLASSES))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `(batch, 3, 224, 224)` in 0-1 -> probabilities `(batch, 5)` in the order of `CLASSES`."""
        x = self.last(self.blocks(self.first(pixels))).mean(dim=(2, 3))
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.head(x).softmax(1)


@register("nsfwjs")
@dataclass(frozen=True, kw_only=True)
class NsfwJs(NamedDetector):
    """Flags pictures whose probabilities of pornography, drawn or photographed, add up to the threshold or more.

    The class "sexy" (bathing suits, underwear) is scored and not flagged.
    """

    title: ClassVar[str] = "NSFW classifier of nsfwjs (MobileNetV2), built in"
    licence: ClassVar[str] = "MIT"

    threshold: ZeroToOne = 0.5
    """Sum of the probabilities of `hentai` and `porn` from which a picture is flagged."""

    @cached_property
    def network(self) -> MobileNet:
        """The network, loaded on first use.

        Raises:
            ArtifactError: The weights are missing or damaged.
        """
        with torch.device("meta"):
            network = MobileNet()
        return load_into(network, read_eight_bits(FILE), FILE)

    def recipe(self) -> Recipe:
        """Give all that the answers depend on."""
        digest = sha256(FILE)
        return {
            "detector": self.name, "licence": self.licence, "weights": {FILE.name: digest}, "known": digest == KNOWN,
            "classes": list(CLASSES), "flags": list(FLAGS), "threshold": self.threshold, "channels": "rgb",
            "side": SIDE, "unit": "image",
            "preprocessing": "stretched to the side bilinearly, corners aligned, not smoothed; 0 to 1", "settings": {},
        }  # fmt: skip

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """Probability of each class."""
        rows = self.network(torch.cat([pixels(image) for image in images])).tolist() if images else []
        return [Reading(dict(zip(CLASSES, row, strict=True))) for row in rows]

    def judge(self, reading: Reading) -> Finding:
        """Flag by the sum; the label is the most probable class."""
        score = min(1.0, sum(reading.scores[name] for name in FLAGS))
        label = max(CLASSES, key=reading.scores.__getitem__)
        return Finding(score >= self.threshold, score, frozenset({label}), reading.scores)

    def golden(self) -> Golden:
        """Scores of the control pictures."""
        return GOLDEN


def pixels(image: Image.Image) -> Tensor:
    """A picture as the network takes it, `(1, 3, 224, 224)` in 0-1."""
    values = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
    return F.interpolate(values, (SIDE, SIDE), mode="bilinear", align_corners=True)
