"""Commands on a tiny pipeline: what they write, print and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from erasure import Erasure, __version__
from erasure.cli.main import main
from erasure.cli.models import canvas_facts, make_concepts
from erasure.world import World


def run_json(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    """Run a command that must succeed, and read what it prints as JSON."""
    code = main([*arguments, "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err
    return json.loads(said.out)


@pytest.fixture(scope="module")
def cat(tiny_pipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erasure of the tiny pipeline, made by the command."""
    folder = tmp_path_factory.mktemp("erasures") / "cat"
    assert main(["erase", "uce", "--model", str(tiny_pipe_folder), "--concept", "cat", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def stopped(capsys: pytest.CaptureFixture[str]):
    """Run a command that must stop with exit code 2, and give its one line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        code = main(list(arguments))
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        return said.err

    return run


def test_strategies(capsys):
    rows = run_json(["strategies"], capsys)
    names = [row["name"] for row in rows]
    assert {"hirm", "uce"} <= set(names)
    for row in rows:
        assert all(row[key] for key in ("what", "needs", "protects", "cost", "paper", "options")), row["name"]
        assert all(set(preset) <= set(row["options"]) for preset in row["presets"].values())
    assert main(["strategies"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in names)


def test_erase_help_has_options_of_the_strategy(capsys):
    with pytest.raises(SystemExit) as end:
        main(["erase", "hirm", "--help"])
    assert not end.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert all(flag in said for flag in ("--concept", "--steps", "--retain-weight", "--preset", "--out"))
    assert "Number of optimiser steps" in said


def test_erase_help_lists_strategies(capsys):
    assert main(["erase", "--help"]) == 0
    said = capsys.readouterr().out
    assert "hirm" in said
    assert "uce" in said


def test_erase_writes_an_erasure(tiny_pipe_folder: Path, tmp_path: Path, capsys):
    out = tmp_path / "made"
    arguments = ["erase", "hirm", "--model", str(tiny_pipe_folder), "--concept", "ink", "--kind", "style"]
    options = ["--anchor", "photo", "--retain", "pixel", "noto", "--steps", "2", "--seed", "3", "--out", str(out)]
    summary = run_json([*arguments, *options], capsys)
    assert summary["folder"] == str(out)
    assert summary["strategy_config"]["steps"] == 2
    assert summary["seed"] == 3
    (concept,) = summary["concepts"]
    assert (concept["target"], concept["kind"], concept["anchor"]) == ("ink", "style", "photo")
    assert concept["retain"] == ["pixel", "noto"]
    assert sum(file.stat().st_size for file in out.iterdir()) == pytest.approx(summary["bytes"], rel=0.01)


def test_erase_preset_and_single_options(tiny_pipe_folder: Path, tmp_path: Path, capsys):
    arguments = ["erase", "hirm", "--model", str(tiny_pipe_folder), "--concept", "cat", "--preset", "paper-s-object"]
    summary = run_json([*arguments, "--steps", "1", "--out", str(tmp_path / "made")], capsys)
    config = summary["strategy_config"]
    assert config["steps"] == 1
    assert config["lr"] == 5e-5
    assert config["templates"] is False


def test_erase_is_the_same_for_the_same_seed(tiny_pipe_folder: Path, tmp_path: Path, capsys):
    arguments = ["erase", "hirm", "--model", str(tiny_pipe_folder), "--concept", "cat", "--steps", "2", "--seed", "5"]
    for name in ("first", "second"):
        run_json([*arguments, "--out", str(tmp_path / name)], capsys)
    first, second = (sorted((tmp_path / name).glob("*.safetensors")) for name in ("first", "second"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]
    assert first


def test_erase_several_concepts(tiny_pipe_folder: Path, tmp_path: Path, capsys):
    arguments = ["erase", "uce", "--model", str(tiny_pipe_folder), "--concept", "cat", "--concept", "dog", "car"]
    summary = run_json([*arguments, "--out", str(tmp_path / "made")], capsys)
    assert [concept["target"] for concept in summary["concepts"]] == ["cat", "dog", "car"]


def test_erase_says_what_it_takes_for_an_object(tiny_pipe_folder: Path, tmp_path: Path, capsys) -> None:
    erase = ["erase", "uce", "--model", str(tiny_pipe_folder), "--vocabulary", "4", "--overwrite"]
    rows = tmp_path / "rows.csv"
    rows.write_text("concept,kind,templates\nmug,,\nink,style,\nAda,,{};a photo of {}\n")
    for given, said in (
        (["--concept", "Van Gogh"], "'Van Gogh': taken for an object, with prompts such as 'a photo of a Van Gogh'. "),
        (["--concept", "café", "tall trees"], "'café', 'tall trees': taken for objects, with prompts such as "),
        (["--concepts", str(rows)], "'mug': taken for an object"),
        (["--concepts", str(rows), "--kind", "object"], ""),
        (["--concept", "Van Gogh:style"], ""),
        (["--concept", "Van Gogh", "--kind", "style"], ""),
        (["--concept", "Ada Lovelace", "--concept-templates", "{}", "a photo of {}"], ""),
    ):
        assert main([*erase, *given, "--out", str(tmp_path / "made")]) == 0
        out = capsys.readouterr().out
        assert out.startswith(said)
        assert ("taken for" in out) == ("--kind style; for other prompts" in out) == bool(said)


def test_erase_with_templates(tiny_pipe_folder: Path, tmp_path: Path, capsys, stopped) -> None:
    erase = ["erase", "uce", "--model", str(tiny_pipe_folder), "--vocabulary", "4", "--concept", "Ada Lovelace", "mug"]
    rows = tmp_path / "rows.csv"
    rows.write_text("concept,templates\nGrace Hopper,the face of {}\n")
    own = ["--concepts", str(rows), "--concept-templates", "{}", "a photo of {}", "--anchor", ""]
    concepts = run_json([*erase, *own, "--out", str(tmp_path / "made")], capsys)["concepts"]
    given = ["{}", "a photo of {}"]
    assert [concept["templates"] for concept in concepts] == [given, given, ["the face of {}"]]
    assert [concept["anchor"] for concept in concepts] == ["", "", ""]
    assert "needs exactly one {}" in stopped(*erase, "--concept-templates", "a photo", "--out", str(tmp_path / "two"))


def test_erase_keeps_what_is_there(tiny_pipe_folder: Path, cat: Path, tmp_path: Path, stopped):
    arguments = ["erase", "uce", "--model", str(tiny_pipe_folder), "--concept", "dog"]
    before = {file.name: file.read_bytes() for file in cat.iterdir()}
    assert "--overwrite" in stopped(*arguments, "--out", str(cat))
    assert {file.name: file.read_bytes() for file in cat.iterdir()} == before
    copy = tmp_path / "copy"
    shutil.copytree(cat, copy)
    assert main([*arguments, "--out", str(copy), "--overwrite"]) == 0
    assert (copy / "erasure_config.json").read_bytes() != before["erasure_config.json"]


def test_erase_refuses_before_work(tiny_pipe_folder: Path, tmp_path: Path, stopped):
    model = ["--model", str(tiny_pipe_folder), "--out", str(tmp_path / "made")]
    assert "empty" in stopped("erase", "uce", *model, "--concept", " ")
    assert "synonyms" in stopped("erase", "uce", *model, "--concept", "cat", "dog", "--synonyms", "kitten")
    assert "no-such-model" in stopped("erase", "uce", "--model", "no-such-model", "--concept", "cat")
    assert not (tmp_path / "made").exists()


def test_info(cat: Path, capsys):
    found = run_json(["info", str(cat)], capsys)
    assert found["config"]["strategy"] == "uce"
    assert found["config"]["concepts"][0]["target"] == "cat"
    assert found["bytes"] > 0
    assert found["tensors"]
    assert all(row["form"] in ("low-rank", "full-rank") for row in found["tensors"])
    assert main(["info", str(cat)]) == 0
    said = capsys.readouterr().out
    assert "cat (object)" in said
    assert "uce" in said


def test_info_of_a_damaged_erasure(cat: Path, tmp_path: Path, stopped):
    broken = tmp_path / "broken"
    shutil.copytree(cat, broken)
    tensors = next(broken.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-10])
    assert "damaged" in stopped("info", str(broken))


@pytest.mark.parametrize(
    "command",
    [
        ["info", "canvas-sd"], ["generate", "--model", "m", "--prompt", "p", "--erasure", "canvas-sd", "--out", "o"],
        ["export", "canvas-sd", "--to", "kohya", "--out", "o.safetensors"],
    ],
)  # fmt: skip
def test_an_embedded_model_is_no_erasure(command: list[str], stopped) -> None:
    assert "'canvas-sd' is no erasure, but an embedded model: name it as --model" in stopped(*command)


def test_generate(tiny_pipe_folder: Path, cat: Path, tmp_path: Path, capsys):
    arguments = ["generate", "--model", str(tiny_pipe_folder), "--prompt", "a cat", "a dog", "--count", "2"]
    arguments += ["--steps", "2", "--guidance", "2", "--seed", "7"]
    stock = run_json([*arguments, "--out", str(tmp_path / "stock")], capsys)
    erased = run_json([*arguments, "--out", str(tmp_path / "erased"), "--erasure", str(cat)], capsys)
    assert [image["seed"] for image in stock["images"]] == [7, 8, 7, 8]
    assert len({image["file"] for image in stock["images"]}) == 4
    assert stock["num_inference_steps"] == 2
    pixels = [Image.open(run["images"][0]["file"]).tobytes() for run in (stock, erased)]
    assert pixels[0] != pixels[1]


def test_pictures_say_what_made_them(tiny_pipe_folder: Path, cat: Path, tmp_path: Path, capsys, stopped):
    arguments = ["generate", "--model", str(tiny_pipe_folder), "--prompt", "a cat", "--steps", "2", "--seed", "7"]
    arguments += ["--erasure", str(cat), "--strength", "0.5"]
    (image,) = run_json([*arguments, "--out", str(tmp_path / "images")], capsys)["images"]
    said = run_json(["info", image["file"]], capsys)
    made = Erasure.load(cat)
    assert said["erasures"] == [
        {"name": made.name, "strategy": "uce", "fingerprint": made.fingerprint, "strength": 0.5}
    ]
    assert (said["command"], said["prompt"], said["seed"], said["version"]) == ("generate", "a cat", 7, __version__)
    assert said["model"] == tiny_pipe_folder.name, "a folder's place is nobody else's to know"
    assert said["settings"]["num_inference_steps"] == 2
    assert main(["info", image["file"]]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("a cat", made.fingerprint, "0.5", said["fingerprint"]))
    (hidden,) = run_json([*arguments, "--omit-prompt", "--out", str(tmp_path / "hidden")], capsys)["images"]
    assert "prompt" not in run_json(["info", hidden["file"]], capsys)
    assert main(["info", hidden["file"]]) == 0
    assert "left out" in capsys.readouterr().out
    Image.open(image["file"]).save(tmp_path / "photo.jpg")
    assert "no PNG file" in stopped("info", str(tmp_path / "photo.jpg"))


def test_generate_with_strength_nought_is_stock(tiny_pipe_folder: Path, cat: Path, tmp_path: Path, capsys):
    arguments = ["generate", "--model", str(tiny_pipe_folder), "--prompt", "a cat", "--steps", "2"]
    stock = run_json([*arguments, "--out", str(tmp_path / "stock")], capsys)
    options = ["--erasure", str(cat), "--strength", "0"]
    erased = run_json([*arguments, *options, "--out", str(tmp_path / "erased")], capsys)
    first, second = (Image.open(run["images"][0]["file"]).tobytes() for run in (stock, erased))
    assert first == second


def test_generate_refuses(tiny_pipe_folder: Path, cat: Path, tmp_path: Path, stopped):
    arguments = ["generate", "--model", str(tiny_pipe_folder), "--prompt", "a cat", "--steps", "2"]
    assert "one for each" in stopped(
        *arguments, "--erasure", str(cat), "--strength", "1", "0.5", "--out", str(tmp_path / "images")
    )
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "mine.png").write_bytes(b"x")
    assert "--overwrite" in stopped(*arguments, "--out", str(tmp_path / "images"))
    assert "no-such" in stopped(*arguments, "--erasure", str(tmp_path / "no-such"), "--out", str(tmp_path / "new"))
    long = "a cat " * 17_000
    for words in (["--prompt", long], ["--prompt", "a cat", "--negative-prompt", long]):
        said = stopped("generate", "--model", "m", *words, "--out", str(tmp_path / "new"))
        assert "102,000 characters" in said
        assert "at most 20,000 are allowed" in said
        assert len(said) < 500
    assert not (tmp_path / "new").exists()


def test_generate_splits_the_images_over_processes(tiny_pipe_folder: Path, tmp_path: Path, monkeypatch):
    arguments = ["generate", "--model", str(tiny_pipe_folder), "--prompt", "a cat", "--steps", "1", "--count", "3"]
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main([*arguments, "--out", str(tmp_path / "images")]) == 0
        assert len(list((tmp_path / "images").iterdir())) == (2 if rank == "0" else 3)


def test_wrong_base(tiny_pipe_factory, cat: Path, tmp_path: Path, stopped):
    other = tmp_path / "other"
    tiny_pipe_factory(seed=1).save_pretrained(other)
    arguments = ["generate", "--model", str(other), "--erasure", str(cat), "--prompt", "a cat", "--steps", "1"]
    assert "error" in stopped(*arguments, "--out", str(tmp_path / "images"))


def test_bench(tiny_pipe_folder: Path, cat: Path, capsys):
    arguments = ["bench", "--model", str(tiny_pipe_folder), "--erasure", str(cat), "--steps", "1", "--repeats"]
    found = run_json([*arguments, "2"], capsys)
    (row,) = found["erasures"]
    assert row["bytes"] > 0
    assert row["time_ratio"]["attached"] > 0
    assert row["time_ratio"]["fused"] > 0
    assert row["attach_seconds"] > 0
    assert row["detach_seconds"] > 0
    assert row["erase_seconds"] > 0
    assert main([*arguments, "1"]) == 0
    assert "attached" in capsys.readouterr().out


def test_commands_read_the_world_of_the_model(tmp_path: Path):
    facts = {"objects": ["cat", "gun"], "styles": ["ink"], "unsafe": ["gun"]}
    (tmp_path / "canvas.json").write_text(json.dumps(facts))
    assert canvas_facts(str(tmp_path)) == facts
    assert make_concepts(("cat", "ink"), facts) == World.at(tmp_path).concepts(["cat", "ink"])
    assert make_concepts(("cat",), facts, "style")[0].kind == "style"
    assert canvas_facts("someone/some-model") == {}


@pytest.fixture
def measured(tmp_path: Path):
    """Write a `results.json` with one metric before and after into a new folder."""

    def write(name: str, value: float, recipe: dict[str, object], size: str = "quick") -> Path:
        base = {"name": "UA", "concept": "cat", "low": value - 0.05, "high": value + 0.05, "n": 50, "recipe": recipe}
        entry = {
            "name": name,
            "strategy": name,
            "concepts": ["cat"],
            "strength": 1.0,
            "size_bytes": 10,
            "seconds": 2.0,
        }
        results = {
            "schema_version": 1,
            "suite": "canvas",
            "size": size,
            "model": {"name": "tiny", "fingerprint": "f"},
            "erasures": [entry],
            "metrics": [base | {"variant": "before", "value": 0.1}, base | {"variant": "after", "value": value}],
            "cost": {},
        }
        folder = tmp_path / name
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    return write


def test_compare(measured, tmp_path: Path, capsys):
    folders = [str(measured("hirm", 0.9, {"seed": 0})), str(measured("uce", 0.8, {"seed": 0}))]
    found = run_json(["compare", *folders], capsys)
    after = {row["label"]: row["cells"]["UA"]["value"] for row in found["rows"] if row["variant"] == "after"}
    assert after == {"hirm": 0.9, "uce": 0.8}
    page = tmp_path / "both.html"
    assert main(["compare", *folders, "--out", str(page)]) == 0
    assert "0.900 [0.850, 0.950]" in capsys.readouterr().out
    assert "0.900 [0.850, 0.950]" in page.read_text()
    assert "http:" not in page.read_text()
    assert "https:" not in page.read_text()


def test_compare_fits_a_narrow_terminal_and_takes_labels(measured, tmp_path: Path, capsys, monkeypatch, stopped):
    monkeypatch.setenv("COLUMNS", "60")
    folders = [str(measured(f"a-long-name-of-a-run-{i}", 0.9, {"seed": 0})) for i in range(4)]
    assert main(["compare", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    for folder in folders:
        line = next(line for line in lines if Path(folder).name in line)
        assert "0.900 [0.850, 0.950]" in line
    assert main(["compare", *folders[:2], "--label", "one", "two"]) == 0
    assert {"base", "one", "two"} <= set(capsys.readouterr().out.split())
    assert "2 --label for 3 results" in stopped("compare", *folders[:3], "--label", "one", "two")
    assert "both labelled" in stopped("compare", *folders[:2], "--label", "one", "--label", "one")


def test_compare_refuses_unlike_recipes(measured, stopped):
    folders = [str(measured("hirm", 0.9, {"seed": 0})), str(measured("uce", 0.8, {"seed": 1}))]
    said = stopped("compare", *folders)
    assert "UA" in said
    assert "seed" in said


def test_compare_refuses_damaged_results(tmp_path: Path, stopped):
    (tmp_path / "results.json").write_text('{"schema_version": 1')
    assert "JSON" in stopped("compare", str(tmp_path))
