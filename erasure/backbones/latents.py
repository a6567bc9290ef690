"""The latents of a family: shape, packing for the transformer, and the VAE's scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from erasure.errors import OptionError


@dataclass(frozen=True)
class Latents:
    """Latents `(batch, channels, h, w)` of one pipeline.

    The denoiser and the sampler use another scale and shift than the VAE.
    """

    channels: int
    side: tuple[int, int]
    """Default number of rows and columns."""
    factor: int
    """Number of pixels along a side of one latent value."""
    scale: float
    """Factor of the VAE's latents that makes their standard deviation 1."""
    shift: float = 0.0
    """Mean of the VAE's latents, which is subtracted before scaling."""
    patch: int = 1
    """Number of latent values along a side of a denoiser token."""

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Give channels, rows and columns for an image's height and width in pixels.

        Raises:
            OptionError: The size is not a multiple of the latents' factor.
        """
        sides = []
        for name, pixels, usual in (("height", height, self.side[0]), ("width", width, self.side[1])):
            if pixels and pixels % self.step:
                raise OptionError(
                    f"{name} is {pixels} pixels, allowed are multiples of {self.step}: choose "
                    f"{max(self.step, pixels // self.step * self.step)}"
                )
            sides.append(pixels // self.factor if pixels else usual)
        return self.channels, sides[0], sides[1]

    def of_size(self, size: tuple[int, int] | None) -> Self:
        """Copy with another default size in pixels, if given; see `shape`."""
        if size is None:
            return self
        _, rows, columns = self.shape(*size)
        return replace(self, side=(rows, columns))

    @property
    def step(self) -> int:
        """Number of pixels of which an image's sides must be multiples."""
        return self.patch * self.factor

    def for_vae(self, latents: Tensor) -> Tensor:
        """Convert the sampler's latents to the VAE's."""
        latents = latents / self.scale
        return latents + self.shift if self.shift else latents

    def from_vae(self, latents: Tensor) -> Tensor:
        """Convert the VAE's latents to the denoiser's."""
        return self.scale * (latents - self.shift if self.shift else latents)

    def packed(self, latents: Tensor) -> Tensor:
        """Pack latents as the pipeline passes and returns them: unchanged here."""
        return latents

    def unpacked(self, latents: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Undo `packed`: latents `(batch, channels, h, w)` of a drawing of some pixels."""
        return latents


@dataclass(frozen=True)
class PackedLatents(Latents):
    """Latents whose 2 x 2 neighbours form one token, as in Flux."""

    patch: int = 2

    def packed(self, latents: Tensor) -> Tensor:
        """See `pack`."""
        return pack(latents)

    def unpacked(self, latents: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Undo `packed`: latents `(batch, channels, h, w)` of a drawing of some pixels."""
        _, rows, columns = self.shape(height, width)
        return unpack(latents, rows, columns)


def pack(latents: Tensor) -> Tensor:
    """Make tokens `(batch, h / 2 * w / 2, 4 * channels)` of latents `(batch, channels, h, w)`: one of two by two."""
    batch, channels, rows, columns = latents.shape
    squares = latents.view(batch, channels, rows // 2, 2, columns // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns // 4, 4 * channels)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `pack`: latents `(batch, channels, rows, columns)`."""
    batch, channels = len(tokens), tokens.shape[2] // 4
    squares = tokens.view(batch, rows // 2, columns // 2, channels, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows, columns)
