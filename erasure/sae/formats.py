"""Autoencoders on disk: sae-lens' format, and readers of sparsify's and OpenAI's. No pickle is run."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure.errors import ArtifactError, OptionError
from erasure.sae.model import SAEConfig, SparseAutoencoder

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
PROMPTS_FILE = "prompts.txt"
SPARSIFY_FILE = "sae.safetensors"
OPENAI_CONFIG, OPENAI_FILE = "config.json", "state_dict.pth"
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")


def save(
    sae: SparseAutoencoder, folder: str | Path, dtype: torch.dtype = torch.float32, prompts: Sequence[str] = ()
) -> Path:
    """Write `cfg.json` and `sae_weights.safetensors` as sae-lens does; each file appears whole or not at all.

    Args:
        sae: The autoencoder.
        folder: Where to.
        dtype: Of the tensors.
        prompts: Ordinary prompts of the model, kept as `prompts.txt`: strategies calibrate on them.

    Raises:
        ArtifactError: The folder cannot be written.
    """
    target = Path(folder)
    config = sae.config
    described = {
        "architecture": config.architecture, "d_in": config.d_in, "d_sae": config.d_sae, "k": config.k,
        "dtype": str(dtype).removeprefix("torch."), "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "rescale_acts_by_decoder_norm": False,
        "metadata": config.metadata,
    }  # fmt: skip
    tensors = {name: getattr(sae, name).detach().to("cpu", dtype).contiguous() for name in TENSORS}
    # A TopK dictionary keeps its thresholds too: a slice of it has no other way to know when a latent fires.
    tensors["threshold"] = sae.threshold.to("cpu", dtype)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".partial-") as partial:
            save_file(tensors, Path(partial) / WEIGHTS_FILE, metadata={"format": "pt"})
            (Path(partial) / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n")
            if prompts:
                text = "\n".join(" ".join(prompt.split()) for prompt in prompts)
                (Path(partial) / PROMPTS_FILE).write_text(text + "\n", encoding="utf-8")
            for name in (*((PROMPTS_FILE,) if prompts else ()), WEIGHTS_FILE, CONFIG_FILE):
                os.replace(Path(partial) / name, target / name)
    except OSError as error:
        raise ArtifactError(f"{target} cannot be written ({error.strerror}): name another folder") from error
    return target


def load(folder: str | Path) -> SparseAutoencoder:
    """Read an autoencoder of any known layout.

    sae-lens (`cfg.json` with `sae_weights.safetensors`), sparsify and SAeUron (`cfg.json` with `sae.safetensors`), and
    OpenAI's (`config.json` with `state_dict.pth`), which sdxl-unbox, ItD and Concept Steerers write too.

    Raises:
        ArtifactError: No such layout, a missing tensor, or shapes that do not fit.
    """
    source = Path(folder)
    try:
        if (source / WEIGHTS_FILE).is_file():
            return _sae_lens(_json(source / CONFIG_FILE), load_file(source / WEIGHTS_FILE))
        if (source / SPARSIFY_FILE).is_file():
            return _sparsify(_json(source / CONFIG_FILE), load_file(source / SPARSIFY_FILE))
        if (source / OPENAI_FILE).is_file():
            stored = torch.load(source / OPENAI_FILE, map_location="cpu", weights_only=True)
            return _openai(_json(source / OPENAI_CONFIG), stored.get("state_dict", stored))
    except pickle.UnpicklingError as error:
        raise ArtifactError(
            f"{source / OPENAI_FILE} holds more than tensors, which is refused: it could run code"
        ) from error
    except KeyError as error:
        raise ArtifactError(f"{source} lacks {error}: the autoencoder is damaged or of a newer layout") from error
    except (SafetensorError, RuntimeError, OptionError, OSError) as error:
        raise ArtifactError(f"{source} cannot be read as an autoencoder: {error}") from error
    raise ArtifactError(
        f"{source} holds no autoencoder: expected {CONFIG_FILE} with {WEIGHTS_FILE} (sae-lens), {CONFIG_FILE} with "
        f"{SPARSIFY_FILE} (sparsify) or {OPENAI_CONFIG} with {OPENAI_FILE} (OpenAI)"
    )


def read_prompts(source: str | Path) -> list[str]:
    """Prompts from a text file, one per line, or those that came with the autoencoder of a folder, if any.

    Raises:
        OptionError: The file cannot be read or holds none.
    """
    file = Path(source)
    if file.is_dir():
        file /= PROMPTS_FILE
        if not file.is_file():
            return []
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"prompts {file} cannot be read: {error}") from error
    if not found:
        raise OptionError(f"prompts {file}: the file holds no prompt")
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} is no JSON object")
    return found


def _sae_lens(config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseAutoencoder:
    architecture = config["architecture"]
    if architecture not in ("topk", "jumprelu"):
        raise ArtifactError(f"architecture {architecture!r} is not supported; supported: topk, jumprelu")
    if not config.get("apply_b_dec_to_input", True) or config.get("rescale_acts_by_decoder_norm"):
        raise ArtifactError("apply_b_dec_to_input=false and rescale_acts_by_decoder_norm=true are not supported")
    if config.get("normalize_activations", "none") not in ("none", None):
        raise ArtifactError("normalize_activations must be folded into the weights before saving")
    d_sae = int(config["d_sae"])
    k = int(config.get("k") or config.get("metadata", {}).get("k") or min(32, d_sae))
    made = SAEConfig(
        d_in=int(config["d_in"]), d_sae=d_sae, k=k, architecture=architecture, metadata=config.get("metadata") or {}
    )
    wanted = {name: tensors[name] for name in TENSORS}
    threshold = tensors["threshold"] if architecture == "jumprelu" else tensors.get("threshold")
    return _build(made, wanted, threshold)


def _sparsify(config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseAutoencoder:
    d_in = int(config["d_in"])
    latents = int(config.get("num_latents") or d_in * int(config["expansion_factor"]))
    made = SAEConfig(d_in=d_in, d_sae=latents, k=int(config["k"]), metadata={"format": "sparsify"})
    found = {
        "W_enc": tensors["encoder.weight"].T, "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"], "b_dec": tensors["b_dec"],
    }  # fmt: skip
    return _build(made, found, None)


def _openai(config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseAutoencoder:
    latents = int(config.get("n_dirs_local") or config["n_dirs"])
    made = SAEConfig(d_in=int(config["d_model"]), d_sae=latents, k=int(config["k"]), metadata={"format": "openai"})
    found = {
        "W_enc": tensors["encoder.weight"].T, "b_enc": tensors["latent_bias"],
        "W_dec": tensors["decoder.weight"].T, "b_dec": tensors["pre_bias"],
    }  # fmt: skip
    return _build(made, found, None)


def _build(config: SAEConfig, tensors: dict[str, Tensor], threshold: Tensor | None) -> SparseAutoencoder:
    sae = SparseAutoencoder(config)
    every = tensors if threshold is None else {**tensors, "threshold": threshold}
    state = sae.state_dict()
    for name, tensor in every.items():
        if tensor.shape != state[name].shape:
            raise ArtifactError(
                f"{name} has shape {tuple(tensor.shape)}, the config says {tuple(state[name].shape)}: "
                "weights and config do not belong together"
            )
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{name} holds NaN or infinity: the autoencoder is damaged")
        state[name] = tensor.float().contiguous()
    sae.load_state_dict(state)
    return sae.eval().requires_grad_(False)
