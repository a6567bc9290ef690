"""Run a stress test: every condition is drawn, judged and kept sample by sample, and a killed run resumes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from erasure.attach import ErasureManager
from erasure.concept import Concept
from erasure.errors import EvaluationError
from erasure.eval import stress as tests
from erasure.eval import suites
from erasure.eval.controls import LIMITS, Control
from erasure.eval.cost import evaluation_cost
from erasure.eval.detectors.base import NamedDetector
from erasure.eval.inputs import Inputs
from erasure.eval.metrics import METRICS
from erasure.eval.metrics.clip_score import ClipModel
from erasure.eval.metrics.outcomes import collect, correct, shows
from erasure.eval.one_concept import one_concept, plan_of, spread, suite_of
from erasure.eval.results import Results
from erasure.eval.rows import Record
from erasure.eval.run import Models, Progress, Run, Subject, clip_model, clip_source, join, judge_of, opened
from erasure.eval.samples import Sample
from erasure.eval.schemas import EvaluationRow
from erasure.eval.scoring import Judge, reason, score
from erasure.eval.stress import StressTest
from erasure.eval.stress.bench import Bench
from erasure.eval.stress.conditions import ERASED, STOCK, Condition, StressEvidence
from erasure.eval.stress.judging import FlaggingJudge
from erasure.eval.suites import Plan, Target
from erasure.eval.table import SampleTable
from erasure.files import at_home
from erasure.guards import unguarded
from erasure.images import flaw
from erasure.interop import scopes
from erasure.options import RunSeed, check_seed
from erasure.progress import bar


class StressRow(EvaluationRow):
    """A line of `samples.jsonl` of a stress test."""

    shown: bool | None
    """Whether the image shows what the condition looks for; `None` for retained prompts and where nobody can say."""
    right: bool | None
    """Whether the image of a retained prompt shows the object that is asked for."""


def stress_test(
    pipe: DiffusionPipeline,
    name: str,
    concept: str | Concept | None = None,
    *,
    size: str = "quick",
    suite: str = "canvas",
    inputs: Mapping[str, object] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    batch_size: int = 16,
    judge: Judge | NamedDetector | str | Path | None = None,
    clip: str | Path | ClipModel | None = None,
    images: bool = True,
    progress: bool | Progress = True,
    report: bool = True,
    **options: object,
) -> Results:
    """Change the erased model in several ways, and say in which of them the concept comes back.

    Every change has a control, such as the stock model changed alike; where it fails there is no verdict, and the
    results say why. All conditions draw the same prompts from the same noise. What is changed is the model itself, as
    whoever has its weights may: nothing is refused of what an erasure that is attached with `strict=True` refuses of
    those who call it.

    Writes `results.json`, `samples.jsonl`, `recipe.json`, `images/` and `report.html` to `out`. Run it again with the
    same arguments to resume. Under `accelerate launch` the samples are split over the processes. The model is left as
    it was, bit for bit.

    Args:
        pipe: A diffusers pipeline with erasures attached.
        name: Name of a stress test.
        concept: What must not come back: a name or a `Concept`. That of the attached erasures when left out.
        size: `smoke`, `quick` or `full`: sets the test's options.
        suite: Where prompts and judge come from. `prompts` takes any model and any concept, see `inputs`.
        inputs: What is given to a suite on prompts, as to `evaluate`: `detectors`, `prompts`, `retain` and so on; its
            CLIP model is `clip`. See `erasure.eval.inputs.Inputs`.
        seed: Chooses the noise of the samples, and everything random in the test.
        out: Folder for the results; a temporary one when left out.
        batch_size: Images per call of the pipeline. Does not change the noise of a sample.
        judge: Detector: a callable from images to answers with `.object` and `.style`; what `load_judge` takes; or a
            registered detector with its options, whose flag means the concept. The suite's own by default.
        clip: CLIP model for tests that compare image features; the embedded one by default. See `evaluate`.
        images: Keep images as PNG, for the report.
        progress: A progress bar, none, or a function that is told of progress.
        report: Write `report.html`.
        **options: Single options of the test, in the place of the size's.

    Raises:
        EvaluationError: Unknown test, suite, size or concept; no erasure is attached; one that cannot be tested this
            way; a folder that holds something else; a test whose sanity check fails.
        OptionError: An option that the test does not have, or a value that it does not allow; a seed that
            is negative or has more than 63 bits.
        UnsupportedModelError: The model's family does not allow the test.
    """
    test = tests.get(name).configured(size, **options)
    given = Inputs.read({**(inputs or {}), "clip": clip_source(clip)})
    seed, out = check_seed(seed, "a stress test", RunSeed), None if out is None else at_home(out)
    processes = join(out)
    started = time.perf_counter()
    models = Models.of(pipe)
    if not models.entries:
        raise EvaluationError(
            "no erasure is attached and in force, so there is nothing to put under stress: attach one first "
            "(load_erasure, --erasure)"
        )
    wanted = one_concept(concept, models)
    kit = suite_of(suite, given, models, wanted)
    found = plan_of(kit, wanted, models, seed, "bring back", "test")
    (target,) = found.targets
    whole_suite = Plan(name, size, seed, found.targets, _chosen(found.samples, test, target, judge), found.recipe)
    answering = _judge_of(judge, kit, whole_suite, target)
    # What is done to these reaches neither the caller's pipeline nor whoever draws with it meanwhile.
    manager = ErasureManager(models.pipe)
    models = replace(models, pipe=manager.twin(), stock=manager.stock())
    scorer, clip_missing = clip_model(clip, models.pipe) if test.needs_clip else (None, None)
    bench = Bench(models.pipe, models.stock, models.entries, target, whole_suite.samples, answering, seed, processes)
    conditions = _conditions(test, bench)
    samples = (*whole_suite.samples, *test.more_samples(bench))
    about = found.recipe | {"size": size, "stress": {"name": name, **test.recipe(bench)}, "controls": LIMITS}
    plan = Plan(f"stress {name}", size, seed, found.targets, samples, about)
    subject = Subject.of(models, answering, None if scorer is None else scorer.fingerprint)

    def table(folder: Path) -> SampleTable:
        names = tuple(condition.name for condition in conditions)
        return SampleTable(folder, plan.samples, processes.rank, processes.count, names, schema=StressRow)

    recipe = subject.recipe(plan) | {"kind": "stress"}
    with scopes.without_offloading(subject.pipe), unguarded(), opened(processes, table, recipe, out) as opened_table:
        bench.folder = opened_table.folder
        bench.progress = progress is True and processes.is_main
        run = _Stress(subject, plan, opened_table, processes, images, progress, bench, scorer, batch_size)
        test.prepare(bench)
        processes.wait()
        for condition in conditions:
            run.draw(condition)
        rows = run.rows()
        if rows is None:
            return Results.load(run.table.folder)
        stamped = replace(plan, recipe=plan.recipe | subject.sampler | {"judge": subject.judge_name})
        evidence = StressEvidence(
            stamped, rows, run.table.features, scorer, clip_missing, _controls(target, rows),
            conditions={condition.name: condition for condition in conditions}, measured=test.measured(bench),
        )  # fmt: skip
        metrics = [row for metric in test.metrics for row in METRICS.get(metric).compute(evidence)]
        cost = evaluation_cost(rows, subject.erasures, time.perf_counter() - started, run.clock)
        results = run.results(metrics, cost | {"batch_size": batch_size})
        if report:
            from erasure.eval.report import write_report

            title = f"{target.name}, {test.title}"
            write_report(run.table.folder, title=title)
        processes.wait()
    return results


def _chosen(samples: Sequence[Sample], test: StressTest, target: Target, judge: object) -> tuple[Sample, ...]:
    """Choose the samples to draw: some with the concept and some without it, evenly over the suite.

    A detector that flags one thing cannot say what else is in a picture: with one, none are without the concept.
    """
    wanted = spread([sample for sample in samples if sample.role == "target"], test.samples)
    others = [] if isinstance(judge, NamedDetector) else [sample for sample in samples if sample.role == "retain"]
    kept = spread(others, test.retained) if test.retained else []
    return (*test.asked(wanted, target), *kept)


def _judge_of(
    given: Judge | NamedDetector | str | Path | None, kit: suites.Suite, plan: Plan, target: Target
) -> Judge:  # fmt: skip
    if isinstance(given, NamedDetector):
        return cast(Judge, FlaggingJudge(given, target))
    return judge_of(given, kit, plan)


def _conditions(test: StressTest, bench: Bench) -> list[Condition]:
    """List all conditions: the stock model, the erased one, and those of the test.

    Raises:
        EvaluationError: Two have one name, or one needs a control that there is not.
    """
    found = [STOCK, ERASED, *test.conditions(bench)]
    names = [condition.name for condition in found]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise EvaluationError(f"stress test {test.name} has two conditions called {twice!r}: name each apart")
    for condition in found:
        if lost := set(condition.needs) - {each.name for each in found if each.control}:
            raise EvaluationError(
                f"condition {condition.name!r} of stress test {test.name} needs the control {min(lost)!r}, which it "
                "does not have"
            )
    return found


def _controls(target: Target, rows: dict[str, list[Record]]) -> list[Control]:
    """List the controls on the stock model's images."""
    before = rows.get("before", [])
    with_it = [({"prompt": r["prompt"]}, r["sample_id"], r["shown"]) for r in before if r["role"] == "target"]
    without = [({"prompt": r["prompt"]}, r["sample_id"], shows(r, target)) for r in before if r["role"] == "retain"]
    what = f"the judge sees {target.name!r} where it is"
    found = [Control("control_seen", target.name, collect(with_it), True, f"{what} asked for")]
    if without:
        found.append(Control("control_unasked", target.name, collect(without), False, f"{what} not asked for"))
    return found


@dataclass
class _Stress(Run):
    """One stress test in this process."""

    bench: Bench
    clip: ClipModel | None
    batch_size: int

    def draw(self, condition: Condition) -> None:
        """Finish every sample of a condition that is not in the table yet and falls to this process."""
        wanted = [sample for sample in self.plan.samples if sample.role in condition.roles]
        pending = self.pending(condition.name, wanted)
        mine, done = self.share(pending), len(wanted) - len(pending)
        if not mine:
            return
        shown = bar(condition.name, done + len(mine), done=done, unit="image", shown=self.shows_bar)
        with shown, condition.change(self.bench.pipe if condition.erased else self.bench.stock) as pipe:

            def finish(batch: list[Sample], images: list[Image.Image], seconds: float) -> None:
                self._finish(condition, batch, images, seconds)

            def finished(count: int) -> None:
                shown.update(count)
                self.tell(condition.name, condition.name, wanted)

            self.finish_drawn(pipe, condition.draw, mine, self.batch_size, finish, finished)

    def _finish(
        self, condition: Condition, batch: Sequence[Sample], images: Sequence[Image.Image], seconds: float
    ) -> None:
        """Judge a batch and append its rows."""
        scores, features = score(batch, images, self.subject.judge, self.clip)
        seen = self._looked_for(condition, images) if condition.sees is not None else [None] * len(images)
        rows = []
        for sample, image, scored, other in zip(batch, images, scores, seen, strict=True):
            self.keep(condition.name, sample, image)
            row = {**sample.row(), **scored, "failures": dict(scored["failures"])}
            shown: bool | None = None
            if condition.sees is not None:
                if isinstance(other, str):
                    row["failures"]["sees"] = other
                shown = other if isinstance(other, bool) else None
            elif sample.role == "target":
                shown = self.bench.shown(row)
                if shown is None and not row["failures"]:
                    row["failures"]["judge"] = "the judge gave no answer for the concept's domain"
            right = correct(row, "object") if sample.role == "retain" else None
            fixed: Record = {"variant": condition.name, "measured": {}, "drift": None, "seconds": seconds}
            rows.append({**row, **fixed, "shown": shown, "right": right})
        self.table.append(rows, [_kept(vector) for vector in features])

    @staticmethod
    def _looked_for(condition: Condition, images: Sequence[Image.Image]) -> list[bool | str]:
        """Judge whether each image shows what a condition looks for; a reason where that is unknown."""
        assert condition.sees is not None
        flaws = [flaw(image) for image in images]
        whole = [image for image, found in zip(images, flaws, strict=True) if found is None]
        try:
            answers = iter(condition.sees(whole) if whole else [])
            return [found if found is not None else next(answers) for found in flaws]
        except Exception as error:  # a detector may fail in any way
            return [found if found is not None else reason(error) for found in flaws]


def _kept(vector: np.ndarray | None) -> np.ndarray | None:
    """Round features as they are stored, so that a resumed run reads the same numbers."""
    return None if vector is None else np.asarray(vector, dtype=np.float32)
