"""What commands share in opening models: options, erasures, and what a Canvas model says of itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from erasure.cli.arguments import UsageError
from erasure.concept import Concept, Kind
from erasure.world import World

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from erasure.artifact import Erasure
    from erasure.assets.facts import CanvasFacts
    from erasure.attach import ErasureManager
    from erasure.interop.protocols import Settings
    from erasure.pipelines import Task


@dataclass(kw_only=True)
class DeviceOptions:
    """Where models run, and in which precision."""

    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, mps. The fastest available one when left out."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the weights; the one that suits the device when left out."""

    def of(self, model: str) -> ModelOptions:
        """Options of one model on this device.

        Args:
            model: Repository of the Hugging Face Hub, folder, or embedded model.
        """
        return ModelOptions(model=model, device=self.device, dtype=self.dtype)


@dataclass(kw_only=True)
class _NamedModel:
    """A model; a class of its own, so that helps list it before the device."""

    model: str
    """Repository of the Hugging Face Hub, folder, single-file checkpoint (.safetensors), or embedded model
    (`canvas-sd`)."""
    config: str | None = None
    """For a single-file checkpoint: folder or repository of a model of its kind, from which the configs, tokenisers
    and what the file lacks are taken. Left out, the Hub is asked for those of the published model."""


@dataclass(kw_only=True)
class ModelOptions(DeviceOptions, _NamedModel):
    """A model, and the device on which it runs."""


@dataclass(kw_only=True)
class TaughtModelOptions(ModelOptions):
    """A model that may know concepts that were learned from pictures."""

    learned: tuple[str, ...] = ()
    """Folders of learned concepts (`erasure learn`), whose tokens prompts and --concept may name then."""


@dataclass(kw_only=True)
class ErasedModelOptions(TaughtModelOptions):
    """A model with any number of erasures."""

    erasure: tuple[str, ...] = ()
    """Erasures to attach: folders, or repositories of the Hugging Face Hub."""
    strength: tuple[float, ...] = ()
    """Strength of each erasure, in their order; 1 when left out."""


@dataclass(kw_only=True)
class MeasuringOptions(ErasedModelOptions):
    """A model with erasures that is measured."""

    kind: Kind | None = None
    """Kind of the concepts that --concept names. Left out, a Canvas model says it, and other models take them for
    objects."""
    seed: int = 0
    """Seed of the samples' noise, and through it of everything random."""
    judge: str | None = None
    """Detector in the place of the suite's own: the folder of a judge, or `module:attribute` of a function or class of
    your own that takes a list of images and gives answers with `.object` and `.style`."""
    json: bool = False
    """Print the results as JSON, and nothing else on stdout."""


@dataclass(kw_only=True)
class SuiteOptions:
    """What suites on prompts are given."""

    preset: str | None = None
    """Choices of a paper, such as `mace-nudity`: detector, sampler, steps, guidance and size."""
    category: str | None = None
    """Category of the prompt list's rows that are drawn; `all` for every row."""
    retain: tuple[str, ...] = ()
    """Names that must survive, for suites that make prompts of names."""
    world: str | None = None
    """Closed world that the model was made for, where it does not declare it: `unlearncanvas`."""

    def inputs(self, prompts: str | None, detectors: Sequence[str]) -> dict[str, Any]:
        """Arguments for a suite besides concepts, size and seed.

        Args:
            prompts: Prompt list.
            detectors: Detectors, as texts.

        Raises:
            ErasureError: A detector or a number cannot be what is given; nothing has been opened yet.
        """
        from erasure.eval.detectors.choices import read_choices
        from erasure.eval.inputs import Inputs

        own = {field.name for field in fields(Inputs)} & {field.name for field in fields(self)}
        given: dict[str, Any] = {name: getattr(self, name) for name in sorted(own - {"prompts", "clip"})}
        if detectors:
            read_choices(detectors)
            given["detectors"] = tuple(detectors)
        given = {name: value for name, value in {**given, "prompts": prompts}.items() if value not in (None, ())}
        Inputs.read(given)
        return given

    def use_sampler(self, pipe: DiffusionPipeline, suite: str) -> None:
        """Give the pipeline, which is ours, the sampler that a preset of a suite names."""
        import diffusers

        from erasure.eval.suites import SUITES
        from erasure.eval.suites.prompts import PromptSuite

        kit = SUITES.get(suite)
        preset = kit.about.presets.get(self.preset or "") if isinstance(kit, PromptSuite) else None
        if preset is not None and preset.scheduler is not None:
            pipe.scheduler = getattr(diffusers, preset.scheduler).from_config(pipe.scheduler.config)


@dataclass(kw_only=True)
class DrawnSuiteOptions(SuiteOptions):
    """What suites on prompts are given, and how they draw."""

    steps: int | None = None
    """Denoising steps, for suites on prompts; the model's own number when left out."""
    guidance: float | None = None
    """Guidance scale, for suites on prompts; the model's own when left out."""
    side: int | None = None
    """Height and width of images in pixels, for suites on prompts; the model's own when left out."""


@dataclass(kw_only=True)
class RecordedOptions(MeasuringOptions):
    """A measurement whose summary goes into the erasure that was measured."""

    no_record: bool = False
    """Do not write a summary of the results into the erasure's config and card, where `erasure info` finds it."""


def open_model(options: ModelOptions, *, text_only: bool = False, task: Task = "text-to-image") -> DiffusionPipeline:
    """Load the pipeline with the progress bars of diffusers off.

    Args:
        options: Which, in what precision, and where to.
        text_only: Only its text encoders, of any family.
        task: What it is to do; see `erasure.load_pipeline`.

    Raises:
        ErasureError: There is no such model, or it cannot be loaded.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    import erasure.api
    from erasure import files

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    settings: Settings = {}
    if options.dtype is not None:
        import torch

        settings["dtype"] = getattr(torch, options.dtype)
    if options.device is not None:
        settings["device"] = options.device
    if text_only and options.config is None and not files.is_checkpoint(options.model):
        pipe = erasure.api.load_text_encoders(options.model, **settings)
    else:
        if options.config is not None:
            settings["config"] = options.config
        pipe = erasure.load_pipeline(options.model, task=task, **settings)
    if isinstance(options, TaughtModelOptions) and options.learned:
        from erasure.learning import LearnedConcepts

        for concepts in [LearnedConcepts.read(folder) for folder in options.learned]:
            concepts.load_into(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_strengths(options: ErasedModelOptions) -> None:
    """Refuse a number of strengths that does not go with the erasures, before anything is loaded.

    Raises:
        UsageError: There is neither none nor one for each erasure.
    """
    if options.strength and len(options.strength) != len(options.erasure):
        raise UsageError(
            f"{len(options.strength)} --strength for {len(options.erasure)} --erasure: give one for each, or none"
        )


def require_tokens(pipe: DiffusionPipeline, texts: Sequence[str]) -> None:
    """Refuse texts with a token in angle brackets that the model has not learned.

    Raises:
        ConceptError: There is one.
    """
    from erasure.backbones import backbone_for
    from erasure.carriers import embeddings

    embeddings.require_tokens(backbone_for(pipe).towers, texts)


def check_seeds(seed: int, count: int = 1) -> None:
    """Refuse seeds that no generator takes, before anything is loaded.

    Args:
        seed: The first.
        count: How many there are, one after the other.

    Raises:
        UsageError: One has more than 64 bits.
    """
    if not -(2**63) <= seed <= 2**64 - count:
        raise UsageError("--seed has more than 64 bits: give a whole number from -2^63 to 2^64 - 1")


def read_erasure(source: str) -> Erasure:
    """Read an erasure that the user has named.

    Raises:
        ErasureError: There is none, or it cannot be read.
    """
    from erasure import assets
    from erasure.artifact import Erasure

    if source in assets.models() and not os.path.lexists(source):
        raise UsageError(f"{source!r} is no erasure, but an embedded model: name it as --model")
    return Erasure.load(source)


def load_erasures(options: ErasedModelOptions) -> dict[str, Erasure]:
    """Read the erasures, by the names under which they will be attached.

    Raises:
        ErasureError: One cannot be read.
    """
    found: dict[str, Erasure] = {}
    for source in options.erasure:
        made = read_erasure(source)
        name, copy = made.name, 2
        while name in found:
            name, copy = f"{made.name}-{copy}", copy + 1
        found[name] = made
    return found


def attach(
    pipe: DiffusionPipeline, erasures: Mapping[str, Erasure], strength: tuple[float, ...] = ()
) -> ErasureManager:
    """Attach erasures by name, with their strengths, and give the manager."""
    from erasure.attach import ErasureManager

    manager = ErasureManager(pipe)
    for name, made in erasures.items():
        manager.add(made, name=name)
    if strength:
        manager.set_erasures(list(erasures), strengths=list(strength))
    return manager


def canvas_facts(model: str) -> CanvasFacts:
    """`canvas.json` of a model folder or embedded model; empty for models of no known world.

    Raises:
        ArtifactError: It is damaged.
    """
    from erasure import assets

    return assets.facts_of(model)


def make_concepts(
    words: Sequence[str], facts: CanvasFacts, kind: Kind | None = None, anchor: str | None = None, tell: bool = True
) -> list[Concept]:
    """The concepts of words in the world that a `canvas.json` describes; see `erasure.world.World.concepts`."""
    return World.from_facts(facts).concepts(words, kind=kind, anchor=anchor, tell=tell)
