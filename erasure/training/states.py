"""Where training states come from: steps of denoising trajectories with the teacher's predictions at them.

A rollout with classifier-free guidance computes the teacher's prediction for its prompt and for the empty one at every
step anyway. Kept, they are the targets of a training update for nothing: a trajectory is rolled out once, and an
update costs the student's own passes only.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Backbone, Conditioning
from erasure.options import Count, NotNegative, Options, Positive
from erasure.text.encodings import Reader
from erasure.training.student import Student

CHUNK = 8
"""Trajectories rolled out at once."""


class Scene(NamedTuple):
    """A prompt to roll out."""

    prompt: str | None
    """`None` rolls out what the pipeline tells the denoiser where no prompt is given."""
    asks: tuple[str | None, ...] = ()
    """Other prompts that the teacher is asked at every state, `None` for no prompt; as many in all scenes of one
    source."""


class States(NamedTuple):
    """Noisy latents and what the teacher predicts there."""

    x: Tensor
    """`(states, channels, h, w)`, as the denoiser wants them."""
    t: Tensor
    """`(states,)` noise levels."""
    scene: Tensor
    """`(states,)` index of each one's scene."""
    own: Tensor
    """Prediction for the scene's prompt, shaped as `x`."""
    null: Tensor
    """Prediction where no prompt is given, shaped as `x`."""
    asked: Tensor
    """For the prompts asked besides, `(states, asks, channels, h, w)`."""
    guidance: Tensor
    """`(states,)` scale that the teacher was told for all of these predictions; 1 where a model is not told any."""

    def rows(self, index: Tensor | slice) -> States:
        """Some of them."""
        return States(*(part[index] for part in self))

    def to(self, device: torch.device) -> States:
        """On a device."""
        return States(*(part.to(device, non_blocking=True) for part in self))


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


class StateSource(ABC):
    """Training states by number: all steps of the first trajectory, then those of the next.

    Args:
        backbone: Its denoiser is the teacher, with a scheduler as `Backbone.rollout_scheduler` makes it.
        scenes: What to roll out.
        prompts: Encodings of their prompts.
        rollout: How.
        seed: Seeds the initial noise.
        student: Takes the steps in the teacher's place, so that states are those that it meets; the predictions that
            are kept remain the teacher's.
    """

    def __init__(
        self, backbone: Backbone, scenes: Sequence[Scene], prompts: Reader, rollout: Rollout, seed: int,
        student: Student | None = None,
    ) -> None:  # fmt: skip
        self.backbone, self.scenes, self.prompts = backbone, list(scenes), prompts
        self.rollout, self.seed, self.student = rollout, seed, student

    def __len__(self) -> int:
        """Number of states."""
        return self.trajectories * self.rollout.steps

    @property
    def trajectories(self) -> int:
        """Number of trajectories."""
        return len(self.scenes) * self.rollout.seeds

    @abstractmethod
    def take(self, index: Tensor) -> States:
        """States by number `(states,)`, on the denoiser's device."""

    def of(self, states: States) -> list[Scene]:
        """The scenes of states."""
        return [self.scenes[index] for index in states.scene.tolist()]

    def noise_seed(self, trajectory: int) -> int:
        """Of the initial noise: the same for a prompt whatever the other scenes are."""
        scene, number = divmod(trajectory, self.rollout.seeds)
        return stable_seed(self.seed, self.scenes[scene].prompt, number)

    def kept_guidance(self, trajectory: int, step: int) -> float:
        """Scale that the teacher is told at a state; 1 for a model that is not told any."""
        if not self.backbone.told_guidance:
            return 1.0
        scales = self.rollout.trained_guidance or (self.rollout.guidance,)
        return scales[int(draw(len(scales), 1, self.noise_seed(trajectory), "guidance", step))]

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
                found = self._predicted(inputs, t, named)
            if wanted:
                assert found is not None
                scales = [self.kept_guidance(trajectories[order[row]], step) for row in wanted]
                states = self._kept(inputs, t, named, found, wanted, scales)
                kept += [((order[row], step), states.rows(slice(i, i + 1))) for i, row in enumerate(wanted)]
            if self.student is not None and goes_on:
                with self.student.active():
                    found = self._predicted(inputs, t, named)
            if goes_on:
                assert found is not None
                x = backbone.step(found.guided(backbone, self.rollout.guidance), t, x)
        kept.sort(key=lambda pair: pair[0])
        return States(*(torch.cat(parts) for parts in zip(*(states for _, states in kept), strict=True)))

    def _predicted(self, x: Tensor, t: Tensor, scenes: Sequence[int]) -> _Predicted:
        """Predictions for the scenes' prompts, as a step of their trajectories needs them.

        A model that is told its guidance takes one pass, and so does any without guidance; else a second one sees no
        prompt.
        """
        prompts, rollout = self.prompts([self.scenes[scene].prompt for scene in scenes]), self.rollout
        if self.backbone.told_guidance:
            return _Predicted(self.backbone.predict(x, t.expand(len(x)), prompts, rollout.guidance), None)
        if rollout.guidance == 1:
            return _Predicted(self.backbone.predict(x, t.expand(len(x)), prompts), None)
        asked = Conditioning.cat([prompts, self.prompts.null(len(x))])
        return _Predicted(*self.backbone.predict(torch.cat([x, x]), t.expand(2 * len(x)), asked).chunk(2))

    def _kept(
        self, x: Tensor, t: Tensor, scenes: Sequence[int], teacher: _Predicted, wanted: Sequence[int],
        scales: Sequence[float],
    ) -> States:  # fmt: skip
        """States of some rows, with what the teacher says there when it is told a scale for each."""
        rows = torch.tensor(list(wanted), device=x.device)
        x, own = x[rows], teacher.own[rows]
        named = [self.scenes[scenes[row]] for row in wanted]
        guidance = torch.tensor(scales, device=x.device)

        def asked(prompts: Sequence[str | None], index: Tensor) -> Tensor:
            """Predictions for some of the states."""
            told = guidance[index] if self.backbone.told_guidance else None
            return self.backbone.predict(x[index], t.expand(len(index)), self.prompts(prompts), told)

        every = torch.arange(len(x), device=x.device)
        null = asked([None] * len(x), every) if teacher.null is None else teacher.null[rows]
        others = every[guidance != self.rollout.guidance]
        if self.backbone.told_guidance and len(others):
            own = own.index_copy(0, others, asked([named[row].prompt for row in others.tolist()], others))
        asks = [prompt for scene in named for prompt in scene.asks]
        count = len(asks) // len(named)
        more = x.new_empty(len(x), 0, *x.shape[1:])
        if asks:
            more = asked(asks, every.repeat_interleave(count)).view(len(x), count, *x.shape[1:])
        scene = torch.tensor([scenes[row] for row in wanted], device=x.device)
        return States(x, t.expand(len(x)).contiguous(), scene, own, null, more, guidance)


class _Predicted(NamedTuple):
    """What a step of a trajectory was computed from."""

    own: Tensor
    """Prediction for the scenes' prompts, `(rows, channels, h, w)`."""
    null: Tensor | None
    """Without a prompt, where the step takes it."""

    def guided(self, backbone: Backbone, scale: float) -> Tensor:
        """What the step follows."""
        return self.own if self.null is None else backbone.guided(self.own, self.null, scale)


class OnlineStates(StateSource):
    """The reference: every state is rolled out from noise when it is asked for, and forgotten."""

    def take(self, index: Tensor) -> States:
        """See `StateSource.take`."""
        pairs = [divmod(int(i), self.rollout.steps) for i in index]
        return self.roll([trajectory for trajectory, _ in pairs], [step for _, step in pairs])


class TrajectoryBuffer(StateSource):
    """All trajectories rolled out once, in batches, and kept on the CPU.

    Args:
        *args: See `StateSource`.
        gather: With several processes: sums a tensor over them.
        share: Index of this process and how many there are.
        **options: See `StateSource`.
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
        for number, first in enumerate(range(0, self.trajectories, CHUNK)):
            if number % self.share[1] != self.share[0]:
                continue
            chunk = range(first, min(first + CHUNK, self.trajectories))
            made = self.roll(chunk)
            if not total:
                total = [torch.zeros(len(self), *part.shape[1:], dtype=part.dtype) for part in made]
            start = first * self.rollout.steps
            for whole, part in zip(total, made, strict=True):
                whole[start : start + len(part)] = part.cpu()
        if not total:  # fewer chunks than processes: shapes from a trajectory that somebody else keeps
            total = [torch.zeros(len(self), *p.shape[1:], dtype=p.dtype) for p in self.roll([0], [0])]
        gathered = [self.gather(part.to(self.backbone.device)).cpu() for part in total]
        pin = self.backbone.device.type == "cuda"
        self.states = States(*(part.pin_memory() if pin else part for part in gathered))

    def take(self, index: Tensor) -> States:
        """See `StateSource.take`."""
        assert self.states is not None, "fill the buffer first"
        return self.states.rows(index).to(self.backbone.device)

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

    def state_dict(self) -> dict[str, Tensor]:
        """For files and checkpoints."""
        return {} if self.states is None else dict(self.states._asdict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From a file or checkpoint."""
        self.states = States(**state) if state else None


def session_of(backbone: Backbone) -> dict[str, object]:
    """Size and text length that a backbone draws and reads with, plain data."""
    return {
        "latents": list(backbone.latents.shape()),
        "tokens": {tower.component: tower.max_length for tower in backbone.towers},
    }


def stable_seed(*parts: object) -> int:
    """A seed of 63 bits made of anything, the same on every machine."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def draw(total: int, count: int, *seed: object) -> Tensor:
    """`count` numbers below `total`, with replacement, `(count,)`; the same for the same seed."""
    return torch.randint(total, (count,), generator=torch.Generator().manual_seed(stable_seed(*seed)))


@contextmanager
def rolling_out(backbone: Backbone) -> Iterator[None]:
    """The pipeline's scheduler is one for rollouts inside, and none of the pipeline's state moves."""
    stock = backbone.pipe.scheduler
    backbone.pipe.scheduler = backbone.rollout_scheduler()
    try:
        yield
    finally:
        backbone.pipe.scheduler = stock


Mode = Literal["buffer", "online"]
"""Where states come from."""
