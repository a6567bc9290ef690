"""Image classifiers of others: EfficientNet-Lite0 on photographs, folders of timm and transformers, a ResNet-50."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erasure.errors import ArtifactError, EvaluationError, OptionError
from erasure.eval.detectors import NamedDetector, Reading, ask, classifiers, get
from erasure.eval.detectors.classifiers import load_classifier
from erasure.eval.detectors.imagenet import IMAGENETTE, class_names
from tests.eval.detectors.conftest import noise, photograph
from tests.eval.detectors.stand_ins import NAMES, timm_folder, transformers_folder


@pytest.mark.parametrize(
    ("picture", "seen"), [("coffee.png", "espresso"), ("camera.png", "tripod"), ("chelsea.png", "tiger cat")]
)
def test_photographs_are_what_they_show(picture: str, seen: str, ready: Callable[[str], NamedDetector]) -> None:
    (finding,) = ask(ready("imagenet"), [photograph(picture)])
    assert finding.labels == {seen}
    assert finding.flagged is False
    (finding,) = ask(get("imagenet")(flags=(seen,)), [photograph(picture)])
    assert finding.flagged is True
    assert finding.score == finding.scores[seen] > 0.3


def test_the_classes_of_imagenette_are_where_they_are_said_to_be() -> None:
    assert all(class_names()[index] == name for name, index in IMAGENETTE.items())
    assert len(set(class_names())) == 1000


def test_rank_decides_and_the_threshold_besides() -> None:
    reading = Reading({"tench": 0.3, "espresso": 0.5, "cup": 0.1, "church": 0.05, "puck": 0.04})
    judged = {top: get("imagenet")(top=top).judge(reading) for top in (1, 2)}
    assert judged[1].flagged is False
    assert judged[2].flagged is True
    assert judged[1].score == judged[2].score == pytest.approx(0.35)
    assert judged[2].labels == {"tench", "espresso"}
    assert get("imagenet")(top=2, threshold=0.4).judge(reading).flagged is False
    with pytest.raises(OptionError, match="'top' is 6; allowed: at most 5"):
        get("imagenet")(top=6)
    with pytest.raises(OptionError, match="'flags'"):
        get("imagenet")(flags=())


def test_other_bytes_than_the_known_ones_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    monkeypatch.setattr(classifiers, "locate", lambda *names: tmp_path / "other.pth")
    with pytest.raises(ArtifactError, match="has the sha256"):
        load_classifier(None)


def test_a_folder_of_timm_gives_what_timm_gives(tmp_path: Path) -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    folder = timm_folder(tmp_path / "model")
    network = timm.create_model("test_resnet", num_classes=3).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"))
    transform = create_transform(**resolve_data_config({"input_size": (3, 64, 64)}, model=network))
    pictures = [photograph("control.webp"), noise(80, 120)]
    with torch.no_grad():
        expected = network(torch.stack([transform(picture) for picture in pictures])).softmax(1)
    found = ask(get("image_classifier")(model=folder, flags=("oil", "ink")), pictures)
    for finding, row in zip(found, expected.tolist(), strict=True):
        assert finding.scores == pytest.approx(dict(zip(NAMES, row, strict=True)), abs=1e-5)
        assert finding.score == pytest.approx(row[0] + row[1], abs=1e-5)
        assert finding.flagged is (row[0] + row[1] >= 0.5)


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_a_folder_of_transformers_gives_what_transformers_gives(tmp_path: Path, problem: str | None) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    folder = transformers_folder(tmp_path / "model", problem=problem)
    network = AutoModelForImageClassification.from_pretrained(folder).eval()
    pixels = AutoImageProcessor.from_pretrained(folder)(images=[photograph("control.webp")], return_tensors="pt")
    with torch.no_grad():
        logits = network(**pixels).logits[0]
    expected = (logits.sigmoid() if problem else logits.softmax(0)).tolist()
    (finding,) = ask(get("image_classifier")(model=folder, flags=("pastel", "ink")), [photograph("control.webp")])
    assert finding.scores == pytest.approx(dict(zip(NAMES, expected, strict=True)), abs=1e-5)
    assert finding.score == pytest.approx(max(expected[0], expected[2]) if problem else expected[0] + expected[2])


def test_a_resnet_50_of_torchvision_judges_imagenet(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.resnet50().eval()
    torch.save(network.state_dict(), tmp_path / "resnet50.pth")
    save_file(network.state_dict(), tmp_path / "resnet50.safetensors")
    transform = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    with torch.no_grad():
        expected = network(transform(photograph("control.webp"))[None]).softmax(1)[0]
    for name in ("resnet50.pth", "resnet50.safetensors"):
        detector = get("imagenet")(model=tmp_path / name)
        (finding,) = ask(detector, [photograph("control.webp")])
        assert finding.labels == {class_names()[int(expected.argmax())]}
        assert max(finding.scores.values()) == pytest.approx(float(expected.max()), abs=1e-5)
        assert detector.recipe()["known"] is False
        assert detector.golden() == {}


def test_the_edition_of_a_resnet_50_decides_how_pictures_are_scaled(tmp_path: Path, monkeypatch: Any) -> None:
    import torchvision

    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    monkeypatch.setattr(classifiers, "sha256", lambda path: "0676ba61" + "0" * 56)
    recipe = get("imagenet")(model=tmp_path / "resnet50.pth").recipe()
    assert recipe["known"] is True
    assert "resize_size=[256]" in recipe["preprocessing"]
    monkeypatch.setattr(classifiers, "sha256", lambda path: "11ad3fa6" + "0" * 56)
    assert "resize_size=[232]" in get("imagenet")(model=tmp_path / "resnet50.pth").recipe()["preprocessing"]


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = timm_folder(tmp_path / "model")

    def refused(error: type[Exception], said: str, name: str = "image_classifier", **options: Any) -> None:
        with pytest.raises(error, match=said):
            get(name)(**options).recipe()

    refused(EvaluationError, "has no model: name the folder")
    refused(EvaluationError, r"no class is flagged.*'ink', 'oil', 'pastel'", model=folder)
    refused(EvaluationError, "has no class 'inc'.*Did you mean 'ink'", model=folder, flags=("inc",))
    refused(ArtifactError, "no image classifier at .*expected a folder", model=tmp_path / "nothing", flags=("ink",))
    (tmp_path / "empty").mkdir()
    refused(ArtifactError, "found: nothing", model=tmp_path / "empty", flags=("ink",))
    refused(EvaluationError, "tells 3 classes apart, not the 1000", "imagenet", model=folder)
    nameless = timm_folder(tmp_path / "nameless", names=None)
    refused(EvaluationError, "does not say what its 1000 classes are", model=nameless, flags=("ink",))
    get("imagenet")(model=nameless).recipe()
    refused(
        EvaluationError,
        "ImageNet has no class 'tenche'.*Did you mean 'tench'",
        "imagenet",
        model=nameless,
        flags=("tenche",),
    )
    shuffled = timm_folder(tmp_path / "shuffled", names=tuple(reversed(class_names())))
    refused(EvaluationError, "classes are in another order", "imagenet", model=shuffled)
    refused(EvaluationError, "at most 200", model=shuffled, flags=("tench",))
    in_order = timm_folder(tmp_path / "in order", names=class_names())
    get("imagenet")(model=in_order).recipe()

    config = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"label_names": ["ink", "ink", "oil"]}, "2 different classes for 3"),
        ({"architecture": "no_such_model"}, "does not know"),
        ({"num_classes": 4, "label_names": list("abcd")}, "weights of another network"),
        ({"num_classes": -1}, "num_classes"),
        ({"model_args": {"no_such_option": 3}}, "cannot be loaded"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        refused(ArtifactError, said, model=folder, flags=("ink",))
    (folder / "config.json").write_text(json.dumps(config))
    held = load_file(folder / "model.safetensors")
    first = next(iter(held))
    save_file(held | {first: held[first] * float("nan")}, folder / "model.safetensors")
    refused(ArtifactError, "NaN or infinity", model=folder, flags=("ink",))
    (folder / "model.safetensors").write_bytes(b"nothing")
    refused(ArtifactError, "safetensors", model=folder, flags=("ink",))
    other = transformers_folder(tmp_path / "other")
    held = load_file(other / "model.safetensors")
    save_file({name: t for name, t in held.items() if "classifier" not in name}, other / "model.safetensors")
    refused(ArtifactError, "lack", model=other, flags=("ink",))
    (other / "preprocessor_config.json").unlink()
    (tmp_path / "table.pth").write_bytes(b"")
    refused(ArtifactError, "table.pth", "imagenet", model=tmp_path / "table.pth")
    torch.save([1, 2], tmp_path / "table.pth")
    refused(ArtifactError, "no table of tensors", "imagenet", model=tmp_path / "table.pth")


def test_a_picture_larger_than_its_crop_is_read(tmp_path: Path) -> None:
    (finding,) = ask(
        get("image_classifier")(model=timm_folder(tmp_path), flags=("ink",)),
        [Image.new("L", (700, 20)), noise(20, 700)],
    )[1:]
    assert finding.flagged is not None
