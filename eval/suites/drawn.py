"""How samples of a prompt list are drawn: steps, guidance and size of a preset, of a row, or of the model itself."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from erasure.eval.inputs import Inputs
from erasure.eval.rows import Record
from erasure.eval.samples import drawing as backbone_that_draws
from erasure.eval.sources import PromptRow
from erasure.world import World

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from erasure.backbones import Backbone
    from erasure.eval.suites.about import Preset
    from erasure.interop.protocols import Pipeline

STEPS, GUIDANCE = 50, 7.5
"""Of a pipeline whose call does not say its own."""


@dataclass
class Drawing:
    """Settings of a run, and an account of what they change about the rows."""

    backbone: Backbone
    steps: int
    guidance: float
    height: int
    width: int
    per_row: tuple[str, ...] = ()
    changed: list[int] = field(default_factory=list)
    """Rows whose size was changed to one that the model can draw."""

    @classmethod
    def of(cls, pipe: Pipeline, inputs: Inputs, preset: Preset | None) -> Drawing:
        """Settle how a model draws: as the caller says, as the preset does, or as the model was made to.

        Args:
            pipe: The model.
            inputs: What the caller gives.
            preset: Choices of a paper.
        """
        from erasure.interop.pipelines import check_steps

        backbone = backbone_that_draws(cast("DiffusionPipeline", pipe))
        world = World.of(pipe)
        usual = {
            name: parameter.default
            for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()
            if isinstance(parameter.default, int | float)
        }
        latents = backbone.latents
        own_size = (latents.side[0] * latents.factor, latents.side[1] * latents.factor)
        if world.declared:
            own_steps, own_guidance, own_size = world.num_inference_steps, world.guidance_scale, (world.side,) * 2
        else:
            own_steps = int(usual.get("num_inference_steps", STEPS))
            own_guidance = float(usual.get("guidance_scale", GUIDANCE))
        side = inputs.side or (preset.side if preset else None)
        height, width = (side, side) if side else own_size
        latents.shape(height, width)
        steps = inputs.steps or (preset.steps if preset else None) or own_steps
        check_steps(backbone.pipe, steps)
        chosen = inputs.guidance if inputs.guidance is not None else preset.guidance if preset else None
        guidance = own_guidance if chosen is None else chosen
        taken = preset.per_row if preset else ()
        given = {"guidance": inputs.guidance is not None, "size": inputs.side is not None}
        return cls(backbone, steps, guidance, height, width, tuple(each for each in taken if not given[each]))

    @property
    def recipe(self) -> Record:
        """The settings as recipes hold them."""
        size = f"{self.width}x{self.height}"
        return {
            "num_inference_steps": self.steps,
            "guidance_scale": "per row" if "guidance" in self.per_row else self.guidance,
            "resolution": "per row" if "size" in self.per_row else size, "image_path": "lossless, in memory",
        }  # fmt: skip

    def settings(self, row: PromptRow) -> tuple[int, float, int, int]:
        """Steps, guidance, height and width of a row."""
        guidance = row.guidance if "guidance" in self.per_row and row.guidance is not None else self.guidance
        height, width = self.height, self.width
        if "size" in self.per_row and row.height and row.width:
            step = self.backbone.latents.step
            height, width = (max(step, side // step * step) for side in (row.height, row.width))
            if (height, width) != (row.height, row.width):
                self.changed.append(row.number)
        return self.steps, guidance, height, width

    def account(self, prompts: Sequence[str]) -> Record:
        """How many prompts text encoders cut at their length, by encoder, and how many sizes were changed.

        Args:
            prompts: What is drawn.
        """
        counts = Counter(prompts)
        cut = {}
        for tower in self.backbone.towers:
            lengths = {text: len(tower.prompt_ids(text)) for text in counts}
            cut[tower.component] = sum(counts[text] for text, length in lengths.items() if length > tower.max_length)
        return {"drawn": len(prompts), "cut": cut, "sizes_changed": len(self.changed)}
