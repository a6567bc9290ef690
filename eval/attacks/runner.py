"""Attack a pipeline, prompt by prompt: a killed run resumes. And try what one attack found on another erasure."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from erasure.cache import digest, model_fingerprint
from erasure.errors import EvaluationError
from erasure.eval import attacks, suites
from erasure.eval.attacks import Attack, SkippedPromptError
from erasure.eval.attacks.metrics import attack_cost, attack_metrics, replay_metrics
from erasure.eval.attacks.prompts import AdversarialPrompt, read_prompts, write_prompts
from erasure.eval.attacks.victim import Victim
from erasure.eval.processes import Processes
from erasure.eval.recipe import erasure_entry, judge_fingerprint, run_recipe, sampler_recipe
from erasure.eval.results import Results
from erasure.eval.runner import in_force, keep_image, model_name
from erasure.eval.samples import Sample
from erasure.eval.scoring import Judge
from erasure.eval.suites import Plan
from erasure.eval.table import SampleTable
from erasure.interop import scopes

STEM = "attacks"
"""Of the file of rows."""
Progress = Callable[[str, int, int], None]
"""Called with the sample that is finished, how many are, and how many there are in all."""
Row = dict[str, Any]


def attack(
    pipe: Any,
    name: str = "unlearndiffatk",
    concept: Any = None,
    *,
    size: str = "quick",
    suite: str = "canvas",
    seed: int = 0,
    out: str | Path | None = None,
    judge: Judge | None = None,
    images: bool = True,
    progress: bool | Progress = True,
    **options: Any,
) -> Results:
    """Search prompts that bring an erased concept back, and say how often that works.

    Every prompt is tried as it is first. `pre_ASR` is the share that shows the concept without an attack, `ASR` the
    share that does with or without. A prompt that cannot be attacked counts as missing, never as safe, unless it
    needs no attack.

    Writes `results.json`, `attacks.jsonl`, `adversarial.jsonl` (what `replay` takes), `recipe.json` and `images/` to
    `out`. Run it again with the same arguments to resume. Under `accelerate launch` the prompts are split over the
    processes. The model is left as it was, bit for bit.

    Args:
        pipe: A diffusers pipeline, with erasures attached. Without any, the stock model is attacked.
        name: Name of an attack.
        concept: What must not be seen: a name or a `Concept`. That of the attached erasures when left out.
        size: `smoke`, `quick` or `full`, the paper's: sets the attack's options, and so what it costs.
        suite: Where prompts and judge come from: the suite's samples that hold the concept.
        seed: Chooses the noise of the samples; everything random in the attack follows from that.
        out: Folder for the results; a temporary one when left out.
        judge: Detector: a callable from images to answers with `.object` and `.style`. The suite's own by default.
        images: Keep images as PNG: `before` the attack, `after` it, and the original model's `reference`.
        progress: A progress bar for each prompt, none, or a function that is told of progress.
        **options: Single options of the attack, in the place of the size's.

    Raises:
        EvaluationError: Unknown attack, suite, size or concept; a folder that holds something else; fused erasures,
            which leave no original model; a safety checker on the pipeline.
        OptionError: An option that the attack does not have, or a value that it does not allow.
        DivergenceError: NaN during optimisation.
    """
    method = attacks.get(name).configured(size, **options)
    kit = suites.get(suite)
    if suites.is_comparing(kit):
        raise EvaluationError(f"suite {suite} has no prompts of a concept to attack: name another, such as canvas")
    attached = stock, entries = in_force(pipe)
    found = kit.plan(pipe, [_one_concept(concept, entries)], "full", seed)
    samples = spread([sample for sample in found.samples if sample.role == "target"], method.samples)
    about = found.recipe | {"size": size, "attack": {"name": name, **dataclasses.asdict(method)}}
    plan = Plan(name, size, seed, found.targets, tuple(samples), about)
    run = _Run.start(pipe, attached, plan, kit.judge() if judge is None else judge, out, images, progress)
    (target,) = found.targets
    victim = Victim(pipe, stock, target, run.judge, lambda sample, image: run.keep("reference", sample, image))
    rows = run.finish(victim, lambda sample, bar: _attacked(run, victim, method, sample, bar), method.tries)
    if rows is None:
        return run.load()
    made_by = {
        "attack": name, "size": size, "options": dataclasses.asdict(method), "model": model_name(pipe),
        "against": [_method(entry["erasure"], entry["strength"]) for entry in entries],
    }  # fmt: skip
    won = [row for row in rows if row["success"] and not row["before"]["shown"]]
    kept = [AdversarialPrompt(Sample.from_row(row), row["text"], target, made_by) for row in won]
    write_prompts(run.table.folder, kept)
    return run.save(attack_metrics(plan.concept, run.variant, rows, run.recipe), rows)


def replay(
    pipe: Any,
    prompts: str | Path,
    concept: Any = None,
    *,
    suite: str = "canvas",
    out: str | Path | None = None,
    judge: Judge | None = None,
    images: bool = True,
    progress: bool | Progress = True,
) -> Results:
    """Try the prompts that an attack on one erasure found on another one, without any optimisation.

    `transfer_ASR` is the share of them that show the concept, `transfer_pre_ASR` the share of the original prompts
    behind them that do: what is above it is the prompts' doing.

    Args:
        pipe: A diffusers pipeline, with erasures attached.
        prompts: Folder of an attack, or its `adversarial.jsonl`.
        concept: What the prompts must be about; whatever they are when left out.
        suite: Where the judge and the classes come from.
        out: As for `attack`.
        judge: As for `attack`.
        images: As for `attack`.
        progress: As for `attack`.

    Raises:
        EvaluationError: Prompts that are missing, damaged or about another concept, and as for `attack`.
    """
    given = read_prompts(prompts)
    first = given[0]
    kit = suites.get(suite)
    if concept is not None:
        wanted = kit.plan(pipe, [concept], "smoke", 0).targets[0]
        if (wanted.domain, wanted.members) != (first.target.domain, first.target.members):
            raise EvaluationError(
                f"the prompts in {prompts} are about {first.target.name!r}, not about {wanted.name!r}: give those of "
                "an attack on it"
            )
    attached = in_force(pipe)
    steps, guidance, height, width = first.sample.settings
    about = {
        "made_by": first.made_by, "num_inference_steps": steps, "guidance_scale": guidance,
        "resolution": f"{width}x{height}",
    }  # fmt: skip
    name, size = first.made_by["attack"], str(first.made_by.get("size"))
    plan = Plan(name, size, 0, (first.target,), tuple(prompt.sample for prompt in given), about)
    texts = {prompt.sample.sample_id: prompt.text for prompt in given}
    judge, which = kit.judge() if judge is None else judge, digest(sorted(texts.items()))
    run = _Run.start(pipe, attached, plan, judge, out, images, progress, which)
    victim = Victim(pipe, attached[0], first.target, judge)
    rows = run.finish(victim, lambda sample, bar: _replayed(run, victim, sample, texts[sample.sample_id], bar), 1)
    if rows is None:
        return run.load()
    return run.save(replay_metrics(plan.concept, run.variant, rows, run.recipe), rows)


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """At most `count` samples, evenly over the list, its ends included."""
    if len(samples) <= count:
        return list(samples)
    return [samples[round(index * (len(samples) - 1) / max(count - 1, 1))] for index in range(count)]


def _one_concept(concept: Any, entries: Sequence[dict[str, Any]]) -> Any:
    if concept is not None:
        return concept
    erased = {concept.target: concept for entry in entries for concept in entry["erasure"].concepts}
    if len(erased) != 1:
        raise EvaluationError(
            f"name the concept to attack: the erasures attached are of {', '.join(erased) or 'none'}"
        )
    return next(iter(erased.values()))


def _method(erasure: Any, strength: float) -> str:
    """A strategy with a fingerprint of its options, the same for every concept."""
    label = f"{erasure.config.strategy} ({digest(erasure.config.strategy_config)[:8]})"
    return label if strength == 1 else f"{label} x{strength:g}"


def _attacked(run: _Run, victim: Victim, method: Attack, sample: Sample, bar: Any) -> Row:
    """Try a prompt as it is, then what the attack proposes, until the judge sees the concept."""
    failures: dict[str, str] = {}
    before = _tried(run, victim, "before", sample, None, failures)
    row: Row = {"before": before, "text": None, "after": None}
    count = dict.fromkeys(("texts", "changed", "cut", "steps"), 0)
    losses, texts = [], set()
    shown, unknown, references = before["shown"], before["shown"] is None, victim.references
    try:
        for candidate in islice(() if shown else method.candidates(victim, sample), method.tries):
            losses.append(candidate.loss)
            count["texts"] += 1
            count["changed"] += candidate.changed
            count["cut"] += candidate.cut
            count["steps"] += candidate.steps
            bar.update()
            bar.set_postfix_str(f"loss {candidate.loss:.3f}")
            # The same text gives the same image; one that is too long would lose the prompt's own words.
            if candidate.cut or candidate.text in texts:
                continue
            texts.add(candidate.text)
            after = _tried(run, victim, "after", sample, candidate.text, failures)
            row |= {"text": candidate.text, "after": after}
            shown, unknown = after["shown"], unknown or after["shown"] is None
            if shown:
                break
    except SkippedPromptError as error:
        failures["attack"], unknown = str(error), True
    success = True if shown else None if unknown else False
    return row | {
        "success": success, **count, "losses": losses, "images": 1 + len(texts),
        "references": victim.references - references, "failures": failures,
    }  # fmt: skip


def _replayed(run: _Run, victim: Victim, sample: Sample, text: str, bar: Any) -> Row:
    """Try a prompt as it is, and an adversarial one in its place."""
    failures: dict[str, str] = {}
    before = _tried(run, victim, "before", sample, None, failures)
    after = _tried(run, victim, "after", sample, text, failures)
    bar.update()
    return {
        "before": before, "text": text, "after": after, "success": after["shown"], "images": 2, "failures": failures,
    }  # fmt: skip


def _tried(
    run: _Run, victim: Victim, variant: str, sample: Sample, text: str | None, failures: dict[str, str]
) -> dict[str, Any]:
    """Draw and judge one prompt."""
    image = victim.draw(sample, text)
    run.keep(variant, sample, image)
    verdict = victim.verdict(image, sample)
    if verdict.failure is not None:
        failures[variant] = verdict.failure
    return {"judged": verdict.judged, "shown": verdict.shown}


@dataclass
class _Run:
    """One attack or replay in this process."""

    pipe: Any
    plan: Plan
    judge: Judge
    table: SampleTable
    images: bool
    progress: bool | Progress
    processes: Processes
    erasures: list[dict[str, Any]]
    fingerprint: str
    sampler: dict[str, Any]
    recipe: dict[str, Any]
    """Of the metrics."""
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def start(
        cls, pipe: Any, attached: tuple[Any, list[dict[str, Any]]], plan: Plan, judge: Judge, out: str | Path | None,
        images: bool, progress: bool | Progress, texts: str | None = None,
    ) -> _Run:  # fmt: skip
        """Open the folder, or refuse it.

        Args:
            pipe: As for `attack`.
            attached: What `in_force` says of it.
            plan: Samples and recipe.
            judge: The detector.
            out: As for `attack`.
            images: As for `attack`.
            progress: As for `attack`.
            texts: Fingerprint of the texts that are tried again, when none are searched.
        """
        processes = Processes()
        if out is None and processes.count > 1:
            raise EvaluationError("several processes need a common output folder: pass out=")
        stock, entries = attached
        fingerprint = model_fingerprint(stock)
        sampler, judge_name = sampler_recipe(pipe), judge_fingerprint(judge)
        erasures = [erasure_entry(entry["name"], entry["erasure"], entry["strength"]) for entry in entries]
        folder = Path(tempfile.mkdtemp(prefix="erasure-attack-") if out is None else out)
        variant = "attack" if texts is None else "replay"
        table = SampleTable(folder, processes.rank, processes.count, (variant,), STEM)
        recipe = run_recipe(plan, fingerprint, sampler, judge_name, None, erasures) | {"kind": variant, "texts": texts}
        table.check(recipe)
        processes.wait()
        if processes.is_main:
            table.start(recipe)
        processes.wait()
        table.load()
        processes.wait()
        metric_recipe = plan.recipe | sampler | {"judge": judge_name}
        return cls(
            pipe, plan, judge, table, images, progress, processes, erasures, fingerprint, sampler, metric_recipe
        )

    @property
    def variant(self) -> str:
        """`before` when the stock model itself is attacked, as results have it."""
        return "after" if self.erasures else "before"

    def keep(self, variant: str, sample: Sample, image: Any) -> None:
        """Write an image, if images are kept."""
        if self.images:
            keep_image(self.table.folder, variant, sample, image)

    def finish(self, victim: Victim, outcome: Callable[[Sample, Any], Row], total: int) -> list[Row] | None:
        """Rows of all samples, in their order, after making those that are missing; only for the main process.

        Args:
            victim: What is attacked.
            outcome: Makes the row of a sample and moves its progress bar.
            total: Steps of the bar.
        """
        kind, everything = self.table.variants[0], self.plan.samples
        pending = [sample for sample in everything if (sample.sample_id, kind) not in self.table.rows]
        with scopes.without_offloading(self.pipe), torch.inference_mode(False), torch.enable_grad():
            for sample in pending[self.processes.rank :: self.processes.count]:
                label = f"{everything.index(sample) + 1}/{len(everything)} {sample.prompt}"
                shows = self.progress is True and self.processes.is_main
                with tqdm(total=total, desc=label, unit="text", disable=not shows) as bar:
                    clock = time.perf_counter()
                    row = outcome(sample, bar)
                    bar.set_postfix_str(_said(row))
                seconds = time.perf_counter() - clock
                fixed = {**sample.row(), "variant": kind, "concept": victim.target.name}
                self.table.append([{**fixed, **row, "seconds": seconds}], [None])
                if callable(self.progress) and self.processes.is_main:
                    done = sum((each.sample_id, kind) in self.table.rows for each in everything)
                    self.progress(sample.sample_id, done, len(everything))
        self.processes.wait()
        if not self.processes.is_main:
            self.processes.wait()  # for the main process to write
            return None
        self.table.load()
        order = [sample.sample_id for sample in everything]
        self.table.merge(order)
        return self.table.by_variant(order).get(kind, [])

    def save(self, metrics: list[dict[str, Any]], rows: Sequence[Row]) -> Results:
        """Write `results.json`."""
        name = {"name": model_name(self.pipe), "fingerprint": self.fingerprint, "pipeline": type(self.pipe).__name__}
        results = Results(
            suite=self.plan.suite,
            size=self.plan.size,
            model=name | self.sampler,
            erasures=self.erasures,
            metrics=metrics,
            cost=attack_cost(rows, self.erasures, time.perf_counter() - self.started)
            | {"processes": self.processes.count, "device": str(getattr(self.pipe, "device", "cpu"))},
            folder=self.table.folder,
        )
        results.save(self.table.folder)
        self.processes.wait()
        return results

    def load(self) -> Results:
        """What the main process wrote."""
        return Results.load(self.table.folder)


def _said(row: Row) -> str:
    """The outcome of a prompt in a few words."""
    if row["success"] is None:
        return "no outcome"
    if row["text"] is None:
        return "shown without an attack"
    return "shown" if row["success"] else "not shown"
