"""States of denoising trajectories, with the teacher's predictions at them.

A rollout with classifier-free guidance computes the teacher's prediction for its prompt and for the empty one at every
step anyway. Kept, they are the targets of a training update for nothing: a trajectory is rolled out once, and an
update costs the student's own passes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Backbone, Conditioning
from erasure.options import Count, NotNegative, Options, Positive
from erasure.text.encodings import Reader
from erasure.training.states import Scene, States, StateSource, draw, session_of, stable_seed
from erasure.training.student import Student

CHUNK = 8
"""Trajectories rolled out at once."""


@dataclass(frozen=True, kw_only=True)
class Rollout(Options):
    """How trajectories are made."""

    seeds: Count
    """Trajectories of each scene."""
    steps: Count
    """Denoising steps of each, and states that it gives."""
    guidance: NotNegative
    """Guidance scale of trajectories."""
    trained_guidance: tuple[Positive, ...] = ()
    """Scales that a model which is told its guidance makes the kept predictions at, one drawn for each state; that of
    trajectories when left out."""


class RolledOut(StateSource):
    """States of what a model draws for the scenes' prompts.

    Args:
        backbone: Its denoiser is the teacher, with a scheduler as `Backbone.rollout_scheduler` makes it.
        scenes: What to roll out.
        prompts: Encodings of their prompts.
        rollout: How.
        seed: Seeds the initial noise.
    """

    def __init__(
        self, backbone: Backbone, scenes: Sequence[Scene], prompts: Reader, rollout: Rollout, seed: int
    ) -> None:
        super().__init__(scenes)
        self.backbone, self.prompts, self.rollout, self.seed = backbone, prompts, rollout, seed

    @property
    def trajectories(self) -> int:
        """Number of trajectories."""
        return len(self.scenes) * self.rollout.seeds

    def noise_seed(self, trajectory: int) -> int:
        """Of the initial noise: the same for a prompt whatever the other scenes are."""
        scene, number = divmod(trajectory, self.rollout.seeds)
        return stable_seed(self.seed, self.scenes[scene].prompt, number)

    def kept_guidance(self, trajectory: int, level: int) -> float:
        """Scale that the teacher is told at a state; 1 for a model that is not told any.

        Args:
            trajectory: That of the state.
            level: Number of its noise level.
        """
        if not self.backbone.told_guidance:
            return 1.0
        scales = self.rollout.trained_guidance or (self.rollout.guidance,)
        return scales[int(draw(len(scales), 1, self.noise_seed(trajectory), "guidance", level))]

    def recipe(self) -> dict[str, object]:
        """All that the trajectories depend on besides the model."""
        scheduler = self.backbone.pipe.scheduler
        config = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
        return {
            "scenes": [[scene.prompt, *scene.asks] for scene in self.scenes],
            "rollout": asdict(self.rollout),
            "seed": self.seed,
            "scheduler": [type(scheduler).__name__, config],
            "dtype": str(self.backbone.dtype),
            "session": session_of(self.backbone),
        }

    def predicted(self, x: Tensor, t: Tensor, scenes: Sequence[int]) -> Predicted:
        """Predictions for the scenes' prompts, as a step of their trajectories needs them.

        A model that is told its guidance takes one pass, and so does any without guidance; else a second one sees no
        prompt.
        """
        prompts, rollout = self.prompts([self.scenes[scene].prompt for scene in scenes]), self.rollout
        if self.backbone.told_guidance:
            return Predicted(self.backbone.predict(x, t.expand(len(x)), prompts, rollout.guidance), None)
        if rollout.guidance == 1:
            return Predicted(self.backbone.predict(x, t.expand(len(x)), prompts), None)
        asked = Conditioning.cat([prompts, self.prompts.null(len(x))])
        return Predicted(*self.backbone.predict(torch.cat([x, x]), t.expand(2 * len(x)), asked).chunk(2))

    def asked(self, x: Tensor, t: Tensor, prompts: Sequence[str | None], guidance: Tensor) -> Tensor:
        """The teacher's predictions for prompts, when it is told these scales, if it is told any."""
        told = guidance if self.backbone.told_guidance else None
        return self.backbone.predict(x, t, self.prompts(prompts), told)

    def answers(self, x: Tensor, t: Tensor, scenes: Sequence[Scene], guidance: Tensor) -> Tensor:
        """The teacher's predictions for what scenes ask besides, `(states, asks, channels, h, w)`."""
        asks = [prompt for scene in scenes for prompt in scene.asks]
        count = len(asks) // len(scenes)
        if not asks:
            return x.new_empty(len(x), 0, *x.shape[1:])
        rows = torch.arange(len(x), device=x.device).repeat_interleave(count)
        return self.asked(x[rows], t[rows], asks, guidance[rows]).view(len(x), count, *x.shape[1:])


class Predicted(NamedTuple):
    """What a step of a trajectory was computed from."""

    own: Tensor
    """Prediction for the scenes' prompts, `(rows, channels, h, w)`."""
    null: Tensor | None
    """Without a prompt, where the step takes it."""

    def guided(self, backbone: Backbone, scale: float) -> Tensor:
        """What the step follows."""
        return self.own if self.null is None else backbone.guided(self.own, self.null, scale)


class Trajectories(RolledOut):
    """States of denoising trajectories: all steps of the first one, then those of the next.

    Args:
        *args: See `RolledOut`.
        student: Takes the steps in the teacher's place, so that states are those that it meets; the predictions that
            are kept remain the teacher's.
    """

    def __init__(self, *args: Any, student: Student | None = None) -> None:
        super().__init__(*args)
        self.student = student

    @property
    def per_scene(self) -> int:
        """See `StateSource.per_scene`."""
        return self.rollout.seeds * self.rollout.steps

    def spread(self, count: int) -> Tensor:
        """See `StateSource.spread`; of the first trajectory."""
        return torch.linspace(0, self.rollout.steps - 1, count).long()

    @torch.no_grad()
    def roll(self, trajectories: Sequence[int], until: Sequence[int] | None = None) -> States:
        """Roll trajectories out together.

        Args:
            trajectories: Their numbers.
            until: For each the one step to keep, after which it ends; all steps of all when left out.

        Returns:
            The states kept, on the denoiser's device: step by step of each trajectory, in the order given.
        """
        backbone, levels = self.backbone, self.backbone.timesteps(self.rollout.steps)
        ends = [len(levels) - 1] * len(trajectories) if until is None else list(until)
        # Longest first: those that go on are always the first rows.
        order = sorted(range(len(trajectories)), key=lambda row: -ends[row])
        scenes = [trajectories[row] // self.rollout.seeds for row in order]
        x = backbone.noise([self.noise_seed(trajectories[row]) for row in order])
        kept: list[tuple[tuple[int, int], States]] = []
        for step, t in enumerate(levels):
            alive = sum(ends[row] >= step for row in order)
            if not alive:
                break
            x, named = x[:alive], scenes[:alive]
            inputs = backbone.model_input(x, t)
            wanted = [row for row in range(alive) if until is None or ends[order[row]] == step]
            goes_on = any(ends[order[row]] > step for row in range(alive))
            found = None
            if wanted or self.student is None:
                found = self.predicted(inputs, t, named)
            if wanted:
                assert found is not None
                scales = [self.kept_guidance(trajectories[order[row]], step) for row in wanted]
                states = self._kept(inputs, t, named, found, wanted, scales)
                kept += [((order[row], step), states.rows(slice(i, i + 1))) for i, row in enumerate(wanted)]
            if self.student is not None and goes_on:
                with self.student.active():
                    found = self.predicted(inputs, t, named)
            if goes_on:
                assert found is not None
                x = backbone.step(found.guided(backbone, self.rollout.guidance), t, x)
        kept.sort(key=lambda pair: pair[0])
        return States.cat([states for _, states in kept])

    def _kept(
        self, x: Tensor, t: Tensor, scenes: Sequence[int], teacher: Predicted, wanted: Sequence[int],
        scales: Sequence[float],
    ) -> States:  # fmt: skip
        """States of some rows, with what the teacher says there when it is told a scale for each."""
        rows = torch.tensor(list(wanted), device=x.device)
        x, own = x[rows], teacher.own[rows]
        named = [self.scenes[scenes[row]] for row in wanted]
        guidance = torch.tensor(scales, device=x.device)
        level = t.expand(len(x)).contiguous()
        null = self.asked(x, level, [None] * len(x), guidance) if teacher.null is None else teacher.null[rows]
        others = (guidance != self.rollout.guidance).nonzero().flatten()
        if self.backbone.told_guidance and len(others):
            own_prompts = [named[row].prompt for row in others.tolist()]
            own = own.index_copy(0, others, self.asked(x[others], level[others], own_prompts, guidance[others]))
        more = self.answers(x, level, named, guidance)
        scene = torch.tensor([scenes[row] for row in wanted], device=x.device)
        return States(x, level, scene, own, null, more, guidance)


class OnlineStates(Trajectories):
    """The reference: every state is rolled out from noise when it is asked for, and forgotten."""

    def take(self, index: Tensor) -> States:
        """See `StateSource.take`."""
        pairs = [divmod(int(i), self.rollout.steps) for i in index]
        return self.roll([trajectory for trajectory, _ in pairs], [step for _, step in pairs])


class TrajectoryBuffer(Trajectories):
    """All trajectories rolled out once, in batches, and kept on the CPU.

    Args:
        *args: See `Trajectories`.
        gather: With several processes: sums a tensor over them.
        share: Index of this process and how many there are.
        **options: See `Trajectories`.
    """

    def __init__(
        self, *args: Any, gather: Callable[[Tensor], Tensor] = lambda tensor: tensor, share: tuple[int, int] = (0, 1),
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **options)
        self.gather, self.share = gather, share
        self.states: States | None = None

    def fill(self) -> None:
        """Roll everything out, chunk by chunk; several processes share the chunks."""
        total: list[Tensor] = []
        for _, chunk in chunks(self.trajectories, self.share):
            made = self.roll(chunk)
            if not total:
                total = [torch.zeros(len(self), *part.shape[1:], dtype=part.dtype) for part in made.parts().values()]
            start = chunk.start * self.rollout.steps
            for whole, part in zip(total, made.parts().values(), strict=True):
                whole[start : start + len(part)] = part.cpu()
        if not total:  # fewer chunks than processes: shapes from a trajectory that somebody else keeps
            total = [torch.zeros(len(self), *p.shape[1:], dtype=p.dtype) for p in self.roll([0], [0]).parts().values()]
        gathered = [self.gather(part.to(self.backbone.device)).cpu() for part in total]
        pin = self.backbone.device.type == "cuda"
        self.states = States(*(part.pin_memory() if pin else part for part in gathered))

    def take(self, index: Tensor) -> States:
        """See `StateSource.take`."""
        assert self.states is not None, "fill the buffer first"
        return self.states.rows(index).to(self.backbone.device)

    def state_dict(self) -> dict[str, Tensor]:
        """For files and checkpoints."""
        return {} if self.states is None else self.states.parts()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From a file or checkpoint."""
        self.states = States(**state) if state else None


def chunks(trajectories: int, share: tuple[int, int]) -> Iterator[tuple[int, range]]:
    """The trajectories that a process rolls out together, with the number of each chunk.

    Args:
        trajectories: How many there are.
        share: Index of the process and how many there are.
    """
    for number, first in enumerate(range(0, trajectories, CHUNK)):
        if number % share[1] == share[0]:
            yield number, range(first, min(first + CHUNK, trajectories))


@contextmanager
def rolling_out(backbone: Backbone) -> Iterator[None]:
    """The pipeline's scheduler is one for rollouts inside, and none of the pipeline's state moves."""
    stock = backbone.pipe.scheduler
    backbone.pipe.scheduler = backbone.rollout_scheduler()
    try:
        yield
    finally:
        backbone.pipe.scheduler = stock
