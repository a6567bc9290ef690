"""Co-Erasing: which rows see pictures, their targets, and what is left of the adapter."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import erasure
from erasure import Concept
from erasure.backbones import backbone_for
from erasure.errors import OptionError
from erasure.interop.image_prompts import showing
from erasure.strategies import get
from erasure.strategies.co_erasing import due
from erasure.strategies.prompts import look_alikes
from erasure.training.loop import Share
from erasure.training.trajectories import rolling_out
from erasure.world import World

ADAPTER = str(Path(__file__).parents[1] / "tiny" / "ip-adapter" / "stable-diffusion.safetensors")
CAT = Concept("cat", anchor="dog", retain=("house", "car"))
QUICK: dict[str, Any] = {
    "adapter": ADAPTER, "pictures": 2, "lookalikes": 1, "batch": 2, "retain_batch": 4, "rollout_steps": 2,
    "contexts": 0, "retain_vocabulary": 2, "states": "online", "steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def backbone(tiny_pipe_original: Any) -> Any:
    return backbone_for(tiny_pipe_original)


@pytest.fixture(scope="module")
def strategy() -> Any:
    return get("co_erasing").configured(**QUICK)


@pytest.fixture(scope="module")
def task(backbone: Any, strategy: Any) -> Any:
    with rolling_out(backbone):
        made = strategy.task(backbone, backbone.reader, [CAT], 0, Accelerator(cpu=True))
        strategy.fill(made, "tiny", Accelerator(cpu=True))
    return made


def prepared(strategy: Any, task: Any, step: int = 0) -> Any:
    with rolling_out(task.backbone), task.adapter.listening(task.backbone.denoiser):
        return strategy.prepare(task, step, Share(0, 1))


def test_an_update_is_plain_arithmetic(strategy: Any, task: Any, backbone: Any) -> None:
    """Row by row from single calls: half of the concept's rows and a look-alike's see a picture, the others none."""
    batch = prepared(strategy, task)
    rows = batch.extra["rows"].tolist()
    assert rows == [1, 5]
    (alike,) = (subject for subject in task.subjects if subject.concept is None)
    assert batch.prompts[5] in alike.prompts

    def said(row: int, prompt: str | None, tokens: torch.Tensor | None) -> torch.Tensor:
        x, t, told = batch.x[row : row + 1], batch.t[row : row + 1], task.prompts([prompt])
        with torch.no_grad():
            if tokens is None:
                return backbone.predict(x, t, told)[0]
            with task.adapter.listening(backbone.denoiser), showing(backbone.denoiser, tokens[None]):
                return backbone.predict(x, t, told)[0]

    pictures = dict(zip(rows, batch.extra["tokens"], strict=True))
    errors: dict[str, list[torch.Tensor]] = {"erase": [], "retain": []}
    for row, prompt in enumerate(batch.prompts):
        own = said(row, prompt, pictures.get(row))
        wanted = own
        if row < 2:
            base = said(row, prompt.replace("cat", "dog"), None)
            wanted = base - strategy.eta * (own - base)
        errors["erase" if row < 2 else "retain"].append((own - wanted).square().mean())
    with task.adapter.listening(backbone.denoiser):
        terms = strategy.losses(task, batch)
    torch.testing.assert_close(terms["erase"].detach(), torch.stack(errors["erase"]).mean(), rtol=1e-4, atol=1e-7)
    # The student starts as the teacher.
    assert float(terms["retain"]) == pytest.approx(0, abs=1e-9)
    assert float(terms["erase"]) > 0
    with task.adapter.listening(backbone.denoiser):
        seen = said(1, batch.prompts[1], pictures[1])
    assert (seen - said(1, batch.prompts[1], None)).abs().max() > 1e-4


def test_pictures_speak_in_the_words_of_the_concept(strategy: Any, task: Any) -> None:
    """Every token of a picture is a mixture of the states of the concept's prompt, or the adapter's own."""
    words = task.prompts(["cat"]).tokens[0].double()
    tokens = task.tokens[0]
    assert tokens.shape == (2, 4, 32)
    # A point of the convex hull lies below the farthest of its corners in every direction.
    directions = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (tokens.double() @ directions.T).amax((0, 1)).le((words @ directions.T).amax(0) + 1e-5).all()


def test_rows_are_chosen_evenly() -> None:
    chosen = torch.cat([due(0.3, 4, step) for step in range(25)])
    assert int(chosen.sum()) == 30
    assert all(1 <= int(part.sum()) <= 4 for part in chosen.split(10))
    assert due(1.0, 3, 7).all()
    assert not due(0.0, 3, 7).any()
    assert [bool(due(0.5, 1, step)) for step in range(4)] == [False, True, False, True]


def test_no_row_sees_a_picture_at_first(strategy: Any, task: Any) -> None:
    late = dataclasses.replace(strategy, text_steps=1)
    assert prepared(late, task, 0).extra is None
    assert prepared(late, task, 1).extra is not None


def test_look_alikes_are_the_nearest_of_what_must_survive(backbone: Any) -> None:
    tower = backbone.reader
    assert set(look_alikes(tower, CAT, [CAT], 4)) == {"house", "car"}
    assert len(look_alikes(tower, CAT, [CAT], 1)) == 1
    bare = Concept("cat")
    found = look_alikes(tower, bare, [bare, Concept("dog")], 5)
    assert len(found) == 5
    assert not {"cat", "dog", "cats"} & set(found)


def test_of_embedded_models_the_embedded_adapter_is_found() -> None:
    assert World.at("canvas-sd").image_prompts == erasure.assets.path("canvas-ip-adapter")
    assert World.at("canvas-flux").image_prompts is None
    assert World.at("somebody/model").image_prompts is None


def test_a_model_that_declares_no_adapter_needs_one(tiny_pipe_original: Any) -> None:
    with pytest.raises(OptionError, match=r"'adapter'.*IP-Adapter for this model, which declares none"):
        erasure.erase(tiny_pipe_original, "cat", "co_erasing", attach=False, progress=False)
    with pytest.raises(OptionError, match="'trained_prompt'"):
        get("co_erasing").configured(trained_prompt="anchor")
