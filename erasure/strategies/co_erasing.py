"""Co-Erasing: erasing with words and pictures together (Li et al., ICML 2025, arXiv 2505.11131)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from erasure import files
from erasure.backbones import Backbone, TextTower
from erasure.cache import module_fingerprint
from erasure.concept import Concept
from erasure.interop import scopes
from erasure.interop.image_prompts import ImagePrompts, opened, refined, showing
from erasure.needs import Need
from erasure.options import Count, CountOrZero, PathText, Presets, ZeroToOne
from erasure.strategies.base import EarlierErasure, register
from erasure.strategies.esd import ESD, RELEASED
from erasure.strategies.prompts import look_alikes
from erasure.strategies.tasks import Batch, Task
from erasure.text.words import without
from erasure.training import storage
from erasure.training.images import NoisedImages
from erasure.training.loop import Share
from erasure.training.states import Scene, StateSource, draw
from erasure.training.trajectories import Rollout, TrajectoryBuffer
from erasure.world import World

if TYPE_CHECKING:
    from accelerate import Accelerator

SECOND_STAGE: dict[str, object] = {
    **RELEASED, "seen": 1.0, "lookalikes": 0, "lookalike_rows": 0.0, "lr": 1e-5,
}  # fmt: skip
"""Options that all released commands for the second stage, with pictures, have in common."""


LARGE = 2**31
"""Exclusive upper bound of random numbers; a remainder of each number chooses a picture."""
DECODED = 8
"""Number of pictures decoded at once."""


@dataclass(frozen=True)
class Subject:
    """A word of which the stock model draws pictures."""

    word: str
    prompts: tuple[str, ...]
    """Prompts from which its pictures are drawn, and whose training rows can be given such a picture."""
    concept: Concept | None = None
    """Concept that the word names; `None` for a look-alike that must survive."""


@dataclass
class PicturedTask(Task):
    """A training in which some rows are conditioned on a picture as well."""

    adapter: ImagePrompts
    subjects: list[Subject]
    tokens: list[Tensor] = field(default_factory=list)
    """IP-Adapter tokens of the pictures of each subject, `(pictures, tokens, width)`."""

    def concept(self, prompt: str | None) -> int | None:
        """Give the index of the subject that is the concept of a prompt; `None` where there is none."""
        return next(
            (
                number
                for number, subject in enumerate(self.subjects)
                if prompt and subject.concept is not None and without(prompt, subject.concept) != prompt
            ),
            None,
        )

    def look_alike(self, prompt: str | None) -> int | None:
        """Give the index of the look-alike that is drawn from a prompt; `None` where there is none."""
        subjects = enumerate(self.subjects)
        return next((i for i, subject in subjects if subject.concept is None and prompt in subject.prompts), None)


@register("co_erasing")
@dataclass(frozen=True, kw_only=True)
class CoErasing(ESD):
    """Fine-tune the denoiser to predict what negative guidance would, for the concept in words and in a picture.

    An IP-Adapter (Ye et al. 2023) conditions the denoiser on a picture i of the concept, which the stock model has
    drawn. On states x_t of trajectories of the concept's prompt c, with the frozen model as teacher e:

        i            = softmax(Q K^T / sqrt d) V        Q: tokens of a picture, K = V: text encoding of c
        |e_student(x_t, c, i) - [e(x_t, b) - eta (e(x_t, c, i) - e(x_t, n))]|^2

    The base b and the contrast n are those of `ESD`, without a picture. A share `seen` of the rows is trained with a
    picture, and the others on words alone, as in `ESD`. Concepts that look like the erased one (look-alikes) are
    retained with pictures of their own, because erasing them too is the method's known weakness. The adapter is used
    in training only; the result does not contain it, and the pipeline is used without it.

    Presets are the second stage of the authors' code: `released` as in their README, `released-script` as in their
    train.sh. `paper` trains a first stage on words alone before it, in the same training. The authors' second stage
    takes the result of the first stage as its teacher; here the stock model stays the teacher. Mistakes of that code
    are left out: rollouts increase the timestep and are not guided; calls without a picture take the last four tokens
    of the prompt for a picture; pictures are normalised by other numbers than CLIP's; the values of the adapter stay
    in its file; layers are chosen by names of another library, so that wrong layers are trained. The blur of its
    latents is left out too, because its strength is not given (its width of 3 or 5 is).

    Protects released weights against prompts. Embeddings that are learned for a concept bring much of it back.
    """

    title: ClassVar[str] = "fine-tuning of the denoiser towards negative guidance, with words and self-drawn pictures"
    paper: ClassVar[str] = "Co-Erasing, Li et al. 2025, arXiv 2505.11131"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories", "image prompts")
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "minutes, about 6 denoiser passes a training state"

    adapter: PathText = ""
    """IP-Adapter for the model in diffusers' format: its .safetensors file, or a folder with one such file. When
    left out, the adapter that the model's own `canvas.json` names."""
    image_encoder: PathText = ""
    """Folder of the image encoder that the adapter was trained with; `image_encoder` beside its file when left out."""
    pictures: Count = 16
    """Number of pictures that the stock model draws of each concept (paper: 200). All look-alikes together get as
    many."""
    refine: bool = True
    """Replace each token of a picture by a mixture of the concept's text tokens, weighted by attention (the formula
    for i above). When off, the adapter's own tokens are used."""
    seen: ZeroToOne = 0.5
    """Share of the concept's rows, 0 to 1, that are conditioned on a picture (paper: 1)."""
    text_steps: CountOrZero = 0
    """Number of updates at the start without pictures."""
    lookalikes: CountOrZero = 4
    """Number of look-alikes of each concept that are retained with a picture of their own: the nearest words of the
    concept's retain list; without a list, of the model's world; without a world, of the tokeniser."""
    lookalike_rows: ZeroToOne = 0.25
    """Share of the retained rows, 0 to 1, that look-alikes take."""

    presets: ClassVar[Presets] = {
        "paper": {**SECOND_STAGE, "method": "all", "pictures": 200, "text_steps": 1000, "steps": 2500},
        "released": {**SECOND_STAGE, "method": "all", "pictures": 200, "steps": 1500},
        "released-script": {**SECOND_STAGE, "method": "u", "pictures": 100, "steps": 1000},
    }

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if self.trained_prompt == "anchor":
            self.refuse("trained_prompt", "anchor", "'concept', which is what pictures show")

    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        earlier: EarlierErasure | None = None,
    ) -> PicturedTask:  # fmt: skip
        """Make the training as `TrainedStrategy.task` does, with the adapter and the subjects of pictures.

        Raises:
            OptionError: No adapter is named, or the file is not an adapter.
            WrongBaseError: The adapter is for another model.
        """
        path = Path(self.adapter) if self.adapter else World.of(backbone.pipe).image_prompts
        if path is None:
            self.refuse("adapter", "", "the file or folder of an IP-Adapter for this model, which declares none")
        adapter = opened(path, Path(self.image_encoder) if self.image_encoder else None, backbone.denoiser)
        made = super().task(backbone, tower, concepts, seed, accelerator, earlier)
        subjects = [self.shown(concept, concept.target, concept) for concept in concepts]
        subjects += self.negatives(tower, concepts)
        made.prompts.read([text for subject in subjects for text in (subject.word, *subject.prompts)])
        return PicturedTask(**vars(made), adapter=adapter, subjects=subjects)

    def shown(self, kind: Concept, word: str, concept: Concept | None = None) -> Subject:
        """Make the subject for a word: its pictures are drawn from the phrasings of a concept of its kind."""
        plain = "a drawing of {}" if kind.kind == "style" else "a photo of {}"
        phrasings = kind.phrasings() if self.templates else (plain,)
        return Subject(word, tuple(phrasing.format(word) for phrasing in phrasings), concept)

    def negatives(self, tower: TextTower, concepts: Sequence[Concept]) -> list[Subject]:
        """Choose the look-alikes of the concepts, which must survive."""
        if not (self.lookalikes and self.lookalike_rows and self.retain_batch):
            return []
        found = {
            word: self.shown(concept, word)
            for concept in concepts
            for word in look_alikes(tower, concept, concepts, self.lookalikes)
        }
        return list(found.values())

    def retained_scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give retained prompts as `TrainedStrategy.retained_scenes` does, and those of look-alikes."""
        alike = [Scene(prompt) for subject in self.negatives(tower, concepts) for prompt in subject.prompts]
        return list(dict.fromkeys([*super().retained_scenes(tower, concepts, seed), *alike]))

    def surroundings(self, task: Task) -> AbstractContextManager[object]:
        """Add the IP-Adapter's attention to the denoiser during the training, for calls that show pictures."""
        return pictured(task).adapter.listening(task.backbone.denoiser)

    def fill(self, task: Task, model: str, accelerator: Accelerator) -> None:
        """Fill the sources as `TrainedStrategy.fill` does, and draw the pictures that are not stored already."""
        super().fill(task, model, accelerator)
        made = pictured(task)
        concepts = sum(subject.concept is not None for subject in made.subjects)
        share = max(1, self.pictures * concepts // max(1, len(made.subjects) - concepts))
        for subject in made.subjects:
            source = self.source(made, subject, self.pictures if subject.concept else share, accelerator)
            storage.draw(source, model)
            made.tokens.append(self.picture_tokens(made, subject, source, model))

    def source(self, task: PicturedTask, subject: Subject, count: int, accelerator: Accelerator) -> NoisedImages:
        """Make the source of a subject's pictures.

        Args:
            task: The training.
            subject: Subject of the pictures.
            count: Number of pictures, divided equally among phrasings.
            accelerator: Processes, which share the work.
        """
        phrasings = max(n for n in range(1, min(count, len(subject.prompts)) + 1) if count % n == 0)
        rollout = Rollout(seeds=count // phrasings, steps=self.rollout_steps, guidance=self.rollout_guidance)
        return NoisedImages(
            task.backbone, [Scene(prompt) for prompt in subject.prompts[:phrasings]], task.prompts, rollout, task.seed,
            stored=[source for source in task.sources() if isinstance(source, TrajectoryBuffer)],
            gather=accelerator.reduce, share=(accelerator.process_index, accelerator.num_processes),
        )  # fmt: skip

    @torch.no_grad()
    def picture_tokens(self, task: PicturedTask, subject: Subject, source: NoisedImages, model: str) -> Tensor:
        """Compute the IP-Adapter tokens of a subject's pictures, `(pictures, tokens, width)`."""
        backbone, adapter = task.backbone, task.adapter

        def ask() -> Tensor:
            assert source.clean is not None
            with scopes.placed([backbone.pipe.vae], backbone.device):
                drawn = [backbone.decode(part.to(backbone.device)) for part in source.clean.split(DECODED)]
            pixels = VaeImageProcessor.pt_to_numpy(torch.cat(drawn).float())
            return adapter.embeddings(VaeImageProcessor.numpy_to_pil(pixels))

        encoder = files.digest([module_fingerprint(adapter.encoder), adapter.extractor.to_dict()])
        embeddings = storage.embed(source, model, encoder, adapter.width, ask)
        tokens = adapter.tokens(embeddings.to(backbone.device))
        return refined(tokens, task.prompts([subject.word]).tokens[0]) if self.refine else tokens

    # Updates ---------------------------------------------------------------------------------------------------------

    def chosen(self, task: Task, source: StateSource, count: int, name: str, step: int) -> Tensor:
        """Choose states as `TrainedStrategy.chosen` does; some of the retained ones are of look-alikes."""
        usual, made = super().chosen(task, source, count, name, step), pictured(task)
        alike = [i for i, scene in enumerate(source.scenes) if made.look_alike(scene.learned) is not None]
        if name != "retain" or not alike:
            return usual
        scenes = torch.tensor(alike)[draw(len(alike), count, task.seed, "look-alike", step)]
        theirs = scenes * source.per_scene + draw(source.per_scene, count, task.seed, "its state", step)
        return torch.where(due(self.lookalike_rows, count, step), theirs, usual)

    def prepare(self, task: Task, step: int, share: Share) -> Batch:
        """Prepare an update as `TrainedStrategy.prepare` does; rows with a picture get targets that see it too."""
        batch, made = super().prepare(task, step, share), pictured(task)
        shown = {} if step < self.text_steps else self.pictures_of(made, batch, step, share)
        if not shown:
            return batch
        rows = torch.tensor(list(shown), device=batch.x.device)
        batch = batch._replace(extra={"rows": rows, "tokens": torch.stack(list(shown.values()))})
        with torch.no_grad():
            own = self.seeing(task, batch)
        count = len(batch.concept.x)
        concept, retained = batch.concept, batch.retained
        of_concept = rows < count
        concept = concept._replace(own=concept.own.index_copy(0, rows[of_concept], own[of_concept]))
        if retained is not None:
            others = rows[~of_concept] - count
            retained = retained._replace(own=retained.own.index_copy(0, others, own[~of_concept]))
        return batch._replace(concept=concept, retained=retained)

    def pictures_of(self, task: PicturedTask, batch: Batch, step: int, share: Share) -> dict[int, Tensor]:
        """Choose the rows of a batch that see a picture; give the picture's tokens `(tokens, width)` by row."""
        found: dict[int, Tensor] = {}
        parts = (
            ("concept", self.batch, self.seen, task.concept, 0),
            ("retain", self.retain_batch, self.lookalike_rows, task.look_alike, len(batch.concept.x)),
        )
        for name, count, part, subject_of, first in parts:
            if name == "retain" and batch.retained is None:
                continue
            numbers = share.of(draw(LARGE, count, task.seed, "picture", name, step)).tolist()
            for row, sees in enumerate(share.of(due(part, count, step)).tolist()):
                subject = subject_of(batch.prompts[first + row])
                if sees and subject is not None:
                    held = task.tokens[subject]
                    found[first + row] = held[numbers[row] % len(held)]
        return found

    def predict(self, task: Task, batch: Batch) -> Tensor:
        """Predict as `ESD.predict` does; rows with a picture take a pass of their own."""
        if batch.extra is None:
            return super().predict(task, batch)
        rows = batch.extra["rows"]
        others = torch.tensor(
            [row for row in range(len(batch.x)) if row not in set(rows.tolist())], device=rows.device
        )
        found = self.seeing(task, batch)
        if len(others):
            found = torch.cat([super().predict(task, some(batch, others)), found])
        return found[torch.cat([others.to(rows), rows]).argsort()]

    def seeing(self, task: Task, batch: Batch) -> Tensor:
        """Predict for the rows that see a picture."""
        assert batch.extra is not None
        with showing(task.backbone.denoiser, batch.extra["tokens"]):
            return super().predict(task, some(batch, batch.extra["rows"]))


def pictured(task: Task) -> PicturedTask:
    """Check that a task is a training of this strategy."""
    assert isinstance(task, PicturedTask)
    return task


def some(batch: Batch, rows: Tensor) -> Batch:
    """Select rows of a batch, without pictures."""
    prompts = [batch.prompts[row] for row in rows.tolist()]
    return Batch(batch.x[rows], batch.t[rows], batch.guidance[rows], prompts, batch.concept, batch.retained)


def due(share: float, count: int, step: int) -> Tensor:
    """Mark a share of an update's rows, evenly spread over rows and updates, `(count,)` bool."""
    numbers = step * count + torch.arange(count + 1, dtype=torch.float64)
    return (numbers * share).floor().diff() > 0
