"""Galleries of a report: samples side by side, by what became of them; what may be unsafe is hidden."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from erasure.eval.rows import Row, flag_of
from erasure.eval.table import BEFORE_AFTER, image_path
from erasure.eval.thumbnails import mosaic, read_picture, thumbnail
from erasure.pages import webp
from erasure.shown import number

LIMIT = 60
"""Samples shown per section."""
Drawn = Mapping[str, Row]
"""Rows of one sample by variant: `before` and `after`, or the ways to draw it."""
TRANSITIONS: Mapping[tuple[bool | None, bool | None], tuple[str, str]] = {
    (False, True): ("Newly flagged", "Not flagged before, flagged after."),
    (True, True): ("Still flagged", "Flagged before and after."),
    (None, None): ("Cannot be judged", "The detector cannot say anything about one of the images at least."),
    (True, False): ("No longer flagged", "Flagged before, not flagged after."),
    (False, False): ("Never flagged", "Flagged neither before nor after."),
}
"""Title and description by what a detector says before and after; in the order of the page."""


class Picture(NamedTuple):
    """An image, and what was seen in it."""

    style: str
    state: str
    image: Markup
    label: str
    file: str
    """Path of the image beside the page; empty where the page lies elsewhere."""


class Figure(NamedTuple):
    """One sample: its images, and its prompt."""

    pictures: list[Picture]
    prompt: str
    veiled: bool


class Showing(NamedTuple):
    """Folder of a report's images, and which of them are hidden."""

    images: Path
    """Folder of the images of all variants."""
    telling: frozenset[str] = frozenset()
    """Detectors that only say which class an image shows, so that their flags say nothing of what is unsafe."""
    beside: bool = False
    """Whether the page lies beside that folder."""
    reveal: bool = False
    """Whether nothing is hidden."""


@dataclass(frozen=True)
class Gallery:
    """A grid of samples, one variant above the other."""

    title: str
    about: str
    figures: list[Figure]
    total: int
    folded: bool = False

    @classmethod
    def of(
        cls, title: str, about: str, drawn: Sequence[Drawn], showing: Showing, folded: bool = False, limit: int = LIMIT
    ) -> Gallery:  # fmt: skip
        """Make a gallery of a section's first samples that have an image of every variant."""
        figures = [made for sides in drawn[:limit] if (made := sample_figure(sides, showing))]
        return cls(title, about, figures, len(drawn), folded)


def transition_galleries(
    drawn: Sequence[Drawn], label: str, showing: Showing, limit: int = LIMIT
) -> list[Gallery]:  # fmt: skip
    """Group samples by a detector's flags before and after; groups that speak against the erasure come first.

    Args:
        drawn: Samples.
        label: Of the detector.
        showing: Where images are.
        limit: Samples shown per gallery.
    """
    groups: dict[tuple[bool | None, bool | None], list[Drawn]] = {pair: [] for pair in TRANSITIONS}
    for sides in drawn:
        if "before" not in sides:
            continue
        was = flag_of(sides["before"], label)
        is_ = flag_of(sides.get("after", sides["before"]), label)
        groups[(None, None) if was is None or is_ is None else (was, is_)].append(sides)
    found = []
    for pair, (title, about) in TRANSITIONS.items():
        told = f"{about} By {label}."
        found.append(Gallery.of(title, told, groups[pair], showing, pair == (False, False), limit))
    return found


def veiled(sides: Drawn, telling: frozenset[str] = frozenset()) -> bool:
    """Whether a sample's images are hidden.

    They do where the prompt may be unsafe, and where a detector does not say of every image that it is not flagged.

    Args:
        sides: Rows of the sample.
        telling: Detectors that only say which class an image shows.
    """
    return any(
        bool(row.get("unsafe"))
        or any(
            finding["flagged"] is not False
            for label, finding in (row.get("detected") or {}).items()
            if label not in telling
        )
        for row in sides.values()
    )


def sample_figure(sides: Drawn, showing: Showing) -> Figure | None:
    """One sample: images, what was seen, the prompt. `None` when an image is missing."""
    hidden = not showing.reveal and veiled(sides, showing.telling)
    pictures = [
        picture(row, showing, side, shade(side, index), hidden) for index, (side, row) in enumerate(sides.items())
    ]
    present = [made for made in pictures if made is not None]
    first = next(iter(sides.values()))
    return Figure(present, first["prompt"], hidden) if len(present) == len(pictures) else None


def picture(row: Row, showing: Showing, side: str, style: str, hidden: bool) -> Picture | None:
    """Embed an image as a data URI, with what was seen in it; as a mosaic where it is hidden."""
    image = read_picture(image_path(showing.images.parent, side, row["sample_id"]))
    if image is None:
        return None
    state = {True: "good", False: "bad", None: "unknown"}[right(row)]
    file = f"{showing.images.name}/{side}/{row['sample_id']}.png" if showing.beside else ""
    content = webp(mosaic(image) if hidden else thumbnail(image))
    return Picture(style, state, content, f"{side.replace('_', ' ')}: {answer_of(row, style == side)}", file)


def answer_of(row: Row, compares: bool) -> str:
    """Describe in a few words what was seen in an image.

    Args:
        row: The image's row.
        compares: Whether it is of a suite with before and after.
    """
    judged = row.get("judged")
    told = []
    if judged is not None and not row.get("detected"):
        told = [f"{judged['object']}, {judged['style']}" if compares else ", ".join(judged["objects"]) or "no object"]
    elif judged is not None and judged["object"] is not None:
        told = [", ".join(filter(None, (judged["object"], judged["style"])))]
    for label, finding in (row.get("detected") or {}).items():
        said = {True: "flagged", False: "no", None: "cannot say"}[finding["flagged"]]
        score = "" if finding["score"] is None else f" {number(finding['score'], '.2f')}"
        told.append(f"{label} {said}{score}")
    return "; ".join(told) or "not judged"


def right(row: Row) -> bool | None:
    """Whether an image is right: without the erased concept, or with the object and style of its prompt."""
    judged = row.get("judged")
    if judged is None:
        return None
    if len(row["objects"]) > 1:
        return set(row["objects"]) <= set(judged["objects"])
    if row.get("scene") and row.get("erased"):
        return not set(row["erased"]) & set(judged["objects"])
    if row.get("erased"):
        return not {judged["object"], judged["style"]} & set(row["erased"])
    wanted = [judged["object"] == name for name in row["objects"][:1]]
    return all([*wanted, row["style"] is None or judged["style"] == row["style"]])


def shade(variant: str, index: int) -> str:
    """Give the CSS class of a bar or an image; the variant that others are compared with is styled as `before`."""
    return variant if variant in BEFORE_AFTER else BEFORE_AFTER[min(index, 1)]
