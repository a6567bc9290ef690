"""What a pipeline with erasures must be, in plain arithmetic of these tests' own: the package's is not asked."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import erasure
from erasure import Concept, Erasure, ErasureConfig
from erasure.carriers.activations import Pinned
from erasure.carriers.edits import Edits, LowRank
from erasure.carriers.features import FeatureEdit
from erasure.carriers.weights import fingerprint

LAYER = "encoder.layers.1"
"""Block of the text encoder whose output the feature erasure edits."""
PROMPTS = ("a photo of a cat", "a dog", "", "an apple on the blue background")
COMPONENTS = ("text_encoder", "unet", "vae")

LEAST = 0.25
"""The least strength that counts as an erasure."""


def option(name: str, default: int) -> int:
    """A whole number from the environment: how much of a test to run."""
    return int(os.environ.get(name, default))


# Erasures ------------------------------------------------------------------------------------------------------------


def random_tensor(*shape: int, seed: int, scale: float) -> Tensor:
    """Normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def canonical(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a component by the names that they have without any adapter."""
    found = {}
    for name, tensor in module.state_dict().items():
        if ".lora_" not in name:
            found[name.removeprefix("text_model.").replace(".base_layer.", ".")] = tensor
    return found


def tensors_of(pipe: Any, components: tuple[str, ...] = COMPONENTS) -> dict[str, Tensor]:
    """Every tensor of a pipeline, or of some components, by `component/path`; not copied."""
    return {
        f"{name}/{path}": tensor
        for name in components
        for path, tensor in canonical(getattr(pipe, name)).items()
    }  # fmt: skip


def hand_made(pipe: Any, edits: Edits, target: str = "cat", blocks: tuple[str, ...] = ()) -> Erasure:
    """An erasure of given tensors, with the fingerprints of the pipeline that it is for."""
    tensors = tensors_of(pipe)
    read = [key for key in tensors if any(key.startswith(block + ".") for block in blocks)]
    config = ErasureConfig(
        strategy="noise",
        concepts=[Concept(target).to_dict()],
        family="stable-diffusion",
        base={"model": "tiny", "revision": None,
              "tensors": {key: fingerprint(tensors[key]) for key in (*edits.parameters, *read)}},
        carriers=edits.carriers,
    )  # fmt: skip
    return Erasure(config, edits)


def feature_edit(pipe: Any, seed: int = 0) -> FeatureEdit:
    """Eight random latents of one concept, whose gate is open for some of `PROMPTS` and shut for others."""
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    count = 8
    pairs = torch.tensor([[0] * count, list(range(count))])
    edit = FeatureEdit(
        w_enc=draw(32, count), b_enc=draw(count), w_dec=draw(count, 32), threshold=draw(count).abs() * 0.1,
        gain=draw(count), offset=draw(count), edits=pairs, votes=pairs.clone(), weight=draw(count), bias=draw(1),
        gate=torch.zeros(1), probe=draw(32, 1), probe_bias=draw(1), probe_gate=torch.zeros(1),
        filler=torch.zeros(0, 32), rule=torch.tensor(0), local=torch.tensor(0), first=torch.tensor(1),
        end=torch.tensor(pipe.tokenizer.eos_token_id),
    )  # fmt: skip
    ids = tokens(pipe, PROMPTS)
    with torch.no_grad():
        states = pipe.text_encoder(ids, output_hidden_states=True).hidden_states[2]
    scores = feature_scores(edit, states, ids)[:, 0].sort().values
    return edit._replace(gate=((scores[1] + scores[2]) / 2)[None])


def tokens(pipe: Any, prompts: tuple[str, ...]) -> Tensor:
    """Token ids, padded as the pipeline pads."""
    made = pipe.tokenizer(list(prompts), padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return made.input_ids


def make_erasures(pipe: Any) -> dict[str, Erasure]:
    """Small erasures of every kind for a tiny pipeline, by what they are called in these tests."""
    sites = [
        f"unet/{name}.{part}"
        for name, module in pipe.unet.named_modules()
        if name.endswith("attn2")
        for part in ("to_k", "to_v")
    ]
    tensors = tensors_of(pipe)
    low = {
        key: LowRank(random_tensor(2, tensors[f"{key}.weight"].shape[1], seed=n, scale=0.3),
                     random_tensor(tensors[f"{key}.weight"].shape[0], 2, seed=100 + n, scale=0.3))
        for n, key in enumerate(sites)
    }  # fmt: skip
    first, second = "text_encoder/encoder.layers.0.mlp.fc1.weight", "text_encoder/encoder.layers.2.mlp.fc2.bias"
    shape = {key: tensors[key].shape for key in tensors}
    delta = {first: random_tensor(*shape[first], seed=1, scale=0.2),
             second: random_tensor(*shape[second], seed=2, scale=0.5)}  # fmt: skip
    over = {first: random_tensor(*shape[first], seed=3, scale=0.2),
            f"{sites[0]}.weight": random_tensor(*shape[f"{sites[0]}.weight"], seed=4, scale=0.3)}  # fmt: skip
    block = f"text_encoder/{LAYER}"
    features = Edits(features={block: feature_edit(pipe)})
    pinned = erasure.erase(
        pipe, "cat", "hirm", steps=2, lr=3e-2, contexts=0, retain_vocabulary=2, unconditional="stock",
        attach=False, progress=False,
    )  # fmt: skip
    return {
        "delta": hand_made(pipe, Edits(deltas=delta)),
        "low": hand_made(pipe, Edits(low_rank=low), "dog"),
        "over": hand_made(pipe, Edits(deltas=over), "car"),
        "pin": pinned,
        "itd": hand_made(pipe, features, "apple", (block,)),
    }


def foreign(made: Erasure, other: Any) -> Erasure:
    """The same edits, made for another model's weights."""
    blocks = tuple(made.edits.features)
    return hand_made(other, made.edits, made.concepts[0].target, blocks)


def dense(made: Erasure) -> dict[str, Tensor]:
    """The weight edits of an erasure in float32 by `component/path`."""
    low = {f"{key}.weight": up.float() @ down.float() for key, (down, up) in made.edits.low_rank.items()}
    return low | {key: value.float() for key, value in made.edits.deltas.items()}


# A user's LoRA -------------------------------------------------------------------------------------------------------


def user_lora(pipe: Any, seed: int, text_side: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A LoRA in diffusers' format over edited and unedited layers, and its dense deltas by `component/path`."""
    keys = [f"unet/{name}.{part}" for name, module in pipe.unet.named_modules() if name.endswith("attn2")
            for part in ("to_q", "to_k")]  # fmt: skip
    if text_side:
        keys += [f"text_encoder/encoder.layers.{n}.{part}" for n in (0, 3) for part in ("mlp.fc1", "self_attn.q_proj")]
    tensors, state, deltas = tensors_of(pipe), {}, {}
    for n, key in enumerate(keys):
        outputs, inputs = tensors[f"{key}.weight"].shape
        down, up = (
            random_tensor(2, inputs, seed=seed + n, scale=0.2),
            random_tensor(outputs, 2, seed=seed + 50 + n, scale=0.2),
        )
        component, path = key.split("/")
        prefix = "text_encoder.text_model" if component == "text_encoder" else component
        state[f"{prefix}.{path}.lora_A.weight"], state[f"{prefix}.{path}.lora_B.weight"] = down, up
        deltas[f"{key}.weight"] = up @ down
    return state, deltas


# Features and pins, by formula ---------------------------------------------------------------------------------------


def feature_latents(edit: FeatureEdit, states: Tensor) -> Tensor:
    """JumpReLU latents `(batch, tokens, features)`."""
    before = states.float() @ edit.w_enc + edit.b_enc
    return before * (before > edit.threshold.clamp(min=0))


def feature_scores(edit: FeatureEdit, states: Tensor, ids: Tensor) -> Tensor:
    """Highest logit of each concept on words and the end token, `(batch, concepts)`."""
    weights = torch.zeros(len(edit.b_enc), len(edit.gate))
    weights[edit.votes[1], edit.votes[0]] = edit.weight
    logits = feature_latents(edit, states) @ weights + edit.bias
    rows = []
    for row, own in zip(logits, ids.tolist(), strict=True):
        end = own.index(int(edit.end))
        rows.append(row[int(edit.first) : end + 1].amax(0))
    return torch.stack(rows)


def edited_features(states: Tensor, ids: Tensor, terms: list[tuple[float, FeatureEdit]]) -> Tensor:
    """The output of a block under feature edits, each computed from the stock output."""
    total = torch.zeros_like(states)
    for strength, edit in terms:
        opened = (feature_scores(edit, states, ids) >= edit.gate).any(1)
        latents = feature_latents(edit, states)
        change = (edit.gain * latents + edit.offset * (latents > 0)) @ edit.w_dec
        change[:, : int(edit.first)] = 0
        total += strength * change * opened[:, None, None]
    return states + total


class ReferencePipe:
    """A stock pipeline that is given weights, and whose text encoder edits features and pins prompts by torch hooks.

    Args:
        original: Pipeline to copy.
    """

    def __init__(self, original: Any) -> None:
        self.pipe = copy.deepcopy(original)
        self.terms: list[tuple[float, FeatureEdit]] = []
        self.pins: list[Pinned] = []
        self.ids = torch.zeros(0)
        encoder = self.pipe.text_encoder
        root = getattr(encoder, "text_model", encoder)
        root.embeddings.register_forward_pre_hook(self._read, with_kwargs=True)
        root.get_submodule(LAYER).register_forward_hook(self._features)
        root.final_layer_norm.register_forward_hook(self._pin)
        self.places = {f"{name}/{path}": t for name in COMPONENTS
                       for path, t in canonical(getattr(self.pipe, name)).items()}  # fmt: skip

    def _read(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]

    def _features(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not self.terms:
            return output
        states = output[0] if isinstance(output, tuple) else output
        edited = edited_features(states, self.ids, self.terms)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def _pin(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        for pin in self.pins:
            for row, hidden in zip(pin.input_ids, pin.hidden_states, strict=True):
                output = torch.where((self.ids == row).all(-1)[:, None, None], hidden, output)
        return output

    @torch.no_grad()
    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over these weights; rows of learned tokens are left out, and fused projections, which are copies."""
        for key in self.places.keys() & tensors.keys():
            place, value = self.places[key], tensors[key]
            place.copy_(value[: len(place)] if value.ndim else value)


@torch.no_grad()
def encode(pipe: Any, prompts: tuple[str, ...] = PROMPTS) -> Tensor:
    """What the text encoder makes of prompts, `(batch, tokens, dim)`."""
    return pipe.text_encoder(tokens(pipe, prompts))[0]


def draw(pipe: Any, prompt: Any = "a photo of a cat", *, steps: int = 1, seed: int = 7, **options: Any) -> Tensor:
    """Latents of one image of a tiny pipeline."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    generator = [torch.Generator().manual_seed(seed + n) for n in range(len(prompts))]
    settings = {"height": 32, "width": 32, "output_type": "latent", "guidance_scale": 50.0, **options}
    return pipe(prompts, num_inference_steps=steps, generator=generator, **settings).images


# The state of erasures -----------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """One attached erasure."""

    kind: str
    strength: float = 1.0
    active: bool = True
    fused: bool = False


class Kit:
    """Erasures that can be attached, by kind, and their weight edits as plain tensors.

    Args:
        erasures: Made for one base model.
    """

    def __init__(self, erasures: Mapping[str, Erasure]) -> None:
        self.erasures = erasures
        self.dense = {kind: dense(made) for kind, made in erasures.items()}


@dataclass
class Model:
    """What is attached to a pipeline, by the documented rules."""

    kit: Kit
    attached: dict[str, Entry] = field(default_factory=dict)
    enabled: bool = True

    def copy(self) -> Model:
        """Another one that can be changed."""
        return Model(self.kit, copy.deepcopy(self.attached), self.enabled)

    def edits(self, entry: Entry) -> Edits:
        """The tensors of an attached erasure."""
        return self.kit.erasures[entry.kind].edits

    def in_force(self) -> dict[str, Entry]:
        """What must be in force, by name."""
        return {n: e for n, e in self.attached.items() if e.fused or (self.enabled and e.active)}

    def recipe(self) -> dict[str, list[tuple[float, str]]]:
        """(strength, kind) of what edits each parameter, in the order of names."""
        found: dict[str, list[tuple[float, str]]] = {}
        for _, entry in sorted(self.in_force().items()):
            for key in self.kit.dense[entry.kind]:
                found.setdefault(key, []).append((entry.strength, entry.kind))
        return found

    def edited(self, key: str, base: Tensor) -> Tensor:
        """base + sum of strength * delta, in float32."""
        value = base.float()
        for strength, kind in self.recipe().get(key, ()):
            value = value + strength * self.kit.dense[kind][key]
        return value

    def features(self) -> list[tuple[float, FeatureEdit]]:
        """(strength, edit) of every feature edit in force."""
        pairs = ((e.strength, self.edits(e).features) for _, e in sorted(self.in_force().items()))
        return [(strength, edit) for strength, edits in pairs for edit in edits.values()]  # type: ignore[misc]

    def pins(self) -> list[Pinned]:
        """Pinned prompts in force."""
        return [pin for entry in self.in_force().values() for pin in self.edits(entry).pinned.values()]

    def lists(self) -> dict[str, list[str]]:
        """What `list_erasures` must say, names sorted."""
        found: dict[str, list[str]] = {}
        for name, entry in sorted(self.attached.items()):
            for component in self.edits(entry).components:
                found.setdefault(component, []).append(name)
        return found

    def verifies(self) -> bool:
        """Whether `verify` must pass, if nothing else got in the way."""
        force = self.in_force()
        return (
            bool(self.attached)
            and set(force) == set(self.attached)
            and all(e.strength >= LEAST for e in force.values())
        )

    def beyond_weights(self) -> bool:
        """Whether something is in force that weights cannot hold."""
        return any(self.edits(entry).beyond_weights for entry in self.in_force().values())
