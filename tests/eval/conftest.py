"""A miniature of the suite's world on the tiny pipeline, and a judge that answers without a network."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.copies import copied

OBJECTS = ["cat", "dog", "gun"]
STYLES = ["ink", "noto"]
WORLD = {
    "objects": OBJECTS,
    "styles": STYLES,
    "unsafe": ["gun"],
    "groups": {"animal": ["cat", "dog"], "weapon": ["gun"]},
    "synonyms": {"cat": ["kitten"]},
    "generation": {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "max_sequence_length": 32},
}


def colour_judge(images: Any) -> list[Any]:
    """Answers that depend on the mean colour: arbitrary, but the same for the same image."""
    answers = []
    for image in images:
        red, green, blue = image.resize((1, 1)).getpixel((0, 0))
        answers.append(
            SimpleNamespace(
                object=OBJECTS[(red + green) // 8 % 3],
                objects=(),
                style=STYLES[blue // 8 % 2],
                shape=OBJECTS[red // 8 % 3],
                object_scores={"cat": 0.5},
            )
        )
    return answers


colour_judge.version = "colour_judge"  # type: ignore[attr-defined]

ALIKE = 0.5
"""Mean difference of two images up to which they count as the same, in steps of 256."""


def stock_pictures(pipe: Any) -> list[tuple[Any, Any]]:
    """What the pipeline draws without erasures for every prompt of the little world, with the sample."""
    from erasure.eval import suites
    from erasure.eval.generation import generate

    kit = suites.get("canvas")
    plans = [kit.plan(pipe, [name], "full", 0).samples for name in OBJECTS]
    samples = {sample.sample_id: sample for samples in plans for sample in samples}
    drawn = generate(pipe, list(samples.values()), 8)
    pairs = (pair for batch, images in drawn for pair in zip(images, batch, strict=True))
    return [(np.asarray(image, float), sample) for image, sample in pairs]


def seeing_judge(pictures: list[tuple[Any, Any]]) -> Any:
    """A judge that sees what was asked for on the stock model's images, and answers by colour on all others."""

    def judge(images: Any) -> list[Any]:
        answers = colour_judge(images)
        for image, answer in zip(images, answers, strict=True):
            pixels = np.asarray(image.convert("RGB"), float)
            apart = [np.abs(pixels - other).mean() if pixels.shape == other.shape else 255 for other, _ in pictures]
            if min(apart) <= ALIKE:
                sample = pictures[int(np.argmin(apart))][1]
                answer.object = answer.shape = sample.objects[0]
                answer.style = sample.style
        return answers

    judge.version = "seeing_judge"  # type: ignore[attr-defined]
    return judge


def killed_judge(judge: Any, at: int) -> Any:
    """A judge under the name of another, during whose call of that number the user presses Ctrl-C."""
    asked = 0

    def killed(images: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == at:
            raise KeyboardInterrupt
        return judge(images)

    killed.version = judge.version  # type: ignore[attr-defined]
    return killed


def declare_world(pipe: Any, folder: Path) -> Any:
    """Put a `canvas.json` beside a pipeline: 3 objects, 2 styles, 2 steps, 16x16 pixels."""
    folder.mkdir()
    (folder / "canvas.json").write_text(json.dumps(WORLD))
    pipe.register_to_config(_name_or_path=str(folder))
    return pipe


def canvas_rows(plan: Any, rows: Any) -> list[dict[str, Any]]:
    """Metric rows of the suite `canvas` that come from the judge's answers."""
    from erasure.eval import suites
    from erasure.eval.evidence import Evidence
    from erasure.eval.metrics import METRICS
    from erasure.eval.runner import computed

    kit: Any = suites.get("canvas")
    names = tuple(name for name in kit.metrics if "judge" in METRICS.get(name).needs)
    judged: Any = type("Judged", (type(kit),), {"metrics": names})()
    return computed(judged, Evidence(plan, rows, controls=kit.controls(None, None, plan, rows)))


@pytest.fixture
def world_pipe(tiny_pipe: Any, tmp_path: Path) -> Any:
    """The tiny pipeline with a `canvas.json` beside it."""
    return declare_world(tiny_pipe, tmp_path / "model")


@pytest.fixture(scope="session")
def pictures(tiny_pipe_original: Any, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any]]:
    """What the tiny pipeline draws for every prompt of the little world, with the sample."""
    return stock_pictures(declare_world(copied(tiny_pipe_original), tmp_path_factory.mktemp("w") / "model"))


def attach_noise(pipe: Any) -> None:
    """Attach an erasure of "cat" that is noise on the output convolution of the UNet."""
    import torch

    from erasure.artifact import Erasure, ErasureConfig
    from erasure.attach import ErasureManager
    from erasure.carriers.edits import Edits
    from erasure.concept import Concept

    delta = torch.randn(pipe.unet.conv_out.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.2
    config = ErasureConfig("noise", [Concept("cat").to_dict()], "stable-diffusion", cost={"seconds": 1.5})
    edits = Edits(deltas={"unet/conv_out.weight": delta})
    ErasureManager(pipe).add(Erasure(config, edits), check_base=False)


@pytest.fixture
def erased_pipe(world_pipe: Any) -> Any:
    """The pipeline of the little world with an erasure attached."""
    attach_noise(world_pipe)
    return world_pipe


@pytest.fixture
def judge(pictures: list[tuple[Any, Any]]) -> Any:
    """A judge that knows the stock model's images, as an object of the test's own."""
    return seeing_judge(pictures)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip model with random weights as a local folder."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    folder = tmp_path_factory.mktemp("clip")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images every call of a pipeline has drawn."""
    from diffusers import StableDiffusionPipeline

    counts: list[int] = []
    call = StableDiffusionPipeline.__call__

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        found = call(self, *args, **options)
        counts.append(len(found.images))
        return found

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", counting)
    return counts
