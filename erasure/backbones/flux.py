"""FLUX.1 dev and schnell: tokens of T5, the pooled vector of CLIP, packed latents, guidance as an input.

Chroma is a Flux without CLIP and pooled vector, with a mask of padding tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from diffusers import ChromaTransformer2DModel, DiffusionPipeline, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones.base import EntryLayer, TokenRun
from erasure.backbones.conditioning import Conditioning
from erasure.backbones.flow_matching import PATCH, FlowMatchingBackbone
from erasure.backbones.latents import PackedLatents, pack, unpack
from erasure.backbones.layouts import Layout, flux_layout
from erasure.backbones.parametrisation import TIMESTEPS
from erasure.backbones.towers import TowerOutput
from erasure.errors import OptionError, UnsupportedModelError
from erasure.interop.protocols import Denoiser, Settings


class FluxBackbone(FlowMatchingBackbone):
    """Any pipeline with a `FluxTransformer2DModel` that draws from text, a CLIP and a T5."""

    family = "flux"
    network = FluxTransformer2DModel
    required: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    even_levels = True
    noisiest = 1.0
    guides_in_one_call = False

    def __init__(
        self, pipe: DiffusionPipeline, *, size: tuple[int, int] | None = None, length: int | None = None
    ) -> None:
        super().__init__(pipe, size=size, length=length)
        taken, own = self.denoiser.config.in_channels, PATCH**2 * pipe.vae.config.latent_channels
        if taken != own:
            raise UnsupportedModelError(
                f"the transformer takes {taken} channels and the latents have {own}: it paints into pictures or "
                "follows a control picture, which is not supported; use the text-to-image model of the family"
            )

    @classmethod
    def published_layout(cls, denoiser: Denoiser | None) -> Layout | None:
        """Layout of Black Forest Labs."""
        return flux_layout

    @property
    def token_runs(self) -> list[TokenRun]:
        """The tokens of T5."""
        return [TokenRun((self.tower(self.required[-1]),))]

    def compose(self, parts: Mapping[str, TowerOutput]) -> Conditioning:
        """The states of T5, and the pooled vector of CLIP."""
        clip, t5 = (parts[name] for name in self.required)
        return Conditioning(t5.states, clip.pooled)

    @property
    def latents(self) -> PackedLatents:
        """As the transformer takes them, two by two, and the VAE reads them."""
        config, side = self.pipe.vae.config, self.pipe.default_sample_size
        latents = PackedLatents(
            config.latent_channels, (side, side), self.pipe.vae_scale_factor, config.scaling_factor,
            config.shift_factor or 0.0, PATCH,
        )  # fmt: skip
        return latents.of_size(self.size)

    @property
    def takes_guidance(self) -> bool:
        """Whether the transformer was distilled for guidance, as FLUX.1 dev is."""
        return bool(self.denoiser.config.guidance_embeds)

    def predict(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance: float | Tensor | None = None
    ) -> Tensor:
        """See `Backbone.predict`."""
        rows, columns = x_t.shape[2:]
        tokens = conditioning.tokens.to(x_t.dtype)
        # The pipeline divides in the latents' precision, and the transformer multiplies in it.
        level = t.to(x_t.device, x_t.dtype).expand(len(x_t)) / TIMESTEPS
        velocity = self.denoiser(
            hidden_states=pack(x_t), timestep=level, encoder_hidden_states=tokens,
            img_ids=places(rows // PATCH, columns // PATCH).to(tokens), txt_ids=tokens.new_zeros(tokens.shape[1], 3),
            **self.extra_inputs(x_t, conditioning, guidance),
        ).sample  # fmt: skip
        return unpack(velocity, rows, columns)

    def extra_inputs(
        self, x_t: Tensor, conditioning: Conditioning, guidance: float | Tensor | None
    ) -> dict[str, Tensor]:
        """Give the transformer's inputs other than latents, positions, timestep and tokens."""
        assert conditioning.pooled is not None
        inputs = {"pooled_projections": conditioning.pooled.to(x_t.dtype)}
        if self.takes_guidance:
            scale = torch.as_tensor(1.0 if guidance is None else guidance, dtype=torch.float32)
            inputs["guidance"] = scale.to(x_t.device).expand(len(x_t))
        return inputs

    def guidance_options(self, guidance: float | None, negative: Sequence[str]) -> Settings:
        """Guidance is an input of guidance-distilled transformers; others are guided by a second prompt.

        Raises:
            OptionError: A negative prompt is given for a transformer that makes no second pass.
        """
        if self.takes_guidance:
            if any(negative):
                raise OptionError(
                    "the transformer guides itself and reads no negative prompt, found "
                    f"{next(filter(None, negative))!r}: leave it out"
                )
            return {} if guidance is None else {"guidance_scale": guidance}
        if guidance is None or guidance <= 1:
            return {}
        return {"true_cfg_scale": guidance, "negative_prompt": list(negative)}


class ChromaBackbone(FluxBackbone):
    """Any pipeline with a `ChromaTransformer2DModel` that draws from text, and a T5."""

    family = "chroma"
    network = ChromaTransformer2DModel
    required = ("text_encoder",)

    @classmethod
    def published_layout(cls, denoiser: Denoiser | None) -> Layout | None:
        """Give no layout: none is known for Chroma."""
        return None

    def compose(self, parts: Mapping[str, TowerOutput]) -> Conditioning:
        """The states of T5, of which the transformer sees those of the prompt and of the first padding."""
        (t5,) = parts.values()
        assert t5.mask is not None
        places = torch.arange(t5.mask.shape[1], device=t5.mask.device)
        return Conditioning(t5.states, mask=places <= t5.mask.sum(1, keepdim=True))

    def entry_layers(self) -> list[EntryLayer]:
        """The layer that reads tokens."""
        return [self.entry("context_embedder", "tokens")]

    def extra_inputs(
        self, x_t: Tensor, conditioning: Conditioning, guidance: float | Tensor | None
    ) -> dict[str, Tensor]:
        """Give the attention mask: all image tokens, and the text tokens of the conditioning's mask."""
        assert conditioning.mask is not None
        words, pixels = conditioning.mask.to(x_t.dtype), x_t.shape[2] * x_t.shape[3] // PATCH**2
        return {"attention_mask": F.pad(words, (0, pixels), value=1.0)}

    @property
    def takes_guidance(self) -> bool:
        """Always false: the model is guided by a second pass."""
        return False

    def guidance_options(self, guidance: float | None, negative: Sequence[str]) -> Settings:
        """See `Backbone.guidance_options`."""
        return super(FluxBackbone, self).guidance_options(guidance, negative)


def places(rows: int, columns: int) -> Tensor:
    """Give the positions of image tokens, `(rows * columns, 3)`: 0, row and column."""
    return F.pad(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)), (1, 0))
