"""Quality of an autoencoder on activations that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from erasure.backbones import TextTower
from erasure.errors import WrongBaseError
from erasure.interop import hooks
from erasure.interop.hooks import ModelHook
from erasure.interop.protocols import Pipeline
from erasure.sae.model import SparseAutoencoder, jump_relu
from erasure.sae.stream import block_of
from erasure.sae.training import Stream


class Quality(NamedTuple):
    """Figures measured on a sample of tokens."""

    fvu: float
    """Fraction of variance unexplained: 0 is perfect, 1 no better than the mean."""
    latents_per_token: float
    """Average number of latents that fire on a token."""
    silent: float
    """Share of latents that fired on no token of the sample."""
    topk_agreement: float
    """Agreement of thresholds and top-k: of the latents that are above their threshold or among a token's k
    largest, the share that are both. A slice of the dictionary, which uses thresholds, selects as the whole
    dictionary to this extent."""
    tokens: int
    """Number of tokens of the sample."""


@torch.no_grad()
def quality(sae: SparseAutoencoder, stream: Stream, steps: int = 20) -> Quality:
    """Measure on `steps` batches of a stream.

    Raises:
        The activations have another width.
    """
    batches = [stream(step) for step in range(steps)]
    sample = torch.cat(batches)
    if sample.shape[1] != sae.config.d_in:
        raise WrongBaseError(
            f"the autoencoder is for activations of width {sae.config.d_in}, these have {sample.shape[1]}: it belongs "
            "to another model or another tower"
        )
    mean = sample.mean(0)
    left = total = active = both = either = 0.0
    fired = torch.zeros(sae.config.d_sae, dtype=torch.bool, device=sample.device)
    for x in batches:
        latents = sae.encode(x)
        left += float((x - sae.decode(latents)).pow(2).sum())
        total += float((x - mean).pow(2).sum())
        active += float((latents > 0).sum())
        fired |= (latents > 0).any(0)
        before = sae.pre_activations(x)
        above = jump_relu(before, sae.threshold) > 0
        values, indices = before.topk(sae.config.k, dim=-1)
        largest = torch.zeros_like(above).scatter(-1, indices, values > 0)
        both, either = both + float((above & largest).sum()), either + float((above | largest).sum())
    silent = float((~fired).float().mean())
    return Quality(left / total, active / len(sample), silent, both / max(either, 1.0), len(sample))


_RECONSTRUCT = "erasure_reconstruct"


class _Reconstruct(ModelHook):
    """Hook on a block: replaces every token vector from the first word on by its reconstruction."""

    def __init__(self, sae: SparseAutoencoder, leading: int) -> None:
        super().__init__()
        self.sae, self.leading = sae, leading

    def post_forward(self, module: nn.Module, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        states = output[0] if isinstance(output, tuple) else output
        made = torch.cat([states[:, : self.leading], self.sae(states[:, self.leading :].float()).to(states)], 1)
        return (made, *output[1:]) if isinstance(output, tuple) else made


@contextmanager
def reconstructed(tower: TextTower, layer: int, sae: SparseAutoencoder) -> Iterator[None]:
    """Run a text encoder with a block's output replaced by its reconstruction, inside of the block."""
    with hooks.hooked(block_of(tower, layer), _Reconstruct(sae, tower.leading), _RECONSTRUCT):
        yield


class ClipLoss(NamedTuple):
    """CLIP scores of images with and without reconstructions in the text encoder."""

    clip_score: float
    """CLIP score of the stock model's images: mean cosine with their prompts."""
    clip_score_reconstructed: float
    """CLIP score of the images with reconstructions, from the same noise."""
    images: int
    """Number of images of each kind."""


def clip_loss(
    pipe: Pipeline, tower: TextTower, layer: int, sae: SparseAutoencoder, prompts: Sequence[str],
    score: Callable[[Sequence[Image.Image], Sequence[str]], float], **settings: object,
) -> ClipLoss:  # fmt: skip
    """Draw prompts with the stock text encoder and with the reconstruction, from the same noise.

    Args:
        pipe: A diffusers pipeline.
        tower: One of its text encoders.
        layer: The block that the autoencoder reads.
        sae: The autoencoder.
        prompts: Prompts, one image each.
        score: Computes the CLIP score of images and their prompts.
        settings: Arguments of the pipeline's call.
    """

    def draw() -> list[Image.Image]:
        noise = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        pairs = zip(prompts, noise, strict=True)
        return [pipe(prompt, generator=generator, **settings).images[0] for prompt, generator in pairs]

    stock = score(draw(), prompts)
    with reconstructed(tower, layer, sae.to(next(tower.root.parameters()).device)):
        return ClipLoss(stock, score(draw(), prompts), len(prompts))
