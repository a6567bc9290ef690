"""ComfyUI's IMAGE and MASK, and what pipelines take and give."""

from __future__ import annotations

from torch import Tensor

from erasure.errors import MaskError


def pixels_of(image: Tensor) -> Tensor:
    """Pixels `(batch, 3, height, width)` of an IMAGE, `(batch, height, width, 3)` float32 in 0-1.

    Raises:
        MaskError: Another shape, nothing in it, or values that are not finite.
    """
    if image.ndim != 4 or image.shape[-1] != 3 or not image.numel():
        raise MaskError(
            f"an IMAGE has the shape {tuple(image.shape)}, wanted (batch, height, width, 3): split off its "
            "transparency first (Split Image with Alpha)"
        )
    if not image.isfinite().all():
        raise MaskError("an IMAGE holds NaN or infinity: look at the node that made it")
    return image.detach().float().cpu().clamp(0, 1).movedim(-1, 1).contiguous()


def image_of(pixels: Tensor) -> Tensor:
    """The inverse of `pixels_of`."""
    return pixels.detach().float().cpu().clamp(0, 1).movedim(1, -1).contiguous()


def masks_of(mask: Tensor) -> list[Tensor]:
    """Masks `(height, width)`, one by one, of a MASK, `(batch, height, width)` float32 in 0-1; 1 is to be removed.

    Raises:
        MaskError: Another shape, or nothing is marked in any.
    """
    batch = mask[None] if mask.ndim == 2 else mask
    if batch.ndim != 3 or not batch.numel():
        raise MaskError(f"a MASK has the shape {tuple(mask.shape)}, wanted (batch, height, width)")
    if not batch.any():
        raise MaskError(
            "the MASK is empty, so nothing would be removed: paint what goes (Open in MaskEditor), or connect no mask "
            "and name it in words. Load Image gives an empty mask for a picture without transparency"
        )
    return [one.detach().float().cpu() for one in batch]


def words_of(text: str) -> list[str]:
    """Words that are listed with commas or line breaks between them."""
    return [word for word in (part.strip() for part in text.replace("\n", ",").split(",")) if word]
