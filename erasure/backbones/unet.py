"""The base of families with a UNet: text enters by cross-attention, and schedulers are of the DDPM kind."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from erasure.backbones.base import Backbone, EntryLayer, Part
from erasure.backbones.conditioning import Conditioning
from erasure.backbones.latents import Latents
from erasure.backbones.layouts import Layout, unet_layout, unet_layout_of
from erasure.backbones.parametrisation import PREDICTIONS, Diffusion
from erasure.errors import UnsupportedModelError
from erasure.interop import paths
from erasure.interop.protocols import Denoiser
from erasure.needs import Need

KEYS_AND_VALUES: dict[str, Part] = {"to_k": "keys", "to_v": "values"}
"""Layers of a cross-attention that read text."""


class UNetBackbone(Backbone):
    """Any pipeline with a `UNet2DConditionModel` and a VAE."""

    denoiser_component = "unet"
    reads_kohya_names = True

    @classmethod
    def published_layout(cls, denoiser: Denoiser | None) -> Layout | None:
        """Latent diffusion's layout, which needs the same number of layers in all blocks."""
        if denoiser is None:
            return None
        layers = denoiser.config.layers_per_block
        counts = {layers} if isinstance(layers, int) else set(layers)
        return unet_layout(paths.canonical_parameters(denoiser), counts.pop()) if len(counts) == 1 else None

    @classmethod
    def layout_of(cls, names: Collection[str]) -> Layout | None:
        """See `Backbone.layout_of`."""
        return unet_layout_of(names)

    def lacks(self, need: Need) -> str:
        """See `Backbone.lacks`; a latent consistency UNet has no trajectories."""
        if need == "trajectories" and self.denoiser.config.time_cond_proj_dim is not None:
            return (
                "a latent consistency UNet (time_cond_proj_dim is set) predicts no noise that a trajectory could be "
                "sampled or trained with: make the erasure with the model that it was distilled from, or use a "
                "strategy that edits the text encoder or the cross-attention in closed form (uce, hirm, itd)"
            )
        return "" if need in ("image prompts", "one step", "cross-attention") else super().lacks(need)

    def entry_layers(self) -> list[EntryLayer]:
        """`to_k` and `to_v` of every cross-attention."""
        layers = []
        for site in self.attention_sites():
            if site.kind == "cross":
                if paths.is_fused(self.denoiser, site.name):
                    raise UnsupportedModelError(
                        f"unet/{site.name} has fused projections: call pipe.unfuse_qkv_projections() first"
                    )
                for name, part in KEYS_AND_VALUES.items():
                    layer = cast(nn.Linear, paths.base_layer(getattr(site.module, name)))
                    layers.append(EntryLayer(f"unet/{site.name}.{name}", layer, part=part))
        return layers

    @property
    def parametrisation(self) -> Diffusion:
        """Prediction type of the scheduler."""
        scheduler = self.pipe.scheduler
        prediction = scheduler.config.get("prediction_type")
        if prediction not in PREDICTIONS:
            raise UnsupportedModelError(
                f"{type(scheduler).__name__} says that the UNet predicts {prediction!r}; known: "
                f"{', '.join(PREDICTIONS)}"
            )
        return PREDICTIONS[prediction](scheduler.alphas_cumprod)

    @property
    def latents(self) -> Latents:
        """As the UNet gives them and the VAE reads them."""
        config, factor = self.denoiser.config, self.pipe.vae_scale_factor
        own = config.sample_size
        rows, columns = (own, own) if isinstance(own, int) else own
        latents = Latents(config.out_channels, (rows, columns), factor, self.pipe.vae.config.scaling_factor)
        return latents.of_size(self.size)

    def rollout_scheduler(self) -> DDIMScheduler:
        """DDIM with eta 0; nothing clips latents.

        Raises:
            UnsupportedModelError: See `lacks`.
        """
        if reason := self.lacks("trajectories"):
            raise UnsupportedModelError(reason)
        return DDIMScheduler.from_config(self.pipe.scheduler.config, clip_sample=False, thresholding=False)

    def timesteps(self, steps: int) -> Tensor:
        """Sets the scheduler to `steps` steps."""
        self.pipe.scheduler.set_timesteps(steps, device=self.device)
        return self.pipe.scheduler.timesteps

    def noise(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
        """Standard normal times the scheduler's `init_noise_sigma`."""
        return super().noise(seeds, height, width) * self.pipe.scheduler.init_noise_sigma

    def model_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Scale latents as the scheduler does."""
        return self.pipe.scheduler.scale_model_input(x_t, t)

    @property
    def takes_guidance(self) -> bool:
        """Whether it is a latent consistency UNet; see `Backbone.takes_guidance`."""
        return self.denoiser.config.time_cond_proj_dim is not None

    def predict(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance: float | Tensor | None = None
    ) -> Tensor:
        """See `Backbone.predict`.

        An inpainting UNet (nine channels) gets a full mask, which makes it draw from text alone; a latent consistency
        UNet gets its guidance scale.
        """
        config = self.denoiser.config
        inputs: dict[str, object] = self.extra_inputs(x_t, conditioning)
        if config.in_channels == 2 * x_t.shape[1] + 1:
            x_t = torch.cat([x_t, torch.ones_like(x_t[:, :1]), self._hole(x_t)], 1)
        if config.time_cond_proj_dim is not None:
            above = torch.as_tensor(0.0 if guidance is None else guidance - 1).float().cpu().expand(len(x_t))
            inputs["timestep_cond"] = self.pipe.get_guidance_scale_embedding(
                above, embedding_dim=config.time_cond_proj_dim, dtype=x_t.dtype
            ).to(x_t)
        return self.denoiser(x_t, t, encoder_hidden_states=conditioning.tokens.to(x_t.dtype), **inputs).sample

    def extra_inputs(self, x_t: Tensor, conditioning: Conditioning) -> dict[str, object]:
        """Give the UNet's inputs other than latents, timestep and tokens."""
        return {}

    def _hole(self, x_t: Tensor) -> Tensor:
        """Encode a fully masked (grey) picture, in the shape of given latents."""
        vae, factor = self.pipe.vae, self.pipe.vae_scale_factor
        grey = torch.zeros(1, 3, x_t.shape[2] * factor, x_t.shape[3] * factor, device=x_t.device, dtype=vae.dtype)
        with torch.no_grad():
            # The class's method is called to bypass the guard against initial pictures.
            latents = self.latents.from_vae(type(vae).encode(vae, grey).latent_dist.mode())
        return latents.to(x_t.dtype).expand(len(x_t), -1, -1, -1)

    def step(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """One step of the pipeline's scheduler."""
        return self.pipe.scheduler.step(prediction, t, x_t).prev_sample
