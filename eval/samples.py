"""The sample table: everything that one generated image depends on, and the noise that belongs to it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.backbones import Backbone, backbone_for
from erasure.errors import EvaluationError, UnsupportedModelError
from erasure.eval.rows import Record, Row

Role = Literal["target", "retain", "cross", "utility", "pair"]


@dataclass(frozen=True)
class Sample:
    """One image to generate and what is expected on it."""

    sample_id: str
    """Unique within a suite; also the name of the image file."""
    prompt: str
    seed: int
    """Of the initial noise and of the sampler's noise. Up to 64 bits."""
    role: Role
    """`target`: the prompt holds what is erased. The others must survive."""
    objects: tuple[str, ...] = ()
    """Objects that the prompt asks for."""
    style: str | None = None
    """Style that the prompt asks for."""
    erased: tuple[str, ...] = ()
    """Those of the objects and the style that must not be seen."""
    weight: float = 1.0
    """How many samples of the full answer set this one stands for, relative to the others."""
    scene: Record | None = None
    """What a suite needs to know besides, plain data: how a picture that is given to the pipeline is composed."""
    unsafe: bool = False
    """Whether a report hides the image until asked."""
    negative_prompt: str = ""
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    height: int = 64
    """In pixels."""
    width: int = 64
    """In pixels."""

    @property
    def settings(self) -> tuple[int, float, int, int]:
        """Give the settings that all samples of a batch share."""
        return self.num_inference_steps, self.guidance_scale, self.height, self.width

    @property
    def key(self) -> str:
        """Fingerprint all that determines the image; suite, role and order are not part of it."""
        content = [self.prompt, self.negative_prompt, self.seed, *self.settings]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]

    def row(self) -> Record:
        """Convert the sample to a JSON object."""
        return asdict(self) | {"objects": list(self.objects), "erased": list(self.erased)}

    @classmethod
    def from_row(cls, row: Row) -> Sample:
        """Make a sample from its JSON object; further fields are ignored.

        Raises:
            EvaluationError: A field that a sample needs is missing.
        """
        names = {field.name for field in fields(cls)} & set(row)
        known: Record = {name: tuple(v) if isinstance(v := row[name], list) else v for name in names}
        try:
            return cls(**known)
        except TypeError as error:
            raise EvaluationError(f"a row that is no sample: {error}") from error


def sample_seed(seed: int, prompt: str, index: int) -> int:
    """A 32-bit seed for the `index`-th image of a prompt: the same in every suite and size that asks for it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{prompt}".encode()).digest()[:4], "big")


def drawing(pipe: DiffusionPipeline) -> Backbone:
    """The backbone of a pipeline that draws from a prompt.

    Raises:
        UnsupportedModelError: Its model is of no supported family, or paints into pictures.
    """
    backbone = backbone_for(pipe)
    taken, own = backbone.denoiser.config.in_channels, backbone.latents.channels
    if taken == 2 * own + 1:
        raise UnsupportedModelError(
            f"the UNet takes {taken} channels: it paints into pictures, and {type(pipe).__name__} cannot draw with it "
            "from a prompt; measure the text-to-image model that it was made from"
        )
    return backbone


def initial_noise(sample: Sample, shape: tuple[int, ...]) -> tuple[Tensor, torch.Generator]:
    """Standard normal noise of a sample, and the generator behind it, from which the sampler may go on drawing.

    Always drawn on the CPU in float32, one generator per sample: batch size, order, process count, device and
    precision of the model do not change it.

    Args:
        sample: The sample.
        shape: `(channels, height, width)`.

    Returns:
        Float32 noise `(channels, height, width)` and its generator.
    """
    generator = torch.Generator("cpu").manual_seed(sample.seed)
    return torch.randn((1, *shape), generator=generator, dtype=torch.float32)[0], generator
