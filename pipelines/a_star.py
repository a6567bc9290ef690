"""Drawing everything that a prompt names: A-STAR (Agarwal et al. 2023, arXiv 2306.14544), test-time guidance.

Before every step the latents are moved against the gradient of two losses on the subjects' cross-attention maps: maps
must not overlap (segregation), and must stay where they were in the step before (retention). The paper published no
code, so each setting says what the paper leaves open. The alternative is Attend-and-Excite (Chefer et al. 2023), which
raises the map of the most neglected subject.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.backbones import AttentionSite, Backbone, attention_sites
from erasure.carriers.attention import AttentionController, Layout
from erasure.carriers.guidance import Forward, LatentGuidance
from erasure.errors import DivergenceError, UnsupportedModelError
from erasure.interop import paths
from erasure.interop.protocols import Callback, Drawn, Pipeline
from erasure.options import Count, CountOrZero, NotNegative, Options, ZeroToOne
from erasure.pipelines.attention_losses import (
    excitation,
    ranged,
    retention,
    rivalled,
    segregation,
    smoothed,
    where_high,
)
from erasure.pipelines.mixin import ErasureMixin, SharedModulesMixin
from erasure.pipelines.prompts import for_each, texts_of
from erasure.pipelines.subjects import Rivals, Words, read_layout, rival_tokens, subject_weights

Loss = Literal["a_star", "attend_and_excite"]
COARSER = 4
"""Default number of latent values along a side of a token of the attention grid."""


@dataclass(frozen=True, kw_only=True)
class CompositionSettings(Options):
    """Settings of the guidance of latents."""

    name: ClassVar[str] = "composition"

    loss: Loss = "a_star"
    """Loss: `a_star` is segregation and retention; `attend_and_excite` raises the most neglected subject."""
    step_size: NotNegative = 20.0
    """Initial length of the gradient step, which is multiplied by `sqrt(linspace(1, 0.5, steps))` (code of
    Attend-and-Excite with 50 steps; not given by A-STAR). On Canvas with 10 steps A-STAR does best with 100."""
    segregation_until: ZeroToOne = 0.5
    """Share of the steps, 0 to 1, with the segregation loss (not given in the paper)."""
    retention_until: ZeroToOne = 1.0
    """Share of the steps, 0 to 1, with the retention loss (in the paper, subjects are lost when it stops early)."""
    excitation_until: ZeroToOne = 0.5
    """Share of the steps, 0 to 1, with the loss of `attend_and_excite` (its code: 25 of 50)."""
    threshold: ZeroToOne = 0.5
    """Share of a map's maximum above which the retention loss keeps the map (not given in the paper)."""
    grid: Count | None = None
    """Shorter side, in tokens, of the attention grid that is read; the nearest available is used. When left out, a
    quarter of the latent's side: 16 for Stable Diffusion at 512 pixels, as in both papers; 32 for SDXL at 1024,
    which has no grid of 16; and 8 for Canvas, with which A-STAR does best there."""
    refine: Mapping[ZeroToOne, ZeroToOne] = field(default_factory=lambda: {0.0: 0.05, 0.2: 0.5, 0.4: 0.8})
    """For `attend_and_excite`: maps' target maximum by share of the steps. At these steps latents are moved
    repeatedly until every subject's map reaches the target, and once more, as in its code (steps 0, 10 and 20 of
    50)."""
    refinements: CountOrZero = 20
    """Largest number of moves of one refinement."""
    rivals: Rivals | None = None
    """For `attend_and_excite`: tokens of its softmax. `padded`: all tokens after the start but the last of the
    sequence (its code for Stable Diffusion 1.x); `words`: tokens up to the end of the prompt (its code for 2.1).
    When left out, `padded` where the tokeniser pads with the end token, as that of 1.x does, else `words`, also for
    SDXL, which its code does not cover."""


class CompositionMixin(SharedModulesMixin):
    """Mixin for a stock text-to-image pipeline class, to be put before it in the list of bases."""

    _guide: LatentGuidance | None = None

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        subjects: Sequence[str] | Sequence[Sequence[str]],
        layout: Sequence[object] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = (),
        **options: Any,
    ) -> Drawn:
        """Draw images with all subjects of a prompt.

        Args:
            prompt: One prompt, or several.
            subjects: Subjects in the prompt's own words ("cat", "traffic light"); for several prompts one list each. A
                subject of several tokens has the mean of their maps.
            layout: Mask for each subject, as in `erasure.masks.read_masks`. Retention compares the subject's map with
                the mask from the first step on, instead of with its map of the step before. Attention moves there,
                more so with a larger `step_size`, and the subjects mostly follow.
            height: Height in pixels.
            width: Width in pixels.
            num_images_per_prompt: Number of images for each prompt.
            callback_on_step_end: Callback as in diffusers.
            callback_on_step_end_tensor_inputs: Names of tensors for the callback, as in diffusers.
            **options: Single settings of `CompositionSettings`; other options go to the stock call.

        Raises:
            OptionError: A subject is not in its prompt, there are no subjects, or a setting is invalid.
            MaskError: A layout does not fit the subjects.
            DivergenceError: The gradient has NaN.
            UnsupportedModelError: The UNet is an inpainting UNet.
        """
        backbone = self._backbone
        latents = backbone.latents
        if (channels := backbone.denoiser.config.in_channels) != latents.channels:
            raise UnsupportedModelError(
                f"the denoiser takes {channels} channels: it paints into pictures, and composition draws from a "
                "prompt alone; use the text-to-image model that it was made from"
            )
        own, rest = CompositionSettings.divide(options)
        settings = CompositionSettings(**own)
        prompts = texts_of("prompt", prompt)
        _, rows, columns = latents.shape(height, width)
        height, width = rows * latents.factor, columns * latents.factor
        towers = backbone.towers
        # A second prompt is for the second text encoder, and subjects are words of the first prompt.
        words = subject_weights(towers[:1] if rest.get("prompt_2") else towers, prompts, subjects)
        words = Words(*(part.repeat_interleave(num_images_per_prompt, 0) for part in words))
        kept = None if layout is None else read_layout(layout, (height, width), words.weights.shape[2])
        if settings.loss == "attend_and_excite":
            words = words._replace(inside=rival_tokens(towers, words.inside, settings.rivals))
        guide = Guide(backbone, settings, words, (rows, columns), kept)

        def follow(pipe: Pipeline, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if callback_on_step_end is not None:
                tensors = callback_on_step_end(pipe, index, t, tensors)
            guide.at(index + 1, pipe.num_timesteps)
            assert self._guide is not None
            self._guide.follow(tensors["latents"])
            return tensors

        try:
            with LatentGuidance(backbone, guide) as self._guide:
                return super().__call__(  # type: ignore[misc]
                    prompts, height=height, width=width, num_images_per_prompt=num_images_per_prompt,
                    callback_on_step_end=follow,
                    callback_on_step_end_tensor_inputs=list(
                        dict.fromkeys(["latents", *callback_on_step_end_tensor_inputs])
                    ),
                    **for_each(rest, len(prompts)),
                )  # fmt: skip
        finally:
            self._guide = None

    def prepare_latents(self, *args: object, **kwargs: object) -> Tensor:
        """Prepare latents as the stock method does, and tell the guidance which tensor the loop starts from."""
        latents = super().prepare_latents(*args, **kwargs)  # type: ignore[misc]
        if self._guide is not None:
            # The loop must not change the caller's tensor.
            latents = latents.clone()
            self._guide.follow(latents)
        return latents


def composition_sites(
    denoiser: nn.Module, latent_size: tuple[int, int], grid: int | None = None
) -> list[AttentionSite]:
    """Find the cross-attention layers with the attention grid nearest to a size; default: a quarter of the latent's.

    Raises:
        UnsupportedModelError: The denoiser has no cross-attention.
    """
    cross = [site for site in attention_sites(denoiser) if site.kind == "cross"]
    if not cross:
        raise UnsupportedModelError(
            f"{type(paths.uncompiled(denoiser)).__name__} has no cross-attention, whose maps composition compares: "
            "use a model with a UNet (Stable Diffusion, SDXL)"
        )
    wanted = min(latent_size) / COARSER if grid is None else grid
    best = min({site.downsampling for site in cross}, key=lambda d: abs(min(latent_size) / d - wanted))
    return [site for site in cross if site.downsampling == best]


class Guide:
    """Updates the latents in one call: reads the subjects' attention maps, and takes gradient steps on the loss.

    Args:
        backbone: Backbone of the pipeline.
        settings: Settings of the guidance.
        words: Positions of the subjects in the prompts.
        latent_size: Height and width of the latents.
        kept: Layout, if any, `(subjects, height, width)` bool.
    """

    def __init__(
        self, backbone: Backbone, settings: CompositionSettings, words: Words, latent_size: tuple[int, int],
        kept: Tensor | None,
    ) -> None:  # fmt: skip
        self.settings, self.words = settings, words
        self.at(0, 1)
        sites = composition_sites(backbone.denoiser, latent_size, settings.grid)
        self.control = AttentionController(backbone.denoiser, Layout(latent_size, len(words.weights)))
        self.excites = settings.loss == "attend_and_excite"
        tokens = torch.eye(words.inside.shape[1])[None].expand(len(words.inside), -1, -1)
        self.control.capture(tokens if self.excites else words.weights, sites)
        self.layout: Tensor | None = None
        if kept is not None:
            self.layout = F.interpolate(kept[None].float(), sites[0].grid(*latent_size), mode="area")
            self.layout = self.layout.expand(len(words.weights), -1, -1, -1)
        self.kept = self.layout
        self.refined: set[float] = set()

    def at(self, step: int, steps: int) -> None:
        """Set the index of the next step."""
        self.share = step / steps
        self.size = self.settings.step_size * (1 - 0.5 * min(step / max(steps - 1, 1), 1)) ** 0.5

    def __call__(self, latents: Tensor, t: Tensor, forward: Forward) -> Tensor:
        """Give the updated latents, see `LatentGuidance`."""
        settings = self.settings
        until = max(settings.segregation_until, settings.retention_until)
        if self.excites:
            until = settings.excitation_until
        if self.share >= until or settings.step_size == 0:
            return latents
        goal = self._goal() if self.excites else None
        if goal is not None:
            latents = self._refine(latents, forward, goal)
        with torch.enable_grad(), self.control:
            z = latents.detach().requires_grad_(True)
            maps = self._maps(z, forward)
            loss = self._loss(maps)
            changed = self._moved(z, loss)
        if not self.excites:
            self.kept = where_high(maps, settings.threshold) if self.layout is None else self.layout
        return changed

    def _goal(self) -> float | None:
        """Give the target of every map at this step, once; `None` without one."""
        due = [(at, goal) for at, goal in self.settings.refine.items() if at <= self.share and at not in self.refined]
        self.refined.update(at for at, _ in due)
        return max(due)[1] if due else None

    def _refine(self, latents: Tensor, forward: Forward, goal: float) -> Tensor:
        """Move latents until every map reaches a goal, and once more."""
        going: Tensor | None = None
        for _ in range(self.settings.refinements):
            with torch.enable_grad(), self.control:
                z = latents.detach().requires_grad_(True)
                loss = self._loss(self._maps(z, forward))
                short = loss.detach() > 1 - goal
                going = short if going is None else going
                latents = torch.where(going[:, None, None, None].to(z.device), self._moved(z, loss), latents)
            going = going & short
            if not going.any():
                break
        return latents

    def _maps(self, z: Tensor, forward: Forward) -> Tensor:
        """Compute the subjects' maps, mean over layers, `(samples, subjects, rows, columns)` float32."""
        self.control.collect(lambda: forward(z))
        maps = torch.stack(list(self.control.maps.values())).mean(0)
        if not self.excites:
            return ranged(smoothed(maps))
        won = rivalled(maps, self.words.inside.to(maps.device))
        return smoothed(torch.einsum("btyx,bts->bsyx", won, self.words.weights.to(maps)))

    def _loss(self, maps: Tensor) -> Tensor:
        """Compute the loss of each sample, `(samples,)`."""
        present, settings = self.words.present.to(maps.device), self.settings
        if self.excites:
            return excitation(maps, present)
        loss = maps.sum((1, 2, 3)) * 0
        if self.share < settings.segregation_until:
            loss = loss + segregation(maps, present)
        if self.kept is not None and self.share < settings.retention_until:
            loss = loss + retention(maps, self.kept.to(maps), present)
        return loss

    def _moved(self, z: Tensor, loss: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        if not torch.isfinite(gradient).all():
            raise DivergenceError(
                f"the gradient of {self.settings.loss} has NaN or infinity at {self.share:.0%} of the steps: use "
                "float32 or bfloat16, or a smaller step_size"
            )
        return (z - self.size * gradient).detach()


class StableDiffusionAStarPipeline(CompositionMixin, ErasureMixin, StableDiffusionPipeline):
    """Composition with Stable Diffusion 1.x and 2.x; see `CompositionMixin.__call__`.

    Example:
        >>> pipe = StableDiffusionAStarPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> pipe("a cat and a dog", subjects=["cat", "dog"]).images[0]
    """


class StableDiffusionXLAStarPipeline(CompositionMixin, ErasureMixin, StableDiffusionXLPipeline):
    """Composition with Stable Diffusion XL; `prompt_2` is for the second text encoder.

    Example:
        >>> pipe = StableDiffusionXLAStarPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe("a cat and a dog", subjects=["cat", "dog"]).images[0]
    """


__all__ = [
    "CompositionMixin",
    "CompositionSettings",
    "StableDiffusionAStarPipeline",
    "StableDiffusionXLAStarPipeline",
]
