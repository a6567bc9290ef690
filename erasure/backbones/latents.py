"""The latents of a family: their shape, how its transformer wants them, and at which scale its VAE has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from erasure.errors import OptionError


@dataclass(frozen=True)
class Latents:
    """Latents `(batch, channels, h, w)` of one pipeline.

    Its denoiser and its sampler have them at another scale and shift than its VAE.
    """

    channels: int
    side: tuple[int, int]
    """Rows and columns of a drawing whose size nobody said."""
    factor: int
    """Pixels along a side of one latent value."""
    scale: float
    """Standard deviation of all latents is 1 after multiplying those of the VAE by this."""
    shift: float = 0.0
    """Mean of the VAE's latents, taken off ahead of that."""
    patch: int = 1
    """Latent values along a side of one token of the denoiser."""

    def shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Channels, rows and columns for a drawing of some pixels.

        Raises:
            OptionError: The pixels are no whole number of latent values.
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
        """The same for drawings of a height and width in pixels, where that is said; see `shape`."""
        if size is None:
            return self
        _, rows, columns = self.shape(*size)
        return replace(self, side=(rows, columns))

    @property
    def step(self) -> int:
        """Pixels that the sides of a drawing are multiples of."""
        return self.patch * self.factor

    def for_vae(self, latents: Tensor) -> Tensor:
        """Latents of the sampler as the VAE decodes them."""
        latents = latents / self.scale
        return latents + self.shift if self.shift else latents

    def from_vae(self, latents: Tensor) -> Tensor:
        """Latents of the VAE as the denoiser is trained on them."""
        return self.scale * (latents - self.shift if self.shift else latents)

    def packed(self, latents: Tensor) -> Tensor:
        """Latents as the pipeline hands them to its denoiser and gives them out: as they are here."""
        return latents

    def unpacked(self, latents: Tensor, height: int | None = None, width: int | None = None) -> Tensor:
        """Undo `packed`: latents `(batch, channels, h, w)` of a drawing of some pixels."""
        return latents


@dataclass(frozen=True)
class PackedLatents(Latents):
    """Latents of which two by two neighbours make one token, as Flux has them."""

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
