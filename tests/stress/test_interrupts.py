"""Ctrl-C at any line: an operation is done or not done, never in between, and what comes next works."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

import erasure
from erasure import Erasure
from erasure.errors import ErasureError
from erasure.eval import evaluate
from erasure.pipelines import StableDiffusionErasurePipeline
from tests.copies import copied

from .lines import ROOT, Lines, spread
from .looks import colour_judge, differing, drop_in, give_world, look, one_thread
from .model import Kit, encode, option

INTERRUPTS = option("STRESS_INTERRUPTS", 34)
"""How many are tried over all operations: `STRESS_INTERRUPTS=2000` for the long run."""


def interrupted(call: Callable[[], Any], at: int) -> Lines:
    """Call with an interrupt at a line; the interrupt is caught here."""
    with Lines(at) as found, contextlib.suppress(KeyboardInterrupt):
        call()
    return found


# Switching -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """Something to interrupt."""

    call: Callable[[Any, Kit, Path], Any]
    """What is done to the pipeline."""
    before: tuple[str, ...] = ("delta", "low", "pin", "itd")
    """Kinds that are attached ahead of it."""
    prepare: Callable[[Any], Any] = lambda pipe: None
    """What is done to the pipeline then."""
    lasting: bool = True
    """Whether it is to change anything."""


def block(pipe: Any, kit: Kit, folder: Path) -> None:
    with pipe.erasure_manager.disabled():
        pipe.erasure_manager.active_erasures()


def erase(pipe: Any, attach: bool) -> Erasure:
    return erasure.erase(pipe, "dog", "uce", name="more", vocabulary=0, saved_as="lora", attach=attach, progress=False)


SWITCHES = {
    "add": Operation(lambda pipe, kit, _: pipe.erasure_manager.add(kit.erasures["over"], "over", 0.5)),
    "load": Operation(lambda pipe, kit, folder: pipe.load_erasure(folder / "over", "over")),
    "load features": Operation(lambda pipe, kit, folder: pipe.load_erasure(folder / "itd", "itd"), ("delta", "pin")),
    "set": Operation(lambda pipe, *_: pipe.set_erasures(["low", "pin", "itd"], [0.5, 1.0, 2.0])),
    "disable": Operation(lambda pipe, *_: pipe.disable_erasures()),
    "enable": Operation(lambda pipe, *_: pipe.enable_erasures(), prepare=lambda pipe: pipe.disable_erasures()),
    "disabled block": Operation(block, lasting=False),
    "delete": Operation(lambda pipe, *_: pipe.delete_erasure(["delta", "low", "itd"])),
    "unload": Operation(lambda pipe, *_: pipe.unload_erasures()),
    "fuse": Operation(lambda pipe, *_: pipe.fuse_erasure()),
    "unfuse": Operation(
        lambda pipe, *_: pipe.unfuse_erasure(),
        prepare=lambda pipe: (pipe.fuse_erasure(), pipe.disable_erasures()),
    ),
    "erase": Operation(lambda pipe, *_: erase(pipe, True), ("delta", "low")),
    "erase without attaching": Operation(lambda pipe, *_: erase(pipe, False), ("low", "itd"), lasting=False),
    "detect": Operation(lambda pipe, *_: pipe.detect_concepts(["a cat", ""]), lasting=False),
    "verify": Operation(lambda pipe, *_: pipe.verify_erasures(), lasting=False),
    "from_pipe": Operation(lambda pipe, *_: StableDiffusionErasurePipeline.from_pipe(pipe), lasting=False),
}


@pytest.fixture
def folders(kit: Kit, tmp_path: Path) -> Path:
    for kind in ("over", "itd"):
        kit.erasures[kind].save(tmp_path / kind)
    return tmp_path


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def prepared(original: Any, kit: Kit, operation: Operation) -> Any:
    pipe = drop_in(original)
    for kind in operation.before:
        pipe.erasure_manager.add(kit.erasures[kind], kind)
    operation.prepare(pipe)
    return pipe


def taken_off(pipe: Any) -> None:
    pipe.unfuse_erasure()
    pipe.unload_erasures()


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_done_or_not_done(name: str, kit: Kit, folders: Path, tiny_pipe_original: Any) -> None:
    operation = SWITCHES[name]
    base = look(tiny_pipe_original)
    first = prepared(copied(tiny_pipe_original), kit, operation)
    before = look(first)
    operation.call(copied(first), kit, folders)  # what is imported or cached the first time is there now
    pipe = copied(first)
    with Lines() as whole:
        operation.call(pipe, kit, folders)
    after = look(pipe)
    assert differing(after, before) if operation.lasting else not differing(after, before)
    faults = []
    for at in spread(whole.lines, INTERRUPTS // len(SWITCHES), name):
        pipe = copied(first)
        found = interrupted(lambda pipe=pipe: operation.call(pipe, kit, folders), at)
        assert found.reached
        try:
            seen = look(pipe)
            half = [differing(seen, before), differing(seen, after)]
            fault = f"differs from before in {half[0]}, from after in {half[1]}" if all(half) else ""
            if not fault and not half[0]:
                operation.call(pipe, kit, folders)
                fault = f"then again: {differing(look(pipe), after)}" if differing(look(pipe), after) else ""
            taken_off(pipe)
            left = differing(look(pipe), base)
            fault = fault or (f"unload leaves {left}" if left else "")
        except Exception as error:
            fault = f"then {type(error).__name__}: {str(error)[:90]}"
        if fault:
            faults.append(f"line {at} of {whole.lines}, {found.where}: {fault}")
    assert not faults, f"{len(faults)} interrupts of {name} left a mess:\n" + "\n".join(faults)


class Leaking:
    """Ctrl-C inside of the n-th entry into, or exit from, `torch.no_grad()`, when gradients are off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.count = at, 0
        enter, leave = torch.no_grad.__enter__, torch.no_grad.__exit__

        def entering(block: Any) -> None:
            enter(block)
            self.step()

        def leaving(block: Any, *error: Any) -> None:
            self.step()
            leave(block, *error)

        monkeypatch.setattr(torch.no_grad, "__enter__", entering)
        monkeypatch.setattr(torch.no_grad, "__exit__", leaving)

    def step(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise KeyboardInterrupt


DRAWN = Operation(lambda pipe, *_: pipe("a cat", num_inference_steps=1, output_type="np"), lasting=False)


@pytest.mark.parametrize("name", [*SWITCHES, "draw"])
def test_gradients_are_on_again(name: str, kit: Kit, folders: Path, tiny_pipe: Any, monkeypatch: Any) -> None:
    operation = {**SWITCHES, "draw": DRAWN}[name]
    pipe = prepared(tiny_pipe, kit, operation)
    first = copied(pipe)
    with monkeypatch.context() as patch:
        whole = Leaking(patch, 0)
        operation.call(pipe, kit, folders)
    for turn, at in enumerate(sorted({1 + number * whole.count // 8 for number in range(8)}) if whole.count else ()):
        other = copied(first)
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            Leaking(patch, at)
            operation.call(other, kit, folders)
        on = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        assert on, f"turn {turn}"


# Writing and reading -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writing:
    """Something that writes a folder, or reads one."""

    call: Callable[[Any, Path], Any]
    kinds: tuple[str, ...] = ("low", "delta")
    is_whole: Callable[[Any, Path], bool] = lambda pipe, folder: True
    """Whether what stands in the folder is the result; an `ErasureError` or `OSError` is a no."""
    again: bool = True
    """Whether the same call finishes what is there."""


def is_artifact(pipe: Any, folder: Path) -> bool:
    made, wanted = Erasure.load(folder), pipe.erasure_manager.erasures["low"]
    return all(
        torch.equal(a, b) for k, pair in wanted.low_rank.items() for a, b in zip(pair, made.low_rank[k], strict=True)
    )


def is_erased(pipe: Any, folder: Path) -> bool:
    """Whether every loader that opens the folder gives the erased model; the stock model is a fault."""
    wanted, opened = encode(pipe), 0
    for load in (erasure.load_pipeline, StableDiffusionPipeline.from_pretrained,
                 StableDiffusionErasurePipeline.from_pretrained):  # fmt: skip
        try:
            found = load(folder, dtype=torch.float32)
        except (ErasureError, OSError, ValueError):
            continue
        opened += 1
        assert torch.equal(encode(found), wanted), f"{load.__qualname__} opens the folder and gives the stock model"
    return opened > 0


def measured(pipe: Any, folder: Path) -> Any:
    return evaluate(
        pipe, "canvas", "cat", size="smoke", out=folder, judge=colour_judge, baseline_cache=folder.parent / "cache",
        progress=False, batch_size=8, images=False, clip=None, report=False,
    )  # fmt: skip


WRITERS = {
    "save an erasure": Writing(
        lambda pipe, folder: pipe.save_erasure(folder, "low", overwrite=True), ("low",), is_artifact
    ),
    "save fused": Writing(lambda pipe, folder: pipe.save_erased_pipeline(folder), is_whole=is_erased, again=False),
    "save beside": Writing(
        lambda pipe, folder: pipe.save_erased_pipeline(folder, fuse=False), ("low", "delta", "itd"), is_erased, False
    ),
    "evaluate": Writing(measured, ("low",)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_writer_is_done_or_not_done(name: str, kit: Kit, tmp_path: Path, tiny_pipe_original: Any) -> None:
    writing, original = WRITERS[name], copied(tiny_pipe_original)
    give_world(original, tmp_path / "world")
    pipe = prepared(original, kit, Operation(lambda *_: None, writing.kinds))
    before = look(pipe)
    writing.call(pipe, tmp_path / "first" / "whole")
    with Lines() as whole:
        expected = writing.call(pipe, tmp_path / "whole" / "whole")
    faults = []
    for index, at in enumerate(spread(whole.lines, max(INTERRUPTS // 25, 2), name)):
        parent = tmp_path / f"{index}"
        folder = parent / "target"
        found = interrupted(lambda pipe=pipe, folder=folder: writing.call(pipe, folder), at)
        fault = ""
        try:
            if changed := differing(look(pipe), before):
                fault = f"the pipeline differs in {changed}"
            if folder.exists() and any(folder.iterdir()) and writing.is_whole is not Writing.is_whole:
                try:
                    fault = fault or ("" if writing.is_whole(pipe, folder) or not writing.again else "half is written")
                except (ErasureError, OSError) as error:
                    fault = fault or (f"half is written: {error}" if writing.again else "")
            if writing.again or not folder.exists():
                result = writing.call(pipe, folder)
                left = sorted(item.name for item in parent.iterdir() if item.name not in ("target", "cache"))
                fault = fault or (f"leaves {left}" if left else "")
                if name == "evaluate" and result.metrics != expected.metrics:
                    fault = fault or "the resumed run has other results"
        except Exception as error:
            fault = f"then {type(error).__name__}: {str(error)[:200]}"
        if fault:
            faults.append(f"line {at} of {whole.lines}, {found.where}: {fault}")
            original = copied(tiny_pipe_original)
            give_world(original, tmp_path / "world")
            pipe = prepared(original, kit, Operation(lambda *_: None, writing.kinds))
    assert not faults, f"{len(faults)} interrupts of {name} left a mess:\n" + "\n".join(faults)


def test_loading_a_saved_pipeline_is_done_or_not_done(kit: Kit, tmp_path: Path, tiny_pipe_original: Any) -> None:
    """A load that was interrupted leaves nothing behind that another load, or another pipeline, would notice."""
    pipe = prepared(copied(tiny_pipe_original), kit, Operation(lambda *_: None, ("low", "itd")))
    before, folder = look(pipe), tmp_path / "saved"
    pipe.save_erased_pipeline(folder, fuse=False)
    load = StableDiffusionErasurePipeline.load_erased_pipeline
    load(folder)
    with Lines() as whole:
        load(folder)
    for at in spread(whole.lines, max(INTERRUPTS // 25, 2), "load"):
        assert interrupted(lambda: load(folder), at).reached
        assert not differing(look(pipe), before)
        assert torch.equal(encode(load(folder)), encode(pipe))


# The signal itself ---------------------------------------------------------------------------------------------------

WORKER = Path(__file__).with_name("worker.py")


def test_the_signal_at_any_moment(kit: Kit, tmp_path: Path, tiny_pipe_folder: Path) -> None:
    """Real SIGINTs, between any two instructions of any library, in a process of their own."""
    for kind in ("delta", "low", "over", "pin", "itd"):
        kit.erasures[kind].save(tmp_path / kind)
    rounds = max(INTERRUPTS // 5, 10)
    job = {"job": "signals", "model": str(tiny_pipe_folder), "erasures": str(tmp_path), "rounds": rounds}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT.parent), *sys.path])}
    run = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(job)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["interrupted"] > rounds // 4, "hardly any signal came while an operation ran"
    assert not result["faults"], "\n".join(result["faults"])


def test_an_interrupt_in_another_thread_s_call(kit: Kit, tiny_pipe: Any) -> None:
    """Lines are counted, and interrupts come, in the thread that switches alone."""
    handler = signal.getsignal(signal.SIGINT)
    pipe = prepared(tiny_pipe, kit, SWITCHES["set"])
    wanted, found = encode(pipe), []
    thread = threading.Thread(target=lambda: found.append(encode(pipe)))
    with Lines(1):
        thread.start()
        thread.join()
    assert torch.equal(found[0], wanted)
    assert signal.getsignal(signal.SIGINT) is handler
