"""Autoencoders on disk: sae-lens' format, and readers of sparsify's and OpenAI's. No pickle is run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from safetensors.torch import save as save_tensors
from torch import Tensor

from erasure import files
from erasure.errors import ArtifactError, OptionError
from erasure.files import TensorInfo
from erasure.sae.model import Architecture, SAEConfig, SparseAutoencoder

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
PROMPTS_FILE = "prompts.txt"
SPARSIFY_FILE = "sae.safetensors"
OPENAI_CONFIG, OPENAI_FILE = "config.json", "state_dict.pth"
FILES = (CONFIG_FILE, WEIGHTS_FILE, PROMPTS_FILE)
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
PROMPTS_LIMIT = 256 * 2**20
"""Largest size in bytes of a file of prompts."""
Count = Annotated[int, Field(ge=0, le=2**31)]


class Metadata(BaseModel):
    """Metadata of an autoencoder; further fields are allowed."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, JsonValue]
    k: Count | None = None
    layer: Count | None = None
    """Block whose output it describes."""
    hook_name: Annotated[str, Field(max_length=500)] | None = None
    model_name: Annotated[str, Field(max_length=500)] | None = None
    fingerprint: dict[str, str] = {}
    """Fingerprint of the first matrix of the block."""


class SaeLens(BaseModel):
    """Contents of sae-lens' `cfg.json`."""

    model_config = ConfigDict(strict=True)
    architecture: Annotated[str, Field(max_length=100)]
    d_in: Count
    d_sae: Count
    k: Count | None = None
    apply_b_dec_to_input: bool = True
    rescale_acts_by_decoder_norm: bool | None = False
    normalize_activations: Annotated[str, Field(max_length=100)] | None = None
    metadata: Metadata | None = None


class Sparsify(BaseModel):
    """Contents of sparsify's `cfg.json`."""

    model_config = ConfigDict(strict=True)
    d_in: Count
    k: Count
    num_latents: Count = 0
    expansion_factor: Annotated[float, Field(ge=0, le=2**20)] = 0


class OpenAI(BaseModel):
    """Contents of `config.json` of OpenAI's autoencoders."""

    model_config = ConfigDict(strict=True)
    d_model: Count
    k: Count
    n_dirs: Count = 0
    n_dirs_local: Count | None = None


Config = TypeVar("Config", bound=BaseModel)


def save(
    sae: SparseAutoencoder, folder: str | Path, dtype: torch.dtype = torch.float32, prompts: Sequence[str] = ()
) -> Path:
    """Write `cfg.json` and `sae_weights.safetensors` as sae-lens does; each file appears whole or not at all.

    Args:
        sae: The autoencoder.
        folder: Folder to write to.
        dtype: Type of the saved tensors.
        prompts: Ordinary prompts of the model, kept as `prompts.txt`: strategies calibrate on them.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    target = files.at_home(folder)
    config = sae.config
    described = {
        "architecture": config.architecture, "d_in": config.d_in, "d_sae": config.d_sae, "k": config.k,
        "dtype": str(dtype).removeprefix("torch."), "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "rescale_acts_by_decoder_norm": False,
        "metadata": config.metadata,
    }  # fmt: skip
    tensors = {name: getattr(sae, name).detach().to("cpu", dtype).contiguous() for name in TENSORS}
    # The thresholds of a TopK dictionary are saved too, because slices of it use them to decide when a latent fires.
    tensors["threshold"] = sae.threshold.to("cpu", dtype)
    contents = {
        CONFIG_FILE: files.json_bytes(described, str(target / CONFIG_FILE)),
        WEIGHTS_FILE: save_tensors(tensors, metadata={"format": "pt"}),
    }
    if prompts:
        text = "\n".join(" ".join(prompt.split()) for prompt in prompts)
        contents[PROMPTS_FILE] = (text + "\n").encode(errors="replace")
    try:
        files.replace_files(target, contents, FILES)
    except ArtifactError as error:
        raise ArtifactError(f"{target} cannot be written ({error}): name another folder") from error
    return target


def load(folder: str | Path) -> SparseAutoencoder:
    """Read an autoencoder of any known layout.

    sae-lens (`cfg.json` with `sae_weights.safetensors`), sparsify and SAeUron (`cfg.json` with `sae.safetensors`), and
    OpenAI's (`config.json` with `state_dict.pth`), which sdxl-unbox, ItD and Concept Steerers write too.

    Raises:
        ArtifactError: The layout is unknown, a tensor is missing, or shapes do not fit.
    """
    source = files.at_home(folder)
    try:
        return files.steady(
            source, (*FILES, SPARSIFY_FILE, OPENAI_CONFIG, OPENAI_FILE), lambda found: _load(source, found)
        )
    except KeyError as error:
        raise ArtifactError(f"{source} lacks {error}: the autoencoder is damaged or of a newer layout") from error
    except OptionError as error:
        raise ArtifactError(f"{source} cannot be read as an autoencoder: {error}") from error


def _load(source: Path, found: Mapping[str, Path]) -> SparseAutoencoder:
    if WEIGHTS_FILE in found:
        return _sae_lens(_config(source, found, CONFIG_FILE, SaeLens), found[WEIGHTS_FILE])
    if SPARSIFY_FILE in found:
        return _sparsify(_config(source, found, CONFIG_FILE, Sparsify), found[SPARSIFY_FILE])
    if OPENAI_FILE in found:
        return _openai(_config(source, found, OPENAI_CONFIG, OpenAI), found[OPENAI_FILE])
    raise ArtifactError(
        f"{source} holds no autoencoder: expected {CONFIG_FILE} with {WEIGHTS_FILE} (sae-lens), {CONFIG_FILE} with "
        f"{SPARSIFY_FILE} (sparsify) or {OPENAI_CONFIG} with {OPENAI_FILE} (OpenAI)"
    )


def _config(source: Path, found: Mapping[str, Path], name: str, schema: type[Config]) -> Config:
    return files.read_json(found.get(name, source / name), schema)


def read_prompts(source: str | Path) -> list[str]:
    """Read prompts from a file, or those saved with the autoencoder in a folder, if any.

    A file has one on each line, or is CSV or TSV with a column `prompt`.

    Raises:
        OptionError: The file cannot be read or contains no prompt.
    """
    file = files.at_home(source)
    if file.is_dir():
        file /= PROMPTS_FILE
        if not file.is_file():
            return []
    found = files.read_texts(file, PROMPTS_LIMIT, error=OptionError)
    if not found:
        raise OptionError(f"prompts {file}: the file holds no prompt")
    return found


def _sae_lens(config: SaeLens, path: Path) -> SparseAutoencoder:
    if config.architecture not in ("topk", "jumprelu"):
        raise ArtifactError(f"architecture {config.architecture!r} is not supported; supported: topk, jumprelu")
    if not config.apply_b_dec_to_input or config.rescale_acts_by_decoder_norm:
        raise ArtifactError("apply_b_dec_to_input=false and rescale_acts_by_decoder_norm=true are not supported")
    if config.normalize_activations not in ("none", None):
        raise ArtifactError("normalize_activations must be folded into the weights before saving")
    about = {} if config.metadata is None else config.metadata.model_dump(exclude_unset=True)
    k = config.k or about.get("k") or min(32, config.d_sae)
    made = SAEConfig(
        d_in=config.d_in, d_sae=config.d_sae, k=k, architecture=cast(Architecture, config.architecture), metadata=about
    )
    needed = (*TENSORS, "threshold") if made.architecture == "jumprelu" else TENSORS
    return _build(made, _read(path, {name: name for name in (*TENSORS, "threshold")}, made, needed))


def _sparsify(config: Sparsify, path: Path) -> SparseAutoencoder:
    latents = config.num_latents or round(config.d_in * config.expansion_factor)
    made = SAEConfig(d_in=config.d_in, d_sae=latents, k=config.k, metadata={"format": "sparsify"})
    stored = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    return _build(made, _read(path, stored, made, TENSORS))


def _openai(config: OpenAI, path: Path) -> SparseAutoencoder:
    latents = config.n_dirs_local or config.n_dirs
    made = SAEConfig(d_in=config.d_model, d_sae=latents, k=config.k, metadata={"format": "openai"})
    stored = {"encoder.weight": "W_enc.T", "latent_bias": "b_enc", "decoder.weight": "W_dec.T", "pre_bias": "b_dec"}
    content = files.read_archive(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not all(map(_is_plain, content.values())):
        raise ArtifactError(f"{path} holds no tensors by name: the file is damaged; fetch or make it again")
    if sum(tensor.nbytes for tensor in content.values()) > path.stat().st_size:
        raise ArtifactError(f"{path} holds tensors larger than itself: the file is damaged; fetch or make it again")
    _check(
        path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in content.items()}, stored, made, TENSORS
    )
    return _build(made, _named(content, stored))


def _is_plain(value: object) -> bool:
    """Whether a value is a plain dense tensor in memory."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def _read(path: Path, stored: Mapping[str, str], config: SAEConfig, needed: Collection[str]) -> dict[str, Tensor]:
    """Read tensors of a safetensors file, renamed; shapes are checked before any tensor is allocated."""

    def check(infos: Mapping[str, TensorInfo]) -> None:
        _check(path, {name: (info.dtype, info.shape) for name, info in infos.items()}, stored, config, needed)

    return _named(files.read_tensors(path, check=check), stored)


def _named(tensors: Mapping[str, Tensor], stored: Mapping[str, str]) -> dict[str, Tensor]:
    """Rename tensors; a stored name `W_enc.T` stands for the transpose of `W_enc`."""
    return {
        own.removesuffix(".T"): tensors[name].T if own.endswith(".T") else tensors[name]
        for name, own in stored.items()
        if name in tensors
    }


def _check(
    path: Path, found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], stored: Mapping[str, str], config: SAEConfig,
    needed: Collection[str],
) -> None:  # fmt: skip
    """Raise `ArtifactError` unless all tensors are there with the shapes of the config."""
    wide, many = config.d_in, config.d_sae
    shapes = {"W_enc": (wide, many), "b_enc": (many,), "W_dec": (many, wide), "b_dec": (wide,), "threshold": (many,)}
    for name, own in stored.items():
        plain = own.removesuffix(".T")
        if name not in found:
            if plain in needed:
                raise ArtifactError(f"{path} lacks {name!r}: the autoencoder is damaged or of a newer layout")
            continue
        dtype, shape = found[name]
        expected = shapes[plain][::-1] if own.endswith(".T") else shapes[plain]
        if shape != expected or not dtype.is_floating_point:
            raise ArtifactError(
                f"{name} has shape {shape} and type {dtype}, the config says {expected}: weights and config do not "
                "belong together"
            )


def _build(config: SAEConfig, tensors: Mapping[str, Tensor]) -> SparseAutoencoder:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{name} holds NaN or infinity: the autoencoder is damaged")
    sae = SparseAutoencoder(config)
    sae.load_state_dict({**sae.state_dict(), **{name: tensor.float() for name, tensor in tensors.items()}})
    return sae.eval().requires_grad_(False)
