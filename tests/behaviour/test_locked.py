"""What a locked pipeline refuses, for every kind of edit, and on every family."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from erasure import Erasure, ErasureManager, locking
from erasure.backbones import backbone_for
from erasure.errors import BypassedErasureWarning, LockedError, VerificationError
from erasure.interop import hooks, paths
from erasure.locking.seal import edited_paths
from erasure.state import ComponentState

from .cases import ALONE, ATTACHED, SIDE, embeddings, is_text_side, lora_pair, spread

Switch = Callable[[Any], object]
SWITCHES: dict[str, Switch] = {
    "disable": lambda pipe: pipe.disable_erasures(),
    "delete": lambda pipe: pipe.delete_erasure("cat"),
    "unload": lambda pipe: pipe.unload_erasures(),
    "scale": lambda pipe: pipe.set_erasures("cat", 0.0),
    "leave out": lambda pipe: pipe.set_erasures([]),
    "fuse": lambda pipe: pipe.fuse_erasure(),
    "unfuse": lambda pipe: pipe.unfuse_erasure("cat"),
    "manager": lambda pipe: ErasureManager(pipe).disabled().__enter__(),
}
"""Everything that switches erasures."""


@pytest.fixture
def pipe(tiny_pipe: Any, made: Erasure, drop_in: Any) -> Any:
    """The family's drop-in with the case's erasure."""
    ErasureManager(tiny_pipe).add(made, "cat")
    pipe = drop_in.from_pipe(tiny_pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def takes(pipe: Any, name: str) -> bool:
    return name in inspect.signature(type(pipe).__call__).parameters


def words_of_its_own(pipe: Any) -> dict[str, Any]:
    """Other words for one text encoder."""
    return {"prompt_2": "a dog"} if takes(pipe, "prompt_2") else {}


def other_noise(pipe: Any) -> dict[str, Any]:
    backbone = backbone_for(pipe)
    return {"latents": torch.zeros_like(backbone.latents.packed(torch.zeros(1, *backbone.latents.shape(SIDE, SIDE))))}


@spread((*ATTACHED, *ALONE))
class TestLocked:
    """What holds of every erasure under a lock."""

    def test_draws_the_same_and_unlocks_with_its_key_alone(
        self, pipe: Any, erased_image: Any, base_image: Any, draw: Any
    ) -> None:
        key = pipe.lock_erasures(refuse=["noise", "schedulers", "loras", "pictures", "image_prompts", "controls"])
        with warnings.catch_warnings():
            warnings.simplefilter("error", BypassedErasureWarning)
            assert torch.equal(draw(pipe), erased_image)
        assert pipe.verify_erasures() > 0
        with pytest.raises(LockedError, match="does not unlock"):
            pipe.unlock_erasures("another key")
        with pytest.raises(LockedError, match="is locked"):
            pipe.lock_erasures()
        pipe.unlock_erasures(key)
        with pytest.raises(LockedError, match="not locked"):
            pipe.unlock_erasures(key)
        pipe.unload_erasures()
        assert torch.equal(draw(pipe), base_image)

    def test_refuses_every_switch(self, pipe: Any, other: Erasure, erased_image: Any, draw: Any) -> None:
        pipe.lock_erasures()
        for name, switch in {**SWITCHES, "add": lambda pipe: pipe.load_erasure(other, "other")}.items():
            with pytest.raises(LockedError, match="locked"):
                switch(pipe)
            assert pipe.active_erasures() == ["cat"], name
        assert torch.equal(draw(pipe), erased_image)

    def test_refuses_what_calls_bring_past_it(self, pipe: Any, made: Erasure, draw: Any) -> None:
        own = embeddings(pipe)
        pipe.lock_erasures()
        with pytest.raises(LockedError, match="prompt_embeds= is refused"):
            draw(pipe, None, **own)
        if is_text_side(made) and (others := words_of_its_own(pipe)):
            with pytest.raises(LockedError, match="prompt_2= bypasses"):
                draw(pipe, **others)
        if takes(pipe, "negative_prompt"):
            with pytest.raises(LockedError, match="negative prompt names"):
                draw(pipe, negative_prompt="a cat")
        # What a lock refuses only where it is told so.
        draw(pipe, **other_noise(pipe))

    def test_refuses_more_where_told(self, pipe: Any, draw: Any) -> None:
        pipe.lock_erasures(refuse={"noise", "schedulers", "pictures"})
        with pytest.raises(LockedError, match="noise can be searched"):
            draw(pipe, **other_noise(pipe))
        for name in ("timesteps", "sigmas"):
            if takes(pipe, name):
                with pytest.raises(LockedError, match="noise levels by hand"):
                    draw(pipe, **{name: [1.0, 0.5]})
        with pytest.raises(LockedError, match="picture that is handed in"):
            pipe.vae.encode(torch.zeros(1, 3, 32, 32))
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        with pytest.raises(VerificationError, match="scheduler is another one"):
            draw(pipe)

    def test_notices_that_a_component_was_replaced(
        self, pipe: Any, made: Erasure, tiny_pipe_factory: Any, erased_image: Any, draw: Any
    ) -> None:
        pipe.lock_erasures()
        stranger = tiny_pipe_factory(seed=1)
        backbone = backbone_for(pipe)
        for name in (backbone.denoiser_component, backbone.reader.component, "tokenizer", "vae"):
            kept = getattr(pipe, name)
            setattr(pipe, name, getattr(stranger, name))
            with pytest.raises(VerificationError, match=f"{name} is another one"):
                draw(pipe)
            setattr(pipe, name, kept)
        assert torch.equal(draw(pipe), erased_image)

    def test_notices_writes_and_lost_hooks(self, pipe: Any, made: Erasure, draw: Any) -> None:
        pipe.lock_erasures()
        for parameter in self.edited(pipe):
            for tensor in (parameter, parameter.data):
                kept = parameter.detach().clone()
                with torch.no_grad():
                    tensor.add_(0.1)
                with pytest.raises(VerificationError, match=r"not as it was|not what the erasures make of it"):
                    draw(pipe)
                parameter.data = kept
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module) and ComponentState.of(module) is not None:
                hooks.remove_hooks(module, "erasure")
        with pytest.raises(VerificationError, match="not as it was"):
            draw(pipe)

    @staticmethod
    def edited(pipe: Any) -> list[torch.nn.Parameter]:
        """One edited parameter, if there is any."""
        found = []
        for module in pipe.components.values():
            state = ComponentState.of(module) if isinstance(module, torch.nn.Module) else None
            for path in list(state.record.written.terms)[:1] if state else ():
                found.append(paths.parameter(module, path))
        return found[:1]

    def test_refuses_a_lora_on_what_it_edits_and_takes_others(self, pipe: Any, draw: Any) -> None:
        key = pipe.lock_erasures()
        generator = torch.Generator().manual_seed(3)
        backbone = backbone_for(pipe)
        name = backbone.denoiser_component
        edited = edited_paths(backbone.denoiser, ComponentState.of(backbone.denoiser))
        layers = {
            path: layer for path, layer in backbone.denoiser.named_modules()
            if isinstance(layer, torch.nn.Linear) and path.endswith(("to_k", "to_q"))
        }  # fmt: skip
        free = next((path for path in layers if path not in edited), None)
        if free is not None:
            pipe.load_lora_weights(lora_pair(f"{name}.{free}", layers[free], generator), adapter_name="free")
            draw(pipe)
            pipe.unload_lora_weights()
            draw(pipe)
        taken = next((path for path in layers if path in edited), None)
        if taken is not None:
            pipe.load_lora_weights(lora_pair(f"{name}.{taken}", layers[taken], generator), adapter_name="taken")
            with pytest.raises(LockedError, match=r"a LoRA lies on .*which the erasures of this pipeline edit"):
                draw(pipe)
            pipe.unload_lora_weights()
            draw(pipe)
        pipe.unlock_erasures(key)
        pipe.lock_erasures(refuse="loras")
        chosen = free or next(iter(layers))
        pipe.load_lora_weights(lora_pair(f"{name}.{chosen}", layers[chosen], generator), adapter_name="any")
        with pytest.raises(LockedError, match="takes no LoRA"):
            draw(pipe)

    def test_pipelines_on_its_networks_are_refused_or_locked_too(
        self, pipe: Any, tiny_pipe: Any, drop_in: Any, erased_image: Any, draw: Any
    ) -> None:
        key = pipe.lock_erasures()
        with pytest.raises(LockedError, match="something else than a call of that pipeline"):
            draw(tiny_pipe)
        again = drop_in.from_pipe(pipe)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(draw(again), erased_image)
        with pytest.raises(LockedError, match="prompt_embeds= is refused"):
            draw(again, None, **embeddings(tiny_pipe))
        with pytest.raises(LockedError, match="locked"):
            again.disable_erasures()
        again.unlock_erasures(key)
        # The first one is not drawn with unlocked networks behind its back.
        with pytest.raises(VerificationError, match="unlocked through another pipeline"):
            draw(pipe)
        pipe.unlock_erasures(key)
        assert torch.equal(draw(tiny_pipe), erased_image)
        assert locking.Lock.of(pipe) is None
