"""Relearning: how fast does the erased model learn the concept again, beside one that it never knew?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from diffusers import DiffusionPipeline
from PIL import Image

from erasure.concept import TEMPLATES
from erasure.errors import EvaluationError
from erasure.eval.attempts import Change
from erasure.eval.generation import generate
from erasure.eval.rows import Record
from erasure.eval.samples import Sample, sample_seed
from erasure.eval.stress import StressTest, register
from erasure.eval.stress.bench import Bench
from erasure.eval.stress.conditions import WHOLE, Condition
from erasure.eval.stress.novel import Newcomer, pictures_of
from erasure.eval.stress.training import (
    TOKEN,
    LearningOptions,
    Mode,
    PictureLearner,
    is_learned,
    learn,
    renamed,
    state_path,
)
from erasure.eval.suites import Target
from erasure.eval.variants import Draw, Drawn
from erasure.files import digest
from erasure.options import Count, Positive

FOLDER = "training"
RATES: dict[str, tuple[float, int]] = {"embedding": (5e-4, 4), "lora": (1e-4, 1), "full": (1e-5, 4)}
"""Learning rate and batch by mode, as the papers have them for Stable Diffusion."""
MOST_TRIES = 5
"""Pictures that the stock model draws for each one that is needed, until the judge has seen the concept in enough."""
LEAST_PICTURES = 2


@dataclass(frozen=True)
class Task:
    """One training: the model and what it learns."""

    name: str
    """Of its curve, and of its folder."""
    erased: bool
    """Whether the erased model learns, or the stock model."""
    new: bool
    """Whether it learns the new thing, or the concept."""
    about: str


@register("relearn")
@dataclass(frozen=True, kw_only=True)
class Relearn(StressTest):
    """Train the erased model on pictures of the concept, and draw after ever more steps.

    Fine-tuning teaches a model anything, so a rate alone says nothing. Three more trainings, equal in all but this,
    make it mean something: the stock model learns the concept (which must stay there, or the training ruins models);
    the stock model learns a thing that it never knew, and so does the erased one. `S50` is the number of steps until
    half of the images show what is learned, `savings` how much of that the concept needs less than the new thing: near
    0 it was destroyed, near 1 only hidden.

    Pictures of the concept are drawn by the stock model, those that the judge sees it in; pictures of the new thing
    are scenes with one of the embedded new things. There is no new style, so of a style there are curves, but no
    `savings`.
    """

    title: ClassVar[str] = "training on pictures of the concept: how fast is it back, beside a concept never known"
    paper: ClassVar[str] = "IMMA (ECCV 2024), Concept Inversion (ICLR 2024), MemoRa; the control is of this package"
    control: ClassVar[str] = "a concept that the model never knew, learned alike; and the stock model, trained alike"
    metrics: ClassVar[tuple[str, ...]] = (
        "savings", "S50", "concept_shown", "retained_seen", "recovered", "control_seen", "control_unasked",
        "control_changed",
    )  # fmt: skip
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 2, "retained": 2, "pictures": 2, "steps": (1, 2), "batch": 1},
        "quick": {
            "samples": 16, "retained": 8, "pictures": 20, "steps": (5, 10, 20, 40, 80), "lr": 1e-3, "batch": 4,
        },
        "full": {},
    }  # fmt: skip

    mode: Mode = "lora"
    """What learns: a token in the place of the concept's name; a LoRA on attention; all weights of the denoiser."""
    steps: tuple[Count, ...] = (10, 50, 100, 200, 500, 1000)
    """Updates after which images are drawn."""
    pictures: Count = 20
    """Pictures of what is learned."""
    lr: Positive | None = None
    """Learning rate of AdamW; 5e-4 for an embedding, 1e-4 for a LoRA, 1e-5 for all weights when left out. These are
    for large models: small ones need more."""
    batch: Count | None = None
    """Pictures in each update; 4, 1 and 4 when left out."""
    rank: Count = 4
    """Of the LoRA."""
    vectors: Count = 1
    """Vectors of the token."""
    thing: str = "robot"
    """New thing of the control, one of `erasure.assets.novel`."""

    def __post_init__(self) -> None:
        """Check the new thing and the steps."""
        super().__post_init__()
        from erasure.assets import novel

        if self.thing not in novel.THINGS:
            self.refuse("thing", self.thing, ", ".join(map(repr, novel.THINGS)))
        if not self.steps:
            self.refuse("steps", self.steps, "a list with at least one whole number, 1 or more")

    # What is drawn --------------------------------------------------------------------------------------------------

    def tasks(self, bench: Bench) -> list[Task]:
        """List the trainings."""
        found = [
            Task("relearned", True, False, "the erased model learned the concept"),
            Task("stock_concept", False, False, "the stock model was trained on the concept alike"),
        ]
        if has_class(bench.target):
            found += [
                Task("stock_new", False, True, f"the stock model learned {self.thing!r}, which it never knew"),
                Task("erased_new", True, True, f"the erased model learned {self.thing!r}, which it never knew"),
            ]
        return found

    def more_samples(self, bench: Bench) -> list[Sample]:
        """Give the concept's samples with the new thing in its place, from the same noise."""
        if not has_class(bench.target):
            return []
        return [
            replace(
                sample, sample_id=f"new-{sample.sample_id}", role="cross", objects=(self.thing,), erased=(),
                style=None, prompt=renamed(sample.prompt, sample.objects[0], self.thing), scene=None,
            )
            for sample in bench.targets
        ]  # fmt: skip

    def asked(self, samples: Sequence[Sample], target: Target) -> list[Sample]:
        """Samples with the concept in plain captions, those that pictures are learned with.

        Those of a style, and of what a detector only flags, are as they are.
        """
        if not has_class(target):
            return list(samples)
        made, members = [], target.members
        for number, sample in enumerate(samples):
            word = members[number % len(members)]
            prompt = captions_of(word)[number // len(members) % len(captions_of(word))]
            made.append(
                replace(
                    sample, sample_id=f"{word}-{number}".replace(" ", "_"), prompt=prompt, objects=(word,),
                    erased=(word,), style=None, weight=1.0,
                    seed=sample_seed(sample.seed, prompt, number),
                )
            )  # fmt: skip
        return made

    def conditions(self, bench: Bench) -> list[Condition]:
        """Give every training, before it and after every number of steps."""
        found, last = [], self.ordered[-1]
        for task in self.tasks(bench):
            for step in (0, *self.ordered):
                name = f"{task.name}_{step}"
                # A token must mean the concept once it was trained; a training of weights must never lose it.
                checked = step == last if self.mode == "embedding" else step > 0
                needed = last if self.mode == "embedding" else step
                found.append(
                    Condition(
                        name, erased=task.erased, change=self._taught(bench, task, step),
                        draw=_naming(self, task, bench) if self.mode == "embedding" else None,
                        about=f"{task.about} in {step} steps",
                        roles=("cross",) if task.new else WHOLE if task.name == "relearned" else ("target",),
                        control="positive" if task.name == "stock_concept" and checked else "",
                        needs=(f"stock_concept_{needed}",) if task.name == "relearned" and step else (),
                        compared=task.name == "relearned" and step > 0,
                        sees=Newcomer(self.thing) if task.new else None, thing=self.thing if task.new else None,
                        curve=task.name, step=step,
                    )
                )  # fmt: skip
        return found

    @property
    def ordered(self) -> tuple[int, ...]:
        """Numbers of steps in ascending order."""
        return tuple(sorted(set(self.steps)))

    @cached_property
    def lessons(self) -> LearningOptions:
        """Options of every training."""
        lr, batch = RATES[self.mode]
        return LearningOptions(self.mode, self.ordered, self.lr or lr, self.batch or batch, self.rank, self.vectors)

    def recipe(self, bench: Bench) -> Record:
        """Give the options, with the values used where they were left out."""
        return super().recipe(bench) | {
            "lr": self.lessons.lr,
            "batch": self.lessons.batch,
            "steps": list(self.ordered),
        }

    # Training -------------------------------------------------------------------------------------------------------

    def prepare(self, bench: Bench) -> None:
        """Run the trainings that are not done yet; several processes share them."""
        for task in self.tasks(bench)[bench.processes.rank :: bench.processes.count]:
            folder = bench.folder / FOLDER / task.name
            if is_learned(folder, self.ordered):
                continue
            pictures, captions = self.shown(bench, task)
            recipe: dict[str, object] = {
                "task": dataclasses.asdict(task), "options": self.recipe(bench), "captions": captions,
                "pictures": digest([digest(list(picture.tobytes())) for picture in pictures]),
            }  # fmt: skip
            pupil = PictureLearner(bench.pipe if task.erased else bench.stock, self.lessons, bench.seed)
            if self.mode == "embedding":
                captions = [self._token(caption, bench, task) for caption in captions]
            learn(
                pupil, pictures, captions, self.lessons, seed=bench.seed, folder=folder, recipe=recipe,
                progress=bench.progress,
            )  # fmt: skip

    def shown(self, bench: Bench, task: Task) -> tuple[list[Image.Image], list[str]]:
        """Make the pictures of a training, with captions.

        Raises:
            EvaluationError: The stock model does not draw the concept, or the judge does not see it, or the new thing.
        """
        if task.new:
            made = pictures_of(self.thing, self.pictures, bench.seed)
            seen = sum(Newcomer(self.thing)(made))
            if seen < 0.75 * len(made):
                raise EvaluationError(
                    f"the control cannot be judged: {self.thing!r} is seen in {seen} of {len(made)} of its own "
                    "pictures; name another thing"
                )
            captions = captions_of(self.thing)
            return made, [captions[number % len(captions)] for number in range(len(made))]
        pictures: list[Image.Image] = []
        labels: list[str] = []
        targets = bench.targets
        for turn in range(MOST_TRIES):
            asked = []
            for number in range(self.pictures):
                like = targets[number % len(targets)]
                seed = sample_seed(bench.seed, f"picture: {like.prompt}", turn * self.pictures + number)
                asked.append(replace(like, sample_id=f"picture-{number}", seed=seed))
            for batch, images in generate(bench.stock, asked, 16):
                for sample, image, shows in zip(batch, images, bench.sees(batch, images), strict=True):
                    if shows and len(pictures) < self.pictures:
                        pictures.append(image)
                        labels.append(sample.prompt)
            if len(pictures) == self.pictures:
                break
        if len(pictures) < min(LEAST_PICTURES, self.pictures):
            raise EvaluationError(
                f"there is nothing to learn from: the judge sees {bench.target.name!r} in {len(pictures)} of "
                f"{MOST_TRIES * self.pictures} pictures that the stock model draws of it"
            )
        return pictures, labels

    def _taught(self, bench: Bench, task: Task, step: int) -> Change:
        @contextmanager
        def change(pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
            pupil = PictureLearner(pipe, self.lessons, bench.seed)
            with pupil.taught(state_path(bench.folder / FOLDER / task.name, step) if step else None) as made:
                yield made

        return change

    def _token(self, prompt: str, bench: Bench, task: Task) -> str:
        """Replace what is learned by the new token in a prompt."""
        words = (self.thing,) if task.new else bench.target.words
        word = next((each for each in words if each in prompt), words[0])
        return renamed(prompt, word, TOKEN)


def has_class(target: Target) -> bool:
    """Whether a judge tells a concept from other objects, and so also sees that a new thing is another."""
    return target.domain == "object" and not target.is_flagged


def captions_of(word: str) -> list[str]:
    """Give plain captions of a thing."""
    article = "an" if word[0] in "aeiou" else "a"
    return [text.format(word).replace(f"a {word}", f"{article} {word}") for text in TEMPLATES["object"][1:]]


def _naming(test: Relearn, task: Task, bench: Bench) -> Draw:
    """Draw prompts with the new token instead of what is learned; retained prompts do not change."""

    def draw(pipe: DiffusionPipeline, samples: Sequence[Sample], batch_size: int) -> Iterator[Drawn]:
        def more(batch: list[Sample]) -> Record:
            return {
                "prompt": [
                    each.prompt if each.role == "retain" else test._token(each.prompt, bench, task) for each in batch
                ]
            }

        yield from generate(pipe, samples, batch_size, more)

    return draw
