"""What is measured of a model of full size."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import erasure
from benchmarks.attention import materialised
from benchmarks.models import Model, Size, parameters
from benchmarks.training import empty_cache
from erasure import Concept, Erasure, ErasureManager
from erasure.backbones import backbone_for
from erasure.carriers import attention
from erasure.carriers.projections import Rotary, finish, project
from erasure.cli.bench import measure, peak_memory, process_mb, timed
from erasure.errors import OptionError
from erasure.files import write_json
from erasure.interop.protocols import Settings
from erasure.pipelines.removal import StableDiffusionXLObjectRemovalPipeline

CONCEPT = Concept("cat", anchor="dog", retain=("house",))
PROMPT = "a photo of a dog"
LOW_RANK = 16
"""Rank of SFD's LoRAs, its default."""
FULL_UPDATES = 2
"""Updates of SFD: the means of Adam exist from the end of the first one on."""
FEW, MORE = 1, 3
"""Updates of two runs; their difference leaves out what is done once, and the first update, which warms up."""
ONE_STATE: Settings = {
    "batch": 1, "retain_batch": 1, "rollout_steps": 2, "templates": False, "contexts": 0, "retain_vocabulary": 0,
    "gradient_checkpointing": True,
}  # fmt: skip
"""An update of ESD on one state of the concept and one that must survive."""
BOTH_NETWORKS: Settings = {
    "batch": 1, "retain_batch": 1, "templates": False, "contexts": 0, "retain_vocabulary": 0, "head_start": 0.0,
    "gradient_checkpointing": True,
}  # fmt: skip
"""An update of SFD on one image of the concept and one that must survive, in which both networks learn."""
UPDATES: Mapping[str, Settings] = {"esd": ONE_STATE, "hirm": {}}
"""Options of the strategies of which an update is measured; all others are their defaults."""

Figures = Mapping[str, object]
"""What a part gives."""


@dataclass
class Subject:
    """A model that is measured, made when it is first asked for."""

    model: Model
    size: Size
    pixels: int
    """Pixels along a side of an image."""
    steps: int
    """Denoising steps of an image."""
    tokens: int | None
    """Tokens that T5 pads prompts to; `None` for a model without T5."""
    repeats: int
    """Rounds of which medians are taken."""
    backend: str
    """Backend that `torch.compile` uses."""

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline, which declares the size that is measured, as embedded models do."""
        torch.manual_seed(0)
        pipe = self.model.make(self.size)
        write_json(Path(self.folder.name) / "canvas.json", {"generation": self.call})
        pipe.register_to_config(_name_or_path=self.folder.name)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """Where the pipeline says that it is from."""
        return tempfile.TemporaryDirectory()

    @cached_property
    def edit(self) -> Erasure:
        """An erasure in closed form, which every family has."""
        return erasure.erase(self.pipe, CONCEPT, "uce", attach=False, progress=False)

    @property
    def call(self) -> dict[str, float]:
        """How a picture is drawn, in arguments of the pipeline's call."""
        length = {} if self.tokens is None else {"max_sequence_length": self.tokens}
        return {
            "num_inference_steps": self.steps, "guidance_scale": self.model.guidance, "height": self.pixels,
            "width": self.pixels, **length,
        }  # fmt: skip


def images(subject: Subject) -> Figures:
    """Seconds and peak memory of an image, stock, attached and fused, and of making, attaching and detaching."""
    made = subject.edit
    call = {**subject.call, "output_type": "pt"}
    figures = measure(subject.pipe, made.name, made, 1.0, call, subject.repeats, lambda: None)
    return {**figures, **subject.call, "million_parameters": parameters(subject.pipe)}


def update(subject: Subject, strategy: str) -> Figures:
    """Seconds and peak memory of one update of a strategy that trains."""
    pipe, options, peaks = subject.pipe, UPDATES[strategy], list[float]()
    cost = {}
    with empty_cache():
        for steps in (FEW, MORE):
            with peak_memory(pipe, peaks):
                made = erasure.erase(pipe, CONCEPT, strategy, attach=False, progress=False, steps=steps, **options)
            cost[steps] = made.config.cost
    seconds = [each.get("update_seconds", each["seconds"]) for each in cost.values()]
    return {
        "seconds_per_update": (seconds[1] - seconds[0]) / (MORE - FEW),
        "seconds_before": cost[FEW]["seconds"] - (seconds[1] - seconds[0]) / (MORE - FEW) * FEW,
        "rollout_seconds": cost[FEW].get("rollout_seconds"),
        "peak_memory_mb": max(peaks) if peaks else None,
        "bytes": made.size_bytes,
        "options": dict(options),
    }


def esd(subject: Subject) -> Figures:
    """One update of the denoiser."""
    return update(subject, "esd")


def hirm(subject: Subject) -> Figures:
    """One update of the text encoders."""
    return update(subject, "hirm")


def compiled(subject: Subject) -> Figures:
    """Seconds of a pass of the denoiser with its blocks compiled, ahead of attaching and after it.

    The model is of no further use: nothing takes compiled blocks apart.
    """
    pipe, made = subject.pipe, subject.edit
    backbone = backbone_for(pipe)
    with torch.no_grad():
        told, noise = backbone.encode([PROMPT]), backbone.noise([0])
        level = backbone.timesteps(4)[1]

    @torch.no_grad()
    def denoised() -> Tensor:
        return backbone.predict(backbone.model_input(noise, level), level, told, subject.model.guidance)

    def seconds() -> float:
        return statistics.median(timed(pipe, denoised) for _ in range(subject.repeats))

    stock, manager = denoised(), ErasureManager(pipe)
    eager = seconds()
    for path in dict.fromkeys(site.name.rpartition(".")[0] for site in backbone.attention_sites()):
        backbone.denoiser.get_submodule(path).compile(backend=subject.backend)
    compiling = timed(pipe, denoised)
    fast, same = seconds(), relative(denoised(), stock)
    attaching = timed(pipe, lambda: manager.add(made, made.name))
    first = timed(pipe, denoised)
    attached = seconds()
    verified = manager.verify()
    manager.unload()
    return {
        "seconds_eager": eager, "seconds_compiled": fast, "seconds_attached": attached, "speedup": eager / fast,
        "compile_seconds": compiling, "attach_seconds": attaching, "first_pass_attached_seconds": first,
        "difference": same, "difference_detached": relative(denoised(), stock), "verified": verified,
        "backend": subject.backend,
    }  # fmt: skip


def relative(found: Tensor, wanted: Tensor) -> float:
    """Distance of two tensors, as a share of the length of the second."""
    return float((found - wanted).float().norm() / wanted.float().norm())


def sfd(subject: Subject) -> Figures:
    """Peak memory of updates of SFD: two LoRAs on one frozen network, against three whole copies of it.

    With whole parameters, the generator and the fake-score network are copies in float32 of all linear and
    convolution layers, each with gradients and both means of Adam, as in the released code. Each of the two trainings
    has a process of its own.
    """
    low_rank, whole = (alone(distilling, subject, rank) for rank in (LOW_RANK, 0))
    return {
        "low_rank": low_rank, "whole": whole, "memory_ratio": whole["peak_mb"] / low_rank["peak_mb"],
        "pixels": subject.pixels, "options": {**BOTH_NETWORKS, "rank": LOW_RANK, "steps": FULL_UPDATES},
    }  # fmt: skip


def alone(measured: Callable[[Subject, int], Mapping[str, float]], subject: Subject, rank: int) -> Mapping[str, float]:
    """Measure in a new process, with a model of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measured, replace(subject), rank).result()


def distilling(subject: Subject, rank: int) -> Mapping[str, float]:
    """Memory of the model and peak memory of updates of SFD in MB, above what this process had before the model.

    Args:
        subject: The model, which is not made yet.
        rank: Rank of both LoRAs; 0 trains two whole copies.

    Raises:
        OptionError: The system does not tell the memory of a process.
    """
    device = subject.size.device
    before = used_mb(device)
    pipe, peaks = subject.pipe, list[float]()
    loaded = used_mb(device)
    with empty_cache(), peak_memory(pipe, peaks):
        made = erasure.erase(
            pipe, CONCEPT, "sfd", attach=False, progress=False, rank=rank, steps=FULL_UPDATES, **BOTH_NETWORKS
        )
    if not peaks:
        raise OptionError("this system does not tell the peak memory of a process: measure on Linux, or on a GPU")
    return {
        "model_mb": loaded - before, "peak_mb": peaks[0] - before,
        "seconds_per_update": made.config.cost["update_seconds"] / FULL_UPDATES,
        "million_parameters": parameters(pipe)["unet"],
    }  # fmt: skip


def used_mb(device: torch.device) -> float:
    """Memory that is in use, in MB: of the device, or of this process where it runs on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    return process_mb("VmRSS") or 0.0


PARTS: Mapping[str, Callable[[Subject], Figures]] = {
    "images": images, "esd": esd, "hirm": hirm, "sfd": sfd, "compile": compiled,
}  # fmt: skip
"""Parts that are measured of each model; the last one changes it for good."""
ALONE = ("sfd",)
"""Parts that are measured in processes of their own."""


# Removal -------------------------------------------------------------------------------------------------------------


class Materialised(attention.EditedAttention):
    """A redirected layer that forms every probability, as the authors of Attentive Eraser do."""

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: Rotary = None, *args: object, **kwargs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """As diffusers' processors are called."""
        query, key, value = (
            part.transpose(1, 2)
            for part in project(self.site, hidden_states, encoder_hidden_states, image_rotary_emb, self.fused)
        )
        scale = float(self.edit.scale[self.edit.covered].min()) if self.edit.needed else 1.0
        out = materialised(query, key, value, self.edit.covered[0], scale).transpose(1, 2)
        return finish(self.site, out.to(query.dtype), encoder_hidden_states)


@contextmanager
def forming_probabilities() -> Iterator[None]:
    """Redirect attention by forming all probabilities, inside."""
    with mock.patch.object(attention, "EditedAttention", Materialised):
        yield


def removal(subject: Subject) -> Figures:
    """Seconds and peak memory of the removal of an object, and the same with all probabilities formed."""
    # `from_pipe` would make everything float32.
    pipe = StableDiffusionXLObjectRemovalPipeline(**subject.pipe.components, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    side = subject.pixels
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 4 : side // 2, side // 4 : side // 2] = 1

    def removed() -> Tensor:
        return pipe(
            image, mask, num_inference_steps=subject.steps, output_type="pt", blend_radius=0,
            generator=torch.Generator().manual_seed(0),
        ).images  # fmt: skip

    def of(kind: Literal["ours", "materialised"]) -> tuple[Tensor, dict[str, object]]:
        peaks: list[float] = []
        drawn = removed()
        with peak_memory(pipe, peaks):
            seconds = statistics.median(timed(pipe, removed) for _ in range(subject.repeats))
        return drawn, {"seconds_per_image": seconds, "peak_memory_mb": peaks[0] if peaks else None}

    ours, cheap = of("ours")
    with forming_probabilities():
        plain, dear = of("materialised")
    return {
        "ours": cheap, "materialised": dear, "steps": subject.steps, "pixels": side,
        "largest_difference": float((ours.float() - plain.float()).abs().max()),
        "mean_difference": float((ours.float() - plain.float()).abs().mean()),
    }  # fmt: skip
