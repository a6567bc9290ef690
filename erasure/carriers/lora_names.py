"""Names of low-rank factors in LoRA files.

Stable Diffusion's networks have kohya's names there (`lora_unet_..._attn2_to_k.lora_down.weight`), the only ones that
diffusers, ComfyUI, AUTOMATIC1111 and Forge all load. Other networks have the names of diffusers and PEFT
(`transformer.blocks.0.attn.to_k.lora_A.weight`). Factors are of scale 1 in both, so neither needs an `alpha`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from erasure.interop.encoders import is_in_t5

KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_", "text_encoder_2": "lora_te2_text_model_"}
"""Prefix of each component. A second text encoder makes the first `lora_te1_`."""
FIRST_OF_TWO = "lora_te1_text_model_"
LDM = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
"""Layers that kohya's names call as the model's first code did, for which loaders know no other name."""
PARTS = sorted(
    (
        "down_blocks", "up_blocks", "mid_block", "attentions", "resnets", "downsamplers", "upsamplers",
        "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net", "proj", "proj_in",
        "proj_out", "conv", "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj",
        "time_embedding", "linear_1", "linear_2", "encoder", "layers", "self_attn", "q_proj", "k_proj", "v_proj",
        "out_proj", "mlp", "fc1", "fc2", r"\d+",
    ),
    key=len,
    reverse=True,
)  # fmt: skip
"""Names of modules in these networks: kohya's names have underscores for dots, and these tell where the dots were."""
PART = re.compile(rf"({'|'.join(PARTS)})(?:_|$)")
PAIRS = ((".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight"))
"""Endings of the names of the two factors: kohya's, and PEFT's."""


def is_read_by_stock(key: str) -> bool:
    """Whether stock pipelines load a LoRA into the layer of a key; they ignore layers of T5 silently."""
    return not is_in_t5(key.partition("/")[2])


def file_names(keys: Iterable[str], *, kohya: bool = True) -> dict[str, tuple[str, str]]:
    """Give the names of the factors (down, up) of edited layers in a file.

    Args:
        keys: `component/path` of each layer.
        kohya: Whether the model's loaders read kohya's names.

    Returns:
        Kohya's names where every layer has one, else those of diffusers: no loader takes both in one file.
    """
    keys = list(keys)
    two = any(key.startswith("text_encoder_2/") for key in keys)
    stems = {key: kohya_stem(key, two) for key in keys}
    down, up = PAIRS[0]
    if kohya and all(stem is not None for stem in stems.values()):
        return {key: (f"{stem}{down}", f"{stem}{up}") for key, stem in stems.items()}
    down, up = PAIRS[1]
    return {key: (f"{diffusers_stem(key)}{down}", f"{diffusers_stem(key)}{up}") for key in keys}


def layer_of(stem: str) -> str | None:
    """Find `component/path` of a layer from its name in a file without the ending; `None` for unknown names."""
    for component, prefix in (*KOHYA.items(), ("text_encoder", FIRST_OF_TWO)):
        if stem.startswith(prefix):
            path = _dotted(stem.removeprefix(prefix))
            return None if path is None else f"{component}/{path}"
    component, dot, path = stem.partition(".")
    return f"{component}/{path.removeprefix('text_model.')}" if dot and path else None


def kohya_stem(key: str, two: bool) -> str | None:
    """Give kohya's name of a layer of Stable Diffusion, without an ending; `None` where kohya has none.

    Args:
        key: `component/path`.
        two: Whether the model has two text encoders.
    """
    component, _, path = key.partition("/")
    flat = LDM.get(path) or path.replace(".", "_")
    if component not in KOHYA or _dotted(flat) != path:
        return None
    return (FIRST_OF_TWO if two and component == "text_encoder" else KOHYA[component]) + flat


def _dotted(flat: str) -> str | None:
    if (known := next((path for path, name in LDM.items() if name == flat), None)) is not None:
        return known
    parts, at = [], 0
    while at < len(flat):
        found = PART.match(flat, at)
        if found is None:
            return None
        parts.append(found[1])
        at = found.end()
    return ".".join(parts) if parts and not flat.endswith("_") else None


def diffusers_stem(key: str) -> str:
    """Give diffusers' name of a layer, without an ending."""
    component, path = key.split("/", 1)
    # Files of text encoders carry the prefix; diffusers' loader strips it where the class has none.
    return f"{component}.{'text_model.' if component.startswith('text_encoder') else ''}{path}"
