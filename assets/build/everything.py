"""Make every figure of README and docs anew, step by step, in any number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from erasure import files
from erasure.assets.build.sweep import erasure_of

TIMED = ("itd", "attention", "training")
"""Benchmarks of a checkout that are run besides `erasure bench`, which times an image of each strategy."""
AUDITED = {"canvas-sd": ("uce", "hirm", "itd", "esd", "advunlearn"), "canvas-flux": ("uce", "esd")}
"""Strategies by model whose erasures of a dog are audited."""

SHARES = 4
"""Processes among which the step `methods` is split."""


class Step(NamedTuple):
    """One command, whose output is kept."""

    name: str
    arguments: tuple[str, ...]
    """Arguments of `python -m`."""


def steps(out: Path, into: Path | None = None) -> list[list[Step]]:
    """List the commands in groups: those of one group may run at once, and come after those of the groups before.

    The benchmarks of a checkout are found where the commands run in its folder.

    Args:
        out: Folder of all results.
        into: Folder of figures that steps write theirs into; none do when `None`.
    """
    given = () if into is None else ("--into", str(into))

    def build(name: str, *arguments: str, step: str = "") -> Step:
        return Step(name, ("erasure.assets.build", step or name, *arguments))

    def share(number: int) -> Step:
        asked = ("--out", str(out / "methods"), "--share", str(number), str(SHARES))
        return build(f"methods-{number}", *asked, step="methods")

    def suite(name: str) -> Step:
        return build(name, name, "--out", str(out / name), *given, step="suite")

    def requests(strategy: str, *arguments: str, name: str = "") -> Step:
        asked = ("--strategy", strategy, "--size", "quick", "--out", str(out / "requests"), *arguments)
        return build(f"requests-{name or strategy}", *asked, *given, step="requests")

    def doors(model: str) -> Step:
        return build(f"evaluate-{model}", "--model", model, *given, step="evaluate")

    def audit(model: str, strategy: str) -> Step:
        made = out / "methods" if model == "canvas-sd" else out / "across"
        erased = erasure_of(made, strategy, "dog", model)
        stress = ("quantise", "merge", "noise", "relearn", "restore")
        less = () if model == "canvas-sd" else ("--suites", "canvas", "--stress", *stress)
        asked = (
            "--model", model, "--erasure", str(erased), "--size", "quick", "--out", str(audits / model / strategy),
        )  # fmt: skip
        return Step(f"audit-{model}-{strategy}", ("erasure", "audit", *asked, "--no-record", *less))

    several = ("--out", str(out / "several"), "--count")
    audits, audited = out / "audits", [(model, strategy) for model, names in AUDITED.items() for strategy in names]
    # Steps of one group write into files of their own, so those of requests and of ways in are in several groups.
    return [
        [build("evaluate", *given), build("words", "--picture", str(out / "words.png"))],
        [
            suite("composition"),
            build("several-5", *several, "5", "--draws", "20", *given, step="several"),
            *map(share, range(1, SHARES + 1)),
            build("across", "--out", str(out / "across"), *given),
            requests("uce"),
            doors("canvas-sdxl"),
            build("gates", *given),
            build("gates-untold", "--no-told", step="gates"),
            build("controls", *given),
            build("localiser"),
            build("layouts"),
            suite("removal"),
        ],
        [
            build("methods", "--out", str(out / "methods"), *given),
            build("several-14", *several, "14", "--draws", "1", *given, step="several"),
            build("attacks", "--out", str(out / "attacks"), "--made", str(out / "methods"), *given),
            build("ways", "--made", str(out / "methods"), *given),
            requests("uce", "--retain", name="uce-retain"),
            doors("canvas-sd3"),
            *(audit(*each) for each in audited),
        ],
        [
            build("audited", "--folders", *(str(audits / model / strategy) for model, strategy in audited), *given),
            requests("hirm", "--count", "15", "--measured", "1", "5", "10", "15"),
            doors("canvas-flux"),
        ],
        [requests("itd"), build("learning", "--out", str(out / "learning"), *given)],
        # Each in a group of its own, because nothing else may run beside what is timed.
        [Step("bench", ("erasure", "bench"))],
        *([Step(f"bench-{name}", ("benchmarks", name, *(given if name == "training" else ())))] for name in TIMED),
    ]


def run(out: Path, processes: int, only: Sequence[str] = (), into: Path | None = None) -> dict[str, float]:
    """Run what has not been run yet, and give the hours of every step.

    What a step prints is `out / NAME.md`; its hours are in `out / hours.json`. A step that fails leaves its messages
    in `out / NAME.log`, and the others of its group go on.

    Args:
        out: Folder of all results. A run goes on where it was stopped.
        processes: Steps at once, each on one thread.
        only: Names of the steps to run; all when empty.
        into: Folder of figures that steps write theirs into. Steps that were run already do not write them again.

    Raises:
        SystemExit: A step failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    hours = json.loads((out / "hours.json").read_text()) if (out / "hours.json").is_file() else {}
    failed = []
    for group in steps(out, into):
        due = [s for s in group if not (out / f"{s.name}.md").is_file() and (not only or s.name in only)]
        with ThreadPoolExecutor(processes) as pool:
            running = {pool.submit(_output, step, out / f"{step.name}.log"): step.name for step in due}
            for done in as_completed(running):
                name, (printed, seconds) = running[done], done.result()
                # A step that goes on with an earlier one's results has cost what both took.
                hours[name] = round(hours.get(name, 0.0) + seconds / 3600, 3)
                files.write_json(out / "hours.json", hours)
                if printed is None:
                    failed.append(name)
                else:
                    files.write_text(out / f"{name}.md", printed)
        if failed:
            raise SystemExit(f"failed: {', '.join(failed)}; see their .log files in {out}")
    return hours


def _output(step: Step, log: Path) -> tuple[str | None, float]:
    """Run a step, and give what it prints (`None` when it fails) and its seconds."""
    started = time.monotonic()
    with log.open("w") as messages:
        done = subprocess.run(
            [sys.executable, "-m", *step.arguments], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=messages, text=True,
        )  # fmt: skip
    return (None if done.returncode else done.stdout), time.monotonic() - started
