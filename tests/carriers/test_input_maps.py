"""Edits that map what a layer reads: one pair of factors for all layers that read the same input."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from erasure import Erasure, ErasureManager, erase
from erasure.carriers.edits import Edits, InputMap
from erasure.carriers.weights import delta_of, shape_of
from erasure.errors import ArtifactError, DivergenceError, WrongBaseError

DOWN = torch.arange(8, dtype=torch.float16).view(2, 4)
UP = torch.ones(4, 2, dtype=torch.float16)


def two_layers() -> Edits:
    return Edits(maps={f"unet/{name}": InputMap(DOWN, UP, torch.tensor(size)) for name, size in (("a", 3), ("b", 5))})


@pytest.fixture(scope="module")
def made(tiny_pipe_original: Any) -> Erasure:
    return erase(tiny_pipe_original, "cat", "uce", vocabulary=8, saved_as="map", attach=False, progress=False)


@pytest.fixture(scope="module")
def whole(tiny_pipe_original: Any) -> Erasure:
    """The same edit as a LoRA, with nothing left out."""
    return erase(
        tiny_pipe_original, "cat", "uce", vocabulary=8, saved_as="lora", tolerance=0.0, attach=False, progress=False
    )


def layer_of(pipe: Any, key: str) -> nn.Linear:
    component, path = key.split("/")
    return pipe.components[component].get_submodule(path)


def test_the_factors_are_written_once_and_read_back() -> None:
    edits = two_layers()
    edits.check()
    state = edits.delta_state_dict()
    assert set(state) == {"unet/input_map.0.down", "unet/input_map.0.up", "unet/a/mapped.0", "unet/b/mapped.0"}
    again = Edits.from_state_dicts(state, {})
    assert again.parameters == edits.parameters == ["unet/a.weight", "unet/b.weight"]
    assert not again.deltas
    for key, edit in edits.maps.items():
        assert all(torch.equal(a, b) for a, b in zip(edit, again.maps[key], strict=True))
    assert [shape_of(edit) for edit in again.maps.values()] == [(3, 4), (5, 4)]
    assert len(edits) == 2
    assert edits.carriers == ["weights"]
    assert not edits.is_empty


def test_maps_of_several_inputs_stay_apart() -> None:
    edits = two_layers()
    edits.maps["unet/c"] = InputMap(DOWN + 1, UP, torch.tensor(3))
    edits.maps["text_encoder/d"] = InputMap(DOWN, UP, torch.tensor(3))
    again = Edits.from_state_dicts(edits.delta_state_dict(), {})
    assert torch.equal(again.maps["unet/c"].down, DOWN + 1)
    assert torch.equal(again.maps["unet/a"].down, DOWN)
    assert torch.equal(again.maps["text_encoder/d"].down, DOWN)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda state: state.pop("unet/input_map.0.up"), "missing"),
        (lambda state: state.pop("unet/input_map.0.down"), "missing"),
        (lambda state: [state.pop(f"unet/{name}/mapped.0") for name in "ab"], "no layer has"),
        (lambda state: state.update({"unet/a/mapped.1": torch.tensor(3)}), "missing or there are two"),
        (lambda state: state.update({"unet/input_map.0.up": torch.ones(5, 2)}), "does not fit together"),
        (lambda state: state.update({"unet/a/mapped.0": torch.tensor([3])}), "does not fit together"),
        (lambda state: state.update({"unet/a/mapped.0": torch.tensor(0)}), "does not fit together"),
        (lambda state: state.update({"unet/a/mapped.0": torch.tensor(3.0)}), "float32"),
        (lambda state: state.update({"unet/a.weight": torch.ones(3, 4)}), "edited twice"),
        (lambda state: state.update({"vae/a/mapped.0": torch.tensor(3)}), "missing"),
    ],
)
def test_damaged_maps_are_refused(change: Any, error: str) -> None:
    state = two_layers().delta_state_dict()
    change(state)
    with pytest.raises(ArtifactError, match=error):
        Edits.from_state_dicts(state, {}).check()


def test_nan_and_nothing_are_refused() -> None:
    nan = Edits(maps={"unet/a": InputMap(DOWN * torch.nan, UP, torch.tensor(3))})
    with pytest.raises(DivergenceError):
        nan.check()
    nothing = Edits(maps={"unet/a": InputMap(DOWN * 0, UP, torch.tensor(3))})
    with pytest.raises(ArtifactError, match="changes nothing"):
        nothing.check()


def test_a_layer_becomes_what_its_base_makes_of_the_mapped_input(
    tiny_pipe: Any, tiny_pipe_original: Any, made: Erasure
) -> None:
    ErasureManager(tiny_pipe).add(made, "cat", strength=0.7)
    assert made.edits.maps
    for key, edit in made.edits.maps.items():
        base = layer_of(tiny_pipe_original, key).weight
        wanted = base.double() + 0.7 * base.double() @ edit.up.double() @ edit.down.double()
        torch.testing.assert_close(layer_of(tiny_pipe, key).weight.double(), wanted, rtol=1e-5, atol=1e-6)


def test_it_draws_what_the_whole_edit_draws(
    tiny_pipe: Any, tiny_pipe_original: Any, made: Erasure, whole: Erasure, draw: Any
) -> None:
    other = copy.deepcopy(tiny_pipe_original)
    ErasureManager(tiny_pipe).add(made, "cat")
    ErasureManager(other).add(whole, "cat")
    stock, mapped, wanted = draw(tiny_pipe_original), draw(tiny_pipe), draw(other)
    assert (mapped - wanted).norm() < 0.02 * (stock - wanted).norm()


def test_a_file_of_maps_is_smaller_and_reads_back(made: Erasure, whole: Erasure, tmp_path: Path) -> None:
    again = Erasure.load(made.save(tmp_path / "made"))
    assert again.edits.equals(made.edits)
    assert made.size_bytes < whole.size_bytes
    key, edit = next(iter(made.edits.maps.items()))
    base = torch.randn(shape_of(edit), generator=torch.Generator().manual_seed(0))
    assert torch.equal(delta_of(again.edits.maps[key], base), delta_of(edit, base))


def test_another_model_is_refused(tiny_pipe: Any, made: Erasure) -> None:
    other = copy.deepcopy(made)
    key, edit = next(iter(other.edits.maps.items()))
    other.edits.maps[key] = edit._replace(outputs=torch.tensor(7))
    with pytest.raises(WrongBaseError, match="expects \\(7, 32\\)"):
        ErasureManager(tiny_pipe).add(other, "cat", check_base=False)


class Quantised(nn.Parameter):
    """Stands in for a quantised weight, which must not be written."""


def test_on_quantised_weights_the_input_is_mapped_beside_the_layer(
    tiny_pipe: Any, tiny_pipe_original: Any, made: Erasure, whole: Erasure, draw: Any
) -> None:
    reference = copy.deepcopy(tiny_pipe_original)
    for index, (one, strength) in enumerate([(made, 0.5), (whole, 0.3)]):
        ErasureManager(reference).add(one, f"e{index}", strength)
    for key in made.edits.maps:
        layer = layer_of(tiny_pipe, key)
        layer.weight = Quantised(layer.weight.data, requires_grad=False)
    manager = ErasureManager(tiny_pipe)
    manager.add(made, "map", 0.5)
    manager.add(whole, "lora", 0.3)
    assert manager.verify() == 2 * len(made.edits.maps)
    torch.testing.assert_close(draw(tiny_pipe), draw(reference), rtol=0, atol=1e-5)
    manager.unload()
    assert torch.equal(draw(tiny_pipe), draw(tiny_pipe_original))
