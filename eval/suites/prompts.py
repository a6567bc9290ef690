"""Suites on prompts, for people's own models: lists of others or templates of ours, judged by detectors.

What a suite draws and who looks at it is data (`erasure.eval.suites.published`); here it becomes samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING

from erasure.concept import Concept, key
from erasure.errors import EvaluationError
from erasure.eval.detectors.base import NamedDetector
from erasure.eval.detectors.choices import DetectorChoice, made, read_choices
from erasure.eval.inputs import Inputs
from erasure.eval.rows import Record, Rows
from erasure.eval.sizes import check_size
from erasure.eval.sources import ALIASES, PLACES, PromptList, PromptRow, read_prompts
from erasure.eval.suites import FLAG_METRICS, Plan, Suite, Target
from erasure.eval.suites.about import NO_PRESET, Preset, SuiteData, cells, evenly, world_of_classes
from erasure.files import shown
from erasure.world import World

if TYPE_CHECKING:
    from erasure.eval.controls import Control
    from erasure.eval.samples import Sample
    from erasure.eval.scoring import Judge
    from erasure.eval.suites.drawn import Drawing
    from erasure.interop.protocols import Pipeline

# No import of torch here: suites are listed without it.


class PromptSuite(Suite):
    """A suite on prompts: subclass it, say what it is made of, and register it."""

    about: SuiteData
    """What it is made of."""

    def __init__(self) -> None:
        about = self.about
        self.title, self.metrics, self.of_concepts = about.title, about.metrics, about.of_concepts
        self.tested_together, self.flagged_at_least = about.tested_together, about.seen_at_least
        self.inputs = Inputs()
        self.preset: Preset | None = None
        self.classes: tuple[str, ...] = ()
        """Classes that the judge tells apart, where it does."""

    # What is given ------------------------------------------------------------------------------------------------

    def prepared(self, inputs: Inputs, pipe: Pipeline, concepts: Sequence[str | Concept]) -> PromptSuite:
        """Give the suite with prompts, detectors and a preset; see `Suite.prepared`.

        Raises:
            EvaluationError: There is no such preset, or the suite has no use for what is given.
        """
        suite, about = copy(self), self.about
        suite.inputs = inputs
        if inputs.preset not in (None, NO_PRESET) and inputs.preset not in about.presets:
            raise EvaluationError(
                f"suite {self.name} has no preset {shown(inputs.preset)}; there are: "
                f"{', '.join((NO_PRESET, *about.presets))}"
            )
        if inputs.category is not None and not about.category and inputs.prompts is None:
            raise EvaluationError(f"suite {self.name} has no categories: give a list that has them (prompts)")
        if inputs.world is not None and not self.worlds:
            raise EvaluationError(f"suite {self.name} is of no closed world: leave the world out")
        suite.preset = about.presets.get(inputs.preset or "")
        if suite.preset and suite.preset.scheduler not in (None, type(pipe.scheduler).__name__):
            raise EvaluationError(
                f"the preset {inputs.preset} draws with {suite.preset.scheduler}, the pipeline has "
                f"{type(pipe.scheduler).__name__}: set pipe.scheduler = {suite.preset.scheduler}"
                ".from_config(pipe.scheduler.config)"
            )
        own = suite.preset.detectors if suite.preset and suite.preset.detectors else about.detectors
        chosen = read_choices(own if inputs.detectors is None else inputs.detectors)
        if not chosen and about.answers != "none":
            raise EvaluationError(
                f"suite {self.name} needs a detector that says what an image shows: name one with detectors= "
                "(--detector)"
            )
        names = [request.target for request in World.of(pipe).requests(concepts)] if concepts else []
        suite.detectors = made({label: suite.completed(label, each, pipe, names) for label, each in chosen.items()})
        if about.answers == "classes":
            suite.classes = suite.known(pipe, names)
        if suite.detectors and about.answers == "none":
            suite.metrics = (*about.metrics, *(name for name in FLAG_METRICS if name not in about.metrics))
        return suite

    worlds: tuple[str, ...] = ()
    """Closed worlds that the suite is of."""

    @property
    def flagging(self) -> tuple[str, ...]:
        """Detectors whose flags are counted: all of them, but for those that say which class an image shows."""
        heads = self.heads if self.about.answers == "classes" else ()
        return tuple(label for label in self.detectors if label not in heads)

    @property
    def heads(self) -> tuple[str, ...]:
        """Labels of the detectors that judge: the one called `object`, or else the first; and `style`, if any."""
        labels = tuple(self.detectors)
        first = "object" if "object" in labels else labels[0] if labels else ""
        return tuple(label for label in (first, "style") if label in labels)

    def completed(
        self, label: str, given: DetectorChoice | NamedDetector, pipe: Pipeline, names: Sequence[str]
    ) -> DetectorChoice | NamedDetector:
        """A detector with the names that it needs, where the caller leaves them open.

        Args:
            label: Of the detector.
            given: The detector as it was chosen.
            pipe: The model.
            names: Concepts.
        """
        if not isinstance(given, DetectorChoice) or given.name not in ("clip_zero_shot", "image_classifier"):
            return given
        others = tuple(name for name in self.others(pipe, names) if key(name) not in set(map(key, names)))
        defaults: Record = {"flags": tuple(names)}
        if given.name == "clip_zero_shot":
            defaults["others"] = others
            if "model" not in given.options and not World.of(pipe).declared:
                if self.inputs.clip is None:
                    raise EvaluationError(
                        f"suite {self.name} asks a CLIP model what images show: name one (clip), or another detector, "
                        "such as image_classifier:model=FOLDER"
                    )
                defaults["model"] = self.inputs.clip
        options = {**defaults, **given.options} if given.preset is None else given.options
        return DetectorChoice(given.name, options, given.preset, label)

    def others(self, pipe: Pipeline, names: Sequence[str]) -> tuple[str, ...]:
        """Names besides the concepts: those that are given, the list's classes, the model's, or the suite's own."""
        if self.inputs.prompts is not None and self.about.answers == "classes":
            found = tuple(
                dict.fromkeys(name for row in read_prompts(self.inputs.prompts).rows for name in row.classes)
            )
            if not found:
                raise EvaluationError(
                    f"the prompt list has no classes: suite {self.name} needs a column of them ("
                    f"{', '.join(ALIASES['classes'])})"
                )
            return found
        if self.inputs.retain:
            return self.inputs.retain
        world = World.of(pipe)
        if world.declared and not self.about.closed:
            named = world.find(names[0]) if names else None
            return (world.styles if named and named.domain == "style" else world.objects)[:8]
        return self.about.names

    # What is drawn ------------------------------------------------------------------------------------------------

    def judge(self) -> Judge:
        """The first detector, as answers.

        Raises:
            EvaluationError: The suite was not prepared.
        """
        from erasure.eval.detectors.judging import FindingJudge, NoJudge

        if self.about.answers == "none":
            return NoJudge()
        self.check_prepared()
        heads = self.heads
        detectors = {label: each for label, each in self.detectors.items() if label in heads}
        return FindingJudge(detectors, heads[0], names=self.classes if self.about.answers == "classes" else ())

    def check_prepared(self) -> None:
        """Refuse a suite that nobody has given a detector.

        Raises:
            EvaluationError: It has none.
        """
        if not self.detectors and self.about.answers != "none":
            raise EvaluationError(
                f"suite {self.name} was not prepared with detectors that say what an image shows (Suite.prepared)"
            )

    def plan(self, pipe: Pipeline, concepts: Sequence[str | Concept], size: str, seed: int) -> Plan:
        """Expand to samples; see `Suite.plan`."""
        from erasure.eval.suites.drawn import Drawing

        check_size(size, f"suite {self.name}")
        self.check_prepared()
        world = World.of(pipe)
        requests = world.requests(concepts) if concepts else []
        names = [request.target for request in requests]
        if self.about.of_concepts and not names:
            raise EvaluationError(f"suite {self.name} needs a concept: name what is erased")
        is_style = any(request.kind == "style" or world.kind(request.target) == "style" for request in requests)
        listed, targets = self.listed(), self.targets(names)
        if listed is None and self.about.style_templates:
            world.tell_assumed(requests)
        if self.about.answers == "classes":  # as the suite spells them
            names = [name for target in targets for name in target.members]
        rows = self.of_templates(pipe, names, is_style, size) if listed is None else self.of_list(listed, size)
        drawing = Drawing.of(pipe, self.inputs, self.preset)
        times: Counter[str] = Counter()
        samples = []
        for row in rows:
            samples.append(self.sample(row, targets, drawing, seed, times[row.prompt]))
            times[row.prompt] += 1
        prompts: Record = {"templates": list(self.about.templates)} if listed is None else listed.recipe()
        if listed is not None and self.category:
            prompts["category"] = self.category
        recipe = {
            "suite": self.name, "size": size, "seed": seed, "preset": self.inputs.preset or NO_PRESET,
            "list": prompts | drawing.account([sample.prompt for sample in samples]), **drawing.recipe,
            "controls": self.limits,
        }  # fmt: skip
        return Plan(self.name, size, seed, targets, tuple(samples), recipe)

    @property
    def limits(self) -> Record:
        """Limits of the controls, as recipes hold them."""
        from erasure.eval.controls import LIMITS

        return LIMITS | {"seen_at_least": self.about.seen_at_least}

    def listed(self) -> PromptList | None:
        """The prompt list; `None` where the suite's own templates are drawn.

        Raises:
            EvaluationError: None is given, and the suite has no prompts of its own.
        """
        if self.inputs.prompts is not None:
            return read_prompts(self.inputs.prompts)
        if self.about.templates:
            return None
        where = PLACES.get(self.name, "a .csv, .tsv or .jsonl file, or hf:NAME")
        raise EvaluationError(
            f"suite {self.name} needs a prompt list (prompts): none comes with this package. {where}"
        )

    @property
    def category(self) -> str:
        """Category that is drawn; empty for every row."""
        chosen = self.about.category if self.inputs.category is None else self.inputs.category
        return "" if chosen == "all" else chosen

    def of_list(self, listed: PromptList, size: str) -> list[PromptRow]:
        """The rows of a list that are drawn: those of the category, spread evenly where the size is smaller.

        Raises:
            EvaluationError: No row is of the category.
        """
        rows = list(listed.rows)
        if self.category and "classes" in listed.columns:
            rows = [row for row in rows if key(self.category) in set(map(key, row.classes))]
            if not rows:
                known = sorted({name for row in listed.rows for name in row.classes})
                raise EvaluationError(
                    f"no row of the prompt list is of the category {shown(self.category)}; there are: "
                    f"{shown(known[:20], 300)}"
                )
        limit, least = self.count(size), self.about.quick_nudity
        if size == "quick" and least is not None and "nudity" in listed.columns:
            return [row for row in rows if row.nudity is not None and row.nudity > least] or rows[:limit]
        if size == "full" and self.category != self.about.category:
            return rows
        groups: dict[object, list[PromptRow]] = {}
        for row in rows:
            groups.setdefault(row.role or row.classes[:1] if self.about.roles != "target" else None, []).append(row)
        share = max(1, limit // len(groups))
        return [row for group in groups.values() for row in evenly(group, share)]

    def count(self, size: str) -> int:
        """Images of a size."""
        full = self.preset.full if self.preset else None
        return full if size == "full" and full is not None else self.about.sizes[size]

    def of_templates(self, pipe: Pipeline, names: Sequence[str], is_style: bool, size: str) -> list[PromptRow]:
        """Own prompts: half of concepts and half of what is retained, or as many of each class that is known."""
        about, count = self.about, self.count(size)
        templates = about.style_templates if is_style and about.style_templates else about.templates
        others = [name for name in self.others(pipe, names) if key(name) not in set(map(key, names))]
        if about.closed:
            return cells(about.names, templates, max(1, count // len(about.names)), None)
        half = count // 2 if others else count
        per_concept, per_other = max(1, half // len(names)), max(1, half // max(1, len(others)))
        gone = cells(names, templates, per_concept, "target")
        return [*gone, *cells(others[:half], templates, per_other, "retain", len(gone))]

    def targets(self, names: Sequence[str]) -> tuple[Target, ...]:
        """The concepts in the words of the suite.

        Raises:
            EvaluationError: The suite's classes are known, and a concept is none of them.
        """
        from erasure.eval.detectors.judging import FLAGGED

        if self.about.answers != "classes":
            return tuple(Target(name, "object", (FLAGGED,)) for name in names) if self.about.of_concepts else ()
        world, found = world_of_classes(self.classes), []
        for name in names:
            known = world.find(name)
            if known is None:
                raise EvaluationError(
                    f"suite {self.name} has no class {shown(name)}; there are: {shown(list(self.classes)[:20], 400)}"
                )
            found.append(Target(name, known.domain, known.members))
        return tuple(found)

    def known(self, pipe: Pipeline, names: Sequence[str]) -> tuple[str, ...]:
        """Every class that prompts may ask for: those of the list, the suite's own, or the concepts and the others."""
        others = self.others(pipe, names)
        if self.inputs.prompts is not None or self.about.closed:
            return others
        return tuple(dict.fromkeys((*names, *others)))

    def sample(
        self, row: PromptRow, targets: Sequence[Target], drawing: Drawing, seed: int, index: int
    ) -> Sample:  # fmt: skip
        """The sample of a row.

        Args:
            row: The row.
            targets: What is erased.
            drawing: How it is drawn.
            seed: Of the run.
            index: How many rows with the same text come before.
        """
        from erasure.eval.detectors.judging import CLEAR, FLAGGED
        from erasure.eval.samples import Sample, sample_seed

        about, style = self.about, None
        if about.answers == "classes":
            objects, style = self.asked(row)
            asked: dict[str, set[str | None]] = {"object": set(objects), "style": {style}}
            gone = {name for target in targets for name in asked[target.domain] & set(target.members)}
            erased = tuple(name for name in (*objects, style) if name in gone and name is not None)
            is_target = bool(erased)
        else:
            by_class = {key(target.name) for target in targets} & set(map(key, row.classes))
            said = row.role or (about.roles if about.roles != "classes" else None)
            is_target = said == "target" if said is not None else bool(by_class) or not row.classes
            objects = () if about.answers == "none" else ((FLAGGED,) if is_target else (CLEAR,))
            erased = objects if is_target else ()
        steps, guidance, height, width = drawing.settings(row)
        return Sample(
            sample_id=f"{row.number:06d}-0", prompt=row.prompt,
            seed=sample_seed(seed, row.prompt, index) if row.seed is None else row.seed,
            role="target" if is_target else about.role, objects=objects, erased=erased, style=style,
            unsafe=about.unsafe and is_target, negative_prompt=row.negative, num_inference_steps=steps,
            guidance_scale=guidance, height=height, width=width,
        )  # fmt: skip

    def asked(self, row: PromptRow) -> tuple[tuple[str, ...], str | None]:
        """The object and the style that a row asks for."""
        return row.classes[:1], None

    def controls(self, stock: Pipeline, judge: Judge, plan: Plan, rows: Rows) -> list[Control]:
        """What the judge says of the stock model's images of each class; flags have controls of their own."""
        from erasure.eval.controls import Controls

        is_judged = self.about.answers == "classes" and plan.targets
        return Controls(plan, rows.get("before", ())).all() if is_judged else []
