"""An erasure as a small folder: a JSON config, safetensors and a model card. No pickle is ever read or written."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from erasure.cards import model_card
from erasure.carriers.edits import Edits, LowRank
from erasure.concept import Concept
from erasure.errors import ArtifactError, ConceptError, DivergenceError

FORMAT_VERSION = 1
CONFIG_FILE = "erasure_config.json"
DELTA_FILE = "erasure.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "README.md"


@dataclass
class ErasureConfig:
    """Everything about an erasure but its tensors."""

    strategy: str
    """Name of the strategy that made it."""
    concepts: list[dict[str, Any]]
    """What it erases, as `Concept.to_dict`."""
    family: str
    """Model family, as `Backbone.family`."""
    strategy_config: dict[str, Any] = field(default_factory=dict)
    """The strategy's options."""
    base: dict[str, Any] = field(default_factory=dict)
    """`model`, `revision`, and `tensors`: sha256 by dtype of every base tensor that it changes."""
    carriers: list[str] = field(default_factory=list)
    """Where it lives: `weights`, `activations`, `attention`, `guidance`."""
    protects: str = ""
    """Threat model: `hosted pipeline` or `released weights`."""
    versions: dict[str, str] = field(default_factory=dict)
    """Libraries that made it."""
    seed: int = 0
    """Seed it was made with."""
    cost: dict[str, float] = field(default_factory=dict)
    """`seconds` it took."""
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By concept: rates and ROC curve of its gate, and of a linear probe, on prompts that calibrated them."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    """Summary of a measurement, empty when never measured."""
    format_version: int = FORMAT_VERSION
    """Version of the folder's layout."""

    @classmethod
    def from_dict(cls, data: Any, where: str) -> ErasureConfig:
        """Validate and read plain data.

        Raises:
            ArtifactError: A newer format, a missing key, an unknown key, or something else than a config.
        """
        found = data.get("format_version") if isinstance(data, dict) else None
        if not isinstance(found, int):
            raise ArtifactError(f"{where}: key 'format_version' is missing or no whole number; is this an erasure?")
        if found > FORMAT_VERSION:
            raise ArtifactError(
                f"{where} has format version {found}, this erasure package reads up to {FORMAT_VERSION}: "
                "pip install --upgrade erasure-diffusers"
            )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        missing = [key for key in ("strategy", "concepts", "family", "base", "carriers") if key not in data]
        unknown = sorted(set(data) - set(fields))
        if missing:
            raise ArtifactError(f"{where} lacks {missing}: the file is damaged or no erasure config; make it again")
        if unknown:
            raise ArtifactError(f"{where} has unknown keys {unknown}; allowed: {sorted(fields)}")
        config = cls(**data)
        try:
            named = [Concept.from_dict(concept).target for concept in config.concepts]
            readable = bool(named) and isinstance(config.base.get("tensors", {}), dict)
        except (AttributeError, TypeError, ConceptError):
            readable = False
        if not readable:
            raise ArtifactError(f"{where}: 'concepts' or 'base' cannot be read: the file is damaged; make it again")
        return config


def library_versions() -> dict[str, str]:
    """Versions of what an erasure depends on."""
    from erasure import __version__

    versions = {"erasure-diffusers": __version__}
    for name in ("torch", "diffusers", "transformers", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def default_name(concepts: Sequence[Concept], strategy: str) -> str:
    """What an erasure is called when nobody says otherwise."""
    targets = [concept.target for concept in concepts]
    label = "-".join(targets) if len(targets) <= 3 else f"{targets[0]}-and-{len(targets) - 1}-more"
    return re.sub(r"[^a-z0-9]+", "-", f"{label}-{strategy}".lower()).strip("-")


class Erasure:
    """The result of a strategy: a config and weight edits.

    Args:
        config: What it is.
        edits: The tensors.
    """

    def __init__(self, config: ErasureConfig, edits: Edits) -> None:
        self.config, self.edits = config, edits

    def __repr__(self) -> str:
        """Name and size."""
        return f"Erasure({self.name!r}, {len(self.edits)} tensors, {self.size_bytes / 1e6:.2f} MB)"

    @property
    def low_rank(self) -> dict[str, LowRank]:
        """Low-rank edits by `component/module.path`."""
        return self.edits.low_rank

    @property
    def deltas(self) -> dict[str, Tensor]:
        """Full-rank edits by `component/module.path.parameter`."""
        return self.edits.deltas

    @property
    def concepts(self) -> list[Concept]:
        """What it erases."""
        return [Concept.from_dict(data) for data in self.config.concepts]

    @property
    def name(self) -> str:
        """Default name: concepts and strategy, for instance `van-gogh-hirm`."""
        return default_name(self.concepts, self.config.strategy)

    @property
    def components(self) -> list[str]:
        """Pipeline components that it changes."""
        return self.edits.components

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the files that `save` writes."""
        return sum(len(content) for content in self._contents().values())

    def _contents(self) -> dict[str, bytes]:
        contents = {
            CONFIG_FILE: (json.dumps(dataclasses.asdict(self.config), indent=2) + "\n").encode(),
            CARD_FILE: self.card().encode(),
        }
        if others := self.edits.delta_state_dict():
            contents[DELTA_FILE] = save(others)
        if self.low_rank:
            contents[LORA_FILE] = save(self.edits.lora_state_dict(), metadata={"format": "pt"})
        return contents

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the erasure to a folder, atomically: it is there whole or not at all.

        Args:
            folder: Where to; must not exist or be empty unless `overwrite`.
            overwrite: Replace an erasure that is there.

        Raises:
            ArtifactError: The folder holds something, or cannot be written.
            DivergenceError: A tensor holds NaN or infinity.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            if not overwrite:
                raise ArtifactError(f"{folder} is not empty: choose another folder, or overwrite (--overwrite)")
            if not (folder / CONFIG_FILE).is_file():
                raise ArtifactError(
                    f"{folder} holds something that is no erasure and is left alone: choose another folder"
                )
        self.edits.check_finite()
        contents = self._contents()
        temporary: Path | None = None
        retired: Path | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
            for name, content in contents.items():
                (temporary / name).write_bytes(content)
            temporary.chmod(0o755)
            if folder.exists():
                aside = temporary.with_name(temporary.name + ".old")
                os.replace(folder, aside)
                retired = aside
            os.replace(temporary, folder)
        except OSError as error:
            raise ArtifactError(f"cannot write the erasure to {folder}: {error.strerror or error}") from error
        finally:
            if retired is not None:
                if folder.exists():
                    shutil.rmtree(retired, ignore_errors=True)
                else:
                    os.replace(retired, folder)
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None, token: str | None = None) -> Erasure:
        """Read an erasure from a folder or a repository of the Hugging Face Hub.

        Raises:
            ArtifactError: It is missing, damaged, has unknown keys, or needs a newer version of this package.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = _download(str(source), revision, token)
        path = folder / CONFIG_FILE
        if not path.is_file():
            present = ", ".join(sorted(item.name for item in folder.iterdir())[:6]) or "nothing"
            raise ArtifactError(f"{folder} is no erasure: {CONFIG_FILE} is missing (found: {present})")
        try:
            config = ErasureConfig.from_dict(json.loads(path.read_text()), str(path))
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise ArtifactError(
                f"{path} cannot be read as JSON ({error}): the file is damaged; fetch or make it again"
            ) from error
        deltas = _read_tensors(folder / DELTA_FILE) if (folder / DELTA_FILE).is_file() else {}
        lora = _read_tensors(folder / LORA_FILE) if (folder / LORA_FILE).is_file() else {}
        edits = Edits.from_state_dicts(deltas, lora)
        expected, found = set(config.base.get("tensors", {})), set(edits.parameters)
        if sorted(config.carriers) != sorted(edits.carriers):
            raise ArtifactError(
                f"{folder}: the config names the carriers {config.carriers}, the tensors are {edits.carriers}: "
                "files of different erasures are mixed or one is missing; fetch or make it again"
            )
        # Feature edits know their base by the parameters of their block.
        below = {block: {key for key in expected if key.startswith(block + ".")} for block in edits.features}
        expected -= set().union(*below.values()) - found
        found |= {block for block, known in below.items() if not known}
        if expected != found:
            lost, extra = sorted(expected - found), sorted(found - expected)
            raise ArtifactError(
                f"{folder}: tensors and config disagree (missing {lost[:3]}, unknown {extra[:3]}): "
                "files of different erasures are mixed or one is damaged; fetch or make it again"
            )
        try:
            edits.check_finite()
        except DivergenceError as error:
            raise ArtifactError(f"{folder}: {error}") from error
        return cls(config, edits)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload to the Hugging Face Hub and give the address of the commit."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save(Path(scratch) / "erasure")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"Upload {self.name}"))

    def card(self) -> str:
        """The model card."""
        lora_file = LORA_FILE if self.low_rank and not self.deltas else None
        return model_card(self.name, self.config, self.concepts, lora_file)


def _download(repo_id: str, revision: str | None, token: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [CONFIG_FILE, DELTA_FILE, LORA_FILE, CARD_FILE]
    try:
        return Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    except HFValidationError as error:
        raise ArtifactError(f"{repo_id!r} is neither a folder nor the name of a Hub repository") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{repo_id!r} is no folder here, and the Hub does not give it: {reason}") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}): the file is damaged; fetch or make it again") from error


__all__ = ["CONFIG_FILE", "DELTA_FILE", "LORA_FILE", "Erasure", "ErasureConfig", "library_versions"]
