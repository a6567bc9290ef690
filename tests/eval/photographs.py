"""A pipeline whose pictures are photographs, by the prompt and by whether its weights are those of the stock model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image

from tests.eval.detectors.conftest import photograph

SIDE = 192


def pictures() -> dict[str, Image.Image]:
    """Photographs by name, and one that shows nothing."""
    files = {"astronaut": "astronaut.png", "cat": "chelsea.png", "coffee": "coffee.png", "man": "camera.png",
             "eye": "retina.jpg", "horse": "horse.png"}  # fmt: skip
    found = {name: photograph(file).convert("RGB").resize((SIDE, SIDE)) for name, file in files.items()}
    return found | {"nothing": Image.new("RGB", (SIDE, SIDE), "black")}


class PhotographPipeline(StableDiffusionPipeline):
    """Gives a photograph for every prompt: one with the stock model's weights, another once they are edited."""

    shows: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Names of the photographs before and after, by prompt."""
    known: ClassVar[Mapping[str, Image.Image]] = {}
    stock_weight: ClassVar[torch.Tensor]
    drawn: ClassVar[list[str]] = []

    @torch.no_grad()
    def __call__(self, prompt: Any = None, **options: Any) -> Any:
        """Show what belongs to each prompt."""
        edited = not torch.equal(weight_of(self), self.stock_weight)
        type(self).drawn.extend(prompt)
        images = [self.known[self.shows[text][edited]] for text in prompt]
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=None)


def weight_of(pipe: Any) -> torch.Tensor:
    """A weight that every closed-form erasure of a Stable Diffusion model edits."""
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2.to_v"):
            return module.weight.detach().clone()
    raise AssertionError("the UNet has no cross-attention")


def photograph_pipeline(shows: Mapping[str, tuple[str, str]]) -> PhotographPipeline:
    """canvas-sd, with photographs in the place of what it draws.

    Args:
        shows: Names of the photographs before and after an erasure, by prompt.
    """
    import erasure

    stock = erasure.load_pipeline("canvas-sd", device="cpu")
    pipe = PhotographPipeline(**stock.components, requires_safety_checker=False)
    pipe.register_to_config(_name_or_path="photographs")
    PhotographPipeline.shows, PhotographPipeline.known = dict(shows), pictures()
    PhotographPipeline.stock_weight, PhotographPipeline.drawn = weight_of(stock), []
    return pipe
