"""Measure a pipeline: one generation pass over a suite's samples feeds every metric, and a killed run resumes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from erasure.cache import cache_folder, model_fingerprint
from erasure.concept import Concept
from erasure.errors import ArtifactError, EvaluationError
from erasure.eval import suites
from erasure.eval.baseline import BaselineCache
from erasure.eval.controls import controlled
from erasure.eval.cost import evaluation_cost
from erasure.eval.generation import generate
from erasure.eval.metrics.clip_score import ClipModel
from erasure.eval.metrics.utility import utility_metrics
from erasure.eval.results import Results
from erasure.eval.rows import Record, Row
from erasure.eval.run import Progress, Run, Subject, join, opened
from erasure.eval.samples import Sample
from erasure.eval.schemas import ComparedRow, EvaluationRow
from erasure.eval.scoring import Judge, drift, score
from erasure.eval.table import BEFORE_AFTER, SampleTable
from erasure.images import png


def evaluate(
    pipe: DiffusionPipeline,
    suite: str = "canvas",
    concepts: Sequence[str | Concept] | str | Concept | None = None,
    *,
    size: str = "quick",
    seed: int = 0,
    out: str | Path | None = None,
    batch_size: int = 16,
    baseline_cache: str | Path | None = None,
    images: bool = True,
    progress: bool | Progress = True,
    judge: Judge | None = None,
    clip: str | Path | ClipModel | None = None,
    report: bool = True,
) -> Results:
    """Measure what the attached erasures do: the stock model before, the erased one after, on the same noise.

    Suites that compare ways to draw (`removal`, `composition`) do so with whatever is attached in force.

    Writes `results.json`, `samples.jsonl`, `features.jsonl`, `recipe.json`, `images/` and `report.html` to `out`. Run
    it again with the same arguments to resume. Under `accelerate launch` the samples are split over the processes.

    Args:
        pipe: A diffusers pipeline, with erasures attached. Without any, only the stock model is measured.
        suite: Name of a suite.
        concepts: What was erased: names or `Concept`s. Taken from the attached erasures when left out.
        size: `smoke`, `quick` or `full`.
        seed: Chooses samples (below full) and their noise.
        out: Folder for the results; a temporary one when left out.
        batch_size: Images per call of the pipeline. Does not change the noise of a sample.
        baseline_cache: Folder where the stock model's samples are kept for the next method; `$ERASURE_CACHE` or
            `~/.cache/erasure` by default.
        images: Keep images as PNG, for the report.
        progress: A progress bar, none, or a function that is told of progress.
        judge: Detector: a callable from images to answers with `.object` and `.style`. The suite's own by default.
        clip: Folder of an open_clip model for CLIP scores and features; the embedded one by default, when installed.
        report: Write `report.html`.

    Returns:
        The metrics of both variants.

    Raises:
        EvaluationError: Unknown suite, size or concept; an output folder that holds something else; fused erasures,
            which leave no stock model to compare with; a safety checker on the pipeline.
    """
    processes = join(out, seed)
    started = time.perf_counter()
    stock, attached = in_force(pipe)
    chosen = [concepts] if isinstance(concepts, (str, Concept)) else concepts
    if chosen is None:
        chosen = [concept for entry in attached for concept in entry["erasure"].concepts]
    kit = suites.get(suite)
    plan = kit.plan(pipe, chosen, size, seed)
    judge = kit.judge() if judge is None else judge
    scorer, clip_missing = _clip(clip)
    fingerprint = model_fingerprint(stock)
    subject = Subject.of(pipe, fingerprint, attached, judge, None if scorer is None else scorer.fingerprint)
    recipe = subject.recipe(plan)
    shared = {
        "sampler": subject.sampler, "judge": subject.judge_name, "clip": subject.clip, "versions": recipe["versions"],
    }  # fmt: skip
    cache = BaselineCache(Path(baseline_cache or cache_folder()), fingerprint, shared)
    variants = kit.variants if suites.is_comparing(kit) else BEFORE_AFTER

    schema = ComparedRow if suites.is_comparing(kit) else EvaluationRow

    def table(folder: Path) -> SampleTable:
        return SampleTable(folder, plan.samples, processes.rank, processes.count, variants, schema=schema)

    with opened(processes, table, recipe, out) as opened_table:
        run = _Evaluation(
            subject, plan, opened_table, processes, images, progress, kit, cache, scorer, batch_size, started=started
        )
        if suites.is_comparing(kit):
            for variant in variants:
                run.variant(variant, pipe)
        else:
            run.variant("before", stock)
            processes.wait()
            if attached:
                run.variant("after", pipe)
        rows = run.rows()
        if rows is None:
            return Results.load(run.table.folder)

        stamped = plan.recipe | subject.sampler | {"judge": subject.judge_name}
        plan = replace(plan, recipe=stamped)
        features = run.table.features
        if suites.is_comparing(kit):
            controls = kit.controls(stock, subject.judge, plan)
            metrics = controlled(kit.compare(plan, rows, features, scorer), controls, plan.recipe)
        else:
            metrics = kit.score(plan, rows) + utility_metrics(plan, rows, features, subject.clip, clip_missing)
        cost = evaluation_cost(rows, subject.erasures, time.perf_counter() - started)
        results = run.results(metrics, cost | {"batch_size": batch_size})
        if report:
            from erasure.eval.report import write_report

            write_report(run.table.folder)
        processes.wait()
    return results


def in_force(pipe: DiffusionPipeline) -> tuple[DiffusionPipeline, list[Record]]:
    """The stock model, as a pipeline beside the erased one, and the active erasures.

    Raises:
        EvaluationError: Some are fused, so that there is no stock model.
    """
    from erasure.attach import ErasureManager

    manager = ErasureManager(pipe)
    if manager.fused_erasures:
        raise EvaluationError(
            f"{', '.join(manager.fused_erasures)} is fused, which leaves no stock model to compare with: "
            "unfuse_erasure() before measuring"
        )
    entries = [
        {"name": name, "erasure": manager.erasures[name], "strength": manager.strengths[name]}
        for name in manager.active_erasures()
    ]
    return (manager.stock(offloaded=True) if entries else pipe), entries


def _clip(given: str | Path | ClipModel | None) -> tuple[ClipModel | None, str | None]:
    """The CLIP model, or why there is none. A folder that the user names must be there."""
    if isinstance(given, ClipModel):
        return given, None
    if given is not None:
        return ClipModel(given), None
    try:
        from erasure import assets

        return ClipModel(assets.path("canvas-clip")), None
    except ArtifactError as error:
        return None, f"no CLIP model: {error}"


@dataclass
class _Evaluation(Run):
    """One evaluation in this process."""

    kit: suites.Suite
    cache: BaselineCache
    clip: ClipModel | None
    batch_size: int

    def variant(self, variant: str, pipe: DiffusionPipeline) -> None:
        """Finish every sample of a variant that is not in the table yet and falls to this process."""
        pending = self.pending(variant)
        mine = self.share(pending)
        done = len(self.plan.samples) - len(pending)
        bar = tqdm(total=done + len(mine), initial=done, desc=variant, unit="image", disable=not self.shows_bar)
        with bar:
            if variant == "before":
                mine = self._from_cache(mine, bar)
            batches = generate(pipe, mine, self.batch_size)
            if suites.is_comparing(self.kit):
                batches = self.kit.draw(pipe, variant, mine, self.batch_size)
            while True:
                clock = time.perf_counter()
                try:
                    batch, images = next(batches)
                except StopIteration:
                    break
                self._finish(variant, batch, images, (time.perf_counter() - clock) / len(batch))
                bar.update(len(batch))
                self.tell(variant, variant)

    def _from_cache(self, samples: Sequence[Sample], bar: tqdm) -> list[Sample]:
        """Take what an earlier evaluation of the stock model left; returns the rest."""
        rest = []
        width = None if self.clip is None else self.clip.width
        for sample in samples:
            found = self.cache.get(sample, width)
            if found is None:
                rest.append(sample)
                continue
            scores, vector, image = found
            self.keep("before", sample, image)
            self.table.append([_row(sample, "before", scores, None, None)], [vector])
            bar.update()
            self.tell("before", "before")
        return rest

    def _finish(self, variant: str, batch: Sequence[Sample], images: Sequence[Image.Image], seconds: float) -> None:
        scores, features = score(batch, images, self.subject.judge, self.clip)
        rows = []
        for sample, image, scored, vector in zip(batch, images, scores, features, strict=True):
            self.keep(variant, sample, image)
            moved = None
            if suites.is_comparing(self.kit):
                scored["measured"] = self.kit.measure(sample, image)
            elif variant == "before":
                self.cache.put(sample, png(image), scored, vector)
            else:
                stock = self.cache.image(sample)
                if stock is None:
                    scored["failures"]["drift"] = "the stock model's image is gone from the baseline cache"
                else:
                    moved = drift(stock, image, self.table.features.get((sample.sample_id, "before")), vector)
            rows.append(_row(sample, variant, scored, moved, seconds))
        self.table.append(rows, features)


def _row(
    sample: Sample,
    variant: str,
    scores: Row,
    moved: dict[str, float | None] | None,
    seconds: float | None,
) -> Record:
    """A row of `samples.jsonl`; `seconds` of generating the image, `None` for one from the cache."""
    fixed = {"sample_id": sample.sample_id, "variant": variant, **sample.row()}
    return {**fixed, **scores, "drift": moved, "seconds": seconds}
