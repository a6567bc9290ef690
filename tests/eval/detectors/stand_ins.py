"""Small models of the real classes with random weights, for detectors that work with a model of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import torch

NAMES = ("ink", "oil", "pastel")


def timm_folder(folder: Path, architecture: str = "test_resnet", names: tuple[str, ...] | None = NAMES) -> Path:
    """A folder as timm saves it."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    count = len(names) if names else 1000
    network = timm.create_model(architecture, num_classes=count)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "model.safetensors")
    config = {"architecture": architecture, "num_classes": count, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    if names:
        config["label_names"] = list(names)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def transformers_folder(folder: Path, names: tuple[str, ...] = NAMES, problem: str | None = None) -> Path:
    """A folder as transformers saves it."""
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=len(names),
        id2label=dict(enumerate(names)), problem_type=problem,
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875).save_pretrained(folder)
    return folder
