"""A sparse autoencoder: TopK and BatchTopK in training, TopK or a threshold (JumpReLU) in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.errors import OptionError

Architecture = Literal["topk", "jumprelu"]


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Sizes and kind of an autoencoder, as in sae-lens' `cfg.json`."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents."""
    k: int
    """Number k of active latents per token: exact with `topk`, the average in training with `jumprelu`."""
    architecture: Architecture = "topk"
    """Activation function: `topk` keeps the k largest latents of a token, `jumprelu` each latent above its own
    threshold."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Free metadata: the model, the hook point, padding, tokens seen, reconstruction quality."""

    def __post_init__(self) -> None:
        """Refuse invalid sizes.

        Raises:
            OptionError: A width is below 1, or k is outside of 1 to d_sae.
        """
        if self.d_in < 1 or self.d_sae < 1 or not 1 <= self.k <= self.d_sae:
            raise OptionError(
                f"an autoencoder of d_in {self.d_in}, d_sae {self.d_sae} and k {self.k} cannot be: widths are 1 or "
                "more and k is at most d_sae"
            )


class FeatureSlice(NamedTuple):
    """Some latents of a dictionary, with encoder and decoder."""

    w_enc: Tensor
    """Encoder, `(d_in, features)`."""
    b_enc: Tensor
    """Encoder bias with the dictionary's input offset folded in, `(features,)`: a latent's value is
    `x @ w_enc + b_enc`."""
    w_dec: Tensor
    """Decoder, `(features, d_in)`."""
    threshold: Tensor
    """Thresholds, `(features,)`; a latent at or below its threshold is 0."""

    def encode(self, x: Tensor) -> Tensor:
        """Encode activations `(..., d_in)` to latents `(..., features)`."""
        return jump_relu(x @ self.w_enc + self.b_enc, self.threshold)


class SparseAutoencoder(nn.Module):
    """`z = f((x - b_dec) W_enc + b_enc)`, `x_hat = z W_dec + b_dec`, with few non-zero `z`.

    Decoder rows have unit length, so a latent's value is the length of the vector that it adds.

    Args:
        config: Sizes and activation function.
    """

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        self.W_enc = nn.Parameter(torch.zeros(config.d_in, config.d_sae))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(config.d_sae))

    @torch.no_grad()
    def initialise(self, sample: Tensor, generator: torch.Generator) -> None:
        """Initialise the decoder with random unit rows, the encoder with their transpose, the offset with a median.

        Args:
            sample: Activations, `(tokens, d_in)`.
            generator: Random generator on the CPU.
        """
        rows = torch.randn(self.W_dec.shape, generator=generator).to(self.W_dec)
        self.W_dec.copy_(F.normalize(rows, dim=1))
        self.W_enc.copy_(self.W_dec.T)
        self.b_enc.zero_()
        self.b_dec.copy_(geometric_median(sample))

    def pre_activations(self, x: Tensor) -> Tensor:
        """Compute the encoder's output `(..., d_sae)` before the activation function, from `(..., d_in)`."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: Tensor) -> Tensor:
        """Encode activations `(..., d_in)` to latents `(..., d_sae)`; differentiable."""
        before = self.pre_activations(x)
        if self.config.architecture == "jumprelu":
            return jump_relu(before, self.threshold)
        values, indices = before.topk(self.config.k, dim=-1)
        return torch.zeros_like(before).scatter(-1, indices, values.relu())

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `(..., d_sae)` to activations `(..., d_in)`."""
        return latents @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct activations `(..., d_in)`."""
        return self.decode(self.encode(x))

    def slice(self, features: Sequence[int]) -> FeatureSlice:
        """Take some latents as a slice.

        With `topk` the latents of a token compete, which a slice cannot compute. The threshold of a slice is then the
        value from which a latent usually is among the k largest.
        """
        index = torch.as_tensor(list(features), device=self.W_enc.device, dtype=torch.long)
        w_enc = self.W_enc.detach()[:, index]
        return FeatureSlice(
            w_enc,
            self.b_enc.detach()[index] - self.b_dec.detach() @ w_enc,
            self.W_dec.detach()[index],
            self.threshold[index],
        )

    @torch.no_grad()
    def normalise(self) -> None:
        """Give every decoder row unit length."""
        self.W_dec.copy_(F.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Convert an autoencoder trained on `scale * x` to one for `x`.

        Decoder rows keep unit length; latents and thresholds are divided by the scale.
        """
        # z' = z / scale, so that x_hat = (z W_dec + b_dec) / scale = z' W_dec + b_dec / scale.
        self.b_enc.div_(scale)
        self.b_dec.div_(scale)
        self.threshold.div_(scale)


def jump_relu(x: Tensor, threshold: Tensor) -> Tensor:
    """Give `x` where it is above the threshold and above 0, and 0 elsewhere."""
    return torch.where((x > threshold) & (x > 0), x, torch.zeros_like(x))


def sparse_decode(values: Tensor, indices: Tensor, offsets: Tensor, w_dec: Tensor) -> Tensor:
    """Compute `z W_dec` from the non-zero latents only, `(tokens, d_in)`.

    Args:
        values: Non-zero latents, token by token, `(non-zeros,)`.
        indices: Index of each of these latents, `(non-zeros,)`.
        offsets: Start of each token's latents, `(tokens,)`.
        w_dec: Decoder, `(d_sae, d_in)`.
    """
    return F.embedding_bag(indices, w_dec, offsets, mode="sum", per_sample_weights=values)


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """Compute the point `(d,)` of least summed distance to `points` `(n, d)`, by Weiszfeld's iteration."""
    work = points.float()
    median = work.mean(0)
    for _ in range(iterations):
        weights = 1 / (work - median).norm(dim=1).clamp_min(1e-8)
        moved = (weights[:, None] * work).sum(0) / weights.sum()
        done = (moved - median).norm() <= tolerance * median.norm()
        median = moved
        if done:
            break
    return median.to(points.dtype)
