"""Measure a pipeline: one generation pass over a suite's samples feeds every metric, and a killed run resumes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from erasure import __version__
from erasure.cache import cache_folder
from erasure.concept import Concept
from erasure.errors import ArtifactError, ErasureError, EvaluationError
from erasure.eval import suites
from erasure.eval.controls import controlled
from erasure.eval.cost import evaluation_cost
from erasure.eval.drawings import DrawingCache, prompt_key, whole_key
from erasure.eval.generation import generate
from erasure.eval.judges import check_classes, load_judge
from erasure.eval.metrics.clip_score import EMBEDDED, ClipModel
from erasure.eval.metrics.utility import utility_metrics
from erasure.eval.recipe import is_identified
from erasure.eval.results import Results
from erasure.eval.rows import Record, Row
from erasure.eval.run import Progress, Run, Subject, join, opened
from erasure.eval.samples import Sample
from erasure.eval.schemas import ComparedRow, EvaluationRow
from erasure.eval.scoring import Judge, drift, reason, score
from erasure.eval.table import BEFORE_AFTER, SampleTable, image_path
from erasure.images import png, read_rgb
from erasure.interop.pipelines import execution_device, without_safety_checker


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

    Returns:
        The metrics of both variants.

    Raises:
        EvaluationError: Unknown suite, size or concept; an output folder that holds something else; fused erasures,
            which leave no stock model to compare with; a judge that does not know the suite's classes.
    """
    processes = join(out, seed)
    started = time.perf_counter()
    # Its black images would pass for erased ones. The caller's pipeline keeps it.
    given, pipe = pipe, without_safety_checker(pipe)
    stock, attached = in_force(pipe)
    chosen = [concepts] if isinstance(concepts, (str, Concept)) else concepts
    if chosen is None:
        chosen = [concept for entry in attached for concept in entry["erasure"].concepts]
    kit = suites.get(suite)
    plan = kit.plan(pipe, chosen, size, seed)
    judge = load_judge(judge) if isinstance(judge, str | Path) else judge or kit.judge()
    check_classes(judge, plan.samples)
    scorer, clip_missing = _clip(clip, pipe)
    clip_print = None if scorer is None else scorer.fingerprint
    subject = Subject.of(pipe, stock, attached, judge, clip_print, unchecked=pipe is not given)
    recipe = subject.recipe(plan)
    variants = kit.variants if suites.is_comparing(kit) else BEFORE_AFTER

    schema = ComparedRow if suites.is_comparing(kit) else EvaluationRow

    def table(folder: Path) -> SampleTable:
        return SampleTable(folder, plan.samples, processes.rank, processes.count, variants, schema=schema)

    root = Path(baseline_cache or cache_folder())
    caches = {variant: _cache(root, subject, plan, kit, variant, images) for variant in variants}
    with opened(processes, table, recipe, out) as opened_table:
        run = _Evaluation(
            subject, plan, opened_table, processes, images, progress, kit, caches, scorer, batch_size, started=started
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
            metrics = kit.score(plan, rows) + utility_metrics(plan, rows, features, scorer, clip_missing)
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


def _clip(given: str | Path | ClipModel | None, pipe: DiffusionPipeline) -> tuple[ClipModel | None, str | None]:
    """The CLIP model, or why there is none. One that the user names must be there; it runs where the pipeline does."""
    if isinstance(given, ClipModel):
        return given, None
    if given == "none":
        return None, "no CLIP model: left out as asked"
    if given is not None:
        return ClipModel(given, execution_device(pipe)), None
    try:
        return ClipModel(EMBEDDED), None
    except ArtifactError as error:
        return None, f"no CLIP model: {error}"


def _cache(
    root: Path, subject: Subject, plan: suites.Plan, kit: suites.Suite, variant: str, images: bool
) -> DrawingCache | None:
    """Give the cache of a variant's images; `None` when they are not kept."""
    if variant == "before":
        judging = {"judge": subject.judge_name, "clip": subject.clip, "package": __version__}
        return DrawingCache(root, subject.drawing, judging if is_identified(subject.judge) else None, prompt_key)
    if not images:
        return None
    erased = [[entry["fingerprint"], entry["strength"]] for entry in subject.erasures]
    drawing = subject.drawing | {"erasures": erased, "package": __version__}
    if suites.is_comparing(kit):
        drawing |= {"suite": plan.recipe, "variant": variant}
    return DrawingCache(root, drawing, None, whole_key if suites.is_comparing(kit) else prompt_key)


@dataclass
class _Evaluation(Run):
    """One evaluation in this process."""

    kit: suites.Suite
    caches: dict[str, DrawingCache | None]
    clip: ClipModel | None
    batch_size: int

    def variant(self, variant: str, pipe: DiffusionPipeline) -> None:
        """Finish every sample of a variant that is not in the table yet and falls to this process."""
        pending = self.pending(variant)
        mine = self.share(pending)
        done = len(self.plan.samples) - len(pending)
        bar = tqdm(total=done + len(mine), initial=done, desc=variant, unit="image", disable=not self.shows_bar)
        with bar:
            mine = self._from_cache(variant, mine, bar)
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

    def _from_cache(self, variant: str, samples: Sequence[Sample], bar: tqdm) -> list[Sample]:
        """Take what an earlier evaluation has drawn; returns the samples that are left to draw.

        What has been said of an image is taken too, where the same judge and CLIP model said it; else they are asked.
        """
        cache = self.caches[variant]
        if cache is None:
            return list(samples)
        width = None if self.clip is None else self.clip.width
        rest: list[Sample] = []
        ready: list[tuple[Sample, Image.Image]] = []
        for sample in samples:
            image = cache.image(sample)
            known = None if image is None else cache.get(sample, width)
            if image is None:
                rest.append(sample)
            elif known is None:
                ready.append((sample, image))
            else:
                self.keep(variant, sample, image)
                self.table.append([_row(sample, variant, known[0], None, None)], [known[1]])
                bar.update()
                self.tell(variant, variant)
        for start in range(0, len(ready), self.batch_size):
            batch = ready[start : start + self.batch_size]
            self._finish(variant, [sample for sample, _ in batch], [image for _, image in batch], None)
            bar.update(len(batch))
            self.tell(variant, variant)
        return rest

    def _finish(
        self, variant: str, batch: Sequence[Sample], images: Sequence[Image.Image], seconds: float | None
    ) -> None:
        """Score a batch and append its rows; `seconds` of drawing an image, `None` for images from the cache."""
        plain = getattr(self.kit, "plain", lambda sample, image: False)
        scores, features = score(batch, images, self.subject.judge, self.clip, plain)
        rows = []
        for sample, image, scored, vector in zip(batch, images, scores, features, strict=True):
            self.keep(variant, sample, image)
            if (cache := self.caches[variant]) is not None:
                if seconds is not None:
                    cache.put_image(sample, png(image))
                cache.put(sample, scored, vector)
            moved = None
            if suites.is_comparing(self.kit):
                scored["measured"] = self._measured(self.kit, sample, image, scored["failures"])
            elif variant == "after":
                moved = self._moved(sample, image, vector, scored["failures"])
            rows.append(_row(sample, variant, scored, moved, seconds))
        self.table.append(rows, features)

    def _measured(
        self, kit: suites.ComparingSuite, sample: Sample, image: Image.Image, failures: Record
    ) -> Record:  # fmt: skip
        """What the suite knows of an image; nothing, with a reason, where it cannot be had."""
        try:
            return kit.measure(sample, image)
        except Exception as error:  # an image of another size than the scene's, for instance
            failures["measure"] = reason(error)
            return {}

    def _moved(
        self, sample: Sample, image: Image.Image, vector: np.ndarray | None, failures: Record
    ) -> dict[str, float | None] | None:
        """How far an image is from the stock model's; nothing, with a reason, where it cannot be told."""
        cache = self.caches["before"]
        stock = None if cache is None else cache.image(sample)
        if stock is None:
            with contextlib.suppress(ErasureError):  # one that was kept for the report does as well
                stock = read_rgb(image_path(self.table.folder, "before", sample.sample_id), formats=("PNG",))
        if stock is None:
            failures["drift"] = "the stock model's image is gone from the baseline cache"
            return None
        first = self.table.features.get((sample.sample_id, "before"))
        if stock.size != image.size:
            failures["drift"] = (
                f"the image before has {stock.width}x{stock.height} pixels, the one after {image.width}x{image.height}"
            )
        return drift(stock, image, first, vector)


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
