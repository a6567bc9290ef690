"""Measure a pipeline: one generation pass over a suite's samples feeds every metric, and a killed run resumes."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from erasure.cache import cache_folder, model_fingerprint
from erasure.errors import ArtifactError, EvaluationError
from erasure.eval import suites
from erasure.eval.baseline import BaselineCache
from erasure.eval.cost import evaluation_cost
from erasure.eval.generation import generate
from erasure.eval.metrics.clip_score import ClipModel
from erasure.eval.metrics.utility import utility_metrics
from erasure.eval.processes import Processes
from erasure.eval.recipe import erasure_entry, judge_fingerprint, run_recipe, sampler_recipe
from erasure.eval.results import Results, write_atomically
from erasure.eval.samples import Sample
from erasure.eval.scoring import Judge, drift, score
from erasure.eval.table import BEFORE_AFTER, SampleTable

Progress = Callable[[str, int, int], None]
"""Called with the variant, images done and images in all."""


def evaluate(
    pipe: Any,
    suite: str = "canvas",
    concepts: Sequence[Any] | str | None = None,
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
    processes = Processes()
    if out is None and processes.count > 1:
        raise EvaluationError("several processes need a common output folder: pass out=")
    started = time.perf_counter()
    stock, attached = in_force(pipe)
    chosen = [concepts] if isinstance(concepts, str) or hasattr(concepts, "target") else concepts
    if chosen is None:
        chosen = [concept for entry in attached for concept in entry["erasure"].concepts]
    kit = suites.get(suite)
    plan = kit.plan(pipe, chosen, size, seed)
    judge = kit.judge() if judge is None else judge
    scorer, clip_missing = _clip(clip)
    erasures = [erasure_entry(entry["name"], entry["erasure"], entry["strength"]) for entry in attached]
    fingerprint = model_fingerprint(stock)
    sampler, judge_name = sampler_recipe(pipe), judge_fingerprint(judge)
    clip_name = None if scorer is None else scorer.fingerprint
    recipe = run_recipe(plan, fingerprint, sampler, judge_name, clip_name, erasures)
    shared = {"sampler": sampler, "judge": judge_name, "clip": clip_name, "versions": recipe["versions"]}
    cache = BaselineCache(Path(baseline_cache or cache_folder()), fingerprint, shared)

    folder = Path(tempfile.mkdtemp(prefix="erasure-eval-") if out is None else out)
    variants = kit.variants if suites.is_comparing(kit) else BEFORE_AFTER
    table = SampleTable(folder, processes.rank, processes.count, variants)
    table.check(recipe)
    processes.wait()
    if processes.is_main:
        table.start(recipe)
    processes.wait()
    table.load()
    processes.wait()

    run = _Run(kit, plan.samples, table, cache, judge, scorer, processes, batch_size, images, progress)
    if suites.is_comparing(kit):
        for variant in variants:
            run.variant(variant, pipe)
    else:
        run.variant("before", stock)
        processes.wait()
        if attached:
            run.variant("after", pipe)
    processes.wait()
    if not processes.is_main:
        processes.wait()  # for the main process to write
        return Results.load(folder)

    table.load()
    order = [sample.sample_id for sample in plan.samples]
    table.merge(order)
    rows = table.by_variant(order)
    stamped = plan.recipe | sampler | {"judge": judge_name}
    plan = suites.Plan(plan.suite, plan.size, plan.seed, plan.targets, plan.samples, stamped)
    if suites.is_comparing(kit):
        metrics = kit.compare(plan, rows, table.features, scorer)
    else:
        metrics = kit.score(plan, rows) + utility_metrics(plan, rows, table.features, clip_name, clip_missing)
    results = Results(
        suite=suite,
        size=size,
        model={"name": model_name(pipe), "fingerprint": fingerprint, "pipeline": type(pipe).__name__} | sampler,
        erasures=erasures,
        metrics=metrics,
        cost=evaluation_cost(rows, erasures, time.perf_counter() - started)
        | {"processes": processes.count, "batch_size": batch_size, "device": str(getattr(pipe, "device", "cpu"))},
        folder=folder,
    )
    results.save(folder)
    if report:
        from erasure.eval.report import write_report

        write_report(folder)
    processes.wait()
    return results


def in_force(pipe: Any) -> tuple[Any, list[dict[str, Any]]]:
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


def model_name(pipe: Any) -> str:
    """Hub id or name of the folder; a path of this machine says nothing to others."""
    name = str(getattr(pipe, "name_or_path", None) or type(pipe).__name__)
    return Path(name).name if Path(name).is_absolute() else name


def keep_image(folder: Path, variant: str, sample: Sample, image: Image.Image) -> None:
    """Write a sample's image below an evaluation's folder."""
    path = folder / "images" / variant / f"{sample.sample_id}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _png(image))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class _Run:
    """One evaluation in this process."""

    kit: suites.Suite
    samples: Sequence[Sample]
    table: SampleTable
    cache: BaselineCache
    judge: Judge
    clip: ClipModel | None
    processes: Processes
    batch_size: int
    images: bool
    progress: bool | Progress

    def variant(self, variant: str, pipe: Any) -> None:
        """Finish every sample of a variant that is not in the table yet and falls to this process."""
        pending = [sample for sample in self.samples if (sample.sample_id, variant) not in self.table.rows]
        mine = pending[self.processes.rank :: self.processes.count]
        done, total = len(self.samples) - len(pending), len(self.samples) - len(pending) + len(mine)
        bar = tqdm(total=total, initial=done, desc=variant, unit="image", disable=not self._bar())
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
                self._advance(bar, variant, len(batch))

    def _bar(self) -> bool:
        return self.progress is True and self.processes.is_main

    def _advance(self, bar: Any, variant: str, count: int) -> None:
        bar.update(count)
        if callable(self.progress) and self.processes.is_main:
            done = sum((sample.sample_id, variant) in self.table.rows for sample in self.samples)
            self.progress(variant, done, len(self.samples))

    def _from_cache(self, samples: Sequence[Sample], bar: Any) -> list[Sample]:
        """Take what an earlier evaluation of the stock model left; returns the rest."""
        rest = []
        for sample in samples:
            found = self.cache.get(sample)
            image = self.cache.image(sample)
            if found is None or image is None:
                rest.append(sample)
                continue
            scores, vector = found
            self._keep("before", sample, image)
            self.table.append([_row(sample, "before", scores, None, None)], [vector])
            self._advance(bar, "before", 1)
        return rest

    def _finish(self, variant: str, batch: Sequence[Sample], images: Sequence[Image.Image], seconds: float) -> None:
        scores, features = score(batch, images, self.judge, self.clip)
        rows = []
        for sample, image, scored, vector in zip(batch, images, scores, features, strict=True):
            self._keep(variant, sample, image)
            moved = None
            if suites.is_comparing(self.kit):
                scored["measured"] = self.kit.measure(sample, image)
            elif variant == "before":
                self.cache.put(sample, _png(image), scored, vector)
            else:
                stock = self.cache.image(sample)
                if stock is None:
                    scored["failures"]["drift"] = "the stock model's image is gone from the baseline cache"
                else:
                    moved = drift(stock, image, self.table.features.get((sample.sample_id, "before")), vector)
            rows.append(_row(sample, variant, scored, moved, seconds))
        self.table.append(rows, features)

    def _keep(self, variant: str, sample: Sample, image: Image.Image) -> None:
        if self.images:
            keep_image(self.table.folder, variant, sample, image)


def _row(
    sample: Sample,
    variant: str,
    scores: dict[str, Any],
    moved: dict[str, float | None] | None,
    seconds: float | None,
) -> dict[str, Any]:
    """A row of `samples.jsonl`; `seconds` of generating the image, `None` for one from the cache."""
    fixed = {"sample_id": sample.sample_id, "variant": variant, **sample.row()}
    return {**fixed, **scores, "drift": moved, "seconds": seconds}
