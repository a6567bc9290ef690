"""What strategies that train on trajectories promise: targets, resuming, processes, plug-ins, cost."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import erasure
from erasure import Concept, Erasure
from erasure.backbones import backbone_for
from erasure.errors import DivergenceError, OptionError, TrainingError
from erasure.strategies import available, get
from erasure.strategies.negative_guidance import NegativeGuidance
from erasure.strategies.prompts import concept_scenes, retain_scenes
from erasure.strategies.trained import TrainedStrategy
from erasure.text.words import without
from erasure.training.objectives import negative_guidance
from erasure.training.plugins import ErasabilityWarning
from erasure.training.run import Run
from erasure.training.states import Scene, States

TRAINED = [name for name, made in available().items() if issubclass(made, TrainedStrategy) and name != "mace"]
"""Strategies that train against the teacher's predictions; `mace` has a loss of another kind, see `test_mace`."""
CAT = Concept("cat", anchor="dog")
QUICK: dict[str, Any] = {
    "steps": 6, "batch": 2, "retain_batch": 2, "rollout_steps": 3, "contexts": 1, "retain_vocabulary": 2, "lr": 1e-2,
    "resolution": 16,
}  # fmt: skip


ADAPTERS = Path(__file__).parents[1] / "tiny" / "ip-adapter"
OF_ONE: dict[str, Any] = {
    "attack_steps": 2, "pictures": 2, "lookalikes": 1, "adapter": str(ADAPTERS / "stable-diffusion.safetensors"),
}  # fmt: skip
"""Options that one strategy has."""
OWN: dict[str, dict[str, Any]] = {"mace": {"retain_batch": 0, "contexts": 0}}
"""What a strategy takes in the place of one of `QUICK`."""


def quick(name: str, **options: Any) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(get(name))}
    return {key: value for key, value in {**QUICK, **OF_ONE, **OWN.get(name, {}), **options}.items() if key in known}


def make(pipe: Any, name: str, concept: Any = CAT, run: Run | None = None, **options: Any) -> Erasure:
    return erasure.erase(pipe, concept, name, attach=False, progress=False, run=run, **quick(name, **options))


def flat(made: Erasure) -> list[torch.Tensor]:
    tensors = made.edits.delta_state_dict() | made.edits.lora_state_dict()
    return [tensors[name] for name in sorted(tensors)]


def same(first: Erasure, second: Erasure) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(first), flat(second), strict=True))


def close(first: Erasure, second: Erasure, tolerance: float) -> None:
    for a, b in zip(flat(first), flat(second), strict=True):
        # A value on the edge of two float16 numbers may be stored as either.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=tolerance)


def products(made: Erasure) -> dict[str, torch.Tensor]:
    """Changes of low rank as whole matrices: factors that come of an SVD may be negative in pairs."""
    factors = made.edits.lora_state_dict()
    return {
        name: factors[name.replace("lora_A", "lora_B")].float() @ part.float()
        for name, part in factors.items()
        if "lora_A" in name
    }


# Targets -------------------------------------------------------------------------------------------------------------


def states_of(asks: int) -> States:
    generator = torch.Generator().manual_seed(0)
    x, own, null = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(3))
    asked = torch.randn(2, asks, 4, 3, 3, generator=generator)
    return States(x, torch.zeros(2), torch.zeros(2, dtype=torch.long), own, null, asked, torch.ones(2))


def test_negative_guidance_in_both_conventions() -> None:
    own, null = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(negative_guidance(null, own, null, 1.0), 2 * null - own)
    torch.testing.assert_close(negative_guidance(null, own, null, 0.0), null)
    for eta in (0.0, 1.0, 2.5):  # from the concept's own prediction, as the diffusers code has it
        torch.testing.assert_close(negative_guidance(null, own, null, eta), own - (eta + 1) * (own - null))


def test_targets_of_presets_are_the_released_arithmetic() -> None:
    states = states_of(1)
    own, null, anchor = states.own, states.null, states.asked[:, 0]
    for preset, wanted in {
        "paper": null - 1.0 * (own - null),
        "released-x": own - 2.0 * (own - null),  # negative_guidance 2, erase_from the concept itself
        "released-sdxl": own - 1.0 * (own - null),
    }.items():
        torch.testing.assert_close(get("esd").configured(preset).target(states), wanted, msg=preset)
    torch.testing.assert_close(get("esd").configured().target(states), anchor - (own - anchor))
    torch.testing.assert_close(get("esd").configured().target(states_of(0)), 2 * null - own)


def test_the_target_of_a_distilled_model_is_that_of_the_model_behind_it() -> None:
    """`T_g = e(b,g) - eta/g [e(c,g) - e(n,g)]`; undivided, of `e(.,g) = v0 + g (v - v0)`, it is `v0 + g (T - v0)`."""
    plain, scale = states_of(1), torch.tensor([1.0, 3.5])
    null, g = plain.null, scale.view(2, 1, 1, 1)
    own, anchor = (null + g * (part - null) for part in (plain.own, plain.asked[:, 0]))
    told = plain._replace(own=own, asked=anchor[:, None], guidance=scale)
    for name, options, base, against in (
        ("esd", {"base": "anchor", "against": "base"}, anchor, anchor),
        ("esd", {"base": "anchor", "against": "null"}, anchor, null),
        ("esd", {"base": "null"}, null, null),
        ("advunlearn", {"base": "null"}, null, null),
    ):
        strategy: Any = get(name).configured(eta=0.7, **options)
        torch.testing.assert_close(strategy.target(told), base - 0.7 / g * (own - against))
        undivided = told._replace(guidance=torch.ones(2))
        torch.testing.assert_close(strategy.target(undivided), null + g * (strategy.target(plain) - null))


def test_the_size_and_the_text_length_of_a_training(tiny_pipe_original: Any) -> None:
    made = make(tiny_pipe_original, "esd", resolution=48, steps=1)
    assert made.config.strategy_config["resolution"] == 48
    with pytest.raises(OptionError, match="multiples of 2"):
        make(tiny_pipe_original, "esd", resolution=49)
    with pytest.raises(OptionError, match=r"'text_length' is 24; allowed: None: the text encoders read \[77\] tokens"):
        make(tiny_pipe_original, "esd", text_length=24)
    with pytest.raises(OptionError, match=r"'trained_guidance'.*a model that is not told its guidance"):
        make(tiny_pipe_original, "esd", trained_guidance=(1.0, 2.0))


@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-xl"])
def test_what_the_denoiser_is_told_without_a_prompt_is_retained(tiny_models: Any, family: str) -> None:
    """Zeros for SDXL, besides the empty prompt; the text encoders, which `advunlearn` trains, never make zeros."""
    backbone, is_xl = backbone_for(tiny_models[family]()), family == "stable-diffusion-xl"
    for name in TRAINED:
        adapter = str(ADAPTERS / f"{family}.safetensors")
        strategy: Any = get(name).configured(**quick(name, states="online", adapter=adapter))
        monet = Concept("monet", anchor=None if isinstance(strategy, NegativeGuidance) else "painting")
        task = strategy.task(backbone, backbone.reader, [CAT, monet], 0, Accelerator(cpu=True))
        prompts = [scene.prompt for scene in task.retain_states.scenes]
        assert "" in prompts
        assert (None in prompts) == (is_xl and strategy.moves_null)
        told = task.prompts([None, "a photo of a cat", None])
        assert [not row.any() for row in told.tokens] == [is_xl, False, is_xl]
        # Each concept of spm is trained by itself: one without an anchor asks about its own prompts alone.
        if isinstance(strategy, NegativeGuidance) and name != "spm":
            assert any(scene.asks == (None,) for scene in task.concept_states.scenes)


def test_scenes_name_the_anchor_and_the_scope(tiny_pipe: Any) -> None:
    tower = backbone_for(tiny_pipe).towers[0]
    scenes = concept_scenes(tower, [CAT, Concept("monet", kind="style")], 0, 3, anchored=True, scope=True)
    assert Scene("a photo of a cat", ("a photo of a dog", "a photo of a")) in scenes
    assert Scene("in monet style", (None, "in style")) in scenes
    assert all(len(scene.asks) == 2 for scene in scenes)
    assert len(scenes) > 10
    plain = concept_scenes(tower, [Concept("cat")], 0, 0, anchored=False, scope=False)
    assert all(scene.asks == () for scene in plain)
    kept = [scene.prompt for scene in retain_scenes(tower, [Concept("cat", retain=("dog",))], 0, 20)]
    assert kept[0] == ""
    assert "a photo of a dog" in kept
    assert not any("cat" in prompt.split() for prompt in kept)
    assert without("a photo of van gogh, by van gogh", Concept("gogh", synonyms=("van gogh",))) == "a photo of , by"


# Equalities ----------------------------------------------------------------------------------------------------------

PLAIN: dict[str, dict[str, Any]] = {
    "doco": {"lr": 1.0, "discriminator_lr": 1e-2, "head_start": 0.0, "surgery": "none"},
    "spm": {"lr": 30.0, "resolution": 32},
}  # fmt: skip
"""Strategies that are compared in plain gradient steps, with rates for these.

The first steps of Adam are as long as its learning rate whatever the gradient is, so that where a gradient is rounding
a step may go either way. A discriminator has two million weights, a few of which are such, and all of its weights step
at once: what differed by 3e-6 of a gradient differs by a hundred times as much in the next update, and so on in what
it teaches. Adapters of rank one have weights whose gradient is hardly more than rounding. A plain step is no longer
than the gradient that it follows.
"""


def plain_steps(parameters: Any, lr: float, **_options: Any) -> torch.optim.Optimizer:
    """Stands in for AdamW."""
    return torch.optim.SGD(parameters, lr)


@pytest.fixture
def compared(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options with which a strategy's trainings are compared; their optimisers take plain steps where that matters."""
    if name in PLAIN:
        monkeypatch.setattr(torch.optim, "AdamW", plain_steps)
    return PLAIN.get(name, {})


@pytest.fixture(scope="module")
def plain(tiny_pipe_original: Any) -> Callable[[str], Erasure]:
    """The erasure by a strategy without further options, made once: read it, never change it."""
    return functools.cache(lambda name: make(tiny_pipe_original, name))


def passes(made: Erasure) -> float:
    """Passes of its updates: what is drawn ahead of them may be there from another run."""
    return made.config.cost["denoiser_forwards"] - made.config.cost["rollout_forwards"]


@pytest.mark.parametrize("name", TRAINED)
def test_online_training_is_buffered_training(name: str, compared: dict[str, Any], tiny_pipe_original: Any) -> None:
    buffered, online = (make(tiny_pipe_original, name, states=states, **compared) for states in ("buffer", "online"))
    close(buffered, online, 2e-3)  # results are stored in float16, after Adam's division by tiny gradients
    assert passes(online) > passes(buffered)


@pytest.mark.parametrize("name", TRAINED)
def test_accumulated_parts_are_one_batch(name: str, compared: dict[str, Any], tiny_pipe_original: Any) -> None:
    whole, parts = (make(tiny_pipe_original, name, accumulation=count, **compared) for count in (1, 2))
    close(whole, parts, 2e-5 if name in PLAIN else 2e-3)


@pytest.mark.parametrize("name", TRAINED)
def test_checkpointing_changes_nothing_but_the_cost(
    name: str, compared: dict[str, Any], tiny_pipe_original: Any
) -> None:
    whole, saving = (make(tiny_pipe_original, name, gradient_checkpointing=on, **compared) for on in (False, True))
    close(whole, saving, 2e-3)
    assert passes(saving) > passes(whole)
    assert not tiny_pipe_original.unet.is_gradient_checkpointing


@pytest.mark.parametrize("name", TRAINED)
def test_a_model_that_trains_is_left_as_it_was(
    name: str, tiny_pipe: Any, tensors_of: Any, changed_tensors: Any
) -> None:
    before, scheduler = tensors_of(tiny_pipe), tiny_pipe.scheduler
    tiny_pipe.unet.train().requires_grad_(True)
    make(tiny_pipe, name, steps=2)
    assert changed_tensors(before, tiny_pipe) == set()
    assert tiny_pipe.unet.training
    assert tiny_pipe.scheduler is scheduler
    assert all(p.requires_grad and p.grad is None for p in tiny_pipe.unet.parameters())
    assert not any(p.requires_grad for p in tiny_pipe.text_encoder.parameters())


@pytest.mark.parametrize(("dtype", "names"), [(torch.bfloat16, TRAINED), (torch.float16, ["esd"])])
def test_half_precision_models_train_float32(tiny_pipe: Any, dtype: torch.dtype, names: Sequence[str]) -> None:
    tiny_pipe.to(dtype)
    for name in names:
        made = make(tiny_pipe, name, steps=3)
        assert any(tensor.any() for tensor in flat(made)), name
        assert made.config.cost["loss_erase"] > 0


# Killed and resumed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(pytest.param(name, {}, id=name) for name in TRAINED),
        # What is drawn ahead of the updates is kept by the loop, which all of them share.
        pytest.param("esd", {"rollout_by": "student", "refresh": 4}, id="esd-student"),
        pytest.param("esd", {"states": "images"}, id="esd-images"),
    ],
)
def test_a_stopped_run_ends_with_the_same_bits(
    name: str, options: dict[str, Any], tiny_pipe_original: Any, tmp_path: Path, plain: Any
) -> None:
    whole = make(tiny_pipe_original, name, **options) if options else plain(name)
    run = Run(checkpoints=tmp_path, save_every=1)

    def stop(share: float) -> None:
        time.sleep(0.05 if share < 0.5 else 0)
        if share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        erasure.erase(tiny_pipe_original, CAT, name, attach=False, progress=stop, run=run, **quick(name, **options))
    resumed = make(tiny_pipe_original, name, run=run, **options)
    assert same(resumed, whole)
    # The cost is that of both sessions, not of the last one.
    cost, alone = resumed.config.cost, whole.config.cost
    assert passes(resumed) == passes(whole)
    assert (cost["sessions"], "sessions" in alone) == (2, False)
    assert cost["earlier_seconds"] >= 0.05
    assert cost["seconds"] > cost["earlier_seconds"]
    assert cost["update_seconds"] >= 0.05
    with pytest.raises(TrainingError, match=r"options.lr: 0.01 in the first, 0.02 in the second"):
        make(tiny_pipe_original, name, run=run, lr=0.02, **options)
    with pytest.raises(TrainingError, match=r"concepts"):
        make(tiny_pipe_original, name, "dog", run=run, **options)


def test_a_student_of_text_encoders_draws_no_trajectories(tiny_pipe_original: Any) -> None:
    with pytest.raises(OptionError, match="'rollout_by'"):
        make(tiny_pipe_original, "advunlearn", rollout_by="student", refresh=4)


def command(model: Path, out: Path, name: str, **options: Any) -> list[str]:
    flags = [
        part for key, value in quick(name, **options).items() for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    return [
        "erase", name, "--model", str(model), "--concept", "cat", "--anchor", "dog", "--out", str(out),
        "--save-every", "1", *flags,
    ]  # fmt: skip


def environment(cache: Path) -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "ERASURE_CACHE": str(cache)}


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PROGRAMS = """
import json, sys
import torch
from erasure.cli.main import main
adam = torch.optim.AdamW
for plain, arguments in json.loads(sys.argv[1]):
    torch.optim.AdamW = (lambda parameters, lr, **_: torch.optim.SGD(parameters, lr)) if plain else adam
    if code := main(arguments):
        sys.exit(code)
"""
"""Several commands of one process, which starts only once; in plain gradient steps where that is said."""


def test_two_processes_train_what_one_does(
    tiny_pipe_folder: Path, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    single, commands = {}, []
    for name in (name for name, strategy in available().items() if strategy.trains):
        options = {"steps": 3, "lr": 1e-3, "resolution": 32, **PLAIN.get(name, {})}
        with monkeypatch.context() as patch:
            if name in PLAIN:
                patch.setattr(torch.optim, "AdamW", plain_steps)
            single[name] = make(erasure.load_pipeline(tiny_pipe_folder), name, **options)
        commands.append((name in PLAIN, command(tiny_pipe_folder, tmp_path / name, name, **options)))
    (tmp_path / "run.py").write_text(PROGRAMS)
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        str(tmp_path / "run.py"), json.dumps(commands),
    ]  # fmt: skip
    done = subprocess.run(
        launch, env=environment(tmp_path / "cache"), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name, made in single.items():
        # Without a running mean of gradients, Adam's steps are as long where rounding is all that a gradient is.
        both = Erasure.load(tmp_path / name)
        if name == "mace":
            torch.testing.assert_close(products(both), products(made), rtol=1e-3, atol=1e-3)
        else:
            # SFD amplifies rounding: on some processors one value of a thousand is 2.4e-4 away.
            close(both, made, 3e-4 if name == "sfd" else 1e-5)


# Plug-ins ------------------------------------------------------------------------------------------------------------


def outputs(pipe: Any, prompt: str) -> torch.Tensor:
    backbone = backbone_for(pipe)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return backbone.predict(x, torch.tensor([900, 100]), backbone.encode([prompt] * 2))


def drift(pipe: Any, made: Erasure, *prompts: str) -> list[float]:
    """How far an erasure moves what the denoiser predicts for prompts."""
    stock = [outputs(pipe, prompt) for prompt in prompts]
    manager = erasure.ErasureManager(pipe)
    manager.add(made, "cat")
    moved = [float((outputs(pipe, p) - before).abs().max()) for p, before in zip(prompts, stock, strict=True)]
    manager.unload()
    return moved


def test_projection_keeps_what_retained_prompts_draw() -> None:
    """Exactly where the trained layers read nothing but text, to the float16 of the file."""
    pipe = erasure.load_pipeline("canvas-sd")
    kept = Concept("cat", anchor="dog", retain=("apple",), templates=("a photo of a {}",))
    options = {"method": "x-strict", "retain_vocabulary": 0, "contexts": 0, "retain_weight": 0.0, "steps": 10}
    moved = {}
    for share in (0.0, 1.0):
        made = make(pipe, "esd", kept, projection=share, **options)
        moved[share] = drift(pipe, made, "a photo of a apple", "", "a photo of a cat")
        assert ("erasability" in made.config.cost) == bool(share)
    assert min(moved[0.0]) > 0.03
    assert max(moved[1.0][:2]) < 1e-3
    assert moved[1.0][2] > 0.03


def test_projection_goes_with_rollouts_of_the_student(tiny_pipe_original: Any) -> None:
    made = make(tiny_pipe_original, "esd", projection=0.5, rollout_by="student", refresh=2, method="x-strict", steps=3)
    assert 0 < made.config.cost["erasability"] <= 1


def test_a_retain_set_that_spans_the_target_warns(tiny_pipe_original: Any) -> None:
    concept = Concept("cat", retain=("kitten", "dog", "apple", "house", "car"))
    with pytest.warns(ErasabilityWarning, match="hardly be erased"):
        make(tiny_pipe_original, "esd", concept, projection=1.0, method="x-strict", retain_vocabulary=30, steps=1)
    with pytest.raises(OptionError, match="raise 'retain_batch'"):
        make(tiny_pipe_original, "esd", projection=1.0, retain_batch=0)


@pytest.mark.parametrize("name", TRAINED)
def test_group_lasso_drops_layers_from_the_file(name: str, tiny_pipe_original: Any) -> None:
    whole, pruned = (
        make(tiny_pipe_original, name, group_lasso=alpha, group_lasso_from=0.0, steps=4, method="all")
        # A layer of rank one is sooner gone.
        for alpha in (0.0, 90.0 if get(name)().rank > 1 else 25.0)
    )
    assert 0 < pruned.config.cost["layers_dropped"] <= pruned.config.cost["layers"]
    assert len(pruned.edits) < len(whole.edits)
    assert pruned.size_bytes < whole.size_bytes
    with pytest.raises(OptionError, match="raise 'rank'"):
        make(tiny_pipe_original, name, group_lasso=1.0, rank=0)


@pytest.mark.parametrize("name", TRAINED)
def test_the_scope_term_keeps_the_rest_of_the_prompt(name: str, tiny_pipe_original: Any) -> None:
    moved = {}
    for weight in (0.0, 10.0):
        made = make(
            tiny_pipe_original, name, scope_weight=weight, steps=10, lr=5e-3, retain_batch=0, attack_steps=0
        )  # fmt: skip
        assert ("loss_scope" in made.config.cost) == bool(weight)
        (moved[weight],) = drift(tiny_pipe_original, made, "a photo of a")
    if made.edits.membranes:
        # Gates that stay shut leave it as it is anyway.
        assert moved == {0.0: 0.0, 10.0: 0.0}
    else:
        assert moved[10.0] < 0.7 * moved[0.0]


# Cost and errors -----------------------------------------------------------------------------------------------------


def test_a_training_state_costs_at_most_six_passes(tiny_pipe_original: Any) -> None:
    """With the default trajectories, none of them from disk, and as many updates; two of them are made."""
    made = erasure.erase(
        tiny_pipe_original, Concept("dog", anchor="cat"), "esd", attach=False, progress=False, seed=11, steps=2,
        resolution=16,
    )  # fmt: skip
    cost = made.config.cost
    assert cost["rollout_forwards"] > 0
    strategy: Any = get("esd").configured()
    states = strategy.batch + strategy.retain_batch
    assert cost["denoiser_forwards"] == cost["rollout_forwards"] + 2 * states * 3
    assert cost["forwards_per_state"] == cost["denoiser_forwards"] / (2 * states)
    assert cost["rollout_forwards"] / (strategy.steps * states) + 3 <= 6


def test_only_trained_strategies_take_a_run(tiny_pipe_original: Any) -> None:
    with pytest.raises(OptionError, match="nothing to resume"):
        erasure.erase(tiny_pipe_original, "cat", "uce", run=Run(), attach=False)


@pytest.mark.parametrize("name", TRAINED)
def test_nan_stops_with_its_term_and_step(name: str, tiny_pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"(at step \d+ of 6|at its step)"):
        make(tiny_pipe, name, lr=1e30, clip=0.0, run=Run(checkpoints=tmp_path))
    fresh = make(tiny_pipe, name)
    assert all(torch.isfinite(tensor).all() for tensor in flat(fresh))


@pytest.mark.parametrize(("option", "value"), [
    ("steps", 0), ("batch", 0), ("rollouts", 0), ("projection", 1.5), ("ema", 2.0), ("states", "none"), ("refresh", 0),
])  # fmt: skip
def test_options_that_cannot_be(option: str, value: Any) -> None:
    for name in TRAINED:
        with pytest.raises(OptionError, match=repr(option)):
            get(name).configured(**{option: value})


def test_images_are_the_stock_model_s(tiny_pipe_original: Any) -> None:
    with pytest.raises(OptionError, match=r"'rollout_by' is 'student'; allowed: 'teacher' for images"):
        make(tiny_pipe_original, "esd", states="images", rollout_by="student")


def test_an_odd_batch_is_refused(tiny_pipe_original: Any) -> None:
    with pytest.raises(OptionError, match="take a multiple of 3"):
        make(tiny_pipe_original, "esd", accumulation=3)


def test_validation_images(tiny_pipe_original: Any, tmp_path: Path) -> None:
    make(tiny_pipe_original, "esd", run=Run(checkpoints=tmp_path, validate_every=3))
    files = sorted((tmp_path / "validation").iterdir())
    assert [file.name for file in files] == ["step-000003.png", "step-000006.png"]
    # They are the student's, which has learned in between.
    assert files[0].read_bytes() != files[1].read_bytes()
