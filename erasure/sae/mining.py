"""Adversarial feature mining: learned embeddings show latents that the words of a concept do not reach.

Follows the released code of ItD (Tian et al. 2025, addition of June 2025): placeholder tokens are trained by the
denoising loss on images of the concept while the edit is in force, clamped to the vocabulary's range, and reset from
time to time; latents that fire on them become features of the concept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import Backbone, TextTower
from erasure.carriers.embeddings import injected
from erasure.carriers.features import EditedFeatures, FeatureEdit
from erasure.concept import Concept
from erasure.errors import DivergenceError
from erasure.interop import paths, scopes
from erasure.sae.gates import WordStates, strongest
from erasure.sae.model import SparseAutoencoder
from erasure.sae.stream import activations
from erasure.text.words import occurrences, word_mask

TOKENS = 4
"""Number of learned tokens in a prompt."""
IMAGES = 16
"""Number of images of the concept that the stock model draws."""
BATCH = 8
"""Number of noised images per step."""
SNAPSHOTS = 50
"""Number of times per run that the learned prompts are recorded."""
RENEWALS = 10
"""Number of times per run that the learned tokens are reset."""
LEARNING_RATE = 1e-2
"""Adam's learning rate for embeddings in units of the vocabulary's spread."""


class Mined(NamedTuple):
    """The learned prompts."""

    states: WordStates
    """Word states of the prompts in the stock text encoder."""
    learned: Tensor
    """Learned tokens among the words, `(words,)` bool."""


def mine(
    backbone: Backbone, concept: Concept, key: str, edit: FeatureEdit, steps: int, seed: int,
    progress: Callable[[float], None],
) -> Mined:  # fmt: skip
    """Learn prompts that bring a concept's images back despite an edit.

    Args:
        backbone: The stock model.
        concept: Concept that the images must show.
        key: `component/block.path` of the edit.
        edit: Edit to overcome, with its gate always open.
        steps: Number of training steps.
        seed: Seeds images, noise and embeddings.
        progress: Called with the share of the work that is done, 0 to 1.

    Raises:
        DivergenceError: The loss is NaN or infinite.
    """
    component, path = key.split("/", 1)
    tower, way = backbone.tower(component), backbone.parametrisation
    layer = int(path.rsplit(".", 1)[1])
    generator = torch.Generator().manual_seed(seed)
    clean = concept_latents(backbone, concept, seed)
    table = paths.token_table(tower.root).weight.detach().float()
    low, high, mean, spread = table.amin(0), table.amax(0), table.mean(0), table.std(0)
    # Any word can stand at the position of a learned token; the end token would end the prompt.
    phrase = concept.phrasings()[-1].format(" ".join(["a"] * TOKENS))
    tokens = tower.tokenize([phrase])
    words = word_mask(tokens.ids, tower.end, tower.leading)
    place = learned_places(tower, phrase).to(tokens.ids.device)
    opened = edit._replace(
        gate=torch.full_like(edit.gate, -torch.inf), probe_gate=torch.full_like(edit.probe_gate, -torch.inf)
    )

    def drawn() -> Tensor:
        noise = torch.randn(TOKENS, table.shape[1], generator=generator)
        return (mean + spread * noise.to(mean)).clamp(low, high)

    vectors = drawn().requires_grad_()
    optimiser = torch.optim.Adam([vectors], lr=LEARNING_RATE * float(spread.mean()))
    states, learned = [], []
    count = backbone.pipe.scheduler.config.num_train_timesteps
    with scopes.frozen(backbone.denoiser):
        for step in range(steps):
            rows = torch.randint(len(clean), (BATCH,), generator=generator)
            x = clean[rows.to(clean.device)]
            t = torch.randint(count, (BATCH,), generator=generator).to(x.device)
            noise = torch.randn(x.shape, generator=generator).to(x)
            EditedFeatures.write(tower.module, {path: [(1.0, opened)]})
            try:
                with injected(tower, place, vectors):
                    encoded = tower.encode(tokens)
            finally:
                EditedFeatures.write(tower.module, {})
            conditioning = backbone.composed(component, encoded, [phrase]).repeated(BATCH)
            found = backbone.predict(way.noised(x, noise, t), t, conditioning)
            loss = F.mse_loss(found.float(), way.target(x, noise, t).float())
            if not torch.isfinite(loss):
                raise DivergenceError(f"feature mining: the loss is {loss.item()} at step {step}")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if not torch.isfinite(vectors).all():
                raise DivergenceError(f"feature mining: a learned word is not finite after step {step}")
            with torch.no_grad():
                vectors.copy_(vectors.clamp(low, high))
            if (step + 1) % max(steps // SNAPSHOTS, 1) == 0:
                with torch.no_grad(), injected(tower, place, vectors):
                    states.append(activations(tower, layer, tokens)[words].float().cpu())
                mask = torch.zeros(tokens.ids.shape[1], dtype=torch.bool)
                mask[place.cpu()] = True
                learned.append(mask[words[0].cpu()])
            if (step + 1) % max(steps // RENEWALS, 1) == 0:
                with torch.no_grad():
                    vectors.copy_(drawn())
                optimiser.state.clear()
            progress((step + 1) / steps)
    ids = tokens.ids[words].cpu()
    owner = torch.arange(len(states)).repeat_interleave(len(ids))
    return Mined(WordStates(torch.cat(states), ids.repeat(len(states)), owner, len(states)), torch.cat(learned))


def learned_places(tower: TextTower, phrase: str) -> Tensor:
    """Find the positions of the last run of `TOKENS` words "a" in a phrase."""
    words = tower.word_ids("a")[-1:] * TOKENS
    place = occurrences(tower.prompt_ids(phrase), [words], tower.leading)[-1]
    return torch.arange(place.start, place.stop)


@torch.no_grad()
def concept_latents(backbone: Backbone, concept: Concept, seed: int) -> Tensor:
    """Draw images of a concept with the stock model, and give their latents `(images, channels, h, w)`."""
    phrasings = concept.phrasings()
    made = []
    with scopes.quiet(backbone.pipe):
        for index in range(IMAGES):
            prompt = phrasings[index % len(phrasings)].format(concept.target)
            noise = torch.Generator().manual_seed(seed + index)
            call = backbone.call_options(steps=15)
            made.append(backbone.pipe(prompt, generator=noise, output_type="latent", **call).images)
    return backbone.latents.unpacked(torch.cat(made))


def fired(
    sae: SparseAutoencoder, mined: WordStates, retain: Tensor, known: list[int], most: int, rate: float
) -> tuple[list[int], Tensor]:
    """Find latents that fire on mined words and on almost no ordinary prompt, and the usual value of each.

    Args:
        sae: The dictionary.
        mined: Word states of mined prompts.
        retain: Largest values of latents in prompts without the concept, `(prompts, d_sae)`.
        known: Latents to leave out.
        most: Largest number of latents; those that fire most come first.
        rate: Largest share, 0 to 1, of the ordinary prompts on which a latent may fire.
    """
    active = strongest(sae, mined)
    share, magnitude = (active > 0).float().mean(0), active.amax(0)
    new = (magnitude > 0) & ((retain > 0).float().mean(0) <= rate)
    new[known] = False
    order = (share * magnitude).masked_fill(~new, -1).topk(min(most, int(new.sum()))).indices
    return order.tolist(), magnitude[order]
