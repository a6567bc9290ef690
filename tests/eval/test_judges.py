"""Judges that a user names: what is found, and what is refused before anything is drawn."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from erasure import assets
from erasure.errors import ArtifactError, ErasureError, EvaluationError
from erasure.eval.detectors import CanvasJudge
from erasure.eval.judges import check_classes, load_judge
from erasure.eval.samples import Sample

MODULE = """
from types import SimpleNamespace as Answer

def judge(images):
    return [Answer(object="cat", style=None) for _ in images]

class Judge:
    class Inner:
        def __call__(self, images):
            return [Answer(object=None, style="ink") for _ in images]

class Needs:
    def __init__(self, weights): ...

def none(images): return None
def few(images): return [Answer(object="cat", style=None)]
def plain(images): return ["cat" for _ in images]
def numbers(images): return [Answer(object=3, style=None) for _ in images]
def fails(images): raise RuntimeError("no weights")
def no_arguments(): return []
value = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's in the working folder."""
    (tmp_path / "my_judges.py").write_text(MODULE)
    (tmp_path / "my_broken_judges.py").write_text("import a_module_that_nobody_has")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield "my_judges"
    assert sys.path == before
    for name in ("my_judges", "my_broken_judges"):
        sys.modules.pop(name, None)


def test_functions_and_classes_of_a_module_are_found(module: str) -> None:
    pictures = [Image.new("RGB", (8, 8))] * 2
    assert [answer.object for answer in load_judge(f"{module}:judge")(pictures)] == ["cat", "cat"]
    assert [answer.style for answer in load_judge(f"{module}:Judge.Inner")(pictures)] == ["ink", "ink"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_judges:nothing", "cannot be had .*no attribute 'nothing'"),
        ("my_judges:Needs", "cannot be had .*weights"),
        ("my_judges:value", "is a int that cannot be called"),
        ("my_judges:none", "fails on a picture of stripes"),
        ("my_judges:few", "1 answers for 2 pictures"),
        ("my_judges:plain", "has no .object that is a text or None"),
        ("my_judges:numbers", "has no .object that is a text or None"),
        ("my_judges:fails", "RuntimeError: no weights"),
        ("my_judges:no_arguments", "TypeError"),
        ("my_broken_judges:judge", "a_module_that_nobody_has"),
        ("no_such_module:judge", "No module named 'no_such_module'"),
        ("my_judges", "neither a folder nor of the form module:attribute"),
        ("my_judges.py", "is a file"),
        ("my judges:judge", "neither a folder"),
        ("", "neither a folder"),
    ],
)
def test_what_is_no_judge_is_refused_in_words(name: str, said: str, module: str) -> None:
    with pytest.raises(EvaluationError, match=said):
        load_judge(name)


def test_folders_of_judges_are_found_and_checked(tmp_path: Path) -> None:
    assert isinstance(load_judge("canvas-judge"), CanvasJudge)
    folder = tmp_path / "judge"
    shutil.copytree(assets.path("canvas-judge"), folder)
    assert load_judge(folder)([Image.new("RGB", (64, 64))])[0].object in CanvasJudge(folder).object_names
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"objects": config["objects"][:-1]}))
    # Weights are looked at now, not when the first image has been drawn.
    with pytest.raises(ArtifactError, match=r"does not go with config\.json"):
        load_judge(folder)
    (folder / "model.safetensors").unlink()
    for path in (folder, tmp_path):
        with pytest.raises(ErasureError, match=r"config\.json|model\.safetensors"):
            load_judge(path)


def test_a_judge_that_does_not_know_what_is_asked_is_refused() -> None:
    samples = [Sample("cat-0", "a cat", 0, "target", ("cat",), "ink")]
    judge: Any = SimpleNamespace(object_names=["cat"], style_names=["ink"])
    check_classes(judge, samples)
    check_classes(SimpleNamespace(), samples)  # type: ignore[arg-type]
    for unlike, kind in (({"object_names": ["dog"]}, "object 'cat'"), ({"style_names": ["noto"]}, "style 'ink'")):
        with pytest.raises(EvaluationError, match=f"does not know the {kind}"):
            check_classes(SimpleNamespace(**(vars(judge) | unlike)), samples)  # type: ignore[arg-type]
