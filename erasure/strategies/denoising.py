"""The base class of trained strategies that change the denoiser: which of its layers learn, and the result."""

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
"""Methods that train, in layers through which text enters, only the weight columns that read text."""


@dataclass(frozen=True, kw_only=True)
class DenoiserStrategy(TrainedStrategy):
    """A trained strategy that changes the denoiser and keeps the stock text encoders."""

    method: Method = "x+entry"
    """Linear and convolution layers that are trained. Named as in ESD's released code: `x` the attention layers
    that process text (cross-attention, and joint attention of text and image), `x-strict` the keys and values of
    these, `self` the self-attention of the image, `u` all layers but `x`, `all` all layers. Further choices: `text`
    layers that process text only, `entry` the layers through which text enters (those that `uce` edits), `x+entry`
    both `x` and `entry`, `blocks` the transformer blocks with the layers that project into and out of them (those
    of `spm`). On Stable Diffusion `x+entry` equals `x`; SDXL, Stable Diffusion 3 and FLUX.1 also read a pooled
    vector of the prompt, through which a concept bypasses `x`. In the released FLUX.1 code `x-strict` lacks the
    keys and values of the text stream."""

    def student(self, backbone: Backbone, tower: TextTower, generator: torch.Generator) -> Student:
        """Make the trainable student, see `denoiser_student`."""
        return denoiser_student(backbone, self.method, self.rank, generator)

    def predict(self, task: Task, batch: Batch) -> Tensor:
        """Run the denoiser once for all rows, on stock text encodings."""
        return task.backbone.predict(batch.x, batch.t, task.prompts(batch.prompts), batch.guidance)

    def edits(self, task: Task) -> Edits:
        """Return the edits of the denoiser."""
        return task.student.edits(task.backbone.denoiser_component)

    def idle(self, backbone: Backbone) -> list[nn.Module]:
        """Return the components that training does not run, see `beside_denoiser`."""
        return beside_denoiser(backbone)


def denoiser_student(backbone: Backbone, method: Method, rank: int, generator: torch.Generator) -> Student:
    """Make the student: a LoRA on the layers that a method trains, or their whole parameters.

    Args:
        backbone: Model whose denoiser is trained.
        method: See `DenoiserStrategy.method`.
        rank: Rank of the LoRA; 0 trains whole parameters.
        generator: Draws the initial factors of the LoRA.
    """
    chosen = trained_parameters(backbone, method)
    student = make_student(backbone.denoiser, chosen, rank, generator, f"method {method!r}")
    if method in BY_COLUMNS:
        # Other inputs of such a layer, for instance the image size, do not carry the concept.
        train_columns(student, {layer.path: layer.columns for layer in backbone.entry_layers()})
    return student


def beside_denoiser(backbone: Backbone) -> list[nn.Module]:
    """List the text encoders and the autoencoder, which training of the denoiser does not run."""
    return [*(tower.module for tower in backbone.towers), backbone.pipe.vae]


def trained_parameters(backbone: Backbone, method: Method) -> list[str]:
    """List the paths of the denoiser's parameters that a method trains, see `DenoiserStrategy.method`.

    Raises:
        UnsupportedModelError: The denoiser's attention projections are fused, so the parameters to train are not in
            use.
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
