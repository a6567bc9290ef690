"""One-step generators: the pipeline's sampler while one is in force, and warnings of ignored call arguments."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.backbones import Backbone
from erasure.carriers.calls import NamedArguments, is_measured, latents_of
from erasure.errors import AttachError, OneStepWarning, UnsupportedModelError, VerificationError, WrongBaseError
from erasure.interop import hooks
from erasure.interop.callers import nearest_caller
from erasure.interop.one_step import OneStepScheduler, own_scheduler
from erasure.interop.protocols import Arguments
from erasure.schema import Sampling
from erasure.state import Attached, ComponentState, Record

_HOOK = "erasure_one_step"


def sampling_of(attached: Attached) -> Sampling | None:
    """Get the sampling settings of an erasure, where they differ from the base model's."""
    return cast("Sampling | None", attached.erasure.config.sampling)


def levels_of(states: Iterable[ComponentState]) -> dict[str, int]:
    """Get the timesteps of the one-step generators in force, by name; at most one."""
    in_force = {name: one for state in states for name, one in state.in_force().items()}
    samplings = {name: sampling_of(one) for name, one in in_force.items()}
    return {name: sampling["level"] for name, sampling in samplings.items() if sampling is not None}


def check_together(states: Mapping[str, ComponentState], records: Mapping[str, Record]) -> None:
    """Refuse another edit of the denoiser together with a one-step generator.

    Args:
        states: What is attached now, by component.
        records: New records, by component.

    Raises:
        AttachError: Both would be in force.
    """
    in_force: dict[str, Attached] = {}
    for component, record in records.items():
        state = states.get(component) or ComponentState(component)
        in_force |= state.in_force(record)
    one_step = [name for name, one in in_force.items() if sampling_of(one) is not None]
    drawing = [
        name
        for name, one in in_force.items()
        if any(not part.startswith("text_encoder") for part in one.erasure.components)
    ]
    others = [name for name in drawing if name not in one_step[:1]]
    if one_step and others:
        kind = "is made for many steps" if others[0] not in one_step else "brings a generator of its own"
        raise AttachError(
            f"{one_step[0]!r} makes the model a one-step generator, and {others[0]!r} {kind}: what both make of the "
            f"denoiser is neither. Take one of them off first (delete_erasure or set_erasures), or make one erasure "
            "of all concepts"
        )


def check_level(pipe: DiffusionPipeline, name: str, sampling: Sampling | None) -> None:
    """Raise `WrongBaseError` unless a pipeline's scheduler has a generator's timestep.

    Args:
        pipe: The pipeline.
        name: What the erasure is called.
        sampling: How it is sampled.
    """
    levels = getattr(own_scheduler(pipe).config, "num_train_timesteps", 0)
    if sampling is not None and not sampling["level"] < levels:
        raise WrongBaseError(
            f"{name!r} draws at noise level {sampling['level']}, and the {type(pipe.scheduler).__name__} here counts "
            f"0 to {levels - 1}: load the base model named in its config"
        )


class _Thread(threading.local):
    """What belongs to the thread that runs the denoiser, and to no other."""

    guided = False
    """Whether the pass under way is guided."""

    def __reduce__(self) -> tuple[type[_Thread], tuple[()]]:
        """Copy and pickle it as a new one: a copy of a network is in no pass."""
        return _Thread, ()


class _OneStep(NamedArguments):
    """Hook on a denoiser that refuses timesteps other than the generator's, and makes guidance ineffective.

    Args:
        denoiser: A UNet.
        name: What the generator's erasure is called.
        level: Noise level of its step.
        guides_in_one_call: See `Backbone`.
    """

    def __init__(self, denoiser: nn.Module, name: str, level: int, guides_in_one_call: bool) -> None:
        super().__init__(denoiser)
        self.name, self.level, self.guides_in_one_call = name, level, guides_in_one_call
        self.thread = _Thread()

    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Look at who asks, and about what.

        Raises:
            UnsupportedModelError: An image is sampled at another timestep.
        """
        self.thread.guided = False
        caller = None if is_measured() else nearest_caller(DiffusionPipeline, Backbone)
        # Calls of a backbone may use any timestep, in trainings and verifications.
        if is_measured() or isinstance(caller, Backbone):
            return args, kwargs
        given = self.by_name(args, kwargs)
        levels = torch.as_tensor(given["timestep"]).detach().float().cpu()
        if bool((levels != self.level).any()):
            raise UnsupportedModelError(
                f"{self.name!r} is a one-step generator that draws at noise level {self.level}, and it was asked "
                f"about {float(levels.max()):g}: this pipeline has another sampler than the one that it was attached "
                "through. Call ErasureManager(pipe).adopt() once, or take the erasure off"
            )
        rows = len(latents_of(given))
        if self.guides_in_one_call and getattr(caller, "do_classifier_free_guidance", False) and rows % 2 == 0:
            self.thread.guided = True
            warnings.warn(
                f"{self.name!r} is a one-step generator, which draws without guidance: the call's guidance is left "
                "out. Pass guidance_scale=1, which is faster",
                OneStepWarning,
                stacklevel=2,
            )
        return args, kwargs

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Return the prompts' predictions for negative prompts too, so that guidance has no effect."""
        if not self.thread.guided:
            return output
        self.thread.guided = False
        if isinstance(output, tuple):
            return (_twice_last(output[0]), *output[1:])
        return type(output)(sample=_twice_last(output.sample))


def _twice_last(rows: Tensor) -> Tensor:
    """The second half of some rows, twice."""
    return rows.chunk(2)[1].repeat(2, *[1] * (rows.ndim - 1))


def install(denoiser: nn.Module, backbone: Backbone, states: Iterable[ComponentState]) -> None:
    """Install the denoiser's guard and the pipeline's sampler, or remove them where no generator is in force."""
    levels = levels_of(states)
    hooks.remove_hook(denoiser, _HOOK)
    for name, level in levels.items():
        hooks.register_hook(denoiser, _OneStep(denoiser, name, level, backbone.guides_in_one_call), _HOOK)
    set_sampler(backbone.pipe, next(iter(levels.values()), None))


def set_sampler(pipe: DiffusionPipeline, level: int | None) -> None:
    """Give a pipeline the sampler of a generator, or restore its own scheduler object.

    Args:
        pipe: The pipeline.
        level: Noise level of the generator in force; `None` where none is.
    """
    held = pipe.scheduler
    if isinstance(held, OneStepScheduler):
        if held.level == level:
            return
        held.retired = True
        pipe.scheduler = held.replaced
    if level is not None:
        pipe.scheduler = OneStepScheduler.in_place_of(pipe.scheduler, level)


def verify(pipe: DiffusionPipeline, states: Iterable[ComponentState], denoiser: nn.Module) -> None:
    """Raise `VerificationError` unless a pipeline samples the generator in force as it must be."""
    for name, level in levels_of(states).items():
        scheduler = pipe.scheduler
        if not isinstance(scheduler, OneStepScheduler) or scheduler.level != level or scheduler.retired:
            raise VerificationError(
                f"{name!r} is a one-step generator, and the sampler of this {type(pipe).__name__} is not its own: "
                "the scheduler was replaced. Take the erasure off and load it again"
            )
        if not isinstance(hooks.find_hook(denoiser, _HOOK), _OneStep) or not hooks.runs_hook(denoiser, _HOOK):
            raise VerificationError(f"the guard of the one-step generator {name!r} is gone: load the erasure again")
