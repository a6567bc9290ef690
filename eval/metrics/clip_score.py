"""CLIP score: how well an image fits its prompt, by a CLIP model of open_clip or transformers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval.metrics.clip_models import ClipFolder, Encoders, clip_folder
from erasure.images import rgb

EMBEDDED = "canvas-clip"
"""Name of the embedded model."""


def cosine(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Cosine of paired features, both `(pairs, dim)` -> `(pairs,)`, -1 to 1."""
    x, y = np.asarray(images, dtype=np.float64), np.asarray(texts, dtype=np.float64)
    return (x * y).sum(-1) / np.maximum(np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1), 1e-12)


def clip_score(cosines: Sequence[float] | np.ndarray) -> float:
    """Mean of `max(cos, 0)`, 0 to 1: CLIPScore without the factors 2.5 or 100 that papers put before it.

    Raises:
        EvaluationError: There are none, or one is not finite.
    """
    values = np.asarray(cosines, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise EvaluationError(f"{values.size} cosines, wanted: at least one, all finite; leave missing ones out")
    return float(np.clip(values, 0, 1).mean())


class ClipModel:
    """A CLIP model in the layout of open_clip or of transformers, loaded on first use.

    Args:
        source: Its folder, a repository of the Hugging Face Hub, or the name of an embedded one (`canvas-clip`). The
            folder holds `open_clip_config.json` and `open_clip_model.safetensors`, or what transformers saves of a
            `CLIPModel` with its processor.
        device: Where to run.

    Raises:
        ArtifactError: There is no such model, or it is damaged.
    """

    def __init__(self, source: str | Path, device: str | torch.device = "cpu") -> None:
        self.folder, self.device = clip_folder(source), torch.device(device)
        # A downloaded folder is called by its commit, which says nothing to a reader.
        self.label = str(source) if self.folder != Path(source) else self.folder.resolve().name
        self._texts: dict[str, np.ndarray] = {}
        self._files = ClipFolder.of(self.folder)
        self.width: int = self._files.width
        """Values of a feature."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of configs, tokenizer and weights, 16 hex digits.

        Raises:
            ArtifactError: A file cannot be read.
        """
        return self._files.fingerprint()

    @cached_property
    def name(self) -> str:
        """What results call its feature space: `canvas-clip`, or where it came from and the start of its fingerprint.

        The embedded model is known by what is in its folder, wherever that is.
        """
        from erasure import assets

        embedded = assets.find(EMBEDDED)
        if embedded is not None and self.fingerprint == ClipFolder.of(embedded).fingerprint():
            return EMBEDDED
        label = re.sub(r"[^\w./-]+", "-", self.label).strip("-")[:100] or "clip"
        return f"{label}@{self.fingerprint[:8]}"

    @cached_property
    def _encoders(self) -> Encoders:
        return self._files.load(self.device)

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unnormalised image features, `(images, dim)` float32."""
        return self._encoders.images([rgb(image) for image in images]).float().cpu().numpy()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Unnormalised text features, `(prompts, dim)` float32. Longer prompts are cut at the context length."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing:
            features = self._encoders.texts(missing).float().cpu().numpy()
            self._texts.update(zip(missing, features, strict=True))
        return np.stack([self._texts[prompt] for prompt in prompts])
