"""States of denoising trajectories, with the teacher's predictions at them.

Sampling with classifier-free guidance computes the teacher's predictions for the prompt and for the empty prompt at
every step. Stored, these are the targets of training updates: a trajectory is sampled once, and an update costs only
the student's own passes.
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
"""Number of trajectories sampled at once."""


@dataclass(frozen=True, kw_only=True)
class Rollout(Options):
    """Options of the sampling of trajectories."""

    seeds: Count
    """Number of trajectories of each prompt."""
    steps: Count
    """Number of denoising steps of a trajectory, each of which gives a state."""
    guidance: NotNegative
    """Guidance scale of trajectories."""
    trained_guidance: tuple[Positive, ...] = ()
    """Guidance scales of a guidance-distilled model in stored predictions, one drawn for each state; `guidance`
    when left out."""


class RolledOut(StateSource):
    """States from images that a model samples for prompts.

    Args:
        backbone: Model whose denoiser is the teacher, with a scheduler from `Backbone.rollout_scheduler`.
        scenes: Prompts to sample.
        prompts: Encodes the prompts.
        rollout: Options of the sampling.
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
        """Give the seed of the initial noise, which for a prompt does not depend on the other prompts."""
        scene, number = divmod(trajectory, self.rollout.seeds)
        return stable_seed(self.seed, self.scenes[scene].prompt, number)

    def kept_guidance(self, trajectory: int, level: int) -> float:
        """Give the guidance scale that the teacher reads at a state; 1 for models without guidance input.

        Args:
            trajectory: Index of the state's trajectory.
            level: Index of the state's timestep.
        """
        if not self.backbone.takes_guidance:
            return 1.0
        scales = self.rollout.trained_guidance or (self.rollout.guidance,)
        return scales[int(draw(len(scales), 1, self.noise_seed(trajectory), "guidance", level))]

    def recipe(self) -> dict[str, object]:
        """Give everything on which the trajectories depend in addition to the model."""
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
        """Predict for the scenes' prompts, as a step of their trajectories needs it.

        One pass is made for guidance-distilled models and without guidance; otherwise a second pass predicts for the
        null conditioning.
        """
        prompts, rollout = self.prompts([self.scenes[scene].prompt for scene in scenes]), self.rollout
        if self.backbone.takes_guidance:
            return Predicted(self.backbone.predict(x, t.expand(len(x)), prompts, rollout.guidance), None)
        if rollout.guidance == 1:
            return Predicted(self.backbone.predict(x, t.expand(len(x)), prompts), None)
        asked = Conditioning.cat([prompts, self.prompts.null(len(x))])
        return Predicted(*self.backbone.predict(torch.cat([x, x]), t.expand(2 * len(x)), asked).chunk(2))

    def asked(self, x: Tensor, t: Tensor, prompts: Sequence[str | None], guidance: Tensor) -> Tensor:
        """Predict with the teacher for prompts, at guidance scales that a guidance-distilled teacher reads."""
        scale = guidance if self.backbone.takes_guidance else None
        return self.backbone.predict(x, t, self.prompts(prompts), scale)

    def answers(self, x: Tensor, t: Tensor, scenes: Sequence[Scene], guidance: Tensor) -> Tensor:
        """Predict with the teacher for the scenes' other prompts, `(states, asks, channels, h, w)`."""
        asks = [prompt for scene in scenes for prompt in scene.asks]
        count = len(asks) // len(scenes)
        if not asks:
            return x.new_empty(len(x), 0, *x.shape[1:])
        rows = torch.arange(len(x), device=x.device).repeat_interleave(count)
        return self.asked(x[rows], t[rows], asks, guidance[rows]).view(len(x), count, *x.shape[1:])


class Predicted(NamedTuple):
    """The predictions from which a step of a trajectory is computed."""

    own: Tensor
    """Prediction for the scenes' prompts, `(rows, channels, h, w)`."""
    null: Tensor | None
    """Prediction for the null conditioning, where the step needs it."""

    def guided(self, backbone: Backbone, scale: float) -> Tensor:
        """Give the guided prediction that the step uses."""
        return self.own if self.null is None else backbone.guided(self.own, self.null, scale)


class Trajectories(RolledOut):
    """States of denoising trajectories: all steps of the first one, then those of the next.

    Args:
        *args: See `RolledOut`.
        student: Samples instead of the teacher, so that the states are those that the student reaches; the stored
            predictions are still the teacher's.
    """

    def __init__(self, *args: Any, student: Student | None = None) -> None:
        super().__init__(*args)
        self.student = student

    @property
    def per_scene(self) -> int:
        """See `StateSource.per_scene`."""
        return self.rollout.seeds * self.rollout.steps

    def spread(self, count: int) -> Tensor:
        """See `StateSource.spread`; the indices are those of the first trajectory."""
        return torch.linspace(0, self.rollout.steps - 1, count).long()

    @torch.no_grad()
    def roll(self, trajectories: Sequence[int], until: Sequence[int] | None = None) -> States:
        """Sample trajectories together.

        Args:
            trajectories: Indices of the trajectories.
            until: For each trajectory the one step whose state is kept, after which it ends; all steps when left out.

        Returns:
            The kept states, on the denoiser's device: step by step of each trajectory, in the given order.
        """
        backbone, levels = self.backbone, self.backbone.timesteps(self.rollout.steps)
        ends = [len(levels) - 1] * len(trajectories) if until is None else list(until)
        # Trajectories are sorted by length, longest first, so that the unfinished ones are always the first rows.
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
        """Give the states of some rows, with the teacher's predictions at a guidance scale for each."""
        rows = torch.tensor(list(wanted), device=x.device)
        x, own = x[rows], teacher.own[rows]
        named = [self.scenes[scenes[row]] for row in wanted]
        guidance = torch.tensor(scales, device=x.device)
        level = t.expand(len(x)).contiguous()
        null = self.asked(x, level, [None] * len(x), guidance) if teacher.null is None else teacher.null[rows]
        others = (guidance != self.rollout.guidance).nonzero().flatten()
        if self.backbone.takes_guidance and len(others):
            own_prompts = [named[row].prompt for row in others.tolist()]
            own = own.index_copy(0, others, self.asked(x[others], level[others], own_prompts, guidance[others]))
        more = self.answers(x, level, named, guidance)
        scene = torch.tensor([scenes[row] for row in wanted], device=x.device)
        return States(x, level, scene, own, null, more, guidance)


class OnlineStates(Trajectories):
    """States that are sampled from noise whenever they are needed, and not stored (the papers' method)."""

    def take(self, index: Tensor) -> States:
        """See `StateSource.take`."""
        pairs = [divmod(int(i), self.rollout.steps) for i in index]
        return self.roll([trajectory for trajectory, _ in pairs], [step for _, step in pairs])


class TrajectoryBuffer(Trajectories):
    """Trajectories that are sampled once, in batches, and stored on the CPU.

    Args:
        *args: See `Trajectories`.
        gather: Sums a tensor over all processes.
        share: Index of this process, and number of processes.
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
        """Sample all trajectories, chunk by chunk; several processes share the chunks."""
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

    @torch.no_grad()
    def finished(self, seeds: Sequence[int], rollout: Rollout) -> dict[int, Tensor]:
        """Compute where stored trajectories end; their predictions are stored, so it costs no pass.

        Args:
            seeds: Seeds of the initial noise, see `noise_seed`.
            rollout: How trajectories are to be sampled.

        Returns:
            Clean latents `(channels, h, w)` by seed, of the trajectories that are stored and were sampled that way.
        """
        backbone, own = self.backbone, self.rollout
        alike = (own.steps, own.guidance) == (rollout.steps, rollout.guidance)
        # A student ends elsewhere, and models with a guidance input predict at other scales than that of the rollout.
        if self.states is None or self.student is not None or backbone.takes_guidance or not alike:
            return {}
        wanted = set(seeds)
        stored = {seed: number for number in range(self.trajectories) if (seed := self.noise_seed(number)) in wanted}
        if not stored:
            return {}
        last = self.take(torch.tensor([(number + 1) * own.steps - 1 for number in stored.values()]))
        found = Predicted(last.own, None if own.guidance == 1 else last.unprompted)
        ends = backbone.step(found.guided(backbone, own.guidance), backbone.timesteps(own.steps)[-1], last.x)
        return dict(zip(stored, ends, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Give the stored states for files and checkpoints."""
        return {} if self.states is None else self.states.parts()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the states from a file or checkpoint."""
        self.states = States(**state) if state else None


def chunks(trajectories: int, share: tuple[int, int]) -> Iterator[tuple[int, range]]:
    """Yield the trajectories that a process samples together, with the index of each chunk.

    Args:
        trajectories: Number of trajectories.
        share: Index of the process, and number of processes.
    """
    for number, first in enumerate(range(0, trajectories, CHUNK)):
        if number % share[1] == share[0]:
            yield number, range(first, min(first + CHUNK, trajectories))


@contextmanager
def rolling_out(backbone: Backbone) -> Iterator[None]:
    """Give the pipeline a scheduler for rollouts inside of the block, and restore its own afterwards."""
    stock = backbone.pipe.scheduler
    backbone.pipe.scheduler = backbone.rollout_scheduler()
    try:
        yield
    finally:
        backbone.pipe.scheduler = stock
