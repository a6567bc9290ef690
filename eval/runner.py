"""Measure a pipeline: one generation pass over a suite's samples feeds every metric, and a killed run resumes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from erasure import __version__
from erasure.cache import cache_folder
from erasure.concept import Concept
from erasure.errors import ErasureError, EvaluationError
from erasure.eval import suites
from erasure.eval.controls import flag_control, withheld
from erasure.eval.cost import evaluation_cost
from erasure.eval.detections import TestedDetector
from erasure.eval.detectors.base import NamedDetector
from erasure.eval.drawings import DrawingCache, prompt_key, whole_key
from erasure.eval.evidence import Evidence
from erasure.eval.inputs import Inputs
from erasure.eval.metrics import METRICS
from erasure.eval.metrics.clip_score import ClipModel
from erasure.eval.metrics.outcomes import adjust
from erasure.eval.recipe import is_identified
from erasure.eval.results import Results
from erasure.eval.rows import Record, Row
from erasure.eval.run import Models, Progress, Run, Subject, clip_model, clip_source, join, judge_of, opened
from erasure.eval.samples import Sample
from erasure.eval.schemas import EvaluationRow
from erasure.eval.scoring import Judge, drift, reason, score
from erasure.eval.table import SampleTable, image_path
from erasure.eval.variants import Variant
from erasure.files import at_home
from erasure.images import png, read_rgb
from erasure.options import RunSeed, check_seed
from erasure.progress import Bar, bar

CAPTION = "control_caption"
"""Control of the CLIP model, of suites whose numbers come from it alone."""


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
    judge: Judge | str | Path | None = None,
    clip: str | Path | ClipModel | None = None,
    report: bool = True,
    controls: str | Path | None = None,
    beside: bool | None = None,
    reveal: bool = False,
    **inputs: object,
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
        baseline_cache: Folder where drawn images are kept, so that the next method finds those of the stock model, and
            the next judge or CLIP model all of them; `$ERASURE_CACHE` or `~/.cache/erasure` by default. It may be
            deleted at any time.
        images: Keep images as PNG, for the report and for the next judge. Without, only those of the stock model are
            kept in the cache.
        progress: A progress bar, none, or a function that is told of progress.
        judge: Detector: a callable from images to answers with `.object` and `.style`; or what `load_judge` takes. The
            suite's own by default. What it says is kept in the cache when it tells what it is, by `version`,
            `fingerprint` or the `folder` of its weights, or is a network.
        clip: CLIP model for CLIP scores and features, in the layout of open_clip or transformers: its folder or
            repository of the Hub, or one that is loaded; "none" for none. The embedded one by default, when installed.
        report: Write `report.html`.
        controls: Folder of pictures of your own, in `positive/` those that show what the detectors look for, in
            `negative/` others: sensitivity and specificity of each detector are measured on them.
        beside: Detect, score and write in a thread of its own while the next batch is drawn; the numbers are the same.
            Left out, where the pipeline does not run on the processor, which would only take turns between the two.
        reveal: Write `revealed.html` besides, with the pictures that the report hides because they may be unsafe.
        **inputs: What is given to the suite: `detectors` look at every image besides, and are texts such as
            "nudenet:preset=mace" or detectors that are made; `prompts`, `preset` and so on are for suites on prompts.
            See `erasure.eval.inputs.Inputs`.

    Returns:
        The metrics of both variants.

    Raises:
        EvaluationError: Unknown suite, size or concept; an output folder that holds something else; fused erasures,
            which leave no stock model to compare with; a judge that does not know the suite's classes.
        OptionError: A seed that is negative or has more than 63 bits.
    """
    seed, out = check_seed(seed, "an evaluation", RunSeed), None if out is None else at_home(out)
    processes = join(out)
    started = time.perf_counter()
    models, kit = Models.of(pipe), suites.get(suite)
    chosen = [concepts] if isinstance(concepts, (str, Concept)) else concepts
    wanted = models.concepts if chosen is None else chosen
    kit = kit.prepared(Inputs.read(inputs, clip=clip_source(clip)), models.pipe, wanted)
    plan = kit.plan(models.pipe, wanted, size, seed)
    checked = _checked(kit, controls)
    answering = judge_of(judge, kit, plan)
    scorer, clip_missing = clip_model(clip, models.pipe)
    subject = Subject.of(models, answering, None if scorer is None else scorer.fingerprint)

    def table(folder: Path) -> SampleTable:
        names = kit.variant_names()
        return SampleTable(folder, plan.samples, processes.rank, processes.count, names, schema=EvaluationRow)

    root = Path(baseline_cache or cache_folder())
    caches = {variant.name: _cache(root, subject, plan, variant, images, checked) for variant in kit.variants}
    recipe = subject.recipe(plan) | (
        {"detectors": {each.label: dict(each.recipe) for each in checked}} if checked else {}
    )
    with opened(processes, table, recipe, out) as opened_table:
        run = _Evaluation(
            subject, plan, opened_table, processes, images, progress, kit, caches, scorer, batch_size,
            {each.label: each.detector for each in checked}, beside, started=started,
        )  # fmt: skip
        for variant in kit.variants:
            if models.entries or not variant.only_erased:
                run.draw(variant, models.pipe if variant.erased else models.stock)
                processes.wait()  # for what the next variant is held against
        rows = run.rows()
        if rows is None:
            return Results.load(run.table.folder)
        stamped = replace(plan, recipe=plan.recipe | subject.sampler | {"judge": subject.judge_name})
        counted = set(kit.flagging)
        entries = {
            each.label: each.entry | {"counts": "flags" if each.label in counted else "classes"} for each in checked
        }
        evidence = Evidence(
            stamped, rows, run.table.features, scorer, clip_missing,
            [
                *kit.controls(models.stock, answering, plan, rows),
                *(flag_control(rows.get("before", ()), plan, label, kit.flagged_at_least) for label in kit.flagging),
            ],
            entries, kit.flagging,
        )  # fmt: skip
        cost = evaluation_cost(rows, subject.erasures, time.perf_counter() - started, run.clock)
        results = run.results(computed(kit, evidence), cost | {"batch_size": batch_size}, list(entries.values()))
        if report:
            from erasure.eval.report import write_report

            write_report(run.table.folder)
        if reveal:
            from erasure.eval.report import write_revealed

            write_revealed(run.table.folder)
        processes.wait()
    return results


def computed(kit: suites.Suite, evidence: Evidence) -> list[Record]:
    """Rows of all metrics of a suite, in the suite's order.

    Args:
        kit: The suite.
        evidence: What they are computed from.
    """
    rows = []
    for name in kit.metrics:
        metric = METRICS.get(name)
        own = metric.compute(evidence)
        failure = None
        if kit.strict_controls and not metric.is_control:
            failure = evidence.control_failure
        elif CAPTION in kit.metrics and "clip" in metric.needs and not metric.is_control and evidence.before:
            failure = evidence.captions.failure
        rows += own if failure is None else [withheld(row, failure) for row in own]
    adjust(rows, kit.tested_together, evidence.concept)
    return rows


def _checked(kit: suites.Suite, controls: str | Path | None) -> list[TestedDetector]:
    """The suite's detectors, tested before anything is drawn."""
    if controls is not None and not kit.detectors:
        raise EvaluationError(
            f"controls are given, and suite {kit.name} has no detector to measure on them: name one (detectors)"
        )
    return [TestedDetector.of(label, each, controls) for label, each in kit.detectors.items()]


def _cache(
    root: Path, subject: Subject, plan: suites.Plan, variant: Variant, images: bool, checked: Sequence[TestedDetector]
) -> DrawingCache | None:
    """Give the cache of a variant's images; `None` when they are not kept."""
    drawing = subject.drawing
    if variant.erased:
        if not images:
            return None
        drawing = subject.erased_drawing
    if variant.draw is None:
        key = prompt_key
    else:  # what the pipeline is given follows from the whole sample
        drawing, key = drawing | {"suite": plan.recipe, "variant": variant.name}, whole_key
    judging = {"judge": subject.judge_name, "package": __version__}
    return DrawingCache(
        root, drawing, key=key,
        judge=judging if is_identified(subject.judge) else None,
        clip=None if subject.clip is None else {"clip": subject.clip, "package": __version__},
        readings={each.label: each.read_by for each in checked},
    )  # fmt: skip


@dataclass
class _Evaluation(Run):
    """One evaluation in this process."""

    kit: suites.Suite
    caches: dict[str, DrawingCache | None]
    clip: ClipModel | None
    batch_size: int
    detectors: Mapping[str, NamedDetector]
    beside: bool | None
    """Whether batches are scored while the next one is drawn."""

    def draw(self, variant: Variant, pipe: DiffusionPipeline) -> None:
        """Finish every sample of a variant that is not in the table yet and falls to this process.

        Args:
            variant: How samples are drawn.
            pipe: With what.
        """
        name, pending = variant.name, self.pending(variant.name)
        mine = self.share(pending)
        done = len(self.plan.samples) - len(pending)
        with bar(name, done + len(mine), done=done, unit="image", shown=self.shows_bar) as shown:
            mine = self._from_cache(variant, mine, shown)

            def finish(batch: list[Sample], images: list[Image.Image], seconds: float) -> None:
                self._finish(variant, batch, images, seconds)

            def finished(count: int) -> None:
                shown.update(count)
                self.tell(name, name)

            self.finish_drawn(pipe, variant.draw, mine, self.batch_size, finish, finished, self.beside)

    def _from_cache(self, variant: Variant, samples: Sequence[Sample], shown: Bar) -> list[Sample]:
        """Take what an earlier evaluation has drawn; returns the samples that are left to draw."""
        name, cache = variant.name, self.caches[variant.name]
        if cache is None:
            return list(samples)
        rest: list[Sample] = []
        ready: list[tuple[Sample, Image.Image]] = []

        def finish() -> None:
            if ready:
                self._finish(variant, [sample for sample, _ in ready], [image for _, image in ready], None)
                shown.update(len(ready))
                self.tell(name, name)
                ready.clear()

        for sample in samples:
            image = cache.image(sample)
            if image is None:
                rest.append(sample)
            else:
                ready.append((sample, image))
            if len(ready) == self.batch_size:
                finish()
        finish()
        return rest

    def _finish(
        self, variant: Variant, batch: Sequence[Sample], images: Sequence[Image.Image], seconds: float | None
    ) -> None:
        """Score a batch and append its rows; `seconds` of drawing an image, `None` for images from the cache."""
        cache = self.caches[variant.name]
        if cache is not None and seconds is not None:
            for sample, image in zip(batch, images, strict=True):
                cache.put_image(sample, png(image))
        # What was said of an earlier drawing is no answer on one that was made just now.
        scores, features = score(
            batch, images, self.subject.judge, self.clip, self.kit.plain, cache, recall=seconds is None,
            detectors=self.detectors,
        )  # fmt: skip
        rows = []
        for sample, image, scored, vector in zip(batch, images, scores, features, strict=True):
            self.keep(variant.name, sample, image)
            rows.append(self._row(sample, variant, image, scored, vector, seconds))
        self.table.append(rows, features)

    def _row(
        self, sample: Sample, variant: Variant, image: Image.Image, scored: Row, vector: np.ndarray | None,
        seconds: float | None,
    ) -> Record:  # fmt: skip
        """A row of `samples.jsonl`; `seconds` of generating the image, `None` for one from the cache."""
        failures = dict(scored["failures"])
        found = {"measured": self._measured(sample, image, failures), "drift": None}
        if variant.moved_from is not None:
            found["drift"] = self._moved(sample, image, vector, variant.moved_from, failures)
        fixed = {"sample_id": sample.sample_id, "variant": variant.name, **sample.row()}
        return {**fixed, **scored, **found, "failures": failures, "seconds": seconds}

    def _measured(self, sample: Sample, image: Image.Image, failures: Record) -> Record:
        """What the suite knows of an image; nothing, with a reason, where it cannot be had."""
        try:
            return self.kit.measure(sample, image)
        except Exception as error:  # an image of another size than the scene's, for instance
            failures["measure"] = reason(error)
            return {}

    def _moved(
        self, sample: Sample, image: Image.Image, vector: np.ndarray | None, against: str, failures: Record
    ) -> dict[str, float | None] | None:  # fmt: skip
        """How far an image is from that of another variant; nothing, with a reason, where it cannot be told."""
        cache = self.caches[against]
        stock = None if cache is None else cache.image(sample)
        if stock is None:
            with contextlib.suppress(ErasureError):  # one that was kept for the report does as well
                stock = read_rgb(image_path(self.table.folder, against, sample.sample_id), formats=("PNG",))
        if stock is None:
            failures["drift"] = "the stock model's image is gone from the baseline cache"
            return None
        first = self.table.features.get((sample.sample_id, against))
        if stock.size != image.size:
            failures["drift"] = (
                f"the image before has {stock.width}x{stock.height} pixels, the one after {image.width}x{image.height}"
            )
        return drift(stock, image, first, vector)
