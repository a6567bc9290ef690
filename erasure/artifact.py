"""An erasure as a small folder: a JSON config, safetensors and a model card. No pickle is ever read or written."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors.torch import save
from torch import Tensor

from erasure import files, hub
from erasure.backbones import reads_kohya_names
from erasure.cards import model_card
from erasure.carriers.edits import Edits, LowRank
from erasure.carriers.lora_names import is_read_by_stock
from erasure.concept import Concept
from erasure.errors import ArtifactError, DivergenceError
from erasure.hub import Uploaded
from erasure.schema import ErasureConfig

CONFIG_FILE = "erasure_config.json"
DELTA_FILE = "erasure.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"
CARD_FILE = "README.md"
CONFIG_LIMIT = 4 * 2**20
"""Largest size of a config in bytes; the fingerprints of a large model's tensors need one or two MB."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64)
"""Allowed types of an erasure's tensors."""
FILES = (CONFIG_FILE, DELTA_FILE, LORA_FILE, CARD_FILE)
TENSORS_SIZE = 64 * 2**30
"""Largest size in bytes of a file of tensors."""
LONGEST_LABEL = 100
"""Largest number of characters of a default name before the strategy's name; the name becomes a file name."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}")
"""Pattern of a Hub repository, `owner/name`."""


def default_name(concepts: Sequence[Concept], strategy: str) -> str:
    """Name an erasure after its concepts and strategy, for instance `van-gogh-hirm`; see `files.slug`."""
    targets = [concept.target for concept in concepts]
    label = "-".join(targets) if len(targets) <= 3 else f"{targets[0]}-and-{len(targets) - 1}-more"
    method = re.sub(r"[^a-z0-9]+", "-", strategy.lower()).strip("-")
    return "-".join(part for part in (files.slug(label, LONGEST_LABEL), method) if part)


class Erasure:
    """The result of a strategy: a config and weight edits.

    Args:
        config: Description of the erasure.
        edits: Edits with their tensors.
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
        """Erased concepts."""
        return list(self._concepts)

    @cached_property
    def _concepts(self) -> tuple[Concept, ...]:
        return tuple(Concept.from_dict(data) for data in self.config.concepts)

    @property
    def name(self) -> str:
        """Default name: concepts and strategy, for instance `van-gogh-hirm`."""
        return default_name(self.concepts, self.config.strategy)

    @property
    def components(self) -> list[str]:
        """Pipeline components that the erasure changes."""
        return self.edits.components

    @property
    def fingerprint(self) -> str:
        """sha256 of the tensors and of the options of the strategy, 16 hex digits."""
        found = hashlib.sha256(files.digest([self.config.strategy, self.config.strategy_config]).encode())
        tensors = self.edits.delta_state_dict() | self.edits.lora_state_dict()
        for key, tensor in sorted(tensors.items()):
            found.update(key.encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()[:16]

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of the files that `save` writes."""
        return sum(len(content) for content in self._contents().values())

    def _contents(self) -> dict[str, bytes]:
        contents = {
            CONFIG_FILE: files.json_bytes(dataclasses.asdict(self.config), CONFIG_FILE),
            CARD_FILE: self.card().encode(),
        }
        if others := self.edits.delta_state_dict():
            contents[DELTA_FILE] = save(_apart(others))
        if factors := self.edits.lora_state_dict(kohya=reads_kohya_names(self.config.family)):
            contents[LORA_FILE] = save(_apart(factors), metadata={"format": "pt"})
        return contents

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the erasure to a folder, atomically: it is there complete or not at all.

        Args:
            folder: Folder to write to, which must be empty or not exist unless `overwrite`. A link to a folder stays a
                link.
            overwrite: Replace an erasure in the folder. Other files in the folder stay.

        Raises:
            ArtifactError: The folder is not empty or cannot be written; or the erasure is not valid.
            DivergenceError: A tensor has NaN or infinity.
        """
        folder = files.at_home(folder)
        if os.path.exists(folder) and (not os.path.isdir(folder) or _listed(folder)):
            if not overwrite:
                raise ArtifactError(f"{folder} is not empty: choose another folder, or overwrite (--overwrite)")
            if not os.path.isdir(folder) or CONFIG_FILE not in files.settled(folder, FILES):
                raise ArtifactError(
                    f"{folder} holds something that is no erasure and is left alone: choose another folder"
                )
        self.edits.check()
        ErasureConfig.from_dict(dataclasses.asdict(self.config), "the config of the erasure")
        contents = self._contents()
        if len(contents[CONFIG_FILE]) > CONFIG_LIMIT:
            raise ArtifactError(
                f"cannot write {folder}: its config would have {len(contents[CONFIG_FILE]):,} bytes, at most "
                f"{CONFIG_LIMIT:,} can be read; make several erasures of fewer concepts each"
            )
        files.replace_files(folder, contents, FILES)
        return folder

    @classmethod
    def load(cls, source: str | Path, *, revision: str | None = None, token: str | None = None) -> Erasure:
        """Read an erasure from a folder or a repository of the Hugging Face Hub.

        A source is looked for on the Hub only if it has the form `owner/name` and `owner` is not a local folder.

        Raises:
            ArtifactError: The erasure is missing, damaged, has unknown keys, or needs a newer version of this package.
        """
        if not is_local(source):
            return cls.read(hub.download(str(source), FILES, revision=revision, token=token))
        folder = files.at_home(source)
        if not os.path.lexists(folder):
            raise ArtifactError(
                f"{files.shown(str(source), 200)} is neither a folder nor the name of a Hub repository: check "
                "the path, since only a text owner/name is looked for on the Hub, and only if there is no OWNER here"
            )
        return cls.read(folder)

    @classmethod
    def read(cls, folder: str | Path) -> Erasure:
        """Read an erasure from a local folder; nothing is downloaded.

        Raises:
            ArtifactError: The erasure is missing, damaged, has unknown keys, or needs a newer version of this package.
        """
        folder = files.at_home(folder)
        if not os.path.isdir(folder):
            said = files.advice(folder)
            raise ArtifactError(
                f"{folder} is no erasure but {said}" if said else f"there is no erasure at {folder}: check the path"
            )
        return files.steady(folder, FILES, lambda paths: cls._read(folder, paths))

    @classmethod
    def _read(cls, folder: Path, paths: Mapping[str, Path]) -> Erasure:
        if CONFIG_FILE not in paths:
            present = ", ".join(files.shown(name)[1:-1] for name in _listed(folder)[:6]) or "nothing"
            said = f"; it is {advice}" if (advice := files.advice(folder)) else ""
            raise ArtifactError(f"{folder} is no erasure: {CONFIG_FILE} is missing (found: {present}){said}")
        path = paths[CONFIG_FILE]
        data: JsonValue = files.read_json(path, JsonValue, CONFIG_LIMIT)
        config = ErasureConfig.from_dict(data, str(path))
        parts = [paths[name] for name in (DELTA_FILE, LORA_FILE) if name in paths]
        # Names, types and shapes are checked first, so that nothing is allocated for an invalid file.
        shapes = {path.name: files.tensor_infos(path, allowed_dtypes=DTYPES) for path in parts}
        layout = {
            name: {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in infos.items()}
            for name, infos in shapes.items()
        }
        _check_together(folder, config, Edits.from_state_dicts(layout.get(DELTA_FILE, {}), layout.get(LORA_FILE, {})))
        tensors = {path.name: files.read_tensors(path, allowed_dtypes=DTYPES) for path in parts}
        edits = Edits.from_state_dicts(tensors.get(DELTA_FILE, {}), tensors.get(LORA_FILE, {}))
        try:
            edits.check()
        except (ArtifactError, DivergenceError) as error:
            raise ArtifactError(f"{folder}: {error}") from error
        return cls(config, edits)

    @classmethod
    def record_evaluation(cls, folder: str | Path, figures: Mapping[str, object]) -> bool:
        """Write the results of a measurement into the config of a saved erasure, and into its card.

        Files of tensors do not change. A card that was edited by hand is left alone.

        Args:
            folder: Folder of the erasure.
            figures: New value of `ErasureConfig.evaluation`.

        Returns:
            Whether the card was also written.

        Raises:
            ArtifactError: The folder is not an erasure, the figures are not plain data, or the folder cannot be
                written.
        """
        folder = files.at_home(folder)
        made = cls.read(folder)
        card = made.card()
        made.config.evaluation = dict(figures)
        ErasureConfig.from_dict(dataclasses.asdict(made.config), "the config of the erasure")
        contents = files.steady(folder, FILES, lambda paths: {n: bytes(_whole(path)) for n, path in paths.items()})
        contents[CONFIG_FILE] = files.json_bytes(dataclasses.asdict(made.config), CONFIG_FILE)
        own_card = contents.get(CARD_FILE, card.encode()) == card.encode()
        if own_card:
            contents[CARD_FILE] = made.card().encode()
        files.replace_files(folder, contents, FILES)
        return own_card

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        collection: str | None = None,
        card: str | None = None,
    ) -> Uploaded:
        """Upload the erasure to the Hugging Face Hub, with a card that lists its measurements.

        Args:
            repo_id: Repository `owner/name`, which is created if it does not exist.
            private: Whether a new repository is private.
            token: Access token of the Hub; that of the logged-in user when left out.
            revision: Branch, which is created if it does not exist; the main branch when left out.
            collection: Slug of a collection to which the repository is added.
            card: Text of the card, instead of the generated one.

        Raises:
            ArtifactError: The Hub cannot be reached, or refuses the upload.
        """
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save(Path(scratch) / "erasure")
            if card is not None:
                files.write_text(folder / CARD_FILE, card)
            return hub.upload(
                folder, repo_id, message=f"Upload {self.name}", private=private, token=token, revision=revision,
                collection=collection,
            )  # fmt: skip

    @classmethod
    def pull(
        cls, repo_id: str, folder: str | Path, *, revision: str | None = None, token: str | None = None
    ) -> tuple[Erasure, str]:
        """Download an erasure from the Hugging Face Hub into a folder, byte for byte; give it and its commit.

        Raises:
            ArtifactError: See `load`; or the folder is not empty, and nothing is written.
        """
        fetched = hub.download(repo_id, FILES, revision=revision, token=token)
        made = cls.read(fetched)
        with files.new_folder(files.at_home(folder)) as temporary:
            for name in FILES:
                if (fetched / name).is_file():
                    (temporary / name).write_bytes(_whole(fetched / name))
        return made, fetched.name

    def card(self) -> str:
        """Write the model card."""
        whole = not self.edits.delta_state_dict()
        unread = sorted({key.split("/")[0] for key in self.low_rank if not is_read_by_stock(key)})
        return model_card(self.name, self.config, self.concepts, LORA_FILE if whole else None, unread)


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which safetensors cannot write."""
    known: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in known else tensor
        known.add(place)
    return apart


def _listed(folder: Path) -> list[str]:
    """List the names in a folder."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be read ({error.strerror or error}): check its permissions") from error


def _whole(path: Path) -> bytearray:
    return files.read_bytes(path, TENSORS_SIZE)


def is_local(source: str | Path) -> bool:
    """Whether a source is a local path, existing or not, and not the name of a repository."""
    if isinstance(source, os.PathLike) or REPOSITORY.fullmatch(source) is None or ".." in source:
        return True
    return os.path.lexists(source.partition("/")[0])


def _check_together(folder: Path, config: ErasureConfig, edits: Edits) -> None:
    """Raise `ArtifactError` unless config and tensors belong to the same erasure."""
    expected, found = set(config.base.get("tensors", {})), set(edits.parameters)
    if sorted(config.carriers) != sorted(edits.carriers):
        raise ArtifactError(
            f"{folder}: the config names the carriers {config.carriers}, the tensors are {edits.carriers}: "
            "files of different erasures are mixed or one is missing; fetch or make it again"
        )
    # The base of feature edits is identified by the parameters of their block.
    below = {block: {key for key in expected if key.startswith(block + ".")} for block in edits.features}
    # The base of guidance and filters is identified by the denoiser's layers that read text.
    guided_parts = [key.split("/")[0] for key in (*edits.safety, *edits.filters)]
    below |= {part: {key for key in expected if key.startswith(part + "/")} for part in guided_parts}
    expected -= set().union(*below.values()) - found
    found |= {block for block, known in below.items() if not known}
    found |= {f"{key}.weight" for key in edits.membranes}
    if expected != found:
        lost, extra = sorted(expected - found), sorted(found - expected)
        raise ArtifactError(
            f"{folder}: tensors and config disagree (missing {lost[:3]}, unknown {extra[:3]}): "
            "files of different erasures are mixed or one is damaged; fetch or make it again"
        )


__all__ = ["CONFIG_FILE", "DELTA_FILE", "LORA_FILE", "Erasure", "ErasureConfig", "is_local"]
