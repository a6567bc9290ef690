"""The judge of the embedded world: which objects and which style a Canvas image shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.errors import ArtifactError
from erasure.eval.schemas import JudgeConfig
from erasure.files import TensorInfo, read_json, read_tensors, shown, write_bytes, write_json
from erasure.images import rgb


@dataclass(frozen=True)
class Judgement:
    """What the judge sees in one image."""

    object: str
    """The object with the highest score: a closed-set answer, as UnlearnCanvas classifies."""
    objects: tuple[str, ...]
    """Every object whose score is at least 0.5, highest first. Empty for a bare background."""
    style: str
    """The style with the highest score."""
    shape: str
    """The object that the greyscale head sees, so that a blob of the right colour does not pass for the thing."""
    object_scores: dict[str, float]
    """Independent probability that each object is there, 0-1."""
    shape_scores: dict[str, float]
    """The same from the greyscale head."""
    style_scores: dict[str, float]
    """Probability of each style, summing to 1."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm; the first one halves the resolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, inputs, h, w)` -> `(batch, outputs, h/2, w/2)`."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class Classifier(nn.Module):
    """A small residual network with one linear head."""

    def __init__(self, channels: int, outputs: int, widths: Sequence[int] = (24, 48, 96, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 5, stride=2, padding=2)
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in pairwise(widths)))
        self.head = nn.Linear(widths[-1], outputs)

    def features(self, x: Tensor) -> Tensor:
        """What is seen where, `(batch, widths[-1], 4, 4)` of pixels `(batch, channels, 64, 64)` in [-1, 1]."""
        return self.blocks(F.relu(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Pixels `(batch, channels, 64, 64)` in [-1, 1] -> logits `(batch, outputs)`."""
        features = self.features(x)
        return self.head(features.amax(dim=(2, 3)) + features.mean(dim=(2, 3)))


class JudgeNetwork(nn.Module):
    """Colour network for objects and style, and a separate greyscale network for the shape of objects."""

    def __init__(self, objects: int, styles: int) -> None:
        super().__init__()
        self.objects, self.styles = objects, styles
        self.colour = Classifier(3, objects + styles)
        self.grey = Classifier(1, objects)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`(batch, 3, 64, 64)` in [-1, 1] -> object logits, style logits, greyscale object logits."""
        colour = self.colour(pixels)
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=pixels.dtype, device=pixels.device)
        grey = self.grey((pixels * weights[None, :, None, None]).sum(1, keepdim=True))
        return colour[:, : self.objects], colour[:, self.objects :], grey


class CanvasJudge:
    """Classifies Canvas images.

    Args:
        folder: A `canvas-judge` folder; the embedded one when left out.
        device: Where to run.

    Example:
        >>> from erasure.eval.detectors import CanvasJudge
        >>> judgement = CanvasJudge()([image])[0]
        >>> judgement.object, judgement.style
        ('cat', 'noto')
    """

    def __init__(self, folder: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        if folder is None:
            from erasure import assets

            folder = assets.path("canvas-judge")
        self.folder, self.device = Path(folder), torch.device(device)
        file = self.folder / "config.json"
        if not os.path.lexists(file):
            raise ArtifactError(f"no canvas judge at {self.folder}: expected config.json and model.safetensors")
        self.config: JudgeConfig = read_json(file, JudgeConfig)
        self.object_names: list[str] = self.config["objects"]
        self.style_names: list[str] = self.config["styles"]

    @cached_property
    def network(self) -> JudgeNetwork:
        """The classifier, loaded on first use.

        Raises:
            ArtifactError: The weights are missing, damaged, or of another network.
        """
        with torch.device("meta"):
            network = JudgeNetwork(len(self.object_names), len(self.style_names))
        file, wanted = self.folder / "model.safetensors", {k: tuple(t.shape) for k, t in network.state_dict().items()}

        def check(infos: Mapping[str, TensorInfo]) -> None:
            there = {name: info.shape for name, info in infos.items()}
            if there != wanted:
                wrong = next(name for name in {**wanted, **there} if there.get(name) != wanted.get(name))
                raise ArtifactError(
                    f"{file} does not go with config.json: {shown(wrong)} has the shape {there.get(wrong)}, expected "
                    f"{wanted.get(wrong)}; fetch the judge again"
                )

        tensors = read_tensors(file, check=check)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ArtifactError(f"{file} holds NaN or infinity, with which nothing is seen: fetch the judge again")
        network.to_empty(device="cpu")
        network.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})
        return network.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def logits(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
        """Object, style and shape logits, `(images, objects)`, `(images, styles)`, `(images, objects)`."""
        return self.network(self.pixels(images))

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as the network takes them, `(images, 3, 64, 64)` in [-1, 1]."""
        rows = [np.asarray(rgb(image).resize((64, 64), Image.Resampling.BOX)) for image in images]
        return (torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.device)

    def __call__(self, images: Sequence[Image.Image]) -> list[Judgement]:
        """Judge a list of images of any size (they are resized to 64x64)."""
        if not images:
            return []
        objects, styles, shapes = self.logits(images)
        return [
            self._judgement(o, s, g)
            for o, s, g in zip(
                objects.sigmoid().tolist(), styles.softmax(1).tolist(), shapes.sigmoid().tolist(), strict=True
            )
        ]

    def _judgement(self, objects: list[float], styles: list[float], shapes: list[float]) -> Judgement:
        object_scores = dict(zip(self.object_names, objects, strict=True))
        style_scores = dict(zip(self.style_names, styles, strict=True))
        shape_scores = dict(zip(self.object_names, shapes, strict=True))
        ranked = sorted(object_scores, key=object_scores.__getitem__, reverse=True)
        return Judgement(
            object=ranked[0],
            objects=tuple(name for name in ranked if object_scores[name] >= 0.5),
            style=max(style_scores, key=style_scores.__getitem__),
            shape=max(shape_scores, key=shape_scores.__getitem__),
            object_scores=object_scores,
            shape_scores=shape_scores,
            style_scores=style_scores,
        )


def save_judge(network: JudgeNetwork, folder: Path, objects: Sequence[str], styles: Sequence[str]) -> None:
    """Write a judge folder: `config.json` and fp16 `model.safetensors`."""
    tensors = {name: t.half() if t.is_floating_point() else t for name, t in network.state_dict().items()}
    write_bytes(folder / "model.safetensors", save({name: t.contiguous() for name, t in tensors.items()}))
    write_json(folder / "config.json", {"objects": list(objects), "styles": list(styles)})
