"""What evaluations and attacks share: who takes part, the folder that the rows go to, what they depend on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from diffusers import DiffusionPipeline
from PIL import Image

from erasure import __version__
from erasure.cache import model_fingerprint
from erasure.concept import Concept
from erasure.errors import ArtifactError, EvaluationError, ResultsFolderError
from erasure.eval.beside import Clock, each
from erasure.eval.generation import generate, timed
from erasure.eval.judges import check_classes, load_judge
from erasure.eval.metrics.clip_score import EMBEDDED, ClipModel
from erasure.eval.processes import Processes
from erasure.eval.recipe import drawing_recipe, erasure_entry, judge_fingerprint, run_recipe, sampler_recipe
from erasure.eval.results import Results
from erasure.eval.rows import Record
from erasure.eval.samples import Sample
from erasure.eval.scoring import Judge
from erasure.eval.suites import Plan, Suite
from erasure.eval.table import SampleTable, image_path
from erasure.eval.variants import Draw
from erasure.files import held, write_bytes
from erasure.guards import is_strict
from erasure.images import png
from erasure.interop import scopes
from erasure.interop.pipelines import execution_device, without_safety_checker
from erasure.twins import states_of

RECIPE, WHAT = "recipe.json", "evaluation"
T = TypeVar("T")
Progress = Callable[[str, int, int], None]
"""Called with what is finished, how much of it, and how much there is in all."""


def join(out: str | Path | None) -> Processes:
    """The processes that take part.

    Args:
        out: The folder that all write to.

    Raises:
        EvaluationError: There are several, and no folder.
    """
    processes = Processes()
    if out is None and processes.count > 1:
        raise EvaluationError("several processes need a common output folder: pass out=")
    return processes


@dataclass(frozen=True)
class Models:
    """A pipeline with its erasures in force, and the stock model behind it."""

    pipe: DiffusionPipeline
    """The caller's pipeline, or a twin of it without the safety checker, whose black images would pass for erased
    ones. The caller's keeps it."""
    stock: DiffusionPipeline
    """The one without erasures; the same one where none is attached."""
    entries: list[Record]
    """The active erasures: `name`, `erasure` and `strength`."""
    unchecked: bool
    """Whether a safety checker was left out."""

    @classmethod
    def of(cls, given: DiffusionPipeline) -> Models:
        """Look at a pipeline.

        Raises:
            EvaluationError: Some of its erasures are fused, so that there is no stock model.
        """
        from erasure.attach import ErasureManager

        pipe = without_safety_checker(given)
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
        return cls(pipe, manager.stock(offloaded=True) if entries else pipe, entries, pipe is not given)

    @property
    def concepts(self) -> list[Concept]:
        """What the active erasures are of."""
        return [concept for entry in self.entries for concept in entry["erasure"].concepts]

    @property
    def is_strict(self) -> bool:
        """Whether the pipeline refuses calls that go around an erasure in force, which was attached so."""
        return is_strict(states_of(self.pipe).values())


def judge_of(given: Judge | str | Path | None, suite: Suite, plan: Plan) -> Judge:
    """The judge that is given, or the suite's own; it must know what the prompts ask for.

    Raises:
        EvaluationError: There is no such judge, or it does not know a class.
    """
    judge = load_judge(given) if isinstance(given, str | Path) else given or suite.judge()
    check_classes(judge, plan.samples)
    return judge


def clip_model(given: str | Path | ClipModel | None, pipe: DiffusionPipeline) -> tuple[ClipModel | None, str | None]:
    """The CLIP model, or why there is none. One that the user names must be there; it runs where the pipeline does.

    Args:
        given: Its folder or repository, or one that is loaded; "none" for none; the embedded one when left out.
        pipe: What draws.
    """
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


def clip_source(given: str | Path | ClipModel | None) -> str | None:
    """Where a CLIP model is, for a detector that is made of one; `None` where none is named."""
    if isinstance(given, ClipModel):
        return str(given.folder)
    return None if given in (None, "none") else str(given)


@dataclass(frozen=True)
class Subject:
    """What is measured, and with what."""

    pipe: DiffusionPipeline
    drawing: Record
    """Everything that images of the stock model depend on besides their sample."""
    erasures: list[Record]
    """Entries of the attached erasures, as results have them."""
    judge: Judge
    judge_name: str
    clip: str | None
    """Fingerprint of the CLIP model."""
    unchecked: bool
    """Whether a safety checker was left out."""

    @classmethod
    def of(cls, models: Models, judge: Judge, clip: str | None = None) -> Subject:
        """Describe a pipeline.

        Args:
            models: The pipeline and its stock model.
            judge: The detector.
            clip: Fingerprint of the CLIP model.
        """
        erasures = [erasure_entry(entry["name"], entry["erasure"], entry["strength"]) for entry in models.entries]
        drawing = drawing_recipe(models.stock, model_fingerprint(models.stock))
        return cls(models.pipe, drawing, erasures, judge, judge_fingerprint(judge), clip, models.unchecked)

    @property
    def erased_drawing(self) -> Record:
        """Everything that images of the pipeline with its erasures depend on besides their sample."""
        erased = [[entry["fingerprint"], entry["strength"]] for entry in self.erasures]
        # A one-step generator brings a sampler of its own.
        return self.drawing | {"sampler": sampler_recipe(self.pipe), "erasures": erased, "package": __version__}

    @property
    def sampler(self) -> Record:
        """Scheduler of the stock model, precision and noise."""
        return self.drawing["sampler"]

    def recipe(self, plan: Plan) -> Record:
        """All that a folder of samples depends on."""
        return run_recipe(plan, self.drawing, self.judge_name, self.clip, self.erasures)

    @property
    def model(self) -> Record:
        """The `model` block of results."""
        names = {"name": model_name(self.pipe), "fingerprint": self.drawing["model"]}
        names["pipeline"] = type(self.pipe).__name__
        left_out = {"safety_checker": "left out for measuring"} if self.unchecked else {}
        besides = {"besides": self.drawing["besides"]} if "besides" in self.drawing else {}
        return names | self.sampler | left_out | besides


@dataclass
class Run:
    """An evaluation or an attack in this process."""

    subject: Subject
    plan: Plan
    table: SampleTable
    processes: Processes
    images: bool
    """Whether images are kept."""
    progress: bool | Progress
    started: float = field(default_factory=time.perf_counter, kw_only=True)
    clock: Clock = field(default_factory=Clock, kw_only=True)
    """How long this process draws."""

    @property
    def shows_bar(self) -> bool:
        """Whether this process shows a progress bar."""
        return self.progress is True and self.processes.is_main

    def tell(self, what: str, variant: str, wanted: Sequence[Sample] | None = None) -> None:
        """Tell the user's function, if there is one, how many samples of a variant are finished.

        Args:
            what: What is finished.
            variant: The variant.
            wanted: Its samples; all when left out.
        """
        wanted = self.plan.samples if wanted is None else wanted
        if callable(self.progress) and self.processes.is_main:
            done = sum((sample.sample_id, variant) in self.table.rows for sample in wanted)
            self.progress(what, done, len(wanted))

    def pending(self, variant: str, wanted: Sequence[Sample] | None = None) -> list[Sample]:
        """Samples of a variant that are not in the table yet, for all processes together; see `tell`."""
        wanted = self.plan.samples if wanted is None else wanted
        return [sample for sample in wanted if (sample.sample_id, variant) not in self.table.rows]

    def share(self, work: Sequence[T]) -> list[T]:
        """What falls to this process, of samples or batches."""
        return list(work[self.processes.rank :: self.processes.count])

    def finish_drawn(
        self, pipe: DiffusionPipeline, draw: Draw | None, samples: Sequence[Sample], batch_size: int,
        finish: Callable[[list[Sample], list[Image.Image], float], None], done: Callable[[int], None],
        beside: bool | None = None,
    ) -> None:  # fmt: skip
        """Draw samples batch by batch, and finish each batch, where that gains something while the next is drawn.

        Args:
            pipe: What draws.
            draw: How; by an ordinary call of the pipeline when left out.
            samples: What is drawn.
            batch_size: Images per call of the pipeline.
            finish: Scores a batch, of which each image took so many seconds, and appends its rows.
            done: Told of every batch that is finished, and how many samples it has.
            beside: Whether batches are finished in a thread of their own. Left out, where the pipeline does not run on
                the processor, which would only take turns between the two.
        """
        if beside is None:
            beside = execution_device(pipe).type != "cpu"
        if draw is None:
            drawn = generate(pipe, samples, batch_size, clock=self.clock)
        else:
            if samples:
                self.clock.denoising = None
            drawn = draw(pipe, samples, batch_size)
        each(timed(drawn, self.clock), lambda batch: finish(*batch), lambda batch: done(len(batch[0])), beside=beside)

    def keep(self, variant: str, sample: Sample, image: Image.Image) -> None:
        """Write a sample's image, if images are kept.

        Raises:
            EvaluationError: It cannot be written.
        """
        if self.images:
            path = image_path(self.table.folder, variant, sample.sample_id)
            write_bytes(path, png(image), error=ResultsFolderError)

    def rows(self) -> dict[str, list[Record]] | None:
        """Rows of all processes by variant, once all have finished; `None` unless this is the main process."""
        self.processes.wait()
        if not self.processes.is_main:
            self.processes.wait()  # for the main process to write
            return None
        self.table.load()
        self.table.merge()
        return self.table.by_variant()

    def results(self, metrics: list[Record], cost: Record, detectors: Sequence[Record] = ()) -> Results:
        """Write `results.json`; the main process calls it, and then lets the others go."""
        pipe, processes = self.subject.pipe, {"processes": self.processes.count}
        results = Results.now(
            suite=self.plan.suite,
            size=self.plan.size,
            model=self.subject.model,
            erasures=self.subject.erasures,
            metrics=metrics,
            cost=cost | processes | {"device": str(getattr(pipe, "device", "cpu"))},
            detectors=list(detectors),
            folder=self.table.folder,
        )
        results.save(self.table.folder)
        return results


@contextmanager
def opened(
    processes: Processes, table: Callable[[Path], SampleTable], recipe: Record, out: str | Path | None
) -> Iterator[SampleTable]:
    """The table of a folder with what is in it already; the folder is held until the end.

    Args:
        processes: Who takes part.
        table: Makes the table of a folder.
        recipe: All that the rows depend on.
        out: The folder; a temporary one when left out.

    Raises:
        EvaluationError: Another run works there, or the folder holds something else or cannot be read or written.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"erasure-{WHAT}-") if out is None else out)
    made = table(folder)
    # One process holds the folder for all.
    held_by_main = held(folder, recipe, file=RECIPE, what=WHAT, error=ResultsFolderError)
    lock = held_by_main if processes.is_main else nullcontext()
    with scopes.same_gradient_mode(), lock:
        if processes.is_main:
            made.cut()
            made.drop_incomplete()
        processes.wait()
        made.load()
        processes.wait()
        yield made


def model_name(pipe: DiffusionPipeline) -> str:
    """Hub id or name of the folder; a path of this machine says nothing to others."""
    name = str(getattr(pipe, "name_or_path", None) or type(pipe).__name__)
    return Path(name).name if Path(name).is_absolute() else name
