"""IP-Adapters in a network that listens to them now and then: diffusers' own are the reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erasure.backbones import backbone_for
from erasure.errors import ErasureError, OptionError, UnsupportedModelError, WrongBaseError
from erasure.interop.image_prompts import ImagePrompts, opened, refined, showing

FOLDER = Path(__file__).parents[1] / "tiny" / "ip-adapter"
FAMILIES = ["stable-diffusion", "stable-diffusion-xl"]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def file(family: str) -> Path:
    return FOLDER / f"{family}.safetensors"


@pytest.fixture
def pipe(family: str, tiny_models: Any) -> Any:
    return tiny_models[family]()


@pytest.fixture
def adapter(pipe: Any, file: Path) -> ImagePrompts:
    return opened(file, None, pipe.unet)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    colours = ((255, 0, 0), (10, 200, 30))
    return [Image.new("RGB", (32, 32), colour) for colour in colours]


@torch.no_grad()
def predicted(pipe: Any, rows: int = 2) -> torch.Tensor:
    backbone, generator = backbone_for(pipe), torch.Generator().manual_seed(1)
    x = torch.randn(rows, 4, 16, 16, generator=generator)
    return backbone.predict(x, torch.full((rows,), 300), backbone.encode(["a photo of a cat", "a dog"][:rows]))


def stopped(pipe: Any) -> None:
    predicted(pipe)
    raise KeyboardInterrupt


def test_what_attention_hears_is_what_the_loader_of_diffusers_makes_it_hear(
    pipe: Any, file: Path, adapter: ImagePrompts, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    with adapter.listening(pipe.unet), showing(pipe.unet, adapter.tokens(adapter.embeddings(pictures))):
        found = predicted(pipe)
    stock = predicted(pipe)
    pipe.load_ip_adapter(str(FOLDER), subfolder="", weight_name=file.name)
    embeddings, zeros = pipe.encode_image(pictures, pipe.device, 1)
    assert not zeros.any()
    torch.testing.assert_close(adapter.embeddings(pictures), embeddings)
    forward = pipe.unet.forward

    def with_pictures(*args: Any, **named: Any) -> Any:
        added = {**(named.pop("added_cond_kwargs", None) or {}), "image_embeds": [embeddings[:, None]]}
        return forward(*args, **named, added_cond_kwargs=added)

    monkeypatch.setattr(pipe.unet, "forward", with_pictures)
    torch.testing.assert_close(predicted(pipe), found)
    assert (found - stock).abs().max() > 1e-3
    # The stock class at scale 0 says the same as calls that show nothing here.
    pipe.set_ip_adapter_scale(0.0)
    torch.testing.assert_close(predicted(pipe), stock, rtol=0, atol=0)


def test_a_call_without_pictures_is_the_stock_model_s_to_the_bit(pipe: Any, adapter: ImagePrompts) -> None:
    before, state = predicted(pipe), set(pipe.unet.state_dict())
    with adapter.listening(pipe.unet):
        assert torch.equal(predicted(pipe), before)
        assert set(pipe.unet.state_dict()) == state


def test_the_pipeline_is_left_as_it_was(
    pipe: Any, adapter: ImagePrompts, tensors_of: Any, changed_tensors: Any
) -> None:
    before, processors = tensors_of(pipe), dict(pipe.unet.attn_processors)
    config, components = dict(pipe.unet.config), dict(pipe.components)
    with (
        pytest.raises(KeyboardInterrupt),
        adapter.listening(pipe.unet),
        showing(pipe.unet, torch.zeros(2, 4, pipe.unet.config.cross_attention_dim)),
    ):
        stopped(pipe)
    assert not changed_tensors(before, pipe)
    assert all(now is then for now, then in zip(pipe.unet.attn_processors.values(), processors.values(), strict=True))
    assert dict(pipe.unet.config) == config
    assert pipe.unet.encoder_hid_proj is None
    assert not pipe.unet._forward_pre_hooks
    assert all(pipe.components[name] is part for name, part in components.items())


def test_refinement_is_attention_without_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, words = torch.randn(2, 4, 6, generator=generator), torch.randn(5, 6, generator=generator)
    found = refined(tokens, words)
    for picture in range(2):
        for token in range(4):
            scores = [
                math.exp(float(tokens[picture, token].double() @ word.double()) / math.sqrt(6)) for word in words
            ]
            mixed = sum(score / sum(scores) * word.double() for score, word in zip(scores, words, strict=True))
            torch.testing.assert_close(found[picture, token].double(), mixed, rtol=1e-5, atol=1e-6)


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tiny_pipe_original: Any) -> Any:
    return tiny_pipe_original


def changed(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """The tiny adapter with other tensors; `None` takes one out."""
    whole = {**load_file(FOLDER / "stable-diffusion.safetensors"), **tensors}
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, folder / "changed.safetensors")
    return folder / "changed.safetensors"


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"ip_adapter.1.to_k_ip.weight": None}, WrongBaseError, r"to_k_ip.weight is not there, expected \(32, 32\)"),
        ({"ip_adapter.1.to_k_ip.weight": torch.ones(32, 48)}, WrongBaseError, "another model"),
        ({"ip_adapter.99.to_k_ip.weight": torch.ones(32, 32)}, WrongBaseError, "expected none"),
        (
            {"image_proj.norm.weight": torch.ones(48)},
            WrongBaseError,
            r"tokens of width \[48\], expected tokens of width 32",
        ),
        ({"image_proj.proj.weight": torch.ones(100, 16)}, WrongBaseError, r"\[100, 16\] for tokens"),
        ({"image_proj.proj.weight": torch.ones(128, 24)}, WrongBaseError, "reads 24 values .* gives 16"),
        ({"image_proj.latents": torch.ones(1, 4, 32)}, OptionError, "faces and of patches"),
        ({"image_proj.proj.weight": None}, OptionError, "faces and of patches"),
        ({"ip_adapter.1.to_k_lora.down.weight": torch.ones(2, 32)}, OptionError, "faces and of patches"),
        ({"unet.conv_in.weight": torch.ones(2)}, OptionError, "no IP-Adapter in diffusers' format"),
    ],
)
def test_what_is_no_adapter_of_the_model_is_refused(
    small: Any, tmp_path: Path, tensors: dict[str, Any], error: type[ErasureError], message: str
) -> None:
    with pytest.raises(error, match=message):
        opened(changed(tmp_path, **tensors), FOLDER / "image_encoder", small.unet)


def test_an_adapter_of_another_family_is_refused(small: Any, tiny_models: Any) -> None:
    with pytest.raises(WrongBaseError, match=r"tokens of width \[64\], expected tokens of width 32"):
        opened(FOLDER / "stable-diffusion-xl.safetensors", None, small.unet)
    with pytest.raises(WrongBaseError, match="made for another model"):
        opened(FOLDER / "stable-diffusion.safetensors", None, tiny_models["stable-diffusion-xl"]().unet)


def test_files_that_cannot_be(small: Any, tmp_path: Path) -> None:
    unet, file = small.unet, FOLDER / "stable-diffusion.safetensors"
    with pytest.raises(OptionError, match="no such file or folder"):
        opened(tmp_path / "nowhere", None, unet)
    with pytest.raises(OptionError, match="it holds none"):
        opened(tmp_path, None, unet)
    with pytest.raises(OptionError, match=r"several: stable-diffusion-xl.safetensors, stable-diffusion.safetensors"):
        opened(FOLDER, None, unet)
    with pytest.raises(OptionError, match="a pickle, which is never read"):
        opened(tmp_path / "ip-adapter_sd15.bin", None, unet)
    (tmp_path / "models").mkdir()
    alone = changed(tmp_path / "models")
    with pytest.raises(OptionError, match="holds no image encoder"):
        opened(tmp_path, None, unet)
    with pytest.raises(OptionError, match="holds no image encoder"):
        opened(alone, tmp_path, unet)
    assert opened(tmp_path, FOLDER / "image_encoder", unet).path == alone
    alone.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ErasureError):
        opened(alone, FOLDER / "image_encoder", unet)


def test_an_adapter_that_is_in_force_already_is_said(tiny_pipe: Any, load_tiny_ip_adapter: Any) -> None:
    load_tiny_ip_adapter(tiny_pipe)
    with pytest.raises(UnsupportedModelError, match=r"pipe.unload_ip_adapter\(\) first"):
        opened(FOLDER / "stable-diffusion.safetensors", None, tiny_pipe.unet)
