"""Processes that are killed while they write leave the old or the new, nothing half; what resumes ends the same."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import erasure
from erasure import Erasure
from erasure.errors import ErasureError
from erasure.eval import Results
from erasure.pipelines import StableDiffusionErasurePipeline

from .lines import ROOT, spread
from .looks import one_thread
from .model import Kit, encode, option

KILLS = option("STRESS_KILLS", 20)
"""How many processes are killed: `STRESS_KILLS=100` for the long run."""
WORKER = Path(__file__).with_name("worker.py")


class Nursery:
    """A process that forks for every job, so that a child that is killed costs milliseconds.

    Args:
        folder: Where children's output goes.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "output.txt"
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "ERASURE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT.parent), *sys.path]),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), "serve"], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "errors.txt").open("w"),
        )  # fmt: skip

    def _answer(self) -> int:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the nursery is gone"
        return int(line)

    def run(self, job: str, *, after: float | None = None, at: int | None = None, **arguments: Any) -> bool:
        """Do a job in a child; gives whether it was killed.

        Args:
            job: Which.
            after: Seconds after which it is killed.
            at: Line of the package ahead of which it kills itself; 0 counts the lines.
            **arguments: Of the job.
        """
        assert self.process.stdin is not None
        ready = [str(path) for path in arguments.pop("ready", ())]
        message = {"job": job, "log": str(self.log), "kill at line": at, "ready": ready, **arguments}
        self.process.stdin.write(json.dumps(message, default=str) + "\n")
        self.process.stdin.flush()
        child = self._answer()
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        code = self._answer()
        assert code in (0, -signal.SIGKILL), self.log.read_text()[-3000:]
        return code != 0

    def lines(self, job: str, **arguments: Any) -> int:
        """How many lines of the package a whole job runs."""
        assert not self.run(job, at=0, **arguments)
        return int(self.log.read_text().split()[-1])

    def seconds(self, job: str, **arguments: Any) -> float:
        """How long a whole job takes."""
        clock = time.perf_counter()
        assert not self.run(job, **arguments)
        return time.perf_counter() - clock


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(30)


@pytest.fixture
def folders(kit: Kit, tmp_path: Path) -> dict[str, Path]:
    return {kind: kit.erasures[kind].save(tmp_path / "made" / kind) for kind in ("delta", "low", "itd")}


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def tensors(made: Erasure) -> dict[str, torch.Tensor]:
    return made.edits.delta_state_dict() | made.edits.lora_state_dict()


def same(first: Erasure, second: Erasure) -> bool:
    a, b = tensors(first), tensors(second)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def test_a_process_that_is_killed_at_its_progress_bar_stops_no_other(nursery: Nursery, tiny_pipe_folder: Path) -> None:
    assert nursery.run("bar", ready=[tiny_pipe_folder], die=True)
    assert not nursery.run("bar", die=False)


# Artifacts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["line", "time"])
def test_an_artifact_is_the_old_or_the_new_one(
    by: str, nursery: Nursery, kit: Kit, folders: dict[str, Path], tmp_path: Path
) -> None:
    pair = [folders["delta"], folders["low"]]
    wanted = [kit.erasures["delta"], kit.erasures["low"]]
    job: dict[str, Any] = {"job": "overwrite", "ready": pair, "erasures": pair}
    if by == "line":
        moments = [{"at": at} for at in spread(nursery.lines(**job, out=tmp_path / "x" / "whole"), KILLS // 3, by)]
    else:
        chance, job["erasures"] = random.Random(0), pair * 500
        moments = [{"after": 0.03 + 0.2 * chance.random()} for _ in range(KILLS // 4)]
    faults = []
    for number, moment in enumerate(moments):
        parent = tmp_path / f"{number}"
        parent.mkdir()
        out = parent / "target"
        if number % 2:
            wanted[0].save(out)
        killed = nursery.run(**job, **moment, out=out)
        assert killed
        try:
            if number % 2 or out.exists():
                found = Erasure.load(out)
                if not any(same(found, one) for one in wanted):
                    faults.append(f"{moment}: the artifact is neither")
            wanted[1].save(out, overwrite=True)
            if names(parent) != ["target"] or not same(Erasure.load(out), wanted[1]):
                faults.append(f"{moment}: {names(parent)} after the next write")
        except ErasureError as error:
            faults.append(f"{moment}: {str(error)[:200]}")
    assert not faults, f"{len(faults)} of {len(moments)} kills left a mess:\n" + "\n".join(faults)


# Pipelines -----------------------------------------------------------------------------------------------------------


LOADERS: dict[str, Callable[[Path], Any]] = {
    "load_pipeline": lambda folder: erasure.load_pipeline(folder, device="cpu"),
    "load_erased_pipeline": StableDiffusionErasurePipeline.load_erased_pipeline,
    "own from_pretrained": StableDiffusionErasurePipeline.from_pretrained,
    "stock from_pretrained": StableDiffusionPipeline.from_pretrained,
    "DiffusionPipeline": DiffusionPipeline.from_pretrained,
}


def opened(folder: Path, wanted: torch.Tensor) -> tuple[list[str], list[str]]:
    """Which loaders open a folder, and which of them give another model than the erased one."""
    found, wrong = [], []
    for name, load in LOADERS.items():
        try:
            pipe = load(folder)
        except (ErasureError, OSError, ValueError, TypeError):
            continue
        found.append(name)
        if not torch.equal(encode(pipe), wanted):
            wrong.append(name)
    return found, wrong


@pytest.mark.parametrize("fuse", [True, False])
def test_half_a_pipeline_is_never_the_stock_model(
    fuse: bool, nursery: Nursery, folders: dict[str, Path], tiny_pipe_folder: Path, tmp_path: Path
) -> None:
    kinds = ["delta", "low"] if fuse else ["delta", "low", "itd"]
    erasures = [folders[kind] for kind in kinds]
    job: dict[str, Any] = {"job": "save_pipeline", "ready": [tiny_pipe_folder, *erasures],
                           "model": tiny_pipe_folder, "erasures": erasures, "fuse": fuse}  # fmt: skip
    lines = nursery.lines(**job, out=tmp_path / "whole")
    whole = (LOADERS["stock from_pretrained"] if fuse else LOADERS["load_erased_pipeline"])(tmp_path / "whole")
    wanted = encode(whole)
    assert not opened(tmp_path / "whole", wanted)[1], "a folder that was written whole opens without its erasures"
    seconds = nursery.seconds(**job, out=tmp_path / "timed")
    chance, faults = random.Random(0), []
    count = max(KILLS // 8, 2)
    moments: list[dict[str, Any]] = [{"at": at} for at in spread(lines, count, f"{fuse}")]
    moments += [{"after": seconds * chance.random()} for _ in range(count)]
    for number, moment in enumerate(moments):
        parent = tmp_path / f"{number}"
        parent.mkdir()
        out = parent / "target"
        nursery.run(**job, **moment, out=out)
        _, wrong = opened(out, wanted) if out.exists() else ([], [])
        if wrong:
            faults.append(f"{moment}: {', '.join(wrong)} gives the stock model")
        if out.exists() and "load_pipeline" not in opened(out, wanted)[0]:
            # What no loader opens is the user's to remove: it was never a pipeline.
            shutil.rmtree(out)
        if not out.exists():
            nursery.run(**job, out=out)
        if names(parent) != ["target"]:
            faults.append(f"{moment}: {names(parent)} after the next write")
    assert not faults, f"{len(faults)} of {len(moments)} kills left a mess:\n" + "\n".join(faults)


# Training and measuring ----------------------------------------------------------------------------------------------


def killed_until_done(
    nursery: Nursery, job: Callable[[Path], dict[str, Any]], parent: Path, seconds: float, chance: random.Random
) -> Path:
    """Kill a job three times at random moments, each time started again, then let it end. Gives what it was to write.

    A job that ends sooner than it was to be killed, because the one that was timed had caches to fill, is tried again
    elsewhere in half the time.
    """
    for attempt in range(5):
        out = parent / f"killed-{attempt}" / "out"
        for kills in range(4):
            moment = seconds * chance.uniform(0.1, 0.7) / 2**attempt if kills < 3 else None
            if not nursery.run(**job(out), after=moment):
                break
        if kills:
            return out
    raise AssertionError("no process could be killed before it was done")


@pytest.mark.parametrize("turn", range(max(KILLS // 20, 1)))
def test_a_killed_training_ends_the_same(turn: int, nursery: Nursery, tiny_pipe_folder: Path, tmp_path: Path) -> None:
    def job(out: Path) -> dict[str, Any]:
        options = ["--steps", "12", "--batch", "2", "--retain-batch", "2", "--rollout-steps", "3", "--contexts", "1",
                   "--retain-vocabulary", "2", "--lr", "1e-2", "--save-every", "1"]  # fmt: skip
        model = ["--model", str(tiny_pipe_folder), "--concept", "cat", "--anchor", "dog"]
        return {"job": "command", "arguments": ["erase", "esd", *model, "--out", str(out), *options]}

    whole = tmp_path / "whole" / "out"
    seconds = nursery.seconds(**job(whole))
    out = killed_until_done(nursery, job, tmp_path, seconds, random.Random(turn))
    assert same(Erasure.load(out), Erasure.load(whole))
    assert names(out.parent) == names(whole.parent)


def timeless(path: Path) -> bytes:
    """Content of a file, without how long its making took."""
    return re.sub(rb'"seconds": [\d.e-]+', b"", path.read_bytes())


@pytest.mark.parametrize("turn", range(max(KILLS // 20, 1)))
def test_a_killed_dictionary_ends_the_same(
    turn: int, nursery: Nursery, tiny_pipe_folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\na photo of a dog\nvan gogh painting\na house in ink style\n")

    def job(out: Path) -> dict[str, Any]:
        options = ["--d-sae", "64", "--k", "4", "--steps", "120", "--prompts-per-step", "4", "--layer", "0",
                   "--save-every", "5", "--json"]  # fmt: skip
        where = ["--model", str(tiny_pipe_folder), "--prompts", str(prompts), "--out", str(out)]
        return {"job": "command", "arguments": ["sae", "train", *where, *options]}

    whole = tmp_path / "whole" / "out"
    seconds = nursery.seconds(**job(whole))
    out = killed_until_done(nursery, job, tmp_path, seconds, random.Random(turn))
    assert names(out) == names(whole)
    for name in names(whole):
        assert timeless(out / name) == timeless(whole / name), name
    assert names(out.parent) == names(whole.parent)


@pytest.mark.parametrize("turn", range(max(KILLS // 20, 1)))
def test_a_killed_evaluation_ends_the_same(
    turn: int, nursery: Nursery, folders: dict[str, Path], tiny_pipe_folder: Path, tmp_path: Path
) -> None:
    def job(out: Path) -> dict[str, Any]:
        return {"job": "measure", "ready": [tiny_pipe_folder, folders["low"]], "model": tiny_pipe_folder,
                "made": folders["low"], "out": out, "cache": tmp_path / f"cache of {out.parent.name}"}  # fmt: skip

    whole = tmp_path / "whole" / "out"
    seconds = nursery.seconds(**job(whole))
    out = killed_until_done(nursery, job, tmp_path, seconds, random.Random(turn))
    assert Results.load(out).metrics == Results.load(whole).metrics
    assert names(out) == names(whole)
    assert names(out.parent) == names(whole.parent)
