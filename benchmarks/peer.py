"""Drive the package eval-unlearn offline: its metrics and runner on pictures that are given, without changing it.

Three things that it fetches from the web are put in place beforehand:

- Its CLIP metrics accept four names of the Hub and no folder. transformers reads a folder of that name below the
  working directory ahead of the Hub, so `canvas-clip` lies there in the layout of transformers.
- Its FID fetches an Inception network and photographs of COCO. The network is the image tower of `canvas-clip`, and
  the photographs are the stock model's pictures.
- Its metrics read prompts from the Hub, and most of its techniques are packages that PyPI does not have. UA-IRA takes
  lists of ours; the other metrics are handed pictures by `update`, as its runner does. Pictures that are there already
  come into its runner as a technique, which is how it is meant to be extended.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol
from unittest import mock

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from benchmarks.peer_arithmetic import Rates, inception_pixels
from erasure import assets
from erasure.errors import EvaluationError, MissingExtraError
from erasure.eval.metrics.clip_models import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from erasure.eval.metrics.clip_score import EMBEDDED
from erasure.files import read_tensors

MODULE, PACKAGE, KNOWN = "eval_unlearn", "eval-unlearn", "1.1.2"
"""How it is imported, how pip calls it, and the version that was read."""
CLIP_NAMES = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch32")
"""CLIP models that its metrics ask for by default: the first for UA-IRA and ERR, the second for CLIP score."""
NEEDY = ("asr_p4d", "asr_mma_diffusion", "asr_ring_a_bell", "tifa")
"""Metrics that need other packages, or models that are fetched."""
GIVEN = "given_pictures"
"""Name of the technique that hands out pictures that are there already."""


class Result(Protocol):
    """Result of one of its metrics."""

    value: float | None
    details: Mapping[str, object]


class Metric(Protocol):
    """One of its metrics."""

    def load_dataset(self) -> object:
        """Make ready; FID reads its reference pictures here."""

    def update(self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Mapping[str, object], /) -> None:
        """Look at a batch."""

    def compute(self) -> Result:
        """Give the number."""


def installed() -> str:
    """Version of the user's installation.

    Raises:
        MissingExtraError: It is not installed; the message says what to install.
    """
    if find_spec(MODULE) is None:
        raise MissingExtraError(
            f"{PACKAGE} is not installed, and it is no part of this package: this benchmark compares with your own "
            f"installation of it. Install it with: pip install '{PACKAGE}[asr,fid]=={KNOWN}' (about 100 packages come "
            "with it, so take an environment of its own)"
        )
    return version(PACKAGE)


# What is put in place -----------------------------------------------------------------------------------------------


def write_clip(folder: Path) -> None:
    """Write `canvas-clip` in the layout of transformers.

    Args:
        folder: Where to.
    """
    source = assets.path(EMBEDDED)
    about = json.loads((source / OPEN_CLIP_CONFIG).read_text())
    model, preprocessing = about["model_cfg"], about["preprocess_cfg"]
    text, vision = model["text_cfg"], model["vision_cfg"]
    tokenizer = CLIPTokenizer.from_pretrained(source)
    common = {"hidden_act": "gelu", "projection_dim": model["embed_dim"]}
    config = CLIPConfig(
        text_config={
            "vocab_size": text["vocab_size"], "hidden_size": text["width"], "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"], "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"], "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **common,
        },
        vision_config={
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"], "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"], "patch_size": vision["patch_size"], **common,
        },
        projection_dim=model["embed_dim"],
    )  # fmt: skip
    made = CLIPModel(config)
    tensors = _renamed(read_tensors(source / OPEN_CLIP_WEIGHTS), text["layers"], vision["layers"])
    made.load_state_dict({name: tensor.float().contiguous() for name, tensor in tensors.items()})
    made.save_pretrained(folder)
    side = preprocessing["size"]
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size=side, image_mean=preprocessing["mean"], image_std=preprocessing["std"]
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def _renamed(tensors: Mapping[str, Tensor], text_layers: int, vision_layers: int) -> dict[str, Tensor]:
    """Tensors of an open_clip model by the names that transformers gives them."""
    named = {
        "logit_scale": tensors["logit_scale"],
        "text_projection.weight": tensors["text_projection"].T,
        "visual_projection.weight": tensors["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": tensors["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": tensors["positional_embedding"],
        "vision_model.embeddings.class_embedding": tensors["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": tensors["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": tensors["visual.positional_embedding"],
    }
    for kind in ("weight", "bias"):
        named[f"text_model.final_layer_norm.{kind}"] = tensors[f"ln_final.{kind}"]
        # transformers writes it so.
        named[f"vision_model.pre_layrnorm.{kind}"] = tensors[f"visual.ln_pre.{kind}"]
        named[f"vision_model.post_layernorm.{kind}"] = tensors[f"visual.ln_post.{kind}"]
        for tower, ours, layers in (("text", "", text_layers), ("vision", "visual.", vision_layers)):
            for layer in range(layers):
                block, to = f"{ours}transformer.resblocks.{layer}", f"{tower}_model.encoder.layers.{layer}"
                thirds = tensors[f"{block}.attn.in_proj_{kind}"].chunk(3)
                named |= {f"{to}.self_attn.{q}_proj.{kind}": part for q, part in zip("qkv", thirds, strict=True)}
                named[f"{to}.self_attn.out_proj.{kind}"] = tensors[f"{block}.attn.out_proj.{kind}"]
                named[f"{to}.layer_norm1.{kind}"] = tensors[f"{block}.ln_1.{kind}"]
                named[f"{to}.layer_norm2.{kind}"] = tensors[f"{block}.ln_2.{kind}"]
                named[f"{to}.mlp.fc1.{kind}"] = tensors[f"{block}.mlp.c_fc.{kind}"]
                named[f"{to}.mlp.fc2.{kind}"] = tensors[f"{block}.mlp.c_proj.{kind}"]
    return named


class ImageTower(nn.Module):
    """The image tower of a CLIP model in the place of torchvision's Inception network.

    Args:
        folder: Of the CLIP model, in the layout of transformers.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.clip = CLIPModel.from_pretrained(folder, local_files_only=True).requires_grad_(False)
        self.side = int(self.clip.config.vision_config.image_size)
        self.fc: nn.Module = nn.Identity()
        """Last layer, which its FID takes away."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels `(batch, 3, h, w)` in [-1, 1] -> features `(batch, dim)`."""
        sized = nn.functional.interpolate(pixels, (self.side, self.side), mode="bilinear", antialias=True)
        features = self.clip.get_image_features(pixel_values=sized)
        return self.fc(getattr(features, "pooler_output", features))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep its log and bars off the terminal. No failure is hidden by it: errors are raised, and pictures counted."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# What it gives ------------------------------------------------------------------------------------------------------


class Peer:
    """The package, with what it would fetch put in place.

    Args:
        folder: An empty folder for CLIP models, prompt lists and what its runner writes.

    Raises:
        MissingExtraError: It is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.version = installed()
        self.folder = folder
        for name in CLIP_NAMES:
            write_clip(folder / name)
        self._pictures: list[Image.Image] = []
        with self._inside():
            import_module(f"{MODULE}.metrics")
            self._registry = import_module(f"{MODULE}.registry")
            self._runners = import_module(f"{MODULE}.runners")
            self._registry.register_technique(GIVEN)(self._technique)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        with contextlib.chdir(self.folder), silent():
            yield

    def _technique(self, **config: object) -> _Given:
        return _Given(self._pictures)

    def metric(self, name: str, **config: object) -> Metric:
        """One of its metrics.

        Raises:
            EvaluationError: It cannot be had; the message is its own.
        """
        try:
            with self._inside():
                import_module(f"{MODULE}.metrics.{name}.metric")
                found: Metric = self._registry.get_metric(name)(**config)
        except Exception as error:  # whatever it asks for and does not find
            raise EvaluationError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error
        return found

    def refusals(self) -> dict[str, str]:
        """Why metrics that need more than is here cannot be had; nothing of those that can."""
        missing = {}
        for name in NEEDY:
            try:
                self.metric(name)
            except EvaluationError as error:
                missing[name] = str(error).partition(": ")[2]
        return missing

    def asr_i2p(self, concept: str) -> str:
        """Answer of its ASR on I2P about a concept: the number, or why there is none."""
        with self._inside():
            found = self.metric("asr_i2p", concept_name=concept).compute()
        return str(found.details.get("error", found.value) if found.value is None else found.value)

    def _run(self, technique: str, config: Mapping[str, object], metric: Mapping[str, object], out: str,
             seed: int | None = None) -> Mapping[str, object]:  # fmt: skip
        """Details of UA-IRA from its own runner."""
        with self._inside():
            runner = self._runners.SingleBenchmarkRunner(
                technique_name=technique, metric_name="ua_ira", technique_config=dict(config),
                metric_config=dict(metric), output_dir=str(self.folder / out), seed=seed,
            )  # fmt: skip
            details: Mapping[str, object] = runner.run()["metric_result"]["details"]
        return details

    def _lists(self, target: Sequence[str], retained: Sequence[str]) -> dict[str, object]:
        """Its prompt lists, as files."""
        config: dict[str, object] = {}
        for role, prompts in (("target", target), ("retain", retained)):
            path = self.folder / f"{role}.csv"
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([["prompt"], *([prompt] for prompt in prompts)])
            config[f"{role}_prompts_path"] = str(path)
        return config

    def ua_ira(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], names: tuple[str, str], targets: int, batch: int
    ) -> Rates:
        """UA and IRA by its metric, fed by its own runner and its own reader of prompt lists.

        Args:
            pictures: One for each prompt.
            prompts: Those of targets first.
            names: What was erased, and what was kept.
            targets: How many prompts are of targets.
            batch: Its option `batch_size`.

        Raises:
            EvaluationError: It left pictures out.
        """
        self._pictures = list(pictures)
        config = self._lists(prompts[:targets], prompts[targets:])
        config |= {"target_concept": names[0], "retain_concept": names[1], "batch_size": batch}
        found = self._run(GIVEN, {}, config, "ua-ira")
        counts = {name: int(str(found[f"{name}_total"])) for name in ("target", "retain")}
        _check_count(sum(counts.values()), len(pictures), "ua_ira")
        ua, ira = float(str(found["ua_score"])), float(str(found["ira_score"]))
        return Rates(ua, ira, counts["target"], counts["retain"])

    def clip_score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> float:
        """CLIP score by its metric.

        Raises:
            EvaluationError: It left pictures out.
        """
        metric = self.metric("clip_score")
        with self._inside():
            metric.update(pictures, prompts, {})
            found = metric.compute()
        _check_count(int(str(found.details["evaluated_count"])), len(pictures), "clip_score")
        return float(found.value or 0.0)

    def fid(self, reference: Sequence[Image.Image], pictures: Sequence[Image.Image], batch: int = 32) -> float:
        """FID by its metric, with the image tower of `canvas-clip` and a reference of ours.

        Raises:
            EvaluationError: It cannot be computed; the message is its own.
        """
        tower = ImageTower(self.folder / CLIP_NAMES[0])
        source = import_module(f"{MODULE}.datasets.coco_parquet")
        kind = import_module(f"{MODULE}.types").Dataset

        def reference_batches(**_: object) -> Iterator[object]:
            for part in _batches(reference, batch):
                pixels = torch.stack([inception_pixels(picture) for picture in part])
                yield kind(prompts=[""] * len(part), metadata={"images": pixels})

        with (
            mock.patch("torchvision.models.inception_v3", return_value=tower),
            mock.patch.object(source, "load_coco_parquet", reference_batches),
        ):
            metric = self.metric("fid")
            try:
                with self._inside():
                    metric.load_dataset()
                    for part in _batches(pictures, batch):
                        metric.update(part, [""] * len(part), {})
                    found = metric.compute()
            except Exception as error:  # of SciPy, by version
                raise EvaluationError(f"fid: {type(error).__name__}: {' '.join(str(error).split())}") from error
        _check_count(int(str(found.details["total_generated"])), len(pictures), "fid")
        return float(found.value or 0.0)

    def fid_features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features that its FID has of pictures, `(pictures, dim)`, worked out by `inception_pixels`."""
        tower = ImageTower(self.folder / CLIP_NAMES[0])
        with torch.no_grad():
            return torch.cat([tower(inception_pixels(picture)[None]) for picture in pictures])

    def err_of_retained(self, pictures: Sequence[Image.Image], concept: str) -> float:
        """ERR by its metric, of retained pictures alone: the arms that look for nudity are given nothing.

        Raises:
            EvaluationError: It cannot be had, or left pictures out.
        """
        metric = self.metric("err")
        metadata = {"concepts": [concept] * len(pictures), "categories": ["retain"] * len(pictures)}
        with self._inside():
            metric.update(pictures, [""] * len(pictures), metadata)
            found = metric.compute()
        counts = found.details["counts"]
        assert isinstance(counts, dict)
        _check_count(int(counts["retain"]["evaluated"]), len(pictures), "err")
        return float(found.value or 0.0)

    def drawn(self, model: Path, prompt: str, count: int, seed: int | None, out: str, **call: object) -> list[bytes]:
        """Pixels of pictures that its own runner draws of one prompt, in their order.

        Args:
            model: Folder of a pipeline.
            prompt: The prompt.
            count: How many.
            seed: Seed of its runner; its command line has no option for one, and gives none.
            out: Name of a folder for what it writes.
            **call: Steps and guidance, as its options are called.
        """
        config = self._lists([prompt] * count, [prompt]) | {"target_concept": "this", "retain_concept": "that"}
        self._run("free_run", {"model_id": str(model), "device": "cpu", **call}, config, out, seed)
        files = sorted((self.folder / out).rglob("target/*.png"), key=lambda file: int(file.stem.rpartition("_")[2]))
        _check_count(len(files), count, "free_run")
        return [Image.open(file).convert("RGB").tobytes() for file in files]


class _Given:
    """A technique of its kind that draws nothing."""

    def __init__(self, pictures: Sequence[Image.Image]) -> None:
        self._left = list(pictures)

    def generate(self, prompts: Sequence[str], seed: int | None = None, **call: object) -> list[Image.Image]:
        """Hand out the next pictures."""
        given, self._left = self._left[: len(prompts)], self._left[len(prompts) :]
        return given


def _batches(pictures: Sequence[Image.Image], size: int) -> Iterator[Sequence[Image.Image]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def _check_count(found: int, expected: int, name: str) -> None:
    """Refuse a number that some pictures are missing from: failures are only logged there."""
    if found != expected:
        raise EvaluationError(f"{name} looked at {found} pictures of {expected}: it could not read the others")
