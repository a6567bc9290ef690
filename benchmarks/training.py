"""`python -m benchmarks training`: trained strategies with trajectories kept, and with every state rolled out anew."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from benchmarks import PROGRAM
from erasure.cli.arguments import UsageError, parse
from erasure.cli.models import ModelOptions, canvas_facts, make_concepts, open_model
from erasure.cli.terminal import Terminal
from erasure.errors import OptionError

if TYPE_CHECKING:
    from erasure.assets.build.measured import Row
    from erasure.interop.protocols import Pipeline, Settings
    from erasure.strategies.looped import LoopedStrategy

DATA = "training"
"""Name of the file of figures, without its ending."""
RELEASED = {
    "esd": (54_000, 1000),
    "advunlearn": (1_600_000, 6000),
    "concept_ablation": (53_000, 800),
    "doco": (162_000, 16_000),
    "co_erasing": (75_000, 2500),
    "mace": (950, 50),
    "spm": (216_000, 15_000),
    "sfd": (4_400_000, 200_000),
}
"""Passes of the denoiser over one sample in a whole run of the released recipes, images that they draw included, and
the states that their students learn from. Counted from their code, a backward pass as two: ESD and the first stage of
Co-Erasing roll every state out (1000 updates of one state), AdvUnlearn for 30 steps of an attack in each update, with
5 states that must survive; Concept Ablation draws 1000 images of 25 steps with guidance for 100 updates of 8, DoCo as
many for 1000 updates of 16 rows, behind 1000 of the discriminator alone; MACE draws 8 images of 50 steps with guidance
for 50 updates of one state; SPM rolls one state out in each of 3000 updates, for the concept and 4 anchors, and
computes both halves of guidance in every pass; SFD draws 8 images of the concept and
8 that must survive for each network's step in 12,500 updates, and computes both halves of guidance in all but the
generator's passes: 1 + 2 x 3 passes for a step of the fake-score network and (1 + 2 + 2) x 3 for one of the generator.
The one-step generator that it starts from is not counted."""


@dataclass(kw_only=True)
class BenchTrainingOptions(ModelOptions):
    """Measure training: denoiser passes and time of an update, with states kept and online, in one run."""

    model: str = "canvas-sd"
    """Repository of the Hugging Face Hub, folder, or embedded model (`canvas-sd`)."""
    concept: str = "cat"
    """What is erased."""
    anchor: str | None = None
    """What takes its place; as the model's world has it when left out."""
    strategies: tuple[str, ...] = tuple(RELEASED)
    """Which. `co_erasing` needs a model with an IP-Adapter, as `canvas-sd` has one. `sfd` has no trajectories to keep:
    it draws its states in one step in each update, and is measured once."""
    updates: int = 6
    """Updates that are timed in each mode; what is kept is made for a whole run."""
    rollout_steps: int | None = None
    """Denoising steps of a trajectory; those of each strategy when left out (papers: 25 to 50)."""
    into: Path | None = None
    """Folder of measured figures, `docs/measured` of a checkout, whose `training.json` gets the rows."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(BenchTrainingOptions, "training", argv, program=PROGRAM)
    terminal.json_only = options.json
    if options.updates < 1 or (options.rollout_steps is not None and options.rollout_steps < 1):
        raise UsageError("--updates and --rollout-steps are at least 1")
    pipe = open_model(options)
    modes = {name: modes_of(name) for name in options.strategies}
    with terminal.progress(sum(map(len, modes.values()))) as progress:
        rows = []
        for name in options.strategies:
            found = {}
            for mode in modes[name]:
                progress.stage(f"{name}, {mode}")
                found[mode] = measure(pipe, name, mode, options)
                progress.advance()
            rows.append(compared(name, found["kept"], found.get("online")))
            if options.into is not None:
                # After each, so that one that fails loses nothing of the others.
                terminal.say(write(rows[-1], options.into, options.model))
    if options.json:
        terminal.result({"model": options.model, "device": str(pipe.device), "strategies": rows})
        return
    lines = {
        "updates of a whole run": lambda row: str(row["updates"]),
        "passes per training state, states kept": lambda row: f"{row['passes_per_state']['kept']:.1f}",
        "passes per training state, online": lambda row: shown(row["passes_per_state"].get("online"), ".1f"),
        "passes per training state, released recipe": lambda row: released(row, "passes_per_state", ".1f"),
        "fewer than that, states kept": lambda row: released(row, "fewer_per_state", ".1f", "x"),
        "whole run, states kept": lambda row: f"{row['passes']['kept']:.0f} passes",
        "whole run, released recipe": lambda row: released(row, "passes", ".0f", " passes"),
        "seconds per update, states kept": lambda row: f"{row['seconds_per_update']['kept']:.2f}",
        "seconds per update, online": lambda row: shown(row["seconds_per_update"].get("online"), ".2f"),
        "seconds to make what is kept": lambda row: f"{row['fill_seconds']:.1f}",
        "whole run with states kept, passes": lambda row: shown(row.get("passes_ratio"), ".1f", "x fewer"),
        "whole run with states kept, time": lambda row: shown(row.get("speedup"), ".1f", "x faster"),
    }
    steps = "each strategy's" if options.rollout_steps is None else options.rollout_steps
    title = f"{options.model} on {pipe.device}: trajectories of {steps} steps, kept or made anew"
    columns = ["", *(row["strategy"] for row in rows)]
    terminal.table(columns, [[what, *map(show, rows)] for what, show in lines.items()], title=title)


def write(row: Settings, into: Path, model: str) -> str:
    """Put the figures of a strategy into the file of docs, and give a sentence that says so."""
    from erasure.assets.build.measured import rewrite

    return rewrite(into / f"{DATA}.json", [cells_of(row)], models=[model], seeds=[0])


def cells_of(row: Settings) -> Row:
    """The figures of a strategy that the table in docs has."""
    cells: Row = {
        "strategy": row["strategy"], "updates": row["updates"],
        **{f"per_state_{mode}": round(passes, 2) for mode, passes in row["passes_per_state"].items()},
        **{f"passes_{mode}": round(passes) for mode, passes in row["passes"].items()},
    }  # fmt: skip
    if "speedup" in row:
        cells |= {"fewer_than_online": round(row["passes_ratio"], 2), "faster_than_online": round(row["speedup"], 2)}
    if "released" in row:
        told = row["released"]
        cells |= {
            "per_state_released": round(told["passes_per_state"], 2), "passes_released": told["passes"],
            "fewer_than_released": round(told["fewer_per_state"], 2),
        }  # fmt: skip
    return cells


def modes_of(name: str) -> tuple[str, ...]:
    """List the ways in which a strategy can have its states; where it has but one, nothing can be made anew."""
    from erasure.strategies import get
    from erasure.strategies.trained import TrainedStrategy

    strategy = get(name)
    if not issubclass(strategy, TrainedStrategy):
        return ("kept",)
    try:
        strategy.configured(states="online")
    except OptionError:
        return ("kept",)
    return ("kept", "online")


def measure(pipe: Pipeline, name: str, mode: str, options: BenchTrainingOptions) -> dict[str, float]:
    """Passes and seconds of filling and of an update."""
    import erasure
    from erasure.strategies import get
    from erasure.strategies.trained import TrainedStrategy

    concepts = make_concepts((options.concept,), canvas_facts(options.model), anchor=options.anchor)
    whole = cast("type[LoopedStrategy]", get(name)).configured()
    settings: Settings = {"steps": options.updates}
    if isinstance(whole, TrainedStrategy):
        settings["states"] = whole.states if mode == "kept" else mode
        if options.rollout_steps is not None:
            settings["rollout_steps"] = options.rollout_steps
    if name == "sfd":
        settings["head_start"] = 0.0  # both networks learn in every update, as in four of five
    if name == "advunlearn":
        settings["attack_from"] = 0.0  # every update is attacked, as four in five are
    with empty_cache():
        made = erasure.erase(pipe, concepts, name, attach=False, progress=False, **settings)
    cost = made.config.cost
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


def compared(name: str, kept: dict[str, float], online: dict[str, float] | None) -> Settings:
    """A whole run of the strategy's default length with states kept, making them included, against one without.

    Args:
        name: Name of the strategy.
        kept: What `measure` gave for states that are kept.
        online: The same for states that are made anew; `None` for a strategy without trajectories.
    """
    updates = kept["updates"]

    def whole(mode: dict[str, float], what: str) -> float:
        return mode[f"fill_{what}"] + updates * mode[what]

    modes = {"kept": kept} if online is None else {"kept": kept, "online": online}
    per_state = {mode: whole(found, "passes") / (updates * found["states"]) for mode, found in modes.items()}
    row: Settings = {
        "strategy": name,
        "updates": int(updates),
        "passes_per_state": per_state,
        "passes": {mode: whole(found, "passes") for mode, found in modes.items()},
        "seconds_per_update": {mode: found["seconds"] for mode, found in modes.items()},
        "fill_seconds": kept["fill_seconds"],
    }
    if online is not None:
        row["passes_ratio"] = whole(online, "passes") / whole(kept, "passes")
        row["speedup"] = whole(online, "seconds") / whole(kept, "seconds")
    if name in RELEASED:
        passes, states = RELEASED[name]
        per = passes / states
        row["released"] = {"passes": passes, "passes_per_state": per, "fewer_per_state": per / per_state["kept"]}
    return row


def released(row: Settings, what: str, form: str, unit: str = "") -> str:
    """A figure of the released recipe; a dash for a strategy without one."""
    return shown(row.get("released", {}).get(what), form, unit)


def shown(value: float | None, form: str, unit: str = "") -> str:
    """A figure for people; a dash where there is none."""
    return "-" if value is None else f"{value:{form}}{unit}"
