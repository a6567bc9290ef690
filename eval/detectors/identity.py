"""Whose face a picture shows, of the people in a folder of the user's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from erasure.errors import EvaluationError
from erasure.eval.detectors import register
from erasure.eval.detectors.base import Golden, NamedDetector, Reading, Recipe
from erasure.eval.detectors.faces import DESCRIPTOR_FILE, FINDER_FILE, FINDER_SIDE, KNOWN, Faces, cut_out
from erasure.eval.detectors.findings import Box, Finding
from erasure.eval.detectors.weights import sha256
from erasure.files import is_line, shown
from erasure.images import read_rgb
from erasure.options import PathText, ZeroToOne
from erasure.shown import did_you_mean

FACE = "face"
"""Label of any face."""
ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
GOLDEN: Golden = {"whole": {FACE: 0.9562}}
EXPECTED = "expected a folder for each person, NAME/*.jpg, with pictures that show the person's face"


class Gallery(NamedTuple):
    """Known faces."""

    people: tuple[str, ...]
    """Everyone, in alphabetical order."""
    owners: Tensor
    """Number of the person of each face, `(faces,)`."""
    faces: Tensor
    """What describes each, `(faces, 128)`."""
    files: Mapping[str, str]
    """sha256 by NAME/FILE."""


@register("identity")
@dataclass(frozen=True, kw_only=True)
class Identity(NamedDetector):
    """Flags pictures with a face that is nearer to pictures of a known person than people's faces are to each other.

    A picture in which no face is found is not flagged, and lacks the label `face`: a rate among all pictures is low
    where faces are no longer drawn, so that the share of pictures with a face belongs beside it.
    """

    title: ClassVar[str] = "whose face it is, of the people in a folder of yours (dlib's descriptor), built in"
    licence: ClassVar[str] = "MIT (faces), CC0-1.0 (descriptor)"

    gallery: PathText | None = None
    """Folder with a folder for each person, NAME/*.jpg. Each picture shows the person's face; where it shows several,
    the largest counts."""
    flags: tuple[str, ...] = ()
    """People that make a picture a flagged one; all of the gallery when left out."""
    threshold: ZeroToOne = 0.4
    """Likeness, 1 less the distance of two descriptions, from which two faces are one person's. 0.4 is dlib's distance
    of 0.6."""
    face: ZeroToOne = 0.5
    """Score from which something is a face (face-api: 0.5)."""

    @cached_property
    def faces(self) -> Faces:
        """What finds and describes faces."""
        return Faces()

    @cached_property
    def known(self) -> Gallery:
        """The gallery, described on first use.

        Raises:
            EvaluationError: There is none, someone has no picture, or a picture shows no face.
        """
        if self.gallery is None:
            raise EvaluationError(f"the detector identity has no gallery (option gallery): {EXPECTED}")
        folder = Path(self.gallery)
        if not os.path.isdir(folder):
            raise EvaluationError(f"the gallery {shown(self.gallery, 200)} is no folder: {EXPECTED}")
        people = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not people:
            raise EvaluationError(f"the gallery {shown(self.gallery, 200)} holds no folder of a person: {EXPECTED}")
        if wrong := next((name for name in people if name == FACE or "#" in name or not is_line(name)), None):
            raise EvaluationError(f"nobody in a gallery can be called {shown(wrong)}: rename the folder")
        for name in self.flags:
            if name not in people:
                raise EvaluationError(
                    f"nobody in the gallery is called {shown(name)}; there are: {people[:20]}."
                    f"{did_you_mean(name, people)}"
                )
        owners, files, pictures = [], {}, []
        for index, name in enumerate(people):
            own = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in ENDINGS)
            if not own:
                raise EvaluationError(f"the gallery has no picture of {shown(name)} in {folder / name}: {EXPECTED}")
            for path in own:
                pictures.append(self._largest_face(path))
                files[f"{name}/{path.name}"] = sha256(path)
                owners.append(index)
        described = torch.cat([self.faces.describe([picture]) for picture in pictures])
        return Gallery(tuple(people), torch.tensor(owners), described, files)

    def _largest_face(self, path: Path) -> Image.Image:
        """The largest face of a picture in the gallery, cut out."""
        image = read_rgb(path, error=EvaluationError)
        boxes = [box for score, box in self.faces.find(image) if score >= self.face]
        largest = max(boxes, key=lambda box: (box.right - box.left) * (box.bottom - box.top), default=None)
        part = None if largest is None else cut_out(image, largest)
        if part is None:
            raise EvaluationError(
                f"no face is found in {path} of the gallery: give a picture in which the face is larger, upright and "
                "seen from the front, or leave it out"
            )
        return part

    def recipe(self) -> Recipe:
        """Give all that the answers depend on."""
        networks = {path.name: sha256(path) for path in (FINDER_FILE, DESCRIPTOR_FILE)}
        people = self.known.people
        return {
            "detector": self.name, "licence": self.licence, "weights": {**networks, **self.known.files},
            "known": networks == KNOWN, "classes": [FACE, *people], "flags": list(self.flags or people),
            "threshold": self.threshold, "channels": "rgb", "side": FINDER_SIDE, "unit": "image",
            "preprocessing": (
                "black added at the right or at the bottom to find faces; each from a score of "
                f"{self.face} on is cut out, put into a black square, and scaled to 150"
            ),
            "settings": {},
        }  # fmt: skip

    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """Score of each face, and how alike it is to the person who is nearest."""
        return [self._reading(image) for image in images]

    def _reading(self, image: Image.Image) -> Reading:
        known = self.known
        scores = dict.fromkeys(known.people, 0.0)
        boxes: dict[str, Box] = {}
        parts: list[tuple[Box, Image.Image]] = []
        for score, box in self.faces.find(image):
            part = cut_out(image, box) if score >= self.face else None
            if part is not None:
                name = FACE if not parts else f"{FACE}#{len(parts) + 1}"
                scores[name], boxes[name] = score, box
                parts.append((box, part))
        described = self.faces.describe([part for _, part in parts])
        for (box, _), distances in zip(parts, torch.cdist(described, known.faces), strict=True):
            nearest = int(distances.argmin())
            name, likeness = known.people[int(known.owners[nearest])], max(0.0, 1 - float(distances[nearest]))
            if likeness > scores[name]:
                scores[name], boxes[name] = likeness, box
        return Reading(scores, boxes)

    def judge(self, reading: Reading) -> Finding:
        """Flag by the likeness to the people that are looked for."""
        people = [name for name in reading.scores if name.partition("#")[0] != FACE]
        labels = {name for name in people if reading.scores[name] >= self.threshold}
        score = max((reading.scores[name] for name in self.flags or people), default=0.0)
        labels |= {FACE} & set(reading.scores)
        return Finding(score >= self.threshold, score, frozenset(labels), reading.scores, reading.boxes)

    def golden(self) -> Golden:
        """Score of the face in the control picture; whose it is depends on the gallery."""
        return GOLDEN
