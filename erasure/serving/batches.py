"""The queue of pictures to draw, and the thread that draws them together."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from diffusers import DiffusionPipeline
from PIL import Image

from erasure.errors import ArtifactError, ErasureError, LockedError, OptionError, RefusedError, VerificationError
from erasure.serving.drawings import Drawing, Problem, draw
from erasure.serving.limits import Limits

REMEMBERED = 1000
"""Requests whose times are remembered."""


@dataclass
class Figures:
    """Counts and times of a service so far."""

    accepted: int = 0
    """Pictures that were queued."""
    drawn: int = 0
    """Pictures that were given out."""
    refused: int = 0
    """Pictures that were asked for and refused for what the prompt or the picture shows."""
    failed: int = 0
    """Pictures that could not be drawn."""
    turned_away: int = 0
    """Requests that found the queue full."""
    batches: int = 0
    """Calls of the pipeline."""
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """Times of the newest requests, from being queued to being drawn."""
    per_picture: float = 0.0
    """Seconds of one picture, lately."""


@dataclass
class _Waiting:
    drawing: Drawing
    future: Future[Image.Image]
    since: float


class Batcher:
    """Draws queued pictures, those with equal settings together.

    Args:
        pipe: A locked pipeline.
        limits: How many wait and are drawn at once.
    """

    def __init__(self, pipe: DiffusionPipeline, limits: Limits) -> None:
        self.pipe, self.limits, self.figures = pipe, limits, Figures()
        self.failure = ""
        """Why nothing can be drawn any more; empty while all is well."""
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="erasure-drawing", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of waiting pictures."""
        return len(self._waiting)

    @property
    def closing(self) -> bool:
        """Whether new requests are refused."""
        return self._closing

    def submit(self, wanted: Sequence[Drawing]) -> list[Future[Image.Image]]:
        """Queue the pictures of a request, all or none.

        Raises:
            Problem: The queue is full, the service is being stopped, or it cannot draw any more.
        """
        with self._changed:
            if self.failure:
                raise Problem(503, "unverified", self.failure)
            if self._closing:
                raise Problem(503, "stopping", "the service is being stopped: ask another one", {"Retry-After": "10"})
            if len(self._waiting) + len(wanted) > self.limits.max_queue:
                self.figures.turned_away += 1
                after = max(1, math.ceil(len(self._waiting) * (self.figures.per_picture or 1.0)))
                raise Problem(
                    429, "busy",
                    f"{len(self._waiting)} of at most {self.limits.max_queue} pictures wait: come again in {after} s",
                    {"Retry-After": str(after)},
                )  # fmt: skip
            made = [_Waiting(drawing, Future(), time.perf_counter()) for drawing in wanted]
            self._waiting.extend(made)
            self.figures.accepted += len(made)
            self._changed.notify_all()
        return [each.future for each in made]

    def close(self) -> None:
        """Refuse new requests, draw the accepted ones, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    # In the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while batch := self._next():
            started = time.perf_counter()
            self._draw(batch)
            seconds = (time.perf_counter() - started) / len(batch)
            before = self.figures.per_picture
            self.figures.per_picture = seconds if not before else 0.8 * before + 0.2 * seconds

    def _next(self) -> list[_Waiting]:
        """Choose pictures to draw together, among them the longest waiting one; none when all are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return []
            self._changed.wait_for(self._is_full, timeout=self.limits.wait)
            settings = self._waiting[0].drawing.settings
            batch = [each for each in self._waiting if each.drawing.settings == settings][: self.limits.batch_size]
            chosen = set(map(id, batch))
            self._waiting = deque(each for each in self._waiting if id(each) not in chosen)
        # Whoever has given up gets nothing.
        return [each for each in batch if each.future.set_running_or_notify_cancel()] or self._next()

    def _is_full(self) -> bool:
        alike = [each for each in self._waiting if each.drawing.settings == self._waiting[0].drawing.settings]
        return self._closing or len(alike) >= self.limits.batch_size

    def _draw(self, batch: Sequence[_Waiting]) -> None:
        """Draw pictures, and give each its result or its problem."""
        try:
            pictures = self._call([each.drawing for each in batch])
            if len(pictures) != len(batch):
                raise RuntimeError(f"the pipeline gave {len(pictures)} pictures for {len(batch)}")
        except RefusedError as error:
            self._hand_out_allowed(batch, error)
        except (VerificationError, ArtifactError) as error:
            # The erasures are not in force, or nothing can be logged: nothing is drawn until somebody looks.
            self.failure = f"the service draws nothing any more, because {error}"
            self._fail(batch, Problem(503, "unverified", self.failure))
        except Exception as error:
            if len(batch) > 1:
                # One of them may be at fault, or memory too small for all of them.
                half = len(batch) // 2
                self._draw(batch[:half])
                self._draw(batch[half:])
            elif isinstance(error, LockedError):
                self.figures.refused += 1
                self._fail(batch, Problem(403, "refused", str(error)), counted=True)
            elif isinstance(error, OptionError):
                self._fail(batch, Problem(422, "invalid", str(error)))
            else:
                said = str(error) if isinstance(error, ErasureError) else type(error).__name__
                self._fail(batch, Problem(500, "failed", f"the picture could not be drawn ({said})"))
        else:
            for each, picture in zip(batch, pictures, strict=True):
                self._give(each, picture)

    def _call(self, wanted: Sequence[Drawing]) -> Sequence[Image.Image]:
        self.figures.batches += 1
        return draw(self.pipe, wanted)

    def _hand_out_allowed(self, batch: Sequence[_Waiting], error: RefusedError) -> None:
        """Refuse the pictures that the lock refused, and give or draw the others."""
        others = []
        for place, each in enumerate(batch):
            if place in error.refused:
                self.figures.refused += 1
                what = "the picture is kept back" if error.pictures else "the prompt is refused"
                self._fail([each], Problem(403, "refused", f"{what}: {error.refused[place]}"), counted=True)
            elif error.pictures:
                picture = error.pictures[place]
                assert isinstance(picture, Image.Image), "only refused pictures are left out"
                self._give(each, picture)
            else:
                others.append(each)
        if others:
            self._draw(others)

    def _give(self, each: _Waiting, picture: Image.Image) -> None:
        self.figures.drawn += 1
        self.figures.seconds.append(time.perf_counter() - each.since)
        each.future.set_result(picture)

    def _fail(self, batch: Sequence[_Waiting], problem: Problem, *, counted: bool = False) -> None:
        for each in batch:
            self.figures.failed += not counted
            each.future.set_exception(problem)
