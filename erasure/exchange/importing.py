"""Import of erasures that others publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from pydantic import JsonValue

from erasure import bases, files
from erasure.artifact import Erasure
from erasure.backbones import Backbone, backbone_for
from erasure.baked import BakedErasure
from erasure.carriers.weights import same_base
from erasure.concept import Concept
from erasure.errors import ArtifactError, ConceptError, DivergenceError, WrongBaseError
from erasure.exchange.checkpoints import ERASED
from erasure.exchange.loaders import FLUX, SD, SD3, XL
from erasure.exchange.lora_files import CONFIG, EXPORT
from erasure.exchange.lora_read import ReadResult, is_lora, read_lora
from erasure.exchange.reading import Source, read_source
from erasure.exchange.weights_read import read_weights
from erasure.files.reading import parsed
from erasure.interop import paths
from erasure.interop.pipelines import components_of
from erasure.schema import ErasureConfig
from erasure.versions import library_versions

STRATEGY = "imported"
"""What an erasure says of its making that was read from somebody's file."""
FAMILIES = {"sd_": SD, "sd1": SD, "sdv1": SD, "stable-diffusion-v": SD, "sdxl": XL, "stable-diffusion-xl": XL,
            "sd3": SD3, "stable-diffusion-3": SD3, "flux": FLUX}  # fmt: skip
"""Beginnings of what files say of their base model, and the family."""
SAYS = ("ss_base_model_version", "modelspec.architecture")
NAMES = ("ss_sd_model_name", "base_model")
"""Texts in the header by which trainers name the base model."""


@dataclass(frozen=True)
class Imported:
    """An erasure that was read from a published file."""

    erasure: Erasure
    form: str
    """`lora` or `weights`."""
    notes: tuple[str, ...]
    """Remarks for the user, a sentence each."""
    base: str
    """What is known of the model that the file was made for."""


def import_file(
    path: str | Path, pipe: DiffusionPipeline, concepts: Sequence[Concept] = (), *, component: str | None = None
) -> Imported:
    """Read an erasure that somebody published.

    LoRA files (kohya's, LECO's, sliders', SPM's, diffusers', EraseAnything's) become low-rank edits. Weights (ESD's,
    UCE's, those of Concept Ablation and DoCo, AdvUnlearn's text encoders, whole checkpoints) become the difference
    from the model's. No code in a file is ever run.

    Args:
        path: `.safetensors`, or `.bin`, `.pt`, `.pth`, `.ckpt` with nothing but tensors.
        pipe: The base model, without erasures or adapters in force.
        concepts: Concepts that it erases; may be left out for files of `erasure export`, which name them.
        component: The network whose weights a file holds, where its names fit several.

    Raises:
        ArtifactError: The file is damaged, incomplete, ambiguous, changes nothing, or holds more than tensors.
        WrongBaseError: The file is for another model.
        UnsupportedModelError: The file is an adapter other than a LoRA.
        ConceptError: The erased concepts are not given.
    """
    source = read_source(path)
    backbone = backbone_for(pipe)
    said = _check_family(source, backbone.family, type(pipe).__name__)
    own = _own_config(source)
    baked = _configs_of_checkpoint(source)
    described = baked if own is None else [own]
    wanted = list(concepts) or [Concept.from_dict(data) for config in described for data in config.concepts]
    if not wanted:
        raise ConceptError(f"{source.shown} does not say what it erases: say it (--concept)")
    lora = is_lora(source)
    read = read_lora(source, pipe) if lora else read_weights(source, pipe, component)
    try:
        read.edits.check()
    except (ArtifactError, DivergenceError) as error:
        raise ArtifactError(f"{source.shown}: {error}") from error
    notes = [*read.notes, *_export_said(source)]
    if own is not None:
        config, base = own, _check_base(source, own, read.edits.parameters, pipe)
        config.concepts = [concept.to_dict() for concept in wanted]
        config.base = {**own.base, "tensors": {k: own.base["tensors"][k] for k in read.edits.parameters}}
    else:
        models = [files.shown(str(config.base["model"]))[1:-1] for config in baked if config.base.get("model")]
        named = said or next(iter(models), None)
        config, base = _config(source, backbone, read, wanted, lora), _base_said(source, named)
    config.carriers = read.edits.carriers
    return Imported(Erasure(config, read.edits), "lora" if lora else "weights", tuple(notes), base)


def _own_config(source: Source) -> ErasureConfig | None:
    """Read the config that `erasure export` wrote into the header, if there is one."""
    if CONFIG not in source.metadata:
        return None
    where = f"{source.shown}: {CONFIG} in its header"
    data: JsonValue = parsed(source.metadata[CONFIG].encode("utf-8", "surrogatepass"), JsonValue, where)
    return ErasureConfig.from_dict(data, where)


def _configs_of_checkpoint(source: Source) -> list[ErasureConfig]:
    """The configs of the erasures that `erasure export --to single-file` wrote into the header, if it did."""
    if ERASED not in source.metadata:
        return []
    where = f"{source.shown}: {ERASED} in its header"
    header = source.metadata[ERASED].encode("utf-8", "surrogatepass")
    entries: list[BakedErasure] = parsed(header, list[BakedErasure], where)
    return [ErasureConfig.from_dict(entry["config"], where) for entry in entries]


def _export_said(source: Source) -> list[str]:
    """Say what `erasure export` left out, if it wrote the file."""
    if EXPORT not in source.metadata:
        return []
    header: dict[str, JsonValue] = parsed(
        source.metadata[EXPORT].encode("utf-8", "surrogatepass"), dict[str, JsonValue], f"{source.shown}: {EXPORT}"
    )
    count, left_out = header.get("approximated"), header.get("left_out")
    if not isinstance(count, int) or not isinstance(left_out, float) or not count:
        return []
    return [
        f"{count} layers were of full rank and are what their export kept: it left out {left_out:.2e} of their energy"
    ]


def _check_base(source: Source, config: ErasureConfig, keys: Sequence[str], pipe: DiffusionPipeline) -> str:
    """Raise `WrongBaseError` unless the model is the one of a config, by the fingerprints of what is changed."""
    digests, modules = config.base.get("tensors", {}), components_of(pipe)
    name = config.base.get("model") or "a model without a name"
    if missing := [key for key in keys if key not in digests]:
        raise ArtifactError(
            f"{source.shown} changes {missing[0]}, and its header does not tell of it: the file was put together from "
            "several; export the erasure again"
        )
    for key in keys:
        component, path = key.split("/", 1)
        if not same_base(paths.parameter(modules[component], path), digests[key]):
            raise WrongBaseError(
                f"{source.shown} was made for {name} ({config.family}), and {key} of this {type(pipe).__name__} is "
                "another: name that model (--model)"
            )
    return f"the model is {name}, for which the file was made: {len(keys)} tensors are the same"


def _check_family(source: Source, family: str, kind: str) -> str | None:
    """Read the base model in a file's header; raise `WrongBaseError` where it is of another family."""
    for text in SAYS:
        said = source.metadata.get(text, "")
        named = next((known for start, known in FAMILIES.items() if said.lower().startswith(start)), None)
        if named is not None and named != family:
            raise WrongBaseError(
                f"{source.shown} says that it is for {files.shown(said)} ({named}), and this {kind} is {family}: name "
                "the model that it was made for (--model)"
            )
    found = next((source.metadata[text] for text in (*NAMES, *SAYS) if source.metadata.get(text)), None)
    return None if found is None else files.shown(found)[1:-1]


def _base_said(source: Source, said: str | None) -> str:
    if said is None:
        return "the file does not name its base model; names and shapes fit this one"
    return f"the file names {said} as its base model; whether this is it is not known, names and shapes fit"


def _config(
    source: Source, backbone: Backbone, read: ReadResult, concepts: Sequence[Concept], lora: bool
) -> ErasureConfig:
    in_denoiser = backbone.denoiser_component in read.edits.components
    options: dict[str, object] = {
        "file": files.shown(source.path.name, 200)[1:-1], "sha256": source.digest(),
        "form": "lora" if lora else "weights",
    }  # fmt: skip
    return ErasureConfig(
        strategy=STRATEGY,
        strategy_config=options,
        concepts=[concept.to_dict() for concept in concepts],
        family=backbone.family,
        base=bases.base_of(backbone, read.edits, concepts),
        protects="released weights" if in_denoiser else "hosted pipeline",
        versions=library_versions(),
        text_length=backbone.text_length,
        size=bases.size_of(backbone),
    )
