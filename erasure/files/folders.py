"""Folders of resumable work: one process at a time, and the same work as before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import JsonValue

from erasure.errors import ErasureError, TrainingError
from erasure.files.names import shown
from erasure.files.reading import read_json
from erasure.files.writing import sweep, write_json

LOCK = "lock"


def digest(value: object) -> str:
    """sha256 of plain data, 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def differences(first: object, second: object, path: str = "") -> list[str]:
    """List the differences of two recipes, one line per leaf: `size: "quick" here, "full" there`."""
    if isinstance(first, dict) and isinstance(second, dict):
        return [
            line
            for key in sorted({*first, *second})
            for line in differences(first.get(key), second.get(key), f"{path}.{key}" if path else key)
        ]
    if json.dumps(first) == json.dumps(second):
        return []
    here, there = (_cut(json.dumps(value)) for value in (first, second))
    return [f"{_cut(path) or 'recipe'}: {here} in the first, {there} in the second"]


def _cut(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."


@contextmanager
def held(
    folder: str | Path, recipe: Mapping[str, object], *, file: str, what: str, doing: str = "",
    beside: Collection[str] | None = (), state: Collection[str] = (), grows: Collection[str] = (), wait: bool = False,
    error: type[ErasureError] = TrainingError, busy: type[ErasureError] | None = None,
) -> Iterator[None]:  # fmt: skip
    """Lock a folder of resumable work, for one process at a time and the same work as before.

    Work that is refused before it has written anything leaves no folder that was made for it.

    Args:
        folder: Folder, which is created if it does not exist.
        recipe: Everything on which the work depends, as plain data; saved in the folder.
        file: File name of the recipe.
        what: Kind of the work, for messages: `training`.
        doing: Activity of a process that works there, for messages: `training`.
        beside: Names that are allowed in a folder without a recipe; `None` allows any.
        state: Names of files of the work, which mean nothing without the recipe.
        grows: Names of lists in the recipe that may have more items than they had. The file then gets those, too.
        wait: Wait for another process that works there, instead of raising.
        error: Class of the errors that are raised.
        busy: Class of the error where another process works there; `error` when left out.

    Raises:
        ErasureError: Another process works there, the folder holds something else, or cannot be written.
    """
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LOCK).is_symlink():  # some versions of filelock would empty what it leads to
            raise error(f"{folder / LOCK} is a link: remove it, or give another folder")
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as reason:
        at_work = doing or f"at its {what}"
        raise (busy or error)(
            f"another process is {at_work} in {folder}: wait for it, or give another folder"
        ) from reason
    except ErasureError:  # some are ValueErrors
        raise
    except (OSError, ValueError, NotImplementedError) as reason:
        told = getattr(reason, "strerror", None) or reason
        raise error(f"cannot write to {folder}: {told}; give another folder") from reason
    try:
        sweep(folder)
        _check(folder, recipe, file, what, beside, state, grows, error)
        yield
    except ErasureError:
        # Whoever waits for the lock would wait for that of a folder that is gone.
        if missing and not wait and {*os.listdir(folder)} <= {LOCK, file}:
            for name in (file, LOCK):
                (folder / name).unlink(missing_ok=True)
            for path in missing:
                with contextlib.suppress(OSError):
                    path.rmdir()
        raise
    finally:
        lock.release()


def has_recipe(
    folder: str | Path, recipe: Mapping[str, object], *, file: str, what: str, error: type[ErasureError],
    grows: Collection[str] = (),
) -> bool:  # fmt: skip
    """Tell whether a folder is that of a piece of work; see `held`.

    Args:
        folder: Folder, which need not exist.
        recipe: Everything on which the work depends, as plain data.
        file: File name of the recipe.
        what: Kind of the work, for messages: `training`.
        error: Class of the errors that are raised.
        grows: See `held`.

    Returns:
        False where the folder has no recipe.

    Raises:
        ErasureError: The folder's recipe is of other work, or is damaged.
    """
    path = Path(folder) / file
    if not os.path.lexists(path):
        return False
    try:
        known: dict[str, JsonValue] = read_json(path, dict[str, JsonValue], error=error)
    except error as reason:
        raise error(f"{reason}. Or delete {folder} to start anew") from reason
    article = "an" if what[0] in "aeiou" else "a"
    wanted = json.loads(json.dumps(recipe))
    for name in grows:
        before = known.get(name)
        if not isinstance(before, list):
            continue
        if lost := [str(item) for item in before if item not in wanted[name]]:
            raise error(
                f"{folder} holds {article} {what} with other {name} ({shown(lost)}): give those too, or another folder"
            )
        known[name] = wanted[name]
    if changed := differences(known, wanted):
        raise error(
            f"{folder} holds {article} {what} of something else and cannot go on; {'; '.join(changed[:5])}. Give "
            "the same options, or another folder"
        )
    return True


def _check(
    folder: Path, recipe: Mapping[str, object], file: str, what: str, beside: Collection[str] | None,
    state: Collection[str], grows: Collection[str], error: type[ErasureError],
) -> None:  # fmt: skip
    if has_recipe(folder, recipe, file=file, what=what, error=error, grows=grows):
        if grows:
            write_json(folder / file, json.loads(json.dumps(recipe)), error=error)
        return
    present = sorted(name for name in os.listdir(folder) if name != LOCK)
    if orphans := [name for name in present if name in state]:
        raise error(
            f"{folder} holds {orphans[0]} of a {what} without its {file}, so nobody knows of which: delete it to "
            "start anew, or give another folder"
        )
    if others := [name for name in present if beside is not None and name not in beside]:
        raise error(f"{folder} is not empty and holds no {what} (found: {shown(others)}): give another folder")
    write_json(folder / file, json.loads(json.dumps(recipe)), error=error)


def discard(folder: str | Path, names: Collection[str]) -> None:
    """Remove the files of finished work and the lock, and the folder if it is then empty.

    Args:
        folder: The folder.
        names: Names in the order of removal: the recipe last, because the others are useless without it.
    """
    folder = Path(folder)
    for name in (*names, LOCK):
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something else is in it, or it is no folder
        folder.rmdir()
