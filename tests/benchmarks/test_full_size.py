"""The benchmark of full size, at a tenth of the width: every part gives figures, and a run goes on where one ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import parts
from benchmarks.__main__ import main
from benchmarks.full_size import Workbench
from benchmarks.models import MODELS, Size, parameters
from erasure.cli.main import INTERRUPTED

SMALL = [
    "full-size", "--width", "0.1", "--pixels", "64", "--steps", "2", "--tokens", "16", "--repeats", "1",
    "--device", "cpu", "--dtype", "float32", "--backend", "eager",
]  # fmt: skip
OWN = {"sd15": ("sfd",), "sdxl": ("removal", "sfd")}
"""Parts that not every model has."""
NAMES = [
    f"{model}/{part}"
    for model in MODELS
    for part in ("removal", "images", "esd", "hirm", "sfd", "compile")
    if part not in ("removal", "sfd") or part in OWN.get(model, ())
]
PUBLISHED = {
    "sd15": {"text_encoder": 123.06, "unet": 859.52, "vae": 83.65},
    "sdxl": {"text_encoder": 123.06, "text_encoder_2": 694.66, "unet": 2567.46, "vae": 83.65},
    "sd3": {"text_encoder_2": 694.66, "text_encoder_3": 4762.31, "transformer": 2028.33, "vae": 83.82},
    "flux": {"text_encoder": 123.06, "text_encoder_2": 4762.31, "transformer": 11901.41, "vae": 83.82},
}
"""Millions of parameters of the released models."""


def parts_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["parts"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes: all parts of one model, and of the others what they draw."""
    out = tmp_path_factory.mktemp("full") / "figures.json"
    erase = parts.erasure.erase

    def quick(pipe: Any, concept: Any, strategy: str, **options: Any) -> Any:
        return erase(pipe, concept, strategy, **{**options, **({"vocabulary": 8} if strategy == "uce" else {})})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.erasure, "erase", quick)
        for chosen in (["--parts", "images", "removal"], ["--models", "flux"], ["--models", "sd15", "--parts", "sfd"]):
            done = main([*SMALL, "--out", str(out), *chosen])
            assert done == 0, {name: part.get("error") for name, part in parts_of(out).items()}
    return out


def test_every_part_gives_its_figures(file: Path) -> None:
    parts = parts_of(file)
    drawn = [f"{model}/images" for model in MODELS]
    assert set(parts) == {*drawn, "sdxl/removal", "flux/esd", "flux/hirm", "flux/compile", "sd15/sfd"}
    assert {part["state"] for part in parts.values()} == {"done"}
    for name in drawn:
        figures = parts[name]["figures"]
        assert all(figures["seconds_per_image"][stage] > 0 for stage in ("stock", "attached", "fused"))
        assert all(figures["peak_memory_mb"][stage] > 0 for stage in ("stock", "attached", "fused"))
        assert (figures["height"], figures["num_inference_steps"]) == (64, 2)
    esd, hirm, compiled = (parts[f"flux/{part}"]["figures"] for part in ("esd", "hirm", "compile"))
    assert all(update["seconds_per_update"] > 0 and update["peak_memory_mb"] > 0 for update in (esd, hirm))
    assert esd["rollout_seconds"] > 0
    assert compiled["verified"] > 0
    assert max(compiled["difference"], compiled["difference_detached"]) < 1e-4


def test_two_loras_need_less_memory_than_two_whole_networks(file: Path) -> None:
    """In float32: whole networks have values, gradients and two means of Adam each, LoRAs nearly nothing."""
    figures = parts_of(file)["sd15/sfd"]["figures"]
    low_rank, whole = figures["low_rank"], figures["whole"]
    assert low_rank["million_parameters"] == whole["million_parameters"] > 1
    assert all(each["peak_mb"] > each["model_mb"] > 0 for each in (low_rank, whole))
    # The generator's gradients exist while the fake-score network has none.
    assert whole["peak_mb"] - low_rank["peak_mb"] > 4 * 4 * whole["million_parameters"]
    assert figures["memory_ratio"] == whole["peak_mb"] / low_rank["peak_mb"] > 1


def test_removal_draws_what_forming_all_probabilities_draws(file: Path) -> None:
    figures = parts_of(file)["sdxl/removal"]["figures"]
    assert figures["largest_difference"] < 1e-3
    assert all(figures[kind]["seconds_per_image"] > 0 for kind in ("ours", "materialised"))


def test_what_is_done_is_not_run_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    monkeypatch.setattr(Workbench, "measure", lambda *_: pytest.fail("it was run again"))
    assert main([*SMALL, "--models", "flux", "--out", str(file)]) == 0
    assert file.read_bytes() == before


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts that were run, which measure nothing, and fail or are killed where they are told to."""
    names: list[str] = []

    def measure(self: Workbench, name: str) -> dict[str, Any]:
        names.append(name)
        if names.count(name) == 1 and name == "sd15/esd":
            raise torch.OutOfMemoryError("out of\nmemory")
        if names.count(name) == 1 and name == "sdxl/images":
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    monkeypatch.setattr(Workbench, "measure", measure)
    return names


def test_a_killed_run_loses_one_part_and_a_part_that_fails_no_other(tmp_path: Path, measured: list[str]) -> None:
    command = [*SMALL, "--out", str(tmp_path / "figures.json")]
    assert main(command) == INTERRUPTED
    first = NAMES[: NAMES.index("sdxl/images") + 1]
    assert measured == first
    states = {name: part["state"] for name, part in parts_of(tmp_path / "figures.json").items()}
    assert states == {**dict.fromkeys(first, "done"), "sd15/esd": "failed", "sdxl/images": "started"}
    assert parts_of(tmp_path / "figures.json")["sd15/esd"]["error"] == "OutOfMemoryError: out of memory"
    measured.clear()
    measured += ["sd15/esd", "sdxl/images"]
    assert main(command) == 0
    # What may kill it again comes last.
    assert measured[2:] == ["sd15/esd", *NAMES[len(first) :], "sdxl/images"]
    assert {part["state"] for part in parts_of(tmp_path / "figures.json").values()} == {"done"}


def test_a_failure_and_time_that_runs_out_are_told(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SMALL, "--models", "sd15", "--out", str(tmp_path / "figures.json")]
    assert main([*command, "--minutes", "0"]) == 1
    assert measured == []
    assert "goes on from sd15/images" in capsys.readouterr().out
    assert main(command) == 1
    assert "sd15/esd: OutOfMemoryError" in capsys.readouterr().out
    assert main(command) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--models", "sd9"], "known: sd15, sdxl, sd3, flux"),
        (["--parts", "imagez"], "known: images, esd, hirm, sfd, compile, removal"),
        (["--width", "2"], "above 0, and 1 at most"),
        (["--repeats", "0"], "--repeats is at least 1"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--steps", "3"], "figures of other settings (steps: 2 in the first, 3 in the second)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    command = [*SMALL, "--out", str(tmp_path / "figures.json")]
    main([*command, "--models", "sd15"])
    capsys.readouterr()
    before = list(measured)
    assert main([*command, *options]) == 2
    assert reason in capsys.readouterr().err
    assert measured == before


def test_unknown_benchmarks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["half-size"]) == 2
    assert main([]) == 2
    assert "full-size" in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_real_sizes_are_those_of_the_released_models(name: str) -> None:
    found = parameters(MODELS[name].make(Size(1.0, torch.device("meta"), torch.bfloat16)))
    assert {part: found[part] for part in PUBLISHED[name]} == pytest.approx(PUBLISHED[name], abs=0.01)
