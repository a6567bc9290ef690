"""Make and measure every cell of a sweep: a killed sweep goes on, and several processes share the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusers import DiffusionPipeline

from erasure.artifact import CONFIG_FILE, Erasure
from erasure.attach import ErasureManager
from erasure.errors import EvaluationError
from erasure.eval.attacks.runner import attack
from erasure.eval.judges import load_judge
from erasure.eval.outcomes import State, attempted
from erasure.eval.processes import Processes
from erasure.eval.results import Results
from erasure.eval.rows import Record
from erasure.eval.runner import evaluate
from erasure.eval.schemas import CellFile
from erasure.eval.scoring import Judge
from erasure.eval.stress.runner import stress_test
from erasure.eval.sweeps.plan import Cell, Measure, SweepPlan
from erasure.files import at_home, has_recipe, held, read_json, write_json
from erasure.training.run import Run
from erasure.world import World

FILE, RECIPE, CELL, ERASURE, TRAINING = "sweep.json", "recipe.json", "cell.json", "erasure", "training"
WHAT = "sweep"
CellState = Literal["done", "refused", "failed", "open", "elsewhere"]
"""`open`: not made, or not to its end; `elsewhere`: another process is at it."""


class _BusyError(EvaluationError):
    """Another process is at a cell."""


@dataclass(frozen=True)
class PartOutcome:
    """What became of an erasure, or of one measurement of it."""

    what: str
    """`erasure`, or the folder of the measurement."""
    state: State
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class CellOutcome:
    """What became of a cell."""

    cell: Cell
    parts: tuple[PartOutcome, ...]
    elsewhere: bool = False

    @property
    def state(self) -> CellState:
        """The worst of its parts."""
        if self.elsewhere:
            return "elsewhere"
        found = {part.state for part in self.parts}
        return next((state for state in ("failed", "refused", "done") if state in found), "open")  # type: ignore[return-value]

    @property
    def reasons(self) -> list[str]:
        """Why parts were refused or failed."""
        return [f"{part.what} {part.state}: {part.reason}" for part in self.parts if part.state != "done"]

    def to_dict(self) -> Record:
        """Plain data."""
        return {**self.cell.recipe, "folder": self.cell.folder.as_posix(), "state": self.state,
                "parts": [vars(part) for part in self.parts]}  # fmt: skip


def sweep(
    plan: SweepPlan | str | Path,
    *,
    out: str | Path,
    share: tuple[int, int] = (1, 1),
    load: Callable[[str], DiffusionPipeline] | None = None,
    tell: Callable[[CellOutcome, int, int], None] | None = None,
    progress: bool = False,
) -> list[CellOutcome]:
    """Make every erasure of a sweep, and measure each; what is done already is left as it is.

    Every cell has a folder: `erasure`, one folder for each evaluation, attack and stress test, and `cell.json`. What a
    model or a method does not allow is written down as refused, and what fails as failed; both are tried again when
    the sweep is run again. Processes that work in one folder never do one cell twice.

    Args:
        plan: The sweep, or its file.
        out: Folder for everything.
        share: `(i, n)` does the i-th of n shares, from 1 on, which together are all cells.
        load: Opens a model; `erasure.load_pipeline` by default.
        tell: Called after each cell with what became of it, how many are ended, and how many there are.
        progress: Show a bar for each measurement.

    Raises:
        EvaluationError: The folder holds another sweep or something else, or cannot be written; or this is one of
            several processes of accelerate.
    """
    if Processes().count > 1:
        raise EvaluationError(
            "a sweep is not split by accelerate: start it once on each machine or GPU, with a share of its own "
            "(--share 1/4, share=(1, 4))"
        )
    plan = plan if isinstance(plan, SweepPlan) else SweepPlan.read(plan)
    folder = at_home(out)
    cells = plan.share(*share)
    with held(folder, plan.recipe, file=RECIPE, what=WHAT, wait=True, error=EvaluationError):
        pass  # the folder is this sweep's from now on, for all processes
    answering = None if plan.judge is None else load_judge(plan.judge)
    opened = _Models(load)
    outcomes = []
    for cell in cells:
        outcome = outcome_of(plan, folder, cell)
        if outcome.state != "done":
            outcome = _ended(plan, folder, cell, opened, answering, progress)
        outcomes.append(outcome)
        if tell is not None:
            tell(outcome, len(outcomes), len(cells))
    return outcomes


def outcome_of(plan: SweepPlan, folder: Path, cell: Cell) -> CellOutcome:
    """What became of a cell, from its `cell.json`; no parts where it was not made to its end.

    Raises:
        EvaluationError: The file is damaged.
    """
    path = folder / cell.folder / CELL
    if not path.is_file():
        return CellOutcome(cell, ())
    data: CellFile = read_json(path, CellFile, error=EvaluationError)
    return CellOutcome(cell, tuple(PartOutcome(**part) for part in data["parts"]))


def check_folder(plan: SweepPlan, folder: str | Path) -> None:
    """Refuse a folder that holds another sweep, whose results would pass for this one's.

    Raises:
        EvaluationError: It does, or its recipe is damaged.
    """
    has_recipe(folder, plan.recipe, file=RECIPE, what=WHAT, error=EvaluationError)


def outcomes_of(plan: SweepPlan, folder: str | Path, share: tuple[int, int] = (1, 1)) -> list[CellOutcome]:
    """What has become of the cells of a share so far; nothing is made.

    Args:
        plan: The sweep.
        folder: Where `sweep` leaves its results.
        share: See `sweep`.

    Raises:
        EvaluationError: The folder holds another sweep, or a file is damaged.
    """
    check_folder(plan, folder)
    return [outcome_of(plan, Path(folder), cell) for cell in plan.share(*share)]


class _Models:
    """Opens a model when it is needed first, and keeps one at a time."""

    def __init__(self, load: Callable[[str], DiffusionPipeline] | None) -> None:
        self.load, self.name = load, ""
        self.pipe: DiffusionPipeline | None = None

    def __call__(self, name: str) -> DiffusionPipeline:
        if self.pipe is None or self.name != name:
            import erasure

            self.pipe = None  # the last one's memory is free for the next
            opened = (self.load or erasure.load_pipeline)(name)
            opened.set_progress_bar_config(disable=True)
            self.pipe, self.name = opened, name
        return self.pipe


def _ended(
    plan: SweepPlan, folder: Path, cell: Cell, opened: _Models, judge: Judge | None, progress: bool
) -> CellOutcome:  # fmt: skip
    """Do what is left of a cell, unless another process is at it."""
    own = folder / cell.folder
    common = {key: plan.recipe[key] for key in ("measures", "judge", "images")}
    try:
        with held(own, {**cell.recipe, **common}, file=RECIPE, what="cell", error=EvaluationError, busy=_BusyError):
            known = outcome_of(plan, folder, cell)
            if known.state == "done":  # another process has done it meanwhile
                return known
            outcome = CellOutcome(cell, tuple(_parts(plan, own, cell, opened, judge, progress)))
            write_json(own / CELL, outcome.to_dict(), error=EvaluationError)
            return outcome
    except _BusyError:
        return CellOutcome(cell, (), elsewhere=True)


def _parts(
    plan: SweepPlan, folder: Path, cell: Cell, opened: _Models, judge: Judge | None, progress: bool
) -> Sequence[PartOutcome]:  # fmt: skip
    made = attempted(lambda: _erased(folder, cell, opened))
    parts = [PartOutcome(ERASURE, made.state, made.reason, made.seconds)]
    if made.result is None:
        return parts
    manager = ErasureManager(opened(cell.model))
    try:
        # Read from the disk in any case, so that a sweep that went on measures the same bits.
        attached = attempted(lambda: manager.load(folder / ERASURE, made.result))
        if attached.result is None:
            return [PartOutcome(ERASURE, attached.state, attached.reason, made.seconds)]
        for measure in plan.measures:
            became = attempted(lambda one=measure: _measured(plan, folder, cell, one, opened, judge, progress))  # type: ignore[misc]
            parts.append(PartOutcome(measure.folder, became.state, became.reason, became.seconds))
    finally:
        manager.unload()
    return parts


def _erased(folder: Path, cell: Cell, opened: _Models) -> str:
    """Make the erasure of a cell if it is not there, and give its name."""
    import erasure
    from erasure.strategies import get
    from erasure.strategies.looped import LoopedStrategy

    path = folder / ERASURE
    method = cell.method
    run = Run(checkpoints=folder / TRAINING) if issubclass(get(method.strategy), LoopedStrategy) else None
    if (path / CONFIG_FILE).is_file():
        if run is not None:
            run.discard()
        return Erasure.load(path).name
    pipe = opened(cell.model)
    concepts = World.of(pipe).concepts(cell.concept, tell=False)  # the plan has told it
    made = erasure.erase(
        pipe, concepts, method.strategy, preset=method.preset, seed=cell.seed, attach=False,
        progress=False, run=run, **method.options,
    )  # fmt: skip
    made.save(path, overwrite=True)
    if run is not None:
        run.discard()
    return made.name


def _measured(
    plan: SweepPlan, folder: Path, cell: Cell, measure: Measure, opened: _Models, judge: Judge | None, progress: bool
) -> Results:  # fmt: skip
    pipe, common = opened(cell.model), {"size": measure.size, "seed": cell.seed, "judge": judge, "progress": progress}
    common |= {"out": folder / measure.folder, "images": plan.images, **measure.options}
    if measure.kind == "evaluation":
        return evaluate(pipe, measure.name, report=plan.images, **common)  # type: ignore[arg-type]
    if measure.kind == "attack":
        return attack(pipe, measure.name, **common)  # type: ignore[arg-type]
    return stress_test(pipe, measure.name, report=plan.images, **common)  # type: ignore[arg-type]
