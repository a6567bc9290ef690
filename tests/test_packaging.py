"""The wheel holds exactly what the tree holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from erasure.extras import REQUIREMENTS

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"erasure": "erasure", "pipelines": "erasure/pipelines", "eval": "erasure/eval", "assets": "erasure/assets"}
"""Where each folder of the tree is in the wheel."""
LEFT_OUT = {f"erasure/assets/{name}.png" for name in ("demo", "families", "removal", "words")}
"""Only for the README and the pages in docs."""


def module_of(requirement: str) -> str:
    """The module that a requirement of pip brings."""
    name = re.split(r"[\[<>=]", requirement)[0].replace("-", "_")
    return {"scikit_image": "skimage"}.get(name, name)


def files_of(folder: Path) -> set[str]:
    """Files below a folder, without what Python leaves there."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix() for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that the tree stays as it is."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not in a source tree")
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(copy / "dist" / done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not in a source tree")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_extras_and_errors_name_the_same_packages(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    named = {line for lines in extras.values() for line in lines}
    for package, requirement in REQUIREMENTS.items():
        assert module_of(requirement) == package
        assert requirement in named or requirement == package, f"no extra installs {requirement}"


def test_every_extra_is_used(project: dict[str, Any]) -> None:
    """Something imports what an extra installs; `xformers` is chosen through diffusers, MkDocs loads its theme."""
    extras = project["project"]["optional-dependencies"]
    sources = "\n".join(file.read_text() for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
    for name in set(extras) - {"test", "dev"}:
        for line in extras[name]:
            package = module_of(line)
            known = package in REQUIREMENTS or package in ("mkdocs_material", "xformers")
            assert known or re.search(rf"^\s*(import|from) {package}\b", sources, re.MULTILINE), (name, package)


def test_the_page_says_what_is_installed(project: dict[str, Any]) -> None:
    """Whoever adds a dependency says so where people look before they install."""
    page = (ROOT / "docs/getting-started.md").read_text().partition("## What is installed\n")[2]
    listed, _, rest = page.partition("The wheel has")
    direct = [re.split(r"[\[<>=]", requirement)[0] for requirement in project["project"]["dependencies"]]
    assert re.findall(r"`([\w-]+)`", listed) == direct
    rows = re.findall(r"^\| (`.*?) \|", rest, re.MULTILINE)
    extras = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(extras) == sorted(project["project"]["optional-dependencies"])


def test_every_marker_is_used(project: dict[str, Any]) -> None:
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("*.py"))
    for marker in project["tool"]["pytest"]["ini_options"]["markers"]:
        assert f"pytest.mark.{marker.partition(':')[0]}" in tests, marker


def test_wheel_holds_the_tree(wheel: zipfile.ZipFile):
    expected = {f"{inside}/{file}" for folder, inside in FOLDERS.items() for file in files_of(ROOT / folder)}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected - LEFT_OUT


def test_wheel_is_as_large_as_the_page_says(wheel: zipfile.ZipFile):
    """An index of packages takes 100 MB at most, and users wait for all of it."""
    models = sum(each.compress_size for each in wheel.infolist() if each.filename.startswith("erasure/assets/"))
    whole = Path(wheel.filename or "").stat().st_size
    said = re.search(r"The wheel has (\d+) MB, of which (\d+) MB", (ROOT / "docs/getting-started.md").read_text())
    assert said is not None
    assert [whole / 1e6, models / 1e6] == pytest.approx([int(number) for number in said.groups()], abs=1)
    assert whole < 100e6


def test_wheel_has_models_types_and_licences(wheel: zipfile.ZipFile):
    names = set(wheel.namelist())
    assert "erasure/py.typed" in names
    assert "erasure/assets/canvas-sd/model_index.json" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith(".dist-info/licenses/assets/LICENSES.md") for name in names)


def test_wheel_has_the_command(wheel: zipfile.ZipFile):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "erasure = erasure.cli.main:main" in wheel.read(name).decode()


def test_version_is_that_of_the_package(wheel: zipfile.ZipFile):
    from erasure import __version__

    assert f"erasure_diffusers-{__version__}-" in Path(wheel.filename or "").name


def test_wheel_runs_without_the_sources(wheel: zipfile.ZipFile, tmp_path: Path):
    wheel.extractall(tmp_path)
    code = "import erasure, erasure.eval, erasure.assets as a; print(erasure.__file__, a.path('canvas-scenes'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert all(part.startswith(str(tmp_path)) for part in done.stdout.split())
