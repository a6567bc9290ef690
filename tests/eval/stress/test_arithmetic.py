"""Against plain arithmetic: round trips, noise, averages, recovery, steps to half, the classifier of footprints."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erasure import ErasureManager
from erasure.errors import EvaluationError, OptionError
from erasure.eval.detectors.base import NamedDetector
from erasure.eval.detectors.findings import Finding
from erasure.eval.metrics.relearned import half_way, halves, s50
from erasure.eval.samples import Sample
from erasure.eval.stress import get
from erasure.eval.stress.bench import Bench
from erasure.eval.stress.files import fingerprint_of
from erasure.eval.stress.footprint import auc, logistic, separability
from erasure.eval.stress.formats import INT4_GROUP, NF4, NF4_BLOCK, int4, int8, nf4
from erasure.eval.stress.judging import FlaggingJudge
from erasure.eval.stress.training import renamed
from erasure.eval.stress.weights import mean_of, noise_like, with_values
from erasure.eval.suites import Target
from tests.eval.stress.conftest import LAYER


def weight(rows: int = 5, columns: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# Formats ------------------------------------------------------------------------------------------------------------


def test_int8_is_one_scale_a_row() -> None:
    w = weight()
    found = int8(w)
    for row, value in zip(w.numpy(), found.value.numpy(), strict=True):
        scale = np.abs(row).max() / 127
        assert np.allclose(value, np.round(row / scale) * scale, atol=1e-6)
        assert np.abs(value - row).max() <= scale / 2 + 1e-6
    assert found.codes.abs().max() == 127
    assert torch.equal(int8(torch.zeros(2, 4)).value, torch.zeros(2, 4))


def test_int4_is_sixteen_values_a_group() -> None:
    w = weight()
    found = int4(w)
    for row, value, codes in zip(w.numpy(), found.value.numpy(), found.codes.numpy(), strict=True):
        for start in range(0, len(row), INT4_GROUP):
            # The last group is shorter, and what fills it up is 0, which the range of a group holds in any case.
            part = row[start : start + INT4_GROUP]
            low, high = min(part.min(), 0), max(part.max(), 0)
            scale = (high - low) / 15
            zero = round(-low / scale)
            expected = (np.clip(np.round(part / scale) + zero, 0, 15) - zero) * scale
            assert np.allclose(value[start : start + INT4_GROUP], expected, atol=1e-5)
        assert codes.min() >= 0
        assert codes.max() <= 15
    sparse = weight() * (weight(seed=1) > 0)
    assert (int4(sparse).value[sparse == 0] == 0).all()


def test_nf4_takes_the_nearest_of_its_values() -> None:
    w = weight()
    found, flat = nf4(w), w.flatten().numpy()
    table = np.array(NF4, dtype=np.float32)
    for start in range(0, len(flat), NF4_BLOCK):
        part = flat[start : start + NF4_BLOCK]
        scale = np.abs(part).max()
        nearest = table[np.abs(part[:, None] / scale - table).argmin(1)] * scale
        assert np.allclose(found.value.flatten().numpy()[start : start + NF4_BLOCK], nearest, atol=1e-6)
    assert torch.equal(nf4(torch.zeros(3, 5)).value, torch.zeros(3, 5))
    assert len(set(NF4)) == 16


def test_fewer_bits_lose_more() -> None:
    w = weight(64, 512)
    lost = [float((form(w).value - w).square().mean()) for form in (int8, nf4, int4)]
    assert 0 < lost[0] < lost[1] < lost[2]
    for form in (int8, int4, nf4):
        convolution = torch.randn(8, 4, 3, 3)
        assert form(convolution).value.shape == convolution.shape


@pytest.mark.parametrize(("backend", "name"), [("torchao", "int8"), ("bitsandbytes", "nf4")])
def test_libraries_round_alike(backend: str, name: str) -> None:
    pytest.importorskip(backend)
    from erasure.eval.stress.quantise import BACKENDS

    w = weight(16, 256)
    own, other = BACKENDS["torch"][name](w), BACKENDS[backend][name](w)
    assert (own - other).abs().mean() < 0.02 * w.std()


def test_a_backend_refuses_formats_that_it_lacks() -> None:
    with pytest.raises(OptionError, match="'formats' is 'int8'; allowed: nf4 with backend 'bitsandbytes'"):
        get("quantise").configured(backend="bitsandbytes")
    with pytest.raises(OptionError, match="convolutions"):
        get("quantise").configured(backend="torchao", formats=("int8",), convolutions=True)
    with pytest.raises(OptionError, match="'steps' is"):
        get("relearn").configured(steps=())
    with pytest.raises(OptionError, match="'thing' is 'cat'; allowed: 'robot'"):
        get("relearn").configured(thing="cat")


# Changes of weights -------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(stressed_pipe: Any) -> Bench:
    """The tiny pipeline on the bench."""
    manager = ErasureManager(stressed_pipe)
    entries = [{"name": n, "erasure": e, "strength": 1.0} for n, e in manager.erasures.items()]
    samples = (Sample("cat-0", "a cat", 1, "target", ("cat",)), Sample("dog-0", "a dog", 2, "retain", ("dog",)))
    target, processes = Target("cat", "object", ("cat",)), SimpleNamespace(rank=0, count=1)
    given: Any = (manager.twin(), manager.stock(), entries, target, samples, lambda images: [], 3, processes)
    return Bench(*given)


def test_the_edited_weights_are_found(bench: Bench) -> None:
    assert bench.edited == {
        "unet": sorted([f"{LAYER}.weight", "conv_out.weight"], key=list(bench.edited["unet"]).index)
    }
    linear = bench.linear("unet")
    assert f"{LAYER}.weight" in linear
    assert "conv_out.weight" not in linear
    assert "conv_out.weight" in bench.linear("unet", convolutions=True)


def test_noise_is_the_same_on_both_models_and_goes_again(bench: Bench) -> None:
    test = get("noise").configured("smoke", levels=(0.1,))
    control, condition = test.conditions(bench)
    parts = {"erased": bench.pipe.unet, "stock": bench.stock.unet}
    before = {key: part.get_submodule(LAYER).weight.clone() for key, part in parts.items()}
    moved = {}
    for key, change, pipe in (("erased", condition.change, bench.pipe), ("stock", control.change, bench.stock)):
        with change(pipe) as changed:
            moved[key] = changed.unet.get_submodule(LAYER).weight - before[key]
        assert torch.equal(parts[key].get_submodule(LAYER).weight, before[key])
    assert torch.allclose(moved["erased"], moved["stock"], atol=1e-6)
    assert float(moved["stock"].std()) == pytest.approx(0.1 * float(before["stock"].std()), rel=0.1)
    assert not torch.equal(noise_like(before["stock"], 1.0, 0), noise_like(before["stock"], 1.0, 1))
    assert noise_like(torch.full((64, 64), 2.0), 0.5, 0).std() == pytest.approx(1.0, rel=0.1)


def test_an_average_is_one(bench: Bench) -> None:
    stock, erased = (pipe.unet.conv_out.weight.clone() for pipe in (bench.stock, bench.pipe))
    chosen = {"unet": ["conv_out.weight"]}
    for share in (0.25, 1.0):
        with with_values(chosen, mean_of({"unet": {"conv_out.weight": stock}}, share))(bench.pipe) as pipe:
            expected = (1 - share) * erased + share * stock
            assert torch.allclose(pipe.unet.conv_out.weight, expected, atol=1e-6)
    assert torch.equal(bench.pipe.unet.conv_out.weight, erased)


def test_rounding_leaves_the_edit_that_it_leaves(bench: Bench) -> None:
    test = get("quantise").configured("smoke", formats=("int8",), convolutions=False)
    row = test.measured(bench)["edit_survives/int8"]
    after, before = (pipe.unet.get_submodule(LAYER).weight for pipe in (bench.pipe, bench.stock))
    edit, left = after - before, int8(after).value - int8(before).value
    assert row["value"] == pytest.approx(float((left * edit).sum() / edit.square().sum()), abs=1e-6)
    assert row["n"] == 1  # the convolution is not rounded
    assert 0.9 < row["codes_changed"] <= 1


def test_strength_scales_what_is_attached(bench: Bench) -> None:
    stock, erased = (pipe.unet.conv_out.weight.clone() for pipe in (bench.stock, bench.pipe))
    assert torch.equal(bench.rebuilt(0.0).unet.conv_out.weight, stock)
    assert torch.allclose(bench.rebuilt(0.5).unet.conv_out.weight, (stock + erased) / 2, atol=1e-6)
    assert torch.equal(bench.rebuilt(1.0).unet.conv_out.weight, erased)
    assert torch.equal(bench.stock.unet.conv_out.weight, stock)
    assert torch.equal(bench.pipe.unet.conv_out.weight, erased)


def test_what_strength_does_not_scale_is_an_error(
    stressed_pipe: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Bench.rebuilt

    def left_behind(self: Bench, scale: float = 1.0) -> Any:
        return real(self, max(scale, 0.05))

    monkeypatch.setattr(Bench, "rebuilt", left_behind)
    with pytest.raises(EvaluationError, match="strength 0 is not the stock model: the picture of 'cat-"):
        run(stressed_pipe, "strength")


def test_hooks_alone_have_no_weights_to_change(bench: Bench) -> None:
    bench.__dict__["edited"] = {}
    for name in ("noise", "merge"):
        with pytest.raises(EvaluationError, match=r"is changed by 'cat-noise' \(noise\), which work by hooks"):
            get(name).configured("smoke").conditions(bench)
    assert len(get("noise").configured("smoke", weights="all").conditions(bench)) == 2
    assert get("quantise").configured("smoke", formats=("nf4",)).measured(bench)["edit_survives/nf4"]["value"] is None


def test_a_lora_that_is_none_is_refused(bench: Bench, tmp_path: Any) -> None:
    with pytest.raises(EvaluationError, match="neither a file nor a folder"):
        fingerprint_of(str(tmp_path / "none"), "LoRA")
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    with pytest.raises(EvaluationError, match=r"is no \*\.safetensors"):
        fingerprint_of(str(tmp_path / "lora.bin"), "LoRA")
    with pytest.raises(EvaluationError, match=r"a folder without any \*\.safetensors"):
        fingerprint_of(str(tmp_path), "LoRA")
    with pytest.raises(EvaluationError, match="nothing to merge with"):
        get("merge").configured("smoke", shares=()).conditions(bench)


def test_a_lora_is_added_and_reaches_nobody(bench: Bench, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    from erasure.carriers.edits import Edits, LowRank

    layer = bench.pipe.unet.get_submodule(LAYER).weight
    pair = LowRank(torch.full((1, layer.shape[1]), 0.5), torch.full((layer.shape[0], 1), 0.5))
    factors = Edits({f"unet/{LAYER}": pair}).lora_state_dict()
    save_file(factors, tmp_path / "pytorch_lora_weights.safetensors")
    test = get("merge").configured("smoke", shares=(), lora=str(tmp_path / "pytorch_lora_weights.safetensors"))
    control, condition = test.conditions(bench)
    assert (control.name, control.control, condition.needs) == ("stock_lora", "positive", ("stock_lora",))
    before = layer.clone()
    x = torch.ones(1, layer.shape[1])
    plain = bench.pipe.unet.get_submodule(LAYER)(x)
    with condition.change(bench.pipe) as pipe:
        assert torch.allclose(pipe.unet.get_submodule(LAYER)(x), plain + 0.25 * layer.shape[1], atol=1e-4)
    assert torch.equal(bench.pipe.unet.get_submodule(LAYER).weight, before)
    assert torch.equal(bench.pipe.unet.get_submodule(LAYER)(x), plain)


# Numbers ------------------------------------------------------------------------------------------------------------


def test_steps_to_half() -> None:
    assert half_way([0, 10, 20], [0.0, 0.25, 0.75]) == 15
    assert half_way([0, 10], [0.5, 0.2]) == 0
    assert half_way([0, 10, 20], [0.0, 0.4, 0.4]) is None
    curve = [(0, {"a": False, "b": False}), (10, {"a": True, "b": False}), (20, {"a": True, "b": True})]
    assert s50(curve) == 10
    drawn = halves(curve, 200)
    # Samples of two: both "a" are there in 5 steps, one of each in 10, both "b" in 15.
    assert set(drawn) == {5.0, 10.0, 15.0}
    assert np.isinf(halves([(0, {"a": False}), (5, {"a": False})], 10)).all()


def test_area_under_the_curve() -> None:
    assert auc(np.array([[0.0, 1.0], [0.2, 0.9]])) == 1
    assert auc(np.array([[1.0, 0.0]])) == 0
    assert auc(np.array([[0.5, 0.5], [0.5, 0.5]])) == 0.5
    scores = np.random.default_rng(0).normal(size=(9, 2))
    every = [(a < b) + (a == b) / 2 for a in scores[:, 0] for b in scores[:, 1]]
    assert auc(scores) == pytest.approx(np.mean(every))


def test_logistic_regression_is_at_its_minimum() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 2, 40).astype(float)
    weights, bias = logistic(x, y, 2.0)
    t = torch.tensor(np.append(weights, bias), requires_grad=True)
    signs = torch.tensor(2 * y - 1)
    loss = torch.nn.functional.softplus(-signs * (torch.tensor(x) @ t[:3] + t[3])).sum() + t[:3].square().sum()
    loss.backward()
    assert t.grad is not None
    assert t.grad.abs().max() < 1e-6


def test_a_shift_is_told_and_its_absence_is_not() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=(40, 12))
    options: dict[str, Any] = {"folds": 5, "penalty": 1.0, "permutations": 60, "seed": 0}
    shifted = separability(base, base + np.array([3.0, *[0.0] * 11]), **options)
    assert shifted.auc > 0.8
    assert shifted.p == pytest.approx(1 / 61)
    same = separability(base, base + 1e-9 * rng.normal(size=base.shape), **options)
    assert same.p > 0.05
    noisy = [separability(base, base + rng.normal(size=base.shape), **options).p for _ in range(4)]
    assert max(noisy) > 0.05
    assert not math.isnan(same.auc)


# Words and detectors ------------------------------------------------------------------------------------------------


def test_prompts_are_asked_of_another_thing() -> None:
    assert renamed("an apple image in noto style", "apple", "robot") == "a robot image in noto style"
    assert renamed("a photo of a cat", "cat", "<stress>") == "a photo of a <stress>"
    assert renamed("cat", "cat", "umbrella") == "umbrella"
    with pytest.raises(EvaluationError, match="does not name 'dog'"):
        renamed("a photo of a hotdog", "dog", "robot")


def test_a_detector_is_a_judge_that_never_says_safe() -> None:
    class Red(NamedDetector):
        name = "red"

        def recipe(self) -> Any:
            return {"detector": "red", "threshold": self.threshold}

        def read(self, images: Any) -> Any: ...

        def judge(self, reading: Any) -> Any: ...

        def __call__(self, images: Any) -> Any:
            return [Finding(image.getpixel((0, 0))[0] > 128, 0.5) for image in images]

    def picture(red: int) -> Image.Image:
        made = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
        made.putpixel((0, 0), (red, 0, 0))
        return made

    judge = FlaggingJudge(Red(), Target("cat", "object", ("cat",)))
    seen, unseen, broken = judge([picture(255), picture(0), Image.new("RGB", (16, 16))])
    assert (seen.object, unseen.object != "cat") == ("cat", True)  # type: ignore[union-attr]
    assert isinstance(broken, Exception)
    assert judge.fingerprint.startswith("red (")
