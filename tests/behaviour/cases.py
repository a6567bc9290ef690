"""What is tested on what: cases, families, and what tests do with them."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import erasure
from erasure import Concept, Erasure
from erasure.backbones import FAMILIES, backbone_for
from erasure.strategies import available, get
from erasure.world import World

SIDE = 16
"""Pixels of the sides of images that are drawn and trained on: the least that all tiny pipelines take."""
QUICK: dict[str, Any] = {
    "steps": 3, "vocabulary": 8, "retain_vocabulary": 2, "contexts": 2, "d_sae": 128, "target_rate": 0.1,
    "retain_rate": 1.0, "false_positive_rate": 1.0, "batch": 2, "retain_batch": 2, "rollout_steps": 2,
    "attack_steps": 1, "pictures": 1, "lookalikes": 1, "resolution": SIDE,
}  # fmt: skip
"""Cheap values for the options that cost time, lenient ones where a random tower tells nothing apart. A strategy
gets those that it has."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in available()},
    "hirm-pinned": ("hirm", {"unconditional": "stock"}),
    "uce-map": ("uce", {"saved_as": "map"}),
    "esd-full": ("esd", {"rank": 0, "method": "x-strict"}),
    "mace": ("mace", {"retain_batch": 0, "contexts": 0, "rollouts": 1, "templates": False, "lr": 1e-2}),
}
"""Strategies by default options, and settings that use another carrier."""
ADAPTERS = Path(__file__).parents[1] / "tiny" / "ip-adapter"
"""IP-Adapters of random weights for the tiny pipelines that can have one, by family."""
TRAJECTORIES = "a latent consistency UNet"
JOINT = "one joint attention"
FLOW = "noise is that of flow matching"
REFUSED: dict[tuple[str, str], str] = {
    ("esd", "latent-consistency"): TRAJECTORIES,
    ("esd-full", "latent-consistency"): TRAJECTORIES,
    ("advunlearn", "latent-consistency"): TRAJECTORIES,
    ("concept_ablation", "latent-consistency"): TRAJECTORIES,
    ("doco", "latent-consistency"): TRAJECTORIES,
    ("co_erasing", "latent-consistency"): TRAJECTORIES,
    ("mace", "latent-consistency"): TRAJECTORIES,
    ("mace", "stable-diffusion-3"): JOINT,
    ("mace", "flux"): JOINT,
    ("co_erasing", "stable-diffusion-3"): JOINT,
    ("co_erasing", "flux"): JOINT,
    ("sfd", "latent-consistency"): TRAJECTORIES,
    ("spm", "latent-consistency"): TRAJECTORIES,
    ("sfd", "stable-diffusion-3"): FLOW,
    ("sfd", "flux"): FLOW,
}
"""Pairs of a case and a kind of model that cannot work, with a part of the reason that is given. All others work."""
NAMES = [family.family for family in FAMILIES if family.family != "chroma"]
"""Families that everything is tested on; Chroma is a Flux with fewer parts."""
FIRST = NAMES[:1]
UNETS = [family.family for family in FAMILIES if family.family in NAMES and family.denoiser_component == "unet"]
ATTACHED: dict[str, set[str]] = {
    "uce": {"low_rank"}, "uce-map": {"maps"}, "hirm-pinned": {"deltas", "pinned"}, "itd": {"features"},
    "sld": {"safety"}, "safree": {"filters"}, "spm": {"membranes", "gates"},
}  # fmt: skip
"""Cases that stand for all others once they are made, with the kinds of edits that they have. One for each kind."""
ALONE: dict[str, set[str]] = {"hirm": {"deltas"}, "esd-full": {"deltas"}}
"""Further ones on the first family: changes of whole parameters in the text encoder alone, and in the denoiser."""
STAND_INS = {
    "stable-diffusion-xl": ("hirm-pinned", "esd"),
    "stable-diffusion-3": ("uce", "itd"),
    "flux": ("itd", "esd"),
}
"""Cases that stand for all others where the family matters little: weights and features of text encoders, the
denoiser's weights, solved for and trained."""
TEXT_SIDE = ("hirm-pinned", "itd")
"""Those of `ATTACHED` that are in text encoders, which prompts that come encoded go around."""
COMPILED = [
    *(
        ((case, family), first)
        for family in FIRST
        for case, first in (("uce", "compile"), ("hirm-pinned", "attach"), ("sld", "attach"), ("itd", "compile"))
    ),
    (("hirm-pinned", "stable-diffusion-xl"), "attach"),
    (("uce", "flux"), "compile"),
]
"""Pairs whose networks are compiled, and whether that is done ahead of attaching or after it. Tracing takes seconds,
so that further families share it: one of several text encoders with a hook, and a transformer with changed weights."""
ANCHORED = {"concept_ablation", "doco", "mace"}
"""Strategies that need an anchor for every concept."""
PROMPT = "a photo of a cat"
LEARNED = {"<my-pet>": 3, "<my-home>": 2, "<your-pet>": 2}
"""Vectors of learned tokens."""
LEARNED_CONCEPT = Concept(
    "<my-pet>", anchor="<my-home>", retain="<your-pet>", templates=("a {}", "a {} and <your-pet>")
)


def fit(pipe: Any, case: str, concepts: Any = "cat", **options: Any) -> Erasure:
    name, chosen = CASES[case]
    fields = {field.name for field in dataclasses.fields(get(name))}
    adapter = str(ADAPTERS / f"{backbone_for(pipe).family}.safetensors")
    quick = {key: value for key, value in {**QUICK, "adapter": adapter}.items() if key in fields}
    if name in ANCHORED:
        concepts = [with_anchor(concept) for concept in (concepts if isinstance(concepts, list) else [concepts])]
    return erasure.erase(pipe, concepts, name, **{"attach": False, "progress": False, **quick, **chosen, **options})


def with_anchor(concept: str | Concept) -> Concept:
    """A concept that has an anchor, "house" where it has none."""
    made = Concept(concept) if isinstance(concept, str) else concept
    return made if made.anchor is not None else dataclasses.replace(made, anchor="house")


def pairs(cases: Any, families: Any = NAMES, *, alone: Any = ()) -> Any:
    """Run a test, or all of a class, for cases on families that they work on, and some more on the first family."""
    chosen = [(case, family) for family in families for case in (*cases, *(alone if family in FIRST else ()))]
    working = [pair for pair in chosen if pair not in REFUSED]
    return pytest.mark.parametrize("pair", working, ids="-".join)


def spread(cases: Any) -> Any:
    """Run a test, or all of a class, for cases on the first family, and for its `STAND_INS` on each further one.

    For what is the work of pipelines or of `erasure.erase`, which no pair of a case and a family does its own way.
    """
    chosen = [(case, family) for family in NAMES for case in cases if family in FIRST or case in STAND_INS[family]]
    return pytest.mark.parametrize("pair", [pair for pair in chosen if pair not in REFUSED], ids="-".join)


def edited(made: Erasure) -> set[str]:
    """Parameters that it changes."""
    return set(made.edits.parameters)


def known(made: Erasure) -> set[str]:
    """Parameters by which it knows its base."""
    return set(made.config.base["tensors"])


def kinds(made: Erasure) -> set[str]:
    """The kinds of edits that it has."""
    return {field.name for field in dataclasses.fields(made.edits) if getattr(made.edits, field.name)}


def is_text_side(made: Erasure) -> bool:
    return any(component.startswith("text_encoder") for component in made.components)


def denoiser(pipe: Any) -> Any:
    return backbone_for(pipe).denoiser


def text_weight(pipe: Any) -> torch.Tensor:
    """The first matrix of the text encoder that the denoiser reads."""
    return next(layer.weight for layer in backbone_for(pipe).reader.module.modules() if isinstance(layer, nn.Linear))


def modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]


def teach_all(teach: Any, pipe: Any, *words: str, token: str = "<my-pet>") -> None:
    """Teach a token to all of a pipeline's text encoders."""
    if not hasattr(pipe, "load_textual_inversion"):
        pytest.skip("its pipeline has no loader of learned tokens")
    for name in ("", "_2", "_3"):
        if pipe.components.get(f"tokenizer{name}") is not None:
            teach(pipe, *words, token=token, suffix=name)


def embeddings(pipe: Any) -> dict[str, torch.Tensor]:
    """What a pipeline encodes the prompt as, by arguments of its call."""
    world = World.of(pipe)
    backbone = backbone_for(pipe, size=world.size, length=world.text_length)
    own, null = backbone.encode([PROMPT]), backbone.null(backbone.encode([""]))
    found = {
        "prompt_embeds": own.tokens, "pooled_prompt_embeds": own.pooled, "prompt_attention_mask": own.mask,
        "negative_prompt_embeds": null.tokens, "negative_pooled_prompt_embeds": null.pooled,
        "negative_prompt_attention_mask": null.mask,
    }  # fmt: skip
    taken = inspect.signature(type(pipe).__call__).parameters
    return {name: part for name, part in found.items() if part is not None and name in taken}


def check_config(made: Erasure, targets: list[str], pipe: Any) -> None:
    """Check what an erasure says of itself."""
    assert [concept.target for concept in made.concepts] == targets
    assert len(made.edits) > 0
    assert known(made) >= edited(made)
    assert known(made)
    assert made.config.family == backbone_for(pipe).family
    assert made.config.protects in ("hosted pipeline", "released weights")
    assert made.config.cost["seconds"] > 0
    json.dumps(dataclasses.asdict(made.config), allow_nan=False)


def differ(one: Erasure, another: Erasure) -> bool:
    """Whether some of their tensors do."""
    pairs = zip(flat(one), flat(another), strict=False)
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


def flat(made: Erasure) -> list[torch.Tensor]:
    """Every tensor of an erasure."""
    return [*made.edits.delta_state_dict().values(), *made.edits.lora_state_dict().values()]


def draw_with(pipe: Any, options: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    made = pipe(PROMPT, num_inference_steps=1, height=SIDE, width=SIDE, generator=generator, **options)
    return torch.from_numpy(made.images[0])


def users_lora(pipe: Any) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on layers that strategies edit and on others, in diffusers' file format."""
    generator = torch.Generator().manual_seed(3)
    backbone, state = backbone_for(pipe), {}
    for part, kind in (("to_k", "self"), ("to_q", "cross")):
        site = next(site for site in backbone.attention_sites() if site.kind != kind)
        key = f"{backbone.denoiser_component}.{site.name}.{part}"
        state |= lora_pair(key, getattr(site.module, part), generator)
    root = backbone.tower("text_encoder").root
    if hasattr(root.encoder, "layers"):  # no T5: stock pipelines load no LoRA into one
        for path in (
            "encoder.layers.0.self_attn.out_proj",
            "encoder.layers.0.self_attn.q_proj",
            "encoder.layers.1.mlp.fc1",
        ):
            state |= lora_pair(f"text_encoder.text_model.{path}", root.get_submodule(path), generator)
    return state


def lora_pair(key: str, layer: torch.nn.Linear, generator: torch.Generator) -> dict[str, torch.Tensor]:
    down = torch.randn(2, layer.in_features, generator=generator) * 0.2
    up = torch.randn(layer.out_features, 2, generator=generator) * 0.2
    return {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
