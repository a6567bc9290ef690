"""Patching activations: places of every family, what is mixed, what is refused; and relearning on other families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import ErasureManager
from erasure.backbones import backbone_for
from erasure.errors import EvaluationError, UnsupportedModelError
from erasure.eval import stress_test
from erasure.eval.stress.restore import ActivationRecord, Place, patched, places_of, recorded, watched
from erasure.eval.stress.training import LearningOptions, PictureLearner
from tests.eval.stress.conftest import LAYER, cats
from tests.models import make_tiny_flux, make_tiny_pipe, make_tiny_sd3, make_tiny_xl

FAMILIES = {"sd": make_tiny_pipe, "sdxl": make_tiny_xl, "sd3": make_tiny_sd3, "flux": make_tiny_flux}
LESSONS = {"mode": "lora", "steps": (1,), "lr": 1e-3, "batch": 1, "rank": 2, "vectors": 2}


@pytest.mark.parametrize("name", FAMILIES)
def test_places_are_modules_that_run(name: str) -> None:
    pipe = FAMILIES[name]()
    backbone = backbone_for(pipe)
    for grain in ("parts", "layers"):
        found = places_of(backbone, grain)  # type: ignore[arg-type]
        assert list(found)[:2] == ["text_states", "text_entry"]
        inside = [path for place in list(found.values())[2:] for path in place.paths]
        assert sorted(inside) == sorted(site.name for site in backbone.attention_sites())
        assert all(label and "." not in label and "/" not in label for label in found)
    x, t = torch.zeros(1, *backbone.latents.shape()), torch.tensor([500.0])
    for place in found.values():
        with recorded(backbone.denoiser, place) as tape, torch.no_grad():
            backbone.predict(x, t, backbone.encode(["a cat"]))
        assert set(tape.passes) == set(place.paths)


def test_a_whole_patch_gives_the_other_models_output() -> None:
    first, second = make_tiny_pipe(0), make_tiny_pipe(1)
    place = Place((LAYER,), "outputs")
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    layers = [pipe.unet.get_submodule(LAYER) for pipe in (first, second)]
    own, other = (layer(x) for layer in layers)
    with recorded(first.unet, place) as tape:
        layers[0](x)
        layers[0](x + 1)
    for share in (0.25, 1.0):
        with patched(second.unet, place, tape, share):
            assert torch.allclose(layers[1](x), other + share * (own - other), atol=1e-6)
            layers[1](x)
            with pytest.raises(EvaluationError, match=r"in pass 3 .* and the stock model nothing"):
                layers[1](x)
    with (
        patched(second.unet, place, tape, 1.0),
        pytest.raises(EvaluationError, match="An erasure that gives the denoiser other rows"),
    ):
        layers[1](x[:1])
    assert torch.equal(layers[1](x), other)


def test_inputs_are_patched_ahead_of_the_layer() -> None:
    pipe = make_tiny_pipe()
    layer, x = pipe.unet.get_submodule(LAYER), torch.ones(1, 3, 32)
    expected = layer(2 * x)
    with watched(pipe.unet, Place((LAYER,), "inputs"), lambda _path, _number, value: 2 * value):  # type: ignore[operator]
        assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), expected)
    assert ActivationRecord().passes == {}


def attach(pipe: Any) -> None:
    """Attach an erasure of "cat" that is noise on a layer which reads text."""
    from erasure.artifact import Erasure, ErasureConfig
    from erasure.carriers.edits import Edits
    from erasure.concept import Concept

    backbone = backbone_for(pipe)
    entry = backbone.entry_layers()[0]
    delta = torch.randn(entry.module.weight.shape, generator=torch.Generator().manual_seed(0))
    config = ErasureConfig("noise", [Concept("cat").to_dict()], backbone.family, cost={"seconds": 1.0})
    ErasureManager(pipe).add(Erasure(config, Edits(deltas={f"{entry.key}.weight": delta})), check_base=False)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_every_family_is_tested(name: str, tmp_path: Path) -> None:
    from tests.eval.conftest import declare_world

    pipe = declare_world(FAMILIES[name](), tmp_path / "model")
    attach(pipe)
    common: dict[str, Any] = {
        "size": "smoke", "judge": cats, "progress": False, "samples": 1, "retained": 1, "report": False,
        "batch_size": 8,
    }  # fmt: skip
    for test, options in (
        ("quantise", {"formats": ("nf4",)}), ("strength", {"strengths": ()}), ("restore", {"shares": (1.0,)}),
        ("relearn", {"steps": (1,), "rank": 2}),
    ):  # fmt: skip
        results = stress_test(pipe, test, out=tmp_path / test, **common, **options)
        shown = {row["variant"] for row in results.metrics if row["name"] == "concept_shown"}
        assert {"before", "after"} < shown


def test_a_family_without_learned_tokens_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="reads words with a T5"):
        PictureLearner(make_tiny_flux(), LearningOptions(**{**LESSONS, "mode": "embedding"}), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["embedding", "lora", "full"])
def test_what_was_learned_is_drawn_and_reaches_nobody(mode: str, tmp_path: Path) -> None:
    from safetensors.torch import save

    pipe = make_tiny_pipe()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    words = len(pipe.tokenizer)
    lessons = LearningOptions(**{**LESSONS, "mode": mode})  # type: ignore[arg-type]
    pupil = PictureLearner(pipe, lessons, 0)
    # No constant: a norm would take that away.
    generator = torch.Generator().manual_seed(1)
    own = pupil.player.state_dict()
    state = {key: value + 0.3 * torch.randn(value.shape, generator=generator) for key, value in own.items()}
    (tmp_path / "state.safetensors").write_bytes(save(state))
    prompt = "a photo of a <stress>" if mode == "embedding" else "a photo of a cat"
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "np"}

    def drawn(made: Any) -> Any:
        return made(prompt, generator=torch.Generator().manual_seed(0), **call).images

    with pupil.taught(None) as made:
        first = drawn(made)
    with pupil.taught(tmp_path / "state.safetensors") as made:
        assert abs(drawn(made) - first).max() > 1e-4
    assert len(pipe.tokenizer) == words
    assert all(torch.equal(before[key], value) for key, value in pipe.unet.state_dict().items())
    other = PictureLearner(pipe, LearningOptions(**{**LESSONS, "mode": mode, "rank": 1, "vectors": 1}), 0)  # type: ignore[arg-type]
    if mode != "full":
        with pytest.raises(EvaluationError, match="holds what another training has learned"):
            other.load(tmp_path / "state.safetensors")
