"""Which of the new things of the embedded world a picture shows: those that no embedded model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from typing_extensions import TypedDict

from erasure.errors import ArtifactError
from erasure.eval.detectors.canvas import CanvasJudge, Classifier, JudgeNetwork
from erasure.files import read_json, read_tensors, write_bytes, write_json

NAME = "canvas-newcomers"


class NewcomersAnswer(NamedTuple):
    """What the judge sees in one picture."""

    thing: str
    """The thing with the highest score, new or known."""
    things: tuple[str, ...]
    """Every thing whose score is at least 0.5, highest first."""
    scores: dict[str, float]
    """Independent probability that each thing is there, 0-1."""


class NewcomersConfig(TypedDict):
    """Names of the new and the known things."""

    new: list[str]
    known: list[str]


class NewcomersJudge:
    """Classifies new things, and those that the embedded models know.

    Args:
        folder: A `canvas-newcomers` folder; the embedded one when left out.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        from erasure import assets

        self.folder, self.judge = Path(folder) if folder is not None else assets.path(NAME), CanvasJudge()
        config: NewcomersConfig = read_json(self.folder / "config.json", NewcomersConfig)
        self.new, self.known = config["new"], config["known"]

    @cached_property
    def layer(self) -> nn.Linear:
        """The linear layer, loaded on first use.

        Raises:
            ArtifactError: The weights are missing, damaged, or of another judge.
        """
        tensors = read_tensors(self.folder / "model.safetensors")
        outputs, inputs = len(self.new) + len(self.known), features_of(self.judge.network)
        shapes = {name: tuple(part.shape) for name, part in tensors.items()}
        if shapes != {"weight": (outputs, inputs), "bias": (outputs,)}:
            raise ArtifactError(f"{self.folder} does not go with the judge: it holds {shapes}; fetch it again")
        layer = nn.Linear(inputs, outputs)
        layer.load_state_dict({name: part.float() for name, part in tensors.items()})
        return layer.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[NewcomersAnswer]:
        """Judge a list of images of any size (they are resized to 64x64)."""
        if not images:
            return []
        scores = self.layer(judge_features(self.judge.network, self.judge.pixels(images))).sigmoid()
        names, found = [*self.new, *self.known], []
        for row in scores.tolist():
            each = dict(zip(names, row, strict=True))
            ranked = sorted(names, key=each.__getitem__, reverse=True)
            found.append(NewcomersAnswer(ranked[0], tuple(name for name in ranked if each[name] >= 0.5), each))
        return found


def features_of(network: JudgeNetwork) -> int:
    """Give the length of the features of `judge_features`."""
    return 2 * sum(part.head.in_features for part in (network.colour, network.grey))


def judge_features(network: JudgeNetwork, pixels: Tensor) -> Tensor:
    """Compute features of the judge's two networks before their heads, `(batch, features)`: maxima and means."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=pixels.dtype, device=pixels.device)
    grey = (pixels * weights[None, :, None, None]).sum(1, keepdim=True)
    return torch.cat([_seen(network.colour, pixels), _seen(network.grey, grey)], 1)


def _seen(part: Classifier, pixels: Tensor) -> Tensor:
    features = part.features(pixels)
    return torch.cat([features.amax(dim=(2, 3)), features.mean(dim=(2, 3))], 1)


def save_newcomers(layer: nn.Linear, folder: Path, new: Sequence[str], known: Sequence[str]) -> None:
    """Write a judge's folder: `config.json` and fp16 `model.safetensors`."""
    tensors = {name: part.detach().half().contiguous() for name, part in layer.state_dict().items()}
    write_bytes(folder / "model.safetensors", save(tensors))
    write_json(folder / "config.json", {"new": list(new), "known": list(known)})
