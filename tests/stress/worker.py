"""A process of its own that does what the tests tell it, to be interrupted or killed.

`worker.py JOB` runs one job, given as JSON. `worker.py serve` reads jobs from its input, one a line, and forks for
each: everything is imported once, and a child that is killed costs milliseconds.
"""

from __future__ import annotations

import copy
import faulthandler
import functools
import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

import erasure
from erasure import Erasure
from stress.lines import Lines, kill
from stress.looks import colour_judge, differing, drop_in, give_world, look

# What a process has written outlasts its kill, whether or not the disk has it.
os.fsync = os.fstat

LIMIT = 300
"""Seconds after which a job that hangs says where, and ends."""


def load(model: str) -> Any:
    """A pipeline without a progress bar."""
    pipe = erasure.load_pipeline(model, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def signals(model: str, erasures: str, rounds: int) -> dict[str, Any]:
    """Interrupt switches by the signal at random moments; what was neither done nor not done is a fault."""
    made = {kind: Erasure.load(Path(erasures) / kind) for kind in ("delta", "low", "over", "pin", "itd")}
    calls: dict[str, Callable[[Any], Any]] = {
        "add": lambda pipe: pipe.erasure_manager.add(made["over"], "over"),
        "set": lambda pipe: pipe.set_erasures(["low", "pin"], [0.5, 2.0]),
        "disable": lambda pipe: pipe.disable_erasures(),
        "delete": lambda pipe: pipe.delete_erasure(["delta", "itd"]),
        "unload": lambda pipe: pipe.unload_erasures(),
        "detect": lambda pipe: pipe.detect_concepts("a cat"),
    }

    def prepared(pipe: Any) -> Any:
        for kind in ("delta", "low", "pin", "itd"):
            pipe.erasure_manager.add(made[kind], kind)
        return pipe

    def alarm(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts what runs in the background with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGALRM, alarm)
    chance = random.Random(0)
    pipe = load(model)
    base = look(pipe)
    before = look(prepared(pipe))
    wanted, seconds = {}, {}
    for name, call in calls.items():
        for _ in range(2):
            clock = time.perf_counter()
            call(pipe)
            seconds[name] = time.perf_counter() - clock
            wanted[name] = look(pipe)
            pipe.unload_erasures()
            prepared(pipe)
    faults, count = [], 0
    for turn in range(rounds):
        name = list(calls)[turn % len(calls)]
        stopped, raised = False, ""
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, max(chance.random() * seconds[name], 1e-4))
                calls[name](pipe)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            stopped, count = True, count + 1
        except Exception as error:
            raised = f"raises {type(error).__name__}: {str(error)[:100]}"
        try:
            seen = look(pipe)
            half = [differing(seen, before), differing(seen, wanted[name])]
            fault = raised or (f"neither before {half[0]} nor after {half[1]}" if all(half) else "")
            pipe.unload_erasures()
            if left := differing(look(pipe), base):
                fault = fault or f"unload leaves {left}"
            prepared(pipe)
        except Exception as error:
            fault = f"then {type(error).__name__}: {str(error)[:100]}"
        if fault:
            faults.append(f"{name}{' (interrupted)' if stopped else ''}: {fault}")
            pipe = prepared(drop_in(load(model)))
    return {"faults": faults, "interrupted": count}


def overwrite(erasures: list[str], out: str) -> None:
    """Write one artifact, then others over it."""
    for folder in erasures:
        ready(folder).save(out, overwrite=True)


def save_pipeline(model: str, erasures: list[str], out: str, fuse: bool) -> None:
    """Write a pipeline with erasures."""
    pipe = copy.deepcopy(ready(model))
    for folder in erasures:
        pipe.erasure_manager.add(ready(folder), Path(folder).name)
    pipe.save_erased_pipeline(out, fuse=fuse)


def bar(die: bool) -> None:
    """Draw a progress bar, to its end or killed in the middle of it."""
    for _ in tqdm(range(3), mininterval=0):
        if die:
            tqdm.get_lock().acquire()
            kill()


def command(arguments: list[str]) -> None:
    """A command as a user gives it."""
    from erasure.cli.main import main

    code = main(arguments)
    if code:
        raise SystemExit(code)


def measure(model: str, made: str, out: str, cache: str) -> None:
    """An evaluation, image by image: a batch that is cut off by a kill does not round differently."""
    from erasure.eval import evaluate

    pipe = copy.deepcopy(ready(model))
    give_world(pipe, Path(out).parent / "world")
    pipe.erasure_manager.add(ready(made), "cat")
    evaluate(
        pipe, "canvas", "cat", size="smoke", out=out, judge=colour_judge, baseline_cache=cache, progress=False,
        batch_size=1,
    )  # fmt: skip


@functools.cache
def ready(folder: str) -> Any:
    """A pipeline or an erasure, read once by the process that forks."""
    return load(folder) if (Path(folder) / "model_index.json").is_file() else Erasure.load(folder)


JOBS: dict[str, Callable[..., Any]] = {
    "signals": signals, "overwrite": overwrite, "save_pipeline": save_pipeline, "command": command, "measure": measure,
    "bar": bar,
}  # fmt: skip


def serve() -> None:
    """Fork for each job that comes, say the child's id, and when it is gone, how it ended and after how many lines."""
    import erasure.cli.main
    import erasure.eval.report
    import erasure.strategies  # noqa: F401

    # Processes share the lock that tqdm makes: one that is killed while it draws a bar would stop all others.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    for line in sys.stdin:
        job = json.loads(line)
        at, log = job.pop("kill at line", None), job.pop("log")
        for folder in job.pop("ready", ()):
            ready(folder)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(output, 1)
                os.dup2(output, 2)
                faulthandler.dump_traceback_later(LIMIT, exit=True)
                if at is None:
                    run(job)
                else:
                    with Lines(at, kill) as found:
                        run(job)
                    print(f"\nlines {found.lines}", flush=True)
                code = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(job: dict[str, Any]) -> Any:
    """Do a job."""
    return JOBS[job.pop("job")](**job)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "serve":
        serve()
        sys.exit()
    print(json.dumps(run(json.loads(sys.argv[1]))))
