"""Fetch detectors' weights with npm at pinned versions, and write them as safetensors.

The packages hold TensorFlow's tensors as whole numbers of eight bits, each with its smallest value and its step. They
stay so: only axes and names become those of torch.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from erasure.assets import ROOT
from erasure.errors import ArtifactError
from erasure.eval.detectors.weights import RANGE
from erasure.extras import locate
from erasure.files import write_bytes

OUT = ROOT / "detectors"
NSFWJS = ("nsfwjs", "4.4.0")
FACES = ("@vladmandic/face-api", "1.7.15")
CONTROL = "control.webp"
CONTROL_SIDE = 192
"""Pixels on a side of the control picture."""


class Quantised(NamedTuple):
    """A tensor in eight bits, or one in float32 without a range."""

    numbers: np.ndarray
    range: tuple[float, float] | None
    """Smallest value and step."""


def fetch(folder: Path, name: str, version: str) -> Path:
    """Unpack a package of npm below `folder`, unless it is there, and give where; nothing of it is run."""
    target = folder / f"{name.replace('/', '-').removeprefix('@')}-{version}"
    if not (target / "package" / "package.json").is_file():
        target.mkdir(parents=True, exist_ok=True)
        said = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"], cwd=target, check=True, capture_output=True, text=True
        )
        subprocess.run(["tar", "xzf", said.stdout.split()[-1]], cwd=target, check=True)
    return target / "package"


def quantised(manifest: list[dict], content: bytes) -> dict[str, Quantised]:
    """The tensors of a weights manifest of TensorFlow.js, by name.

    Raises:
        ArtifactError: They do not fill the bytes, or are neither in eight bits nor in float32.
    """
    found, start = {}, 0
    for entry in (entry for group in manifest for entry in group["weights"]):
        about, size = entry.get("quantization"), int(np.prod(entry["shape"]))
        if (about or entry)["dtype"] != ("uint8" if about else "float32"):
            raise ArtifactError(f"{entry['name']} is {(about or entry)['dtype']}: another version of the package?")
        kind = np.dtype("uint8" if about else "<f4")
        numbers = np.frombuffer(content, kind, size, start).reshape(entry["shape"])
        found[entry["name"]] = Quantised(numbers, (about["min"], about["scale"]) if about else None)
        start += size * kind.itemsize
    if start != len(content):
        raise ArtifactError(f"the tensors take {start:,} bytes of {len(content):,}: another version of the package?")
    return found


def write(path: Path, tensors: Mapping[str, Quantised]) -> None:
    """Write tensors with their ranges; axes become those of torch."""
    held: dict[str, Tensor] = {}
    for name, (numbers, span) in tensors.items():
        # Copied in torch's order of axes: safetensors takes bytes as they lie.
        held[name] = torch.from_numpy(turned(numbers).copy(order="C"))
        if span is not None:
            held[f"{name}{RANGE}"] = torch.tensor(span, dtype=torch.float64)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(held))


def turned(numbers: np.ndarray) -> np.ndarray:
    """Height, width, inputs, outputs -> outputs, inputs, height, width; inputs, outputs -> outputs, inputs."""
    if numbers.ndim == 4:
        return numbers.transpose(3, 2, 0, 1)
    return numbers.T if numbers.ndim == 2 else numbers


def renamed(tensors: Mapping[str, Quantised], name: Callable[[str], str]) -> Iterator[tuple[str, Quantised]]:
    """Tensors by torch's names; kernels of one filter a channel have their channels first."""
    for key, value in tensors.items():
        is_apart = "depthwise_kernel" in key or "depthwise_filter" in key
        yield name(key), value._replace(numbers=value.numbers.swapaxes(2, 3)) if is_apart else value


NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def nsfwjs_name(key: str) -> str:
    """Name of one of Keras' tensors in `erasure.eval.detectors.nsfwjs.MobileNet`."""
    layer, kind = key.split("/")
    is_norm = kind in NORM
    if layer.startswith("dense_"):
        number = int(layer.removeprefix("dense_"))
        return f"{'head' if number == 3 else f'hidden.{number - 1}'}.{'weight' if kind == 'kernel' else 'bias'}"
    part = f"norm.{NORM[kind]}" if is_norm else "conv.weight"
    if layer in ("Conv1", "bn_Conv1"):
        return f"first.{part}"
    if layer in ("Conv_1", "Conv_1_bn"):
        return f"last.{part}"
    where = re.fullmatch(r"(?:block_(\d+)|expanded_conv)_(expand|depthwise|project)(?:_BN)?", layer)
    if where is None:
        raise ArtifactError(f"a layer {layer!r} that is not known: another version of the package?")
    return f"blocks.{where[1] or 0}.{where[2]}.{part}"


def nsfwjs(folder: Path, out: Path = OUT) -> None:
    """Write the MobileNetV2 of nsfwjs."""
    package = fetch(folder, *NSFWJS)
    model = package / "dist" / "models" / "mobilenet_v2"

    def exported(file: str) -> object:
        code = f"process.stdout.write(JSON.stringify(require({json.dumps(str((model / file).resolve()))})))"
        return json.loads(subprocess.run(["node", "-e", code], check=True, capture_output=True, text=True).stdout)

    about, weights = exported("model.min.js"), exported("group1-shard1of1.min.js")
    assert isinstance(about, dict)
    assert isinstance(weights, str)
    tensors = quantised(about["weightsManifest"], base64.b64decode(weights))
    write(out / "nsfwjs.safetensors", dict(renamed(tensors, nsfwjs_name)))


def finder_name(key: str) -> str:
    """Name of one of face-api's tensors in `erasure.eval.detectors.faces.Finder`."""
    layer, kind = key.split("/")
    number = int(layer.removeprefix("conv"))
    if number in (0, 8):
        return f"{'last' if number else 'first'}.{'weight' if kind == 'filters' else 'bias'}"
    part = {"depthwise_filter": "depthwise.weight", "pointwise_filter": "pointwise.weight", "bias": "pointwise.bias"}
    return f"steps.{number - 1}.{part[kind]}"


def descriptor_name(key: str) -> str:
    """Name of one of face-api's tensors in `erasure.eval.detectors.faces.Descriptor`."""
    parts = {"/conv/filters": ".conv.weight", "/conv/bias": ".conv.bias", "/scale/weights": ".scale",
             "/scale/biases": ".shift"}  # fmt: skip
    for ending, part in parts.items():
        key = key.removesuffix(ending) + part if key.endswith(ending) else key
    return "fc.weight" if key == "fc" else key.replace("/", ".")


def faces(folder: Path, out: Path = OUT) -> None:
    """Write face-api's tiny face detector and dlib's descriptor of faces."""
    models = fetch(folder, *FACES) / "model"
    for source, file, name in (
        ("tiny_face_detector", "faces", finder_name), ("face_recognition", "descriptor", descriptor_name)
    ):  # fmt: skip
        manifest = json.loads((models / f"{source}_model-weights_manifest.json").read_text())
        tensors = quantised(manifest, (models / f"{source}_model.bin").read_bytes())
        write(out / f"{file}.safetensors", dict(renamed(tensors, name)))


def control(out: Path = OUT) -> None:
    """Write the control picture: NASA's portrait of Eileen Collins, in the public domain, as scikit-image has it."""
    picture = Image.open(locate("skimage", "data/astronaut.png")).convert("RGB")
    picture = picture.resize((CONTROL_SIDE, CONTROL_SIDE), Image.Resampling.LANCZOS)
    out.mkdir(parents=True, exist_ok=True)
    picture.save(out / CONTROL, lossless=True, quality=100, method=6)


def build(folder: Path, out: Path = OUT) -> None:
    """Fetch the packages into `folder`, and write everything."""
    nsfwjs(folder, out)
    faces(folder, out)
    control(out)
