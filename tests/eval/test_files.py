"""Files of evaluations that are hostile, damaged or of something else; full disks; two processes on one folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure.errors import ArtifactError, ErasureError, EvaluationError, OptionError, ResultsFolderError
from erasure.eval import Results, attack, compare, evaluate, replay, write_report
from erasure.eval.attacks.prompts import AdversarialPrompt, read_prompts, write_prompts
from erasure.eval.detectors import CanvasJudge
from erasure.eval.drawings import DrawingCache
from erasure.eval.metrics.clip_score import ClipModel
from erasure.eval.processes import Processes
from erasure.eval.run import opened
from erasure.eval.samples import Sample
from erasure.eval.schemas import AttackRow, EvaluationRow
from erasure.eval.scoring import KeptAnswer
from erasure.eval.suites import Target
from erasure.eval.table import SampleTable, image_path, read_rows
from erasure.images import png

NAMES = ["../../x", "/tmp/x", "a/b", "", "a\\b", "C:x", "a\0b", "x" * 300, "a\nb", "con"]
"""Ids that must not become the name of a file."""
SAMPLE = Sample("cat-0", "a cat", 7, "target", ("cat",), "ink", ("cat",), height=32, width=32)
JUDGED = {"object": "cat", "objects": ["cat"], "style": "ink"}
SCORES = {"judged": JUDGED, "clip_score": 0.25, "blank": False, "failures": {}}
MADE_BY = {"attack": "unlearndiffatk", "size": "quick", "options": {}, "model": "canvas-sd", "against": ["uce"]}
ANSWER = KeptAnswer("cat", ["cat"], "ink", None, {"cat": 0.75}, {"ink": 1.0}, {})
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
Break = Callable[[Path], object]

DEEP, LONG = b"[" * 5000 + b"]" * 5000, b"9" * 5000


def row(sample: Sample = SAMPLE, variant: str = "before") -> dict[str, Any]:
    fixed = {"sample_id": sample.sample_id, "variant": variant, **sample.row()}
    return {**fixed, **SCORES, "drift": None, "seconds": 0.5}


def attacked(sample: Sample = SAMPLE) -> dict[str, Any]:
    seen = {"judged": JUDGED, "shown": True}
    return {**sample.row(), "variant": "attack", "concept": "cat", "before": seen, "text": None, "after": None,
            "success": True, "texts": 0, "changed": 0, "cut": 0, "steps": 0, "losses": [], "images": 1,
            "references": 0, "failures": {}, "seconds": 1.5}  # fmt: skip


def results() -> Results:
    recipe = {"suite": "canvas", "size": "quick"}
    table = {"both": 1, "before_only": 0, "after_only": 9, "neither": 0}
    metrics = [
        {"name": "UA", "concept": "cat", "variant": side, "value": 0.5, "low": 0.4, "high": 0.6, "n": 10,
         "recipe": recipe} for side in ("before", "after")
    ]  # fmt: skip
    metrics[1] |= {"mcnemar_p": 0.5, "transitions": table, "missing": 1, "change": {"value": 0, "low": 0, "high": 1}}
    erasure = {"name": "cat", "strategy": "uce", "strength": 1.0, "size_bytes": 1000, "seconds": 2.0}
    cost = {"seconds": 1.0, "seconds_per_image": {"before": None, "after": 0.2}, "peak_memory_mb": 100.0}
    return Results("canvas", "quick", {"name": "canvas-sd", "fingerprint": "f"}, [erasure], metrics, cost)


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(each) + "\n" for each in rows)


def prompt_file(folder: Path, **changes: Any) -> Path:
    write_prompts(folder, [AdversarialPrompt(SAMPLE, "a c a t", Target("cat", "object", ("cat",)), MADE_BY)])
    file = folder / "adversarial.jsonl"
    file.write_text(lines(json.loads(file.read_text()) | changes))
    return file


# Names that become paths --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_others_write_nowhere_else(name: str, erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    file, out = prompt_file(tmp_path / "given", sample_id=name), tmp_path / "a" / "b" / "out"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EvaluationError, match=r"cannot be the name of a file|at (least|most)"):
        replay(erased_pipe, file, judge=judge, out=out, progress=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert not Path("/tmp/x.png").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_report_shows_no_other_files(name: str, tmp_path: Path) -> None:
    results().save(tmp_path / "out")
    (tmp_path / "x.png").write_bytes(png(IMAGE))
    for changes in ({"sample_id": name}, {"variant": name}):
        (tmp_path / "out" / "samples.jsonl").write_text(lines(row() | changes))
        with pytest.raises(EvaluationError, match=r"cannot be the name of a file|at (least|most)"):
            write_report(tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("link", ["images", "images/before", "images/before/cat-0.png"])
def test_a_report_follows_no_link_out_of_its_folder(link: str, tmp_path: Path) -> None:
    private, out = tmp_path / "private", tmp_path / "out"
    results().save(out)
    (out / "samples.jsonl").write_text(lines(row(), row(variant="after")))
    target = private.joinpath(*link.split("/")[1:])
    for place in ("images/before", "images/after"):
        inside = private / place.removeprefix("images/")
        inside.mkdir(parents=True)
        (inside / "cat-0.png").write_bytes(png(IMAGE))
        (out / place).mkdir(parents=True)
    for taken in sorted(out.glob(f"{link}/*/"), reverse=True):
        taken.rmdir()
    if (out / link).is_dir():
        (out / link).rmdir()
    (out / link).symlink_to(target)
    with pytest.raises(EvaluationError, match=r"leads out of .* through a link"):
        write_report(out)


def test_a_world_of_others_names_no_files(erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    """Objects of a model's `canvas.json` become sample ids."""
    file = tmp_path / "model" / "canvas.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"objects": ["../../cat", "dog", "gun"]}))
    with pytest.raises(EvaluationError, match="cannot be the name of a file"):
        evaluate(erased_pipe, concepts="dog", judge=judge, out=tmp_path / "out", progress=False, size="full",
                 baseline_cache=tmp_path / "cache")  # fmt: skip
    assert not (tmp_path / "out").exists()
    twice = {"objects": ["a b", "a_b"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | twice))
    with pytest.raises(EvaluationError, match="two samples are called 'a_b-ink-0'"):
        evaluate(erased_pipe, concepts="ink", judge=judge, out=tmp_path / "out", progress=False, size="full",
                 baseline_cache=tmp_path / "cache")  # fmt: skip


# Files of every kind ------------------------------------------------------------------------------------------------


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def as_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def field(name: str, text: bytes) -> Break:
    """Replace the value of the first field of a name in a JSON text."""

    def change(path: Path) -> None:
        content = path.read_bytes()
        start = content.index(b'"%s": ' % name.encode()) + len(name) + 4
        _, length = json.JSONDecoder().raw_decode(content[start:].decode())
        path.write_bytes(content[:start] + text + content[start + length :])

    return change


BROKEN: dict[str, Break] = {
    "a folder": as_folder,
    "a pipe": as_pipe,
    "a dangling link": as_dangling_link,
    "a device": as_device,
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes().rstrip()[:-9] + b"\n"),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4 + b"\n"),
    "a list": lambda path: path.write_bytes(b"[]\n"),
    "a number": lambda path: path.write_bytes(b"3\n"),
    "deep": lambda path: path.write_bytes(DEEP + b"\n"),
    "a long number": lambda path: path.write_bytes(LONG + b"\n"),
    "keys twice": lambda path: path.write_bytes(path.read_bytes().replace(b"{", b'{"zz": 1, "zz": 2, ', 1)),
    "unknown and deep": lambda path: path.write_bytes(path.read_bytes().replace(b"{", b'{"zz": ' + DEEP + b", ", 1)),
    "unknown and long": lambda path: path.write_bytes(path.read_bytes().replace(b"{", b'{"zz": ' + LONG + b", ", 1)),
    "unknown and NaN": lambda path: path.write_bytes(path.read_bytes().replace(b"{", b'{"zz": NaN, ', 1)),
    "a lone surrogate": lambda path: path.write_bytes(path.read_bytes().replace(b"{", rb'{"zz": "\ud800", ', 1)),
}
VALUES = (b"null", b"NaN", b"1e999", LONG, b"-1", b'"text"', b"{}", b"[[]]", b"true", rb'"\udfff"', DEEP)


def refused(read: Callable[[], object], path: Path, broken: Break, kind: type[ErasureError]) -> None:
    broken(path)
    with pytest.raises(kind) as caught:
        read()
    assert type(caught.value) is kind, caught.value
    assert 20 < len(str(caught.value)) < 2000


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_results(broken: str, tmp_path: Path) -> None:
    path = results().save(tmp_path)
    refused(lambda: Results.load(path), path, BROKEN[broken], EvaluationError)


@pytest.mark.parametrize("name", ["metrics", "erasures", "model", "cost", "suite", "n", "value", "low", "recipe",
                                  "transitions", "both", "missing", "change", "mcnemar_p", "strength", "size_bytes",
                                  "concept", "seconds_per_image", "peak_memory_mb"])  # fmt: skip
def test_values_of_results_have_types(name: str, tmp_path: Path) -> None:
    for text in VALUES:
        path = results().save(tmp_path)
        field(name, text)(path)
        try:
            # What can be loaded can be compared and shown.
            compare([Results.load(path)])
            write_report(tmp_path)
        except EvaluationError:
            continue
    results().save(tmp_path)
    assert Results.load(tmp_path) == results()


@pytest.mark.parametrize("broken", sorted(set(BROKEN) - {"empty"}))
def test_broken_rows(broken: str, tmp_path: Path) -> None:
    for schema, each in ((EvaluationRow, row()), (AttackRow, attacked())):
        path = tmp_path / f"{schema.__name__}.jsonl"
        path.write_text(lines(each))
        assert read_rows(path, schema) == [each]
        refused(lambda path=path, schema=schema: read_rows(path, schema), path, BROKEN[broken], ResultsFolderError)  # type: ignore[misc]


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_prompts(broken: str, tmp_path: Path) -> None:
    path = prompt_file(tmp_path)
    assert read_prompts(tmp_path)[0].sample == SAMPLE
    refused(lambda: read_prompts(path), path, BROKEN[broken], EvaluationError)


@pytest.mark.parametrize("name", [*SAMPLE.row(), "text", "target", "made_by"])
def test_values_of_prompts_have_types(name: str, tmp_path: Path) -> None:
    for text in VALUES:
        path = prompt_file(tmp_path)
        field(name, text)(path)
        try:
            (found,) = read_prompts(path)
        except EvaluationError:
            continue
        # What is left is a sample that can be drawn.
        assert Sample.from_row(found.sample.row()) == found.sample
    for name, value in (("seed", 2**64), ("height", 10**6), ("num_inference_steps", 0), ("seed", -1)):
        with pytest.raises(EvaluationError, match=name):
            read_prompts(prompt_file(tmp_path, **{name: value}))


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_cache_entry_is_none(broken: str, tmp_path: Path) -> None:
    cache = DrawingCache(tmp_path, {}, judge={}, clip={"clip": "c"})
    cache.put_image(SAMPLE, png(IMAGE))
    cache.put_answer(SAMPLE, ANSWER)
    cache.put_features(SAMPLE, 0.5, np.ones(4, dtype=np.float32))
    assert cache.answer(SAMPLE) == ANSWER
    assert cache.features(SAMPLE, 4) is not None
    assert cache.image(SAMPLE) is not None
    for kind, get in (("answers", cache.answer), ("clip", lambda sample: cache.features(sample, 4))):
        (entry,) = (path for path in cache.folder.glob(f"{kind}-*/*.json") if path.name != "recipe.json")
        BROKEN[broken](entry)
        assert get(SAMPLE) is None
    if not broken.startswith(("unknown", "keys", "a lone")):
        BROKEN[broken](cache.folder / f"{SAMPLE.key}.png")
        assert cache.image(SAMPLE) is None


def test_a_cache_entry_that_does_not_fit_is_none(tmp_path: Path) -> None:
    cache = DrawingCache(tmp_path, {}, judge={}, clip={"clip": "c"})
    cache.put_answer(SAMPLE, ANSWER)
    cache.put_features(SAMPLE, 0.5, np.array([1.0, 2.0]))
    assert cache.features(SAMPLE, 2) is not None
    assert cache.features(SAMPLE, 3) is None
    # All of an answer is kept, whatever a suite asks for.
    other = dataclasses.replace(SAMPLE, objects=("dog",), role="utility", sample_id="x")
    assert cache.answer(other) == ANSWER
    cache.put_features(SAMPLE, 0.5, np.array([1.0, np.nan]))
    assert cache.features(SAMPLE, 2) is None
    # Another judge or CLIP model has said nothing yet; the image is there for it.
    cache.put_image(SAMPLE, png(IMAGE))
    other = DrawingCache(tmp_path, {}, judge={"judge": "other"}, clip={"clip": "other"})
    assert other.answer(SAMPLE) is other.features(SAMPLE, 2) is None
    assert other.image(SAMPLE) is not None
    assert DrawingCache(tmp_path, {"model": "other"}).image(SAMPLE) is None
    # Nothing is kept of a judge of which nobody knows what it is.
    nameless = DrawingCache(tmp_path, {"model": "nameless"})
    nameless.put_answer(SAMPLE, ANSWER)
    assert nameless.answer(SAMPLE) is None


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_models_of_detectors_and_clip(broken: str, clip_folder: Path, tmp_path: Path) -> None:
    for source, make in ((CanvasJudge().folder, lambda f: CanvasJudge(f).network), (clip_folder, ClipModel)):
        for file in source.iterdir():
            if file.suffix not in (".json", ".safetensors"):
                continue
            if broken.startswith(("unknown", "keys", "a lone")) and file.suffix == ".safetensors":
                continue
            folder = tmp_path / file.name
            folder.mkdir()
            for each in source.iterdir():
                (folder / each.name).write_bytes(each.read_bytes())
            make(folder)
            refused(lambda make=make, folder=folder: make(folder), folder / file.name, BROKEN[broken], ArtifactError)  # type: ignore[misc]


def test_weights_of_another_judge_are_named_before_they_are_used(tmp_path: Path) -> None:
    source = CanvasJudge().folder
    names = json.loads((source / "config.json").read_text())
    for changes in ({"objects": names["objects"][1:]}, {"styles": [*names["styles"], "oil"]}):
        (tmp_path / "config.json").write_text(json.dumps(names | changes))
        (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        with pytest.raises(ArtifactError, match=r"does not go with config\.json"):
            _ = CanvasJudge(tmp_path).network
    (tmp_path / "config.json").write_text(json.dumps(names | {"objects": ["cat"] * len(names["objects"])}))
    with pytest.raises(ArtifactError, match="a name comes twice"):
        CanvasJudge(tmp_path)


def test_clip_without_safetensors_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    """open_clip would look for a pickle."""
    (tmp_path / "open_clip_config.json").write_bytes((clip_folder / "open_clip_config.json").read_bytes())
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ArtifactError, match=r"open_clip_model\.safetensors"):
        ClipModel(tmp_path)


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_world(broken: str, world_pipe: Any, tmp_path: Path) -> None:
    def read() -> None:
        evaluate(world_pipe, concepts="cat", out=tmp_path / "out", progress=False)

    refused(read, tmp_path / "model" / "canvas.json", BROKEN[broken], ArtifactError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\udfff", "no/such/folder"])
def test_paths_that_cannot_be(name: str, tmp_path: Path) -> None:
    for read in (Results.load, read_prompts, write_report):
        with pytest.raises(EvaluationError):
            read(tmp_path / name)


# Folders of a run ----------------------------------------------------------------------------------------------------


def table(folder: Path, rank: int = 0, processes: int = 1) -> SampleTable:
    return SampleTable(folder, [SAMPLE, Sample("cat-1", "a cat", 8, "target", style="ink")], rank, processes)


@pytest.mark.parametrize("broken", sorted(set(BROKEN) - {"a folder", "a dangling link", "unknown and deep"}))
def test_a_broken_recipe_is_named(broken: str, tmp_path: Path) -> None:
    with opened(Processes(), table, {"seed": 0}, tmp_path) as first:
        first.append([row()], [None])

    def open_it() -> None:
        with opened(Processes(), table, {"seed": 0}, tmp_path):
            pass

    refused(open_it, tmp_path / "recipe.json", BROKEN[broken], ResultsFolderError)
    assert read_rows(tmp_path / "samples.jsonl") == [row()]


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a dangling link", "a device"])
def test_rows_are_appended_to_plain_files_only(kind: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text("")
    BROKEN[kind](tmp_path / "samples.jsonl")
    with pytest.raises(EvaluationError, match="cannot write to"):
        table(tmp_path).append([row()], [None])
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("seed", [-1, 2**63, 10**5000], ids=["negative", "64 bits", "5,000 digits"])
def test_seeds_that_no_generator_takes(seed: int, world_pipe: Any, tmp_path: Path) -> None:
    for run in (evaluate, attack):
        with pytest.raises(OptionError, match=r"the seed is .*; allowed: a whole number, 0 or more and below 9223"):
            run(world_pipe, seed=seed)


def test_image_paths(tmp_path: Path) -> None:
    assert image_path(tmp_path, "before", "猫-ink 0") == tmp_path / "images" / "before" / "猫-ink 0.png"
