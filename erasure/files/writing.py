"""Atomic writing: after any failure either the old or the new file can be read, never a part of one.

A new file or folder is written whole under a temporary name beside its place, flushed to the disk, and renamed. Some
files of a folder that holds others too are replaced together through a journal: they are written into one folder
`.erasure-commit` inside, whose appearance, one rename, is the moment at which the new ones count; then they move to
their places one by one. Who reads such a folder does so through `steady`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue

from erasure.errors import ArtifactError, ErasureError
from erasure.files.names import shown
from erasure.files.reading import parsed, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]
TEMPORARY = re.compile(r"\..*\.erasure-([0-9a-f]{6})-(\d{1,10})-[0-9a-f]{8}\.partial", re.DOTALL)
"""What files and folders are called while they are written: host, process, and a random part."""
ABANDONED = 3600
"""Seconds after which a temporary file of another machine is taken for that of a killed process."""
TRIES = 5
T = TypeVar("T")
COMMIT, MANIFEST = ".erasure-commit", ".files.json"


def write_bytes(path: str | Path, content: bytes | memoryview, *, error: type[ErasureError] = ArtifactError) -> Path:
    """Write a file, whole or not at all. A link is replaced by the file, not followed.

    Args:
        path: The file; its folder is created if needed.
        content: Content of the file.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: The file cannot be written; the old one is kept.
    """
    with replacing(path, error=error) as temporary:
        temporary.write_bytes(content)
    return Path(path)


@contextmanager
def replacing(path: str | Path, *, error: type[ErasureError] = ArtifactError) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces a file at the end of the block; see `write_bytes`.

    Raises:
        ErasureError: The file cannot be written; the old one is kept.
    """
    path = Path(path)
    with _named(path, error):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary = _temporary(path)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _flush_folder(path.parent)


def write_text(path: str | Path, text: str, *, error: type[ErasureError] = ArtifactError) -> Path:
    """Write a file of UTF-8 text; see `write_bytes`.

    Raises:
        ErasureError: It cannot be written, or the text holds half a character (a lone surrogate).
    """
    try:
        content = text.encode()
    except UnicodeEncodeError as reason:
        raise error(f"cannot write {path}: the text holds a lone surrogate at {reason.start}; take it out") from reason
    return write_bytes(path, content, error=error)


def write_json(path: str | Path, data: object, *, error: type[ErasureError] = ArtifactError) -> Path:
    """Write plain data as JSON of two blanks' indent; see `write_bytes`.

    Raises:
        ErasureError: It cannot be written, or could not be read again: NaN, lone surrogates, deep nesting.
    """
    return write_bytes(path, json_bytes(data, str(path), error=error), error=error)


def json_bytes(data: object, where: str, *, error: type[ErasureError] = ArtifactError) -> bytes:
    """Plain data as JSON that `read_json` reads.

    Raises:
        ErasureError: It holds what could not be read again.
    """
    try:
        content = (json.dumps(data, indent=2) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as reason:
        raise error(f"cannot write {where}: it is no plain data ({reason})") from reason
    try:
        parsed(content, JsonValue, where, error=error)
    except ErasureError as reason:
        raise error(f"cannot write what could not be read again. {reason}") from reason
    return content


@contextmanager
def new_folder(path: str | Path, *, error: type[ErasureError] = ArtifactError) -> Iterator[Path]:
    """Create a folder atomically: write its files into the folder that this yields.

    Args:
        path: Path of the folder, which must be empty or not exist. Links are followed.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: It exists, or cannot be written.
    """
    path = Path(path)
    with _named(path, error):
        place = Path(os.path.realpath(path))
        if os.path.lexists(place) and (not place.is_dir() or any(place.iterdir())):
            raise error(f"{path} is not empty: choose another folder")
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent)
        temporary = _temporary(place)
        try:
            temporary.mkdir()
            yield temporary
            if place.is_dir():
                shutil.copymode(place, temporary)
            _flush_tree(temporary)
            os.replace(temporary, place)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush_folder(place.parent)


def replace_files(
    folder: str | Path, contents: Mapping[str, bytes], owned: Collection[str] = (), *,
    error: type[ErasureError] = ArtifactError,
) -> None:  # fmt: skip
    """Replace files of a folder together: readers through `steady` find all new or all old files.

    Everything else in the folder stays. A link to the folder stays one.

    Args:
        folder: Where to; made when it does not exist.
        contents: The files by name.
        owned: Further files that belong to what is written: they are removed where `contents` has them not.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: It cannot be written, or a folder has such a name; the old files are still there.
    """
    with _named(Path(folder), error):
        place = Path(os.path.realpath(folder))
        fresh = not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir()))
    if fresh:
        with new_folder(place, error=error) as temporary:
            for name, content in contents.items():
                (temporary / name).write_bytes(content)
        return
    with _named(Path(folder), error), _locked(place):
        names = sorted({*contents, *owned})
        for name in names:
            if os.path.lexists(place / name) and (place / name).is_dir():
                raise error(f"cannot write to {folder}: {name} is a folder; remove it or choose another place")
        sweep(place)
        _finish(place, names)
        temporary = _temporary(place / COMMIT)
        try:
            temporary.mkdir()
            for name, content in contents.items():
                (temporary / name).write_bytes(content)
            (temporary / MANIFEST).write_text(json.dumps({"new": sorted(contents), "all": names}))
            _flush_tree(temporary)
            os.replace(temporary, place / COMMIT)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _flush_folder(place)
        try:
            _finish(place, names)
        except BaseException:
            # As long as none has moved, it can be as if nothing had been; else the journal holds, for later.
            if all((place / COMMIT / name).exists() for name in contents):
                os.replace(place / COMMIT, temporary)
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def settled(
    folder: str | Path, names: Collection[str], *, error: type[ErasureError] = ArtifactError
) -> dict[str, Path]:
    """Find the current places of files that are replaced together; missing ones are left out.

    Only a process that was killed in the middle of `replace_files`, or one that is at it, has them elsewhere than in
    the folder itself.

    Args:
        folder: The folder.
        names: The files.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: The journal of a killed process is damaged.
    """
    folder = Path(folder)
    journal = folder / COMMIT
    manifest: dict[str, list[str]] = _manifest(journal, error) if journal.is_dir() else {"new": [], "all": []}
    found: dict[str, Path] = {}
    for name in names:
        path = journal / name if name in manifest["new"] else folder / name
        if not os.path.lexists(path):
            path = folder / name
        if os.path.lexists(path) and (name in manifest["new"] or name not in manifest["all"]):
            found[name] = path
    return found


def steady(
    folder: str | Path, names: Collection[str], read: Callable[[dict[str, Path]], T], *,
    error: type[ErasureError] = ArtifactError,
) -> T:  # fmt: skip
    """Read files of a folder that belong together: all old or all new, whoever writes meanwhile.

    Args:
        folder: The folder.
        names: The files.
        read: Gets the paths of those that exist, see `settled`.
        error: Class of the errors that are raised.

    Raises:
        ErasureError: What `read` raises; or the files change again and again.
    """
    for _ in range(TRIES):
        before = _state_of(folder, names)
        try:
            result = read(settled(folder, names, error=error))
        except ErasureError:
            if _state_of(folder, names) == before:
                raise
        else:
            if _state_of(folder, names) == before:
                return result
    raise error(f"{folder} changes while it is read: wait for whoever writes there, and read it again")


def _state_of(folder: str | Path, names: Collection[str]) -> list[tuple[int, ...] | None]:
    """Changes whenever `replace_files` does anything to these files."""
    found: list[tuple[int, ...] | None] = []
    for path in (Path(folder) / name for name in (COMMIT, *names)):
        try:
            status = os.stat(path)
            found.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
        except (OSError, ValueError):
            found.append(None)
    return found


def sweep(folder: Path) -> None:
    """Remove unfinished files of killed processes from a folder."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            match = TEMPORARY.fullmatch(entry.name)
            if match is None or not _abandoned(match[1], int(match[2]), entry):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)


def _abandoned(host: str, process: int, entry: os.DirEntry[str]) -> bool:
    """Whether nobody writes a temporary file any more: its process is gone, or it is old."""
    try:
        if time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED:
            return True
    except OSError:
        return False
    if host != HOST or os.name == "nt":  # asking Windows whether a process lives would end it
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    return False


def _finish(place: Path, names: Collection[str]) -> None:
    """Move the files of a journal to their places, and remove those that it replaces by nothing.

    A journal comes with the folder, from wherever: it moves and removes nothing but files of these names.
    """
    journal = place / COMMIT
    if not journal.is_dir():
        return
    manifest = _manifest(journal, ArtifactError)
    for name in names:
        if name in manifest["new"] and os.path.lexists(journal / name):
            os.replace(journal / name, place / name)
    for name in names:
        if name in manifest["all"] and name not in manifest["new"]:
            (place / name).unlink(missing_ok=True)
    _flush_folder(place)
    # The manifest goes last: without it the journal says nothing.
    done = _temporary(place / COMMIT)
    os.replace(journal, done)
    shutil.rmtree(done, ignore_errors=True)


def _manifest(journal: Path, error: type[ErasureError]) -> dict[str, list[str]]:
    manifest: dict[str, list[str]] = read_json(journal / MANIFEST, dict[str, list[str]], error=error)
    names = [name for part in ("new", "all") for name in manifest.get(part, ["/"])]
    if any("/" in name or "\\" in name or name in ("", ".", "..") for name in names):
        raise error(f"{journal / MANIFEST} is damaged: remove {journal}, and fetch or write the files again")
    return manifest


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer of a folder at a time, where the system can tell."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def _named(path: Path, error: type[ErasureError]) -> Iterator[None]:
    """Errors of the system as errors of ours."""
    try:
        os.fsencode(path)
        if "\0" in str(path):
            raise error(f"cannot write to {shown(str(path))}: a path holds no NUL; choose another name")
        yield
    except UnicodeEncodeError as reason:
        raise error(f"cannot write to {shown(str(path))} ({reason.reason}): choose another name") from reason
    except OSError as reason:
        raise error(
            f"cannot write to {path}: {reason.strerror or reason}. Nothing that was there is lost: make room, ask for "
            "permission, or choose another place"
        ) from reason


def _temporary(path: Path) -> Path:
    """A new name beside a path, which tells who writes there."""
    end = f".erasure-{HOST}-{os.getpid()}-{secrets.token_hex(4)}.partial"
    stem = path.name.encode()[: 250 - len(end)].decode(errors="ignore")
    return path.with_name(f".{stem}{end}")


def _flush_tree(folder: Path) -> None:
    """Have all files of a folder on the disk."""
    for where, _, names in os.walk(folder):
        for name in names:
            _flush(Path(where) / name)
        _flush_folder(Path(where))


def _flush_folder(folder: Path) -> None:
    """Have the names of a folder on the disk, where the system can."""
    with contextlib.suppress(OSError):
        _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
