"""Train the autoencoder of Canvas: 64x64 images to 4 x 16 x 16 latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from erasure.assets.build.loop import batches, cosine, log
from erasure.training.checkpoint import Checkpoint

CONFIG = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": 64,
}


def initialise(vae: AutoencoderKL) -> None:
    """Start near the identity: zero the last convolution of every residual block and make resamplers Dirac filters."""
    for name, module in vae.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
        elif name.endswith(("conv_shortcut", "samplers.0.conv")):
            nn.init.dirac_(module.weight)
            module.weight.data += 0.02 * torch.randn_like(module.weight)


def train(
    folder: Path, steps: int, batch: int = 8, peak: float = 2e-3, kl: float = 1e-6, seed: int = 0
) -> AutoencoderKL:
    """Train for `steps` steps (resuming from `folder`) and save the result to `folder / "vae"`."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(**CONFIG)
    initialise(vae)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=1e-4)
    state = Checkpoint(folder / "vae.ckpt", model=vae, optimiser=optimiser)
    start = state.resume()
    data = batches(batch, seed + start)
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, steps, peak)
        _, pixels, _ = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = F.mse_loss(decoded, pixels)
        loss = F.l1_loss(decoded, pixels) + error + kl * posterior.kl().float().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 200 == 0:
            psnr = -10 * torch.log10(error / 4).item()
            log(folder / "vae.jsonl", step=step + 1, loss=loss.item(), psnr=psnr, kl=posterior.kl().mean().item())
            state.save(step + 1)
    with torch.no_grad():
        latents = vae.encode(next(batches(256, seed + 10**6))[1]).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(folder / "vae")
    return vae
