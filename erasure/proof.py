"""Proof that the erasures of a pipeline are in force."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from diffusers import DiffusionPipeline

from erasure.backbones import backbone_for
from erasure.canary import Canary
from erasure.errors import VerificationError
from erasure.guards import one_step
from erasure.interop.pipelines import components_of
from erasure.switching import Target
from erasure.twins import bare_of, states_of, stock_of

LEAST_STRENGTH = 0.25
"""Smallest strength that counts as an erasure; below it images are those of the stock model, or nearly."""


def look(pipe: DiffusionPipeline, targets: Iterable[Target]) -> Canary | None:
    """Compute a pipeline's outputs with the erasures that were just put in force, for `verify` to compare with."""
    targets = list(targets)
    last = next((target.record.canary for target in targets if isinstance(target.record.canary, Canary)), None)
    in_force = {
        name: (one.erasure, one.strength) for target in targets for name, one in target.state.in_force().items()
    }
    if not in_force or (last is not None and last.is_of(in_force)):
        # Outputs from when the erasures were first put in force are kept, so that any later change is found.
        return last
    bare = bare_of(pipe)
    if bare is None:
        return None
    return Canary.of(bare, lambda: stock_of(pipe, without_adapters=True, latents_only=True), in_force, last)


def verify(pipe: DiffusionPipeline, remembered: Mapping[str, Sequence[str]], least_strength: float) -> int:
    """Compare tensors and hooks with their expected values, and outputs with those at the time of the switch.

    Args:
        pipe: The pipeline.
        remembered: Components of every erasure that was attached through this pipeline, by name.
        least_strength: An erasure with a smaller strength counts as switched off.

    Returns:
        Number of compared tensors.

    Raises:
        VerificationError: No erasure is attached, or one is switched off or too weak, lost with a replaced component,
            overwritten, or without effect.
    """
    modules, states = components_of(pipe), states_of(pipe)
    if not remembered and not states:
        raise VerificationError("no erasure is attached: load_erasure() or erase() first")
    for name, components in remembered.items():
        lost = [part for part in components if part not in states or name not in states[part].record.attached]
        if lost:
            raise VerificationError(
                f"{name!r} is gone from {', '.join(lost)}: the component was replaced, or another pipeline that "
                "shares it took the erasure off; load it again"
            )
    for name, attached in {n: a for state in states.values() for n, a in state.record.attached.items()}.items():
        if attached.strength < least_strength:
            raise VerificationError(
                f"{name!r} is in force with strength {attached.strength:g} only, at least {least_strength:g} is asked "
                f"for: set_erasures({name!r}, 1.0), or pass least_strength="
            )
    one_step.verify(pipe, states.values(), getattr(pipe, backbone_for(pipe).denoiser_component))
    compared = sum(state.verify(modules[component]) for component, state in states.items())
    canary = next((state.record.canary for state in states.values()), None)
    bare = bare_of(pipe)
    if isinstance(canary, Canary) and bare is not None:
        drawing = [state.record.attached for state in states.values() if not state.is_text_encoder]
        canary.check(bare, {name for attached in drawing for name in attached})
    return compared
