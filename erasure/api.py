"""The functions for any stock diffusers pipeline: make, attach, load."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from erasure import bases, files, ledger
from erasure.adding import Addition
from erasure.artifact import Erasure, ErasureConfig, default_name
from erasure.attach import ErasureManager
from erasure.backbones import Backbone, TextTower, backbone_for
from erasure.carriers.embeddings import refuse_half_learned, require_tokens
from erasure.concept import Concept
from erasure.errors import (
    ArtifactError,
    ErasureError,
    IgnoredRetainWarning,
    NoMatchingModuleError,
    OptionError,
    UnsupportedModelError,
)
from erasure.files.recognise import MODEL_FILE
from erasure.interop import scopes, single_files, variants
from erasure.options import check_seed
from erasure.progress import reporting
from erasure.strategies import Fit, Strategy, get
from erasure.strategies.looped import LoopedStrategy
from erasure.training.run import Run
from erasure.versions import library_versions
from erasure.world import World

if TYPE_CHECKING:
    from erasure.pipelines import Task


def erase(
    pipe: DiffusionPipeline,
    concepts: str | Concept | Sequence[str | Concept],
    strategy: str | None = None,
    *,
    name: str | None = None,
    seed: int | None = None,
    attach: bool = True,
    preset: str | None = None,
    progress: bool | Callable[[float], None] = True,
    run: Run | None = None,
    strict: bool = False,
    controlnet: bool = False,
    add_to: Erasure | str | Path | None = None,
    **options: object,
) -> Erasure:
    """Make an erasure and attach it.

    The erasure is made from the base model, on another pipeline object that shares the weights but has none of the
    pipeline's erasures and LoRA adapters. Erasures thus stack as if each had been made alone, and other threads can
    draw with the pipeline meanwhile.

    Args:
        pipe: Any pipeline of a supported family.
        concepts: One or several concepts to erase by one erasure. A word has its meaning in the model's world, see
            `erasure.world.World`; a `Concept` is used as it is.
        strategy: Name of a method, see `erasure.strategies.available()`. When left out: `hirm`, or with `add_to` the
            method of the last request.
        name: Name under which it is attached.
        seed: Seed of all random choices. When left out: 0, or the erasure's seed when all concepts are fitted anew.
        attach: Whether to attach it to `pipe`, replacing the erasure of `add_to`.
        preset: Name of a set of the strategy's options.
        progress: `True` for a progress bar, or a function that is called with the share of the work that is done, 0 to
            1.
        run: For strategies that train: folder of checkpoints, from which an interrupted training continues, and
            logging.
        strict: Raise an error instead of a warning when a call bypasses the erasure.
        controlnet: Also edit the layers of the pipeline's ControlNet that the denoiser has too.
        add_to: An existing erasure, its folder or its Hub repository. The result erases its concepts and the new ones,
            and lists the requests in its config; the existing erasure does not change. See `Strategy.adds`.
        **options: The strategy's options.

    Raises:
        ArtifactError: The erasure of `add_to` is missing, damaged, or of another model.
        UnknownStrategyError: The strategy does not exist.
        ConceptError: A concept has no known token, or has a learned token that only one of two CLIP encoders knows; or
            a concept is erased already or contradicts one that is.
        OptionError: The strategy does not have an option, or does not allow its value; or the seed is none.
        AttachError: The name is used by an attached erasure.
        UnsupportedModelError: The family or the state of the model does not allow it.
        DivergenceError: NaN or infinity occurred during optimisation.
        TrainingError: The run's folder is in use, holds something else, or cannot be written.
    """
    earlier = None if add_to is None else ledger.read(add_to)
    if strategy is None:
        strategy = "hirm" if earlier is None else earlier.config.ledger[-1]["strategy"]
    method = get(strategy).configured(preset, **options)
    seed = None if seed is None else check_seed(seed, strategy)
    if run is not None and not isinstance(method, LoopedStrategy):
        raise OptionError(f"{strategy} does not train on trajectories, so there is nothing to resume: leave out 'run'")
    world, backbone = World.of(pipe), backbone_for(pipe)
    wanted = world.concepts(concepts, erased=() if earlier is None else earlier.concepts)
    for need in method.needs:
        if reason := backbone.lacks(need):
            raise UnsupportedModelError(
                f"{strategy} needs {need}, and a model of {backbone.family} like this has none: {reason}"
            )
    _warn_of_ignored_retain(method, wanted)
    addition = None
    if earlier is not None:
        given = {**method.presets.get(preset or "", {}), **options}
        addition = Addition.planned(world, earlier, wanted, method, list(given), seed)
        method, wanted = addition.method, addition.concepts.every
    seed = addition.seed if addition is not None else seed or 0
    manager = ErasureManager(pipe)
    if fused := manager.fused_erasures:
        raise UnsupportedModelError(
            f"{fused[0]!r} is fused, so the new one would be made for the erased model: unfuse_erasure() first"
        )
    if attach:
        # Errors of the name are found before the work, not after it.
        replaced = None if addition is None else addition.attached_as(manager)
        label = method.name if addition is None else addition.strategy
        manager.check_name(name or default_name(wanted, label), replaced)
    _check_words(backbone.towers, wanted)
    started = time.perf_counter()
    backbone = method.session(backbone_for(manager.stock(without_adapters=True)))
    if addition is not None:
        addition.check(backbone)
    with reporting(progress, method.name) as report:
        fit, base = _fitted(backbone, method, wanted, addition, seed, report, run)
    # A resumed training also costs what its earlier sessions took.
    seconds = time.perf_counter() - started + fit.log.get("earlier_seconds", 0.0)
    config = ErasureConfig(
        strategy=method.name,
        strategy_config=dataclasses.asdict(method),
        concepts=[concept.to_dict() for concept in wanted],
        family=backbone.family,
        base=base,
        carriers=fit.edits.carriers,
        protects=method.protects,
        versions=library_versions(),
        seed=seed,
        cost={"seconds": round(seconds, 3), **{k: round(v, 6) for k, v in fit.log.items()}},
        gates=dict(fit.gates),
        text_length=backbone.text_length,
        size=bases.size_of(backbone),
        sampling=None if fit.level is None else {"steps": 1, "guidance": 1, "level": fit.level},
    )
    if addition is not None:
        config = addition.described(config)
    made = Erasure(config, fit.edits)
    if attach:
        strength = 1.0 if replaced is None else manager.strengths[replaced]
        manager.add(made, name, strength, strict=strict, controlnet=controlnet, replaces=replaced)
    return made


def _check_words(towers: Sequence[TextTower], concepts: Sequence[Concept]) -> None:
    """Refuse concepts, anchors and retained words that a text encoder cannot read.

    Raises:
        ConceptError: A text has no known token, or has a learned token that only one of two CLIP encoders knows.
    """
    texts = [text for concept in concepts for text in concept.texts()]
    require_tokens(towers, texts)
    refuse_half_learned(towers, texts)
    for words in dict.fromkeys(words for concept in concepts for words in (concept.anchor, *concept.retain) if words):
        for tower in towers:
            tower.check_words(words)


def _fitted(
    backbone: Backbone, method: Strategy, concepts: Sequence[Concept], addition: Addition | None, seed: int,
    progress: Callable[[float], None], run: Run | None,
) -> tuple[Fit, dict[str, Any]]:  # fmt: skip
    """Let a method compute its edits of the base model; give them with the description of that base.

    Raises:
        DivergenceError: The edits hold NaN or infinity.
        NoMatchingModuleError: There are no edits.
        UnsupportedModelError: The model is not plain: quantised or offloaded.
    """
    with scopes.same_gradient_mode(), scopes.plain_precision():
        backbone.check_plain("make the erasure with the plain model and load the result here")
        # The caller may have switched gradients off for generation.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if addition is not None:
                fit = addition.fit(backbone, progress, run)
            elif run is not None and isinstance(method, LoopedStrategy):
                fit = method.train(backbone, concepts, seed=seed, progress=progress, run=run)
            else:
                fit = method.fit(backbone, concepts, seed=seed, progress=progress)
        fit.edits.check_finite()
        if not len(fit.edits):
            raise NoMatchingModuleError(f"{method.name} found nothing to change in {type(backbone.pipe).__name__}")
        return fit, bases.base_of(backbone, fit.edits, concepts)


def load(pipe: DiffusionPipeline, source: str | Path | Erasure, name: str | None = None, **options: Any) -> Erasure:
    """Attach an erasure from a folder, a Hub repository or memory; see `ErasureManager.load`."""
    return ErasureManager(pipe).load(source, name, **options)


def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    task: Task = "text-to-image",
    config: str | Path | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Load a model as a pipeline with the erasure methods, of the drop-in class for its own class.

    A folder written by `save_erased_pipeline(fuse=False)` is loaded with its erasures attached.

    Args:
        model: A Hub id, a folder, the name of an embedded model (`canvas-sd`), or a single-file checkpoint
            (`.safetensors`).
        dtype: Precision; float32 on a CPU and float16 elsewhere when left out.
        device: Device; the best available one when left out.
        task: Task of the pipeline: draw from text, remove objects, or draw all subjects of a prompt.
        config: For a single-file checkpoint: Hub id, folder or embedded model with the configs of its components,
            tokenisers, and components that the file lacks. When left out, diffusers' config of this kind of model,
            from the Hub.
        variant: Which of several files of weights is read, such as `fp16`. When left out, the one without such a
            word in its name, or the only one that a folder has.

    Raises:
        ArtifactError: There is no such model, or its files are damaged.
        OptionError: The device cannot be used, or `variant` is given for a single file.
        UnsupportedModelError: The model's pipeline class is of a family that is not supported for the task.
    """
    from erasure.pipelines import base_of, pipeline_class

    settings, model = _settings(dtype, device), os.path.expanduser(model)
    config = None if config is None else os.path.expanduser(config)
    if files.is_checkpoint(model):
        if variant is not None:
            raise OptionError(f"variant={variant!r} is for folders and repositories, and {str(model)!r} is one file")
        with _clear_errors(model):
            return _from_single_file(model, task, settings[0], config).to(settings[1])
    if config is not None:
        raise OptionError(f"config={str(config)!r} is for single-file checkpoints, which {str(model)!r} is not")
    _check_is_model(model)
    source = _source(model)
    with _clear_errors(model):
        index = DiffusionPipeline.load_config(base_of(source))
        kind = pipeline_class(index.get("_class_name", ""), task)
        variant = variant or variants.only_variant(base_of(source))
        pipe = kind.from_pretrained(source, dtype=settings[0], variant=variant)
    return pipe.to(settings[1])


def _from_single_file(
    model: str | Path, task: Task, dtype: torch.dtype, config: str | Path | None
) -> DiffusionPipeline:
    """Load a single-file checkpoint; what it lacks is loaded from the model that its configs are of."""
    from erasure.pipelines import pipeline_class

    told = None
    if config is not None:
        told = DiffusionPipeline.load_config(_source(config)).get("_class_name")
    kind = pipeline_class(single_files.stock_class(model, told), task)
    source = single_files.published_as(model) if config is None else _source(config)
    index = DiffusionPipeline.load_config(source)
    missing = single_files.missing_parts(model, index)
    parts = {}
    if missing:
        loaded = _load_parts(source, index, missing, dtype)
        parts = {name: getattr(loaded, name) for name in missing}
    pipe = kind.from_single_file(str(model), dtype=dtype, config=source, **parts)
    if lost := single_files.missing_tensors(pipe.components):
        raise ArtifactError(
            f"{files.shown(str(model), 200)} lacks {len(lost)} tensors of a {type(pipe).__name__} (first {lost[0]}), "
            "or has them under names that diffusers does not know: load the model from its folder"
        )
    return pipe


def load_text_encoders(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> DiffusionPipeline:
    """Load only the text encoders and tokenisers of a model, as a stock pipeline; see `load_pipeline`.

    Raises:
        ArtifactError: There is no such model, or its files are damaged.
    """
    from erasure.pipelines import base_of

    model = os.path.expanduser(model)
    _check_is_model(model)
    source, settings = _source(model), _settings(dtype, device)
    with _clear_errors(model):
        source = base_of(source)
        index = DiffusionPipeline.load_config(source)
        wanted = [name for name in index if name.startswith(("text_encoder", "tokenizer", "scheduler"))]
        pipe = _load_parts(source, index, wanted, settings[0])
    return pipe.to(settings[1])


def _load_parts(
    source: str, index: Mapping[str, object], wanted: Collection[str], dtype: torch.dtype
) -> DiffusionPipeline:
    """Load some components of a model as a stock pipeline, which has nothing for the others.

    Args:
        source: Folder or Hub id of the model.
        index: Content of its `model_index.json`.
        wanted: Names of the components.
        dtype: Precision.
    """
    held = [name for name, value in index.items() if isinstance(value, (list, tuple)) and len(value) == 2]
    left_out = dict.fromkeys(name for name in held if name not in wanted)
    return DiffusionPipeline.from_pretrained(source, dtype=dtype, variant=variants.only_variant(source), **left_out)


def _check_is_model(model: str | Path) -> None:
    """Refuse a local path that is not a model, before diffusers looks for it on the Hub."""
    here = os.path.isfile(model) or (os.path.isdir(model) and not os.path.isfile(Path(model) / MODEL_FILE))
    if here and (said := files.advice(model)) is not None:
        raise ArtifactError(f"{files.shown(str(model), 200)} is no model of diffusers, but {said}")


def _source(model: str | Path) -> str:
    """Give the folder of an embedded model, and other names as they are."""
    from erasure import assets

    embedded = None if Path(model).is_dir() else assets.find(str(model))
    return str(embedded or model)


def _settings(dtype: torch.dtype | None, device: str | torch.device | None) -> tuple[torch.dtype, torch.device]:
    place = best_device() if device is None else usable_device(device)
    return dtype or (torch.float32 if place.type == "cpu" else torch.float16), place


@contextlib.contextmanager
def _clear_errors(model: str | Path) -> Iterator[None]:
    """Turn errors of diffusers' loaders into errors that say what to do."""
    from erasure import assets

    try:
        yield
    except (OSError, ValueError, single_files.MissingPartError) as error:
        if isinstance(error, ErasureError):
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        embedded_names = ", ".join(assets.models())
        raise ArtifactError(
            f"cannot load the model {str(model)!r}{offline}: {reason}. Give a Hub id, a folder written by "
            "save_pretrained, a single-file checkpoint (with config=FOLDER, or --config FOLDER, where the Hub cannot "
            f"be asked or does not describe its parts), or one of {embedded_names}"
        ) from error


def usable_device(device: str | torch.device) -> torch.device:
    """Give a device by its name.

    Raises:
        OptionError: There is no such device on this machine, or torch cannot use it.
    """
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise OptionError(
            f"the device {files.shown(str(device))} cannot be used here ({files.shown(reason, 200)[1:-1]}): name "
            f"another, such as cpu, or leave it out for {best_device()}"
        ) from error
    return place


def best_device() -> torch.device:
    """Choose a device: CUDA (this process's own under `accelerate launch`), else Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _warn_of_ignored_retain(method: Strategy, concepts: Sequence[Concept]) -> None:
    words = list(dict.fromkeys(word for concept in concepts for word in concept.retain))
    if words and (option := method.ignores_retain()):
        warnings.warn(
            f"{method.name}: {', '.join(map(repr, words))} is to survive, and option {option!r} of "
            f"{getattr(method, option)!r} leaves it out: set the option, or take it off the retain list",
            IgnoredRetainWarning,
            stacklevel=3,
        )
