"""Bounded reading: kind, size, encoding, nesting and types are checked before anything else happens."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import JsonSchemaValue

from erasure.errors import ArtifactError, ErasureError
from erasure.files.names import shown

T = TypeVar("T")
JSON_LIMIT = 16 * 2**20
"""Default largest size in bytes of a JSON or text file."""
LINE_LIMIT = 2**20
"""Largest size in bytes of a line of a JSONL file."""
LINES_LIMIT = 1_000_000
"""Largest number of lines of a JSONL file."""
LONGEST_INTEGER = 40
"""Largest number of digits of an integer."""
SUSPICIOUS = re.compile(rb"\d{%d}|\d[eE]\+?\d{3}" % (LONGEST_INTEGER + 1))
"""What integers of too many digits, or infinity as `1e999`, hold."""
KINDS = (
    (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Byte order marks of texts in UTF-16, as spreadsheets and PowerShell write them."""
DAMAGED = "the file is damaged; fetch or make it again"


def read_bytes(path: str | Path, limit: int = JSON_LIMIT, *, error: type[ErasureError] = ArtifactError) -> bytearray:
    """Read a regular file.

    Args:
        path: The file; links are followed.
        limit: Most bytes of the file: a larger one is refused by its size, before any is read.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: It is missing, no regular file, too large, not readable, or its name cannot be one.
    """
    return read_start(path, limit, limit, error=error)[0]


def read_start(
    path: str | Path, length: int, limit: int, *, error: type[ErasureError] = ArtifactError
) -> tuple[bytearray, int]:
    """Read the first bytes of a regular file, at most `length`, and give the size of the file.

    Raises:
        ErasureError: See `read_bytes`.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        # Opening a device or a pipe may have effects of its own, so it is looked at first, and again once open.
        _check_regular(path, os.stat(path), limit, error)
        handle = os.open(path, flags)
        with open(handle, "rb", buffering=0) as file:
            size = _check_regular(path, os.fstat(handle), limit, error)
            content = bytearray(min(length, size))
            view, filled = memoryview(content), 0
            while filled < len(view) and (count := file.readinto(view[filled:])):
                filled += count
            view.release()
            del content[filled:]
            return content, size
    except ErasureError:  # some are ValueErrors
        raise
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason.strerror or reason}): {_advice(reason)}") from reason
    except ValueError as reason:  # a NUL or a surrogate in the path
        raise error(f"{shown(str(path))} cannot be the path of a file ({reason}): check the name") from reason
    except MemoryError as reason:
        raise error(f"{path} does not fit into memory: free some, or read it on a larger machine") from reason


def _check_regular(path: str | Path, status: os.stat_result, limit: int, error: type[ErasureError]) -> int:
    if not stat.S_ISREG(status.st_mode):
        kind = next((name for test, name in KINDS if test(status.st_mode)), "no regular file")
        raise error(f"{path} cannot be read: it is {kind}, expected a regular file; remove it or name another")
    if status.st_size > limit:
        raise error(
            f"{path} cannot be read: it has {status.st_size:,} bytes, at most {limit:,} are allowed; {DAMAGED}"
        )
    return status.st_size


def _advice(reason: OSError) -> str:
    if isinstance(reason, FileNotFoundError):
        return "check the path, or fetch the file again"
    if isinstance(reason, PermissionError):
        return "ask for permission to read it, or copy it"
    return "check the path and the disk"


def read_text(path: str | Path, limit: int = JSON_LIMIT, *, error: type[ErasureError] = ArtifactError) -> str:
    """Read a UTF-8 text file; a byte order mark at its start, as editors on Windows write it, is left out.

    Raises:
        ErasureError: See `read_bytes`; or it is no UTF-8, or holds NUL characters.
    """
    content = _unmarked(read_bytes(path, limit, error=error))
    if content.startswith(WIDE_MARKS):
        raise error(f"{path} cannot be read as text: it is UTF-16; save it as UTF-8")
    try:
        text = content.decode()
    except UnicodeDecodeError as reason:
        line, byte = content.count(b"\n", 0, reason.start) + 1, content[reason.start]
        raise error(
            f"{path} cannot be read as text ({reason.reason} 0x{byte:02x} in line {line}): it is not UTF-8; save it "
            "as UTF-8, or fetch it again"
        ) from reason
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise error(f"{path} cannot be read as text: line {line} holds a NUL character; it is no text, or damaged")
    return text


def _unmarked(content: bytearray) -> bytearray:
    """Take UTF-8's byte order mark off the start of a file."""
    return content.removeprefix(codecs.BOM_UTF8)


def read_json(
    path: str | Path, schema: type[T] | object, limit: int = JSON_LIMIT, *, error: type[ErasureError] = ArtifactError
) -> T:
    """Read a JSON file by a schema.

    Nesting of more than 200 levels, lone surrogates, keys that come twice, NaN and infinity (also as `1e999`), and
    integers of more than 40 digits are refused whatever the schema. Types are strict: `1` is no `"1"` and no `true`.

    Args:
        path: The file.
        schema: Anything pydantic validates: a `BaseModel`, a dataclass, `dict[str, float]`, an `Annotated` type. Give
            classes `ConfigDict(extra="forbid")`, so that unknown keys are refused with the known ones named.
        limit: Most bytes.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: See `read_bytes`; or it is no JSON, or not of the schema.
    """
    return parsed(bytes(_unmarked(read_bytes(path, limit, error=error))), schema, str(path), error=error)


def read_lines(
    path: str | Path, schema: type[T] | object, *, torn: bool = False, limit: int = 64 * JSON_LIMIT,
    line_limit: int = LINE_LIMIT, count: int = LINES_LIMIT, error: type[ErasureError] = ArtifactError,
) -> Iterator[T]:  # fmt: skip
    """Read the lines of a JSONL file by a schema; empty lines are skipped.

    Args:
        path: The file.
        schema: See `read_json`.
        torn: Leave out a last line without its end that cannot be read: a run that was killed writes such.
        limit: Most bytes of the file.
        line_limit: Most bytes of a line.
        count: Most lines.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: See `read_json`; the line is named.
    """
    content = _unmarked(read_bytes(path, limit, error=error))
    start, number = 0, 0
    while start < len(content):
        end = content.find(b"\n", start)
        whole, end = end >= 0, end if end >= 0 else len(content)
        number += 1
        where = f"{path}, line {number}"
        if number > count or end - start > line_limit:
            raise error(
                f"{where} cannot be read: allowed are {count:,} lines of {line_limit:,} bytes at most; {DAMAGED}"
            )
        line = bytes(content[start:end]).strip()
        start = end + 1
        if not line:
            continue
        try:
            yield parsed(line, schema, where, error=error)
        except ErasureError:
            if torn and not whole:
                return
            raise


def parsed(content: bytes, schema: type[T] | object, where: str, *, error: type[ErasureError] = ArtifactError) -> T:
    """Parse JSON by a schema; see `read_json`.

    Args:
        content: UTF-8.
        schema: See `read_json`.
        where: Its place, for messages.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: See `read_json`.
    """
    value: T = _checked(content, schema, where, error)
    # After it, because that parser bounds the nesting. Numbers are looked at one by one only where any is suspicious.
    integer, number = (_integer, _finite) if SUSPICIOUS.search(content) else (None, None)
    try:
        json.loads(content, object_pairs_hook=_unique, parse_constant=_finite, parse_int=integer, parse_float=number)
    except ValueError as reason:
        raise error(f"{where} cannot be read as JSON ({shown(str(reason), 200)[1:-1]}): {DAMAGED}") from None
    return value


def _checked(content: bytes, schema: type[T] | object, where: str, error: type[ErasureError]) -> T:
    """JSON as what a schema says, as far as the schema says something."""
    try:
        return _adapter(schema).validate_json(content, strict=True)
    except ValidationError as reason:
        first = reason.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise error(f"{where} cannot be read as JSON ({first['ctx']['error']}): {DAMAGED}") from None
        raise error(f"{where} {_told(reason, schema)}") from None


def validated(data: object, schema: type[T] | object, where: str, *, error: type[ErasureError] = ArtifactError) -> T:
    """Validate plain data by a schema, as if they had been read from a file.

    Raises:
        ErasureError: It is not of the schema, or could not be written as JSON.
    """
    try:
        content = json.dumps(data, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as reason:
        raise error(
            f"{where} is no plain data ({shown(str(reason), 200)[1:-1]}): give texts, numbers, lists"
        ) from None
    return _checked(content, schema, where, error)


_adapter: Callable[[object], TypeAdapter[Any]] = lru_cache(maxsize=64)(TypeAdapter)


def _told(reason: ValidationError, schema: object) -> str:
    """What does not fit, in one line; the first three of it."""
    problems = []
    for found in reason.errors(include_url=False)[:3]:
        place = ".".join(shown(str(part), 40)[1:-1] for part in found["loc"])
        if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            problems.append(f"unknown keys ['{place}']; allowed: {_allowed(schema, found['loc'][:-1])}")
        elif found["type"] in ("missing", "missing_argument"):
            problems.append(f"key '{place}' is missing")
        else:
            what = f"'{place}': " if place else ""
            problems.append(f"{what}{shown(found['msg'], 200)[1:-1]}, found {shown(found['input'], 60)}")
    more = reason.error_count() - len(problems)
    rest = f"; and {more} more" if more > 0 else ""
    return f"cannot be read as what it should be: {'; '.join(problems)}{rest}. {DAMAGED[0].upper()}{DAMAGED[1:]}"


def _allowed(schema: object, place: tuple[int | str, ...]) -> list[str]:
    """Keys that the schema knows at a place, as far as its JSON schema tells."""
    whole = _adapter(schema).json_schema()
    node = whole
    for part in place:
        node = _resolved(whole, node)
        below = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        node = below or node.get("additionalProperties") or {}
        node = node if isinstance(node, dict) else {}
    return sorted(_resolved(whole, node).get("properties", {}))


def _resolved(whole: JsonSchemaValue, node: JsonSchemaValue) -> JsonSchemaValue:
    for option in node.get("anyOf", [node]):
        if "$ref" in option:
            return whole["$defs"][option["$ref"].rpartition("/")[2]]
    return node


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object, unless a key comes twice: readers would disagree about which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {shown(twice)} comes twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"an integer of {len(digits)} digits, at most {LONGEST_INTEGER} are allowed")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {shown(digits, 40)[1:-1]} is not finite")
    return value
