"""CLIP models: finding their folders, checking what is in them, loading them with open_clip or transformers."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from erasure.errors import ArtifactError, ErasureError
from erasure.eval.schemas import ClipConfig, ShardIndex, TransformersClipConfig
from erasure.files import inside, read_bytes, read_json, shown, tensor_infos

OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
CONFIG, WEIGHTS, SHARDS = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHTS_LIMIT = 32 * 2**30
"""Bytes of a file of weights."""
TEXT_LIMIT = 64 * 2**20
"""Bytes of a config or of a file of the tokenizer."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
"""A repository of the Hub, `owner/name`."""


class Encoders(NamedTuple):
    """A loaded CLIP model."""

    images: Callable[[Sequence[Image.Image]], Tensor]
    """RGB images -> features `(images, dim)`."""
    texts: Callable[[list[str]], Tensor]
    """Texts -> features `(texts, dim)`."""


@dataclass(frozen=True)
class ClipFolder:
    """A folder that holds a CLIP model in the layout of open_clip or of transformers."""

    folder: Path
    layout: Literal["open_clip", "transformers"]
    width: int
    """Values of a feature."""
    weights: tuple[str, ...]
    """Names of the files of weights."""

    @classmethod
    def of(cls, folder: Path) -> ClipFolder:
        """Recognise what a folder holds.

        Raises:
            ArtifactError: It is no folder, or holds no CLIP model with weights as safetensors, or a damaged one.
        """
        there = {name for name in (OPEN_CLIP_CONFIG, CONFIG) if os.path.lexists(folder / name)}
        if OPEN_CLIP_CONFIG in there and os.path.lexists(folder / OPEN_CLIP_WEIGHTS):
            config: ClipConfig = read_json(folder / OPEN_CLIP_CONFIG, ClipConfig)
            found = cls(folder, "open_clip", config["model_cfg"]["embed_dim"], (OPEN_CLIP_WEIGHTS,))
        elif CONFIG in there and (names := _transformers_weights(folder)):
            about: TransformersClipConfig = read_json(folder / CONFIG, TransformersClipConfig)
            if about["model_type"] != "clip" or "projection_dim" not in about:
                raise ArtifactError(
                    f"{folder} holds a model of the type {shown(about['model_type'])}, expected a whole CLIP model "
                    "('clip') with text and image encoder: name another, or leave CLIP out"
                )
            found = cls(folder, "transformers", about["projection_dim"], names)
        else:
            present = ", ".join(sorted(os.listdir(folder))[:6]) if os.path.isdir(folder) else "no folder"
            raise ArtifactError(
                f"no open_clip model at {folder} and none of transformers (found: {present or 'nothing'}): expected "
                f"{OPEN_CLIP_CONFIG} and {OPEN_CLIP_WEIGHTS}, or {CONFIG} and {WEIGHTS}; give the folder of one, or "
                "leave CLIP out"
            )
        for name in found.weights:
            tensor_infos(inside(folder, name))
        return found

    def fingerprint(self) -> str:
        """sha256 of configs, tokenizer and weights, 16 hex digits.

        Raises:
            ArtifactError: A file cannot be read.
        """
        digest = hashlib.sha256()
        texts = [path.name for path in self.folder.iterdir() if path.suffix in (".json", ".txt")]
        for name in sorted({*texts, *self.weights}):
            digest.update(name.encode())
            limit = WEIGHTS_LIMIT if name in self.weights else TEXT_LIMIT
            digest.update(read_bytes(self.folder / name, limit))
        return digest.hexdigest()[:16]

    def load(self, device: torch.device) -> Encoders:
        """Load it.

        Raises:
            ArtifactError: Config and weights do not go together.
        """
        loader = _open_clip if self.layout == "open_clip" else _transformers
        try:
            return loader(self.folder, device)
        except ErasureError:
            raise
        except Exception as error:  # neither library checks configs or shapes
            raise ArtifactError(
                f"the {self.layout} model at {self.folder} cannot be loaded ({type(error).__name__}: {error}): its "
                "files do not go together or some are missing; fetch it again"
            ) from error


def clip_folder(source: str | Path) -> Path:
    """The folder of a CLIP model: a folder here, an embedded model, or a download from the Hub.

    Only a text of the form `owner/name` whose first part is no folder here is ever looked for on the Hub.

    Raises:
        ArtifactError: There is none, or the Hub does not give it.
    """
    from erasure import assets

    if os.path.isdir(source):
        return Path(source)
    if (embedded := assets.find(str(source))) is not None:
        return embedded
    text = str(source)
    remote = not isinstance(source, Path) and REPOSITORY.fullmatch(text) is not None and ".." not in text
    if remote and not os.path.lexists(text.partition("/")[0]):
        return _download(text)
    what = "is a file" if os.path.lexists(source) else "is neither a folder nor a repository of the Hub"
    raise ArtifactError(
        f"the CLIP model {shown(text, 200)} {what}: give the folder of an open_clip or transformers CLIP, its "
        "repository (owner/name), or 'none' to leave CLIP out"
    )


def _download(repository: str) -> Path:
    """Configs and tokenizer first: they say which weights are needed."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, allow_patterns=["*.json", "*.txt"]))
        shards = _transformers_weights(folder) or (WEIGHTS,)
        weights = [OPEN_CLIP_WEIGHTS] if os.path.lexists(folder / OPEN_CLIP_CONFIG) else list(shards)
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.txt", *weights]))
    except ErasureError:
        raise
    except Exception as error:  # many kinds: names, network, permissions, disk
        raise ArtifactError(
            f"the CLIP model {repository!r} is no folder here, and the Hub does not give it: "
            f"{shown(str(error).splitlines()[0] if str(error) else type(error).__name__, 300)[1:-1]}"
        ) from error


def _transformers_weights(folder: Path) -> tuple[str, ...]:
    """Names of the files of weights in the layout of transformers; none if there are none."""
    if os.path.lexists(folder / WEIGHTS):
        return (WEIGHTS,)
    if os.path.lexists(folder / SHARDS):
        index: ShardIndex = read_json(folder / SHARDS, ShardIndex)
        return tuple(sorted({*index["weight_map"].values()}))
    return ()


def _open_clip(folder: Path, device: torch.device) -> Encoders:
    import open_clip

    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name, device=device)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval().requires_grad_(False)

    def images(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([transform(picture) for picture in pictures])
        return model.encode_image(pixels.to(device))

    return Encoders(images, lambda prompts: model.encode_text(tokenizer(prompts).to(device)))


def _transformers(folder: Path, device: torch.device) -> Encoders:
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model, report = CLIPModel.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    # transformers makes up what the file lacks, and goes on.
    if missing := sorted(report["missing_keys"]):
        raise ArtifactError(f"the weights at {folder} lack {shown(missing[:3])}: fetch the model again")
    processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    length = model.config.text_config.max_position_embeddings
    model.eval().requires_grad_(False).to(device)

    def images(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        return _features(model.get_image_features(pixel_values=pixels.to(device)))

    def texts(prompts: list[str]) -> Tensor:
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
        return _features(model.get_text_features(**tokens))

    return Encoders(images, texts)


def _features(answer: object) -> Tensor:
    """Features as transformers gives them: a tensor before version 5, in an object from then on."""
    found = getattr(answer, "pooler_output", answer)
    assert isinstance(found, Tensor)
    return found
