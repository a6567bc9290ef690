"""How batches and tokens are laid out in the attention layers of a denoiser: branches, rows, image and text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.backbones import AttentionSite
from erasure.carriers.calls import NamedArguments
from erasure.errors import UnsupportedModelError
from erasure.interop.protocols import Arguments


class Layout(NamedTuple):
    """How the rows of the denoiser's batch, and the tokens of an image, are laid out."""

    latent_size: tuple[int, int]
    """Height and width of the latent."""
    samples: int = 1
    """Images. The batch repeats them in the same order, for each half of classifier-free guidance and each branch."""
    branches: int = 1
    """Parts that the batch falls into, one after the other."""
    changed: tuple[int, ...] = (0,)
    """The branches in which keys are left out or weighted."""

    def per_branch(self, rows: int) -> int:
        """Give the number of rows of one branch.

        Raises:
            UnsupportedModelError: The batch does not fall into so many branches of so many samples.
        """
        if rows % (self.branches * self.samples):
            raise UnsupportedModelError(
                f"a batch of {rows} rows does not fall into {self.branches} branches of {self.samples} samples"
            )
        return rows // self.branches


def to_grid(masks: Tensor, latent_size: tuple[int, int], site: AttentionSite) -> Tensor:
    """Resize masks to a layer's tokens, `(samples, rows, columns)` bool; a token that a mask touches is masked.

    On a coarse grid a mask may touch every token although it leaves a part of the image. The tokens that it covers
    least are then out of it, down to half of what is left of the emptiest one.

    Args:
        masks: `(samples, height, width)` bool, of the latent's size or a multiple of it.
        latent_size: Height and width of the latent.
        site: The layer.
    """
    rows, columns = site.grid(*latent_size)
    side = site.downsampling * (masks.shape[1] // latent_size[0])
    beyond = (0, columns * side - masks.shape[2], 0, rows * side - masks.shape[1])
    covered = F.avg_pool2d(F.pad(masks.float()[:, None], beyond), side)[:, 0]
    inside = F.avg_pool2d(F.pad(torch.ones_like(masks[:, None], dtype=torch.float32), beyond), side)[:, 0]
    free = 1 - covered / inside
    most = free.amax((1, 2), keepdim=True)
    full = (covered > 0).flatten(1).all(1)[:, None, None] & (most > 0)
    return (covered > 0) & ~(full & (free >= most / 2))


class TextTokens(NamedArguments):
    """Hook on the denoiser that records the number of text tokens of a call.

    The single blocks of Flux have text and image in one row of tokens, and are not told where it parts.

    Args:
        denoiser: UNet or transformer.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__(denoiser)
        self.denoiser = denoiser
        self.count = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Count the text's tokens, and change nothing."""
        text = self.by_name(args, kwargs).get("encoder_hidden_states")
        self.count = text.shape[1] if isinstance(text, Tensor) else 0
        return args, kwargs

    def image(self, site: AttentionSite, tokens: int, layout: Layout) -> slice:
        """Find the image's tokens among those of a layer.

        Args:
            site: The layer, self- or joint attention.
            tokens: How many there are.
            layout: Of the latents.

        Raises:
            UnsupportedModelError: They do not fit the layout.
        """
        rows, columns = site.grid(*layout.latent_size)
        text = 0 if site.text == "none" else self.count
        beyond = tokens - text - rows * columns
        # Reference images of Flux Kontext stand behind the image.
        if beyond < 0 or (beyond and site.text != "first"):
            raise UnsupportedModelError(
                f"{site.name} is given {tokens} tokens, {text} of them text's; wanted: {rows * columns} besides, of a "
                f"latent of {layout.latent_size[1]}x{layout.latent_size[0]}"
            )
        first = text if site.text == "first" else 0
        return slice(first, first + rows * columns)
