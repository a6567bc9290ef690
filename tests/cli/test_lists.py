"""Files of prompts and of concepts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erasure.cli.arguments import UsageError
from erasure.cli.generate import GenerateOptions, draw
from erasure.cli.lists import PromptRow, is_list_file, read_concepts, read_prompts
from erasure.cli.main import main
from erasure.parsing import ConceptRequest

UCE = "case_number,prompt,class,evaluation_seed\n861,an image of a cat,cat,4188\n862,an image of a dog,dog,4189\n"
I2P = (
    "prompt,categories,hard,nudity_percentage,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\n"
    '"a cat, ""big""",shocking,0,1.5,3,7.5,512,768\n'
)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a file and give its path."""

    def writer(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return writer


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", UCE, [PromptRow("an image of a cat", seed=4188), PromptRow("an image of a dog", seed=4189)]),
        ("a.csv", I2P, [PromptRow('a cat, "big"', seed=3, guidance=7.5, width=512, height=768)]),
        ("a.csv", "\ufeffPrompt;Seed\r\na, b;7\r\n\r\n", [PromptRow("a, b", seed=7)]),
        ("a.tsv", "prompt\tevaluation_guidance\na cat\t3\n", [PromptRow("a cat", guidance=3.0)]),
        ("a.csv", 'prompt\n"a, b"\n', [PromptRow("a, b")]), ("a.csv", 'prompt,seed\n"a\nb",\n', [PromptRow("a b")]),
        ("a.csv", "seed,prompt\n4188.0,a\nnan,b\n", [PromptRow("a", seed=4188), PromptRow("b")]),
        ("a.csv", "prompt,negative prompt,steps\na,b,5\n", [PromptRow("a", "b", steps=5)]),
        ("a.txt", "\ufeffa cat\n\n  a dog \r\n", [PromptRow("a cat"), PromptRow("a dog")]),
        ("a", "a, b\n# c", [PromptRow("a, b"), PromptRow("# c")]),
        ("a.json", '["a", {"prompt": "b", "seed": 3}]', [PromptRow("a"), PromptRow("b", seed=3)]),
        ("a.jsonl", '"a"\n\n{"prompt": "b", "seed": null, "more": [1]}\n', [PromptRow("a"), PromptRow("b")]),
        ("a.txt", "梵高\n", [PromptRow("梵高")]),
    ],
)  # fmt: skip
def test_prompts_are_read(write: Any, name: str, content: str, rows: list[PromptRow]) -> None:
    assert read_prompts(write(name, content)) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "no column 'prompt'"), ("a.csv", "text_a,seed\nb,3\n", "no column 'prompt'.*text_a"),
        ("a.csv", "prompt\n", "holds no prompt"), ("a.txt", " \n", "holds no prompt"),
        ("a.csv", "prompt,seed\na,1\nb,x\n", "line 3 has 'x' as seed"), 
        ("a.csv", "prompt,seed\n,1\n", "line 2.*no prompt"),
        ("a.csv", "prompt,seed\na, b,1\n", "line 2 has 3 cells, the first line 2.*double quotes"),
        ("a.csv", 'prompt\n"a\n', "line 2.*CSV"), ("a.csv", "prompt,seed\na,1.5\n", "line 2 has '1.5' as seed"),
        ("a.csv", "prompt,seed\na,99999999999999999999\n", "line 2.*seed"),
        ("a.csv", "prompt,guidance\na,inf\n", "line 2.*guidance"), ("a.csv", "prompt,steps\na,0\n", "line 2.*steps"),
        ("a.csv", "prompt\na\x1bb\n", "line 2"), ("a.json", '{"prompt": "a"}', "cannot be read"),
        ("a.json", '["a", 3]', "item 2 is 3"), ("a.jsonl", '"a"\n{"prompt": 3}\n', "line 2 has 3 as prompt"),
        ("a.jsonl", '"a"\n{"seed": 3}\n', "line 2 has no prompt"), ("a.jsonl", '"a"\n{"prom', "line 2"),
        ("a.jsonl", '{"prompt": "a", "seed": true}\n', "line 1 has True as seed"),
        ("a.txt", b"\x89PNG\r\n\xff", "text"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_with_their_line(write: Any, name: str, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_prompts(write(name, content))


def test_a_prompt_is_no_file_and_a_missing_file_no_prompt(write: Any, tmp_path: Path) -> None:
    assert is_list_file(str(write("a b.csv", "prompt\na\n")))
    for text in ("a cat", "a photo of data.csv", "a/b", "x" * 5000, "a\nb", "", "3.5"):
        assert not is_list_file(text)
    for text in ("promts.csv", str(tmp_path / "my prompts.txt"), "none/a.jsonl"):
        with pytest.raises(UsageError, match="no file"):
            is_list_file(text)
    with pytest.raises(UsageError, match="folder"):
        is_list_file(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "concepts"),
    [
        ("a.txt", "# mine\ncat>dog\n\nVan Gogh:style\n", ["cat>dog", "Van Gogh:style"]),
        ("a.csv", "concept\ncat\nVan Gogh:style>painting\n", ["cat", "Van Gogh:style>painting"]),
        (
            "a.csv", 'concept,kind,anchor,retain\n"Tyler, the Creator",object,,\ncat,,-,dog;fish\n',
            [ConceptRequest("Tyler, the Creator", "object"), ConceptRequest("cat", None, "", ("dog", "fish"))],
        ),
        (
            "a.json",
            '["cat", {"concept": "gun", "kind": "Unsafe", "anchor": "", "synonyms": ["pistol"], "retain": null}]',
            ["cat", ConceptRequest("gun", "unsafe", "", None, ("pistol",))],
        ),
        ("a.jsonl", '{"target": "cat", "templates": ["a {}"]}\n', [ConceptRequest("cat", templates=("a {}",))]),
    ],
)  # fmt: skip
def test_concepts_are_read(write: Any, name: str, content: str, concepts: list[Any]) -> None:
    assert read_concepts(write(name, content)) == concepts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "concept,kind\ncat,stile\n", "line 2 has the kind 'stile'; allowed: object, style, unsafe"),
        ("a.csv", "concept,anker\ncat,dog\n", "line 2 has unknown columns \\['anker'\\]; allowed: concept, kind"),
        ("a.csv", "kind,anchor\nstyle,dog\n", "no column 'concept'"), ("a.txt", "# nothing\n", "holds no concept"),
        ("a.json", '[{"kind": "style"}]', "item 1 has no concept"), 
        ("a.json", '[{"concept": "a", "retain": 3}]', "item 1 has 3 as retain"),
        ("a.json", '[{"concept": "a", "anchor": 3}]', "item 1 has 3 as anchor"),
    ],
)  # fmt: skip
def test_bad_concepts_are_told_with_their_line(write: Any, name: str, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_concepts(write(name, content))


def test_the_command_erases_what_a_file_names(write: Any, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any) -> None:
    path = write("mine.csv", "concept,kind,anchor,synonyms\ncat,object,dog,kitten;kitty\nVan Gogh,style,painting,\n")
    command = ["erase", "uce", "--model", str(tiny_pipe_folder), "--out", str(tmp_path / "made"), "--json"]
    assert main([*command, "--concepts", str(path), "--concept", "house>car"]) == 0
    made = json.loads(capsys.readouterr().out)["concepts"]
    assert [(each["target"], each["kind"], each["anchor"]) for each in made] == [
        ("house", "object", "car"), ("cat", "object", "dog"), ("Van Gogh", "style", "painting"),
    ]  # fmt: skip
    assert made[1]["synonyms"] == ["kitten", "kitty"]
    for options, said in (
        (["--concept", str(path)], "--concepts"), ([], "nothing to erase"),
        (["--concept", "cat>Cat"], "nothing would change"),
        (["--concept", "a; b", "--synonyms", "c"], "--synonyms"), (["--concepts", "none.csv"], "none.csv"),
    ):  # fmt: skip
        assert main([*command, *options]) == 2
        assert said in capsys.readouterr().err


# Drawing what a file names -------------------------------------------------------------------------------------------


def drawn(capsys: Any, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["generate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def pixels(image: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(image["file"]), dtype=np.int64)


def test_a_file_of_prompts_is_drawn_row_by_row(
    write: Any, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    rows = "a cat,a dog,7,,100\na cat,,8,2,1.5\n"
    listed = write("mine.csv", f"prompt,negative_prompt,evaluation_seed,steps,guidance\n{rows}")
    start = ["--model", tiny_pipe_folder, "--steps", 1, "--prompt", listed, "a house", "--out"]
    images = drawn(capsys, *start, tmp_path / "out")["images"]
    assert [(each["prompt"], each["seed"], each.get("guidance")) for each in images] == [
        ("a cat", 7, 100.0), ("a cat", 8, 1.5), ("a house", 0, None),
    ]  # fmt: skip
    assert all(each["steps"] == 1 for each in images), "an option goes before the file"
    assert Path(images[0]["file"]).name == "000-a-cat-7.png"
    for number, each in enumerate(images):
        words = ["--prompt", each["prompt"], "--seed", each["seed"], "--steps", 1]
        words += ["--guidance", each["guidance"]] if "guidance" in each else []
        words += ["--negative-prompt", each["negative_prompt"]] if "negative_prompt" in each else []
        (alone,) = drawn(capsys, "--model", tiny_pipe_folder, *words, "--out", tmp_path / f"alone-{number}")["images"]
        assert np.abs(pixels(alone) - pixels(each)).max() <= 1
    (plain,) = drawn(
        capsys, "--model", tiny_pipe_folder, "--prompt", "a cat", "--seed", 7, "--steps", 1, "--guidance", 100,
        "--out", tmp_path / "plain",
    )["images"]  # fmt: skip
    assert np.abs(pixels(plain) - pixels(images[0])).max() > 1, "the negative prompt counts"


def test_noise_belongs_to_the_prompt_and_seed_whatever_is_drawn_at_once(
    tiny_pipe_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    start = ["--model", tiny_pipe_folder, "--steps", 2, "--prompt", "a cat", "a dog", "--count", 3, "--seed", 5]
    alone, all_at_once = (
        drawn(capsys, *start, "--batch-size", size, "--out", tmp_path / str(size))["images"] for size in (1, 6)
    )
    assert [each["seed"] for each in alone] == [5, 6, 7] * 2
    for one, other in zip(alone, all_at_once, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    assert len({pixels(each).tobytes() for each in alone}) == 6


def test_fewer_are_drawn_at_once_where_memory_does_not_suffice(
    tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def call(self: Any, prompts: list[str], **settings: Any) -> Any:
        calls.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError
        return SimpleNamespace(images=[(prompts[0], settings["generator"][0].initial_seed())])

    options = GenerateOptions(model="none", prompt=(), out=Path())
    monkeypatch.setattr(type(tiny_pipe), "__call__", call)
    made: Any = draw(tiny_pipe, [PromptRow(f"{n}", seed=n) for n in range(3)], options)
    assert made == [("0", 0), ("1", 1), ("2", 2)]
    assert calls == [3, 1, 2, 1, 1]


def test_negative_prompts_that_count_for_nothing_are_told(tiny_pipe_folder: Path, tmp_path: Path, capsys: Any) -> None:
    start = ["generate", "--model", str(tiny_pipe_folder), "--steps", "1", "--prompt", "a", "--negative-prompt", "b"]
    for guidance, told in (("1", True), ("2", False)):
        assert main([*start, "--guidance", guidance, "--out", str(tmp_path / guidance)]) == 0
        assert ("count for nothing" in capsys.readouterr().err) is told


def test_names_of_files_are_not_drawn(write: Any, tiny_pipe_folder: Path, tmp_path: Path, capsys: Any) -> None:
    bad = write("bad.csv", "prompt,seed\na,1\nb,x\n")
    for text, said in ((bad, "line 3"), (tmp_path / "none.csv", "no file"), ("prompts.txt", "no file")):
        command = ["generate", "--model", str(tiny_pipe_folder), "--out", str(tmp_path / "o"), "--prompt", str(text)]
        assert main(command) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "o").exists()
