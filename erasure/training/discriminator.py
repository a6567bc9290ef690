"""A discriminator of clean latents, for adversarial training of the denoiser."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.training.turns import After, Player

WIDTHS = (64, 128, 256, 512)
"""Channels of the hidden layers (DoCo's code)."""
SMALLEST = 4
"""Number of rows at which layers stop halving the feature map."""
GROUPS = 32
LEVEL_FEATURES = 128
Norm = Literal["group", "batch"]

CERTAIN = 0.02
"""Mean cross-entropy below which a discriminator makes no errors; guessing gives ln 2."""
PATIENCE = 50
"""Number of successive updates without errors before a warning."""
BLIND = 0.6
"""Share of right judgements below which a discriminator has learned nothing; guessing gives 0.5."""
MEMORY = 0.9
"""Decay of the running mean of right judgements."""


class DiscriminatorWarning(UserWarning):
    """A discriminator gives no useful gradient: it makes no errors, or it guesses."""


class Discriminator(Player):
    """Classifies clean latents as one of two kinds, patch by patch (PatchGAN).

    Four layers of 4 x 4 convolutions halve the feature map, and a last layer classifies, as in DoCo's code. On feature
    maps of four rows layers are 3 x 3 convolutions that keep the size.

    Args:
        channels: Number of channels of the latents.
        size: Rows and columns of the latents.
        norm: Normalisation of the middle layers: by groups of channels within each sample, or by the batch (DoCo's
            code), where the output for a sample depends on the other samples.
        told_level: Whether the noise level of each prediction is an input. Predictions at high levels are blurred
            whatever they show.
        seed: Seed of the initial weights.
    """

    certain: Tensor
    right: Tensor
    updates: Tensor

    def __init__(
        self, channels: int, size: tuple[int, int], *, norm: Norm = "group", told_level: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
            rows, before = min(size), channels
            for number, width in enumerate(WIDTHS):
                halves = rows >= 2 * SMALLEST
                rows = rows // 2 if halves else rows
                kernel, stride = (4, 2) if halves else (3, 1)
                self.layers.append(nn.Conv2d(before, width, kernel, stride, padding=1))
                normed = nn.BatchNorm2d(width) if norm == "batch" else nn.GroupNorm(GROUPS, width)
                self.norms.append(normed if number else nn.Identity())
                before = width
            # A feature map smaller than 2 x 2 has no room for the 4 x 4 kernel.
            self.last = nn.Conv2d(before, 1, 4 if rows > 1 else 3, padding=1)
            self.level: nn.Module | None = None
            if told_level:
                self.level = nn.Sequential(
                    Timesteps(LEVEL_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0),
                    TimestepEmbedding(LEVEL_FEATURES, 2 * LEVEL_FEATURES, out_dim=2 * sum(WIDTHS)),
                )
        # These are saved in checkpoints, so that a resumed training warns as an uninterrupted one does.
        for name in ("certain", "right", "updates"):
            self.register_buffer(name, torch.tensor(0.5 if name == "right" else 0.0))
        self.judged: list[tuple[float, float]] = []

    def judge(self, clean: Tensor, t: Tensor) -> Tensor:
        """Compute logits that latents are of the second kind, `(batch, 1, rows, columns)`.

        Args:
            clean: Clean latents, `(batch, channels, h, w)`.
            t: Timesteps, `(batch,)`.
        """
        x, told = clean.float(), None if self.level is None else self.level(t.float())[..., None, None]
        parts = [None] * len(WIDTHS) if told is None else told.split([2 * width for width in WIDTHS], 1)
        for layer, norm, part in zip(self.layers, self.norms, parts, strict=True):
            x = norm(layer(x))
            if part is not None:
                scale, shift = part.chunk(2, 1)
                x = x * (1 + scale) + shift
            x = F.leaky_relu(x, 0.2)
        return self.last(x)

    def errors(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropies for latents of the first and of the second kind.

        Args:
            first: Logits of latents of the first kind.
            second: Logits of latents of the second kind.
        """
        found = looks_like(first, 0.0), looks_like(second, 1.0)
        right = float(((first < 0).float().mean() + (second > 0).float().mean()) / 2)
        self.judged.append((float((found[0] + found[1]).detach()) / 2, right))
        return found


def looks_like(logits: Tensor, kind: float) -> Tensor:
    """Compute the cross-entropy of logits with a kind: 0 is the first one, 1 the second."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, kind))


class DiscriminatorMonitor(After):
    """Warns when a discriminator gives the network that plays against it no useful gradient.

    Args:
        judge: The discriminator; `apply` is called after its steps.
        since: Number of the first update in which the other network is trained.
    """

    def __init__(self, judge: Discriminator, since: int) -> None:
        self.judge, self.since = judge, since

    @torch.no_grad()
    def apply(self, update: int, lr: float) -> None:
        """Check the discriminator's outputs of an update."""
        judge = self.judge
        loss, right = (sum(part) / len(part) for part in zip(*judge.judged, strict=True))
        judge.judged.clear()
        judge.updates += 1
        judge.right.lerp_(torch.tensor(right, device=judge.right.device), 1 - MEMORY)
        if update == self.since and self.since >= PATIENCE and float(judge.right) < BLIND:
            self._warn(
                f"after {update} updates alone the discriminator tells the concept from its anchor in "
                f"{float(judge.right):.0%} of cases, where a guess is 50%: it has little to teach. Raise "
                "discriminator_lr or head_start, or choose an anchor that looks different"
            )
        if update < self.since:
            return
        judge.certain.copy_((judge.certain + 1) * (loss < CERTAIN))
        if int(judge.certain) == PATIENCE:
            self._warn(
                f"the discriminator has collapsed: it erred nowhere in the last {PATIENCE} updates (its loss is "
                f"{loss:.3g} at update {update}), so what it teaches hardly depends on what the student does. Lower "
                "discriminator_lr, or raise lr"
            )

    def figures(self) -> dict[str, float]:
        """Give the final share of right judgements (guessing gives 0.5), and the number of updates without errors."""
        return {"discriminator_right": float(self.judge.right), "discriminator_certain": float(self.judge.certain)}

    def _warn(self, message: str) -> None:
        warnings.warn(message, DiscriminatorWarning, stacklevel=2)
