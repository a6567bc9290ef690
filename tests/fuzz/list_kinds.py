"""Files that users write: lists of prompts and concepts, and files that are named as a model or an erasure."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from kinds import kind

PROMPTS = 'case_number,prompt,negative_prompt,evaluation_seed,sd_guidance_scale\n1,a cat,,4188,7.5\n2,"a, b",c,,\n'
CONCEPTS = 'concept,kind,anchor,retain\n"Tyler, the Creator",object,,\ncat,,-,dog;fish\n'


def read_prompt_lists(folder: Path) -> None:
    from erasure.cli.lists import is_list_file, read_prompts

    for path in sorted(folder.iterdir()):
        if is_list_file(str(path)):
            assert all(row.prompt for row in read_prompts(path))


@kind("prompts", "a.csv", "b.txt", "c.json", "d.jsonl", read=read_prompt_lists)
def write_prompt_lists(folder: Path) -> None:
    rows = [{"prompt": "a cat", "seed": 3, "guidance": 2.5}, "a dog"]
    (folder / "a.csv").write_text(PROMPTS)
    (folder / "b.txt").write_text("a cat\na dog\n")
    (folder / "c.json").write_text(json.dumps(rows))
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))


def read_concept_lists(folder: Path) -> None:
    from erasure.cli.lists import read_concepts
    from erasure.world import World

    for path in sorted(folder.iterdir()):
        assert World.at("canvas-sd").concepts(read_concepts(path))


@kind("concepts", "a.csv", "b.txt", "c.json", read=read_concept_lists)
def write_concept_lists(folder: Path) -> None:
    (folder / "a.csv").write_text(CONCEPTS)
    (folder / "b.txt").write_text("# mine\ncat>dog\nVan Gogh:style>painting; ink\n")
    (folder / "c.json").write_text(json.dumps(["cat", {"concept": "gun", "kind": "unsafe", "retain": ["dog"]}]))


def read_stray(folder: Path) -> None:
    from erasure.files import advice

    assert (advice(folder / "stray.safetensors") is not None) == (folder / "stray.safetensors").is_file()


@kind("stray tensors", "stray.safetensors", read=read_stray)
def write_stray(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"lora_unet_a.lora_up.weight": torch.ones(2, 2), "b": torch.ones(3)}, folder / "stray.safetensors")


def read_measured(folder: Path) -> None:
    from erasure.assets.build.measured import Measured
    from erasure.assets.build.tables import TABLES

    found = Measured.read(folder / "families.json")
    TABLES["families"].check(found)
    assert TABLES["families"].markdown(found)


@kind("measured figures", "families.json", read=read_measured)
def write_measured(folder: Path) -> None:
    from erasure.assets.build.measured import Measured, Row

    rate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 12}
    why = {"value": None, "reason": "no image"}
    cells = {"model": "canvas-sd", "size": "full", "UA": rate, "IRA": rate, "CRA": rate, "seconds": 1.5, "kB": 12}
    rows: list[Row] = [{"method": "uce", **cells, "AA": rate}, {"method": "esd", **cells, "AA": why}]  # type: ignore[dict-item]
    Measured(
        about="two methods",
        command=None,
        keys=["method", "model"],
        size=None,
        models=["canvas-sd"],
        seeds=[0],
        rows=rows,
    ).write(folder / "families.json")
