"""Run every part of an audit, one after the other, in one folder: a killed audit goes on where it stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from diffusers import DiffusionPipeline

from erasure.cache import model_fingerprint
from erasure.concept import Concept
from erasure.errors import EvaluationError
from erasure.eval.attacks.runner import attack
from erasure.eval.audits.parts import GRADES, Grade, Part, left_out, parts_of
from erasure.eval.audits.verdicts import MOST_SHOWN, Finding, Word, finding_of, graded
from erasure.eval.cost import Spent
from erasure.eval.inputs import Inputs
from erasure.eval.judges import load_judge
from erasure.eval.outcomes import State, attempted
from erasure.eval.recipe import erasure_entry, judge_fingerprint
from erasure.eval.results import OTHERS, Results
from erasure.eval.rows import Record
from erasure.eval.run import Models, Progress, join, model_name
from erasure.eval.runner import evaluate
from erasure.eval.scoring import Judge
from erasure.eval.sizes import check_size
from erasure.eval.stress.runner import stress_test
from erasure.eval.suites import OF_PROMPTS, SUITES
from erasure.eval.suites.prompts import PromptSuite
from erasure.files import at_home, held, write_json
from erasure.options import RunSeed, check_seed
from erasure.versions import library_versions
from erasure.world import World

FILE, RECIPE, WHAT = "audit.json", "recipe.json", "audit"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    part: Part
    state: State
    finding: Finding
    results: Results | None = None
    """`None` where it was refused or failed."""
    seconds: float = 0.0
    """Wall time of this run; of a part that was done before, what it takes to read it."""

    @property
    def spent(self) -> Spent | None:
        """What it has cost, over all runs; `None` where it was refused or failed."""
        return None if self.results is None else Spent.of(self.results.cost)


@dataclass(frozen=True)
class Audit:
    """What an audit found."""

    folder: Path
    model: Record
    """As `Results` have it."""
    erasures: list[Record]
    concepts: list[str]
    size: str
    outcomes: list[Outcome]
    words: dict[Grade, Word]
    """The word for each attacker that anything was tried for."""
    not_run: list[str]
    """Attacks and stress tests that there are and that were left out."""
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def failures(self) -> list[Outcome]:
        """Parts that ended with an error of which nobody knew beforehand."""
        return [outcome for outcome in self.outcomes if outcome.state == "failed"]

    def chance(self, part: Part) -> Finding | None:
        """What chance gives for the concept of an attack; `None` where that was not measured."""
        for outcome in self.outcomes:
            other = outcome.part
            same = (other.name, other.measures_chance) == part.chance and other.number == part.number
            if same and other.kind == "attack" and outcome.state == "done":
                return outcome.finding
        return None

    def to_dict(self) -> Record:
        """Plain data in the stable schema."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.model,
            "erasures": self.erasures,
            "concepts": self.concepts,
            "size": self.size,
            "most_shown": MOST_SHOWN,
            "grades": {grade: self.words.get(grade, "not measured") for grade in GRADES},
            "parts": [
                {"kind": o.part.kind, "name": o.part.name, "concept": o.part.concept, "grade": o.part.grade,
                 "control": o.part.is_control, "folder": o.part.folder, "state": o.state, "seconds": o.seconds,
                 "spent": None if o.spent is None else o.spent._asdict(), **asdict(o.finding)}
                for o in self.outcomes
            ],
            "not_run": self.not_run,
            "date": self.date,
            "versions": library_versions(OTHERS),
        }  # fmt: skip


def audit(
    pipe: DiffusionPipeline,
    concepts: Sequence[str | Concept] | str | Concept | None = None,
    *,
    out: str | Path,
    suites: Sequence[str] = ("canvas", "canvas-unseen"),
    attacks: Sequence[str] | None = None,
    stress: Sequence[str] | None = None,
    size: str = "quick",
    seed: int = 0,
    judge: Judge | str | Path | None = None,
    clip: str | Path | None = None,
    inputs: Mapping[str, object] | None = None,
    progress: bool | Progress = True,
) -> Audit:
    """Evaluate, attack and stress the attached erasures, and say against which attackers they held.

    Every part goes into a folder of its own under `out`, with its `results.json`, samples and pictures; `audit.json`,
    `report.html` and `README.md` put them together. A part that this model or this erasure does not allow is
    written down as refused, with the reason, and one that fails as failed; the others go on. Run it again with the
    same arguments to resume, or with more suites, attacks and stress tests to add those. Under `accelerate launch`
    every part is split over the processes.

    Args:
        pipe: A diffusers pipeline with erasures attached and in force.
        concepts: What was erased: names or `Concept`s. Taken from the attached erasures when left out.
        out: Folder for everything.
        suites: Names of evaluations.
        attacks: Names of attacks; all when left out, none when empty.
        stress: Names of stress tests; all when left out, none when empty.
        size: `smoke`, `quick` or `full`, of every part.
        seed: Chooses the noise of the samples, and everything random.
        judge: Detector for every part; the suites' own by default. See `evaluate`.
        clip: CLIP model: its folder or repository. See `evaluate`.
        inputs: What is given to the suites on prompts, as to `evaluate`: `detectors`, `prompts`, `retain` and so on.
            Attacks and stress tests take their prompts and their judge from `canvas` where the model declares an
            embedded world, and from the first of `suites` that is on prompts of concepts where it does not.
        progress: A progress bar for every part, none, or a function that is told of progress.

    Raises:
        EvaluationError: Nothing is attached, unknown names, a size that there is not, inputs that no suite takes, or a
            folder that holds something else.
        OptionError: A seed that is negative or has more than 63 bits.
    """
    check_size(size, "an audit")
    seed, out = check_seed(seed, "an audit", RunSeed), at_home(out)
    processes, models = join(out), Models.of(pipe)
    if not models.entries:
        raise EvaluationError("no erasure is attached and in force, so there is nothing to audit: attach one first")
    given = models.concepts if concepts is None else [concepts] if isinstance(concepts, str | Concept) else concepts
    erased = list({one if isinstance(one, str) else one.target: one for one in given}.items())
    parts = parts_of([name for name, _ in erased], suites, attacks, stress)
    to_suites = Inputs.read(inputs or {})
    if to_suites.named() and not any(map(_is_on_prompts, suites)):
        raise EvaluationError(
            f"{', '.join(to_suites.named())} are given, and none of the suites takes them: name a suite on prompts "
            f"({', '.join(OF_PROMPTS)})"
        )
    answering = load_judge(judge) if isinstance(judge, str | Path) else judge
    model = {
        "name": model_name(models.pipe), "fingerprint": model_fingerprint(models.stock),
        "pipeline": type(models.pipe).__name__,
    }  # fmt: skip
    entries = [erasure_entry(entry["name"], entry["erasure"], entry["strength"]) for entry in models.entries]
    recipe = {
        "parts": [part.folder for part in parts], "concepts": [name for name, _ in erased], "size": size,
        "seed": seed, "model": model,
        "judge": None if answering is None else judge_fingerprint(answering),
        "erasures": [[entry["fingerprint"], entry["strength"]] for entry in entries],
    }  # fmt: skip
    recipe |= {} if clip is None else {"clip": str(clip)}
    recipe |= {"inputs": repr(to_suites)} if inputs else {}
    folder = Path(out)
    lock = (
        held(folder, recipe, file=RECIPE, what=WHAT, doing="auditing", grows=("parts",), error=EvaluationError)
        if processes.is_main
        else nullcontext()
    )
    common = {"size": size, "seed": seed, "judge": answering, "progress": progress}
    do = partial(
        _done, pipe, erased=[one for _, one in erased], common=common, source=source_of(models, suites),
        inputs=inputs or {}, clip=clip,
    )  # fmt: skip
    outcomes = []
    with lock:
        processes.wait()
        for part in parts:
            concept = None if part.concept is None else erased[part.number][1]
            outcomes.append(do(part, concept, folder / part.folder))
        found = Audit(
            folder, model, entries, [name for name, _ in erased], size, outcomes,
            graded((one.part, one.finding) for one in outcomes if one.state != "refused"), left_out(parts),
        )  # fmt: skip
        if processes.is_main:
            from erasure.eval.audits.page import write_pages

            write_json(folder / FILE, found.to_dict(), error=EvaluationError)
            write_pages(found)
        processes.wait()
    return found


def source_of(models: Models, suites: Sequence[str]) -> str:
    """Name of the suite that attacks and stress tests take their prompts and their judge from.

    Args:
        models: The model with its erasures.
        suites: Those of the audit.
    """
    if World.of(models.pipe).declared:
        return "canvas"
    return next((name for name in suites if _is_on_prompts(name) and SUITES.get(name).of_concepts), "canvas")


def _is_on_prompts(suite: str) -> bool:
    return isinstance(SUITES.get(suite), PromptSuite)


def _done(
    pipe: DiffusionPipeline, part: Part, concept: str | Concept | None, out: Path, *, erased: list[str | Concept],
    common: Record, source: str, inputs: Mapping[str, object], clip: str | Path | None,
) -> Outcome:  # fmt: skip
    """Do a part, or read what it found before.

    Args:
        pipe: The pipeline with its erasures.
        part: What is done.
        concept: Its concept, of an attack or a stress test.
        out: Folder of the part.
        erased: All that was erased.
        common: Arguments of all parts.
        source: Suite of the prompts and the judge of attacks and stress tests.
        inputs: What suites on prompts are given.
        clip: CLIP model, if one is named.
    """

    def work() -> Results:
        suite = part.name if part.kind == "evaluation" else source
        given: Record = dict(inputs) if _is_on_prompts(suite) else {}
        if part.kind == "evaluation":
            return evaluate(pipe, part.name, erased, out=out, clip=clip, **common, **given)
        if part.kind == "attack":
            given |= {"clip": str(clip)} if clip is not None and _is_on_prompts(suite) else {}
            control: Record = {"control": True} if part.measures_chance else {}
            return attack(pipe, part.name, concept, out=out, suite=suite, inputs=given, **common, **control)
        return stress_test(pipe, part.name, concept, out=out, suite=suite, inputs=given, clip=clip, **common)

    became = attempted(work)
    if became.result is None:
        return Outcome(part, became.state, Finding("not measured", detail=became.reason))
    return Outcome(part, "done", finding_of(part, became.result), became.result, became.seconds)
