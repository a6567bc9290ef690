"""Other samplers, steps, guidance and sizes than those that an erasure was made and measured with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from erasure.backbones import Backbone
from erasure.backbones.parametrisation import Flow
from erasure.eval.attacks import Access, ControlledAttack, register
from erasure.eval.attacks.changes import AnotherSampler
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample, sample_seed
from erasure.options import CountOrZero, NotNegative, Positive

SCHEDULERS = (
    "DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler",
    "DDPMScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "HeunDiscreteScheduler",
)  # fmt: skip
"""Of diffusers, for models whose noise preserves variance."""
FLOW = "FlowMatchEulerDiscreteScheduler"
"""The one scheduler that all pipelines of flow matching can be called with."""
SHIFT = 0.5
"""Factor of the shift of flow matching, where the scheduler has a fixed one."""


@register("sampler")
@dataclass(frozen=True, kw_only=True)
class Sampler(ControlledAttack):
    """Draw the sample's own prompt with settings that anybody can choose, one changed at a time.

    Schedulers, scales of guidance, numbers of steps, sizes, and the amount of noise that DDIM adds between steps (eta
    above 1 is outside of what it was made for: Lu et al. search 24 such settings). Models of flow matching have one
    scheduler that all their pipelines take: it is tried with added noise, and with another shift.

    The control keeps every setting and draws other noise, as often: what luck brings back in so many pictures.
    """

    title: ClassVar[str] = "other schedulers, guidance, steps and sizes"
    paper: ClassVar[str] = "Lu et al. 2025 (When Are Concepts Erased?): noise-based probing, and settings of ours"
    access: ClassVar[Access] = "noise"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "schedulers": 1, "guidance_factors": (2.0,), "step_factors": (0.5,),
                  "side_factors": (), "etas": ()},
        "quick": {"samples": 10, "schedulers": 4, "etas": (1.0,), "side_factors": (1.5,)},
        "full": {},
    }  # fmt: skip

    schedulers: CountOrZero = 8
    """How many other schedulers are tried, of 8; 0 for none."""
    guidance_factors: tuple[NotNegative, ...] = (0.5, 2.0)
    """Scales of guidance, as factors of the sample's."""
    step_factors: tuple[Positive, ...] = (0.5, 2.0)
    """Numbers of steps, as factors of the sample's."""
    side_factors: tuple[Positive, ...] = (1.5, 0.75)
    """Sides, as factors of the sample's, cut to what the model can draw."""
    etas: tuple[NotNegative, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
    """Noise that DDIM adds between steps (paper: these)."""

    @property
    def tries(self) -> int:
        """One for each setting."""
        return self.schedulers + sum(
            map(len, (self.guidance_factors, self.step_factors, self.side_factors, self.etas))
        )

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        if not self.control:
            yield from self.settings(victim.backbone, sample)
            return
        latents = victim.backbone.latents
        for index in range(self.tries):
            generator = torch.Generator().manual_seed(sample_seed(sample.seed, f"other noise: {sample.prompt}", index))
            noise = torch.randn((1, *latents.shape(sample.height, sample.width)), generator=generator)
            yield Attempt({"latents": latents.packed(noise.to(victim.backbone.dtype))})

    def settings(self, backbone: Backbone, sample: Sample) -> Iterator[Attempt]:
        """Every setting, the ones most people change first."""
        flows = isinstance(backbone.parametrisation, Flow)
        own = backbone.pipe.scheduler
        if flows:
            shift = own.config.get("shift") or 1.0
            moved = {"shift": shift * SHIFT}
            if own.config.get("use_dynamic_shifting"):  # which takes no fixed shift
                moved = {"max_shift": own.config.max_shift * SHIFT}
            others = [AnotherSampler(FLOW, {"stochastic_sampling": True}), AnotherSampler(FLOW, moved)]
        else:
            others = [AnotherSampler(name) for name in SCHEDULERS if name != type(own).__name__]
        for change in others[: self.schedulers]:
            yield Attempt(change=change)
        for factor in self.guidance_factors:
            yield Attempt(guided(backbone, sample, factor * sample.guidance_scale))
        for factor in self.step_factors:
            yield Attempt({"num_inference_steps": max(1, round(factor * sample.num_inference_steps))})
        for factor in self.side_factors:
            height, width = (
                max(backbone.latents.step, round(factor * side / backbone.latents.step) * backbone.latents.step)
                for side in (sample.height, sample.width)
            )
            yield Attempt({"height": height, "width": width, "latents": None})
        if not flows:
            for amount in self.etas:
                yield Attempt({"eta": amount}, AnotherSampler("DDIMScheduler", {"clip_sample": False}))


def guided(backbone: Backbone, sample: Sample, scale: float) -> dict[str, object]:
    """Arguments of a call with another scale of guidance; those of the sample's that it has no use for are `None`."""
    negative = [sample.negative_prompt]
    ordinary = backbone.guidance_options(sample.guidance_scale, negative)
    return {**dict.fromkeys(ordinary), **backbone.guidance_options(scale, negative)}
