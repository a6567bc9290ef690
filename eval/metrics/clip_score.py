"""CLIP score: how well an image fits its prompt, through open_clip."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erasure.errors import ArtifactError, EvaluationError
from erasure.eval.schemas import ClipConfig
from erasure.files import read_bytes, read_json, tensor_infos
from erasure.images import rgb

if TYPE_CHECKING:
    from open_clip import CLIP

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
WEIGHTS_LIMIT = 32 * 2**30
"""Bytes of the weights."""


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
    """An open_clip model in a local folder, loaded on first use.

    Args:
        folder: Holds `open_clip_config.json` and `open_clip_model.safetensors`.
        device: Where to run.

    Raises:
        ArtifactError: There is no open_clip model in the folder, or it is damaged.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu") -> None:
        self.folder, self.device = Path(folder), torch.device(device)
        self._texts: dict[str, np.ndarray] = {}
        # Without safetensors open_clip would look for a pickle.
        if not all(os.path.lexists(self.folder / name) for name in (CONFIG, WEIGHTS)):
            raise ArtifactError(
                f"no open_clip model at {self.folder}: expected {CONFIG} and {WEIGHTS}; give the folder of one, or "
                "leave CLIP out"
            )
        config: ClipConfig = read_json(self.folder / CONFIG, ClipConfig)
        self.width: int = config["model_cfg"]["embed_dim"]
        """Values of a feature."""
        tensor_infos(self.folder / WEIGHTS)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of config and weights, 16 hex digits.

        Raises:
            ArtifactError: A file cannot be read.
        """
        digest = hashlib.sha256()
        for file in sorted(self.folder.glob("open_clip_*")):
            digest.update(file.name.encode())
            digest.update(read_bytes(file, WEIGHTS_LIMIT))
        return digest.hexdigest()[:16]

    @cached_property
    def _model(self) -> tuple[CLIP, Callable[[Image.Image], Tensor], Callable[[list[str]], Tensor]]:
        import open_clip

        name = f"local-dir:{self.folder}"
        try:
            model, _, transform = open_clip.create_model_and_transforms(name, device=self.device)
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip checks neither configs nor shapes
            raise ArtifactError(
                f"the open_clip model at {self.folder} cannot be loaded ({type(error).__name__}: {error}): config and "
                "weights do not go together; fetch it again"
            ) from error
        return model.eval().requires_grad_(False), transform, tokenizer

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Unnormalised image features, `(images, dim)` float32."""
        model, transform, _ = self._model
        pixels = torch.stack([transform(rgb(image)) for image in images]).to(self.device)
        return model.encode_image(pixels).float().cpu().numpy()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Unnormalised text features, `(prompts, dim)` float32. Longer prompts are cut at the context length."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if missing:
            model, _, tokenizer = self._model
            features = model.encode_text(tokenizer(missing).to(self.device)).float().cpu().numpy()
            self._texts.update(zip(missing, features, strict=True))
        return np.stack([self._texts[prompt] for prompt in prompts])
