"""Comparison of a pipeline's outputs for erased concepts with its outputs when they were erased.

All tensors and hooks may be in place while something else undoes their effect: an adapter with the negated edit, a
replaced `forward`, another text encoder. A canary is one encoded prompt of each erasure and one denoiser pass over
fixed noise. It is computed by the stock model and by the erased one when erasures are switched, and again by the
current pipeline when `verify` is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.artifact import Erasure
from erasure.backbones import Backbone, Conditioning, backbone_for
from erasure.errors import VerificationError
from erasure.guards import unguarded
from erasure.interop import hooks, paths, scopes
from erasure.interop.protocols import Denoiser

SIDE = 8
"""Height and width of the latents of the pass, the smallest that every UNet with three downsamplings accepts."""
SILENT = 1e-5
"""Relative size of an effect below which it cannot be distinguished from rounding."""
LEAST = 0.5
"""Share of the effect that must remain. One half allows for rounding, adapters and casts."""


@dataclass(frozen=True)
class Answer:
    """Encodings and predictions of a pipeline for the canary's prompts, in float32 on the CPU."""

    encoded: Tensor
    """Encodings of the prompts, `(prompts, tokens, dim)`."""
    predicted: Tensor | None
    """Predictions, `(prompts, channels, SIDE, SIDE)`; `None` where a pass is not possible (an image prompt is
    missing)."""

    def rows(self, index: Sequence[int]) -> Answer:
        """Select the answers for some of the prompts."""
        chosen = list(index)
        return Answer(self.encoded[chosen], None if self.predicted is None else self.predicted[chosen])


@dataclass(frozen=True)
class Canary:
    """The prompts, and the outputs of the stock and the erased model for them."""

    prompts: Mapping[str, str]
    """One prompt of every erasure in force, by name of the erasure."""
    stock: Answer
    erased: Answer
    in_force: Mapping[str, tuple[Erasure, float]]
    """The erasures in force and their strengths, by name."""

    @classmethod
    def of(
        cls,
        pipe: DiffusionPipeline,
        make_stock: Callable[[], DiffusionPipeline],
        in_force: Mapping[str, tuple[Erasure, float]],
        last: Canary | None,
    ) -> Canary:
        """Compute the outputs of the pipeline and of its stock twin.

        Args:
            pipe: The pipeline.
            make_stock: Makes the same pipeline without erasures.
            in_force: The erasures in force and their strengths, by name.
            last: Former canary, whose stock outputs are used again.
        """
        prompts = {name: f"a photo of {erasure.concepts[0].target}" for name, (erasure, _) in in_force.items()}
        asked = list(prompts.values())
        known = [] if last is None else list(last.prompts.values())
        if last is not None and set(asked) <= set(known):
            stock = last.stock.rows([known.index(prompt) for prompt in asked])
        else:
            stock = answer(make_stock(), asked)
        return cls(prompts, stock, answer(pipe, asked), dict(in_force))

    def is_of(self, in_force: Mapping[str, tuple[Erasure, float]]) -> bool:
        """Whether this canary is for the given erasures and strengths."""
        own = self.in_force
        return own.keys() == in_force.keys() and all(
            own[name][0] is erasure and own[name][1] == strength for name, (erasure, strength) in in_force.items()
        )

    def check(self, pipe: DiffusionPipeline, edits_denoiser: set[str]) -> None:
        """Compare with the pipeline's current outputs.

        Args:
            pipe: The pipeline, without the adapters of its user.
            edits_denoiser: Names of the erasures that edit the denoiser.

        Raises:
            VerificationError: An erasure has lost its effect, or the text encoder is another one.
        """
        if not self.prompts:
            return
        try:
            now = answer(pipe, list(self.prompts.values()))
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise VerificationError(
                f"the pipeline cannot encode and denoise a prompt any more ({type(error).__name__}: {error}): a "
                "component was changed or moved away since the erasure was attached"
            ) from error
        for row, name in enumerate(self.prompts):
            encoded = self.erased.encoded[row]
            moved = (
                (now.encoded[row] - encoded).norm() / encoded.norm() if encoded.shape == now.encoded[row].shape else 9
            )
            if name in edits_denoiser and not moved <= 0.1:
                raise VerificationError(
                    f"{name!r} edits the denoiser for a text encoder that is not the one it was attached with: load "
                    "the text encoder of the model that the erasure was made for"
                )
            pairs = [(self.stock.encoded, self.erased.encoded, now.encoded)]
            if self.stock.predicted is not None and self.erased.predicted is not None and now.predicted is not None:
                pairs.append((self.stock.predicted, self.erased.predicted, now.predicted))
            for stock, erased, found in pairs:
                if (left := _left(stock[row], erased[row], found[row])) < LEAST:
                    raise VerificationError(
                        f"{name!r} is attached but its effect is gone ({left:.0%} of it is left for the prompt "
                        f"{self.prompts[name]!r}): a LoRA, a replaced forward or another component takes it back"
                    )


def _left(stock: Tensor, erased: Tensor, now: Tensor) -> float:
    """Compute the share of the effect `erased - stock` that is in `now - stock`; 1 where there was no effect."""
    if stock.shape != now.shape or not torch.isfinite(now).all():
        return 0.0
    effect, found = (erased - stock).double().flatten(), (now - stock).double().flatten()
    if effect.norm() <= SILENT * stock.norm():
        return 1.0
    return float(effect @ found / (effect @ effect))


@scopes.plain_precision()
def answer(pipe: DiffusionPipeline, prompts: Sequence[str]) -> Answer:
    """Encode prompts and run the denoiser once over fixed noise."""
    backbone = backbone_for(pipe)
    # Eager mode is forced, because compiled graphs would be compiled again for these shapes.
    with unguarded(), torch.inference_mode(False), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        conditioning = backbone.encode(prompts)
        return Answer(conditioning.tokens.float().cpu(), _predicted(backbone, conditioning))


def _predicted(backbone: Backbone, conditioning: Conditioning) -> Tensor | None:
    denoiser = cast(Denoiser, paths.uncompiled(backbone.denoiser))
    if getattr(denoiser, "encoder_hid_proj", None) is not None or hooks.is_stateful(denoiser):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, backbone.latents.channels, SIDE, SIDE, generator=generator)
    rows = len(conditioning)
    x = x.expand(rows, -1, -1, -1).to(conditioning.tokens.device, backbone.dtype)
    t = torch.full((rows,), 500, device=x.device)
    return backbone.predict(x, t, conditioning).float().cpu()
