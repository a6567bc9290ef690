"""Work on each batch in a thread while the next one is drawn, and what of a run's time drawing takes."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.interop.pipelines import execution_device

Batch = TypeVar("Batch")
STEP_END = "callback_on_step_end"
"""Argument of a pipeline's call that is told of every step."""


def each(
    batches: Iterable[Batch], work: Callable[[Batch], None], done: Callable[[Batch], None], *, beside: bool
) -> None:  # fmt: skip
    """Work on batches in their order.

    Args:
        batches: Drawn one after the other, in this thread.
        work: What is to be done with each.
        done: Told in this thread of each batch that is finished.
        beside: Work in a thread of its own while the next batch is drawn. One batch is worked on at a time, and
            nothing is drawn further ahead, so that no more than two are in memory. What is under way is finished
            whatever ends the drawing, and what goes wrong is raised here.
    """
    if not beside:
        for batch in batches:
            work(batch)
            done(batch)
        return
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run(batch: Batch) -> None:
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):  # every thread has its own
            work(batch)

    under_way: list[tuple[Batch, Future[None]]] = []

    def finish() -> None:
        for batch, future in (under_way.pop() for _ in tuple(under_way)):
            future.result()
            done(batch)

    with ThreadPoolExecutor(1, "erasure-beside") as pool:
        try:
            for batch in batches:
                finish()
                under_way.append((batch, pool.submit(run, batch)))
        except BaseException:
            with suppress(Exception):  # the first error is the one that is told
                finish()
            raise
        finish()


class Clock:
    """How long this process draws, and how much of that the denoiser takes: give it to `generate` and `timed`.

    Attributes:
        drawing: Seconds in calls of pipelines.
        denoising: Seconds of those in the denoiser and its sampler; `None` where a call did not tell of its steps.
    """

    def __init__(self) -> None:
        self.drawing = 0.0
        self.denoising: float | None = 0.0
        self._ends: list[float | torch.cuda.Event] = []

    def call_arguments(self, pipe: DiffusionPipeline) -> dict[str, object]:
        """Arguments of a pipeline's call by which it tells of its steps; none where it takes no such argument."""
        kinds = [vars(kind).get("__call__") for kind in type(pipe).__mro__]
        taken = any(call is not None and STEP_END in inspect.signature(call).parameters for call in kinds)
        self._ends = []
        return {STEP_END: self._step_end} if taken else {}

    def _step_end(
        self, pipe: DiffusionPipeline, index: int, t: Tensor, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        device = execution_device(pipe)
        if device.type == "cuda":  # which is asked for more than it has done yet
            with torch.cuda.device(device):
                end = torch.cuda.Event(enable_timing=True)
                end.record()
            self._ends.append(end)
        else:
            self._ends.append(time.perf_counter())
        return dict(tensors)

    def called(self) -> None:
        """A call is over: its steps took as long on average as those between the first end and the last."""
        if self.denoising is None:
            return
        ends, self._ends = self._ends, []
        if len(ends) < 2:  # nobody knows when the first step began
            self.denoising = None
            return
        first, last = ends[0], ends[-1]
        if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
            last.synchronize()
            between = first.elapsed_time(last) / 1000
        else:
            assert isinstance(first, float)
            assert isinstance(last, float)
            between = last - first
        self.denoising += between * len(ends) / (len(ends) - 1)
