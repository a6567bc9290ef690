"""The comparison with eval-unlearn: its arithmetic on small numbers, what is put in place for it, rows, refusals."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torchvision import models, transforms

from benchmarks import eval_unlearn, peer
from benchmarks.__main__ import main
from benchmarks.eval_unlearn import KEYS, TOLERANCE, Answers, EvalUnlearnOptions, Pictures, compared, rate, row, steps
from benchmarks.peer_arithmetic import (
    Rates,
    clip_score_times_100,
    cut_in_batches,
    different_noises,
    err_of,
    inception_pixels,
    normalised_again,
    two_way,
)
from erasure.assets.build.measured import Measured
from erasure.assets.build.tables import TABLES
from erasure.errors import MissingExtraError
from erasure.eval.detectors.clip_zero_shot import ClipZeroShot
from erasure.eval.metrics.clip_score import ClipModel, clip_score
from erasure.eval.metrics.distances import frechet
from tests.docs.test_pages import ROOT

FILE = ROOT / "docs/measured/peer.json"
OPTIONS = EvalUnlearnOptions(concept="dog", retained="cat")


def pictures_of(count: int, side: int = 64) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(each).resize((side, side), Image.Resampling.BICUBIC) for each in coarse]


# Arithmetic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "retained", "batch", "expected"),
    [
        (10, 10, 32, Rates(0.0, 1.0, 10, 10)),  # one batch: the cut is right
        (50, 50, 100, Rates(0.0, 1.0, 50, 50)),
        (50, 50, 32, Rates(0.5, 0.0, 100, 0)),  # no batch is longer than the number of targets
        (50, 200, 32, Rates(0.8, 0.0, 250, 0)),
        (20, 20, 32, Rates(8 / 28, 1.0, 28, 12)),  # the second batch holds 8 retained pictures alone
    ],
)
def test_batches_that_are_cut_at_the_number_of_all_targets(
    targets: int, retained: int, batch: int, expected: Rates
) -> None:
    """Nothing is erased, and every answer is right: UA is 0 and IRA 1."""
    assert cut_in_batches([False] * targets + [True] * retained, targets, batch) == pytest.approx(expected)


def test_two_answers_and_a_tie() -> None:
    assert two_way({"dog": 0.1, "cat": 0.2, "fish": 0.7}, "dog", "cat")
    assert not two_way({"dog": 0.2, "cat": 0.1, "fish": 0.7}, "dog", "cat")
    assert not two_way({"dog": 0.2, "cat": 0.2}, "dog", "cat")


def test_scores_and_means() -> None:
    assert clip_score_times_100([0.5, -0.1]) == pytest.approx(20)
    assert clip_score([0.5, -0.1]) == pytest.approx(0.25)
    assert err_of(None, 0.75, None) == 0.75
    assert err_of(1.0, 0.5, 1.0) == pytest.approx(0.75)
    assert [different_noises(40, 32), different_noises(20, 32)] == [32, 20]


@pytest.mark.parametrize("size", [(64, 64), (400, 300)])
def test_pixels_are_those_of_the_usual_transforms(size: tuple[int, int]) -> None:
    picture = pictures_of(1)[0].resize(size)
    usual = transforms.Compose(
        [transforms.Resize((299, 299)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    assert torch.allclose(inception_pixels(picture), usual(picture), atol=1e-6)


def test_the_network_normalises_what_is_normalised() -> None:
    """torchvision sets `transform_input` by itself where its weights are asked for."""
    network = models.inception_v3(weights=None, init_weights=False, aux_logits=False, transform_input=True).eval()
    seen: list[torch.Tensor] = []

    def stop(layer: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen.append(inputs[0])
        raise InterruptedError

    network.Conv2d_1a_3x3.register_forward_pre_hook(stop)
    pixels = inception_pixels(pictures_of(1)[0])
    with pytest.raises(InterruptedError):
        network(pixels[None])
    assert torch.allclose(normalised_again(pixels), seen[0][0], atol=1e-6)
    low, high = (normalised_again(torch.full((3, 1, 1), value)) for value in (-1.0, 1.0))
    assert (high - low).max() < 1


@pytest.mark.parametrize("count", [40, 10])
def test_a_matrix_root_and_eigenvalues_give_one_distance(count: int) -> None:
    """The second time with fewer pictures than dimensions, as FID of 1000 pictures has."""
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(count, 16)), generator.normal(0.3, 1.2, size=(count, 16))
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    by_root = gap + np.trace(first + second) - 2 * np.trace(sqrtm(first @ second)).real
    assert frechet(x, y, allow_small=True) == pytest.approx(by_root, abs=1e-5)


# What is put in place -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / peer.CLIP_NAMES[0]
    peer.write_clip(folder)
    return folder


def test_the_clip_model_in_the_other_layout_says_the_same(clip_folder: Path) -> None:
    ours, theirs = ClipModel("canvas-clip"), ClipModel(clip_folder)
    pictures, texts = pictures_of(4), ["a photo of a cat", "Image of dog", "cat"]
    assert np.allclose(ours.images(pictures), theirs.images(pictures), atol=1e-5)
    assert np.allclose(ours.texts(texts), theirs.texts(texts), atol=1e-5)


def test_the_image_tower_stands_where_a_network_of_pixels_does(clip_folder: Path) -> None:
    tower = peer.ImageTower(clip_folder)
    (picture,) = pictures_of(1)
    features = tower(inception_pixels(picture)[None]).numpy()
    whole = ClipModel("canvas-clip").images([picture])
    # Enlarged and reduced again: nearly the same picture.
    assert np.abs(features - whole).max() < 0.1 * np.abs(whole).max()


# Rows ---------------------------------------------------------------------------------------------------------------


def made_up() -> tuple[Pictures, Answers]:
    """Forty pictures of an erased model: all targets are fish, half of which a choice of two takes for dogs."""
    scores = [{"dog": 0.2 + 0.2 * (i % 2), "cat": 0.3, "fish": 0.9} for i in range(20)]
    scores += [{"dog": 0.1, "cat": 0.8, "fish": 0.1}] * 20
    cosines = [-0.1, 0.3] * 10 + [0.7] * 20
    figure = {"value": 0.15, "low": 0.1, "high": 0.2, "n": 20}
    ours = Pictures("uce", pictures_of(1) * 40, 20, ["fish"] * 20 + ["cat"] * 20, scores, scores, cosines,
                    (figure, {"value": 0.7, "n": 20}))  # type: ignore[arg-type]  # fmt: skip
    return ours, Answers(Rates(18 / 28, 1.0, 28, 12), Rates(0.5, 1.0, 20, 20), (10.0, 70.0))


def test_rows_explain_what_differs() -> None:
    ours, theirs = made_up()
    rows = {str(each["number"]): each for each in compared(ours, theirs, OPTIONS)}
    assert list(rows) == [
        "UA, batches of 32", "IRA, batches of 32", "UA, one batch", "IRA, one batch", "CLIP score, target prompts",
        "CLIP score, retained prompts",
    ]  # fmt: skip
    assert {each["explained"] for each in rows.values()} == {"yes"}
    one: Any = rows["UA, one batch"]
    assert (one["theirs"]["value"], one["ours"]["value"], one["derived"]["value"]) == (0.5, 1.0, 0.5)
    assert (
        rows["UA, batches of 32"]["why"] == rows["IRA, batches of 32"]["why"] == "28 of 40 pictures count as targets"
    )
    short = Pictures("uce", [], 35, ["cat"] * 35 + ["cat"] * 5, [], [{"dog": 0.0, "cat": 1.0}] * 40, [0.5] * 40,
                     ours.clip_score)  # fmt: skip
    assert "none is left as retained" in str(compared(short, theirs, OPTIONS)[1]["why"])


def test_a_difference_that_is_left_is_told() -> None:
    ours, theirs = made_up()
    wrong = Answers(theirs.in_batches, Rates(0.45, 1.0, 20, 20), theirs.clip_score)
    told = {each["number"]: each["apart"] for each in compared(ours, wrong, OPTIONS) if each["explained"] == "no"}
    assert told == {"UA, one batch": "5e-02"}


def test_the_way_to_their_numbers_takes_one_change_at_a_time() -> None:
    ours, theirs = made_up()
    found: list[Any] = steps(ours, OPTIONS)
    assert [each["UA"]["value"] for each in found] == [
        1.0,
        1.0,
        0.5,
        0.5,
        pytest.approx(theirs.in_batches.ua, abs=1e-6),
    ]
    assert [each["IRA"]["n"] for each in found] == [20, 20, 20, 20, 12]


def test_rows_make_both_tables() -> None:
    ours, theirs = made_up()
    missing = row("FID, retained prompts", "uce", "fid: no network", rate([True]), 1.5, 20, "why")
    rows = [*compared(ours, theirs, OPTIONS), missing, *steps(ours, OPTIONS)]
    measured = Measured(about="a", command=None, keys=list(KEYS), size=None, models=[], seeds=None, rows=rows)
    measured.checked("rows")
    lines = TABLES["peer"].lines(measured)[1]
    assert lines[2][:6] == ["UA, one batch", "`uce`", "0.5000", "1.0000 (0.84-1.00)", "0.5000", "0"]
    assert lines[-1][:6] == ["FID, retained prompts", "`uce`", "fid: no network", "1.0000 (0.21-1.00)", "1.5000", "-"]
    assert TABLES["peer-steps"].lines(measured)[1][2] == ["only two of these names", "0.50", "1.00"]


def test_the_figures_of_the_page_are_explained() -> None:
    rows: list[Any] = [each for each in Measured.read(FILE).rows if each["part"] == "compared"]
    assert len(rows) >= 15
    for each in rows:
        assert each["explained"] == "yes", each["number"]
        assert each["theirs"]["value"] == pytest.approx(each["derived"]["value"], abs=TOLERANCE)
        assert each["theirs"]["n"] == each["derived"]["n"]


# The command --------------------------------------------------------------------------------------------------------


def test_without_the_package_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(peer, "find_spec", lambda name: None)
    assert main(["eval-unlearn"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "eval-unlearn is not installed" in said
    assert "pip install 'eval-unlearn[asr,fid]==1.1.2'" in said
    with pytest.raises(MissingExtraError):
        peer.Peer(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seeds", "0"], "--seeds is 0, allowed: a whole number from 1 to 50"),
        (["--seeds", "51"], "--seeds is 51, allowed: a whole number from 1 to 50"),
        (["--concept", "cat"], "--concept and --retained are both cat: name two objects"),
        (["--concept", "dragon"], "canvas-sd has no object dragon; there are: cat, dog,"),
    ],
)
def test_options_that_cannot_be_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval-unlearn", *given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_shows_writes_and_tells_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ours, theirs = made_up()
    rows = [*compared(ours, theirs, OPTIONS), *steps(ours, OPTIONS)]
    monkeypatch.setattr(peer, "installed", lambda: "9.9")
    monkeypatch.setattr(eval_unlearn, "measure", lambda *_: (rows, {"tifa": "needs modelscope"}))
    of_none = Measured(about="a", command=None, keys=list(KEYS), size=None, models=[], seeds=None, rows=[])
    of_none.write(tmp_path / "peer.json")
    assert main(["eval-unlearn", "--into", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "needs modelscope" in said.out
    assert "eval-unlearn 9.9 is installed; the arithmetic is that of 1.1.2" in said.out
    assert Measured.read(tmp_path / "peer.json").rows == rows

    rows[2]["explained"] = "no"
    assert main(["eval-unlearn", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"] == rows
    assert "not explained: UA, one batch (uce)" in said.err


# With the package ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec(peer.MODULE) is None, reason="needs your own installation of eval-unlearn")
def test_the_package_itself_gives_what_its_arithmetic_does(tmp_path: Path) -> None:
    theirs, pictures = peer.Peer(tmp_path), pictures_of(40)
    detector = ClipZeroShot(flags=("dog",), others=("cat",), templates=(eval_unlearn.WORDING,))
    scores = [reading.scores for reading in detector.read(pictures)]
    taken = [two_way(each, "dog", "cat") for each in scores]
    prompts = ["a dog"] * 20 + ["a cat"] * 20
    for batch in (32, 40):
        given = theirs.ua_ira(pictures, prompts, ("dog", "cat"), 20, batch)
        assert given == pytest.approx(cut_in_batches(taken, 20, batch))
    clip = ClipModel("canvas-clip")
    images, texts = clip.images(pictures), clip.texts(prompts)
    cosines = (images * texts).sum(1) / np.linalg.norm(images, axis=1) / np.linalg.norm(texts, axis=1)
    assert theirs.clip_score(pictures, prompts) == pytest.approx(clip_score_times_100(cosines.tolist()), abs=1e-4)
    features = [theirs.fid_features(part).numpy() for part in (pictures[:20], pictures[20:])]
    found = theirs.fid(pictures[:20], pictures[20:])
    assert found == pytest.approx(frechet(*features, allow_small=True), rel=1e-4)
    assert "not an I2P category" in theirs.asr_i2p("dog")
    assert set(theirs.refusals()) <= set(peer.NEEDY)
