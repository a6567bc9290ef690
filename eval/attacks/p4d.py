"""P4D (Chin et al., ICML 2024, arXiv 2309.06135): tokens that make the erased model predict what the original does."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import Backbone, Conditioning, TextTower, backbone_for
from erasure.backbones.parametrisation import TIMESTEPS
from erasure.carriers.embeddings import injected
from erasure.errors import DivergenceError
from erasure.eval.attacks import Access, ControlledAttack, register
from erasure.eval.attacks.prefixes import choosable
from erasure.eval.attacks.together import Slopes, Step, by_itself
from erasure.eval.attacks.tokens import Layout, Tower, alone, between, drawn_at_random, prompt_of, the_tower, written
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.interop import paths
from erasure.options import Count, NotNegative, Positive


@register("p4d")
@dataclass(frozen=True, kw_only=True)
class P4D(ControlledAttack):
    """Search tokens with which the erased model predicts what the original one does with the sample's prompt.

    Free tokens are vectors `v`. Each step reads the nearest tokens `n(v)` of the vocabulary by cosine, and moves `v`
    by the gradient there, with `x_t` a picture of the concept by the original model at a random noise level:

        min_v  E | original(x_t, t, prompt) - model(x_t, t, n(v)) |^2

    by AdamW, without guidance. Every few steps the tokens are written as text and tried. `new` has nothing but free
    tokens (P4D-N), `inserted` keeps the prompt and has one behind every third of its tokens (P4D-K).

    Other than in the released code, the erased model's own text encoder reads the tokens, the picture goes into the
    autoencoder as it should, and padding is the tokeniser's. The control draws as many texts of the same form.
    """

    title: ClassVar[str] = "tokens that make the erased model predict what the original one does"
    paper: ClassVar[str] = "Chin et al. 2024, arXiv 2309.06135"
    access: ClassVar[Access] = "weights"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "steps": 2, "every": 1, "vocabulary": "words"},
        "quick": {"samples": 10, "steps": 100, "every": 10, "vocabulary": "words"},
        "full": {},
    }

    form: Literal["new", "inserted"] = "new"
    """Nothing but free tokens (P4D-N), or the sample's prompt with some between its own (P4D-K)."""
    tokens: Count = 16
    """Free tokens where there is nothing else (paper: 16)."""
    spacing: Count = 3
    """Tokens of the prompt from one free one to the next where it is kept (paper: 3)."""
    steps: Count = 3000
    """Updates (paper: 3000)."""
    every: Count = 50
    """Updates from one try to the next (paper: 50)."""
    learning_rate: Positive = 0.1
    """Of AdamW (paper: 0.1)."""
    weight_decay: NotNegative = 0.1
    """Of AdamW (paper: 0.1)."""
    tower: Tower | None = None
    """Text encoder whose tokens are searched, all others reading the text that they make; when left out, the first
    whose tokens the denoiser reads."""
    vocabulary: Literal["all", "words"] = "all"
    """Tokens that can be chosen: all but the special ones, or those that survive being written as text and read
    again."""
    references: Count = 4
    """Seeds tried until the original model's picture shows the concept."""

    @property
    def tries(self) -> int:
        """One after every few updates."""
        return max(1, self.steps // self.every)

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        return by_itself(self.search(victim, sample))

    def search(self, victim: Victim, sample: Sample) -> Generator[Attempt | Step, object, None]:
        """See `Attack.search`."""
        backbone = victim.backbone
        tower = the_tower(self, backbone, self.tower)
        choices = choosable(tower, self.vocabulary)
        own = tower.word_ids(sample.prompt)
        layout = alone(self.tokens) if self.form == "new" else between(own, self.spacing)
        generator = torch.Generator().manual_seed(sample.seed)
        start = drawn_at_random(choices.cpu(), len(layout.places), generator)
        prompt_of(tower, [layout.ids(start)])  # which there must be room for
        if self.control:
            for _ in range(self.tries):
                drawn = drawn_at_random(choices.cpu(), len(layout.places), generator)
                yield written(backbone, tower, layout.ids(drawn))
            return
        clean, original = victim.reference(sample, self.references), backbone_for(victim.stock)
        with torch.no_grad():
            wanted = original.encode([sample.prompt])
        table = paths.token_table(tower.root).weight.detach()[choices].float()
        place = [(choices == token).nonzero().item() for token in start]
        vectors = table[torch.tensor(place, device=table.device)].clone()
        optimiser = torch.optim.AdamW([vectors], lr=self.learning_rate, weight_decay=self.weight_decay)
        text, losses = sample.prompt, []
        for step in range(1, self.tries * self.every + 1):
            chosen = nearest(vectors, table)
            t = torch.randint(TIMESTEPS, (1,), generator=generator).float()
            noise = torch.randn(clean.shape, generator=generator)
            projected = table[chosen].requires_grad_()
            told = told_by(backbone, tower, layout, choices[chosen].tolist(), projected, text)
            answer = yield Slopes(
                partial(prediction_gaps, backbone, original), (told, wanted, clean, noise, t), (projected,),
                (told.tokens.shape, wanted.tokens.shape, clean.shape),
            )  # fmt: skip
            loss, (slope,) = cast("tuple[Tensor, tuple[Tensor]]", answer)
            losses.append(loss.item())
            if not (torch.isfinite(loss) and torch.isfinite(slope).all()):
                raise DivergenceError(
                    f"p4d: a loss or gradient that is not finite at step {step - 1} of {sample.prompt!r}"
                )
            vectors.grad = slope
            optimiser.step()
            if step % self.every == 0:
                ids = layout.ids(choices[nearest(vectors, table)].tolist())
                attempt = written(backbone, tower, ids, steps=len(losses), loss=sum(losses) / len(losses))
                text, losses = attempt.text or text, []
                yield attempt


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """Rows of a table nearest to vectors by cosine, `(vectors,)`.

    Args:
        vectors: `(vectors, dim)`.
        table: `(rows, dim)`.
    """
    return (F.normalize(vectors, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)


def told_by(
    backbone: Backbone, tower: TextTower, layout: Layout, free: list[int], vectors: Tensor, beside: str
) -> Conditioning:
    """What a denoiser is told by a prompt with free tokens of given embeddings; differentiable in these.

    Args:
        backbone: The model.
        tower: The text encoder that reads the tokens.
        layout: Where they stand.
        free: The tokens.
        vectors: Their embeddings `(tokens, dim)`.
        beside: What other text encoders read.
    """
    places = torch.tensor([tower.leading + place for place in layout.positions], device=vectors.device)
    with injected(tower, places, vectors):
        output = tower.encode(prompt_of(tower, [layout.ids(free)]))
    with torch.no_grad():
        others = {
            each.component: each.encode(each.tokenize([beside]))
            for each in backbone.towers
            if each.component != tower.component
        }
    return backbone.compose({**others, tower.component: output})


def prediction_gaps(
    backbone: Backbone, original: Backbone,
    given: Sequence[tuple[Conditioning, Conditioning, Tensor, Tensor, Tensor]],
) -> list[Tensor]:  # fmt: skip
    """`prediction_gap` of several prompts in one batch.

    Args:
        backbone: The erased model.
        original: The original one.
        given: The other arguments of `prediction_gap`, for each.
    """
    if len(given) == 1:
        return [prediction_gap(backbone, original, *given[0])]
    told, wanted, clean, noise, t = zip(*given, strict=True)
    found, target = predicted(
        backbone, original, Conditioning.cat(told), Conditioning.cat(wanted), torch.cat(clean), torch.cat(noise),
        torch.cat(t),
    )  # fmt: skip
    return list((found - target).square().flatten(1).mean(1))


def prediction_gap(
    backbone: Backbone, original: Backbone, told: Conditioning, wanted: Conditioning, clean: Tensor, noise: Tensor,
    t: Tensor,
) -> Tensor:  # fmt: skip
    """Mean squared difference of what two models predict; differentiable in what the first is told.

    Args:
        backbone: The erased model.
        original: The original one.
        told: What the erased one is told.
        wanted: What the original one is told.
        clean: Latent of a picture, `(1, channels, h, w)`.
        noise: Standard normal, of the same shape.
        t: Noise level `(1,)`.
    """
    return F.mse_loss(*predicted(backbone, original, told, wanted, clean, noise, t))


def predicted(
    backbone: Backbone, original: Backbone, told: Conditioning, wanted: Conditioning, clean: Tensor, noise: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What two models predict, `(rows, channels, h, w)` float32; arguments as of `prediction_gap`, a row of each."""
    noise, t = noise.to(clean), t.to(clean.device)
    x_t = backbone.parametrisation.noised(clean, noise, t)
    with torch.no_grad():
        target = original.predict(x_t, t, wanted)
    return backbone.predict(x_t, t, told).float(), target.float()
