"""`erasure bench`: what an erasure costs on this machine, against the stock pipeline in the same run."""

from __future__ import annotations

import contextlib
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from erasure.cli.arguments import UsageError, parse
from erasure.cli.generate import call_settings
from erasure.cli.models import (
    ErasedModelOptions,
    canvas_facts,
    check_strengths,
    load_erasures,
    make_concepts,
    open_model,
)
from erasure.cli.terminal import Terminal
from erasure.concept import Concept

if TYPE_CHECKING:
    from erasure.artifact import Erasure
    from erasure.interop.protocols import Pipeline, Settings

PROMPT = "a photo of a dog"
STAGES = ("stock", "attached", "fused")


@dataclass(kw_only=True)
class BenchOptions(ErasedModelOptions):
    """Measure the overhead of an erasure: images attached and fused, memory, attaching, making."""

    model: str = "canvas-sd"
    """Repository of the Hugging Face Hub, folder, or embedded model (`canvas-sd`)."""
    concept: str = "cat"
    """Concept to erase when no --erasure is given: one erasure is made with each strategy that takes seconds."""
    repeats: int = 7
    """Rounds of stock, attached and fused in turn; medians are reported."""
    steps: int | None = None
    """Denoising steps of an image; the model's own number when left out."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(BenchOptions, "bench", argv)
    terminal.json_only = options.json
    if options.repeats < 1:
        raise UsageError(f"--repeats is {options.repeats}, allowed: a whole number, 1 or more")
    check_strengths(options)
    erasures = load_erasures(options)
    pipe = open_model(options)
    strengths = dict(zip(erasures, options.strength, strict=False))
    if not erasures:
        erasures = make_each(pipe, options, terminal)
    settings = call_settings(options.model, options.steps)
    rows = []
    with terminal.progress(len(erasures) * (options.repeats + 1)) as progress:
        for name, made in erasures.items():
            progress.stage(name)
            rows.append(
                measure(pipe, name, made, strengths.get(name, 1.0), settings, options.repeats, progress.advance)
            )
    if options.json:
        terminal.result({"model": options.model, "device": str(pipe.device), **settings, "erasures": rows})
        return
    title = f"{options.model} on {pipe.device}: ratios to the stock pipeline, medians of {options.repeats} rounds"
    lines = {
        "stock, seconds per image": lambda row: f"{row['seconds_per_image']['stock']:.3f}",
        "attached, time": lambda row: f"{row['time_ratio']['attached']:.3f}x",
        "fused, time": lambda row: f"{row['time_ratio']['fused']:.3f}x",
        "attached, peak memory": lambda row: ratio(row["memory_ratio"], "attached"),
        "fused, peak memory": lambda row: ratio(row["memory_ratio"], "fused"),
        "attaching, ms": lambda row: f"{1e3 * row['attach_seconds']:.1f}",
        "detaching, ms": lambda row: f"{1e3 * row['detach_seconds']:.1f}",
        "making it, s": lambda row: "-" if row["erase_seconds"] is None else f"{row['erase_seconds']:.1f}",
        "size, MB": lambda row: f"{row['bytes'] / 1e6:.2f}",
    }
    columns = ["", *(row["name"] for row in rows)]
    terminal.table(columns, [[what, *map(show, rows)] for what, show in lines.items()], title=title)


def make_each(pipe: Pipeline, options: BenchOptions, terminal: Terminal) -> Settings:
    """One erasure with every strategy that does not train on trajectories."""
    import erasure
    from erasure.strategies import available
    from erasure.strategies.trained import TrainedStrategy

    concepts: list[str | Concept] = [*make_concepts((options.concept,), canvas_facts(options.model))]
    return {
        made.name: made
        for name, strategy in available().items()
        if not issubclass(strategy, TrainedStrategy)
        for made in [erasure.erase(pipe, concepts, strategy=name, attach=False, progress=terminal.speaks)]
    }


def measure(
    pipe: Pipeline,
    name: str,
    made: Erasure,
    strength: float,
    settings: Settings,
    repeats: int,
    advance: Callable[[], None],
) -> Settings:
    """Time one erasure on one pipeline: each round draws an image stock, attached and fused, one after the other.

    Ratios are taken within a round, then the median over rounds, so that a slow spell of the machine hits all alike.
    """
    from erasure.attach import ErasureManager

    manager = ErasureManager(pipe)
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    memory: dict[str, list[float]] = {stage: [] for stage in STAGES}
    attach: list[float] = []
    detach: list[float] = []
    draw(pipe, settings)
    advance()
    for _ in range(repeats):
        for stage in STAGES:
            if stage == "attached":
                attach.append(timed(pipe, lambda: manager.add(made, name, strength)))
            elif stage == "fused":
                manager.fuse([name])
            with peak_memory(pipe, memory[stage]):
                seconds[stage].append(timed(pipe, lambda: draw(pipe, settings)))
        manager.unfuse([name])
        detach.append(timed(pipe, lambda: manager.delete(name)))
        advance()
    return {
        "name": name,
        "strategy": made.config.strategy,
        "seconds_per_image": {stage: statistics.median(seconds[stage]) for stage in STAGES},
        "time_ratio": {stage: median_ratio(seconds[stage], seconds["stock"]) for stage in STAGES[1:]},
        "peak_memory_mb": {stage: statistics.median(memory[stage]) for stage in STAGES} if memory["stock"] else None,
        "memory_ratio": {s: median_ratio(memory[s], memory["stock"]) for s in STAGES[1:]} if memory["stock"] else None,
        "attach_seconds": statistics.median(attach),
        "detach_seconds": statistics.median(detach),
        "erase_seconds": made.config.cost.get("seconds"),
        "bytes": made.size_bytes,
    }


def draw(pipe: Pipeline, settings: Settings) -> None:
    """One image, the same each time."""
    import torch

    pipe(PROMPT, generator=torch.Generator("cpu").manual_seed(0), **settings)


def timed(pipe: Pipeline, action: Callable[[], object]) -> float:
    """Wall-clock seconds of an action, until the device has done it."""
    synchronise(pipe)
    start = time.perf_counter()
    action()
    synchronise(pipe)
    return time.perf_counter() - start


def synchronise(pipe: Pipeline) -> None:
    """Wait for the device."""
    import torch

    if pipe.device.type == "cuda":
        torch.cuda.synchronize(pipe.device)


@contextlib.contextmanager
def peak_memory(pipe: Pipeline, into: list[float]) -> Iterator[None]:
    """Append the peak memory inside the block in MB: of the device, or of the process where Linux tells it."""
    import torch

    gc.collect()
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.device)
        yield
        into.append(torch.cuda.max_memory_allocated(pipe.device) / 1e6)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        yield
        return
    yield
    if (peak := process_mb("VmHWM")) is not None:
        into.append(peak)


def process_mb(field: str) -> float | None:
    """Memory of this process in MB as Linux tells it: `VmRSS` now, `VmHWM` the peak."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 / 1e6 if found else None


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median of the ratios within each round."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def ratio(ratios: dict[str, float] | None, stage: str) -> str:
    """A ratio for people; `-` where it cannot be measured."""
    return "-" if ratios is None else f"{ratios[stage]:.3f}x"
