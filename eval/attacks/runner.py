"""Attack a pipeline, prompt by prompt: a killed run resumes. And try what one attack found on another erasure."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from erasure.artifact import Erasure
from erasure.attach import ErasureManager
from erasure.backbones import backbone_for
from erasure.cache import cache_folder
from erasure.concept import Concept
from erasure.errors import BypassedErasureError, EvaluationError, UnsupportedModelError
from erasure.eval import attacks, suites
from erasure.eval.attacks import Attack, SkippedPromptError
from erasure.eval.attacks.prompts import AdversarialPrompt, listed_prompts, read_prompts, write_prompts
from erasure.eval.attacks.stored import UnstorableError, store
from erasure.eval.attacks.victim import ORDINARY, Victim
from erasure.eval.attempts import Attempt
from erasure.eval.controls import LIMITS
from erasure.eval.cost import attack_cost
from erasure.eval.drawings import DrawingCache
from erasure.eval.evidence import Evidence
from erasure.eval.metrics import METRICS
from erasure.eval.metrics.attacked import original_control
from erasure.eval.one_concept import one_concept, plan_of, spread
from erasure.eval.processes import Processes
from erasure.eval.results import Results
from erasure.eval.rows import Record, Row
from erasure.eval.run import Models, Progress, Run, Subject, join, judge_of, model_name, opened
from erasure.eval.samples import Sample
from erasure.eval.schemas import AttackRow, ReplayRow
from erasure.eval.scoring import Judge
from erasure.eval.suites import Plan
from erasure.eval.table import SampleTable
from erasure.files import digest
from erasure.guards import unguarded
from erasure.interop import scopes
from erasure.shown import LABEL, visible

STEM = "attacks"
"""Of the file of rows."""


def attack(
    pipe: DiffusionPipeline,
    name: str = "unlearndiffatk",
    concept: str | Concept | None = None,
    *,
    size: str = "quick",
    suite: str = "canvas",
    seed: int = 0,
    out: str | Path | None = None,
    judge: Judge | str | Path | None = None,
    images: bool = True,
    progress: bool | Progress = True,
    baseline_cache: str | Path | None = None,
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
        suite: Where prompts and judge come from: the suite's samples that hold the concept.
        seed: Chooses the noise of the samples; everything random in the attack follows from that.
        out: Folder for the results; a temporary one when left out.
        judge: Detector: a callable from images to answers with `.object` and `.style`; or what `load_judge` takes. The
            suite's own by default.
        images: Keep images as PNG: `before` the attack, `after` it, and the original model's `reference`.
        progress: A progress bar for each prompt, none, or a function that is told of progress.
        baseline_cache: Folder where plain drawings of prompts and the pictures that attacks start from are kept, for
            other attacks on this model or this erasure; `$ERASURE_CACHE` or `~/.cache/erasure` by default. They are
            the same to the bit. It may be deleted at any time.
        **options: Single options of the attack, in the place of the size's.

    Raises:
        EvaluationError: Unknown attack, suite, size or concept; a folder that holds something else; fused erasures,
            which leave no original model; a judge that does not know the suite's classes.
        OptionError: An option that the attack does not have, or a value that it does not allow.
        UnsupportedModelError: The attack is not possible on such a model.
        DivergenceError: NaN during optimisation.
    """
    method = attacks.get(name).configured(size, **options)
    kit = suites.get(suite)
    processes = join(out, seed)
    models = Models.of(pipe)
    found = plan_of(kit, concept, models, seed, "attack", "attack")
    samples = spread([sample for sample in found.samples if sample.role == "target"], method.samples)
    about = found.recipe | {"size": size, "attack": {"name": name, **dataclasses.asdict(method)}} | _strict(models)
    plan = Plan(name, size, seed, found.targets, tuple(samples), about)
    # An attack puts hooks on what it attacks, which nobody who draws with the pipeline meanwhile must feel.
    models = dataclasses.replace(models, pipe=ErasureManager(models.pipe).twin())
    if lack := method.lacks(backbone_for(models.pipe)):
        raise UnsupportedModelError(f"attack {name} cannot be tried on a {type(models.pipe).__name__}: {lack}")
    subject = Subject.of(models, judge_of(judge, kit, plan))
    with _opened(processes, subject, plan, out, images, progress) as run:
        victim = Victim(
            models.pipe, models.stock, found.targets[0], subject.judge,
            lambda sample, image: run.keep("reference", sample, image),
            samples=plan.samples, seed=seed, folder=run.table.folder, **_caches(subject, baseline_cache, images),
        )  # fmt: skip
        rows = run.finish(victim, lambda sample, bar: _attacked(run, victim, method, sample, bar), method.tries)
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
    out: str | Path | None = None,
    judge: Judge | str | Path | None = None,
    images: bool = True,
    progress: bool | Progress = True,
    baseline_cache: str | Path | None = None,
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
        out: As for `attack`.
        judge: As for `attack`.
        images: As for `attack`.
        progress: As for `attack`.
        baseline_cache: As for `attack`.

    Raises:
        EvaluationError: Prompts that are missing, damaged or about another concept, and as for `attack`.
    """
    kit, models = suites.get(suite), Models.of(pipe)
    if isinstance(prompts, str | Path):
        given = read_prompts(prompts)
        if concept is not None:
            wanted, found = kit.plan(pipe, [concept], "smoke", 0).targets[0], given[0].target
            if (wanted.domain, wanted.members) != (found.domain, found.members):
                raise EvaluationError(
                    f"the prompts in {prompts} are about {found.name!r}, not about {wanted.name!r}: give those of "
                    "an attack on it"
                )
    else:
        own = kit.plan(pipe, [one_concept(concept, models)], "smoke", 0)
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
    processes = join(out)
    subject = Subject.of(models, judge_of(judge, kit, plan))
    with _opened(processes, subject, plan, out, images, progress, fingerprint) as run:
        caches = _caches(subject, baseline_cache, images)
        victim = Victim(models.pipe, models.stock, first.target, subject.judge, **caches)
        rows = run.finish(victim, lambda sample, bar: _replayed(run, victim, sample, texts[sample.sample_id], bar), 1)
        if rows is None:
            return Results.load(run.table.folder)
        rates = ("transfer_ASR",) if "source" in first.made_by else ("transfer_pre_ASR", "transfer_ASR")
        return run.save((*rates, "held_by_refusal", "control_seen"), rows)


def _caches(subject: Subject, root: str | Path | None, images: bool) -> dict[str, DrawingCache | None]:
    """Where a victim finds plain drawings; those of the erased model are kept only where images are."""
    folder, alone = Path(root or cache_folder()), {"batch_size": 1}
    originals = DrawingCache(folder, subject.drawing | alone)
    if not subject.erasures:
        return {"drawings": originals, "originals": originals}
    return {
        "drawings": DrawingCache(folder, subject.erased_drawing | alone) if images else None,
        "originals": originals,
    }


def _strict(models: Models) -> Record:
    """What a recipe says of a pipeline that refuses what goes around its erasures."""
    return {"strict": True} if models.is_strict else {}


def _method(erasure: Erasure, strength: float) -> str:
    """A strategy with a fingerprint of its options, the same for every concept."""
    label = f"{erasure.config.strategy} ({digest(erasure.config.strategy_config)[:8]})"
    return label if strength == 1 else f"{label} x{strength:g}"


def _attacked(run: _Attack, victim: Victim, method: Attack, sample: Sample, bar: tqdm) -> Record:
    """Try a prompt as it is, then what the attack proposes, until the judge sees the concept."""
    failures: dict[str, str] = {}
    references, recalled = victim.references, victim.recalled
    before = _tried(run, victim, "before", sample, ORDINARY, failures)
    row: Record = {"before": before, "text": None, "others": {}, "after": None}
    count = dict.fromkeys(("texts", "changed", "cut", "steps"), 0)
    losses, tried, asked, refused = [], set(), 0, 0
    shown, unknown = before["shown"], _is_unknown(before)
    control = _control(run, victim, sample, before)
    try:
        for attempt in islice(() if shown else _searched(method, victim, sample), method.tries):
            losses.append(attempt.loss)
            count["texts"] += 1
            count["changed"] += attempt.changed
            count["cut"] += attempt.cut
            count["steps"] += attempt.steps
            bar.update()
            if attempt.loss is not None:
                bar.set_postfix_str(f"loss {attempt.loss:.3f}")
            # The same text gives the same image; one that is too long would lose the prompt's own words.
            if attempt.cut or (attempt.key is not None and attempt.key in tried):
                continue
            tried.add(attempt.key)
            asked += 1
            after = _tried(run, victim, "after", sample, attempt, failures)
            refused += "refused" in after
            row |= {"text": attempt.text, "others": attempt.others, "after": after}
            shown, unknown = after["shown"], unknown or _is_unknown(after)
            if shown:
                # What is more than a text cannot be tried again from the text.
                row |= {} if attempt.is_text else {"text": None, "others": {}, **_stored(run, sample, attempt)}
                break
    except SkippedPromptError as error:
        failures["attack"], unknown = str(error), True
    held = 0 < asked == refused
    success = True if shown else None if unknown or held else False
    return row | {
        "success": success, **count, "losses": losses, "control": control,
        "images": asked - refused + ("refused" not in before),
        "references": victim.references - references, "recalled": victim.recalled - recalled, "failures": failures,
        **({"refused": refused, "held": held} if victim.is_strict else {}),
    }  # fmt: skip


def _searched(method: Attack, victim: Victim, sample: Sample) -> Iterator[Attempt]:
    """What an attack proposes. Guards look at what is drawn: whoever searches has the networks, and asks nobody."""
    attempts = method.attempts(victim, sample)
    while True:
        with unguarded():
            attempt = next(attempts, None)
        if attempt is None:
            return
        yield attempt


def _is_unknown(tried: Record) -> bool:
    """Whether an image was drawn, and nobody knows what it shows."""
    return tried["shown"] is None and "refused" not in tried


def _stored(run: _Attack, sample: Sample, attempt: Attempt) -> Record:
    """Write a success that is no text down; nothing where an attack of others has a change that cannot be."""
    try:
        return {"attempt": store(attempt, run.table.folder, sample.sample_id)}
    except UnstorableError:
        return {}


def _replayed(run: _Attack, victim: Victim, sample: Sample, prompt: AdversarialPrompt, bar: tqdm) -> Record:
    """Try a prompt as it is, and an adversarial one in its place."""
    failures: dict[str, str] = {}
    recalled = victim.recalled
    before = _tried(run, victim, "before", sample, ORDINARY, failures)
    # A text of others stands for itself: what it draws has been drawn.
    is_itself = prompt.stored is None and prompt.text == sample.prompt and not prompt.others
    after = before if is_itself else _tried(run, victim, "after", sample, prompt.attempt, failures)
    bar.update()
    refused, drawn = "refused" in after, [before] if is_itself else [before, after]
    return {
        "before": before, "text": prompt.text, "others": dict(prompt.others), "after": after,
        "success": after["shown"], "images": sum("refused" not in tried for tried in drawn), "failures": failures,
        "control": _control(run, victim, sample, before), "recalled": victim.recalled - recalled,
        **({"refused": int(refused), "held": refused} if victim.is_strict else {}),
    }  # fmt: skip


def _tried(
    run: _Attack, victim: Victim, variant: str, sample: Sample, attempt: Attempt, failures: dict[str, str]
) -> Record:  # fmt: skip
    """Draw and judge one attempt; one that the pipeline refuses has no image, and the reason in `refused`."""
    try:
        image = victim.draw(sample, attempt)
    except BypassedErasureError as error:
        return {"judged": None, "shown": None, "refused": str(error)}
    run.keep(variant, sample, image)
    verdict = victim.verdict(image if attempt.box is None else image.crop(attempt.box), sample)
    if verdict.failure is not None:
        failures[variant] = verdict.failure
    return {"judged": verdict.judged, "shown": verdict.shown}


def _control(run: _Attack, victim: Victim, sample: Sample, before: Record) -> Record:
    """Answer of the judge on the original model's image of the prompt, which must show the concept."""
    if not run.subject.erasures:
        return before
    verdict = victim.verdict(victim.draw(sample, stock=True), sample)
    return {"judged": verdict.judged, "shown": verdict.shown}


class _Attack(Run):
    """One attack or replay in this process."""

    @property
    def recipe(self) -> Record:
        """Recipe of the metrics."""
        return self.plan.recipe | self.subject.sampler | {"judge": self.subject.judge_name}

    @property
    def variant(self) -> str:
        """`before` when the stock model itself is attacked, as results have it."""
        return "after" if self.subject.erasures else "before"

    def finish(self, victim: Victim, outcome: Callable[[Sample, tqdm], Record], total: int) -> list[Record] | None:
        """Rows of all samples, in their order, after making those that are missing; only for the main process.

        Args:
            victim: What is attacked.
            outcome: Makes the row of a sample and moves its progress bar.
            total: Steps of the bar.
        """
        kind, everything = self.table.variants[0], self.plan.samples
        with scopes.without_offloading(self.subject.pipe), torch.inference_mode(False), torch.enable_grad():
            for sample in self.share(self.pending(kind)):
                label = f"{everything.index(sample) + 1}/{len(everything)} {sample.prompt}"
                with tqdm(total=total, desc=visible(label, LABEL), unit="text", disable=not self.shows_bar) as bar:
                    clock = time.perf_counter()
                    row = outcome(sample, bar)
                    bar.set_postfix_str(_said(row))
                seconds = time.perf_counter() - clock
                fixed = {**sample.row(), "variant": kind, "concept": victim.target.name}
                self.table.append([{**fixed, **row, "seconds": seconds}], [None])
                self.tell(sample.sample_id, kind)
        rows = self.rows()
        return None if rows is None else rows.get(kind, [])

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
        results = self.results(metrics, attack_cost(rows, self.subject.erasures, time.perf_counter() - self.started))
        self.processes.wait()
        return results


@contextmanager
def _opened(
    processes: Processes, subject: Subject, plan: Plan, out: str | Path | None, images: bool,
    progress: bool | Progress, texts: str | None = None,
) -> Iterator[_Attack]:  # fmt: skip
    """Open the folder, or refuse it.

    Args:
        processes: Who takes part.
        subject: What is attacked.
        plan: Samples and recipe.
        out: As for `attack`.
        images: As for `attack`.
        progress: As for `attack`.
        texts: Fingerprint of the texts that are tried again, when none are searched.
    """
    kind, schema = ("attack", AttackRow) if texts is None else ("replay", ReplayRow)

    def table(folder: Path) -> SampleTable:
        return SampleTable(folder, plan.samples, processes.rank, processes.count, (kind,), STEM, schema)

    recipe = subject.recipe(plan) | {"kind": kind, "texts": texts}
    with opened(processes, table, recipe, out) as opened_table:
        yield _Attack(subject, plan, opened_table, processes, images, progress)


def _said(row: Row) -> str:
    """The outcome of a prompt in a few words."""
    if row.get("held"):
        return "refused"
    if row["success"] is None:
        return "no outcome"
    if row["before"]["shown"]:
        return "shown without an attack"
    return "shown" if row["success"] else "not shown"
