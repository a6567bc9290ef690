"""`erasure remove` on a folder of images: goes on where it stopped, and tells what could not be done by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from erasure.cli.arguments import UsageError
from erasure.cli.output import check_output_folder
from erasure.cli.remove import FORMAT_OF, OutputError, Remover, numbered
from erasure.cli.terminal import Terminal
from erasure.errors import BypassedErasureWarning, ErasureError, ExperimentalWarning
from erasure.shown import message, number

if TYPE_CHECKING:
    from erasure.cli.remove import RemoveOptions
    from erasure.interop.protocols import Settings

ENDINGS = (*FORMAT_OF, ".gif")
"""Endings of images that are looked for."""
RECIPE_FILE, ROWS_FILE = "removal.json", "removal.jsonl"
"""In the folder of the results: what the run depends on, and a line for each image that is done."""
NAMED = 6
"""Images that the closing error names."""


@with_config(ConfigDict(extra="forbid"))
class Row(TypedDict):
    """An image that is done."""

    image: str
    """Its path below the folder of images."""
    image_sha256: str
    mask_sha256: str
    """Of the mask's file; empty where words say what is removed."""
    files: list[str]
    """Paths of the results below the folder of results."""
    words: dict[str, float]
    """How surely each word is in the image."""
    seconds: float


class Task(NamedTuple):
    """An image of the folder, and where its results go."""

    name: str
    """Path below the folder of images."""
    image: Path
    mask: Path | None
    files: list[Path]
    """Paths of the results."""
    problem: str | None
    """Why it cannot be done, as far as names tell."""


def remove_folder(options: RemoveOptions, terminal: Terminal) -> None:
    """Take things out of every image of a folder.

    Raises:
        UsageError: Nothing can be done at all, or, after the others are done, some images could not be.
    """
    from erasure.files import held

    folders = [folder for folder in (options.out, options.mask_out, options.overlay_out) if folder is not None]
    sources = [folder for folder in (options.image, options.mask) if folder is not None and os.path.isdir(folder)]
    places = [os.path.realpath(folder) for folder in (*folders, *sources)]
    if len(set(places)) < len(places):
        raise UsageError(
            f"two of the folders are the same ({Counter(places).most_common(1)[0][0]}): name a folder of its own for "
            "the results, and for what else is written"
        )
    is_begun = os.path.lexists(options.out / RECIPE_FILE)
    for folder in folders:
        check_output_folder(folder, overwrite=options.overwrite, may_hold=is_begun)
    tasks = tasks_of(options, [Path(folder) for folder in folders])
    if all(task.problem for task in tasks):
        raise UsageError(f"none of the {len(tasks)} images can be worked on; {tasks[0].name}: {tasks[0].problem}")
    remover = Remover(options)
    if options.overwrite:
        for name in (ROWS_FILE, RECIPE_FILE):
            (options.out / name).unlink(missing_ok=True)
    with held(
        options.out, recipe_of(remover), file=RECIPE_FILE, what="removal", doing="removing objects",
        beside=None if options.overwrite else (), state=(ROWS_FILE,), error=UsageError,
    ):  # fmt: skip
        done, before, failed = work(tasks, remover, terminal)
    summary = summary_rows(tasks, done, before, failed)
    if options.json:
        terminal.result({**remover.summary(), "images": summary, "failed": failed})
    else:
        keys = ("image", "result", "seconds", "note")
        cells = [[number(row[key], ".1f") if key == "seconds" else str(row[key]) for key in keys] for row in summary]
        terminal.table(keys, cells)
        terminal.say(f"{len(done)} of {len(tasks)} images are in {options.out}, {len(before)} of them from before.")
    if failed:
        names = ", ".join(list(failed)[:NAMED]) + (f" and {len(failed) - NAMED} more" if len(failed) > NAMED else "")
        first = next(iter(failed.values()))
        raise UsageError(
            f"{len(failed)} of {len(tasks)} images could not be done: {names} (the first: {first}). Mend them and run "
            "the same command again: what is done stays"
        )


def tasks_of(options: RemoveOptions, written: Sequence[Path]) -> list[Task]:
    """Every image of the folder and of those in it, with its mask and the names of its results, by name.

    Args:
        options: Of the command.
        written: Folders that are written to: what is in them is no image to work on, wherever they lie.

    Raises:
        UsageError: There is no image.
    """
    own = [Path(os.path.realpath(folder)) for folder in written]
    masks = Path(options.mask) if options.mask is not None and os.path.isdir(options.mask) else None
    if masks is not None:
        own.append(Path(os.path.realpath(masks)))
    images = [
        image
        for image in pictures_below(options.image)
        if not any(Path(os.path.realpath(image)).is_relative_to(folder) for folder in own)
    ]
    if not images:
        raise UsageError(f"{options.image} holds no image: expected files that end with {', '.join(ENDINGS)}")
    known: dict[str, list[Path]] = {}
    if masks is not None:
        for drawn in pictures_below(masks):
            known.setdefault(str(drawn.relative_to(masks).with_suffix("")), []).append(drawn)
    tasks = []
    for image in images:
        name = image.relative_to(options.image)
        mask: Path | None = options.mask
        problem: str | None = None
        if masks is not None:
            mask, problem = mask_of(name, masks, known)
        keeps = name.suffix.lower() in FORMAT_OF and not options.png
        file = options.out / (name if keeps else name.with_suffix(".png"))
        tasks.append(Task(name.as_posix(), image, mask, numbered(file, options.count), problem))
    counts = Counter(file for task in tasks for file in task.files)
    return [
        task if all(counts[file] == 1 for file in task.files) else task._replace(
            problem=f"its result would have the name of another's, {task.files[0].name}: rename one of the images"
        )
        for task in tasks
    ]  # fmt: skip


def pictures_below(folder: Path) -> list[Path]:
    """Files that end as images do, in a folder and those in it, by name; hidden ones are left out."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def mask_of(name: Path, folder: Path, known: dict[str, list[Path]]) -> tuple[Path | None, str | None]:
    """The mask of an image, or what is wrong: the same name first, then the same with another ending."""
    alike = known.get(str(name.with_suffix("")), [])
    if folder / name in alike:
        return folder / name, None
    if len(alike) == 1:
        return alike[0], None
    if alike:
        return None, f"several masks have its name ({', '.join(mask.name for mask in alike)}): leave one in {folder}"
    return None, f"there is no mask {name.with_suffix('')} with any ending in {folder}: add it"


def recipe_of(remover: Remover) -> Settings:
    """What results depend on besides images and masks: a run goes on only where all of it is the same."""
    options = remover.options
    how = "words" if options.mask is None else "masks"
    return {
        "model": remover.maker.model, "fingerprint": remover.maker.fingerprint, "erasures": remover.maker.erasures,
        "settings": remover.recorded_settings(), "prompt": options.prompt, "seed": options.seed,
        "count": options.count, "by": how, "words": list(options.words), "others": list(options.others),
        "png": options.png,
    }  # fmt: skip


def work(
    tasks: Sequence[Task], remover: Remover, terminal: Terminal
) -> tuple[dict[str, Row], set[str], dict[str, str]]:
    """Work on every image that is not done yet.

    Returns:
        Rows of all that are done, by the images' names; the names of those that were done before; and why others
        could not be done.
    """
    import torch

    from erasure.images import read_image

    options = remover.options
    known = read_rows(options.out / ROWS_FILE)
    done: dict[str, Row] = {}
    before: set[str] = set()
    failed: dict[str, str] = {}
    with terminal.progress(len(tasks)) as progress, naming_warnings(terminal) as named:
        for task in tasks:
            progress.stage(task.name)
            named[0] = task.name
            started = time.perf_counter()
            try:
                if task.problem is not None:
                    raise UsageError(task.problem)
                hashes = (sha256(task.image), "" if task.mask is None else sha256(task.mask))
                files = [file.relative_to(options.out).as_posix() for file in task.files]
                row = known.get(task.name)
                if row is not None and is_done(row, hashes, files, options.out):
                    done[task.name] = row
                    before.add(task.name)
                    continue
                image = read_image(task.image, error=UsageError)
                mask = None if task.mask is None else read_image(task.mask, error=UsageError)
                beside = [
                    None if folder is None else folder / Path(task.name).with_suffix(".png")
                    for folder in (options.mask_out, options.overlay_out)
                ]
                scores = remover.remove(image, mask, task.files, *beside)
            except OutputError:
                raise  # the disk is full, for instance: the others would fail as well
            except ErasureError as error:
                failed[task.name] = message(error)
            except torch.OutOfMemoryError:
                failed[task.name] = (
                    f"memory does not suffice for an image of {image.width} x {image.height} pixels: add --crop, or "
                    "scale it down"
                )
            else:
                row = Row(
                    image=task.name, image_sha256=hashes[0], mask_sha256=hashes[1], files=files, words=scores,
                    seconds=round(time.perf_counter() - started, 2),
                )  # fmt: skip
                add_row(options.out / ROWS_FILE, row)
                done[task.name] = row
            finally:
                progress.advance()
    return done, before, failed


def is_done(row: Row, hashes: tuple[str, str], files: list[str], out: Path) -> bool:
    """Whether an image was done as it is now, and its results are still there."""
    is_same = (row["image_sha256"], row["mask_sha256"], row["files"]) == (*hashes, files)
    return is_same and all(os.path.isfile(out / file) for file in files)


def sha256(path: Path) -> str:
    """sha256 of a file's bytes.

    Raises:
        UsageError: It cannot be read.
    """
    from erasure.files import read_bytes
    from erasure.images import BYTES_LIMIT

    return hashlib.sha256(read_bytes(path, BYTES_LIMIT, error=UsageError)).hexdigest()


def read_rows(path: Path) -> dict[str, Row]:
    """Rows of a run, by the images' names; a last line that a killed process left half written is cut off.

    Raises:
        UsageError: The file is damaged.
    """
    from erasure.files import read_lines

    if not os.path.lexists(path):
        return {}
    lines: Iterator[Row] = read_lines(path, Row, torn=True, error=UsageError)
    rows = {row["image"]: row for row in lines}
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
    return rows


def add_row(path: Path, row: Row) -> None:
    """Write a line, so that it is on the disk.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        with open(path, "ab") as file:
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UsageError(f"cannot write to {path}: {error.strerror or error}; make room, and run it again") from error


@contextlib.contextmanager
def naming_warnings(terminal: Terminal) -> Iterator[list[str]]:
    """Warnings inside of the block name the image, which is the one item of the list that this yields."""
    named = [""]

    def tell(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
        line: str | None = None,
    ) -> None:  # fmt: skip
        terminal.warn(f"{named[0]}: {message}", category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=UserWarning)
        for once in (BypassedErasureWarning, ExperimentalWarning):  # they hold for all images alike
            warnings.filterwarnings("default", category=once)
        warnings.showwarning = tell
        yield named


def summary_rows(
    tasks: Sequence[Task], done: dict[str, Row], before: set[str], failed: dict[str, str]
) -> list[dict[str, object]]:
    """What the summary says of every image."""
    summary: list[dict[str, object]] = []
    for task in tasks:
        row = done.get(task.name)
        result = "failed" if row is None else "done before" if task.name in before else "done"
        summary.append(
            {
                "image": task.name, "result": result, "seconds": 0.0 if row is None else row["seconds"],
                "note": failed.get(task.name, ""), "files": [] if row is None else [*map(str, task.files)],
                "words": {} if row is None else row["words"],
            }
        )  # fmt: skip
    return summary
