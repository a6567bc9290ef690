"""Scenes with their latents, and the captions that a denoiser's training draws for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from erasure.assets.build.loop import batches
from erasure.assets.scenes import Scene, caption


@dataclass(frozen=True)
class Bank:
    """Scenes whose latents are kept, so that training never runs the autoencoder."""

    latents: Tensor
    """Scaled latents, `(scenes, 4, 16, 16)`."""
    scenes: list[Scene]
    odds: np.ndarray
    """Chance of each scene to be drawn, `(scenes,)`."""

    @classmethod
    def of(
        cls,
        vae: AutoencoderKL,
        path: Path,
        size: int,
        seed: int,
        pairs: float,
        change: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Bank:
        """Draw `size` scenes, and encode them unless their latents are in `path` already.

        Args:
            vae: The autoencoder; latents are its means times its scaling factor.
            path: File of the latents.
            size: Number of scenes, a multiple of 50.
            seed: Seeds the scenes.
            pairs: Share of two-object scenes among those that `draw` gives.
            change: Changes images `(images, 3, 64, 64)`, given the number of the first one's scene.
        """
        scenes: list[Scene] = []
        stream = batches(50, seed)
        cached = torch.load(path, weights_only=True) if path.exists() else None
        if cached is not None and len(cached) != size:
            cached = None
        latents = []
        device = next(vae.parameters()).device
        with torch.no_grad():
            while len(scenes) < size:
                drawn, pixels, _ = next(stream)
                if cached is None:
                    pixels = change(pixels, len(scenes)) if change else pixels
                    mean = vae.encode(pixels.to(device)).latent_dist.mean
                    latents.append((mean * vae.config.scaling_factor).cpu())
                scenes += drawn
        if cached is None:
            cached = torch.cat(latents)
            torch.save(cached, path)
        double = np.array([len(scene.objects) == 2 for scene in scenes])
        odds = np.where(double, pairs / double.sum(), (1 - pairs) / (~double).sum())
        return cls(cached, scenes, odds)

    def to(self, device: torch.device) -> Bank:
        """The same bank with its latents on a device."""
        return replace(self, latents=self.latents.to(device))

    def draw(
        self, rng: np.random.Generator, count: int, dropped: float, turned: float = 0.5
    ) -> tuple[np.ndarray, list[str]]:
        """Draw `count` scenes: their numbers, and a caption of each.

        Args:
            rng: Says which.
            count: Number of scenes.
            dropped: Share of captions that are "", for guidance.
            turned: See `caption`.
        """
        rows = rng.choice(len(self.scenes), size=count, p=self.odds)
        return rows, ["" if rng.random() < dropped else caption(self.scenes[row], rng, turned=turned) for row in rows]
