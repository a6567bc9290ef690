"""What strategies that train on trajectories do on families with a transformer, against the plain arithmetic."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import erasure
from erasure import Concept
from erasure.backbones import Backbone, backbone_for
from erasure.backbones.flux import FluxBackbone
from erasure.backbones.latents import pack, unpack
from erasure.errors import ConceptError, OptionError
from erasure.strategies import get
from erasure.strategies.denoising import Method, trained_parameters
from erasure.training.run import Run
from erasure.training.trajectories import rolling_out
from tests.strategies.updates import first_update

CAT = Concept("cat", anchor="dog")
QUICK: dict[str, Any] = {
    "batch": 2, "retain_batch": 2, "rollout_steps": 3, "contexts": 0, "retain_vocabulary": 0, "templates": False,
}  # fmt: skip
FLOWS = ["flux", "stable-diffusion-3"]


def make(pipe: Any, name: str, run: Run | None = None, **options: Any) -> erasure.Erasure:
    return erasure.erase(pipe, CAT, name, attach=False, progress=False, run=run, **{**QUICK, **options})


@pytest.fixture(scope="module", params=FLOWS)
def pipe(request: pytest.FixtureRequest, tiny_models: Any) -> Any:
    """A tiny pipeline of a family that flows: read it, never change it."""
    return tiny_models[request.param]()


@pytest.fixture(scope="module")
def flux(tiny_models: Any) -> Any:
    return tiny_models["flux"]()


def paths_of(backbone: Backbone, method: Any) -> set[str]:
    return {path.rpartition(".")[0] for path in trained_parameters(backbone, method)}


# Layers --------------------------------------------------------------------------------------------------------------


def test_layers_of_flux(flux: Any) -> None:
    backbone = backbone_for(flux)
    double, single = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"
    text = {f"{double}.{part}" for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")}
    doors = {"context_embedder", "time_text_embed.text_embedder.linear_1"}
    found = {method: paths_of(backbone, method) for method in get_args(Method)}
    assert found["x"] == text | {f"{double}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")} | {
        f"{single}.{part}" for part in ("to_q", "to_k", "to_v")
    }
    assert found["x-strict"] == {f"{double}.{part}" for part in ("to_k", "to_v", "add_k_proj", "add_v_proj")} | {
        f"{single}.to_k", f"{single}.to_v"
    }  # fmt: skip
    behind = {f"transformer_blocks.0.ff_context.net.{part}" for part in ("0.proj", "2")}
    assert found["text"] == text | behind | doors
    assert found["entry"] == doors
    assert found["x+entry"] == found["x"] | doors
    assert found["self"] == set()
    assert found["u"] == found["all"] - found["x"]


def test_layers_of_stable_diffusion_3(tiny_models: Any) -> None:
    """Its first block has an attention of the picture alone, and text ends ahead of the last one's feed-forward."""
    backbone = backbone_for(tiny_models["stable-diffusion-3"]())
    found = {method: paths_of(backbone, method) for method in get_args(Method)}
    assert found["self"] == {f"transformer_blocks.0.attn2.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")}
    assert not found["x"] & found["self"]
    kinds = ("to_k", "to_v", "add_k_proj", "add_v_proj")
    assert found["x-strict"] == {f"transformer_blocks.{n}.attn.{part}" for n in (0, 1) for part in kinds}
    assert {path for path in found["text"] if ".1." in path} == {
        f"transformer_blocks.1.attn.add_{part}_proj" for part in "qkv"
    }
    assert found["entry"] == {"context_embedder", "time_text_embed.text_embedder.linear_1"}


def test_the_attention_of_flux_dev_has_2510_million_parameters() -> None:
    """On the shapes of the released model: what a match of `attn` in the names of linear layers finds."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=16))
    parts = {"transformer": transformer, "text_encoder": nn.Linear(1, 1), "text_encoder_2": nn.Linear(1, 1)}
    backbone = FluxBackbone(SimpleNamespace(components=parts, vae=vae, **parts))  # type: ignore[arg-type]
    known = dict(transformer.named_parameters())
    chosen = trained_parameters(backbone, "x")
    assert set(chosen) == {name for name in known if ".attn." in name and "norm" not in name}
    assert sum(known[path].numel() for path in chosen) / 1e6 == pytest.approx(2510, abs=2)


# One update ----------------------------------------------------------------------------------------------------------


def told(pipe: Any, prompt: str) -> tuple[Tensor, Tensor]:
    """Tokens and pooled vector as the pipeline itself encodes a prompt."""
    if "FluxPipeline" in type(pipe).__name__:
        tokens, pooled, _ = pipe.encode_prompt(prompt, None, device="cpu", max_sequence_length=32)
        return tokens, pooled
    tokens, _, pooled, _ = pipe.encode_prompt(
        prompt, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=32
    )
    return tokens, pooled


def velocity(pipe: Any, x: Tensor, t: Tensor, prompt: str, guidance: Tensor) -> Tensor:
    """What the transformer predicts, called plainly: `(channels, h, w)` for one state."""
    tokens, pooled = told(pipe, prompt)
    if "FluxPipeline" not in type(pipe).__name__:
        return pipe.transformer(
            hidden_states=x[None], timestep=t[None], encoder_hidden_states=tokens, pooled_projections=pooled
        ).sample[0]
    rows, columns = x.shape[1:]
    made = pipe.transformer(
        hidden_states=pack(x[None]), timestep=t[None] / 1000, encoder_hidden_states=tokens, pooled_projections=pooled,
        guidance=guidance[None], txt_ids=torch.zeros(tokens.shape[1], 3),
        img_ids=pipe._prepare_latent_image_ids(1, rows // 2, columns // 2, "cpu", torch.float32),
    ).sample  # fmt: skip
    return unpack(made, rows, columns)[0]


@torch.no_grad()
@pytest.mark.parametrize("base", ["anchor", "null"])
def test_an_update_of_esd_is_plain_arithmetic(pipe: Any, base: str) -> None:
    """`T_g = e(b,g) - eta/g [e(c,g) - e(b,g)]` in the model's own velocity; retained are the teacher's predictions."""
    strategy: Any = get("esd").configured(
        **{**QUICK, "base": base, "eta": 0.7, "retain_weight": 2.0, "rollout_guidance": 3.5, "batch": 6}
    )
    backbone = backbone_for(pipe)
    task, batch = first_update(strategy, backbone, CAT)
    scales = {1.0, 3.5} if backbone.takes_guidance else {1.0}
    assert set(batch.guidance.tolist()) == scales
    with task.student.active():
        found = strategy.losses(task, batch)
    erase, retain = [], []
    for row, (x, t, g, prompt) in enumerate(zip(batch.x, batch.t, batch.guidance, batch.prompts, strict=True)):
        own = velocity(pipe, x, t, prompt, g)
        with task.student.active():
            made = velocity(pipe, x, t, prompt, g)
        if row < 6:
            start = velocity(pipe, x, t, "dog" if base == "anchor" else "", g)
            erase.append((made - (start - 0.7 / g * (own - start))).square().mean())
        else:
            retain.append((made - own).square().mean())
    assert float(found["erase"]) == pytest.approx(float(sum(erase) / 6), rel=1e-3)
    assert float(found["retain"]) == pytest.approx(2.0 * float(sum(retain) / 2), rel=1e-3)


@torch.no_grad()
def test_trajectories_are_the_stock_pipeline_s(pipe: Any) -> None:
    """One pass a step where guidance is told, two elsewhere; the sampler's own noise levels."""
    backbone = backbone_for(pipe)
    strategy: Any = get("esd").configured(**{**QUICK, "rollout_guidance": 3.5, "rollout_steps": 4})
    task = strategy.task(backbone, backbone.reader, [CAT], 0, Accelerator(cpu=True))
    source, seen = task.concept_states, []
    with rolling_out(backbone):
        source.fill()
    noise = backbone.noise([source.noise_seed(0)])

    def note(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(backbone.latents.unpacked(values["latents"].clone()))
        return values

    pipe(
        [source.scenes[0].prompt], latents=backbone.latents.packed(noise), output_type="latent",
        callback_on_step_end=note, **backbone.call_options(3.5, 4),
    )  # fmt: skip
    states = source.take(torch.arange(4))
    assert torch.equal(states.t, pipe.scheduler.timesteps)
    torch.testing.assert_close(states.x, torch.cat([noise, *seen[:-1]]), rtol=1e-4, atol=1e-4)


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("esd", {}), ("esd", {"method": "entry"}), ("esd", {"method": "text"}), ("esd", {"method": "all"}),
        ("esd", {"method": "x-strict", "rank": 0, "lr": 3e-3}),
        ("advunlearn", {"attack_steps": 0}),
    ],
    ids=["esd", "esd-entry", "esd-text", "esd-all", "esd-full", "advunlearn"],
)  # fmt: skip
def test_the_loss_falls(pipe: Any, name: str, options: dict[str, Any]) -> None:
    made = {steps: make(pipe, name, **{"lr": 1e-2, **options}, steps=steps) for steps in (1, 16)}
    costs = {steps: each.config.cost for steps, each in made.items()}
    assert costs[16]["loss_erase"] < 0.6 * costs[1]["loss_erase"]
    assert ("null_drift" in costs[16]) == backbone_for(pipe).takes_guidance
    assert costs[16]["rollout_forwards"] == 0, "the second training finds the trajectories of the first"


@pytest.mark.parametrize("name", ["esd", "advunlearn"])
def test_blocks_that_run_twice_change_nothing_but_the_cost(pipe: Any, name: str) -> None:
    plain, saving = (make(pipe, name, steps=3, lr=1e-3, gradient_checkpointing=on) for on in (False, True))
    assert saving.config.cost["denoiser_forwards"] > plain.config.cost["denoiser_forwards"]
    for path, pair in plain.low_rank.items():
        for found, wanted in zip(saving.low_rank[path], pair, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-3)
    assert not pipe.transformer.is_gradient_checkpointing


def test_a_stopped_run_on_packed_latents_ends_with_the_same_bits(flux: Any, tmp_path: Any) -> None:
    """With states of the student, which are in the checkpoint."""
    options: dict[str, Any] = {"steps": 4, "rollout_by": "student", "refresh": 2, "lr": 1e-2, "batch": 1}
    whole = make(flux, "esd", **options)

    def stop(share: float) -> None:
        if share >= 0.75:
            raise KeyboardInterrupt

    run = Run(checkpoints=tmp_path, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        erasure.erase(flux, CAT, "esd", attach=False, progress=stop, run=run, **{**QUICK, **options})
    resumed = make(flux, "esd", run=run, **options)
    assert resumed.config.cost["sessions"] == 2
    for path, pair in whole.low_rank.items():
        assert torch.equal(pair.up, resumed.low_rank[path].up)
        assert torch.equal(pair.down, resumed.low_rank[path].down)


def test_encoders_of_both_kinds_are_erased_saved_and_loaded(flux: Any, draw: Any, tmp_path: Any) -> None:
    """What `advunlearn` learns in T5 and in CLIP draws the same from its file, and leaves no bit behind."""
    pipe = copy.deepcopy(flux)
    run = Run(checkpoints=tmp_path / "run", validate_every=2)
    made = make(pipe, "advunlearn", run=run, steps=2, lr=3e-2, attack_from=0.0, attack_steps=1)
    assert (tmp_path / "run" / "validation" / "step-000002.png").exists()
    assert made.components == ["text_encoder", "text_encoder_2"]
    stock, manager = draw(pipe), erasure.ErasureManager(pipe)
    manager.add(made, "cat")
    erased = draw(pipe)
    assert not torch.equal(erased, stock)
    assert manager.verify() == len(made.edits)
    manager.unload()
    assert torch.equal(draw(pipe), stock)
    erasure.load(pipe, made.save(tmp_path / "saved"), name="again")
    assert torch.equal(draw(pipe), erased)


def test_a_training_has_its_own_size_and_text_length(flux: Any) -> None:
    made = make(flux, "esd", resolution=48, text_length=24, steps=1)
    assert (made.config.size, made.config.text_length) == ([48, 48], 24)
    plain = make(flux, "esd", steps=1)
    assert (plain.config.size, plain.config.text_length) == ([32, 32], 32)
    assert not torch.equal(
        made.low_rank["transformer/context_embedder"].up if "transformer/context_embedder" in made.low_rank
        else next(iter(made.low_rank.values())).up, next(iter(plain.low_rank.values())).up,
    )  # fmt: skip
    with pytest.raises(OptionError, match="multiples of 4"):
        make(flux, "esd", resolution=42)
    with pytest.raises(OptionError, match="'text_length' is 600; allowed: a whole number, 1 or more and at most 512"):
        make(flux, "esd", text_length=600)
    with pytest.raises(ConceptError, match="not found among the tokens"):
        make(flux, "esd", text_length=1)


def test_scales_of_guidance(flux: Any, tiny_models: Any) -> None:
    assert get("esd").configured(rollout_guidance=2.5).scales(backbone_for(flux)) == (1.0, 2.5)  # type: ignore[attr-defined]
    assert get("esd").configured(trained_guidance=(2.0,)).scales(backbone_for(flux)) == (2.0,)  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match=r"'rollout_guidance' is 0.0; allowed: above 0"):
        make(flux, "esd", rollout_guidance=0.0)
    with pytest.raises(OptionError, match="not told its guidance"):
        make(tiny_models["flux"](guidance_embeds=False), "esd", trained_guidance=(1.0, 2.0))


@torch.no_grad()
def test_null_drift_is_how_far_guidance_moves_the_empty_prompt(flux: Any) -> None:
    strategy: Any = get("esd").configured(**QUICK)
    backbone = backbone_for(flux)
    task = strategy.task(backbone, backbone.reader, [CAT], 0, Accelerator(cpu=True))
    with rolling_out(backbone):
        task.concept_states.fill()
    states = task.concept_states.take(torch.tensor([0, 0, 1, 2]))
    low, high = (
        torch.stack([velocity(flux, x, t, "", torch.tensor(g)) for x, t in zip(states.x, states.t, strict=True)])
        for g in (1.0, 3.0)
    )
    assert task.null_drift((1.0, 3.0)) == pytest.approx(float((high - low).norm() / low.norm()), rel=1e-3)
    assert task.null_drift((2.0, 2.0)) == 0
