"""Judges that a user names: the folder of one, or an object of the user's own, looked at before anything is drawn."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval.samples import Sample
from erasure.eval.scoring import Judge, reason
from erasure.files import shown

ATTRIBUTE = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
"""`module:attribute`."""
EXPECTED = (
    "give the folder of a judge (config.json and model.safetensors, as the embedded canvas-judge), or "
    "module:attribute of a function or class of your own"
)


def load_judge(source: str | Path) -> Judge:
    """Load a judge: from a folder, by the name of an embedded one, or as `module:attribute`.

    A class is called without arguments. Modules are looked for in the working folder too. The judge is tried on a
    picture of coloured stripes, so that what cannot judge is refused before anything is drawn.

    Args:
        source: Folder, name, or `module:attribute`.

    Raises:
        ArtifactError: A folder that holds no judge, or a damaged one.
        EvaluationError: Nothing of that name, or something that does not answer as a judge does.
    """
    from erasure import assets

    text = str(source)
    folder = Path(source) if os.path.isdir(source) else assets.find(text)
    if folder is not None:
        judge = _from_folder(folder)
    elif ATTRIBUTE.fullmatch(text) and not os.path.lexists(text):
        judge = _from_module(*text.split(":"))
    else:
        what = "is a file" if os.path.lexists(source) else "is neither a folder nor of the form module:attribute"
        raise EvaluationError(f"the judge {shown(text, 200)} {what}: {EXPECTED}")
    check_judge(judge, text)
    return judge


def _from_folder(folder: Path) -> Judge:
    from erasure.eval.detectors import CanvasJudge

    judge = CanvasJudge(folder)
    judge.network  # noqa: B018  # weights that do not fit are refused now
    return judge


def _from_module(module: str, attribute: str) -> Judge:
    """Import an attribute of a module."""
    # The working folder is on the path of `python -m erasure`, but not of the program `erasure`.
    sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(module)
        for name in attribute.split("."):
            found = getattr(found, name)
        found = found() if isinstance(found, type) else found
    except Exception as error:  # a module of the user's may fail in any way
        raise EvaluationError(
            f"the judge {module}:{attribute} cannot be had ({reason(error)}): check that the module can be imported "
            f"from {shown(os.getcwd(), 200)}; {EXPECTED}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise EvaluationError(
            f"the judge {module}:{attribute} is a {type(found).__name__} that cannot be called: {EXPECTED}"
        )
    return cast(Judge, found)


def check_judge(judge: Judge, name: str) -> None:
    """Try a judge on two pictures of coloured stripes.

    Raises:
        EvaluationError: It fails, or its answers are not one for each picture with `.object` and `.style`.
    """
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::8], stripes[::16, :, 0] = 255, 200
    pictures = [Image.fromarray(stripes), Image.fromarray(stripes.transpose(1, 0, 2).copy())]
    wanted = (
        "a judge takes a list of PIL images and gives as many answers, each with .object and .style: the name of what "
        "it sees, or None"
    )
    try:
        answers: Sequence[object] = list(judge(pictures))
    except Exception as error:  # it may fail in any way
        raise EvaluationError(f"the judge {name} fails on a picture of stripes ({reason(error)}): {wanted}") from error
    if len(answers) != len(pictures):
        raise EvaluationError(f"the judge {name} gave {len(answers)} answers for {len(pictures)} pictures: {wanted}")
    for answer in answers:
        for field in ("object", "style"):
            if not hasattr(answer, field) or not isinstance(getattr(answer, field), str | None):
                raise EvaluationError(
                    f"the judge {name} answered {shown(repr(answer), 100)}, which has no .{field} that is a text or "
                    f"None: {wanted}"
                )


def check_classes(judge: Judge, samples: Sequence[Sample]) -> None:
    """Refuse a judge that declares its classes and lacks one that the prompts ask for.

    It would call everything else gone.

    Raises:
        EvaluationError: A class that the judge does not know.
    """
    objects: Sequence[str] | None = getattr(judge, "object_names", None)
    styles: Sequence[str] | None = getattr(judge, "style_names", None)
    asked = {
        "object": ({name for sample in samples for name in sample.objects}, objects),
        "style": ({sample.style for sample in samples if sample.style is not None}, styles),
    }
    for kind, (wanted, known) in asked.items():
        if known is not None and (unknown := sorted(wanted - set(known))):
            raise EvaluationError(
                f"the judge does not know the {kind} {shown(unknown[0])} that prompts of this suite ask for (nor "
                f"{len(unknown) - 1} more), and would call it gone; it knows {shown(sorted(known)[:8])}. Give a judge "
                "of the suite's world"
            )
