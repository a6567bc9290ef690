"""Learning from pictures for stress tests: a new token, a LoRA or all weights, by the package's training loop."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from erasure.attach import ErasureManager
from erasure.backbones import Backbone, backbone_for
from erasure.errors import EvaluationError
from erasure.files import discard, read_tensors, write_bytes
from erasure.interop import paths, scopes
from erasure.learning.pictures import encoded
from erasure.learning.player import LearnedTensors
from erasure.learning.tokens import beside, check_names, put_in, reading_towers, start_vectors
from erasure.training.loop import Share, Trainer
from erasure.training.objectives import matching
from erasure.training.run import Run
from erasure.training.states import draw, stable_seed
from erasure.training.student import Student, make_student
from erasure.training.turns import After, Descent, Player, Turn

Mode = Literal["embedding", "lora", "full"]
TOKEN = "<stress>"
"""The new token of mode `embedding`."""
LEVELS = 1000
"""Noise levels of training."""


@dataclass(frozen=True)
class LearningOptions:
    """Options of a training on pictures."""

    mode: Mode
    steps: tuple[int, ...]
    """Updates after which what was learned is kept, in rising order."""
    lr: float
    batch: int
    rank: int
    vectors: int


class Batch(NamedTuple):
    """Rows of an update in one process."""

    x: Tensor
    """`(rows, channels, h, w)`."""
    t: Tensor
    """`(rows,)`."""
    target: Tensor
    """What is to be predicted, shaped as `x`."""
    captions: list[str]


class PictureLearner:
    """A model that learns from pictures: its trained tensors, and the pipeline that draws with them.

    Args:
        pipe: The model; its weights stay as they are.
        lessons: How it learns.
        seed: Of what starts at random.

    Raises:
        UnsupportedModelError: It is quantised; or a token is to be learned, and the family reads none.
    """

    def __init__(self, pipe: DiffusionPipeline, lessons: LearningOptions, seed: int) -> None:
        backbone_for(pipe).check_plain("learn with plain weights, on one device")
        generator = torch.Generator().manual_seed(stable_seed(seed, "start"))
        self.mode = lessons.mode
        self.player: Student | LearnedTensors
        if lessons.mode == "embedding":
            towers = reading_towers(backbone_for(pipe))
            check_names([TOKEN], towers)
            self.pipe = beside(pipe)
            vectors = {
                tower.component: {TOKEN: start_vectors(tower, "", lessons.vectors, 0.0, generator)} for tower in towers
            }
            put_in(self.pipe, vectors)
            self.backbone = backbone_for(self.pipe)
            self.player = LearnedTensors(self.backbone.towers, [TOKEN], 1.0)
        else:
            self.pipe = ErasureManager(pipe).twin()
            self.backbone = backbone_for(self.pipe)
            self.player = make_student(
                self.backbone.denoiser, trained_paths(self.backbone, lessons.mode),
                lessons.rank if lessons.mode == "lora" else 0, generator, f"mode={lessons.mode!r}",
            )  # fmt: skip

    @property
    def learns_words(self) -> bool:
        """Whether prompts must name the new token."""
        return self.mode == "embedding"

    @contextmanager
    def taught(self, state: Path | None) -> Iterator[DiffusionPipeline]:
        """Give the pipeline with a saved state of the training; untrained where there is none.

        Raises:
            EvaluationError: The file is damaged, or of something else.
        """
        if state is not None:
            self.load(state)
        with torch.no_grad(), self.player.active():
            yield self.pipe

    def load(self, state: Path) -> None:
        """Load a saved state; see `taught`."""
        tensors = read_tensors(state, error=EvaluationError)
        own = self.player.state_dict()
        if {n: t.shape for n, t in tensors.items()} != {n: t.shape for n, t in own.items()}:
            raise EvaluationError(f"{state} holds what another training has learned: delete it to learn anew")
        self.player.load_state_dict(tensors)


def trained_paths(backbone: Backbone, mode: Mode) -> list[str]:
    """List the trained parameters of the denoiser: all, or the linear layers of attention."""
    every = list(paths.canonical_parameters(backbone.denoiser))
    if mode == "full":
        return every
    sites = tuple(f"{site.name}." for site in backbone.attention_sites())
    return [path for path in every if path.startswith(sites) and path.endswith(".weight")]


class Snapshots(After):
    """Saves the trained tensors after some updates, a file each.

    Args:
        player: What learns.
        folder: Where files go.
        steps: After how many updates.
    """

    def __init__(self, player: Player, folder: Path, steps: Sequence[int]) -> None:
        self.player, self.folder, self.steps = player, folder, set(steps)

    def apply(self, update: int, lr: float) -> None:
        """See `After.apply`."""
        if update + 1 in self.steps:
            tensors = {name: part.detach().cpu().contiguous() for name, part in self.player.state_dict().items()}
            write_bytes(state_path(self.folder, update + 1), save(tensors), error=EvaluationError)


def state_path(folder: Path, step: int) -> Path:
    """Give the path of the tensors after some number of updates."""
    return folder / f"step-{step:06d}.safetensors"


def is_learned(folder: Path, steps: Sequence[int]) -> bool:
    """Whether a training is finished."""
    return all(state_path(folder, step).is_file() for step in steps)


def learn(
    pupil: PictureLearner, pictures: Sequence[Image.Image], captions: Sequence[str], lessons: LearningOptions, *,
    seed: int, folder: Path, recipe: dict[str, object], progress: bool,
) -> None:  # fmt: skip
    """Train from the last checkpoint, and save the tensors after every requested number of steps.

    The loss is that of the denoiser's own training: the error of its prediction on noised pictures.

    Args:
        pupil: What learns.
        pictures: What it is shown.
        captions: Of each picture.
        lessons: How.
        seed: Of everything random: rows, noise and noise levels, the same for every pupil.
        folder: Where checkpoints and states go.
        recipe: All that the training depends on, plain data.
        progress: Whether a bar is shown.

    Raises:
        DivergenceError: NaN during optimisation.
        TrainingError: The folder is in use, or holds another training.
    """
    from erasure.progress import reporting

    backbone, last = pupil.backbone, max(lessons.steps)
    run = Run(checkpoints=folder)
    with ExitStack() as stack:
        stack.enter_context(scopes.same_gradient_mode())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(run.opened(recipe))
        report = stack.enter_context(reporting(progress, folder.name))
        towers = [tower.module for tower in backbone.towers]
        stack.enter_context(scopes.frozen(backbone.denoiser, *towers, backbone.pipe.vae))
        clean = encoded(backbone, pixels_of(backbone, pictures))
        prepare = partial(_prepared, backbone, clean, list(captions), lessons.batch, seed)
        losses = partial(_losses, backbone, pupil.learns_words)
        trainer = Trainer(
            turns=[
                Turn(
                    name="pupil", player=pupil.player, losses=losses,
                    descent=Descent(lr=lessons.lr, weight_decay=1e-2, clip=1.0),
                    after=(Snapshots(pupil.player, folder, lessons.steps),),
                )
            ],
            prepare=prepare, steps=last, seed=seed, run=run, scales_losses=backbone.dtype == torch.float16,
        )  # fmt: skip
        trainer.train(report)
    discard(folder, ("training.ckpt", "training.json"))


def _prepared(
    backbone: Backbone, clean: Tensor, captions: Sequence[str], batch: int, seed: int, update: int, share: Share
) -> Batch:  # fmt: skip
    """Prepare the rows of an update."""
    levels = backbone.timesteps(LEVELS // 2).to(backbone.device)
    numbers = share.of(draw(len(clean), batch, seed, "picture", update))
    chosen = share.of(draw(len(levels), batch, seed, "level", update))
    factor = backbone.latents.factor
    size = (factor * clean.shape[2], factor * clean.shape[3])
    noise = backbone.noise([stable_seed(seed, "noise", update, row) for row in range(batch)], *size)
    noise = share.of(noise)
    own, t = clean[numbers.to(clean.device)], levels[chosen.to(levels.device)]
    way = backbone.parametrisation
    return Batch(
        way.noised(own, noise, t), t, way.target(own, noise, t), [captions[number] for number in numbers.tolist()]
    )


def _losses(backbone: Backbone, learns_words: bool, batch: Batch) -> dict[str, Tensor]:
    """Compute the error of the prediction."""
    # Encoded anew each time: what an erasure reads in prompts must be of the rows that the denoiser is given.
    with torch.set_grad_enabled(learns_words):
        conditioning = backbone.encode(batch.captions)
    return {"denoising": matching(backbone.predict(batch.x, batch.t, conditioning), batch.target)}


def pixels_of(backbone: Backbone, pictures: Sequence[Image.Image]) -> Tensor:
    """Resize pictures to the model's size, `(pictures, 3, height, width)` in 0-1."""
    _, rows, columns = backbone.latents.shape()
    size = (backbone.latents.factor * columns, backbone.latents.factor * rows)
    fitted = [
        each.convert("RGB") if each.size == size else each.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        for each in pictures
    ]  # fmt: skip
    return torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1).float() / 255 for each in fitted])


def renamed(prompt: str, old: str, new: str) -> str:
    """Replace a thing in a prompt by another, with its article; a token in brackets takes "a".

    Raises:
        EvaluationError: The prompt does not name the thing.
    """
    article = "an" if new[0].lower() in "aeiou" else "a"
    word = re.compile(rf"\b(?:(an?) )?{re.escape(old)}\b", re.IGNORECASE)
    made, count = word.subn(lambda found: f"{article} {new}" if found[1] else new, prompt)
    if not count:
        raise EvaluationError(f"the prompt {prompt!r} does not name {old!r}, so it cannot be asked of {new!r}")
    return made
