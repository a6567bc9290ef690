"""What trained strategies have in common whose student is the denoiser: which of its layers learn, and the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits
from erasure.errors import UnsupportedModelError
from erasure.interop import paths
from erasure.strategies.tasks import Batch, Task
from erasure.strategies.trained import TrainedStrategy
from erasure.training.student import Student, make_student, train_columns

Method = Literal["x", "x-strict", "u", "self", "all", "text", "entry", "x+entry", "blocks"]
BY_COLUMNS: tuple[Method, ...] = ("text", "entry", "x+entry")
"""Methods that train of a layer through which text enters only what reads text."""


@dataclass(frozen=True, kw_only=True)
class DenoiserStrategy(TrainedStrategy):
    """A trained strategy that changes the denoiser, and tells it what the stock text encoders say."""

    method: Method = "x+entry"
    """Linear and convolution layers that are trained, as the released code names them: `x` the attention that text
    passes (cross-attention, and joint attention of text and picture), `x-strict` its keys and values, `self` the
    self-attention of the picture, `u` all but `x`, `all` all of them. Beyond that code: `text` what text alone passes,
    `entry` the layers through which it enters, as `uce` edits them, `x+entry` both `x` and these: the same as `x` on
    Stable Diffusion, while SDXL, Stable Diffusion 3 and FLUX.1 are told a pooled vector besides, which carries a
    concept past `x`; and `blocks` the transformer blocks with what projects into them and out of them, as `spm` has
    it. The released FLUX.1 code leaves the keys and values of the text's own half out of `x-strict`."""

    def student(self, backbone: Backbone, tower: TextTower, generator: torch.Generator) -> Student:
        """See `denoiser_student`."""
        return denoiser_student(backbone, self.method, self.rank, generator)

    def predict(self, task: Task, batch: Batch) -> Tensor:
        """One pass for all rows, with the stock encodings."""
        return task.backbone.predict(batch.x, batch.t, task.prompts(batch.prompts), batch.guidance)

    def edits(self, task: Task) -> Edits:
        """Of the denoiser."""
        return task.student.edits(task.backbone.denoiser_component)

    def idle(self, backbone: Backbone) -> list[nn.Module]:
        """See `beside_denoiser`."""
        return beside_denoiser(backbone)


def denoiser_student(backbone: Backbone, method: Method, rank: int, generator: torch.Generator) -> Student:
    """A LoRA on the layers that a method trains, or their parameters themselves.

    Args:
        backbone: Of the denoiser.
        method: See `DenoiserStrategy.method`.
        rank: Of the LoRA; 0 for the parameters.
        generator: Draws its start.
    """
    chosen = trained_parameters(backbone, method)
    student = make_student(backbone.denoiser, chosen, rank, generator, f"method {method!r}")
    if method in BY_COLUMNS:
        # What else such a layer reads, as the size of the picture, is none of the concept's.
        train_columns(student, {layer.path: layer.columns for layer in backbone.entry_layers()})
    return student


def beside_denoiser(backbone: Backbone) -> list[nn.Module]:
    """The text encoders, whose encodings are kept, and the autoencoder: training the denoiser runs neither."""
    return [*(tower.module for tower in backbone.towers), backbone.pipe.vae]


def trained_parameters(backbone: Backbone, method: Method) -> list[str]:
    """Paths of the denoiser's parameters that a method trains, see `DenoiserStrategy.method`.

    Raises:
        UnsupportedModelError: Projections of its attention are fused, so that those that would be trained do not run.
    """
    sites, denoiser = backbone.attention_sites(), backbone.denoiser
    if fused := next((site.name for site in sites if paths.is_fused(denoiser, site.name)), None):
        raise UnsupportedModelError(
            f"{backbone.denoiser_component}/{fused} has fused projections: call pipe.unfuse_qkv_projections() first"
        )
    text = [site for site in sites if site.kind != "self"]
    attention, doors = [site.name for site in text], [layer.path for layer in backbone.entry_layers()]
    modules: dict[str, list[str]] = {
        "x": attention,
        "x-strict": [path for site in text for path in site.keys_and_values],
        "self": [site.name for site in sites if site.kind == "self"],
        "text": backbone.text_layers(),
        "entry": doors,
        "x+entry": [*attention, *doors],
        "blocks": list(dict.fromkeys(paths.transformer_around(denoiser, site.name) for site in sites)),
    }
    every = [
        path
        for path in paths.canonical_parameters(denoiser)
        if isinstance(paths.layer(denoiser, path.rpartition(".")[0]), (nn.Linear, nn.Conv2d))
    ]
    if method in modules:
        chosen = tuple(f"{path}." for path in modules[method])
        return [path for path in every if path.startswith(chosen)]
    left_out = () if method == "all" else tuple(f"{path}." for path in modules["x"])
    return [path for path in every if not path.startswith(left_out)]
