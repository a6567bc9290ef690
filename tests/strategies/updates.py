"""The first update of a training, for tests that compare it with plain arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from erasure import Concept
from erasure.backbones import Backbone
from erasure.training.loop import Share
from erasure.training.trajectories import rolling_out


def first_update(strategy: Any, backbone: Backbone, concept: Concept) -> tuple[Any, Any]:
    """A training whose student differs from the stock model, and the batch of its first update."""
    task = strategy.task(backbone, backbone.reader, [concept], 0, Accelerator(cpu=True))
    with torch.no_grad():
        for up in task.student.up:
            up.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    with rolling_out(backbone):
        for source in task.sources():
            source.fill()
        return task, strategy.prepare(task, 0, Share(0, 1))
