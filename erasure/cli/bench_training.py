"""`erasure bench training`: trained strategies with trajectories kept, and with every state rolled out anew."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from erasure.cli.models import ModelOptions, canvas_facts, make_concepts, open_model
from erasure.cli.terminal import Terminal, UsageError, parse

if TYPE_CHECKING:
    from erasure.interop.protocols import Pipeline, Settings
    from erasure.strategies.trained import TrainedStrategy


@dataclass(kw_only=True)
class BenchTrainingOptions(ModelOptions):
    """Measure training: denoiser passes and time of an update, from a trajectory buffer and online, in one run."""

    model: str = "canvas-sd"
    """Repository of the Hugging Face Hub, folder, or embedded model (`canvas-sd`)."""
    concept: str = "cat"
    """What is erased."""
    strategies: tuple[str, ...] = ("esd", "advunlearn")
    """Which."""
    updates: int = 6
    """Updates that are timed in each mode; the buffer is made for a whole run."""
    rollout_steps: int = 50
    """Denoising steps of a trajectory, as in the papers."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(BenchTrainingOptions, "bench training", argv)
    terminal.json_only = options.json
    if options.updates < 1 or options.rollout_steps < 1:
        raise UsageError("--updates and --rollout-steps are at least 1")
    pipe = open_model(options)
    with terminal.progress(2 * len(options.strategies)) as progress:
        rows = []
        for name in options.strategies:
            found = {}
            for mode in ("buffer", "online"):
                progress.stage(f"{name}, {mode}")
                found[mode] = measure(pipe, name, mode, options)
                progress.advance()
            rows.append(compared(name, found["buffer"], found["online"]))
    if options.json:
        terminal.result({"model": options.model, "device": str(pipe.device), "strategies": rows})
        return
    lines = {
        "updates of a whole run": lambda row: str(row["updates"]),
        "passes per training state, buffer": lambda row: f"{row['passes_per_state']['buffer']:.1f}",
        "passes per training state, online": lambda row: f"{row['passes_per_state']['online']:.1f}",
        "seconds per update, buffer": lambda row: f"{row['seconds_per_update']['buffer']:.2f}",
        "seconds per update, online": lambda row: f"{row['seconds_per_update']['online']:.2f}",
        "seconds to fill the buffer": lambda row: f"{row['fill_seconds']:.1f}",
        "whole run with a buffer, passes": lambda row: f"{row['passes_ratio']:.1f}x fewer",
        "whole run with a buffer, time": lambda row: f"{row['speedup']:.1f}x faster",
    }
    title = f"{options.model} on {pipe.device}: trajectories of {options.rollout_steps} steps, kept or made anew"
    columns = ["", *(row["strategy"] for row in rows)]
    terminal.table(columns, [[what, *map(show, rows)] for what, show in lines.items()], title=title)


def measure(pipe: Pipeline, name: str, mode: str, options: BenchTrainingOptions) -> dict[str, float]:
    """Passes and seconds of filling and of an update."""
    import erasure
    from erasure.strategies import get

    strategy = cast("type[TrainedStrategy]", get(name))
    concepts = make_concepts((options.concept,), canvas_facts(options.model))
    settings: Settings = {"rollout_steps": options.rollout_steps, "states": mode, "steps": options.updates}
    if name == "advunlearn":
        settings["attack_from"] = 0.0  # every update is attacked, as four in five are
    with empty_cache():
        made = erasure.erase(pipe, concepts, name, attach=False, progress=False, **settings)
    cost, whole = made.config.cost, strategy.configured()
    states = whole.batch + whole.retain_batch
    return {
        "updates": whole.steps,
        "states": states,
        "fill_passes": cost["rollout_forwards"],
        "fill_seconds": cost["rollout_seconds"],
        "passes": (cost["denoiser_forwards"] - cost["rollout_forwards"]) / options.updates,
        "seconds": cost["update_seconds"] / options.updates,
    }


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """A cache of its own: trajectories of earlier trainings would cost nothing."""
    before = os.environ.get("ERASURE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ERASURE_CACHE"] = folder
        try:
            yield
        finally:
            os.environ.pop("ERASURE_CACHE")
            if before is not None:
                os.environ["ERASURE_CACHE"] = before


def compared(name: str, buffer: dict[str, float], online: dict[str, float]) -> Settings:
    """A whole run of the strategy's default length with a buffer, filling included, against one without."""
    updates = buffer["updates"]

    def whole(mode: dict[str, float], what: str) -> float:
        return mode[f"fill_{what}"] + updates * mode[what]

    return {
        "strategy": name,
        "updates": int(updates),
        "passes_per_state": {
            mode: whole(found, "passes") / (updates * found["states"])
            for mode, found in (("buffer", buffer), ("online", online))
        },
        "seconds_per_update": {"buffer": buffer["seconds"], "online": online["seconds"]},
        "fill_seconds": buffer["fill_seconds"],
        "passes_ratio": whole(online, "passes") / whole(buffer, "passes"),
        "speedup": whole(online, "seconds") / whole(buffer, "seconds"),
    }
