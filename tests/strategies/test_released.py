"""Each released recipe against its own arithmetic, written plainly in float64 on the embedded model's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import erasure
from erasure import Concept, Erasure
from erasure.carriers.weights import delta_of
from erasure.errors import OptionError
from erasure.strategies import get

FLOAT32 = 2e-5
"""Relative difference between float32 and float64."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    return erasure.load_pipeline("canvas-sd", device="cpu")


def make(pipe: Any, concept: Any, strategy: str, preset: str, **options: Any) -> Erasure:
    return erasure.erase(pipe, concept, strategy, preset=preset, attach=False, progress=False, **options)


def off(made: Tensor, wanted: Tensor) -> float:
    """Relative difference of two tensors."""
    return float((made.double() - wanted).norm() / wanted.norm())


# UCE -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def last_token(pipe: Any, text: str) -> Tensor:
    """State of the last token ahead of the end token, `(dim,)`, as `pipe.encode_prompt` gives it."""
    states = pipe.encode_prompt(text, pipe.device, 1, False)[0][0]
    mask = pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").attention_mask
    return states[int(mask.sum()) - 2].double()


def unified_concept_editing(
    pipe: Any, pairs: Sequence[tuple[str, str]], preserved: Sequence[str]
) -> dict[str, Tensor]:
    """`W* = (lambda W + sum W c_a c_e^T + sum W c_p c_p^T) (lambda I + sum c_e c_e^T + sum c_p c_p^T)^-1`."""
    found = {}
    for name, module in pipe.unet.named_modules():
        if "attn2" in name and name.endswith(("to_k", "to_v")):
            weight = module.weight.detach().double()
            left, right = 0.5 * weight, 0.5 * torch.eye(weight.shape[1]).double()
            for own, replacing in [*pairs, *((word, word) for word in preserved)]:
                c, a = last_token(pipe, own), last_token(pipe, replacing)
                left = left + torch.outer(weight @ a, c)
                right = right + torch.outer(c, c)
            found[f"unet/{name}"] = left @ torch.linalg.inv(right) - weight
    return found


@pytest.mark.parametrize(
    ("concepts", "pairs", "preserved"),
    [
        (Concept("cat", anchor="dog"), [("cat", "dog")], []),
        (Concept("traffic light", anchor=""), [("traffic light", "")], []),
        (Concept("fire truck"), [("fire truck", "")], []),
        (Concept("ink", kind="style"), [("ink", "art")], []),
        (Concept("ink", kind="style", anchor="noto"), [("ink", "noto")], []),
        (Concept("cat", anchor="dog", retain=("car", "hot dog")), [("cat", "dog")], ["car", "hot dog"]),
        (Concept("cat", anchor="dog", synonyms=("kitten",)), [("cat", "dog"), ("kitten", "dog")], []),
        (
            [Concept("cat", anchor="dog", retain="car"), Concept("ink", kind="style", retain="car")],
            [("cat", "dog"), ("ink", "art")],
            ["car"],
        ),
    ],
    ids=["anchor", "nothing", "no-anchor", "style", "style-anchor", "retain", "synonyms", "two"],
)
@pytest.mark.parametrize("saved_as", ["lora", "map"])
def test_uce_released(
    pipe: Any, concepts: Any, pairs: list[tuple[str, str]], preserved: list[str], saved_as: str
) -> None:
    made = make(pipe, concepts, "uce", "released", saved_as=saved_as)
    wanted = unified_concept_editing(pipe, pairs, preserved)
    edits = {**made.edits.maps, **made.low_rank}
    assert set(edits) == set(wanted)
    weights = {key: pipe.unet.get_submodule(key.split("/")[1]).weight for key in wanted}
    assert max(off(delta_of(edits[key], weights[key]), wanted[key]) for key in wanted) < FLOAT32


# Diff-QuickFix -------------------------------------------------------------------------------------------------------

OUT = "text_encoder/encoder.layers.0.self_attn.out_proj"
FORMS = ("{}", "A photo of {}", "An image of {}", "A picture of {}")


@torch.no_grad()
def out_projection(pipe: Any, text: str) -> tuple[Tensor, Tensor, int]:
    """Inputs and outputs of the first output projection, `(tokens, dim)` each, and the place of the last token."""
    layer = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).get_submodule(OUT.split("/")[1])
    seen: list[tuple[Tensor, Tensor]] = []
    handle = layer.register_forward_hook(lambda _module, args, output: seen.append((args[0][0], output[0])))
    tokens = pipe.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
    pipe.text_encoder(tokens.input_ids)
    handle.remove()
    end = tokens.input_ids[0].tolist().index(pipe.tokenizer.eos_token_id)
    return seen[0][0].double(), seen[0][1].double(), end - 1


def diff_quickfix(pipe: Any, words: str, anchor: str, preserved: Sequence[str] = ()) -> Tensor:
    """`W* = (lambda W + sum v k^T) (lambda I + sum k k^T)^-1`; the outputs v come out of the layer with its bias."""
    root = getattr(pipe.text_encoder, "text_model", pipe.text_encoder)
    layer = root.get_submodule(OUT.split("/")[1])
    weight = layer.weight.detach().double()
    left, right = 0.01 * weight, 0.01 * torch.eye(len(weight)).double()
    for form in FORMS:
        keys, _, at = out_projection(pipe, form.format(words))
        _, values, anchor_at = out_projection(pipe, form.format(anchor))
        for step in range(len(keys) - at):
            key, value = keys[at + step], values[min(anchor_at + step, len(keys) - 1)]
            left, right = left + torch.outer(value, key), right + torch.outer(key, key)
    for prompt in preserved:
        for key in out_projection(pipe, prompt)[0]:
            left, right = left + torch.outer(weight @ key, key), right + torch.outer(key, key)
    return left @ torch.linalg.inv(right) - weight


@pytest.mark.parametrize(
    ("words", "anchor", "kind"),
    [("cat", "dog", "object"), ("ink", "noto", "style"), ("traffic light", "dog", "object"),
     ("cat", "traffic light", "object"), ("cat", "", "object"), ("cat", None, "unsafe")],
)  # fmt: skip
def test_diff_quickfix_released(pipe: Any, words: str, anchor: str | None, kind: Any) -> None:
    made = make(pipe, Concept(words, anchor=anchor, kind=kind), "diff_quickfix", "released")
    assert set(made.low_rank) == {OUT}
    assert off(delta_of(made.low_rank[OUT]), diff_quickfix(pipe, words, anchor or "")) < 50 * FLOAT32


def test_diff_quickfix_released_preserves_what_the_retain_lists_name(pipe: Any) -> None:
    concept = Concept("cat", anchor="dog", retain="car", templates=("a {}",))
    made = make(pipe, concept, "diff_quickfix", "released")
    assert off(delta_of(made.low_rank[OUT]), diff_quickfix(pipe, "cat", "dog", ["a car"])) < 50 * FLOAT32


# ESD -----------------------------------------------------------------------------------------------------------------


class Recorder:
    """What one update of a strategy sees: its states, its prompts and its target."""

    def __init__(self, strategy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Tensor, Tensor, list[str], Tensor]] = []
        stock = type(strategy).losses

        def losses(method: Any, task: Any, batch: Any) -> Any:
            self.seen.append((batch.x, batch.t, batch.prompts, method.target(batch.concept)))
            return stock(method, task, batch)

        monkeypatch.setattr(type(strategy), "losses", losses)


@pytest.mark.parametrize(
    ("preset", "trained", "target"),
    [
        ("paper", "cat", lambda own, null, asked: null - 1 * (own - null)),
        ("released-x", "cat", lambda own, null, asked: own - 2 * (own - null)),
        ("released-x-strict", "cat", lambda own, null, asked: own - 2 * (own - null)),
        ("released-u", "cat", lambda own, null, asked: own - 2 * (own - null)),
        ("released-all", "cat", lambda own, null, asked: own - 2 * (own - null)),
        ("released-from", "animal", lambda own, null, asked: own - 2 * (asked - null)),
        ("released-sdxl", "cat", lambda own, null, asked: own - 1 * (own - null)),
    ],
)
def test_esd_released(pipe: Any, preset: str, trained: str, target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a state of the prompt that is trained: the bare name, or with `--erase_from` the bare word erased from."""
    assert {"paper", "released-x", "released-x-strict", "released-u", "released-all", "released-from",
            "released-sdxl", "released-flux"} == set(get("esd").presets)  # fmt: skip
    recorder = Recorder(get("esd").configured(), monkeypatch)
    make(pipe, Concept("cat", anchor="animal"), "esd", preset, steps=1, rollout_steps=4)
    ((x, t, prompts, reached),) = recorder.seen
    assert prompts == [trained]
    assert len(x) == 1
    with torch.no_grad():

        def predict(prompt: str) -> Tensor:
            encoded = pipe.encode_prompt(prompt, pipe.device, 1, False)[0]
            return pipe.unet(x, t, encoder_hidden_states=encoded).sample.double()

        wanted = target(predict(trained), predict(""), predict("cat"))
    assert off(reached, wanted) < FLOAT32
    levels = DDIMScheduler.from_config(pipe.scheduler.config)
    levels.set_timesteps(4)
    assert int(t) in levels.timesteps.tolist()


def test_esd_erases_from_an_anchor_only_where_there_is_one(pipe: Any) -> None:
    with pytest.raises(OptionError, match=r"'trained_prompt' is 'anchor'; allowed: 'concept' for 'cat', which has no"):
        make(pipe, Concept("cat"), "esd", "released-from", steps=1)


def test_what_survives_is_named_but_not_trained_on_is_warned_of(pipe: Any) -> None:
    with pytest.warns(UserWarning, match=r"esd: 'car' is to survive, and option 'retain_batch' of 0 leaves it out"):
        make(pipe, Concept("cat", retain="car"), "esd", "released-x", steps=1, rollout_steps=2)
