"""Attempts on disk, also those that are no text: a record for a line of JSON, with tensors and pictures beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from erasure.errors import EvaluationError
from erasure.eval.attacks.changes import KINDS, Described, Resumed
from erasure.eval.attempts import Attempt, Change, unchanged
from erasure.eval.rows import Record, Row
from erasure.files import inside, read_bytes, read_tensors, shown, write_bytes
from erasure.images import png, read_rgb

FOLDER = "adversarial"
"""Folder of tensors and pictures, beside the lines of JSON."""
BYTES_LIMIT = 2**30
"""Bytes of a file."""
_TEXTS, _TENSORS, _PICTURES = (str,), (Tensor,), (Image.Image,)
ARGUMENTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "prompt_2", "prompt_3"), _TEXTS),
    "negative_prompt": (str, list),
    **dict.fromkeys(("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"), _TENSORS),
    **dict.fromkeys(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), _TENSORS),
    **dict.fromkeys(("negative_prompt_attention_mask", "latents"), _TENSORS),
    **dict.fromkeys(("image", "mask_image"), _PICTURES),
    **dict.fromkeys(("num_inference_steps", "height", "width"), (int,)),
    **dict.fromkeys(("strength", "guidance_scale", "true_cfg_scale", "eta"), (float, int)),
    "max_sequence_length": (int,),
    "callback_on_step_end": (Resumed,),
}
"""Arguments of a pipeline's call that an attempt on disk may give, and of which types; `None` leaves one out."""
DEEPEST = 6
"""Levels of nesting of a value."""


class UnstorableError(EvaluationError):
    """An attempt that holds something which is neither plain data nor a tensor, a picture or a known change."""


def store(attempt: Attempt, folder: Path, stem: str) -> Record:
    """Write what an attempt needs beside its record, and give the record.

    Args:
        attempt: The attempt.
        folder: The folder of the attack; files go into `adversarial/` there.
        stem: Name of the files, one of each attempt.

    Raises:
        UnstorableError: It holds something that cannot be written down.
        EvaluationError: The folder cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    pictures: list[Image.Image] = []
    if unknown := sorted(set(attempt.call) - set(ARGUMENTS)):
        raise UnstorableError(f"an attempt with the argument {unknown[0]!r}: known are {', '.join(sorted(ARGUMENTS))}")
    call = {name: _plain(value, tensors, pictures) for name, value in attempt.call.items()}
    change = None if attempt.change is unchanged else _plain(attempt.change, tensors, pictures)
    record: Record = {"call": call, "change": change, "box": None if attempt.box is None else list(attempt.box)}
    files = {}
    if tensors:
        files[f"{stem}.safetensors"] = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    for number, picture in enumerate(pictures):
        files[f"{stem}-{number}.png"] = png(picture)
    for name, content in files.items():
        write_bytes(inside(folder, FOLDER, name, error=EvaluationError), content, error=EvaluationError)
    return {
        **record,
        "stem": stem,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }


def restore(record: Row, folder: Path) -> Attempt:
    """The attempt of a record; `store` wrote it.

    Args:
        record: As a file holds it: nothing of it is trusted.
        folder: Where `adversarial/` is.

    Raises:
        EvaluationError: A file is missing, damaged or another; or the record names something unknown.
    """
    stored = _Stored.opened(record, folder)
    if unknown := sorted(set(record["call"]) - set(ARGUMENTS)):
        raise EvaluationError(
            f"the record of {shown(stored.stem)} gives the argument {shown(unknown[0])}; allowed: "
            f"{', '.join(sorted(ARGUMENTS))}"
        )
    call = {name: stored.made(value) for name, value in record["call"].items()}
    for name, value in call.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, ARGUMENTS[name])):
            allowed = " or ".join(each.__name__ for each in ARGUMENTS[name])
            raise EvaluationError(
                f"the record of {shown(stored.stem)} gives {name} as {shown(value)}; expected: {allowed}"
            )
    box, change = record["box"], record["change"]
    return Attempt(
        call, unchanged if change is None else cast(Change, _described(stored.made(change), stored.stem)),
        box=None if box is None else (box[0], box[1], box[2], box[3]),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The files of a record, and what its plain values stand for."""

    folder: Path
    stem: str
    names: Collection[str]
    """Names of the record's files."""
    tensors: Mapping[str, Tensor]

    @classmethod
    def opened(cls, record: Row, folder: Path) -> _Stored:
        """Compare the files with the record's hashes, and read the tensors.

        Raises:
            EvaluationError: See `restore`.
        """
        stem, names = record["stem"], record["files"]
        for name, known in names.items():
            path = inside(folder, FOLDER, name, error=EvaluationError)
            if hashlib.sha256(read_bytes(path, BYTES_LIMIT, error=EvaluationError)).hexdigest() != known:
                raise EvaluationError(
                    f"{path} is not the file that the attack wrote (its sha256 differs): copy the attack's folder anew"
                )
        tensors: dict[str, Tensor] = {}
        if f"{stem}.safetensors" in names:
            path = inside(folder, FOLDER, f"{stem}.safetensors", error=EvaluationError)
            tensors = read_tensors(path, limit_bytes=BYTES_LIMIT, error=EvaluationError)
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise EvaluationError(f"{path} holds NaN or infinity in {name}: run the attack anew")
        return cls(folder, stem, names, tensors)

    def made(self, value: object, depth: int = 0) -> object:
        """What a plain value stands for: the inverse of `_plain`.

        Args:
            value: A value of the record.
            depth: Number of values around it.

        Raises:
            EvaluationError: See `restore`.
        """
        if depth > DEEPEST:
            raise EvaluationError(f"the record of {shown(self.stem)} is nested too deep")
        if isinstance(value, list):
            return [self.made(each, depth + 1) for each in value]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((form, inner),) = value.items()
            if form == "tensor" and inner in self.tensors:
                return self.tensors[cast(str, inner)]
            if form == "picture" and isinstance(inner, int):
                return self.picture(inner)
            if form == "table" and isinstance(inner, dict):
                return {name: self.made(each, depth + 1) for name, each in inner.items()}
        return self.change(value, depth)

    def picture(self, number: int) -> Image.Image:
        """A picture of the record by its number."""
        name = f"{self.stem}-{number}.png"
        if name not in self.names:
            raise EvaluationError(
                f"the record of {shown(self.stem)} names the picture {number}, which it has no file of"
            )
        path = inside(self.folder, FOLDER, name, error=EvaluationError)
        return read_rgb(path, formats=("PNG",), error=EvaluationError)

    def change(self, value: Row, depth: int) -> object:
        """A known change with its fields, which may be changes too."""
        kind, given = KINDS.get(str(value.get("kind"))), value.get("fields")
        if kind is None or not isinstance(given, dict) or set(value) != {"kind", "fields"}:
            raise EvaluationError(
                f"the record of {shown(self.stem)} has {shown(value)}, expected a tensor, a picture, a table, or one "
                f"of {', '.join(KINDS)}: it was made by another version, or is damaged"
            )
        names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        if set(given) != names:
            raise EvaluationError(
                f"the record of {shown(self.stem)} has a {value['kind']} with {shown(sorted(given))}, expected "
                f"{sorted(names)}"
            )
        return kind(**{name: self.made(each, depth + 1) for name, each in given.items()})


def _described(value: object, stem: str) -> object:
    """A change; refused where it is something else."""
    if not isinstance(value, Described) or isinstance(value, Resumed):
        raise EvaluationError(f"the record of {shown(stem)} has a change that is none: {shown(value)}")
    return value


def _plain(value: object, tensors: dict[str, Tensor], pictures: list[Image.Image]) -> object:
    """A value as JSON has it; tensors and pictures are put aside."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Tensor):
        name = f"tensor_{len(tensors)}"
        # Each in memory of its own, as safetensors has it.
        tensors[name] = value.detach().clone()
        return {"tensor": name}
    if isinstance(value, Image.Image):
        pictures.append(value)
        return {"picture": len(pictures) - 1}
    if isinstance(value, Described):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}  # type: ignore[arg-type]
        return {"kind": value.kind, "fields": {name: _plain(each, tensors, pictures) for name, each in fields.items()}}
    if isinstance(value, Mapping):
        return {"table": {str(name): _plain(each, tensors, pictures) for name, each in value.items()}}
    if isinstance(value, Sequence):
        return [_plain(each, tensors, pictures) for each in value]
    raise UnstorableError(f"an attempt with {shown(value)}, which is neither plain data nor a known change")
