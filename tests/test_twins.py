"""What works on a pipeline without switching it, and switches that are refused as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

import erasure
from erasure import Concept, Erasure, ErasureManager
from erasure.errors import AttachError, UnsupportedModelError, VerificationError
from erasure.pipelines import StableDiffusionErasurePipeline


def make(pipe: Any, strategy: str, concept: Any = "cat", **options: Any) -> Erasure:
    quick = {
        "hirm": {"steps": 3, "contexts": 2, "retain_vocabulary": 2},
        "uce": {"vocabulary": 8, "saved_as": "lora", "tolerance": 0.0},
    }
    return erasure.erase(pipe, concept, strategy, **{"progress": False, "attach": False, **quick[strategy], **options})


@pytest.fixture(scope="module")
def hirm(tiny_pipe_original: Any) -> Erasure:
    return make(tiny_pipe_original, "hirm", unconditional="stock")


@pytest.fixture(scope="module")
def uce(tiny_pipe_original: Any) -> Erasure:
    return make(tiny_pipe_original, "uce")


@pytest.fixture
def pipe(tiny_pipe: Any, hirm: Erasure, uce: Erasure) -> Any:
    made = StableDiffusionErasurePipeline.from_pipe(tiny_pipe)
    made.set_progress_bar_config(disable=True)
    made.load_erasure(hirm, name="text")
    made.load_erasure(uce, name="denoiser")
    return made


def identity(pipe: Any) -> dict[str, tuple[int, int]]:
    """Every parameter's storage and version: writing into it, even the same value, would show."""
    found = {}
    for name, component in pipe.components.items():
        for key, value in component.named_parameters() if hasattr(component, "named_parameters") else ():
            found[f"{name}/{key}"] = (value.data_ptr(), value._version)
    return found


def forwards(pipe: Any) -> dict[str, Any]:
    parts = {name: part for name, part in pipe.components.items() if hasattr(part, "named_modules")}
    return {f"{n}/{key}": vars(m).get("forward") for n, part in parts.items() for key, m in part.named_modules()}


def test_the_stock_twin_is_the_stock_model_and_shares_its_memory(
    pipe: Any, tiny_pipe_original: Any, draw: Any
) -> None:
    before, erased = identity(pipe), draw(pipe)
    twin = pipe.erasure_manager.stock()
    assert torch.equal(draw(twin), draw(tiny_pipe_original))
    assert ErasureManager(twin).erasures == {}
    assert torch.equal(draw(pipe), erased)
    own = {key: value[0] for key, value in identity(twin).items()}
    shared = {key for key, value in before.items() if own[key] == value[0]}
    edited = set(before) - shared
    assert edited == {key for one in pipe.erasure_manager.erasures.values() for key in one.edits.parameters}
    with torch.no_grad():
        twin.unet.conv_in.weight.data = twin.unet.conv_in.weight + 1
        twin.text_encoder.requires_grad_(False)
    twin.scheduler.set_timesteps(3)
    assert torch.equal(draw(pipe), erased)
    assert identity(pipe) == before
    assert pipe.verify_erasures() > 0


WORK = {
    "erase uce": lambda pipe, tmp_path: make(pipe, "uce", "dog"),
    "erase hirm": lambda pipe, tmp_path: make(pipe, "hirm", "dog"),
    "save beside": lambda pipe, tmp_path: pipe.save_erased_pipeline(tmp_path / "out", fuse=False),
    "save": lambda pipe, tmp_path: pipe.save_erasure(tmp_path / "out", "text"),
    "verify": lambda pipe, tmp_path: pipe.verify_erasures(),
    "stock": lambda pipe, tmp_path: pipe.erasure_manager.stock(),
}


@pytest.mark.parametrize("work", WORK)
def test_work_beside_a_pipeline_writes_nothing_into_it(pipe: Any, work: str, tmp_path: Any) -> None:
    before, chains = identity(pipe), forwards(pipe)
    learning = [p.requires_grad for part in (pipe.unet, pipe.text_encoder) for p in part.parameters()]
    WORK[work](pipe, tmp_path)
    assert identity(pipe) == before
    assert forwards(pipe) == chains
    assert learning == [p.requires_grad for part in (pipe.unet, pipe.text_encoder) for p in part.parameters()]


def test_concepts_are_told_beside_a_pipeline(tiny_pipe: Any) -> None:
    made = erasure.erase(
        tiny_pipe, "cat", "itd", steps=3, d_sae=128, retain_rate=1.0, false_positive_rate=1.0, progress=False
    )
    before, chains = identity(tiny_pipe), forwards(tiny_pipe)
    found = erasure.detect_concepts(tiny_pipe, ["a photo of a cat", "a house"])
    assert [set(each) for each in found] == [{"cat"}, {"cat"}]
    assert identity(tiny_pipe) == before
    assert forwards(tiny_pipe) == chains
    other = copy.deepcopy(tiny_pipe)
    ErasureManager(other).unload()
    ErasureManager(other).add(made, "again")
    assert erasure.detect_concepts(other, "a house")[0] == found[1]


def test_an_erasure_is_made_for_the_base_whatever_lora_is_loaded(tiny_pipe: Any, uce: Erasure) -> None:
    layer = tiny_pipe.text_encoder.encoder.layers[0].self_attn.q_proj
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    lora = {
        f"{stem}.lora_A.weight": torch.full((1, layer.in_features), 0.5),
        f"{stem}.lora_B.weight": torch.full((layer.out_features, 1), 0.5),
    }
    tiny_pipe.load_lora_weights(lora, adapter_name="mine")
    beside = make(tiny_pipe, "uce")
    for key, edit in uce.low_rank.items():
        assert torch.equal(beside.low_rank[key].up, edit.up), key
    assert tiny_pipe.get_active_adapters() == ["mine"]
    tiny_pipe.fuse_lora()
    with pytest.raises(UnsupportedModelError, match=r"'mine' is fused .* unfuse_lora"):
        make(tiny_pipe, "uce")


SWITCHES = {
    "disable": lambda manager, made: manager.disable(),
    "set": lambda manager, made: manager.set_erasures("text"),
    "strength": lambda manager, made: manager.set_erasures(["text", "denoiser"], 0.5),
    "delete": lambda manager, made: manager.delete("denoiser"),
    "unload": lambda manager, made: manager.unload(),
    "add": lambda manager, made: manager.add(made, "more"),
    "disabled": lambda manager, made: manager.disabled().__enter__(),
}


def overwrite(pipe: Any) -> None:
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight[0, 0] += 1


REASONS: dict[str, tuple[Any, type[Exception], str]] = {
    "overwritten": (overwrite, AttachError, "changed by something else"),
    "fused projections": (lambda pipe: pipe.fuse_qkv_projections(vae=False), UnsupportedModelError, "unfuse_qkv"),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("reason", REASONS)
def test_a_refused_switch_leaves_everything_as_it_was(
    pipe: Any, uce: Erasure, switch: str, reason: str, tensors_of: Any, draw: Any
) -> None:
    """One of two components cannot be switched; the other comes first."""
    change, error, message = REASONS[reason]
    manager = pipe.erasure_manager
    change(pipe)
    before, chains, image = identity(pipe), forwards(pipe), draw(pipe)
    state = (manager.strengths, manager.active_erasures(), manager.fused_erasures, manager.list_erasures())
    with pytest.raises(error, match=message):
        SWITCHES[switch](manager, uce)
    assert identity(pipe) == before
    assert forwards(pipe) == chains
    assert torch.equal(draw(pipe), image)
    found = (manager.strengths, manager.active_erasures(), manager.fused_erasures, manager.list_erasures())
    assert found == state
    with pytest.raises(VerificationError):
        manager.verify()


def test_a_switch_from_inside_a_call_is_refused(pipe: Any, draw: Any) -> None:
    erased, told = draw(pipe), []

    def switch(given: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        for change in (given.disable_erasures, given.unload_erasures, lambda: given.set_erasures("text")):
            with pytest.raises(AttachError, match="inside of a call"):
                change()
            told.append(step)
        return values

    assert torch.equal(draw(pipe, callback_on_step_end=switch), erased)
    assert told
    pipe.disable_erasures()
    pipe.enable_erasures()


def test_step_caches_are_forgotten_at_a_switch(pipe: Any) -> None:
    class Cache(ModelHook):
        _is_stateful = True
        resets = 0

        def reset_state(self, module: Any) -> Any:
            Cache.resets += 1
            return module

    HookRegistry.check_if_exists_or_initialize(pipe.unet.mid_block).register_hook(Cache(), "cache")
    pipe.disable_erasures()
    assert Cache.resets >= 1
    seen = Cache.resets
    pipe.enable_erasures()
    assert Cache.resets > seen
    assert pipe.verify_erasures() > 0


def test_offloaded_pipelines_have_a_stock_twin_too(pipe: Any, tiny_pipe_original: Any, draw: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    erased = draw(pipe)
    twin = pipe.erasure_manager.stock(offloaded=True)
    assert hasattr(pipe.unet, "_hf_hook")
    assert hasattr(twin.unet, "_hf_hook")
    assert torch.equal(draw(twin), draw(tiny_pipe_original))
    assert torch.equal(draw(pipe), erased)


def test_a_concept_is_made_while_another_is_attached(pipe: Any, tiny_pipe_original: Any) -> None:
    concept = Concept("dog", anchor="house")
    alone, beside = make(tiny_pipe_original, "uce", concept), make(pipe, "uce", concept)
    for key, edit in alone.low_rank.items():
        assert torch.equal(beside.low_rank[key].up, edit.up), key
