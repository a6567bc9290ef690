"""The cache of drawn images and of what was said of them: neither a second judge nor a second method redraws any.

An image depends on the model, the erasures in force and the sampler, and on nothing else: it is kept under these. What
a judge, a CLIP model and detectors say of it is kept beside it, each under its own fingerprint: all of it and not only
what a suite asks for, so that another suite, threshold or CLIP model asks nobody again who has answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from erasure.errors import ErasureError, EvaluationError
from erasure.eval.detectors.base import Reading
from erasure.eval.detectors.findings import Box
from erasure.eval.rows import Record
from erasure.eval.samples import Sample
from erasure.eval.schemas import AnswerEntry, ClipEntry, ReadingEntry
from erasure.eval.scoring import KeptAnswer
from erasure.eval.table import decode_vector, encode_vector
from erasure.files import digest, read_json, read_tensors, write_bytes, write_json
from erasure.images import read_rgb


def prompt_key(sample: Sample) -> str:
    """Fingerprint of what a plain call of the pipeline depends on; equal in every suite and role."""
    return sample.key


def whole_key(sample: Sample) -> str:
    """Fingerprint of everything about a sample, for suites that compose what they hand to a pipeline from it."""
    return digest(sample.row())


class DrawingCache:
    """Images of one model by what determines them, with what a judge, a CLIP model and detectors say of some.

    Any suite, size or concept that asks for the same prompt, noise and settings finds them. A file per sample, written
    atomically: several evaluations may share the folder at once.

    Args:
        root: Root of the cache.
        drawing: All that images depend on besides their sample: model, sampler, erasures, versions.
        judge: All that answers depend on besides the image; `None` keeps none.
        clip: All that features and scores depend on besides image and prompt; `None` keeps none.
        readings: All that a detector's readings depend on besides the image, by the detector's label.
        key: Name of a sample's files.

    Raises:
        EvaluationError: The folder cannot be written.
    """

    def __init__(
        self, root: Path, drawing: Record, *, judge: Record | None = None, clip: Record | None = None,
        readings: Mapping[str, Record] | None = None, key: Callable[[Sample], str] = prompt_key,
    ) -> None:  # fmt: skip
        self.folder, self.key = root / "drawings" / digest(drawing), key
        try:
            write_json(self.folder / "recipe.json", drawing, error=EvaluationError)
            self.answers = self._beside("answers", judge)
            self.clip = self._beside("clip", clip)
            self.readings = {
                label: folder
                for label, recipe in (readings or {}).items()
                if (folder := self._beside("readings", recipe)) is not None
            }
        except EvaluationError as error:
            raise EvaluationError(f"{error}; name another folder with baseline_cache or ERASURE_CACHE") from error

    def _beside(self, kind: str, recipe: Record | None) -> Path | None:
        if recipe is None:
            return None
        folder = self.folder / f"{kind}-{digest(recipe)}"
        write_json(folder / "recipe.json", recipe, error=EvaluationError)
        return folder

    def image(self, sample: Sample) -> Image.Image | None:
        """The image of a sample, if it is there and whole."""
        try:
            return read_rgb(self.folder / f"{self.key(sample)}.png", formats=("PNG",))
        except ErasureError:
            return None

    def put_image(self, sample: Sample, image: bytes) -> None:
        """Keep the image of a sample, a PNG file.

        Raises:
            EvaluationError: The folder cannot be written.
        """
        write_bytes(self.folder / f"{self.key(sample)}.png", image, error=EvaluationError)

    def tensors(self, sample: Sample) -> dict[str, Tensor] | None:
        """What is kept of a sample's drawing besides its image; `None` when that is not there or not whole."""
        try:
            return read_tensors(self.folder / f"{self.key(sample)}.safetensors", error=EvaluationError)
        except EvaluationError:
            return None

    def put_tensors(self, sample: Sample, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors of a sample's drawing besides its image.

        Raises:
            EvaluationError: The folder cannot be written.
        """
        write_bytes(self.folder / f"{self.key(sample)}.safetensors", save(dict(tensors)), error=EvaluationError)

    def answer(self, sample: Sample) -> KeptAnswer | None:
        """What the judge said of a sample's image; `None` when that is not there or not whole, to be asked again."""
        if self.answers is None:
            return None
        try:
            entry: AnswerEntry = read_json(self._entry(sample, self.answers), AnswerEntry, error=EvaluationError)
        except EvaluationError:
            return None
        return KeptAnswer(**entry)

    def put_answer(self, sample: Sample, answer: KeptAnswer) -> None:
        """Keep what the judge said of a sample's image.

        Raises:
            EvaluationError: The folder cannot be written.
        """
        if self.answers is not None:
            write_json(self._entry(sample, self.answers), asdict(answer), error=EvaluationError)

    def reading(self, sample: Sample, label: str) -> Reading | None:
        """What a detector's network said of a sample's image; `None` when that is not there or not whole."""
        if label not in self.readings:
            return None
        try:
            entry: ReadingEntry = read_json(
                self._entry(sample, self.readings[label]), ReadingEntry, error=EvaluationError
            )
        except EvaluationError:
            return None
        return Reading(entry["scores"], {name: Box(*sides) for name, sides in entry["boxes"].items()})

    def put_reading(self, sample: Sample, label: str, reading: Reading) -> None:
        """Keep what a detector's network said of a sample's image.

        Raises:
            EvaluationError: The folder cannot be written.
        """
        if label in self.readings:
            entry = {
                "scores": dict(reading.scores),
                "boxes": {name: list(box) for name, box in reading.boxes.items()},
            }
            write_json(self._entry(sample, self.readings[label]), entry, error=EvaluationError)

    def features(self, sample: Sample, width: int) -> tuple[float, np.ndarray] | None:
        """CLIP score and image features of a sample; `None` when they are not there or not whole, to be had again.

        Args:
            sample: Which.
            width: Of the features.
        """
        if self.clip is None:
            return None
        try:
            entry: ClipEntry = read_json(self._entry(sample, self.clip), ClipEntry, error=EvaluationError)
            vector = decode_vector(entry["features"])
        except EvaluationError:
            return None
        return (entry["clip_score"], vector) if len(vector) == width else None

    def put_features(self, sample: Sample, cosine: float, vector: np.ndarray) -> None:
        """Keep the CLIP score and image features of a sample.

        Raises:
            EvaluationError: The folder cannot be written.
        """
        if self.clip is not None:
            entry = {"clip_score": cosine, "features": encode_vector(vector)}
            write_json(self._entry(sample, self.clip), entry, error=EvaluationError)

    def _entry(self, sample: Sample, folder: Path) -> Path:
        return folder / f"{self.key(sample)}.json"
