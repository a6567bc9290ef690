"""Train a sparse autoencoder on a stream of activations that is never stored.

It does not use the loop of `erasure.training.loop`, because every process reads its own stream instead of a share of
one batch, the decoder's gradient is changed before each step, and its figures (unexplained variance, dead latents) are
not losses.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from erasure import files
from erasure.errors import DivergenceError
from erasure.interop.protocols import Settings
from erasure.sae.model import SAEConfig, SparseAutoencoder, sparse_decode
from erasure.sae.options import TrainingOptions
from erasure.training.checkpoint import Checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

RECIPE, CHECKPOINT = "training.json", "training.ckpt"
Stream = Callable[[int], Tensor]
"""Gives the activations `(tokens, d_in)` of a step: the same whenever asked, so that training resumes exactly."""


class Losses(NamedTuple):
    """Losses and statistics of a batch."""

    total: Tensor
    """The loss to minimise."""
    fvu: Tensor
    """Fraction of variance unexplained, detached."""
    fired: Tensor
    """Latents that fired on the batch, `(d_sae,)` bool."""
    least: Tensor
    """Smallest kept latent, detached; see `TrainingLoss.least_kept`."""


class TrainingLoss(nn.Module):
    """Reconstruction loss of a batch, with an additional loss that lets dead latents reconstruct the error.

    Args:
        sae: The autoencoder.
        options: Options of the training.
    """

    def __init__(self, sae: SparseAutoencoder, options: TrainingOptions) -> None:
        super().__init__()
        self.sae, self.options = sae, options
        self.silent: Tensor
        self.register_buffer("silent", torch.zeros(sae.config.d_sae, dtype=torch.int64))
        self.least: Tensor
        self.register_buffer("least", torch.tensor(-1.0))
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Losses:
        """Compute the losses of activations `(tokens, d_in)`, scaled to a mean square of 1 per dimension."""
        x = x * self.scale
        before = self.sae.pre_activations(x)
        values, indices, offsets = keep_largest(before, self.sae.config.k, self.options.batch_topk)
        error = x - (self.decode(values, indices, offsets) + self.sae.b_dec)
        fvu = variance_share(error, x)
        total = fvu + self.options.aux_coefficient * self.dead_loss(before, error.detach())
        fired = torch.zeros(self.sae.config.d_sae, dtype=torch.bool, device=x.device)
        fired[indices[values > 0]] = True
        return Losses(total, fvu.detach(), fired, self.least_kept(values.detach()))

    def decode(self, values: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        """Decode from the non-zero latents only, see `sparse_decode`."""
        return sparse_decode(values, indices, offsets, self.sae.W_dec)

    def least_kept(self, values: Tensor) -> Tensor:
        """Give the smallest kept latent: over the batch, or averaged over the tokens."""
        if not self.options.batch_topk:
            return values.view(-1, self.sae.config.k).min(1).values.mean()
        kept = values[values > 0]
        return kept.min() if len(kept) else values.new_tensor(0.0)

    def dead_loss(self, before: Tensor, error: Tensor) -> Tensor:
        """Compute the loss of the best dead latents in reconstructing `error` (target minus reconstruction), or 0.

        Args:
            before: Encoder output before the activation function, `(tokens, d_sae)`.
            error: Error, detached, `(tokens, d_in)`.
        """
        dead = self.silent > self.options.dead_after
        count = int(dead.sum())
        if count == 0:
            return before.new_tensor(0.0)
        wanted = self.options.aux_k or max(self.sae.config.d_in // 2, 1)
        k = min(wanted, count)
        values, indices, offsets = keep_largest(before.masked_fill(~dead, -torch.inf), k, batch=False)
        left = error - self.decode(values, indices, offsets)
        return min(count / wanted, 1.0) * variance_share(left, error).nan_to_num(0.0)

    @torch.no_grad()
    def count(self, fired: Tensor, tokens: int, least: Tensor) -> None:
        """Record which latents fired on `tokens` tokens, and the smallest kept value."""
        self.silent += tokens
        self.silent[fired] = 0
        first = self.least < 0
        decay = self.options.threshold_decay
        self.least.copy_(torch.where(first, least, decay * self.least + (1 - decay) * least))


def keep_largest(before: Tensor, k: int, batch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the largest latents; give values, indices and offsets for `sparse_decode`.

    Args:
        before: Encoder output before the activation function, `(tokens, d_sae)`.
        k: Number of latents per token.
        batch: Keep k on average over the batch instead of exactly.
    """
    tokens, width = before.shape
    starts = torch.arange(tokens, device=before.device)
    if not batch:
        values, indices = before.topk(k, dim=1, sorted=False)
        return values.relu().flatten(), indices.flatten(), starts * k
    flat = before.flatten()
    _, chosen = flat.topk(min(k * tokens, flat.numel()), sorted=False)
    chosen = chosen.sort().values
    return flat[chosen].relu(), chosen % width, torch.searchsorted(chosen // width, starts)


def variance_share(error: Tensor, target: Tensor) -> Tensor:
    """Compute the fraction of the variance of `target` that is left in `error`, both `(tokens, dim)`."""
    return error.pow(2).sum() / (target - target.mean(0)).pow(2).sum()


class SAETrainer:
    """Train an autoencoder, on one process or under `accelerate launch` on many.

    Args:
        stream: Gives activations by step; each process has its own.
        options: Options of the training.
        folder: Folder of checkpoints; none are written when left out. A training resumes from them only if
            activations, options and processes are the same.
        accelerator: Processes of the training; a new `Accelerator` when left out. Its trackers log every step.
    """

    def __init__(
        self,
        stream: Stream,
        options: TrainingOptions,
        *,
        folder: Path | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        from accelerate import Accelerator

        self.stream, self.options = stream, options
        self.accelerator = accelerator or Accelerator()
        sample = stream(0)
        architecture = "jumprelu" if options.batch_topk else "topk"
        config = SAEConfig(d_in=sample.shape[1], d_sae=options.d_sae, k=options.k, architecture=architecture)  # type: ignore[arg-type]
        self.sae = SparseAutoencoder(config)
        self.losses = TrainingLoss(self.sae, options)
        self.losses.scale.copy_((sample.shape[1] / sample.float().pow(2).sum(1).mean()).sqrt())
        self.sae.initialise(sample.float().cpu() * self.losses.scale, torch.Generator().manual_seed(options.seed))
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=options.learning_rate, betas=(0.9, 0.999))
        self.folder, self.state = folder, None
        self.recipe: Settings = {}
        if folder is not None:
            self.state = Checkpoint(folder / CHECKPOINT, losses=self.losses, optimiser=self.optimiser)
            self.recipe = self._recipe(sample)

    def _recipe(self, sample: Tensor) -> Settings:
        """Give everything on which the result depends."""
        options = dataclasses.asdict(self.options)
        del options["save_every"]
        # A stream that has no recipe is identified by a sample of its activations.
        known = getattr(self.stream, "recipe", lambda: {"sample": files.digest(sample.tolist())})
        return {
            "options": options, "activations": {"width": sample.shape[1], **known()},
            "processes": self.accelerator.num_processes, "precision": str(self.accelerator.mixed_precision),
        }  # fmt: skip

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder of checkpoints, if there is one, and check that it belongs to the same training.

        Raises:
            TrainingError: Another process trains there, or something else was trained there.
        """
        if self.folder is None or not self.accelerator.is_main_process:
            yield
            return
        with files.held(
            self.folder, self.recipe, file=RECIPE, what="training", doing="training", beside=None, state=(CHECKPOINT,)
        ):
            yield

    def learning_rate(self, step: int) -> float:
        """Give the learning rate: linear warm-up, constant, then linear to zero."""
        options = self.options
        rise = (step + 1) / max(options.warmup, 1)
        fall = (options.steps - step) / max(options.decay * options.steps, 1)
        return options.learning_rate * min(1.0, rise, fall)

    def train(self, progress: Callable[[float], None] = lambda share: None) -> SparseAutoencoder:
        """Train to the end, starting from the last checkpoint if there is one.

        Returns:
            The autoencoder for unscaled activations, with thresholds and the last figures in its metadata.

        Raises:
            DivergenceError: The loss is NaN or infinite.
            TrainingError: The folder holds another training, or a checkpoint cannot be read or written.
        """
        with self.held():
            return self._train(progress)

    def _train(self, progress: Callable[[float], None]) -> SparseAutoencoder:
        started = time.monotonic()
        start = self.state.resume(self.options.steps) if self.state else 0
        losses, optimiser = self.accelerator.prepare(self.losses, self.optimiser)
        row: dict[str, float] = {}
        for step in range(start, self.options.steps):
            row = self.step(losses, optimiser, self.stream(step), step)
            self.accelerator.log(row, step=step)
            progress((step + 1) / self.options.steps)
            due = (step + 1) % self.options.save_every == 0 and step + 1 < self.options.steps
            # No checkpoint is saved after the last step, because its figures belong to the result.
            if self.state and self.accelerator.is_main_process and due:
                self.state.save(step + 1)
        self.sae.threshold.fill_(max(float(self.losses.least), 0.0))
        self.sae.fold_scale(float(self.losses.scale))
        seconds = self.state.elapsed if self.state else time.monotonic() - started
        self.sae.config.metadata.update({**row, "steps": self.options.steps, "seconds": round(seconds, 3)})
        return self.sae.eval().requires_grad_(False)

    def discard_checkpoint(self) -> None:
        """Remove the checkpoint, once the result is saved."""
        if self.folder is not None:
            files.discard(self.folder, (CHECKPOINT, RECIPE))

    def step(self, losses: nn.Module, optimiser: torch.optim.Optimizer, x: Tensor, step: int) -> dict[str, float]:
        """Take one optimiser step and give its figures."""
        for group in optimiser.param_groups:
            group["lr"] = self.learning_rate(step)
        found: Losses = losses(x.to(self.accelerator.device, torch.float32))
        if not torch.isfinite(found.total):
            raise DivergenceError(
                f"the loss is {found.total.item()} at step {step}: lower learning_rate (now "
                f"{self.options.learning_rate:g}), or look for NaN in the activations"
            )
        optimiser.zero_grad()
        self.accelerator.backward(found.total)
        decoder = self.sae.W_dec
        assert decoder.grad is not None
        # The gradient's part along a row is removed: renormalisation would undo it, and it would only fill Adam's
        # moments.
        with torch.no_grad():
            decoder.grad -= (decoder.grad * decoder).sum(1, keepdim=True) * decoder
        self.accelerator.clip_grad_norm_(self.sae.parameters(), self.options.clip)
        optimiser.step()
        self.sae.normalise()
        tokens = torch.tensor(len(x), device=x.device)
        fired, least = found.fired.long(), found.least
        if self.accelerator.num_processes > 1:
            fired, tokens = self.accelerator.reduce(fired), self.accelerator.reduce(tokens)
            least = self.accelerator.reduce(least, reduction="mean")
        self.losses.count(fired > 0, int(tokens), least)
        dead = (self.losses.silent > self.options.dead_after).float().mean()
        return {"fvu": float(found.fvu), "loss": float(found.total.detach()), "dead": float(dead)}
