"""Attack a pipeline, prompt by prompt: a killed run resumes. And try what one attack found on another erasure."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from erasure.artifact import Erasure
from erasure.attach import ErasureManager
from erasure.backbones import backbone_for
from erasure.cache import cache_folder
from erasure.concept import Concept
from erasure.errors import EvaluationError, UnsupportedModelError
from erasure.eval import attacks
from erasure.eval.attacks.courses import attacked, replayed, said, stepped
from erasure.eval.attacks.prompts import AdversarialPrompt, listed_prompts, read_prompts, write_prompts
from erasure.eval.attacks.together import Course, in_step
from erasure.eval.attacks.victim import Victim
from erasure.eval.controls import LIMITS
from erasure.eval.cost import attack_cost
from erasure.eval.drawings import DrawingCache
from erasure.eval.evidence import Evidence
from erasure.eval.inputs import Inputs
from erasure.eval.metrics import METRICS
from erasure.eval.metrics.attacked import original_control
from erasure.eval.one_concept import one_concept, plan_of, spread, suite_of
from erasure.eval.processes import Processes
from erasure.eval.results import Results
from erasure.eval.rows import Record, Row
from erasure.eval.run import Models, Progress, Run, Subject, join, judge_of, model_name, opened
from erasure.eval.samples import Sample
from erasure.eval.schemas import AttackRow, ReplayRow
from erasure.eval.scoring import Judge
from erasure.eval.suites import Plan
from erasure.eval.table import SampleTable
from erasure.files import at_home, digest
from erasure.interop import scopes
from erasure.options import RunSeed, check_seed
from erasure.progress import Bar, bar
from erasure.shown import LABEL, visible

STEM = "attacks"
"""Of the file of rows."""
IN_STEP, SMALL = 5, 128 * 128
"""Prompts that are attacked in step where pictures have at most so many pixels: those of larger ones fill a processor
or the memory alone."""


def attack(
    pipe: DiffusionPipeline,
    name: str = "unlearndiffatk",
    concept: str | Concept | None = None,
    *,
    size: str = "quick",
    suite: str = "canvas",
    inputs: Mapping[str, object] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    judge: Judge | str | Path | None = None,
    images: bool = True,
    progress: bool | Progress = True,
    baseline_cache: str | Path | None = None,
    batch_size: int | None = None,
    **options: object,
) -> Results:
    """Search what brings an erased concept back, and say how often that works.

    Every prompt is tried as it is first. `pre_ASR` is the share that shows the concept without an attack, `ASR` the
    share that does with or without; of a control such as `random_prefix` it is called `chance_ASR`. A prompt that
    cannot be attacked counts as missing, never as safe, unless it needs no attack.

    What an erasure that is attached with `strict=True` refuses is refused here too, and counts neither as a success
    nor as a failure: `held_by_refusal` is the share of prompts of which the pipeline refused every attempt, and where
    there is one `ASR` is withheld, with the reason. Attach it without `strict` to measure what the model draws.

    Writes `results.json`, `attacks.jsonl`, `adversarial.jsonl` (what `replay` takes), `adversarial/` (tensors and
    pictures of what is no text), `recipe.json` and `images/` to `out`. Run it again with the same arguments to resume.
    Under `accelerate launch` the prompts are split over the processes. The model is left as it was, bit for bit.

    Args:
        pipe: A diffusers pipeline, with erasures attached. Without any, the stock model is attacked.
        name: Name of an attack.
        concept: What must not be seen: a name or a `Concept`. That of the attached erasures when left out.
        size: `smoke`, `quick` or `full`, the paper's: sets the attack's options, and so what it costs.
        suite: Where prompts and judge come from: the suite's samples that hold the concept. With `prompts` any model
            and any concept can be attacked: a CLIP model judges (`inputs={"clip": FOLDER}`), or a detector
            (`inputs={"detectors": ["nudenet"]}`).
        inputs: What is given to a suite on prompts, as to `evaluate`: `detectors`, `clip`, `prompts`, `retain` and so
            on. See `erasure.eval.inputs.Inputs`.
        seed: Chooses the noise of the samples; everything random in the attack follows from that.
        out: Folder for the results; a temporary one when left out.
        judge: Detector: a callable from images to answers with `.object` and `.style`; or what `load_judge` takes. The
            suite's own by default.
        images: Keep images as PNG: `before` the attack, `after` it, and the original model's `reference`.
        progress: A progress bar for each prompt, none, or a function that is told of progress.
        baseline_cache: Folder where plain drawings of prompts and the pictures that attacks start from are kept, for
            other attacks on this model or this erasure; `$ERASURE_CACHE` or `~/.cache/erasure` by default. Those of
            another batch size are kept apart. It may be deleted at any time.
        batch_size: Prompts that are attacked in step, so that what they draw and search at the same time is one batch.
            5 where pictures have at most 128x128 pixels, and else 1, when left out. The tries are the same; what is
            drawn and searched in a batch differs from what is alone by rounding. A run that is killed goes on behind
            the last batch that was finished.
        **options: Single options of the attack, in the place of the size's.

    Raises:
        EvaluationError: Unknown attack, suite, size or concept; a folder that holds something else; fused erasures,
            which leave no original model; a judge that does not know the suite's classes.
        OptionError: An option that the attack does not have, or a value that it does not allow; a seed that
            is negative or has more than 63 bits.
        UnsupportedModelError: The attack is not possible on such a model.
        DivergenceError: NaN during optimisation.
    """
    method = attacks.get(name).configured(size, **options)
    given = Inputs.read(inputs or {})
    seed, out = check_seed(seed, "an attack", RunSeed), None if out is None else at_home(out)
    processes = join(out)
    models = Models.of(pipe)
    wanted = one_concept(concept, models)
    kit = suite_of(suite, given, models, wanted)
    found = plan_of(kit, wanted, models, seed, "attack", "attack")
    samples = spread([sample for sample in found.samples if sample.role == "target"], method.samples)
    about = found.recipe | {"size": size, "attack": {"name": name, **dataclasses.asdict(method)}} | _strict(models)
    plan = Plan(name, size, seed, found.targets, tuple(samples), about)
    # An attack puts hooks on what it attacks, which nobody who draws with the pipeline meanwhile must feel.
    models = dataclasses.replace(models, pipe=ErasureManager(models.pipe).twin())
    if lack := method.lacks(backbone_for(models.pipe)):
        raise UnsupportedModelError(f"attack {name} cannot be tried on a {type(models.pipe).__name__}: {lack}")
    subject = Subject.of(models, judge_of(judge, kit, plan))
    count = in_step_of(batch_size, plan.samples)
    with _opened(processes, subject, plan, out, images, progress, count) as run:
        drawings, originals = _caches(subject, baseline_cache, images, count)
        victim = Victim(
            models.pipe, models.stock, found.targets[0], subject.judge,
            lambda sample, image: run.keep("reference", sample, image),
            samples=plan.samples, seed=seed, folder=run.table.folder, drawings=drawings, originals=originals,
        )  # fmt: skip
        rows = run.finish(victim, lambda sample, shown: attacked(run, victim, method, sample, shown), method.tries)
        if rows is None:
            return Results.load(run.table.folder)
        made_by = {
            "attack": name, "size": size, "options": dataclasses.asdict(method), "model": model_name(models.pipe),
            "against": [_method(entry["erasure"], entry["strength"]) for entry in models.entries],
        }  # fmt: skip
        won = [row for row in rows if row["success"] and not row["before"]["shown"]]
        kept = [
            AdversarialPrompt(
                Sample.from_row(row), row["text"], victim.target, made_by, row.get("others", {}), row.get("attempt")
            )
            for row in won
            if row["text"] is not None or row.get("attempt") is not None
        ]
        write_prompts(run.table.folder, kept)
        rate = "chance_ASR" if method.measures_chance else "ASR"
        return run.save(("pre_ASR", rate, "held_by_refusal", "control_seen"), rows)


def replay(
    pipe: DiffusionPipeline,
    prompts: str | Path | Sequence[tuple[str, int | None]],
    concept: str | Concept | None = None,
    *,
    attack: str | None = None,
    suite: str = "canvas",
    inputs: Mapping[str, object] | None = None,
    out: str | Path | None = None,
    judge: Judge | str | Path | None = None,
    images: bool = True,
    progress: bool | Progress = True,
    baseline_cache: str | Path | None = None,
    batch_size: int | None = None,
) -> Results:
    """Try the prompts that an attack on one erasure found on another one, without any optimisation.

    `transfer_ASR` is the share of them that show the concept, `transfer_pre_ASR` the share of the original prompts
    behind them that do: what is above it is the prompts' doing.

    Args:
        pipe: A diffusers pipeline, with erasures attached.
        prompts: Folder of an attack, or its `adversarial.jsonl`; or texts of others, each with the seed of its noise
            or `None`. Of those nobody knows the original prompts, so that there is no `transfer_pre_ASR`, and the
            original model must show the concept where it draws them.
        concept: What the prompts must be about; whatever they are when left out, or that of the attached erasures for
            texts of others.
        attack: Name of the attack that texts of others are of.
        suite: Where the judge and the classes come from.
        inputs: As for `attack`.
        out: As for `attack`.
        judge: As for `attack`.
        images: As for `attack`.
        progress: As for `attack`.
        baseline_cache: As for `attack`.
        batch_size: As for `attack`.

    Raises:
        EvaluationError: Prompts that are missing, damaged or about another concept, and as for `attack`.
    """
    models, to_suite = Models.of(pipe), Inputs.read(inputs or {})
    if isinstance(prompts, str | Path):
        given = read_prompts(prompts)
        kit = suite_of(suite, to_suite, models, given[0].target.name if concept is None else concept)
        if concept is not None:
            wanted, found = kit.plan(pipe, [concept], "smoke", 0).targets[0], given[0].target
            if (wanted.domain, wanted.members) != (found.domain, found.members):
                raise EvaluationError(
                    f"the prompts in {prompts} are about {found.name!r}, not about {wanted.name!r}: give those of "
                    "an attack on it"
                )
    else:
        about_concept = one_concept(concept, models)
        kit = suite_of(suite, to_suite, models, about_concept)
        own = kit.plan(pipe, [about_concept], "smoke", 0)
        like = next(sample for sample in own.samples if sample.role == "target")
        given = listed_prompts(prompts, like, own.targets[0], {"attack": attack or "list", "source": "list of others"})
    first = given[0]
    steps, guidance, height, width = first.sample.settings
    about = {
        "made_by": first.made_by, "num_inference_steps": steps, "guidance_scale": guidance,
        "resolution": f"{width}x{height}", "controls": LIMITS, **_strict(models),
    }  # fmt: skip
    name, size = first.made_by["attack"], str(first.made_by.get("size"))
    plan = Plan(name, size, 0, (first.target,), tuple(prompt.sample for prompt in given), about)
    texts = {prompt.sample.sample_id: prompt for prompt in given}
    fingerprint = digest(
        [
            [name, prompt.text, dict(prompt.others), *([] if prompt.stored is None else [prompt.stored])]
            for name, prompt in sorted(texts.items())
        ]
    )
    out = None if out is None else at_home(out)
    processes = join(out)
    subject = Subject.of(models, judge_of(judge, kit, plan))
    count = in_step_of(batch_size, plan.samples)
    with _opened(processes, subject, plan, out, images, progress, count, fingerprint) as run:
        drawings, originals = _caches(subject, baseline_cache, images, count)
        victim = Victim(
            models.pipe, models.stock, first.target, subject.judge, drawings=drawings, originals=originals
        )  # fmt: skip
        rows = run.finish(
            victim, lambda sample, shown: replayed(run, victim, sample, texts[sample.sample_id], shown), 1
        )
        if rows is None:
            return Results.load(run.table.folder)
        rates = ("transfer_ASR",) if "source" in first.made_by else ("transfer_pre_ASR", "transfer_ASR")
        return run.save((*rates, "held_by_refusal", "control_seen"), rows)


def in_step_of(given: int | None, samples: Sequence[Sample]) -> int:
    """How many prompts are attacked in step.

    Raises:
        EvaluationError: A number below 1.
    """
    if given is None:
        return IN_STEP if all(sample.height * sample.width <= SMALL for sample in samples) else 1
    if given < 1:
        raise EvaluationError(f"a batch size of {given}; allowed: 1 or more")
    return given


def _caches(
    subject: Subject, root: str | Path | None, images: bool, batch_size: int
) -> tuple[DrawingCache | None, DrawingCache]:
    """Where plain drawings of the pipeline, kept only where images are, and of the original model are found."""
    folder, alone = Path(root or cache_folder()), {"batch_size": batch_size}
    originals = DrawingCache(folder, subject.drawing | alone)
    if not subject.erasures:
        return originals, originals
    return DrawingCache(folder, subject.erased_drawing | alone) if images else None, originals


def _strict(models: Models) -> Record:
    """What a recipe says of a pipeline that refuses what goes around its erasures."""
    return {"strict": True} if models.is_strict else {}


def _method(erasure: Erasure, strength: float) -> str:
    """A strategy with a fingerprint of its options, the same for every concept."""
    label = f"{erasure.config.strategy} ({digest(erasure.config.strategy_config)[:8]})"
    return label if strength == 1 else f"{label} x{strength:g}"


@dataclasses.dataclass
class _Attack(Run):
    """One attack or replay in this process."""

    batch_size: int
    """Prompts that are attacked in step."""

    @property
    def recipe(self) -> Record:
        """Recipe of the metrics."""
        return self.plan.recipe | self.subject.sampler | {"judge": self.subject.judge_name}

    @property
    def variant(self) -> str:
        """`before` when the stock model itself is attacked, as results have it."""
        return "after" if self.subject.erasures else "before"

    def finish(
        self, victim: Victim, outcome: Callable[[Sample, Bar], Course[Record]], total: int
    ) -> list[Record] | None:
        """Rows of all samples, in their order, after making those that are missing; only for the main process.

        Args:
            victim: What is attacked.
            outcome: The way to the row of a sample, which moves the progress bar.
            total: Steps of the bar for a sample.
        """
        kind, everything = self.table.variants[0], self.plan.samples
        # Always the same prompts together, so that a run that goes on draws the same batches.
        batches = [everything[first : first + self.batch_size] for first in range(0, len(everything), self.batch_size)]
        left = [rest for batch in batches if (rest := self.pending(kind, batch))]
        with scopes.without_offloading(self.subject.pipe), torch.inference_mode(False), torch.enable_grad():
            for samples in self.share(left):
                ends = dict.fromkeys((everything.index(samples[0]) + 1, everything.index(samples[-1]) + 1))
                label = f"{'-'.join(map(str, ends))}/{len(everything)} {samples[0].prompt}"
                whole = total * len(samples)
                with bar(visible(label, LABEL), whole, unit="text", shown=self.shows_bar) as shown:
                    rows = in_step([outcome(sample, shown) for sample in samples], victim.draw_alike, stepped)
                    shown.set_postfix_str(", ".join(said(row.result) for row in rows))
                for sample, row in zip(samples, rows, strict=True):
                    fixed = {**sample.row(), "variant": kind, "concept": victim.target.name}
                    self.table.append([{**fixed, **row.result, "seconds": row.seconds}], [None])
                    self.tell(sample.sample_id, kind)
        every = self.rows()
        return None if every is None else every.get(kind, [])

    def save(self, names: Sequence[str], rows: Sequence[Row]) -> Results:
        """Compute metrics and write `results.json`.

        Args:
            names: Of the metrics.
            rows: One a prompt.
        """
        plan = dataclasses.replace(self.plan, recipe=self.recipe)
        control = original_control(plan.concept, rows)
        evidence = Evidence(plan, {self.variant: rows}, controls=[control])
        metrics = [row for name in names for row in METRICS.get(name).compute(evidence)]
        cost = attack_cost(rows, self.subject.erasures, time.perf_counter() - self.started)
        results = self.results(metrics, cost | {"batch_size": self.batch_size})
        self.processes.wait()
        return results


@contextmanager
def _opened(
    processes: Processes, subject: Subject, plan: Plan, out: str | Path | None, images: bool,
    progress: bool | Progress, batch_size: int, texts: str | None = None,
) -> Iterator[_Attack]:  # fmt: skip
    """Open the folder, or refuse it.

    Args:
        processes: Who takes part.
        subject: What is attacked.
        plan: Samples and recipe.
        out: As for `attack`.
        images: As for `attack`.
        progress: As for `attack`.
        batch_size: Prompts that are attacked in step.
        texts: Fingerprint of the texts that are tried again, when none are searched.
    """
    kind, schema = ("attack", AttackRow) if texts is None else ("replay", ReplayRow)

    def table(folder: Path) -> SampleTable:
        return SampleTable(folder, plan.samples, processes.rank, processes.count, (kind,), STEM, schema)

    recipe = subject.recipe(plan) | {"kind": kind, "texts": texts}
    if batch_size > 1:  # which changes how rows are rounded
        recipe |= {"batch_size": batch_size}
    with opened(processes, table, recipe, out) as opened_table:
        yield _Attack(subject, plan, opened_table, processes, images, progress, batch_size)
