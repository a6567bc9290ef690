"""What the studio does for people at their browsers, without the page."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import ValidationError

import erasure
from erasure.artifact import Erasure
from erasure.errors import AttachError, ConceptError, MaskError, OptionError
from erasure.files import shown
from erasure.fitting import check_strength
from erasure.images import rgb
from erasure.serving.drawings import Drawing, GenerateRequest, Problem, draw, drawings
from erasure.serving.limits import Limits
from erasure.shown import message
from erasure.studio.brush import overlaid, painted
from erasure.studio.jobs import Job, Progress, silent
from erasure.studio.shared import SharedModel, Stacked

MOST_ERASURES = 6
"""Erasures that one session may have on one model."""
MOST_SESSIONS = 100
"""Sessions that are kept; the one that was used longest ago is forgotten first."""
REMEMBERED = 4
"""Pictures of the original model that a session remembers, so that a slider does not draw them anew."""
PATIENCE = 0.05
"""Seconds between two looks whether a job that waits was cancelled."""


@dataclass(frozen=True)
class Comparison:
    """The same noise without and with the erasures of a session."""

    before: Image.Image
    after: Image.Image
    names: tuple[str, ...]
    """The erasures that were in force for `after`."""
    notes: tuple[str, ...] = ()
    """Warnings that came up."""


@dataclass(frozen=True)
class Removed:
    """A picture without what was removed."""

    picture: Image.Image
    found: Image.Image
    """The original picture with the mask over it in red."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """How surely each word is in the picture; empty with a brush."""
    notes: tuple[str, ...] = ()


class Studio:
    """The models of a studio and its sessions. One job is done at a time: they share processor and memory.

    Args:
        models: What can be chosen; the first is chosen at the beginning.
        open_pipeline: Loads a model as a drop-in pipeline.
        limits: What one job may ask for, and how many may wait.
    """

    def __init__(
        self, models: Sequence[str], open_pipeline: Callable[[str], DiffusionPipeline], limits: Limits | None = None
    ) -> None:
        self.models, self.limits = tuple(dict.fromkeys(models)), limits or Limits()
        self._open = open_pipeline
        self._loaded: dict[str, SharedModel] = {}
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = self._named = 0

    def session(self, key: str) -> Session:
        """The session of a browser's page, made when it is asked for first."""
        with self._counting:
            found = self._sessions.setdefault(key, Session(self))
            self._sessions.move_to_end(key)
            while len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)[1].cancel()
            return found

    def forget(self, key: str) -> None:
        """Cancel and forget what a page that was closed had."""
        with self._counting:
            left = self._sessions.pop(key, None)
        if left is not None:
            left.cancel()

    def stop(self) -> None:
        """Cancel every job."""
        with self._counting:
            sessions = list(self._sessions.values())
        for each in sessions:
            each.cancel()

    def new_name(self, made: Erasure, taken: Collection[str]) -> str:
        """A name that no erasure of any session has.

        Args:
            made: What is named.
            taken: Names of the erasures that the model came with, among others.
        """
        while True:
            with self._counting:
                self._named += 1
                name = f"{made.name}-{self._named}"
            if name not in taken:
                return name

    def shared(self, model: str) -> SharedModel:
        """A model, loaded when it is asked for first; only for the one whose turn it is.

        Raises:
            ErasureError: It is none of the studio's, or cannot be loaded.
        """
        if model not in self.models:
            raise OptionError(f"{shown(model)} is no model of this studio; there are: {', '.join(self.models)}")
        if model not in self._loaded:
            self._loaded[model] = SharedModel(model, self._open(model))
        return self._loaded[model]

    @contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """Wait until nobody else's job is under way, and keep others waiting inside of the block.

        Warnings become notes of the job.

        Raises:
            OptionError: Too many wait.
            CancelledError: The user has cancelled while waiting.
        """
        with self._counting:
            if self._waiting >= self.limits.max_queue:
                raise OptionError(f"{self._waiting} jobs wait, at most {self.limits.max_queue} may: try again later")
            self._waiting += 1
        try:
            job.what = "waiting for other jobs"
            while not self._lock.acquire(timeout=PATIENCE):
                job.tell(0.0)
        finally:
            with self._counting:
                self._waiting -= 1
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                yield
            own = [each for each in said if each.category.__module__ == "erasure.errors"]
            job.notes += dict.fromkeys(message(each.message) for each in own)
        finally:
            self._lock.release()


class Session:
    """What one page has: its model, its erasures and their strengths.

    Args:
        studio: Whose models it uses.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio, self.model = studio, studio.models[0]
        self._stacks: dict[str, tuple[Stacked, ...]] = {}
        self._originals: OrderedDict[tuple[str, Drawing], Image.Image] = OrderedDict()
        self._job: Job | None = None
        self._changing = threading.Lock()

    # What it has --------------------------------------------------------------------------------------------------

    @property
    def stack(self) -> tuple[Stacked, ...]:
        """The erasures on the chosen model, the oldest first."""
        return self._stacks.get(self.model, ())

    def choose(self, model: str, progress: Progress = silent) -> None:
        """Choose a model. Its erasures are those that the session had on it before, or that its folder came with.

        Raises:
            ErasureError: It is none of the studio's, or cannot be loaded.
        """
        with self._doing(progress) as job, self.studio.turn(job):
            job.what = f"loading {model}"
            job.tell(0.0)
            self._take(self.studio.shared(model))
            self.model = model

    def named(self, name: str) -> Stacked:
        """One of its erasures.

        Raises:
            AttachError: It has none of that name.
        """
        for each in self.stack:
            if each.name == name:
                return each
        names = ", ".join(each.name for each in self.stack) or "none"
        raise AttachError(f"no erasure {shown(name)} here; there are: {names}")

    def set_strength(self, name: str, strength: float) -> None:
        """Change how strong an erasure is; the next picture is drawn with it, and nothing is made anew.

        Raises:
            AttachError: No such erasure, or a strength that is no factor.
        """
        with self._changing:
            self.named(name)
            factor = check_strength(strength)
            self._stacks[self.model] = tuple(
                replace(each, strength=factor) if each.name == name else each for each in self.stack
            )

    def take_off(self, name: str) -> None:
        """Take an erasure off.

        Raises:
            AttachError: No such erasure.
        """
        with self._changing:
            self.named(name)
            self._stacks[self.model] = tuple(each for each in self.stack if each.name != name)

    def cancel(self) -> bool:
        """Cancel the job that is under way or waits; whether there was one."""
        job = self._job
        if job is not None:
            job.cancelled.set()
        return job is not None

    # What it does -------------------------------------------------------------------------------------------------

    def erase(
        self, concepts: str, strategy: str, *, preset: str | None = None, seed: int = 0,
        options: Mapping[str, object] | None = None, progress: Progress = silent,
    ) -> tuple[Stacked, tuple[str, ...]]:  # fmt: skip
        """Make an erasure and put it onto the others.

        Args:
            concepts: What to erase, as `erasure erase --concept` takes it: names, with ";" between several.
            strategy: Name of a method.
            preset: A named set of its options.
            seed: Seed of every random choice.
            options: Options of the method.
            progress: Is told how far it is.

        Returns:
            The erasure, and warnings that came up.

        Raises:
            ErasureError: It cannot be made, does not go with the others, or the job was cancelled. Nothing changed.
        """
        _check_text("concepts", concepts, self.studio.limits.max_prompt)
        if not concepts.strip():
            raise ConceptError("nothing to erase: name a concept, for instance cat")
        number = _whole("seed", seed, 0)
        with self._doing(progress) as job, self.studio.turn(job):
            shared = self._take(self.studio.shared(self.model))
            self._check_room()
            job.what = f"erasing with {strategy}"
            job.tell(0.0)
            made = erasure.erase(
                shared.pipe, concepts, strategy, preset=preset or None, seed=number, attach=False, progress=job.tell,
                **(options or {}),  # type: ignore[arg-type]
            )  # fmt: skip
            job.check()
            added = Stacked(self.studio.new_name(made, [each.name for each in shared.brought]), made)
            with self._changing:
                shared.put_in_force([*self.stack, added])
                self._stacks[self.model] = (*self.stack, added)
        return added, tuple(job.notes)

    def compare(
        self, prompt: str, *, seed: int = 0, negative_prompt: str = "", steps: int | None = None,
        guidance: float | None = None, progress: Progress = silent,
    ) -> Comparison:  # fmt: skip
        """Draw a prompt without and with the erasures, on the same noise.

        Args:
            prompt: What to draw.
            seed: Seed of the noise.
            negative_prompt: What the pictures must not show.
            steps: Denoising steps; the model's own number when left out.
            guidance: Scale of guidance; the model's own when left out.
            progress: Is told how far it is.

        Raises:
            ErasureError: Something that the limits or the model do not allow, erasures that are not in force, or the
                job was cancelled.
        """
        try:
            request = GenerateRequest(
                prompt=prompt, negative_prompt=negative_prompt, seed=_whole("seed", seed, 0),
                steps=None if steps is None else _whole("steps", steps, 1), guidance=guidance,
            )  # fmt: skip
        except ValidationError as error:
            first = error.errors()[0]
            raise OptionError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        with self._doing(progress) as job, self.studio.turn(job):
            shared = self._take(self.studio.shared(self.model))
            try:
                (wanted,) = drawings(request, self.studio.limits, shared.world, shared.pipe)
            except Problem as error:
                raise OptionError(error.message) from error
            count = _steps_of(wanted, shared)
            before = self._originals.get((self.model, wanted))
            if before is None:
                shared.put_in_force(())
                (before,) = draw(shared.pipe, [wanted], job.on_step("drawing without the erasures", count))
                self._originals[self.model, wanted] = before
                while len(self._originals) > REMEMBERED:
                    self._originals.popitem(last=False)
            names, after = shared.put_in_force(self.stack), before
            if names:
                (after,) = draw(shared.pipe, [wanted], job.on_step("drawing with the erasures", count))
            job.check()
        return Comparison(before, after, names, tuple(job.notes))

    def remove(
        self, picture: Image.Image | None, layers: Sequence[Image.Image] = (), *, words: str = "", others: str = "",
        shadow: bool = False, crop: bool = False, prompt: str = "", seed: int = 0, steps: int | None = None,
        progress: Progress = silent,
    ) -> Removed:  # fmt: skip
        """Remove what a brush has painted over, or what words name, with the erasures of the session in force.

        Args:
            picture: The picture.
            layers: Strokes on transparency, each of the picture's size.
            words: Instead of strokes: what to remove, with commas between several.
            others: What else is in the picture and stays, which makes finding by words surer.
            shadow: Take shadows along.
            crop: Work on the parts around the mask, for pictures larger than the model draws.
            prompt: What should be in its place; background when empty.
            seed: Seed of the noise.
            steps: Denoising steps; the model's own number when left out.
            progress: Is told how far it is.

        Raises:
            ErasureError: No picture, one that is too large, no or two masks, a word that is not found, a family that
                cannot do it, or the job was cancelled.
        """
        if picture is None:
            raise MaskError("there is no picture: upload one, or take the one that was drawn")
        image, limits = rgb(picture, "the picture"), self.studio.limits
        if max(image.size) > limits.max_side:
            width, height = image.size
            raise OptionError(
                f"the picture has {width}x{height} pixels, at most {limits.max_side} on a side: shrink it"
            )
        for name, text in (("words", words), ("others", others), ("prompt", prompt)):
            _check_text(name, text, limits.max_prompt)
        named, kept = _listed(words), _listed(others)
        mask = painted(layers, image.size)
        if mask is None and not named:
            raise MaskError("nothing is marked: paint over what is to go, or name it")
        if mask is not None and named:
            raise MaskError("both a brush and words say what is to go: clear the strokes, or the words")
        generator = torch.Generator("cpu").manual_seed(_whole("seed", seed, 0))
        with self._doing(progress) as job, self.studio.turn(job):
            shared = self._take(self.studio.shared(self.model))
            pipe = shared.remover
            shared.put_in_force(self.stack)
            count = shared.world.call_settings(None if steps is None else _whole("steps", steps, 1)).get(
                "num_inference_steps"
            )
            if count is not None and count > limits.max_steps:
                raise OptionError(f"steps is {count:,}, at most {limits.max_steps:,} are allowed")
            scores: dict[str, float] = {}
            used = mask
            if used is None:
                job.what = f"looking for {', '.join(named)}"
                job.tell(0.0)
                used, scores = _found(pipe, image, named, kept, crop)
            settings = {} if count is None else {"num_inference_steps": count}
            result = pipe(
                image, used, prompt=prompt, shadow=shadow, crop=crop, generator=generator,
                callback_on_step_end=job.on_step("removing", count or 50), **settings,
            ).images[0]  # fmt: skip
            job.check()
        return Removed(result, overlaid(image, used, shadow), scores, tuple(job.notes))

    # Within -------------------------------------------------------------------------------------------------------

    def _take(self, shared: SharedModel) -> SharedModel:
        """A model, whose own erasures are the session's when it sees it first."""
        self._stacks.setdefault(shared.name, shared.brought)
        return shared

    def _check_room(self) -> None:
        if len(self.stack) >= MOST_ERASURES:
            raise AttachError(
                f"{len(self.stack)} erasures are on the model, at most {MOST_ERASURES}: take one off first"
            )

    @contextmanager
    def _doing(self, progress: Progress) -> Iterator[Job]:
        """A job, which is the only one of the session inside of the block."""
        job = Job(progress)
        with self._changing:
            if self._job is not None:
                raise OptionError("a job of this page is under way: wait for it, or cancel it")
            self._job = job
        try:
            yield job
        finally:
            self._job = None


def _found(
    pipe: DiffusionPipeline, image: Image.Image, words: Sequence[str], others: Sequence[str], crop: bool
) -> tuple[Image.Image, dict[str, float]]:
    """The mask of what words name, white where it is, and how surely each word is there."""
    looked = image
    if crop:
        height, width = pipe.drawn_size(image.height, image.width)
        looked = image.resize((width, height), Image.Resampling.BICUBIC)
    found = pipe.localize(looked, words, others=others)
    (mask,) = found.of_words()
    scores = dict(zip(words, map(float, found.presence[0]), strict=True))
    return Image.fromarray(mask.cpu().numpy()).convert("L").resize(image.size, Image.Resampling.NEAREST), scores


def _steps_of(wanted: Drawing, shared: SharedModel) -> int:
    steps = dict(wanted.settings).get("num_inference_steps", shared.world.num_inference_steps)
    return int(steps) if isinstance(steps, (int, float)) else shared.world.num_inference_steps


def _listed(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


def _check_text(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise OptionError(f"{name} has {len(text):,} characters, at most {most:,} are allowed: shorten it")


def _whole(name: str, value: object, least: int) -> int:
    """A whole number of a form, which may come as a float or not at all."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1 or value < least:
        raise OptionError(f"{name} is {shown(str(value))}: give a whole number from {least}")
    if value >= 2**62:
        raise OptionError(f"{name} is {value:,}: give a smaller number")
    return int(value)
