"""What holds of an attached erasure whatever the family is, and what only some families or kinds of edit have."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from typing import Any

import pytest
import torch

from erasure import Erasure, ErasureManager
from erasure.errors import (
    AttachError,
    BypassedErasureWarning,
    UnsupportedModelError,
    VerificationError,
    WrongBaseError,
)
from erasure.interop import paths

from .cases import (
    ALONE,
    ATTACHED,
    COMPILED,
    FIRST,
    TEXT_SIDE,
    UNETS,
    draw_with,
    edited,
    embeddings,
    fit,
    kinds,
    known,
    pairs,
    users_lora,
)


@pairs(ATTACHED, FIRST, alone=ALONE)
class TestAttachedOnOneFamily:
    """What holds for an erasure, whoever made it, and does not depend on the family."""

    def test_strength(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, base_image: Any, draw: Any
    ) -> None:
        manager.add(made, "cat")
        full = draw(tiny_pipe)
        manager.set_erasures("cat", 0.5)
        half = draw(tiny_pipe)
        assert not torch.equal(half, full)
        assert not torch.equal(half, base_image)
        assert manager.verify() > 0
        manager.set_erasures("cat", strengths=[0.0])
        assert torch.equal(draw(tiny_pipe), base_image)
        assert manager.strengths == {"cat": 0.0}

    def test_set_disable_enable(
        self, tiny_pipe: Any, made: Erasure, other: Erasure, manager: ErasureManager, base: dict, tensors_of: Any,
        changed_tensors: Any, base_image: Any, draw: Any,
    ) -> None:  # fmt: skip
        manager.add(made, "cat")
        alone, alone_image = tensors_of(tiny_pipe), draw(tiny_pipe)
        manager.add(other, "monet")
        both, both_image = tensors_of(tiny_pipe), draw(tiny_pipe)
        manager.set_erasures("cat")
        assert changed_tensors(alone, tiny_pipe) == set()
        assert torch.equal(draw(tiny_pipe), alone_image)
        assert manager.active_erasures() == ["cat"]
        assert set(manager.erasures) == {"cat", "monet"}
        manager.set_erasures(["cat", "monet"])
        manager.disable()
        assert changed_tensors(base, tiny_pipe) == set()
        assert torch.equal(draw(tiny_pipe), base_image)
        assert manager.active_erasures() == []
        manager.enable()
        assert changed_tensors(both, tiny_pipe) == set()
        with contextlib.suppress(ZeroDivisionError), manager.disabled():
            assert changed_tensors(base, tiny_pipe) == set()
            raise ZeroDivisionError
        assert torch.equal(draw(tiny_pipe), both_image)
        with pytest.raises(AttachError, match="no erasure named 'dog'"):
            manager.set_erasures("dog")
        with pytest.raises(AttachError, match="1 strengths for 2"):
            manager.set_erasures(["cat", "monet"], [1.0])
        with pytest.raises(AttachError, match="attached already"):
            manager.add(made, "cat")
        with pytest.raises(AttachError, match="letters"):
            manager.add(made, "a.b")
        assert changed_tensors(both, tiny_pipe) == set()

    def test_attaching_to_a_disabled_pipeline_erases(
        self, tiny_pipe: Any, made: Erasure, other: Erasure, manager: ErasureManager
    ) -> None:
        manager.add(made, "cat")
        manager.disable()
        manager.add(other, "monet")
        assert manager.active_erasures() == ["cat", "monet"]
        assert manager.verify() > 0

    def test_fuse_unfuse(
        self, tiny_pipe: Any, made: Erasure, other: Erasure, manager: ErasureManager, base: dict, tensors_of: Any,
        changed_tensors: Any, case: str,
    ) -> None:  # fmt: skip
        manager.add(made, "cat")
        alone = tensors_of(tiny_pipe)
        manager.fuse()
        assert manager.fused_erasures == ["cat"]
        manager.add(other, "monet")
        manager.disable()
        with pytest.raises(AttachError, match="'monet' is not in force"):
            manager.fuse(["cat", "monet"])
        assert changed_tensors(alone, tiny_pipe) == set()
        with pytest.raises(AttachError, match="fused and always in force"):
            manager.set_erasures("cat")
        with pytest.raises(UnsupportedModelError, match="fused"):
            fit(tiny_pipe, case, "dog")
        manager.unload()
        assert changed_tensors(alone, tiny_pipe) == set()
        manager.unfuse()
        assert changed_tensors(base, tiny_pipe) == set(), "disabled, and no longer fused"
        manager.enable()
        assert changed_tensors(alone, tiny_pipe) == set()
        manager.unload()
        assert changed_tensors(base, tiny_pipe) == set()

    def test_a_copy_runs_its_own_weights(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, draw: Any
    ) -> None:
        manager.add(made, "cat")
        twin = copy.deepcopy(tiny_pipe)
        before = draw(twin)
        with torch.no_grad():
            for parameter in tiny_pipe.text_encoder.parameters():
                parameter.zero_()
        assert torch.equal(draw(twin), before)

    def test_a_slightly_tuned_model_is_refused(self, tiny_pipe: Any, made: Erasure, manager: ErasureManager) -> None:
        component, path = next(key for key in known(made) if key.endswith(".weight")).split("/")
        with torch.no_grad():
            paths.parameter(tiny_pipe.components[component], path).mul_(1 + 1e-6)
        with pytest.raises(WrongBaseError):
            manager.add(made)

    def test_another_family_is_refused(self, tiny_pipe: Any, made: Erasure, manager: ErasureManager) -> None:
        config = dataclasses.replace(made.config, family="flux")
        with pytest.raises(WrongBaseError, match="is for flux"):
            manager.add(Erasure(config, made.edits))

    def test_unloading_the_users_lora_leaves_the_erasure(
        self, tiny_pipe: Any, erased_image: Any, made: Erasure, manager: ErasureManager, draw: Any
    ) -> None:
        manager.add(made)
        tiny_pipe.load_lora_weights(users_lora(tiny_pipe), adapter_name="mine")
        tiny_pipe.unload_lora_weights()
        assert torch.equal(draw(tiny_pipe), erased_image)
        assert manager.verify() > 0

    @pytest.mark.parametrize("order", ["unfuse, unload", "unload, unfuse", "disable, unfuse, enable"])
    def test_a_lora_fused_over_it_and_taken_out_again(
        self, tiny_pipe: Any, made: Erasure, manager: ErasureManager, base: dict, order: str, base_image: Any,
        draw: Any,
    ) -> None:  # fmt: skip
        """PEFT subtracts what it added, which leaves rounding; the originals are held."""
        manager.add(made)
        alone = draw(tiny_pipe)
        tiny_pipe.load_lora_weights(users_lora(tiny_pipe), adapter_name="mine")
        tiny_pipe.fuse_lora(lora_scale=0.7)
        assert manager.verify() > 0
        both = draw(tiny_pipe)
        assert (both - alone).abs().max() > 1e-3
        for step in order.split(", "):
            tiny_pipe.unfuse_lora() if step == "unfuse" else getattr(manager, step)()
        tiny_pipe.unload_lora_weights()
        if "enable" in order:
            assert manager.verify() > 0
            torch.testing.assert_close(draw(tiny_pipe), alone, atol=1e-4, rtol=0)
            manager.unload()
        if order != "unload, unfuse":
            for key in edited(made):
                component, path = key.split("/")
                assert torch.equal(paths.parameter(tiny_pipe.components[component], path), base[key]), key
        torch.testing.assert_close(draw(tiny_pipe), base_image, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("pair", "first"), COMPILED, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
@pytest.mark.compile
def test_survives_compile(
    tiny_pipe: Any, erased_image: Any, made: Erasure, manager: ErasureManager, base_image: Any,
    draw: Any, first: str,
) -> None:  # fmt: skip
    torch.compiler.reset()
    component = made.components[0]
    if first == "attach":
        manager.add(made)
    if first == "attach":
        getattr(tiny_pipe, component).compile(backend="eager")
    else:
        setattr(tiny_pipe, component, torch.compile(getattr(tiny_pipe, component), backend="eager"))
        torch.testing.assert_close(draw(tiny_pipe), base_image)
        manager.add(made)
    torch.testing.assert_close(draw(tiny_pipe), erased_image)
    assert manager.verify() > 0
    manager.unload()
    torch.testing.assert_close(draw(tiny_pipe), base_image)
    with pytest.raises(VerificationError, match="no erasure is attached"):
        manager.verify()


@pairs(TEXT_SIDE)
def test_the_drop_in_from_pipe_warns_of_bypassing_too(tiny_pipe: Any, made: Erasure, draw: Any, drop_in: Any) -> None:
    ErasureManager(tiny_pipe).add(made)
    shared = drop_in.from_pipe(tiny_pipe)
    shared.set_progress_bar_config(disable=True)
    with pytest.warns(BypassedErasureWarning):
        draw(shared, None, **{name: torch.zeros_like(part) for name, part in embeddings(shared).items()})


@pairs(ATTACHED, UNETS, alone=ALONE)
def test_an_ip_adapter_is_left_alone(
    tiny_pipe: Any, made: Erasure, manager: ErasureManager, base: dict, changed_tensors: Any,
    load_tiny_ip_adapter: Any,
) -> None:  # fmt: skip
    before = load_tiny_ip_adapter(tiny_pipe)
    embeds = torch.zeros(2, 1, 1, 16)
    options = {"ip_adapter_image_embeds": [embeds[:, 0]], "output_type": "np"}
    stock = draw_with(tiny_pipe, options)
    tensors = {key: value.clone() for key, value in tiny_pipe.unet.state_dict().items()}
    manager.add(made)
    assert tiny_pipe.unet.attn_processors == before
    assert not torch.equal(draw_with(tiny_pipe, options), stock)
    manager.unload()
    assert torch.equal(draw_with(tiny_pipe, options), stock)
    after = tiny_pipe.unet.state_dict()
    assert set(after) == set(tensors)
    assert all(torch.equal(after[key], value) for key, value in tensors.items())


@pairs(("uce", "esd"))
def test_a_low_rank_erasure_is_a_stock_lora(
    tiny_pipe: Any, tiny_pipe_original: Any, made: Erasure, draw: Any, tmp_path: Any, erased_image: Any
) -> None:
    assert kinds(made) == {"low_rank"}
    folder = made.save(tmp_path / "lora")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "erasure_config.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    tiny_pipe.load_lora_weights(folder)
    torch.testing.assert_close(draw(tiny_pipe), erased_image, rtol=0, atol=1e-4)
    assert (draw(tiny_pipe) - draw(tiny_pipe_original)).abs().max() > 1e-4
