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
from erasure.strategies.base import Standing, register
from erasure.strategies.esd import ESD, RELEASED
from erasure.strategies.prompts import look_alikes
from erasure.strategies.tasks import Batch, Task
from erasure.text.words import without
from erasure.training import storage
from erasure.training.images import NoisedImages
from erasure.training.loop import Share
from erasure.training.states import Scene, StateSource, draw
from erasure.training.trajectories import Rollout
from erasure.world import World

if TYPE_CHECKING:
    from accelerate import Accelerator

SECOND_STAGE: dict[str, object] = {
    **RELEASED, "seen": 1.0, "lookalikes": 0, "lookalike_rows": 0.0, "lr": 1e-5,
}  # fmt: skip
"""What the released commands for pictures have in common."""


LARGE = 2**31
"""Number that random numbers are drawn below, of which rests say which picture."""
DECODED = 8
"""Pictures decoded at once."""


@dataclass(frozen=True)
class Subject:
    """What pictures are drawn of."""

    word: str
    prompts: tuple[str, ...]
    """What its pictures are drawn from, and where it is met in training."""
    concept: Concept | None = None
    """The concept that it is; `None` for what must survive."""


@dataclass
class PicturedTask(Task):
    """A training in which some rows are told of pictures."""

    adapter: ImagePrompts
    subjects: list[Subject]
    tokens: list[Tensor] = field(default_factory=list)
    """What the pictures of each subject say to attention, `(pictures, tokens, width)`."""

    def concept(self, prompt: str | None) -> int | None:
        """Number of the subject that is the concept a prompt names."""
        return next(
            (
                number
                for number, subject in enumerate(self.subjects)
                if prompt and subject.concept is not None and without(prompt, subject.concept) != prompt
            ),
            None,
        )

    def look_alike(self, prompt: str | None) -> int | None:
        """Number of the subject that must survive and is drawn from a prompt."""
        subjects = enumerate(self.subjects)
        return next((i for i, subject in subjects if subject.concept is None and prompt in subject.prompts), None)


@register("co_erasing")
@dataclass(frozen=True, kw_only=True)
class CoErasing(ESD):
    """Fine-tune the denoiser to predict what negative guidance would, for the concept in words and in a picture.

    An IP-Adapter (Ye et al. 2023) lets the denoiser see a picture i of the concept, which the stock model has drawn
    itself. On states x_t of trajectories towards the concept c, with the frozen model as teacher e:

        i            = softmax(Q K^T / sqrt d) V        Q: tokens of a picture, K = V: what the text encoder says of c
        |e_student(x_t, c, i) - [e(x_t, b) - eta (e(x_t, c, i) - e(x_t, n))]|^2

    with base b and contrast n as `ESD` has them, which see no picture. A share `seen` of the rows is trained so, and
    the others on words alone, as `ESD`. Words that look like the concept are kept with pictures of their own: to erase
    them as well is the method's known weakness. The adapter takes part in training only; nothing of it is in the
    result, and the pipeline never knows of it.

    Presets are the second stage of the authors' code: `released` as their README has it, `released-script` as their
    train.sh. `paper` has a first stage on words alone before it, in the same training; the authors' second stage takes
    the outcome of the first as its teacher, and here the stock model stays the teacher. What that code does by mistake
    is left out: it walks timesteps upwards when it rolls out, and without guidance; calls without a picture take the
    last four tokens of the prompt for one; its pictures are normalised by other numbers than CLIP's; the values of the
    adapter stay in its file; its names of parts are those of another library, so that parts are trained which should
    not be. The blur of its latents, whose width of 3 or 5 is named and whose strength is not, is left out as well.

    Protects released weights against prompts; embeddings learned for a concept bring much of it back.
    """

    title: ClassVar[str] = "fine-tuning of the denoiser towards negative guidance, with words and self-drawn pictures"
    paper: ClassVar[str] = "Co-Erasing, Li et al. 2025, arXiv 2505.11131"
    needs: ClassVar[tuple[Need, ...]] = ("trajectories", "image prompts")
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "minutes, about 6 denoiser passes a training state"

    adapter: PathText = ""
    """IP-Adapter for the model, in diffusers' format: its .safetensors file, or a folder with one such file. The one
    that the model's own `canvas.json` names when left out."""
    image_encoder: PathText = ""
    """Folder of the image encoder that the adapter was trained with; `image_encoder` beside its file when left out."""
    pictures: Count = 16
    """Pictures of each concept that the stock model draws (paper: 200); look-alikes share as many among them."""
    refine: bool = True
    """Make a picture's tokens mixtures of what the text encoder says of the concept. Without, they are the adapter's
    own."""
    seen: ZeroToOne = 0.5
    """Share of the concept's rows that see a picture (paper: all)."""
    text_steps: CountOrZero = 0
    """Updates at the start in which no row sees a picture."""
    lookalikes: CountOrZero = 4
    """Words nearest to each concept that must survive beside a picture of themselves: of its retain list, of the
    model's world where it has none, of the tokeniser where that declares none."""
    lookalike_rows: ZeroToOne = 0.25
    """Share of the retained rows that are theirs."""

    presets: ClassVar[Presets] = {
        "paper": {**SECOND_STAGE, "method": "all", "pictures": 200, "text_steps": 1000, "steps": 2500},
        "released": {**SECOND_STAGE, "method": "all", "pictures": 200, "steps": 1500},
        "released-script": {**SECOND_STAGE, "method": "u", "pictures": 100, "steps": 1000},
    }

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow."""
        super().__post_init__()
        if self.trained_prompt == "anchor":
            self.refuse("trained_prompt", "anchor", "'concept', which is what pictures show")

    def task(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int, accelerator: Accelerator,
        standing: Standing | None = None,
    ) -> PicturedTask:  # fmt: skip
        """See `TrainedStrategy.task`; with the adapter, and what pictures are drawn of.

        Raises:
            OptionError: No adapter is named, or what is named is none.
            WrongBaseError: The adapter is for another model.
        """
        path = Path(self.adapter) if self.adapter else World.of(backbone.pipe).image_prompts
        if path is None:
            self.refuse("adapter", "", "the file or folder of an IP-Adapter for this model, which declares none")
        adapter = opened(path, Path(self.image_encoder) if self.image_encoder else None, backbone.denoiser)
        made = super().task(backbone, tower, concepts, seed, accelerator, standing)
        subjects = [self.shown(concept, concept.target, concept) for concept in concepts]
        subjects += self.negatives(tower, concepts)
        made.prompts.read([text for subject in subjects for text in (subject.word, *subject.prompts)])
        return PicturedTask(**vars(made), adapter=adapter, subjects=subjects)

    def shown(self, kind: Concept, word: str, concept: Concept | None = None) -> Subject:
        """What pictures of a word are drawn from: the phrasings of a concept of its kind."""
        plain = "a drawing of {}" if kind.kind == "style" else "a photo of {}"
        phrasings = kind.phrasings() if self.templates else (plain,)
        return Subject(word, tuple(phrasing.format(word) for phrasing in phrasings), concept)

    def negatives(self, tower: TextTower, concepts: Sequence[Concept]) -> list[Subject]:
        """What looks like the concepts and must survive."""
        if not (self.lookalikes and self.lookalike_rows and self.retain_batch):
            return []
        found = {
            word: self.shown(concept, word)
            for concept in concepts
            for word in look_alikes(tower, concept, concepts, self.lookalikes)
        }
        return list(found.values())

    def retained_scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """See `TrainedStrategy.retained_scenes`; with the prompts of look-alikes."""
        alike = [Scene(prompt) for subject in self.negatives(tower, concepts) for prompt in subject.prompts]
        return list(dict.fromkeys([*super().retained_scenes(tower, concepts, seed), *alike]))

    def surroundings(self, task: Task) -> AbstractContextManager[object]:
        """See `TrainedStrategy.surroundings`: attention listens to pictures where a call shows some."""
        return pictured(task).adapter.listening(task.backbone.denoiser)

    def fill(self, task: Task, model: str, accelerator: Accelerator) -> None:
        """See `TrainedStrategy.fill`; and let the stock model draw the pictures, unless they are on disk."""
        super().fill(task, model, accelerator)
        made = pictured(task)
        concepts = sum(subject.concept is not None for subject in made.subjects)
        share = max(1, self.pictures * concepts // max(1, len(made.subjects) - concepts))
        for subject in made.subjects:
            source = self.source(made, subject, self.pictures if subject.concept else share, accelerator)
            storage.draw(source, model)
            made.tokens.append(self.said(made, subject, source, model))

    def source(self, task: PicturedTask, subject: Subject, count: int, accelerator: Accelerator) -> NoisedImages:
        """Where pictures of a subject come from.

        Args:
            task: The training.
            subject: What they show.
            count: How many; as many for each phrasing that is drawn from.
            accelerator: The processes, which share them.
        """
        phrasings = max(n for n in range(1, min(count, len(subject.prompts)) + 1) if count % n == 0)
        rollout = Rollout(seeds=count // phrasings, steps=self.rollout_steps, guidance=self.rollout_guidance)
        return NoisedImages(
            task.backbone, [Scene(prompt) for prompt in subject.prompts[:phrasings]], task.prompts, rollout, task.seed,
            gather=accelerator.reduce, share=(accelerator.process_index, accelerator.num_processes),
        )  # fmt: skip

    @torch.no_grad()
    def said(self, task: PicturedTask, subject: Subject, source: NoisedImages, model: str) -> Tensor:
        """What pictures of a subject say to attention, `(pictures, tokens, width)`."""
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
        """See `TrainedStrategy.chosen`; some of the retained rows are look-alikes'."""
        usual, made = super().chosen(task, source, count, name, step), pictured(task)
        alike = [i for i, scene in enumerate(source.scenes) if made.look_alike(scene.learned) is not None]
        if name != "retain" or not alike:
            return usual
        scenes = torch.tensor(alike)[draw(len(alike), count, task.seed, "look-alike", step)]
        theirs = scenes * source.per_scene + draw(source.per_scene, count, task.seed, "its state", step)
        return torch.where(due(self.lookalike_rows, count, step), theirs, usual)

    def prepare(self, task: Task, step: int, share: Share) -> Batch:
        """See `TrainedStrategy.prepare`; some rows see a picture, and their targets are what the teacher says then."""
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
        """The rows of a batch that see a picture, and what it says, `(tokens, width)`."""
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
        """See `ESD.predict`; rows with a picture take a pass of their own."""
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
        """Predictions for the rows that see a picture."""
        assert batch.extra is not None
        with showing(task.backbone.denoiser, batch.extra["tokens"]):
            return super().predict(task, some(batch, batch.extra["rows"]))


def pictured(task: Task) -> PicturedTask:
    """A training of this strategy."""
    assert isinstance(task, PicturedTask)
    return task


def some(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, without pictures."""
    prompts = [batch.prompts[row] for row in rows.tolist()]
    return Batch(batch.x[rows], batch.t[rows], batch.guidance[rows], prompts, batch.concept, batch.retained)


def due(share: float, count: int, step: int) -> Tensor:
    """Which of an update's rows are chosen, `(count,)`: a share of all, evenly over rows and updates."""
    numbers = step * count + torch.arange(count + 1, dtype=torch.float64)
    return (numbers * share).floor().diff() > 0
