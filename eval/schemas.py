"""What the files of evaluations and attacks hold. Nothing read from one is used before it fits its schema."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, with_config
from typing_extensions import TypedDict

OPEN = ConfigDict(extra="allow")
"""Suites, attacks and detectors may write more than the package reads."""
Name = Annotated[str, Field(max_length=1_000)]
Id = Annotated[str, Field(min_length=1, max_length=200)]
"""Becomes the name of a file."""
Text = Annotated[str, Field(max_length=100_000)]
Names = Annotated[list[Name], Field(max_length=10_000)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Side = Annotated[int, Field(ge=1, le=8_192)]
Vector = Annotated[str, Field(max_length=400_000)]
"""Base64 of little-endian float32."""


class SampleFields(TypedDict):
    """`erasure.eval.samples.Sample`, field by field."""

    sample_id: Id
    prompt: Text
    seed: Seed
    role: Literal["target", "retain", "cross", "utility", "pair"]
    objects: Names
    style: Name | None
    erased: Names
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    scene: dict[str, object] | None
    unsafe: bool
    negative_prompt: Text
    num_inference_steps: Annotated[int, Field(ge=1, le=10_000)]
    guidance_scale: Number
    height: Side
    width: Side


@with_config(OPEN)
class Judged(TypedDict):
    """What a detector sees in an image."""

    object: Name | None
    objects: Names
    style: Name | None
    shape: NotRequired[Name | None]
    object_score: NotRequired[Number | None]
    style_score: NotRequired[Number | None]
    shape_score: NotRequired[Number | None]


class Drift(TypedDict):
    """How far an image moved from the stock model's."""

    pixel: Number | None
    feature: Number | None


Table = Annotated[dict[Name, Number], Field(max_length=10_000)]
"""Score by class."""
Box = tuple[Number, Number, Number, Number]
"""Left, top, right and bottom in pixels."""


class AnswerEntry(TypedDict):
    """What a judge said of an image in the cache of drawings."""

    object: Name | None
    objects: Names
    style: Name | None
    shape: Name | None
    object_scores: Table
    style_scores: Table
    shape_scores: Table


class ClipEntry(TypedDict):
    """What a CLIP model said of an image in the cache of drawings."""

    clip_score: Number
    features: Vector


class ReadingEntry(TypedDict):
    """What a detector's network said of an image in the cache of drawings."""

    scores: Table
    boxes: dict[Name, Box]


class FindingFields(TypedDict):
    """`erasure.eval.detectors.Finding`, field by field; `flagged` is `None` where nothing can be said."""

    flagged: bool | None
    score: Number | None
    labels: Names
    scores: Table
    boxes: dict[Name, Box]
    reason: Text | None


@with_config(OPEN)
class ReportRow(TypedDict):
    """What a report needs of a line of `samples.jsonl`: a sample drawn in one variant."""

    sample_id: Id
    variant: Id
    prompt: Text
    role: Name
    objects: Names
    style: Name | None
    erased: Names
    unsafe: bool
    judged: Judged | None
    detected: NotRequired[dict[Name, FindingFields]]


class EvaluationRow(ReportRow):
    """A line of `samples.jsonl`, as a run that goes on needs it."""

    seed: Seed
    weight: Number
    scene: dict[str, object] | None
    negative_prompt: Text
    num_inference_steps: Count
    guidance_scale: Number
    height: Side
    width: Side
    clip_score: Number | None
    blank: bool
    failures: dict[Name, Text]
    measured: NotRequired[dict[Name, Number | bool | None]]
    drift: Drift | None
    seconds: Number | None


class Try(TypedDict):
    """An image that an attack had judged."""

    judged: Judged | None
    shown: bool | None
    refused: NotRequired[Text]
    """Why the pipeline drew none."""


Others = dict[Literal["prompt", "prompt_2", "prompt_3"], Text]
"""Texts that other text encoders read, by argument of the pipeline's call."""


class StoredAttempt(TypedDict):
    """An attempt that is more than texts: what it gives to a call, and the files of tensors and pictures beside it."""

    call: Annotated[dict[Name, JsonValue], Field(max_length=100)]
    change: dict[Name, JsonValue] | None
    box: Annotated[list[int], Field(min_length=4, max_length=4)] | None
    stem: Id
    files: Annotated[dict[Id, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]], Field(max_length=100)]


@with_config(OPEN)
class ReplayRow(SampleFields):
    """A line of `attacks.jsonl`: a prompt that was tried again."""

    variant: Id
    concept: Name | None
    before: Try
    text: Text | None
    others: NotRequired[Others]
    after: Try | None
    success: bool | None
    images: Count
    failures: dict[Name, Text]
    seconds: Number
    control: NotRequired[Try]
    attempt: NotRequired[StoredAttempt | None]
    refused: NotRequired[Count]
    """Attempts that the pipeline refused."""
    held: NotRequired[bool]
    """Whether it refused all that there were."""
    references: NotRequired[Count]
    """Images that were asked of the original model."""
    recalled: NotRequired[Count]
    """Images that an earlier attack had drawn."""


class AttackRow(ReplayRow):
    """A line of `attacks.jsonl`: a prompt that was attacked."""

    texts: Count
    changed: Count
    cut: Count
    steps: Count
    losses: list[Number | None]


class FeatureRow(TypedDict):
    """A line of `features.jsonl`."""

    sample_id: Id
    variant: Id
    features: Vector


class TargetFields(TypedDict):
    """`erasure.eval.suites.Target`, field by field."""

    name: Name
    domain: Literal["object", "style"]
    members: Annotated[Names, Field(min_length=1)]


@with_config(OPEN)
class MadeBy(TypedDict):
    """What an adversarial prompt was found with, and against."""

    attack: Name
    size: NotRequired[Name]


class PromptRow(SampleFields):
    """A line of `adversarial.jsonl`."""

    text: Text | None
    others: NotRequired[Others]
    attempt: NotRequired[StoredAttempt | None]
    target: TargetFields
    made_by: MadeBy


class Interval(TypedDict):
    """A number with its interval."""

    value: Number
    low: Number
    high: Number


class Transitions(TypedDict):
    """Pairs by their outcome before and after."""

    both: Count
    before_only: Count
    after_only: Count
    neither: Count


@with_config(OPEN)
class Metric(TypedDict):
    """A metric of `results.json`, in one variant."""

    name: Name
    concept: Text | None
    variant: NotRequired[Name]
    value: Number | None
    low: Number | None
    high: Number | None
    n: Count
    recipe: dict[str, object]
    interval: NotRequired[Name]
    missing: NotRequired[Count]
    reason: NotRequired[Text]
    worst: NotRequired[Interval]
    classes: NotRequired[dict[Name, Number]]
    holds: NotRequired[bool]
    against: NotRequired[Name]
    transitions: NotRequired[Transitions]
    mcnemar_p: NotRequired[Number]
    mcnemar_p_holm: NotRequired[Number]
    change: NotRequired[Interval]
    prompts: NotRequired[dict[Name, Count]]
    curve: NotRequired[dict[Name, Number]]
    groups: NotRequired[dict[Name, Number]]
    pairs: NotRequired[dict[Name, Count]]
    regions: NotRequired[Count]
    without_face: NotRequired[Count]
    retokenised: NotRequired[dict[Name, Count]]


@with_config(OPEN)
class Model(TypedDict):
    """The model that was measured."""

    name: NotRequired[Name]
    fingerprint: NotRequired[Name]


@with_config(OPEN)
class ErasureEntry(TypedDict):
    """An erasure that was attached."""

    name: Name
    strategy: NotRequired[Name]
    concepts: NotRequired[Names]
    options: NotRequired[Name]
    strength: NotRequired[Number]
    seed: NotRequired[int]
    size_bytes: NotRequired[Count | None]
    seconds: NotRequired[Number | None]
    fingerprint: NotRequired[Name]


@with_config(OPEN)
class Cost(TypedDict):
    """What an evaluation cost."""

    seconds: NotRequired[Number]
    drawing_share: NotRequired[Number | None]
    denoiser_share: NotRequired[Number | None]
    seconds_per_image: NotRequired[dict[Name, Number | None] | None]
    peak_memory_mb: NotRequired[Number]
    erase_seconds: NotRequired[Number]
    artifact_bytes: NotRequired[Count]
    device: NotRequired[Name]
    threads: NotRequired[Count]
    cpus: NotRequired[Count | None]


class Share(TypedDict):
    """A rate of a detector on pictures of the user's."""

    value: Number | None
    low: Number | None
    high: Number | None
    n: Count
    missing: Count
    worst: Number | None
    reason: Text | None


class MeasuredControls(TypedDict):
    """What a detector is worth on pictures of the user's."""

    sensitivity: Share
    specificity: Share
    wrong: dict[Text, Text]


class DetectorEntry(TypedDict):
    """A detector that looked at the images: under which label its findings are, and what it is worth."""

    label: Name
    recipe: dict[str, object]
    self_test: dict[str, object]
    controls: MeasuredControls | None
    counts: NotRequired[Literal["flags", "classes"]]


class ResultsFile(TypedDict):
    """`results.json`."""

    schema_version: Literal[1]
    suite: Name
    size: Name
    model: Model
    erasures: Annotated[list[ErasureEntry], Field(max_length=1_000)]
    metrics: Annotated[list[Metric], Field(max_length=100_000)]
    cost: Cost
    date: NotRequired[Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")] | None]
    versions: NotRequired[Annotated[dict[Name, Name], Field(max_length=100)]]
    detectors: NotRequired[Annotated[list[DetectorEntry], Field(max_length=100)]]


@with_config(OPEN)
class JudgeConfig(TypedDict):
    """`config.json` of a Canvas judge."""

    objects: Annotated[Names, Field(min_length=1), AfterValidator(lambda names: _unique(names))]
    styles: Annotated[Names, Field(min_length=1), AfterValidator(lambda names: _unique(names))]


@with_config(OPEN)
class ClipModelConfig(TypedDict):
    """The shape of an open_clip model, as far as the package reads it."""

    embed_dim: Annotated[int, Field(ge=1, le=65_536)]


@with_config(OPEN)
class ClipConfig(TypedDict):
    """`open_clip_config.json`."""

    model_cfg: ClipModelConfig


@with_config(OPEN)
class TransformersClipConfig(TypedDict):
    """`config.json` of a CLIP model of transformers, as far as the package reads it."""

    model_type: Name
    projection_dim: NotRequired[Annotated[int, Field(ge=1, le=65_536)]]


@with_config(OPEN)
class ShardIndex(TypedDict):
    """`model.safetensors.index.json`: which file holds which tensor."""

    weight_map: Annotated[dict[Name, Name], Field(min_length=1, max_length=100_000)]


def _unique(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("a name comes twice")
    return names


State = Literal["done", "refused", "failed"]


@with_config(OPEN)
class AuditPart(TypedDict):
    """A part of `audit.json`."""

    kind: Literal["evaluation", "attack", "stress"]
    name: Name
    concept: Text | None
    folder: Name
    state: State
    detail: Text


@with_config(OPEN)
class AuditFile(TypedDict):
    """`audit.json`, as far as it is read again."""

    schema_version: Literal[1]
    model: Model
    erasures: Annotated[list[ErasureEntry], Field(max_length=1_000)]
    parts: Annotated[list[AuditPart], Field(max_length=10_000)]


class CellPart(TypedDict):
    """What became of an erasure or of a measurement of it."""

    what: Name
    state: State
    reason: Text
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@with_config(OPEN)
class CellFile(TypedDict):
    """`cell.json` of a sweep, as far as it is read again."""

    parts: Annotated[list[CellPart], Field(max_length=10_000)]
