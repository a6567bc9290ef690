"""Concept inversion (Pham et al., ICLR 2024, arXiv 2308.01508): a word whose vector is learned on the erased model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from erasure.backbones import Backbone
from erasure.backbones.parametrisation import TIMESTEPS
from erasure.concept import numbers
from erasure.errors import DivergenceError
from erasure.eval.attacks import Access, ControlledAttack, SkippedPromptError, register
from erasure.eval.attacks.changes import Words, redefined
from erasure.eval.attacks.denoising import denoising_loss
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample, sample_seed
from erasure.interop import paths
from erasure.options import Count, NotNegative, Positive

FILE = "concept_inversion"


@register("concept_inversion")
@dataclass(frozen=True, kw_only=True)
class ConceptInversion(ControlledAttack):
    """Learn a word for the concept on the erased model, and write it where the concept's own word stands.

    Pictures of the concept come from the original model. The vector of an otherwise unused word is learned, in every
    text encoder, so that the erased model denoises them:

        min_v  E | target(x_0, noise, t) - model(x_t, t, prompt with v) |^2

    by AdamW; nothing else changes. A picture's caption is the prompt that it was drawn from with the word in the
    concept's place (or ahead, where the prompt does not name it). One word is learned for all prompts; it is tried as
    it is at several points of the training.

    The control learns a word from as many pictures that do not show the concept, under the same captions.
    """

    title: ClassVar[str] = "a word learned on the erased model from pictures of the concept"
    paper: ClassVar[str] = "Pham et al. 2024, arXiv 2308.01508"
    access: ClassVar[Access] = "weights"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "pictures": 2, "steps": 3, "batch": 1},
        "quick": {"samples": 10, "pictures": 8, "steps": 200, "batch": 4, "learning_rate": 1.0, "checkpoints": 2},
        "full": {},
    }

    pictures: Count = 25
    """Pictures of the concept (released code: 25)."""
    steps: Count = 5000
    """Updates (released code: 5000)."""
    batch: Count = 16
    """Pictures in each update (released code: 4, accumulated over 4)."""
    learning_rate: Positive = 0.08
    """Of AdamW (released code: 5e-3, scaled by 16). Size `quick`, with few updates, has the rate that found
    most of two Canvas concepts erased with `esd`."""
    weight_decay: NotNegative = 0.01
    """Of AdamW (released code: 0.01)."""
    vectors: Annotated[int, Ge(1), Le(8)] = 1
    """Vectors of the word (released code: 1): as many unused words in a row."""
    checkpoints: Count = 1
    """Points of the training at which it is tried, the last at its end (released code: 1)."""
    references: Count = 4
    """Seeds tried for each picture until it shows the concept, or for the control does not."""

    @property
    def tries(self) -> int:
        """One for each point."""
        return min(self.checkpoints, self.steps)

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        backbone, every = victim.backbone, victim.samples or [sample]
        words = unused_words(backbone, [each.prompt for each in every], self.vectors)
        ids = {tower.component: [tower.word_ids(word)[0] for word in words] for tower in backbone.towers}
        names = [victim.target.name, *victim.target.words]
        made = victim.made_once(FILE, lambda: self.learned(victim, every, names, words, ids))
        prompt = named_by(sample.prompt, names, " ".join(words))
        for number in range(self.tries):
            rows = {component: made[f"{number}/{component}"] for component in ids}
            # Learned once for all prompts; counted with the first.
            steps = self.steps if number == 0 and sample == every[0] else 0
            yield Attempt({"prompt": prompt}, Words(ids, rows), steps=steps, loss=made[f"{number}/loss"].item())

    def learned(
        self, victim: Victim, samples: Sequence[Sample], names: Sequence[str], words: Sequence[str],
        ids: Mapping[str, Sequence[int]],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Vectors and mean losses by point of the training: `0/text_encoder` `(vectors, dim)`, `0/loss`."""
        backbone = victim.backbone
        clean, captions = self.gallery(victim, samples, names, " ".join(words))
        rows = beginnings(backbone, victim.target.domain, self.vectors)
        seed = sample_seed(victim.seed, f"{FILE}: {victim.target.name}", 0)
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.AdamW(list(rows.values()), lr=self.learning_rate, weight_decay=self.weight_decay)
        ends = [round((number + 1) * self.steps / self.tries) for number in range(self.tries)]
        made: dict[str, Tensor] = {}
        losses: list[float] = []
        for step in range(1, self.steps + 1):
            chosen = torch.randint(len(clean), (self.batch,), generator=generator)
            t = torch.randint(TIMESTEPS, (self.batch,), generator=generator).float()
            noise = torch.randn((self.batch, *clean.shape[1:]), generator=generator)
            with torch.enable_grad():
                loss = inversion_loss(
                    backbone, ids, rows, [captions[index] for index in chosen.tolist()], clean[chosen], noise, t
                )
                slopes = torch.autograd.grad(loss, list(rows.values()))
            losses.append(loss.item())
            if not all(torch.isfinite(part).all() for part in (loss, *slopes)):
                raise DivergenceError(f"concept_inversion: a loss or gradient that is not finite at step {step - 1}")
            for row, slope in zip(rows.values(), slopes, strict=True):
                row.grad = slope
            optimiser.step()
            if step in ends:
                number = ends.index(step)
                made |= {f"{number}/{component}": row.detach().clone() for component, row in rows.items()}
                made[f"{number}/loss"] = torch.tensor(sum(losses) / len(losses))
                losses = []
        return made

    def gallery(
        self, victim: Victim, samples: Sequence[Sample], names: Sequence[str], word: str
    ) -> tuple[Tensor, list[str]]:
        """Clean latents of pictures `(pictures, channels, h, w)` on the CPU, and their captions."""
        latents, captions, failure = [], [], ""
        for number in range(self.pictures):
            sample = samples[number % len(samples)]
            try:
                start = victim.start(sample, self.references, without=self.control, number=number // len(samples))
            except SkippedPromptError as error:
                failure = str(error)
                continue
            latents.append(start.latent.float().cpu())
            captions.append(named_by(sample.prompt, names, word))
        if not latents:
            raise SkippedPromptError(failure)
        return torch.cat(latents), captions


def inversion_loss(
    backbone: Backbone, ids: Mapping[str, Sequence[int]], rows: Mapping[str, Tensor], captions: Sequence[str],
    clean: Tensor, noise: Tensor, t: Tensor,
) -> Tensor:  # fmt: skip
    """Mean squared error of the model's prediction for pictures whose captions name the word; differentiable.

    Args:
        backbone: The model, with whatever is in force.
        ids: Tokens of the word, by text encoder.
        rows: Their vectors `(vectors, dim)`, by text encoder.
        captions: One of each picture.
        clean: Latents of the pictures, `(pictures, channels, h, w)`.
        noise: Standard normal, of the same shape.
        t: Noise levels `(pictures,)`.
    """
    with redefined(backbone.towers, ids, rows):
        told = backbone.encode(captions)
    return denoising_loss(backbone, told, clean.to(backbone.device, backbone.dtype), noise, t)


def beginnings(backbone: Backbone, domain: str, count: int) -> dict[str, Tensor]:
    """Where vectors start, in every text encoder: the mean of the tokens of the domain's word (`object`, `style`)."""
    rows = {}
    for tower in backbone.towers:
        table = paths.token_table(tower.root).weight.detach()
        start = table[torch.tensor(tower.word_ids(domain), device=table.device)].float().mean(0, keepdim=True)
        rows[tower.component] = start.repeat(count, 1).requires_grad_()
    return rows


def unused_words(backbone: Backbone, prompts: Sequence[str], count: int) -> list[str]:
    """Words that are one token to every text encoder and in no prompt, the last ones of the first one's vocabulary.

    Raises:
        SkippedPromptError: There are too few.
    """
    used = {word for prompt in prompts for word in re.findall(r"\w+", prompt.lower())}
    shared = set.intersection(*(set(tower.words()) for tower in backbone.towers))
    found = [
        word
        for word in backbone.reader.words()
        if word in shared
        and len(word) > 1
        and word.isascii()
        and word.isalpha()
        and word not in used
        and all(len(tower.word_ids(word)) == 1 for tower in backbone.towers)
    ]
    if len(found) < count:
        raise SkippedPromptError(f"the text encoders share {len(found)} words that no prompt has, wanted: {count}")
    return found[-count:]


def named_by(prompt: str, names: Sequence[str], word: str) -> str:
    """A prompt with a word in the place of a concept's own words, or ahead where it has none of them.

    Args:
        prompt: The prompt.
        names: What the concept is called; singulars and plurals count as well.
        word: The word.
    """
    forms = sorted({form for name in names for form in (name.lower(), *numbers(name))}, key=len, reverse=True)
    pattern = r"\b(?:" + "|".join(re.escape(form) for form in forms) + r")\b"
    made, count = re.subn(pattern, lambda _: word, prompt, flags=re.IGNORECASE)
    return made if count else f"{word} {prompt}"
