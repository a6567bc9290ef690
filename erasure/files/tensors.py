"""Bounded reading of tensors: what a file says of their sizes is checked against it before any is allocated."""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, StringConstraints
from torch import Tensor

from erasure.errors import ArtifactError, ErasureError
from erasure.files.names import shown
from erasure.files.reading import DAMAGED, parsed, read_bytes, read_start

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types of tensors that are read; float8, complex and packed ones are refused."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TENSORS_LIMIT = 20_000
"""Largest number of tensors in a file."""
BYTES_LIMIT = 64 * 2**30
"""Largest size in bytes of a file of tensors."""
WHOLE_LIMIT = 2**40
"""Largest size in bytes of a file of which only the header is read."""
HEADER_LIMIT = 8 * 2**20
"""Largest size of a header in bytes."""
Key = Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=r"^[\x20-\x7e]*$")]
"""Name of a tensor: no control characters, nothing that could be mistaken."""
MOST_DIMENSIONS = 8
PREFIX = 8
"""Number of bytes before the header, which give its length."""


class TensorInfo(NamedTuple):
    """What the header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset in bytes of its values in the file."""

    @property
    def size(self) -> int:
        """Size of its values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(BaseModel):
    """What a header says about one tensor."""

    model_config = ConfigDict(extra="forbid", strict=True)
    dtype: Annotated[str, StringConstraints(pattern="^[A-Z0-9_]{1,16}$")]
    shape: Annotated[list[Size], Field(max_length=MOST_DIMENSIONS)]
    data_offsets: tuple[Size, Size]


class _Header(BaseModel):
    """A whole header: tensors by name, and texts that nobody here reads."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[Key, _Entry]
    metadata: Annotated[dict[str, str], Field(alias="__metadata__")] = {}


Check = Callable[[Mapping[str, TensorInfo]], None]


def tensor_infos(
    path: str | Path, *, limit_bytes: int = BYTES_LIMIT,
    allowed_dtypes: Collection[torch.dtype] = tuple(DTYPES.values()), error: type[ErasureError] = ArtifactError,
) -> dict[str, TensorInfo]:  # fmt: skip
    """Read types and shapes of a safetensors file's tensors, by name, without reading the tensors.

    Raises:
        ErasureError: See `read_tensors`.
    """
    start, size = read_start(path, PREFIX + HEADER_LIMIT, limit_bytes, error=error)
    return _header(start, size, path, allowed_dtypes, error)


def read_metadata(path: str | Path, *, error: type[ErasureError] = ArtifactError) -> dict[str, str]:
    """Read the metadata in a safetensors file's header, which may be from an untrusted source.

    Raises:
        ErasureError: See `read_tensors`.
    """
    tensor_infos(path, limit_bytes=WHOLE_LIMIT, error=error)
    start = read_start(path, PREFIX + HEADER_LIMIT, WHOLE_LIMIT, error=error)[0]
    length = int.from_bytes(start[:PREFIX], "little")
    whole: _Header = parsed(bytes(start[PREFIX : PREFIX + length]), _Header, f"{path}: the header", error=error)
    return dict(whole.metadata)


def read_tensors(
    path: str | Path, *, limit_bytes: int = BYTES_LIMIT,
    allowed_dtypes: Collection[torch.dtype] = tuple(DTYPES.values()), check: Check | None = None,
    error: type[ErasureError] = ArtifactError,
) -> dict[str, Tensor]:  # fmt: skip
    """Read the tensors of a safetensors file into memory, independent of the file afterwards.

    Args:
        path: The file.
        limit_bytes: Most bytes of the file.
        allowed_dtypes: Types that a tensor may have.
        check: Called with the shapes before anything is allocated; may raise any error.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: See `read_bytes`; or the header is damaged or does not fit the file, there are too many tensors,
            a name is too long, or a type is not allowed.
    """
    infos = tensor_infos(path, limit_bytes=limit_bytes, allowed_dtypes=allowed_dtypes, error=error)
    if check is not None:
        check(infos)
    content = read_bytes(path, limit_bytes, error=error)
    if infos != _header(content, len(content), path, allowed_dtypes, error):
        raise error(f"{path} changed while it was read: wait for whoever writes it, and read it again")
    return {name: _tensor(content, info) for name, info in infos.items()}


def _tensor(content: bytearray, info: TensorInfo) -> Tensor:
    """One tensor, which shares the bytes of the file where they are aligned."""
    if not info.size:
        return torch.empty(info.shape, dtype=info.dtype)
    if info.start % info.dtype.itemsize:
        values = torch.frombuffer(bytearray(content[info.start : info.start + info.size]), dtype=info.dtype)
    else:
        values = torch.frombuffer(content, dtype=info.dtype, count=math.prod(info.shape), offset=info.start)
    return values.view(info.shape)


def _header(
    content: bytearray, size: int, path: str | Path, allowed: Collection[torch.dtype], error: type[ErasureError]
) -> dict[str, TensorInfo]:
    """The header of a file, checked.

    Args:
        content: The start of the file.
        size: Bytes of the whole file.
        path: For messages.
        allowed: Types that a tensor may have.
        error: Class of the errors that are raised.
    """
    length = int.from_bytes(content[:PREFIX], "little")
    if len(content) < PREFIX or not 2 <= length <= min(HEADER_LIMIT, size - PREFIX):
        raise error(f"{path} cannot be read as safetensors (a header of {length} bytes in {size} bytes): {DAMAGED}")
    # Counted first: to parse a million entries takes long.
    if content.count(b'"data_offsets"', 0, PREFIX + length) > TENSORS_LIMIT:
        raise error(f"{path} holds more than {TENSORS_LIMIT:,} tensors, which is the most allowed; {DAMAGED}")
    where = f"{path}: the header"
    whole: _Header = parsed(bytes(content[PREFIX : PREFIX + length]), _Header, where, error=error)
    header: dict[str, _Entry] = whole.__pydantic_extra__ or {}
    if len(header) > TENSORS_LIMIT:
        raise error(f"{path} holds {len(header):,} tensors, at most {TENSORS_LIMIT:,} are allowed; {DAMAGED}")
    infos: dict[str, TensorInfo] = {}
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1].data_offsets):
        dtype = DTYPES.get(entry.dtype)
        if dtype is None or dtype not in allowed:
            names = ", ".join(name for name, known in DTYPES.items() if known in allowed)
            raise error(f"{path}: tensor {shown(name)} has the type {entry.dtype}, allowed: {names}; convert it")
        first, last = entry.data_offsets
        info = TensorInfo(dtype, tuple(entry.shape), PREFIX + length + first)
        if first != expected or last - first != info.size:
            raise error(
                f"{path} cannot be read as safetensors (tensor {shown(name)} of shape {shown(entry.shape)} does not "
                f"fill the bytes {first} to {last}): {DAMAGED}"
            )
        infos[name], expected = info, last
    if PREFIX + length + expected != size:
        raise error(
            f"{path} cannot be read as safetensors (it has {size:,} bytes, its header tells of "
            f"{PREFIX + length + expected:,}): {DAMAGED}"
        )
    return {name: infos[name] for name in header}


def read_archive(path: str | Path, *, error: type[ErasureError] = ArtifactError) -> Any:
    """Read a file of `torch.save` with tensors and plain data only; no code in it is run.

    The tensors are read from the file as they are used.

    Raises:
        ErasureError: See `read_bytes`; or it is damaged, holds more than tensors, or would grow when unpacked.
    """
    read_start(path, 0, BYTES_LIMIT, error=error)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise error(f"{path} cannot be read: it is compressed, which torch never does; {DAMAGED}")
        # Mapped: elsewise torch believes what the file says of its sizes, and reads beyond its end.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except ErasureError:
        raise
    except pickle.UnpicklingError as reason:
        raise error(f"{path} holds more than tensors, which is refused: it could run code") from reason
    except Exception as reason:  # torch and zip files have many
        told = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
        raise error(f"{path} cannot be read ({shown(told, 200)[1:-1]}): {DAMAGED}") from reason
