"""Stable Diffusion 1.x and 2.x: one CLIP text tower, a UNet with cross-attention, epsilon or v prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from erasure.backbones.base import Backbone, Conditioning, EntryLayer, Prediction
from erasure.backbones.towers import TextTower, text_towers
from erasure.errors import UnsupportedModelError
from erasure.interop import paths


class StableDiffusionBackbone(Backbone):
    """Any pipeline with a `UNet2DConditionModel`, one CLIP text encoder and a VAE."""

    family = "stable-diffusion"
    denoiser_component = "unet"

    @classmethod
    def matches(cls, pipe: DiffusionPipeline) -> bool:
        """One text encoder of CLIP's make and a UNet: SDXL has two, SD3 and Flux a transformer."""
        parts = pipe.components
        encoder = parts.get("text_encoder")
        return (
            isinstance(parts.get("unet"), nn.Module)
            and isinstance(paths.uncompiled(parts["unet"]), UNet2DConditionModel)
            and isinstance(encoder, nn.Module)
            and hasattr(paths.transformer_root(encoder), "final_layer_norm")
            and "text_encoder_2" not in parts
        )

    @property
    def towers(self) -> list[TextTower]:
        """The one text encoder."""
        return text_towers(self.pipe)

    def entry_layers(self) -> list[EntryLayer]:
        """`to_k` and `to_v` of every cross-attention."""
        layers = []
        for site in self.attention_sites():
            if site.kind == "cross":
                if paths.is_fused(self.denoiser, site.name):
                    raise UnsupportedModelError(
                        f"unet/{site.name} has fused projections: call pipe.unfuse_qkv_projections() first"
                    )
                for part in ("to_k", "to_v"):
                    layer = paths.base_layer(getattr(site.module, part))
                    layers.append(EntryLayer(f"unet/{site.name}.{part}", cast(nn.Linear, layer)))
        return layers

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The final hidden states of the text encoder."""
        tower = self.towers[0]
        return Conditioning(tower.encode(tower.tokenize(prompts)))

    @property
    def prediction(self) -> Prediction:
        """As the scheduler says."""
        return cast(Prediction, self.pipe.scheduler.config.prediction_type)

    def _levels(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of signal and noise, `(batch, 1, 1, 1)` each."""
        cumulative = self.pipe.scheduler.alphas_cumprod.to(x.device)[t.to(x.device).long()].view(-1, 1, 1, 1)
        return cumulative.sqrt(), (1 - cumulative).sqrt()

    def noised(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`sqrt(a) x + sqrt(1-a) eps`."""
        signal, spread = self._levels(clean, t)
        return (signal * clean + spread * noise).to(clean.dtype)

    def training_target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """epsilon: `eps`; v: `sqrt(a) eps - sqrt(1-a) x`."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v_prediction":
            signal, spread = self._levels(clean, t)
            return (signal * noise - spread * clean).to(clean.dtype)
        if self.prediction == "sample":
            return clean
        raise UnsupportedModelError(f"{self.prediction!r} prediction is not one of Stable Diffusion's")

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """epsilon: `(x_t - sqrt(1-a) eps) / sqrt(a)`; v: `sqrt(a) x_t - sqrt(1-a) v`."""
        signal, noise = self._levels(x_t, t)
        if self.prediction == "epsilon":
            return (x_t - noise * prediction) / signal
        if self.prediction == "v_prediction":
            return signal * x_t - noise * prediction
        if self.prediction == "sample":
            return prediction
        raise UnsupportedModelError(f"{self.prediction!r} prediction is not one of Stable Diffusion's")

    def rollout_scheduler(self) -> DDIMScheduler:
        """DDIM with eta 0; nothing clips latents.

        Raises:
            UnsupportedModelError: A latent consistency UNet, which no trajectory of DDIM leads through.
        """
        if self.denoiser.config.time_cond_proj_dim is not None:
            raise UnsupportedModelError(
                "a latent consistency UNet (time_cond_proj_dim is set) predicts no noise that a trajectory could be "
                "sampled or trained with: make the erasure with the model that it was distilled from, or use a "
                "strategy that edits the text encoder or the cross-attention in closed form (uce, hirm, itd)"
            )
        return DDIMScheduler.from_config(self.pipe.scheduler.config, clip_sample=False, thresholding=False)

    def timesteps(self, steps: int) -> Tensor:
        """Sets the scheduler to `steps` steps."""
        self.pipe.scheduler.set_timesteps(steps, device=self.device)
        return self.pipe.scheduler.timesteps

    def noise(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
        """Standard normal times the scheduler's `init_noise_sigma`."""
        factor, config = self.pipe.vae_scale_factor, self.denoiser.config
        h, w = (height // factor if height else config.sample_size), (width // factor if width else config.sample_size)
        rows = [
            randn_tensor((1, config.out_channels, h, w), generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        return torch.cat(rows).to(self.device, self.dtype) * self.pipe.scheduler.init_noise_sigma

    def model_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """As the scheduler scales it."""
        return self.pipe.scheduler.scale_model_input(x_t, t)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """`t` may be one level for the batch or one per row.

        An inpainting UNet (nine channels) is told that everything is masked, which makes it one that draws from text;
        a latent consistency UNet that there is no guidance.
        """
        config = self.denoiser.config
        told: dict[str, Tensor] = {}
        if config.in_channels == 2 * x_t.shape[1] + 1:
            x_t = torch.cat([x_t, torch.ones_like(x_t[:, :1]), self._hole(x_t)], 1)
        if config.time_cond_proj_dim is not None:
            unguided = torch.zeros(len(x_t))
            told["timestep_cond"] = self.pipe.get_guidance_scale_embedding(
                unguided, embedding_dim=config.time_cond_proj_dim, dtype=x_t.dtype
            ).to(x_t)
        return self.denoiser(x_t, t, encoder_hidden_states=conditioning.tokens.to(x_t.dtype), **told).sample

    def _hole(self, x_t: Tensor) -> Tensor:
        """Latents of a picture that is masked all over, of the shape of some latents: those of plain grey."""
        vae, factor = self.pipe.vae, self.pipe.vae_scale_factor
        grey = torch.zeros(1, 3, x_t.shape[2] * factor, x_t.shape[3] * factor, device=x_t.device, dtype=vae.dtype)
        with torch.no_grad():
            # Past the guard that speaks of pictures which users hand in.
            latents = vae.config.scaling_factor * type(vae).encode(vae, grey).latent_dist.mode()
        return latents.to(x_t.dtype).expand(len(x_t), -1, -1, -1)

    def step(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """One step of the pipeline's scheduler."""
        return self.pipe.scheduler.step(prediction, t, x_t).prev_sample

    def decode(self, latents: Tensor) -> Tensor:
        """Through the VAE."""
        pixels = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        return (pixels / 2 + 0.5).clamp(0, 1)
