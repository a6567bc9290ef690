"""AttenCraft: learning several concepts separately from one picture (Shentu et al. 2024, arXiv 2405.17965)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import Backbone, Conditioning
from erasure.carriers.attention import AttentionController, Layout
from erasure.errors import MaskError
from erasure.interop import paths
from erasure.learning.lessons import Batch, PictureTraining
from erasure.learning.masks import (
    assigned,
    attention_layers,
    border,
    columns_of,
    grouped,
    in_pixels,
    likeness,
    matched,
    read_maps,
)
from erasure.learning.pictures import check_masks
from erasure.learning.tokens import MOST_VECTORS
from erasure.options import Count, CountOrZero, NotNegative, Positive, Presets, ZeroToOne
from erasure.training.loop import Optimisation, Share
from erasure.training.objectives import matching
from erasure.training.states import draw, stable_seed
from erasure.training.student import Student, make_student

LEVELS = 1000
"""Number of training timesteps."""
MASK_LEVELS = (0.05, 0.15, 0.25)
"""Timesteps, as shares of all, at which attention to a picture is read for its first masks (paper: one below 0.3)."""
LONGEST_BORDER = 0.85
"""Largest length of the border between two things of a picture, see `erasure.learning.masks.border`."""
TEMPLATES = ("a photo of {}", "a picture of {}", "an image of {}", "{}")
"""Prompt templates of the training; only the first where `templates` is off."""


@dataclass(frozen=True, kw_only=True)
class AttenCraft(Optimisation):
    """Learn new tokens, one for each thing in a picture, with masks from the model's attention.

    The prompt of a training row names one thing v_k, or all of them, and the loss is on their masks:

        L = |M (e(x_t, "a photo of v_k") - target)|^2 / |M| + w_a sum_k A(map of v_k, M_k) + w_p L_prior

    M is the union of the masks of the things that the prompt names. The loss A moves a token's cross-attention to its
    mask, and that of the start token to the background. Masks are read from attention too: first from the stock model,
    later from the model in training, as long as new masks agree with the former ones.

    Preset `paper` has the settings of the authors' code of 2025. Mistakes of that code are left out: it never trains
    the last new token, decays the whole table of embeddings, and weighs the masked loss four times, because it divides
    a sum over four channels by the area of the mask.
    """

    name: ClassVar[str] = "attencraft"
    title: ClassVar[str] = "tokens for what pictures show, several apart from one picture"
    paper: ClassVar[str] = "AttenCraft, Shentu et al. 2024, arXiv 2405.17965"

    steps: Count = 150
    """Number of updates (paper: 500)."""
    lr: Positive = 2e-3
    """Learning rate of AdamW for weights (paper: 1e-4). Small models need more."""
    batch: Count = 4
    """Number of training rows in each update, over all processes (paper: 1)."""
    vectors: Annotated[int, Ge(1), Le(MOST_VECTORS)] = 3
    """Number of vectors of each token (paper: 1)."""
    vectors_rate: Positive = 10.0
    """Learning rate of the vectors, as a multiple of that of weights (paper: 1)."""
    spread: NotNegative = 0.3
    """Random noise of the initial vectors, in standard deviations of the vocabulary's embeddings (paper: 0)."""
    trained: Literal["vectors", "keys and values", "cross-attention"] = "keys and values"
    """What is trained: `vectors` only the tokens' vectors (textual inversion), `keys and values` also those of the
    cross-attention (paper), `cross-attention` also all of the cross-attention."""
    rank: CountOrZero = 0
    """Rank of a LoRA on those weights, which makes a smaller file; 0 trains them in full (paper)."""
    train_start: bool = True
    """Let gradients flow through the start token's keys and values; the start token is in every prompt (paper:
    off)."""
    templates: bool = True
    """Train with several prompt templates; when off, with "a photo of {}" only (paper)."""
    alone: Literal["cut out", "masked"] = "cut out"
    """Picture of a row that names one thing: `cut out` the thing on a plain background, as large as the model draws
    single things; `masked` the whole picture with the loss on the thing only (paper), so that the rest of the
    drawing is not determined."""
    outside: ZeroToOne = 0.2
    """Weight of the background around a thing that is cut out, 0 to 1."""
    sampling: Literal["uniform", "reweighted"] = "uniform"
    """Choice of the things of a row: `uniform` each one alone and all together equally often; `reweighted` prefers
    those with a larger loss."""
    together: ZeroToOne | None = None
    """Share of the rows, 0 to 1, that show all things; one part of as many as there are choices when left out."""
    masks: Literal["attention", "none"] = "attention"
    """Whether the model's attention gives masks; with `none`, pictures are learned as a whole with their
    background."""
    first_masks: Literal["groups", "tokens"] = "groups"
    """How the first masks are found: `groups` by clustering self-attention; `tokens` by attention to the words from
    which tokens start (paper), which needs words that distinguish the things."""
    threshold: ZeroToOne = 0.6
    """Foreground score, 0 to 1, above which a place belongs to a thing, with `groups`."""
    margin: ZeroToOne = 0.1
    """How much a token's map must exceed all others at a place of its mask (paper: 0.1)."""
    power: Count = 2
    """Number of times that self-attention is applied to maps (paper: 4)."""
    mask_every: CountOrZero = 0
    """Number of updates after which masks are read again; 0 keeps the first masks (paper: 20)."""
    agreement: ZeroToOne = 0.8
    """Smallest structural similarity with the former masks at which new masks are accepted (paper: 0.8)."""
    attention_weight: NotNegative = 0.02
    """Weight of the attention loss (paper: 1)."""
    attention_loss: Literal["mass", "divergence"] = "mass"
    """`mass`: share of a token's attention that is outside of its mask. `divergence`: Jensen-Shannon divergence of the
    softmax of map and mask (paper), whose gradient is small, since the softmax of values in 0-1 is nearly even."""
    prior_weight: NotNegative = 0.5
    """Weight of the prior loss, on other prompts that must survive (paper: 1)."""
    prior_batch: CountOrZero = 2
    """Number of prior rows in each update (paper: 1); 0 for none, for instance if only vectors are trained."""
    prior_prompts: Count = 16
    """Number of random prompts, made of the tokeniser's words, of the prior images."""
    prior_images: Count = 1
    """Number of prior images of each prompt (paper: 200 of "a photo at the beach")."""
    prior_prompt: str = ""
    """Prompt of the prior images, instead of random ones."""
    prior_target: Literal["teacher", "noise"] = "teacher"
    """Target of the prior loss: the stock model's prediction, or the noise (paper)."""
    prior_steps: Count = 20
    """Number of denoising steps of the prior images."""
    resolution: Annotated[int, Ge(8), Le(8192)] | None = None
    """Side in pixels of the square training pictures; the model's own size when left out."""
    clip: NotNegative = 1.0
    """Largest norm of the gradient, to which longer ones are clipped; 0 switches clipping off."""

    presets: ClassVar[Presets] = {
        "paper": {
            "steps": 500, "lr": 1e-4, "weight_decay": 1e-2, "batch": 1, "clip": 0.0, "vectors": 1, "vectors_rate": 1.0,
            "spread": 0.0, "rank": 0, "train_start": False, "templates": False, "first_masks": "tokens", "power": 4,
            "mask_every": 20, "alone": "masked", "attention_weight": 1.0, "attention_loss": "divergence",
            "prior_weight": 1.0, "prior_batch": 1, "prior_prompt": "a photo at the beach", "prior_images": 200,
            "prior_steps": 50, "prior_target": "noise",
        },
        "vectors": {
            "trained": "vectors", "prior_batch": 0, "vectors": 4, "lr": 3e-3, "attention_weight": 0.0,
        },
    }  # fmt: skip

    def teaches(self, backbone: Backbone, generator: torch.Generator) -> tuple[Student | None, list[str]]:
        """Give the trained weights, and the layers whose output at the start token gets no gradient."""
        if self.trained == "vectors":
            return None, []
        layers = [layer.path for layer in backbone.entry_layers()]
        if self.trained == "cross-attention":
            sites = [f"{site.name}." for site in backbone.attention_sites() if site.kind != "self"]
            every = paths.canonical_parameters(backbone.denoiser)
            chosen = [path for path in every if path.startswith(tuple(sites))]
        else:
            chosen = [f"{path}.weight" for path in layers]
        student = make_student(backbone.denoiser, chosen, self.rank, generator, f"trained={self.trained!r}")
        return student, [] if self.train_start else layers

    # Masks ----------------------------------------------------------------------------------------------------------

    def first(
        self, backbone: Backbone, clean: Tensor, tokens: Sequence[str], like: Mapping[str, str], seed: int
    ) -> Tensor:
        """Find masks of the things in each picture before training, `(pictures, tokens, height, width)` bool.

        Raises:
            MaskError: Masks cannot be found.
        """
        prompt, size = TEMPLATES[0].format(joined(tokens)), pixel_size(backbone, clean)
        levels = [torch.tensor(share * LEVELS) for share in MASK_LEVELS]
        found = []
        for number, picture in enumerate(clean):
            noise = backbone.noise([stable_seed(seed, "masks", number)], *size)
            maps = read_maps(backbone, picture[None], prompt, tokens, levels, noise, self.power)
            if self.first_masks == "tokens":
                found.append(enlarged(assigned(maps, self.margin), size))
                continue
            masks = grouped(maps, len(tokens), self.threshold)
            if (length := border(masks)) > LONGEST_BORDER:
                raise MaskError(
                    f"picture {number} seems to show fewer than {len(tokens)} things: the border between two parts of "
                    f"what stands out is {length:.1f} sides long, that of two things at most {LONGEST_BORDER}. Give a "
                    "picture with some background between them, fewer tokens, or masks (--mask)"
                )
            named = len(tokens) > 1 and all(like.get(token) for token in tokens)
            ordered = matched(masks, maps.tokens, self.margin) if named else masks
            found.append(in_pixels(ordered, maps.background, self.threshold, size))
        made = torch.stack(found)
        check_masks(made, "the mask that attention gives")
        return made

    def renewed(self, lesson: PictureTraining, step: int) -> None:
        """Read masks from the model in training, and accept those that agree with the former ones."""
        if not self.mask_every or step == 0 or step % self.mask_every or not lesson.places.are_known:
            return
        backbone = lesson.backbone
        level = draw(LEVELS, 1, lesson.seed, "mask level", step).float()
        for number, picture in enumerate(lesson.clean):
            noise = backbone.noise(
                [stable_seed(lesson.seed, "masks", step, number)], *pixel_size(backbone, lesson.clean)
            )
            prompt = TEMPLATES[0].format(joined(lesson.tokens))
            with lesson.taught.active():
                maps = read_maps(backbone, picture[None], prompt, lesson.tokens, [level[0]], noise, self.power)
            fresh = in_latents(assigned(maps, self.margin)[None], lesson.clean)[0]
            try:
                check_masks(fresh[None] > 0.5, "the mask that attention gives")
            except MaskError:
                continue
            agree = [likeness(a, b) >= self.agreement for a, b in zip(lesson.places.masks[number], fresh, strict=True)]
            if all(agree):
                lesson.places.masks[number] = fresh

    # Updates --------------------------------------------------------------------------------------------------------

    def chosen(self, lesson: PictureTraining, step: int) -> list[tuple[int, ...]]:
        """Choose the indices of the tokens that each row of an update shows."""
        count = len(lesson.tokens)
        if count == 1:
            return [(0,)] * self.batch
        share = 1 / (count + 1) if self.together is None else self.together
        weights = torch.ones(count, dtype=torch.float64) / count
        if self.sampling == "reweighted":
            weights = lesson.balance.losses.double() / lesson.balance.losses.double().sum()
        odds = torch.cat([(1 - share) * weights, torch.tensor([share], dtype=torch.float64)])
        generator = torch.Generator().manual_seed(stable_seed(lesson.seed, "things", step))
        drawn = torch.multinomial(odds, self.batch, replacement=True, generator=generator).tolist()
        return [tuple(range(count)) if number == count else (number,) for number in drawn]

    def prepare(self, lesson: PictureTraining, step: int, share: Share) -> Batch:
        """Prepare the rows of an update."""
        backbone, seed = lesson.backbone, lesson.seed
        rows = share.of(torch.arange(self.batch))
        things = self.chosen(lesson, step)
        mine = [things[row] for row in rows.tolist()]
        pictures = share.of(draw(len(lesson.clean), self.batch, seed, "picture", step))
        levels = share.of(draw(LEVELS, self.batch, seed, "level", step))
        phrasings = share.of(
            draw(len(TEMPLATES) if self.templates else 1, self.batch, seed, "phrasing", step)
        ).tolist()
        device = lesson.clean.device
        clean, masks = lesson.clean[pictures.to(device)].clone(), lesson.places.masks[pictures].clone()
        weights = torch.stack(
            [mask[list(numbers)].amax(0, keepdim=True) for mask, numbers in zip(masks, mine, strict=True)]
        )
        weights *= lesson.inside[pictures]
        for row, (picture, numbers) in enumerate(zip(pictures.tolist(), mine, strict=True)):
            if lesson.alone is not None and len(numbers) == 1:
                clean[row] = lesson.alone.clean[picture, numbers[0]]
                masks[row, numbers[0]] = lesson.alone.masks[picture, numbers[0]]
                weights[row] = masks[row, numbers].clamp_min(self.outside)
        noise = backbone.noise(
            [stable_seed(seed, "noise", step, row) for row in rows.tolist()], *pixel_size(backbone, clean)
        )  # fmt: skip
        t = levels.to(device)
        prompts = [
            TEMPLATES[phrase].format(joined([lesson.tokens[number] for number in numbers]))
            for phrase, numbers in zip(phrasings, mine, strict=True)
        ]
        return Batch(
            backbone.parametrisation.noised(clean, noise, t), t, backbone.parametrisation.target(clean, noise, t),
            prompts, mine, masks.to(device), weights.to(device),
            self.kept(lesson, step, share),
        )  # fmt: skip

    @torch.no_grad()
    def kept(
        self, lesson: PictureTraining, step: int, share: Share
    ) -> tuple[Tensor, Tensor, Tensor, Conditioning] | None:
        """Prepare the prior rows of an update."""
        source = lesson.prior
        if source is None:
            return None
        states = source.take(share.of(draw(len(source), self.prior_batch, lesson.seed, "prior", step)))
        conditioning = source.prompts([scene.prompt for scene in source.of(states)])
        target = states.own if self.prior_target == "teacher" else states.noised
        return states.x, states.t, target, conditioning

    def losses(self, lesson: PictureTraining, batch: Batch) -> dict[str, Tensor]:
        """Compute the loss terms of an update."""
        backbone, count = lesson.backbone, len(batch.x)
        conditioning = backbone.encode(batch.prompts)
        x, t = batch.x, batch.t
        if batch.prior is not None:
            x, t = torch.cat([x, batch.prior[0]]), torch.cat([t, batch.prior[1].to(t.dtype)])
            conditioning = Conditioning.cat([conditioning, batch.prior[3]])
        attends = bool(self.attention_weight) and lesson.places.are_known
        size = (x.shape[2], x.shape[3])
        control = AttentionController(backbone.denoiser, Layout(size, len(x)))
        if attends:
            control.capture(self.looked_at(lesson, batch, len(x)), attention_layers(backbone, size)[0])
        with control:
            found = backbone.predict(x, t, conditioning)
        squares = ((found[:count].float() - batch.target.float()).square() * batch.weights).flatten(1).sum(1)
        each = squares / (batch.weights.flatten(1).sum(1) * found.shape[1]).clamp_min(1e-6)
        for numbers, loss in zip(batch.chosen, each, strict=True):
            if len(numbers) == 1:
                lesson.balance.add(numbers[0], loss)
        terms = {"picture": each.mean()}
        if attends:
            terms["attention"] = self.attention_weight * self.attention(batch, list(control.maps.values()))
        if batch.prior is not None:
            terms["prior"] = self.prior_weight * matching(found[count:], batch.prior[2])
        return terms

    def looked_at(self, lesson: PictureTraining, batch: Batch, rows: int) -> Tensor:
        """Mark the text tokens whose attention is read, `(rows, text tokens, 1 + tokens)`; prior rows have none."""
        each = []
        for prompt, numbers in zip(batch.prompts, batch.chosen, strict=True):
            columns = columns_of(lesson.backbone, prompt, [lesson.tokens[number] for number in numbers])
            whole = torch.zeros(len(columns), 1 + len(lesson.tokens))
            whole[:, [0, *(1 + number for number in numbers)]] = columns
            each.append(whole)
        made = torch.stack(each)
        return F.pad(made, (0, 0, 0, 0, 0, rows - len(made)))

    def attention(self, batch: Batch, maps: Sequence[Tensor]) -> Tensor:
        """Compute the distance of attention from masks, mean over rows; see `attention_loss`."""
        grid = maps[0].shape[2:]
        mean = torch.stack([part[: len(batch.x)] for part in maps]).mean(0)
        masks = F.interpolate(batch.masks, grid, mode="area")
        rows = []
        for row, numbers in enumerate(batch.chosen):
            own = masks[row, list(numbers)]
            wanted = torch.cat([1 - own.amax(0, keepdim=True), own])
            read = mean[row, [0, *(1 + number for number in numbers)]]
            if self.attention_loss == "mass":
                share = read / read.flatten(1).sum(1)[:, None, None].clamp_min(1e-12)
                rows.append((share * (1 - wanted)).flatten(1).sum(1).mean())
            else:
                rows.append(divergence(read, wanted).mean())
        return torch.stack(rows).mean()


def divergence(maps: Tensor, masks: Tensor) -> Tensor:
    """Compute the Jensen-Shannon divergence of the softmax of maps and of masks over places, `(maps,)`, in nats."""
    p, q = (part.float().flatten(1).log_softmax(1) for part in (maps, masks))
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return ((p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)) / 2


def joined(names: Sequence[str]) -> str:
    """Join names for a prompt: "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def in_latents(masks: Tensor, clean: Tensor) -> Tensor:
    """Resize masks `(pictures, tokens, rows, columns)` to the latents' size, float32 in 0-1 on the CPU."""
    size = clean.shape[2:]
    if tuple(masks.shape[2:]) == tuple(size):
        return masks.float().cpu()
    larger = masks.shape[2] < size[0]
    made = F.interpolate(masks.float().cpu(), size, mode="bilinear" if larger else "area")
    return (made > 0.5).float()


def enlarged(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks `(tokens, rows, columns)` to a height and width, bool."""
    return F.interpolate(masks.float()[None], size, mode="bilinear", align_corners=False)[0] > 0.5


def pixel_size(backbone: Backbone, latents: Tensor) -> tuple[int, int]:
    """Give the height and width in pixels of decoded latents."""
    factor = backbone.latents.factor
    return factor * latents.shape[2], factor * latents.shape[3]
