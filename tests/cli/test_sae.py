"""`erasure sae` on a tiny pipeline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erasure.cli.main import main
from erasure.sae import load

SMALL = ["--d-sae", "64", "--k", "4", "--steps", "30", "--prompts-per-step", "4", "--layer", "0"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na photo of a dog\nvan gogh painting\na house in ink style\n")
    return file


def test_train_and_info(
    tiny_pipe_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sae"
    arguments = ["sae", "train", "--model", str(tiny_pipe_folder), "--prompts", str(prompts), "--out", str(out)]
    assert main([*arguments, *SMALL, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert sorted(file.name for file in out.iterdir()) == [
        "cfg.json", "prompts.txt", "sae_weights.safetensors",
    ]  # fmt: skip
    assert set((out / "prompts.txt").read_text().splitlines()) == {
        line for line in prompts.read_text().splitlines() if line
    }
    assert (made["d_sae"], made["k"], made["layer"], made["architecture"]) == (64, 4, 0, "jumprelu")
    assert made["model_name"] == tiny_pipe_folder.name
    assert 0 < made["fvu"] < 1
    assert load(out).config.metadata["hook_name"] == "text_encoder/encoder.layers.0"

    assert main(["sae", "info", str(out)]) == 0
    assert "jumprelu" in capsys.readouterr().out
    measured = ["sae", "info", str(out), "--model", str(tiny_pipe_folder), "--prompts", str(prompts), "--json"]
    assert main([*measured, "--prompts-per-step", "4"]) == 0
    # The file holds half precision, and the prompts that were kept serve as well.
    assert json.loads(capsys.readouterr().out)["fvu"] == pytest.approx(made["fvu"], rel=0.05)


def test_info_tells_what_images_lose(capsys: pytest.CaptureFixture[str]) -> None:
    from erasure import assets

    folder = assets.path("canvas-sae")
    assert main(["sae", "info", str(folder), "--model", "canvas-sd", "--images", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 3
    assert found["fvu"] < 0.03
    assert abs(found["clip_score_reconstructed"] - found["clip_score"]) < 0.1 < found["clip_score"]


def test_prompts_of_a_dataset(tiny_pipe_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "captions.jsonl", tmp_path / "sae"
    file.write_text("".join(json.dumps({"caption": f"a {word}"}) + "\n" for word in ("cat", "dog", "house")))
    arguments = ["sae", "train", "--model", str(tiny_pipe_folder), "--dataset", str(file), "--out", str(out)]
    assert main([*arguments, "--column", "caption", *SMALL]) == 0
    assert set((out / "prompts.txt").read_text().split("\n")) == {"a cat", "a dog", "a house", ""}
    capsys.readouterr()
    assert main([*arguments, *SMALL]) == 2
    assert "no column 'text'" in capsys.readouterr().err


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the process; these tests want their own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_half_precision_and_a_tracker(tiny_pipe_folder: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_pipe_folder), "--prompts", str(prompts), "--out", str(tmp_path / "sae")]
    asked = ["--mixed-precision", "bf16", "--tracker", "tensorboard"]
    assert main(["sae", "train", *arguments, *SMALL, *asked]) == 0
    assert load(tmp_path / "sae").config.metadata["fvu"] < 1
    (events,) = (tmp_path / "sae" / "erasure-sae").glob("events*")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(events))
    read.Reload()
    assert [event.step for event in read.Scalars("fvu")] == list(range(30))


def test_any_tower_of_any_family(prompts: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    """The denoiser is not needed for this."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, projection_dim=32, bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=EulerDiscreteScheduler(), text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config), tokenizer=tiny_tokenizer, tokenizer_2=tiny_tokenizer,
    )  # fmt: skip
    pipe.save_pretrained(tmp_path / "sdxl")
    out = tmp_path / "sae"
    arguments = ["--model", str(tmp_path / "sdxl"), "--prompts", str(prompts), "--out", str(out)]
    assert main(["sae", "train", *arguments, *SMALL, "--tower", "text_encoder_2"]) == 0
    assert load(out).config.metadata["hook_name"] == "text_encoder_2/encoder.layers.0"
    # The tower is the one it was made for, unless told otherwise.
    assert main(["sae", "info", str(out), "--model", str(tmp_path / "sdxl")]) == 0


def test_topk_can_be_asked_for(tiny_pipe_folder: Path, prompts: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_pipe_folder), "--prompts", str(prompts), "--out", str(tmp_path / "sae")]
    assert main(["sae", "train", *arguments, *SMALL, "--no-batch-topk"]) == 0
    assert load(tmp_path / "sae").config.architecture == "topk"


def test_another_training_does_not_go_on(
    tiny_pipe_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from erasure.training.checkpoint import Checkpoint

    arguments = ["--model", str(tiny_pipe_folder), "--prompts", str(prompts), "--out", str(tmp_path / "sae"), *SMALL]
    save = Checkpoint.save

    def die(self: Checkpoint, step: int) -> None:
        save(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", die)
        main(["sae", "train", *arguments, "--save-every", "5"])
    assert (tmp_path / "sae" / "training.ckpt").exists()
    more = tmp_path / "more.txt"
    more.write_text(prompts.read_text() + "a gun\n")
    capsys.readouterr()
    for changed, named in (
        (["--learning-rate", "0.5"], "options.learning_rate"), (["--seed", "3"], "seed"), (["--layer", "2"], "layer"),
        (["--prompts", str(more)], "prompts"), (["--k", "3"], "options.k"),
    ):  # fmt: skip
        assert main(["sae", "train", *arguments, "--save-every", "5", *changed]) != 0
        said = capsys.readouterr().err
        assert "holds a training of something else" in said
        assert named in said
    assert main(["sae", "train", *arguments]) == 0
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == [
        "cfg.json", "prompts.txt", "sae_weights.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sae", "melt"], "unknown action 'melt'"),
        (["sae", "train", "--model", "MODEL", "--out", "OUT"], "--prompts FILE is needed"),
        (["sae", "train", "--model", "MODEL", "--out", "OUT", "--prompts", "gone.txt"], "cannot be read"),
        (["sae", "train", "--model", "MODEL", "--out", "OUT", "--prompts", "FILE", "--layer", "9"], "no block 9"),
        (["sae", "train", "--model", "MODEL", "--out", "OUT", "--prompts", "FILE", "--tower", "x"], "--tower x"),
        (
            ["sae", "train", "--model", "MODEL", "--out", "OUT", "--prompts", "FILE", "--k", "0"],
            "error: training of an autoencoder: option 'k' is 0; allowed: a whole number, 1 or more",
        ),
        (["sae", "train", "--model", "MODEL", "--out", "OUT", "--prompts", "FILE", "--dataset", "x"], "one of them"),
        (["sae", "info", "OUT"], "holds no autoencoder"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    tiny_pipe_folder: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"MODEL": str(tiny_pipe_folder), "OUT": str(tmp_path / "out"), "FILE": str(prompts)}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("erasure: error:")
    assert message in said


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sae", "--help"]) == 0
    assert "train" in capsys.readouterr().out
