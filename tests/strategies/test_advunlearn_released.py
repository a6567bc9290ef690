"""AdvUnlearn as its released code trains: what is retained, and an update on the embedded model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

import erasure
from erasure import Concept
from erasure.backbones import TextTower, backbone_for
from erasure.errors import OptionError
from erasure.strategies import advunlearn as module
from erasure.strategies import get
from erasure.strategies.prompts import listed_scenes, photo_scenes
from erasure.training.trajectories import OnlineStates

CAT = Concept("cat", anchor="dog")


@pytest.fixture
def tower(tiny_pipe_original: Any) -> TextTower:
    return backbone_for(tiny_pipe_original).towers[0]


def test_photos_are_retained_and_nothing_else(tower: TextTower) -> None:
    """As many as are asked for: those of the retain lists, then the tokeniser's words, none of them the concept."""
    concept = Concept("cat", retain=("dog", "monet"))
    prompts = [scene.prompt for scene in photo_scenes(tower, [concept], 0, 6)]
    assert prompts[:2] == ["a photo of dog", "a photo of monet"]
    assert len(set(prompts)) == len(prompts) == 6
    assert all(prompt.startswith("a photo of ") for prompt in prompts)
    assert "a photo of cat" not in prompts
    assert [scene.prompt for scene in photo_scenes(tower, [concept], 0, 6)] == prompts
    assert [scene.prompt for scene in photo_scenes(tower, [concept], 1, 6)] != prompts


@pytest.mark.parametrize("preset", ["paper", "fast", "released", "released-fast"])
def test_a_preset_rolls_out_the_bare_name_and_243_photos(canvas: Any, preset: str) -> None:
    backbone = backbone_for(canvas)
    strategy = get("advunlearn").configured(preset)
    task = strategy.task(backbone, backbone.towers[0], [Concept("cat", kind="object")], 0, Accelerator(cpu=True))
    assert [scene.prompt for scene in task.concept_states.scenes] == ["cat"]
    kept = [scene.prompt for scene in task.retain_states.scenes]
    assert len(kept) == len(set(kept)) == 243
    assert all(prompt.startswith("a photo of ") for prompt in kept)
    encoder = canvas.text_encoder
    trained = {name for name, _ in encoder.named_parameters() if name.startswith(("encoder.", "final_layer_norm."))}
    assert set(task.student.paths) == {f"text_encoder.{name}" for name in trained}


def test_prompts_of_a_file_are_retained_instead(tiny_pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "retain.csv").write_text('case_num,source,prompt\n1,coco,a photo of chair\n2,coco,"bat, ball"\n')
    (tmp_path / "retain.txt").write_text("a photo of chair\n\nbat, ball\na photo of chair\n")
    backbone = backbone_for(tiny_pipe)
    for name in ("retain.csv", "retain.txt"):
        strategy = get("advunlearn").configured("paper", retain_file=tmp_path / name)
        task = strategy.task(backbone, backbone.towers[0], [CAT], 0, Accelerator(cpu=True))
        assert [scene.prompt for scene in task.retain_states.scenes] == ["a photo of chair", "bat, ball"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "case,text\n1,a\n", "columns .*'case', 'text'.* 'prompt'"),
        ("a.csv", "", "a.csv is empty; expected a first line"),
        ("a.csv", "prompt\n\n", "holds no prompt"),
        ("a.txt", " \n", "holds no prompt"),
        ("a.txt", None, "a.txt"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(OptionError, match=said):
        listed_scenes(str(tmp_path / name))


@pytest.fixture(scope="module")
def canvas() -> Any:
    pipe = erasure.load_pipeline("canvas-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("preset", ["paper", "fast", "released", "released-fast"])
def test_the_released_recipe_on_the_embedded_model(canvas: Any, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released script's arithmetic written out, on the same tensors: states, levels and first vectors.

    Three updates of a thousand, the first without an attack, of three attack steps each; all else is the preset's.
    """
    states: list[Any] = []
    first: list[Tensor] = []
    take, words = OnlineStates.take, module.random_words
    monkeypatch.setattr(OnlineStates, "take", lambda self, index: states.append(take(self, index)) or states[-1])
    monkeypatch.setattr(module, "random_words", lambda *given: first.append(words(*given)) or first[-1])
    short = {"steps": 3, "attack_from": 1 / 3, "attack_steps": 3, "rollout_steps": 3, "retain_vocabulary": 7}
    # Larger than the recipe's, so that three steps of the attack show.
    short |= {"attack_lr": 0.05}
    made = erasure.erase(
        canvas, Concept("cat"), "advunlearn", preset=preset, seed=3, attach=False, progress=False, **short
    )
    unet, stock, encoder = canvas.unet, canvas.text_encoder, copy.deepcopy(canvas.text_encoder)
    own = {name: p for name, p in encoder.named_parameters() if name.startswith(("encoder.", "final_layer_norm."))}
    before = {name: p.detach().clone() for name, p in own.items()}
    adam = torch.optim.Adam(own.values(), lr=1e-5)

    def encode(network: Any, prompts: list[str], vectors: Tensor | None = None) -> Tensor:
        """With vectors, these come between the start and the prompt's own tokens: BOS, v, cat, EOS, ..."""
        ids = canvas.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        if vectors is None:
            return network(ids).last_hidden_state
        ids = torch.cat([ids[:, :1], torch.full((1, 1), 5), ids[:, 1:-1]], 1)
        table = network.embeddings.token_embedding
        embedded = torch.cat([table(ids[:, :1]), vectors, table(ids[:, 2:])], 1)
        handle = table.register_forward_hook(lambda *parts: embedded)
        try:
            return network(ids).last_hidden_state
        finally:
            handle.remove()

    def noise(x: Tensor, t: Tensor, encoded: Tensor) -> Tensor:
        return unet(x, t, encoder_hidden_states=encoded.expand(len(x), -1, -1)).sample

    scenes = iter(states)
    starts = iter(first)
    signed, accumulates = "fast" in preset, "released" in preset
    for update in range(3):
        z, retained = next(scenes), next(scenes)
        vectors = None
        if update:
            vectors = next(starts).clone().requires_grad_()
            attack, handed = torch.optim.Adam([vectors], lr=0.05), vectors
            for _ in range(3):
                seen, handed = next(scenes), vectors.detach().clone()
                with torch.no_grad():
                    wanted = noise(seen.x, seen.t, encode(stock, ["cat"]))
                loss = F.mse_loss(noise(seen.x, seen.t, encode(encoder, ["cat"], vectors)), wanted)
                (slope,) = torch.autograd.grad(loss, vectors)
                vectors.grad = slope if vectors.grad is None or not accumulates else vectors.grad + slope
                if signed:
                    vectors.grad.sign_()
                attack.step()
            vectors = handed if accumulates else vectors.detach()
        photos = photos_of(retained, canvas)
        with torch.no_grad():
            null, concept = (noise(z.x, z.t, encode(stock, [text])) for text in ("", "cat"))
            target = null - 1.0 * (concept - null)
            keep = unet(retained.x, retained.t, encoder_hidden_states=encode(stock, photos)).sample
        erased = noise(z.x, z.t, encode(encoder, ["cat"], vectors))
        kept = unet(retained.x, retained.t, encoder_hidden_states=encode(encoder, photos)).sample
        adam.zero_grad()
        (F.mse_loss(erased, target) + 0.3 * F.mse_loss(kept, keep)).backward()
        adam.step()
    assert next(scenes, None) is next(starts, None) is None
    total = wrong = 0.0
    for name, parameter in own.items():
        wanted, found = parameter.detach() - before[name], made.edits.deltas[f"text_encoder/{name}"].float()
        total, wrong = total + wanted.square().sum(), wrong + (found - wanted).square().sum()
    assert wrong.sqrt() < 0.02 * total.sqrt()


def photos_of(states: Any, pipe: Any) -> list[str]:
    scenes = photo_scenes(backbone_for(pipe).towers[0], [Concept("cat")], 3, 7)
    return [scenes[number].prompt for number in states.scene.tolist()]
