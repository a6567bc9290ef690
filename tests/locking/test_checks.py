"""What a lock looks at besides ways around: prompts by gates, pictures by a detector; and what stands in its log."""

from __future__ import annotations

import copy
import json
import pickle
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

import erasure
from erasure import Concept, Erasure, ErasureManager, locking
from erasure.errors import (
    ArtifactError,
    AttachError,
    BypassedErasureWarning,
    LockedError,
    OptionError,
    RefusedError,
    UnsupportedModelError,
    VerificationError,
)
from erasure.eval.detectors import Finding, ask
from erasure.guards import check_call
from erasure.interop.marks import VALUES
from erasure.interop.pipelines import components_of
from erasure.locking import AuditLog, Lock, verify_log
from erasure.pipelines import StableDiffusionErasurePipeline

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 1}
QUICK: dict[str, dict[str, Any]] = {
    "uce": {"vocabulary": 8},
    "itd": {"d_sae": 64, "steps": 2, "contexts": 4, "vocabulary": 8, "target_rate": 0.1, "retain_rate": 1.0,
            "false_positive_rate": 1.0},
    "spm": {"steps": 2, "batch": 2, "retain_batch": 2, "rollout_steps": 2, "contexts": 2, "retain_vocabulary": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_pipe_original: Any) -> Callable[[str], Erasure]:
    """Erasures of "cat" for the tiny pipeline, each made once."""
    known: dict[str, Erasure] = {}

    def make(strategy: str) -> Erasure:
        if strategy not in known:
            concept = Concept("cat", anchor="dog")
            options = {"attach": False, "progress": False, **QUICK[strategy]}
            known[strategy] = erasure.erase(tiny_pipe_original, concept, strategy, **options)
        return known[strategy]

    return make


@pytest.fixture
def pipe(tiny_pipe: Any) -> Any:
    drawn = StableDiffusionErasurePipeline.from_pipe(tiny_pipe)
    drawn.set_progress_bar_config(disable=True)
    return drawn


@pytest.fixture
def erased(pipe: Any, made: Any) -> Any:
    pipe.load_erasure(made("uce"), "cat")
    return pipe


class Stub:
    """A detector that gives answers in turn."""

    name, licence = "stub", "none"

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)

    def recipe(self) -> dict[str, object]:
        return {}

    def __call__(self, images: Sequence[Image.Image]) -> list[Any]:
        return [self.answers[index % len(self.answers)] for index in range(len(images))]


SAFE, FLAGGED = Finding(False, 0.1), Finding(True, 0.9)


# Prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["itd", "spm"])
def test_prompts_that_open_a_gate_are_refused_and_others_drawn(pipe: Any, made: Any, strategy: str) -> None:
    pipe.load_erasure(made(strategy), "cat")
    pipe.lock_erasures(prompts=True)
    gates = Lock.of(pipe)._gates  # type: ignore[union-attr]
    prompts = ["cat", "a house on a hill with a tree and a car", "dog"]
    holding = gates.found(prompts)  # type: ignore[union-attr]
    assert "cat" in holding[0]
    if strategy == "itd":
        found = [{word for word, each in row.items() if each.present} for row in pipe.detect_concepts(prompts)]
        assert [set(row) for row in holding] == found
    with pytest.raises(RefusedError, match="holds cat, which is erased") as refused:
        pipe(prompts, **SMALL)
    assert set(refused.value.refused) == {place for place, row in enumerate(holding) if row}
    assert refused.value.pictures == []
    free = [prompt for prompt, row in zip(prompts, holding, strict=True) if not row]
    if free:
        assert len(pipe(free, **SMALL).images) == len(free)


def test_erasures_without_gates_cannot_check_prompts(erased: Any) -> None:
    with pytest.raises(AttachError, match=r"none of the erasures in force .* has gates"):
        erased.lock_erasures(prompts=True)
    assert Lock.of(erased) is None
    erased.unload_erasures()


# Pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (FLAGGED, "the detector flags it"),
        (Finding(None, None, reason="no face"), r"cannot judge it \(no face\)"),
        (ValueError("broken"), r"cannot judge it \(ValueError: broken\)"),
        ("no finding", "cannot judge it .the detector gave str"),
        (Finding(False, float("nan")), "not finite"),
    ],
)
def test_pictures_that_are_flagged_or_cannot_be_judged_are_kept_back(erased: Any, answer: Any, why: str) -> None:
    erased.lock_erasures(pictures=partial(ask, Stub(SAFE, answer)))
    with pytest.raises(RefusedError, match=f"number 1: .*{why}") as refused:
        erased(["a photo of a house", "a photo of a dog"], **SMALL)
    assert list(refused.value.refused) == [1]
    first, second = refused.value.pictures
    assert isinstance(first, Image.Image)
    assert second is None
    assert erased("a photo of a house", **SMALL).images


def test_a_detector_that_answers_wrongly_lets_nothing_through(erased: Any) -> None:
    key = erased.lock_erasures(pictures=lambda images: [SAFE])
    with pytest.raises(RefusedError, match=r"2 pictures are refused.*gave 1 answers for 2"):
        erased(["a house", "a dog"], **SMALL)
    with pytest.raises(LockedError, match="output_type='latent' is refused"):
        erased("a house", output_type="latent", **SMALL)
    erased.unlock_erasures(key)

    def broken(images: object) -> Any:
        raise RuntimeError("no memory")

    erased.lock_erasures(pictures=broken)
    with pytest.raises(RuntimeError, match="no memory"):
        erased("a house", **SMALL)


# Verification ------------------------------------------------------------------------------------------------------


def test_whole_verifications_take_their_share_of_the_time_at_most(erased: Any, monkeypatch: Any) -> None:
    erased.lock_erasures(share=0.25)
    held = Lock.of(erased)
    assert held is not None
    held._proof = 10.0
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    whole = []
    for _ in range(100):
        whole.append(held.verify(erased))
        held._since += 1.0
        if whole[-1]:
            held._proof = 10.0
    assert sum(whole) == 2
    assert held.costs.verifications == 2
    # One every forty seconds of drawing is a quarter.
    assert [place for place, each in enumerate(whole) if each] == [40, 80]


def test_verification_ahead_of_every_call_costs_less_than_a_hundredth(canvas: Any) -> None:
    canvas.erase("cat", strategy="uce", progress=False)
    canvas.lock_erasures()
    held = Lock.of(canvas)
    assert held is not None
    started = time.thread_time()
    for _ in range(50):
        assert not held.verify(canvas)
    each = (time.thread_time() - started) / 50
    started = time.thread_time()
    canvas("a photo of a dog", num_inference_steps=4)
    drawing = time.thread_time() - started
    print(f"ahead of a call {1000 * each:.2f} ms, a picture in 4 steps {1000 * drawing:.0f} ms: {each / drawing:.2%}")
    assert each < 0.01 * drawing


@pytest.fixture
def canvas() -> Any:
    pipe = erasure.load_pipeline("canvas-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_whole_verifications_find_what_marks_do_not(erased: Any) -> None:
    erased.lock_erasures()
    held = Lock.of(erased)
    assert held is not None
    flat = held._seal.marks["unet"].sampled[0].data.view(-1)
    assert len(flat) // VALUES % 2 == 0
    # Values between those that are compared, by a write that is not counted.
    flat[1::2] = flat[1::2] + 1.0
    assert held._seal.is_whole(erased)
    assert not held.verify(erased)
    for whole in (True, False):
        # What has failed is asked again at every call.
        with pytest.raises(VerificationError, match="not what the erasures make of it"):
            held.verify(erased, whole=whole)
    with pytest.raises(VerificationError):
        erased("a dog", **SMALL)


# The lock itself ---------------------------------------------------------------------------------------------------


def test_nothing_can_be_locked_without_an_erasure_or_for_what_there_is_not(pipe: Any, made: Any) -> None:
    with pytest.raises(AttachError, match="no erasure is in force"):
        pipe.lock_erasures()
    pipe.load_erasure(made("uce"), "cat")
    with pytest.raises(OptionError, match="'images', which a lock knows nothing of"):
        pipe.lock_erasures(refuse={"images"})
    with pytest.raises(OptionError, match="share=2"):
        pipe.lock_erasures(share=2)
    pipe.disable_erasures()
    with pytest.raises(AttachError, match="no erasure is in force"):
        pipe.lock_erasures()
    pipe.enable_erasures()
    with torch.no_grad():
        next(iter(pipe.unet.mid_block.parameters())).add_(0)
    assert pipe.lock_erasures()


def test_pictures_and_image_prompts_are_refused_where_told_and_warned_of_elsewhere(erased: Any) -> None:
    networks = components_of(erased)
    for given, word in (({"ip_adapter_image": object()}, "image_prompts"), ({"image": object()}, "pictures")):
        key = erased.lock_erasures(refuse={word})
        with pytest.raises(LockedError, match="this pipeline is locked"):
            check_call(networks, given)
        erased.unlock_erasures(key)
        key = erased.lock_erasures()
        check_call(networks, given)
        erased.unlock_erasures(key)
    erased.lock_erasures()
    with pytest.warns(BypassedErasureWarning, match="a picture that is handed in"):
        erased.vae.encode(torch.zeros(1, 3, 32, 32))


def test_what_is_not_in_force_is_not_locked(erased: Any) -> None:
    manager = ErasureManager(erased)
    state = manager._states()["unet"]
    path = next(iter(state.record.written.terms))
    with torch.no_grad():
        erased.unet.get_parameter(path).add_(1.0)
    with pytest.raises(VerificationError):
        erased.lock_erasures()
    assert Lock.of(erased) is None
    assert state.locked is None


def test_copies_and_twins(erased: Any) -> None:
    erased.lock_erasures()
    assert erased("a dog", **SMALL).images
    assert copy.copy(erased)("a dog", **SMALL).images
    with pytest.raises(VerificationError, match="is another one than when the pipeline was locked"):
        copy.deepcopy(erased)("a dog", **SMALL)
    with pytest.raises(LockedError, match="cannot be pickled or sent to another process"):
        pickle.dumps(erased)
    # Another object, and not erased: evaluations compare with it.
    stock = ErasureManager(erased).stock()
    assert Lock.of(stock) is None
    assert stock("a dog", **SMALL).images
    with pytest.raises(LockedError, match="something else than a call"):
        ErasureManager(erased).twin()("a dog", **SMALL)


def test_model_offload_goes_together_with_a_lock_and_sequential_offload_does_not(erased: Any) -> None:
    erased.enable_model_cpu_offload(device="cpu")
    key = erased.lock_erasures()
    for _ in range(2):
        assert erased("a dog", **SMALL).images
    erased.unlock_erasures(key)
    erased.remove_all_hooks()
    erased.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises((UnsupportedModelError, VerificationError), match="sequential offload"):
        erased.lock_erasures()


def test_calls_inside_of_calls_are_looked_at_as_well(erased: Any, made: Any) -> None:
    erased.lock_erasures()
    second = StableDiffusionErasurePipeline.from_pipe(erased)
    second.set_progress_bar_config(disable=True)
    embeds = torch.zeros(1, 77, 32)

    def inside(*args: Any) -> dict[str, Any]:
        second(prompt_embeds=embeds, negative_prompt_embeds=embeds, **SMALL)
        return {}

    with pytest.raises(LockedError, match="prompt_embeds= is refused"):
        erased("a dog", callback_on_step_end=inside, **SMALL)
    with pytest.raises(LockedError, match="cannot be attached, scaled"):
        erased.unload_erasures()


# The log -----------------------------------------------------------------------------------------------------------


def test_every_call_stands_in_the_log(erased: Any, made: Any, tmp_path: Any) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    key = erased.lock_erasures(refuse={"noise"}, audit=log, pictures=partial(ask, Stub(SAFE, FLAGGED)))
    image = erased("a photo of a house", **SMALL).images[0]
    with pytest.raises(RefusedError):
        erased(["a photo of a dog", "a photo of a car"], **SMALL)
    with pytest.raises(LockedError, match="noise"):
        erased("a photo of a tree", latents=torch.zeros(1, 4, 16, 16), **SMALL)
    with pytest.raises(ValueError, match="height"):
        erased("a photo of a hill", **{**SMALL, "height": 33})
    with pytest.raises(LockedError, match="does not unlock"):
        erased.unlock_erasures("guess")
    erased.unlock_erasures(key)
    log.close()
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert [entry["event"] for entry in entries] == [
        "opened", "locked", "drawn", "drawn", "refused", "failed", "refused", "unlocked",
    ]  # fmt: skip
    locked, drawn, kept_back = entries[1:4]
    assert locked["erasures"]["cat"]["fingerprint"] == made("uce").fingerprint
    assert locked["refuses"] == ["noise"]
    assert drawn["pictures"] == [locking.locks.digest_of(image)]
    assert drawn["prompts"] == [log.digest("a photo of a house")]
    assert kept_back["refused"] == [1]
    assert "noise can be searched" in entries[4]["message"]
    assert entries[5]["message"] == ""
    text = path.read_text()
    assert not any(word in text for word in ("house", "tree", "hill"))
    assert verify_log(path).lines == len(entries)


def test_nothing_is_given_out_that_cannot_be_logged(erased: Any, tmp_path: Any) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    erased.lock_erasures(audit=log)
    log.close()
    with pytest.raises(ArtifactError, match="cannot be written"):
        erased("a photo of a house", **SMALL)


def test_a_damaged_log_keeps_the_pipeline_unlocked(erased: Any, tmp_path: Any) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text("nothing\n")
    with pytest.raises(ArtifactError):
        erased.lock_erasures(audit=path)
    assert Lock.of(erased) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        erased.disable_erasures()
