"""A discriminator of clean latents: the player that adversarial trainings of the denoiser play against."""

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
"""Rows of the map that layers no longer halve."""
GROUPS = 32
LEVEL_FEATURES = 128
Norm = Literal["group", "batch"]

CERTAIN = 0.02
"""Mean cross-entropy of its judgements below which a discriminator errs nowhere; ln 2 is a guess."""
PATIENCE = 50
"""Updates in a row that say so."""
BLIND = 0.6
"""Share of right judgements below which it has learned nothing to speak of; 0.5 is a guess."""
MEMORY = 0.9
"""Share that the running mean of right judgements keeps."""


class DiscriminatorWarning(UserWarning):
    """A discriminator tells its player nothing: it errs nowhere, or it cannot tell things apart at all."""


class Discriminator(Player):
    """Tells clean latents of one kind from those of another, patch by patch (PatchGAN).

    Four layers of 4 x 4 convolutions that halve the map and a last one that judges, as in DoCo's code; on maps of four
    rows, which small latents come to early, layers are 3 x 3 and keep the size.

    Args:
        channels: Of the latents.
        size: Rows and columns of the latents.
        norm: What the middle layers are normalised by: each sample alone in groups of channels, or the batch (DoCo's
            code), where a judgement depends on the rows beside it.
        told_level: Whether it is told the noise level that a clean latent was predicted at: at high ones predictions
            are blurred, whatever they show.
        seed: Of the initial weights.
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
            # On a map below 2 x 2 there is no room for the kernel.
            self.last = nn.Conv2d(before, 1, 4 if rows > 1 else 3, padding=1)
            self.level: nn.Module | None = None
            if told_level:
                self.level = nn.Sequential(
                    Timesteps(LEVEL_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0),
                    TimestepEmbedding(LEVEL_FEATURES, 2 * LEVEL_FEATURES, out_dim=2 * sum(WIDTHS)),
                )
        # In the checkpoint, so that a training that goes on warns where one without a break does.
        for name in ("certain", "right", "updates"):
            self.register_buffer(name, torch.tensor(0.5 if name == "right" else 0.0))
        self.judged: list[tuple[float, float]] = []

    def judge(self, clean: Tensor, t: Tensor) -> Tensor:
        """How certain it is that latents are of the second kind: logits `(batch, 1, rows, columns)`.

        Args:
            clean: `(batch, channels, h, w)`.
            t: `(batch,)` noise levels.
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
        """Cross-entropies of its judgements of latents of the first and of the second kind.

        Args:
            first: Logits of latents of the first kind.
            second: Those of latents of the second kind.
        """
        found = looks_like(first, 0.0), looks_like(second, 1.0)
        right = float(((first < 0).float().mean() + (second > 0).float().mean()) / 2)
        self.judged.append((float((found[0] + found[1]).detach()) / 2, right))
        return found


def looks_like(logits: Tensor, kind: float) -> Tensor:
    """Cross-entropy of judgements with a kind: 0 is the first one, 1 the second."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, kind))


class Watch(After):
    """Warns where a discriminator has nothing to say to the one that plays against it.

    Args:
        judge: The discriminator, behind whose steps it is called.
        since: Number of the first update in which the other player learns.
    """

    def __init__(self, judge: Discriminator, since: int) -> None:
        self.judge, self.since = judge, since

    @torch.no_grad()
    def apply(self, update: int, lr: float) -> None:
        """Look at the judgements of an update."""
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
        """Share of right judgements in the end (0.5 is a guess), and how long it erred nowhere."""
        return {"discriminator_right": float(self.judge.right), "discriminator_certain": float(self.judge.certain)}

    def _warn(self, message: str) -> None:
        warnings.warn(message, DiscriminatorWarning, stacklevel=2)
