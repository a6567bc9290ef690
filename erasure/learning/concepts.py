"""Concepts learned from pictures, as a small folder: a JSON config and safetensors. No pickle is read or written."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import DiffusionPipeline
from pydantic import Field, JsonValue
from safetensors.torch import save
from torch import Tensor

from erasure import files
from erasure.attach import ErasureManager
from erasure.backbones import Backbone, backbone_for
from erasure.carriers.edits import Edits
from erasure.carriers.weights import delta_of, fingerprint, same_base
from erasure.errors import ArtifactError, AttachError, ConceptError, UnsupportedModelError, WrongBaseError
from erasure.interop import learned, paths
from erasure.interop.pipelines import components_of
from erasure.learning.tokens import check_names, put_in, reading_towers
from erasure.leases import Lease
from erasure.schema import STRICT, Base, Encoder, Name, Number, Sha256, Text

CONFIG_FILE = "concepts_config.json"
VECTORS_FILE = "embeddings.safetensors"
WEIGHTS_FILE = "weights.safetensors"
FILES = (CONFIG_FILE, VECTORS_FILE, WEIGHTS_FILE)
FORMAT_VERSION = 1
BYTES_LIMIT = 2 * 2**30
"""Largest size in bytes of a file of tensors."""
SAMPLED = 256
"""Number of values of each tensor in a model's fingerprint."""
BEFORE = "_erasure_concepts"
"""Attribute of a pipeline with its loaded concepts and the former values of its weights."""


@dataclass
class ConceptsConfig:
    """Description of learned concepts: everything but their tensors."""

    __pydantic_config__ = STRICT

    tokens: Annotated[list[Name], Field(min_length=1, max_length=100)]
    """The learned tokens."""
    family: Name
    """Model family, as `Backbone.family`."""
    base: dict[str, Any]
    """`model`, `revision`, and `parts`: fingerprint of each network of the model that they were learned with."""
    method: Name = "attencraft"
    """Name of the method by which they were learned."""
    options: Annotated[dict[Name, object], Field(max_length=1000)] = field(default_factory=dict)
    """Options of the method."""
    like: dict[Name, Text] = field(default_factory=dict)
    """Words from which each token's vectors started."""
    pictures: Annotated[list[Sha256], Field(max_length=10_000)] = field(default_factory=list)
    """sha256 of the pixels of every picture."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    """Seed of the training."""
    cost: Annotated[dict[Name, Number], Field(max_length=1000)] = field(default_factory=dict)
    """Cost: `seconds`, and further figures."""
    versions: Annotated[dict[Name, Name], Field(max_length=100)] = field(default_factory=dict)
    """Versions of the libraries of the training."""
    format_version: int = FORMAT_VERSION

    @classmethod
    def from_dict(cls, data: JsonValue, where: str) -> ConceptsConfig:
        """Validate and read plain data.

        Raises:
            ArtifactError: The format is newer, a key is missing or unknown, or a value is invalid.
        """
        version = data.get("format_version") if isinstance(data, dict) else None
        if type(version) is int and version > FORMAT_VERSION:
            raise ArtifactError(
                f"{where} has format version {version}, this package reads up to {FORMAT_VERSION}: pip install "
                "--upgrade erasure-diffusers"
            )
        config: ConceptsConfig = files.validated(data, cls, where)
        files.validated(config.base, _Base, f"{where}: base")
        files.validated(config.options, dict[str, JsonValue], f"{where}: options")
        return config


class _Base(Base, total=False):
    """The model with which concepts were learned."""

    parts: dict[Encoder | Name, dict[str, str]]


class LearnedConcepts:
    """New tokens for the contents of pictures: their vectors, and weights of the denoiser if those were trained.

    Args:
        config: Description of the concepts.
        vectors: Vectors by component and token, `(count, dim)` each.
        edits: Edits of the denoiser; empty where only vectors were learned.
    """

    def __init__(self, config: ConceptsConfig, vectors: Mapping[str, Mapping[str, Tensor]], edits: Edits) -> None:
        self.config, self.vectors, self.edits = config, vectors, edits

    def __repr__(self) -> str:
        """Tokens and size."""
        return f"LearnedConcepts({', '.join(self.tokens)}, {self.size_bytes / 1e3:.0f} kB)"

    @property
    def tokens(self) -> list[str]:
        """The learned tokens."""
        return list(self.config.tokens)

    @property
    def size_bytes(self) -> int:
        """Bytes of the files that `save` writes."""
        return sum(map(len, self._contents().values()))

    def _contents(self) -> dict[str, bytes]:
        rows = {
            f"{component}/{name}": part.contiguous()
            for component, tokens in self.vectors.items()
            for name, part in zip(self._keys(tokens), tokens.values(), strict=True)
        }
        contents = {
            CONFIG_FILE: files.json_bytes(dataclasses.asdict(self.config), CONFIG_FILE), VECTORS_FILE: save(rows)
        }  # fmt: skip
        if len(self.edits):
            contents[WEIGHTS_FILE] = save(self.edits.delta_state_dict() | self.edits.lora_state_dict(kohya=False))
        return contents

    def _keys(self, tokens: Mapping[str, Tensor]) -> list[str]:
        """Name the vectors in a file by the tokens' indices, because a token may have any characters."""
        return [str(self.config.tokens.index(name)) for name in tokens]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the concepts to a folder, atomically.

        Raises:
            ArtifactError: The folder is not empty, or cannot be written.
        """
        folder = files.at_home(folder)
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            if not folder.is_dir() or CONFIG_FILE not in files.settled(folder, FILES):
                raise ArtifactError(f"{folder} holds something that is no learned concept: choose another folder")
            if not overwrite:
                raise ArtifactError(f"{folder} is not empty: choose another folder, or overwrite (--overwrite)")
        files.replace_files(folder, self._contents(), FILES)
        return folder

    @classmethod
    def read(cls, folder: str | Path) -> LearnedConcepts:
        """Read concepts from a folder.

        Raises:
            ArtifactError: The folder is missing, damaged, has unknown keys, or needs a newer version of this package.
        """
        folder = files.at_home(folder)
        if not folder.is_dir():
            raise ArtifactError(
                f"{folder} is no folder of learned concepts but {files.advice(folder) or 'nothing: check the path'}"
            )
        return files.steady(folder, FILES, lambda there: cls._read(folder, there))

    @classmethod
    def _read(cls, folder: Path, there: Mapping[str, Path]) -> LearnedConcepts:
        if missing := [name for name in (CONFIG_FILE, VECTORS_FILE) if name not in there]:
            said = f"; it is {advice}" if (advice := files.advice(folder)) else ""
            raise ArtifactError(f"{folder} holds no learned concepts: {missing[0]} is missing{said}")
        where = str(there[CONFIG_FILE])
        config = ConceptsConfig.from_dict(files.read_json(there[CONFIG_FILE], JsonValue), where)
        floats = (torch.float32, torch.float16, torch.bfloat16)
        rows = files.read_tensors(there[VECTORS_FILE], limit_bytes=BYTES_LIMIT, allowed_dtypes=floats)
        components = sorted({key.split("/")[0] for key in rows})
        wanted = {f"{component}/{number}" for component in components for number in range(len(config.tokens))}
        sound = all(part.ndim == 2 and part.numel() and part.isfinite().all() for part in rows.values())
        if set(rows) != wanted or not components or not sound or not set(components) <= set(config.base["parts"]):
            raise ArtifactError(
                f"{there[VECTORS_FILE]} does not go with {CONFIG_FILE}: it holds {files.shown(sorted(rows))} for "
                f"{files.shown(config.tokens)}, or values that are no vectors; learn the concepts again"
            )
        vectors = {
            component: {name: rows[f"{component}/{number}"] for number, name in enumerate(config.tokens)}
            for component in components
        }
        edits = Edits()
        if WEIGHTS_FILE in there:
            tensors = files.read_tensors(there[WEIGHTS_FILE], limit_bytes=BYTES_LIMIT, allowed_dtypes=floats)
            lora = {key: part for key, part in tensors.items() if ".lora_" in key}
            edits = Edits.from_state_dicts({key: part for key, part in tensors.items() if key not in lora}, lora)
            edits.check()
        return cls(config, vectors, edits)

    def load_into(self, pipe: DiffusionPipeline) -> None:
        """Load the tokens into a pipeline, and write trained weights into the denoiser until `unload` is called.

        Raises:
            WrongBaseError: The concepts were learned with another model.
            AttachError: An erasure is attached, which was made for the model without the concepts.
            ConceptError: The pipeline has a token of this name already.
            UnsupportedModelError: The pipeline cannot load tokens, or its weights are quantised or offloaded.
        """
        with Lease(components_of(pipe).values(), exclusive=True):
            self._load_into(pipe)

    def _load_into(self, pipe: DiffusionPipeline) -> None:
        backbone = backbone_for(pipe)
        if attached := list(ErasureManager(pipe).erasures):
            raise AttachError(
                f"the erasure {attached[0]!r} is attached: concepts are loaded ahead of erasures. unload_erasures(), "
                "load the concepts, then load the erasures again"
            )
        self.check_base(backbone)
        check_names(self.tokens, reading_towers(backbone))
        written = self._written(pipe)
        before = {key: paths.parameter(getattr(pipe, key[0]), key[1]).detach().cpu().clone() for key in written}
        try:
            put_in(pipe, self.vectors)
            _write(pipe, written)
            vars(pipe).setdefault(BEFORE, []).append((self, before))
        except BaseException:
            self._take_off(pipe, before)
            raise

    def _take_off(self, pipe: DiffusionPipeline, before: Mapping[tuple[str, str], Tensor]) -> None:
        """Restore the weights, and remove the loaded tokens."""
        _write(pipe, before)
        for component in self.vectors:
            for name in reversed(self.tokens):
                learned.remove(pipe, component, name)

    def _written(self, pipe: DiffusionPipeline) -> dict[tuple[str, str], Tensor]:
        """Get the current values of the trained weights, by component and path."""
        found = {}
        for component in self.edits.components:
            for path, edit in self.edits.of(component).items():
                parameter = paths.parameter(getattr(pipe, component), path)
                if not paths.is_plain(parameter):
                    raise UnsupportedModelError(
                        f"{component}/{path} is quantised or offloaded, and these concepts change it: "
                        "load the plain model, or learn vectors alone (--trained vectors)"
                    )
                base = parameter.detach().cpu().float()
                found[component, path] = (base + delta_of(edit, base)).to(parameter.dtype)
        return found

    def check_base(self, backbone: Backbone) -> None:
        """Refuse a model other than the one with which the concepts were learned.

        Raises:
            WrongBaseError: The model is of another family, or one of its networks has other weights.
        """
        config, parts = self.config, self.config.base["parts"]
        named = config.base.get("model") or "a model without a name"
        learned_with = f"the concepts {', '.join(self.tokens)} were learned with {named} ({config.family})"
        if config.family != backbone.family:
            raise WrongBaseError(
                f"{learned_with}, and this is a model of {backbone.family}: load that model, or learn anew"
            )
        here = networks(backbone)
        for name, digests in parts.items():
            if name not in here or not same_base(sampled(here[name]), digests):
                others = [", ".join(one.tokens) for one, before in vars(backbone.pipe).get(BEFORE, ()) if before]
                why = f"; {others[0]} changed it when they were loaded: learn all of them at once" if others else ""
                raise WrongBaseError(
                    f"{learned_with}, whose {name} is another than this one{why or ': load it, or learn anew'}"
                )


def networks(backbone: Backbone) -> dict[str, torch.nn.Module]:
    """The networks that learned concepts depend on: the text encoders and the denoiser."""
    return {
        **{tower.component: tower.module for tower in backbone.towers},
        backbone.denoiser_component: backbone.denoiser,
    }


def sampled(network: torch.nn.Module) -> Tensor:
    """Sample evenly spaced values of every parameter, without token tables, which learned tokens extend."""
    parts = []
    for path in sorted(paths.canonical_parameters(network)):
        if "token_embedding" not in path:
            flat = paths.parameter(network, path).detach().flatten()
            parts.append(flat[:: max(1, flat.numel() // SAMPLED)].cpu())
    return torch.cat(parts)


def base_of(backbone: Backbone, model: str, revision: str | None) -> dict[str, Any]:
    """Describe the base model for a config."""
    parts = {name: fingerprint(sampled(network)) for name, network in networks(backbone).items()}
    return {"model": Path(model).name if os.path.isabs(model) else model, "revision": revision, "parts": parts}


def loaded(pipe: DiffusionPipeline) -> list[LearnedConcepts]:
    """List the learned concepts that `load_into` has loaded into a pipeline, in order."""
    return [concepts for concepts, _ in vars(pipe).get(BEFORE, ())]


def unload(pipe: DiffusionPipeline) -> None:
    """Remove all learned concepts: tokens and weights are then as before, bit for bit.

    Raises:
        AttachError: An attached erasure was made for the model with these concepts.
        ConceptError: No concepts are loaded.
    """
    if attached := list(ErasureManager(pipe).erasures):
        raise AttachError(f"the erasure {attached[0]!r} is attached: unload_erasures() first, then the concepts")
    if not (held := vars(pipe).get(BEFORE)):
        raise ConceptError("no learned concept is loaded into this pipeline: load_concepts(FOLDER) does that")
    with Lease(components_of(pipe).values(), exclusive=True):
        while held:
            concepts, before = held[-1]
            # An interrupted removal can be repeated, because records are dropped only after it.
            concepts._take_off(pipe, before)
            held.pop()
    del vars(pipe)[BEFORE]


@torch.no_grad()
def _write(pipe: DiffusionPipeline, values: Mapping[tuple[str, str], Tensor]) -> None:
    """Write values into parameters, by component and path."""
    for (component, path), value in values.items():
        paths.parameter(getattr(pipe, component), path).copy_(value)
