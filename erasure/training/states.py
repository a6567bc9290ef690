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
from erasure.options import Count, NotNegative, Options
from erasure.text.encodings import Reader
from erasure.training.student import Student

CHUNK = 8
"""Trajectories rolled out at once."""


class Scene(NamedTuple):
    """A prompt to roll out."""

    prompt: str
    asks: tuple[str, ...] = ()
    """Other prompts that the teacher is asked at every state; as many in all scenes of one source."""


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
    """For the empty prompt."""
    asked: Tensor
    """For the prompts asked besides, `(states, asks, channels, h, w)`."""

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
    """Classifier-free guidance scale."""


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
            guided = None
            if wanted or self.student is None:
                guided = self._guided(inputs, t, named)
            if wanted:
                assert guided is not None
                found = self._kept(inputs, t, named, guided, wanted)
                kept += [((order[row], step), found.rows(slice(i, i + 1))) for i, row in enumerate(wanted)]
            if self.student is not None and goes_on:
                with self.student.active():
                    guided = self._guided(inputs, t, named)
            if goes_on:
                assert guided is not None
                own, null = guided
                x = backbone.step(backbone.guided(own, null, self.rollout.guidance), t, x)
        kept.sort(key=lambda pair: pair[0])
        return States(*(torch.cat(parts) for parts in zip(*(states for _, states in kept), strict=True)))

    def _guided(self, x: Tensor, t: Tensor, scenes: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Predictions for the scenes' prompts and for the empty one."""
        prompts = self.prompts([self.scenes[scene].prompt for scene in scenes])
        asked = Conditioning.cat([prompts, self.prompts.null(len(x))])
        own, null = self.backbone.predict(torch.cat([x, x]), t.expand(2 * len(x)), asked).chunk(2)
        return own, null

    def _kept(
        self, x: Tensor, t: Tensor, scenes: Sequence[int], teacher: tuple[Tensor, Tensor], wanted: Sequence[int]
    ) -> States:
        rows = torch.tensor(list(wanted), device=x.device)
        x = x[rows]
        asks = [prompt for row in wanted for prompt in self.scenes[scenes[row]].asks]
        count = len(asks) // len(wanted)
        asked = x.new_empty(len(x), 0, *x.shape[1:])
        if asks:
            repeated = x.repeat_interleave(count, 0)
            made = self.backbone.predict(repeated, t.expand(len(repeated)), self.prompts(asks))
            asked = made.view(len(x), count, *x.shape[1:])
        own, null = (part[rows] for part in teacher)
        scene = torch.tensor([scenes[row] for row in wanted], device=x.device)
        return States(x, t.expand(len(x)).contiguous(), scene, own, null, asked)


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
        }

    def state_dict(self) -> dict[str, Tensor]:
        """For files and checkpoints."""
        return {} if self.states is None else dict(self.states._asdict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """From a file or checkpoint."""
        self.states = States(**state) if state else None


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
