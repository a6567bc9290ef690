"""The functions for any stock diffusers pipeline: make, attach, load."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from erasure import bases, files, ledger
from erasure.adding import Addition
from erasure.artifact import Erasure, ErasureConfig, default_name
from erasure.attach import ErasureManager
from erasure.backbones import backbone_for
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
from erasure.interop import scopes, single_files
from erasure.progress import reporting
from erasure.strategies import Strategy, get
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

    Made from the base model, on a twin of the pipeline without the erasures and LoRA adapters that it carries:
    erasures stack as if each had been made alone, and nobody who draws with the pipeline meanwhile notices.

    Args:
        pipe: Any pipeline of a supported family.
        concepts: What to erase; several are erased by one erasure. A word means what it means in the model's world,
            see `erasure.world.World`; a `Concept` is taken as it stands.
        strategy: Name of a method, see `erasure.strategies.available()`; left out, `hirm`, or that of the last request
            of an erasure which concepts are added to.
        name: What to call it when attached.
        seed: Seeds every random choice; 0, or that of what is fitted anew, when left out.
        attach: Whether to attach it to `pipe`, in the place of what it is added to.
        preset: A named set of the strategy's options.
        progress: `True` for a progress bar, or a function that gets the share done.
        run: For strategies that train: where checkpoints go, so that a killed training goes on, and what is logged.
        strict: Raise where a call goes around the erasure, instead of warning.
        controlnet: Edit the layers of the pipeline's ControlNet that the denoiser has too.
        add_to: An erasure, its folder or its Hub repository. The result erases its concepts and these, and lists the
            requests in its config; the earlier erasure stays as it is. See `Strategy.adds`.
        **options: The strategy's options.

    Raises:
        ArtifactError: What it is to be added to is missing, damaged, or of another model.
        UnknownStrategyError: No such strategy.
        ConceptError: A concept that has no known token, or a learned one that only one of two CLIPs has; or one that
            is erased already, or is about what is.
        OptionError: An option that the strategy does not have, or a value that it does not allow.
        AttachError: The name is taken.
        UnsupportedModelError: The family or the state of the model does not allow it.
        DivergenceError: NaN during optimisation.
        TrainingError: The run's folder is in use, holds something else, or cannot be written.
    """
    earlier = None if add_to is None else ledger.read(add_to)
    if strategy is None:
        strategy = "hirm" if earlier is None else earlier.config.ledger[-1]["strategy"]
    method = get(strategy).configured(preset, **options)
    if run is not None and not isinstance(method, LoopedStrategy):
        raise OptionError(f"{strategy} does not train on trajectories, so there is nothing to resume: leave out 'run'")
    world = World.of(pipe)
    wanted = world.concepts(concepts, erased=() if earlier is None else earlier.concepts)
    backbone = backbone_for(pipe)
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
        # Known before the work, not after it.
        replaced = None if addition is None else addition.attached_as(manager)
        label = method.name if addition is None else addition.strategy
        manager.check_name(name or default_name(wanted, label), replaced)
    texts = [text for concept in wanted for text in concept.texts()]
    require_tokens(backbone.towers, texts)
    refuse_half_learned(backbone.towers, texts)
    for words in dict.fromkeys(words for concept in wanted for words in (concept.anchor, *concept.retain) if words):
        for tower in backbone.towers:
            tower.check_words(words)
    started = time.perf_counter()
    base_pipe = manager.stock(without_adapters=True)
    backbone = method.session(backbone_for(base_pipe))
    if addition is not None:
        addition.check(backbone)
    with scopes.same_gradient_mode(), reporting(progress, method.name) as report:
        backbone.check_plain("make the erasure with the plain model and load the result here")
        # A caller may have switched gradients off for the sake of generation.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if addition is not None:
                fit = addition.fit(backbone, report, run)
            elif run is not None and isinstance(method, LoopedStrategy):
                fit = method.train(backbone, wanted, seed=seed, progress=report, run=run)
            else:
                fit = method.fit(backbone, wanted, seed=seed, progress=report)
        fit.edits.check_finite()
        if not len(fit.edits):
            raise NoMatchingModuleError(f"{strategy} found nothing to change in {type(pipe).__name__}")
        base = bases.base_of(backbone, fit.edits, wanted)
    # A training that went on from a checkpoint has cost what it took before as well.
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
) -> DiffusionPipeline:
    """A pipeline with the erasure methods, of the class that stands in for the model's own.

    A folder written by `save_erased_pipeline(fuse=False)` comes with its erasures attached.

    Args:
        model: A Hub id, a folder, the name of an embedded model (`canvas-sd`), or a single-file checkpoint
            (`.safetensors`).
        dtype: Precision; float32 on a CPU and float16 elsewhere when left out.
        device: Where to; the best there is when left out.
        task: What it is to do: draw from text, remove objects, or draw all that a prompt names.
        config: Of a single-file checkpoint: Hub id or folder with the configs of its parts, tokenisers, and parts that
            the file lacks. What diffusers knows of its kind, from the Hub, when left out.

    Raises:
        ArtifactError: There is no such model, or its files are damaged.
        UnsupportedModelError: Its pipeline class is of no family that is supported for the task.
    """
    from erasure.pipelines import base_of, pipeline_class

    settings = _settings(dtype, device)
    if files.is_checkpoint(model):
        kind = pipeline_class(single_files.stock_class(model), task)
        named = {} if config is None else {"config": str(config)}
        with _clear_errors(model):
            pipe = kind.from_single_file(str(model), dtype=settings[0], **named)
        return pipe.to(settings[1])
    if config is not None:
        raise OptionError(f"config={str(config)!r} is for single-file checkpoints, which {str(model)!r} is not")
    _check_is_model(model)
    source = _source(model)
    with _clear_errors(model):
        index = DiffusionPipeline.load_config(base_of(source))
        kind = pipeline_class(index.get("_class_name", ""), task)
        pipe = kind.from_pretrained(source, dtype=settings[0])
    return pipe.to(settings[1])


def load_text_encoders(
    model: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> DiffusionPipeline:
    """A stock pipeline of any family with nothing but its text encoders and tokenisers loaded; see `load_pipeline`.

    Raises:
        ArtifactError: There is no such model, or its files are damaged.
    """
    from erasure.pipelines import base_of

    _check_is_model(model)
    source, settings = _source(model), _settings(dtype, device)
    with _clear_errors(model):
        source = base_of(source)
        config = DiffusionPipeline.load_config(source)
        parts = [name for name, value in config.items() if isinstance(value, (list, tuple)) and len(value) == 2]
        left_out = [name for name in parts if not name.startswith(("text_encoder", "tokenizer", "scheduler"))]
        pipe = DiffusionPipeline.from_pretrained(source, dtype=settings[0], **dict.fromkeys(left_out))
    return pipe.to(settings[1])


def _check_is_model(model: str | Path) -> None:
    """Refuse what is here and no model, before diffusers looks for it on the Hub."""
    here = os.path.isfile(model) or (os.path.isdir(model) and not os.path.isfile(Path(model) / MODEL_FILE))
    if here and (said := files.advice(model)) is not None:
        raise ArtifactError(f"{files.shown(str(model), 200)} is no model of diffusers, but {said}")


def _source(model: str | Path) -> str:
    from erasure import assets

    embedded = None if Path(model).is_dir() else assets.find(str(model))
    return str(embedded or model)


def _settings(dtype: torch.dtype | None, device: str | torch.device | None) -> tuple[torch.dtype, torch.device]:
    place = torch.device(device) if device is not None else best_device()
    return dtype or (torch.float32 if place.type == "cpu" else torch.float16), place


@contextlib.contextmanager
def _clear_errors(model: str | Path) -> Iterator[None]:
    """Say what diffusers' loaders complain of in words that help."""
    from erasure import assets

    try:
        yield
    except (OSError, ValueError, single_files.MissingPartError) as error:
        if isinstance(error, ErasureError):
            raise
        reason = str(error).strip().splitlines()[0]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        embedded_names = ", ".join(assets.models())
        raise ArtifactError(
            f"cannot load the model {str(model)!r}{offline}: {reason}. Give a Hub id, a folder written by "
            "save_pretrained, a single-file checkpoint (with config= where the Hub does not describe its parts), or "
            f"one of {embedded_names}"
        ) from error


def best_device() -> torch.device:
    """A CUDA device (this process's own under `accelerate launch`), else Apple's, else the CPU."""
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
