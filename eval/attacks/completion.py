"""Completion: the original model takes the first steps, and the erased one goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from erasure.eval.attacks import Access, ControlledAttack, SkippedPromptError, register
from erasure.eval.attacks.changes import Resumed
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.options import Count


@register("completion")
@dataclass(frozen=True, kw_only=True)
class Completion(ControlledAttack):
    """Let the original model take the first steps from the sample's own noise, and the erased one all others.

    Behind step `k` of the erased model's ordinary call the original model's latents take the place of its own. An
    erasure that only steers the first steps away from the concept draws it again; one that took the knowledge out
    does not. Fewer steps are tried first. Samplers that remember earlier steps remember those of the erased model.

    The original model's own picture from that noise must show the concept. The control takes its first steps without a
    prompt, from the same noise.
    """

    title: ClassVar[str] = "the first steps by the original model"
    paper: ClassVar[str] = "Lu et al. 2025 (When Are Concepts Erased?): diffusion completion"
    access: ClassVar[Access] = "noise"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "steps": (1,)},
        "quick": {"samples": 10},
        "full": {},
    }

    steps: tuple[Count, ...] = (1, 2, 3)
    """Steps by the original model, in the order in which they are tried (paper: up to the first, second or third of
    50). Those that would be all of a sample's steps are left out."""

    @property
    def tries(self) -> int:
        """One for each number of steps."""
        return len(self.steps)

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        steps = [step for step in self.steps if step < sample.num_inference_steps]
        if not steps:
            raise SkippedPromptError(
                f"the original model would take all of {sample.num_inference_steps} steps: give fewer (steps)"
            )
        behind: dict[int, Tensor] = {}

        def keep(pipe: object, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            behind[index + 1] = tensors["latents"].detach().to("cpu", torch.float32)
            return tensors

        call: dict[str, object] = {"prompt": ""} if self.control else {}
        image = victim.draw(sample, Attempt({**call, "callback_on_step_end": keep}), stock=True)
        if not self.control and victim.verdict(image, sample).shown is not True:
            raise SkippedPromptError(
                f"the judge does not see {victim.target.name!r} in what the original model draws from this noise"
            )
        victim.keep(sample, image)
        for step in steps:
            if step in behind:
                yield Attempt({"callback_on_step_end": Resumed(step, behind[step])})
