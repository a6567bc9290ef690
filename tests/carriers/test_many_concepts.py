"""What an image costs does not grow with the concepts that are erased, but for the scores of its own words."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import erasure
from erasure.artifact import Erasure, ErasureConfig
from erasure.backbones import backbone_for
from erasure.carriers.edits import Edits
from erasure.carriers.features import FeatureEdit
from erasure.carriers.latents import product
from erasure.guards import encodings

TOKENS, DIM = 9, 32
SOURCE = str(Path(erasure.__file__).parent)


class Elements(TorchDispatchMode):
    """Counts the numbers that operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.written += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def elements(action: Callable[[], object]) -> int:
    """Numbers that the operations of an action write."""
    with torch.no_grad(), Elements() as counted:
        action()
    return counted.written


def calls(action: Callable[[], object]) -> Counter[str]:
    """How often each function of the package is called, and each function by one of the package."""
    found: Counter[str] = Counter()

    def notice(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(SOURCE):
            found[frame.f_code.co_qualname if event == "call" else argument.__qualname__] += 1

    sys.setprofile(notice)
    try:
        action()
    finally:
        sys.setprofile(None)
    return found


def edit_of(concepts: int, features: int, seed: int = 0, **changed: Any) -> FeatureEdit:
    """Random concepts of eight votes and eight edits each, and of random features."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    pairs = lambda: torch.stack(  # noqa: E731
        [torch.arange(concepts).repeat_interleave(8), torch.randint(features, (8 * concepts,), generator=generator)]
    )
    made = FeatureEdit(
        w_enc=draw(DIM, features) / DIM**0.5, b_enc=0.3 * draw(features), w_dec=draw(features, DIM),
        threshold=1.0 + 0.2 * draw(features), gain=draw(features), offset=draw(features), edits=pairs(),
        votes=pairs(), weight=draw(8 * concepts), bias=draw(concepts), gate=1 + draw(concepts),
        probe=draw(DIM, concepts), probe_bias=draw(concepts), probe_gate=3 + draw(concepts),
        filler=torch.zeros(0, DIM), rule=torch.tensor(0), local=torch.tensor(0), first=torch.tensor(1),
        end=torch.tensor(0),
    )  # fmt: skip
    return made._replace(**changed)


def whole_width(edit: FeatureEdit, x: Tensor, words: Tensor) -> Tensor:
    """The change of activations with every latent written down, those that do not fire too."""
    before = x @ edit.w_enc + edit.b_enc
    latents = torch.where((before > edit.threshold) & (before > 0), before, torch.zeros_like(before))
    belongs, votes = torch.zeros(len(edit.gate), len(edit.gain)), torch.zeros(len(edit.gain), len(edit.gate))
    belongs[edit.edits[0], edit.edits[1]] = 1
    votes[edit.votes[1], edit.votes[0]] = edit.weight
    by_probe = bool(edit.rule == 1)
    logits = x @ edit.probe + edit.probe_bias if by_probe else product(latents, votes) + edit.bias
    own = logits >= (edit.probe_gate if by_probe else edit.gate)
    opened = (own & words[..., None]).any(1, keepdim=True)
    where = own & opened if edit.local else opened
    on = (where.float() @ belongs).clamp(max=1)
    change = product(on * (edit.gain * latents + edit.offset * (latents > 0)), edit.w_dec)
    return change * (torch.arange(x.shape[1]) >= edit.first)[:, None]


@torch.no_grad()
@pytest.mark.parametrize("level", [0.0, 1.5, 2.5, 9.0], ids="{} a latent fires".format)
@pytest.mark.parametrize("features", [8, 300])
@pytest.mark.parametrize("local", [0, 1])
@pytest.mark.parametrize("rule", [0, 1])
def test_latents_that_do_not_fire_are_left_out_to_the_bit(level: float, features: int, local: int, rule: int) -> None:
    for seed, concepts in enumerate((1, 7, 200)):
        edit = edit_of(concepts, features, seed, local=torch.tensor(local), rule=torch.tensor(rule))
        edit = edit._replace(threshold=edit.threshold - 1.0 + level)
        x = torch.randn(3, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))
        words = (torch.arange(TOKENS) > 0) & (torch.arange(TOKENS) < torch.tensor([[3], [5], [TOKENS]]))
        found = edit.on(x.device).delta(x, words)[0]
        assert torch.equal(found, whole_width(edit, x, words))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("level", [0.0, 2.0, 9.0], ids="{} a latent fires".format)
def test_features_of_one_latent_each_write_their_own_and_it_is_read_once(level: float, gradients: bool) -> None:
    for seed, (concepts, features) in enumerate(((1, 8), (7, 60), (200, 300))):
        once = edit_of(concepts, features, seed)
        once = once._replace(threshold=once.threshold - 1.0 + level)
        twice = torch.arange(2 * features) % features
        more = torch.stack([once.edits[0], once.edits[1] + features])
        edit = once._replace(
            w_enc=once.w_enc[:, twice], b_enc=once.b_enc[twice], threshold=once.threshold[twice],
            w_dec=torch.cat([once.w_dec, once.w_dec.flip(1)]), gain=torch.cat([once.gain, once.gain + 2]),
            offset=torch.cat([once.offset, once.offset - 1]), edits=torch.cat([once.edits, more], 1),
        )  # fmt: skip
        x = torch.randn(3, TOKENS, DIM, generator=torch.Generator().manual_seed(seed)).requires_grad_(gradients)
        words = (torch.arange(TOKENS) > 0) & (torch.arange(TOKENS) < torch.tensor([[3], [5], [TOKENS]]))
        placed = edit.on(x.device)
        torch.testing.assert_close(placed.delta(x, words)[0], whole_width(edit, x, words), rtol=1e-4, atol=1e-4)
        assert placed.before(x).shape[-1] == features


def test_features_that_do_not_fire_cost_no_more_than_to_find_out_that_they_do_not() -> None:
    few = edit_of(5, 40)
    silent = 1000
    more = few._replace(
        w_enc=pad(few.w_enc, (0, silent), value=0.0), b_enc=pad(few.b_enc, (0, silent), value=0.0),
        w_dec=pad(few.w_dec, (0, 0, 0, silent), value=1.0), threshold=pad(few.threshold, (0, silent), value=1.0),
        gain=pad(few.gain, (0, silent), value=-1.0), offset=pad(few.offset, (0, silent), value=0.0),
    )  # fmt: skip
    x = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(0))
    words = torch.ones(1, TOKENS, dtype=torch.bool)
    placed = [edit.on(x.device) for edit in (few, more)]
    first, second = (elements(lambda edit=edit: edit.delta(x, words)) for edit in placed)
    # The product, the bias, the comparison with the level; once more whether it fires on any token, and a few rows of
    # what belongs to open gates.
    assert second - first <= silent * (4 * TOKENS + 16)


FEATURES, PROMPT = 40, "a photo of a cat"


@pytest.fixture
def attached(tiny_pipe: Any) -> Callable[..., Any]:
    """Gives the tiny pipeline with an erasure of so many concepts, in the place of the one before.

    Of the gates either the first is open in every prompt, or none ever is.
    """
    tower = backbone_for(tiny_pipe).towers[0]
    manager = erasure.ErasureManager(tiny_pipe)

    def attach(concepts: int, opened: bool = True) -> Any:
        manager.unload()
        edit = edit_of(concepts, FEATURES, first=torch.tensor(tower.leading), end=torch.tensor(tower.end))
        edit.gate[0] = -1e4
        edit.gate.add_(0 if opened else 1e6)
        names: list[dict[str, Any]] = [{"target": f"concept {index}"} for index in range(concepts)]
        config = ErasureConfig("itd", names, "stable-diffusion", carriers=["activations"])
        manager.add(Erasure(config, Edits(features={tower.key(tower.block_path(1)): edit})), "many")
        return tiny_pipe

    return attach


def test_no_function_is_called_more_often_for_more_concepts(attached: Callable[..., Any]) -> None:
    """From one image to the next nothing is remembered: every prompt is another."""

    def draw(pipe: Any, name: str) -> Counter[str]:
        encodings.KNOWN.checked.clear()
        words = {"prompt": f"{PROMPT} and {name}", "negative_prompt": f"blurry {name}", "output_type": "latent"}
        return calls(lambda: pipe(**words, num_inference_steps=2, height=32, width=32))

    draw(attached(2), "dog")
    counted = [draw(attached(concepts), "car") for concepts in (2, 500)]
    assert counted[0]["_EditBlock.edit"] == 2
    assert counted[0] == counted[1]


def test_nothing_is_written_in_prompts_without_an_erased_concept(tiny_pipe: Any, attached: Callable[..., Any]) -> None:
    stock = tiny_pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    for opened in (True, False):
        pipe = attached(2, opened)
        given: list[Tensor] = []
        counted = calls(lambda pipe=pipe, given=given: given.append(pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]))
        assert counted["_EditBlock.edit"] == 1
        assert counted["GatedEdit.written"] == opened
        assert opened or torch.equal(given[0], stock)


def test_only_scores_are_computed_for_more_concepts(attached: Callable[..., Any]) -> None:
    few, many = 10, 500
    written = []
    for concepts in (few, many):
        pipe = attached(concepts)
        written.append(elements(lambda pipe=pipe: pipe.encode_prompt(PROMPT, "cpu", 1, False)))
    # A score is a product, a bias, a comparison with the gate and one with where words are, for each token.
    # Rows of the latents that fire are read, fewer than half of them; the rest is once for each concept.
    tokens = pipe.tokenizer.model_max_length
    assert written[1] - written[0] <= (many - few) * (4 * tokens + FEATURES // 2 + 8)


def test_a_denoiser_computes_the_same_however_many_concepts_are_erased(attached: Callable[..., Any]) -> None:
    written = []
    for concepts in (1, 500):
        pipe = attached(concepts)
        states = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
        written.append(elements(lambda pipe=pipe, states=states: pipe.unet(torch.zeros(1, 4, 16, 16), 1, states)))
    assert written[0] == written[1]
