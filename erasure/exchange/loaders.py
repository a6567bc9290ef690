"""The names by which programs find the layers of a LoRA file, as far as they have any.

Written from what the programs do (`comfy/lora.py` of ComfyUI, `networks.py` of AUTOMATIC1111, `networks/` of kohya's
sd-scripts, and diffusers' loaders); `tests/exchange/test_loaders.py` holds their rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from erasure.backbones.layouts import Layout, Place
from erasure.carriers.edits import TEXT_ENCODERS
from erasure.carriers.lora_names import diffusers_stem, kohya_stem
from erasure.interop.encoders import is_in_t5

Scheme = Literal["kohya", "peft"]
"""How the two factors of a layer are called: `.lora_down.weight`, `.lora_up.weight` and `.alpha`, or `.lora_A.weight`
and `.lora_B.weight`."""
SD, XL, SD3, FLUX, CHROMA = "stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "chroma"
CLIP_LAYER = re.compile(r"encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.(q|k|v|out)_proj)")
"""Layers of CLIP that programs read a LoRA into."""
UPSAMPLER = re.compile(r"up_blocks\.\d+\.upsamplers\.")


@dataclass(frozen=True)
class Model:
    """What is known of the model that an erasure is for."""

    family: str
    layout: Layout | None = None
    """Published layout of the denoiser; see `Backbone.published_layout`."""

    @property
    def clips(self) -> int:
        """CLIP text encoders."""
        return 2 if self.family in (XL, SD3) else 1


@dataclass(frozen=True)
class LayerName:
    """The name of a layer in a program."""

    stem: str
    """Name without an ending."""
    place: Place | None = None
    """Its place in the tensor that the program has, which may hold further layers."""


@dataclass(frozen=True)
class Loader:
    """A program that loads LoRA files, or several that know the same names."""

    title: str
    scheme: Scheme
    refused: dict[str, str]
    """Families that it cannot load an erasure of, and why."""
    names: Callable[[Model, str], LayerName | str]
    """Gives a layer's name (`component/module.path`), or why the program has none."""
    plain: bool = False
    """Whether it reads changes of biases and norms."""


def flat(path: str) -> str:
    """Replace the dots of a path by underscores, as kohya does."""
    return path.replace(".", "_")


def in_layout(model: Model, path: str) -> LayerName | str:
    """Give kohya's name of a denoiser layer, by its place in the published layout."""
    if model.layout is None:
        return "its name depends on the model, so name the model (--model)"
    place = model.layout(f"{path}.weight")
    if place is None:
        return "the layout that the model was published in has no such layer"
    return LayerName(f"lora_unet_{flat(place.key.removesuffix('.weight'))}", place)


def text_encoder(model: Model, component: str, path: str) -> LayerName | str:
    """Give kohya's name of a text encoder layer; T5 always counts as the third encoder."""
    if is_in_t5(path):
        return LayerName(f"lora_te3_{flat(path)}")
    if CLIP_LAYER.fullmatch(path) is None:
        return "LoRA files have no name for this layer of a text encoder"
    number = "" if model.family == SD else TEXT_ENCODERS.index(component) + 1
    return LayerName(f"lora_te{number}_text_model_{flat(path)}")


def kohya_name(model: Model, key: str) -> LayerName | str:
    """Give kohya's name: by the published layout, and for Stable Diffusion by diffusers' paths."""
    component, path = key.split("/", 1)
    if component in TEXT_ENCODERS:
        return text_encoder(model, component, path)
    if model.family != SD:
        return in_layout(model, path)
    stem = kohya_stem(key, False)
    return "kohya's scripts have no name for it" if stem is None else LayerName(stem)


def unet_name(model: Model, key: str) -> LayerName | str:
    """Give the name of a UNet layer by diffusers' path, which needs no model; other layers get kohya's name."""
    if key.split("/")[0] in TEXT_ENCODERS or model.family not in (SD, XL):
        return kohya_name(model, key)
    stem = kohya_stem(key, model.family == XL)
    return "no name of this layer is known" if stem is None else LayerName(stem)


def a1111_name(model: Model, key: str) -> LayerName | str:
    """Give AUTOMATIC1111's name; it cannot find the upsampler of SDXL's first block, which it looks for elsewhere."""
    component, path = key.split("/", 1)
    if component not in TEXT_ENCODERS and UPSAMPLER.match(path):
        return in_layout(model, path)
    return unet_name(model, key)


def diffusers_name(model: Model, key: str) -> LayerName | str:
    """Give diffusers' name; its loaders ignore layers of T5 silently."""
    component, path = key.split("/", 1)
    if is_in_t5(path):
        return "diffusers loads no LoRA into T5, and says nothing about it"
    if component in TEXT_ENCODERS and CLIP_LAYER.fullmatch(path) is None:
        return "diffusers loads no LoRA into this layer of a text encoder"
    return LayerName(diffusers_stem(key))


NO_CHROMA = "the names that it has for the layers of Chroma are not known here"
LOADERS: dict[str, Loader] = {
    "kohya": Loader("kohya's sd-scripts", "kohya", {CHROMA: NO_CHROMA}, kohya_name),
    "comfyui": Loader("ComfyUI", "kohya", {CHROMA: NO_CHROMA}, unet_name, plain=True),
    "a1111": Loader(
        "AUTOMATIC1111", "kohya",
        {
            FLUX: "it draws with no model of Flux; Forge does, and reads what --to kohya writes",
            SD3: "it reads LoRA into the picture's half of some layers of SD3 only; ComfyUI reads all (--to comfyui)",
            CHROMA: "it draws with no model of Chroma",
        },
        a1111_name,
    ),
    "diffusers": Loader("diffusers", "peft", {}, diffusers_name),
}  # fmt: skip
"""Programs by the word that the command line has for them."""

CLIP_IN_COMFYUI = ("clip_l", "clip_g")
"""What ComfyUI calls the first and the second CLIP of a model."""
CLIP_H, WIDTH_OF_H = "clip_h", 1024
"""What it calls the text encoder of Stable Diffusion 2.x, and its width."""
T5 = "t5xxl"
"""What it calls T5."""


def comfyui_plain(model: Model, key: str, length: int, *, stacked: bool = False) -> LayerName | None:
    """Give ComfyUI's name of a module, by which it finds changes of any parameter; `None` where it has none.

    Args:
        model: The model.
        key: `component/module.path`.
        length: First side of the parameter that is changed.
        stacked: Whether it may be a part of a tensor, or have another form there.
    """
    component, path = key.split("/", 1)
    if component not in TEXT_ENCODERS:
        place = None if model.layout is None else model.layout(f"{path}.weight")
        if place is None or not place.key.endswith(".weight"):
            return None
        usable = stacked or (place.parts == 1 and place.form == "same")
        return LayerName(f"diffusion_model.{place.key.removesuffix('.weight')}", place) if usable else None
    if is_in_t5(path) or path.startswith(("shared", "encoder.final_layer_norm", "encoder.embed_tokens")):
        return LayerName(f"text_encoders.{ahead_in_comfyui(T5)}{path}")
    encoder = CLIP_IN_COMFYUI[TEXT_ENCODERS.index(component)]
    if model.family == SD and (length // 4 if path.endswith("mlp.fc1") else length) == WIDTH_OF_H:
        encoder = CLIP_H
    return LayerName(f"text_encoders.{ahead_in_comfyui(encoder)}{path}")


def ahead_in_comfyui(encoder: str) -> str:
    """Give the prefix of tensor names in one of ComfyUI's text encoders."""
    return f"{encoder}.transformer.{'' if encoder == T5 else 'text_model.'}"


def encoder_in_comfyui(component: str, tensors: Iterable[str]) -> str | None:
    """Give ComfyUI's name of a text encoder in a loaded model.

    Args:
        component: The text encoder, as pipelines name it.
        tensors: Names of the tensors of ComfyUI's text encoders.

    Returns:
        Its name; `None` where it was not loaded.
    """
    there = {name.split(".")[0] for name in tensors}
    names = ((CLIP_IN_COMFYUI[0], CLIP_H), (CLIP_IN_COMFYUI[1], T5), (T5,))[TEXT_ENCODERS.index(component)]
    return next((name for name in names if name in there), None)
