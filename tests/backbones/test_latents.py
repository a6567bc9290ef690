"""Shapes, packing and scales of latents, and what denoisers are told, against diffusers' own arithmetic."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxPipeline

from erasure.backbones import Conditioning
from erasure.backbones.latents import Latents, PackedLatents
from erasure.errors import OptionError

PLAIN = Latents(4, (64, 48), 8, 0.18215)
PACKED = PackedLatents(16, (8, 6), 8, 0.3611, 0.1159)


def test_sizes_are_in_pixels_and_the_own_ones_when_left_out() -> None:
    assert PLAIN.shape() == (4, 64, 48)
    assert PLAIN.shape(256) == (4, 32, 48)
    assert PLAIN.shape(256, 128) == (4, 32, 16)


def test_a_session_may_have_a_size_of_its_own() -> None:
    assert PACKED.of_size(None) is PACKED
    assert PACKED.of_size((64, 128)).shape() == (16, 8, 16)
    with pytest.raises(OptionError, match="multiples of 16"):
        PACKED.of_size((64, 72))


@pytest.mark.parametrize(("latents", "step"), [(PLAIN, 8), (PACKED, 16)])
def test_sizes_that_do_not_divide_are_refused_with_one_that_does(latents: Latents, step: int) -> None:
    with pytest.raises(
        OptionError, match=rf"height is {3 * step - 4} pixels, .* multiples of {step}: choose {2 * step}"
    ):
        latents.shape(3 * step - 4, 2 * step)
    with pytest.raises(OptionError, match=f"width is 1 pixels, .* choose {step}"):
        latents.shape(step, 1)


def test_packing_is_that_of_flux() -> None:
    x = torch.randn(2, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    stock = FluxPipeline._pack_latents(x, 2, 16, 8, 6)
    assert torch.equal(PACKED.packed(x), stock)
    assert torch.equal(PACKED.unpacked(stock), x)
    assert torch.equal(PACKED.unpacked(stock, 64, 48), FluxPipeline._unpack_latents(stock, 64, 48, 8))
    assert PLAIN.packed(x) is PLAIN.unpacked(x) is x


def test_the_vae_has_them_at_its_own_scale_and_shift() -> None:
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(PACKED.for_vae(x), x / 0.3611 + 0.1159, rtol=0, atol=0)
    torch.testing.assert_close(PACKED.from_vae(PACKED.for_vae(x)), x)
    torch.testing.assert_close(PLAIN.for_vae(x), x / 0.18215, rtol=0, atol=0)
    torch.testing.assert_close(PLAIN.from_vae(PLAIN.for_vae(x)), x)


def test_rows_of_what_is_told_go_together() -> None:
    told = Conditioning(torch.arange(12.0).view(2, 3, 2), torch.arange(4.0).view(2, 2))
    second = told.rows(torch.tensor([1]))
    assert len(told) == 2
    assert torch.equal(second.tokens, told.tokens[1:])
    assert second.pooled is not None
    assert told.pooled is not None
    assert torch.equal(second.pooled, told.pooled[1:])
    assert second.mask is None
    both = Conditioning.cat([second, told.rows(slice(1))])
    assert torch.equal(both.tokens, told.tokens.flip(0))
    assert both.pooled is not None
    assert torch.equal(both.pooled, told.pooled.flip(0))
    assert torch.equal(second.repeated(3).tokens, told.tokens[1:].repeat(3, 1, 1))
    assert told.of("tokens") is told.tokens
    assert torch.equal(told.of("pooled"), told.pooled[:, None])
