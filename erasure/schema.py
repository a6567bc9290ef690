"""Schema of an erasure's config: types, lengths and texts of every field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, cast

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, StringConstraints, with_config
from typing_extensions import TypedDict

from erasure import files
from erasure.concept import LONGEST_TEXT, Concept, Kind
from erasure.errors import ArtifactError, ConceptError

FORMAT_VERSION = 1
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _line(text: str) -> str:
    if not files.is_line(text):
        raise ValueError("holds control characters or line breaks")
    return text


LINE = AfterValidator(_line)
Text = Annotated[str, StringConstraints(max_length=LONGEST_TEXT), LINE]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200), LINE]
Label = Annotated[str, StringConstraints(min_length=1, max_length=2 * LONGEST_TEXT), LINE]
"""A key with a concept's name."""
Key = Annotated[str, StringConstraints(max_length=512, pattern=r"^[\w-]+/[\w.-]+$")]
"""Key of a pipeline's tensor:"""
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
Encoder = Literal["text_encoder", "text_encoder_2", "text_encoder_3"]
Dtype = Annotated[str, StringConstraints(pattern="^[a-z0-9_]{1,20}$")]
Digests = Annotated[dict[Dtype, Sha256], Field(max_length=8)]
"""sha256 of a tensor, by the dtype to which it was rounded."""
Number = int | float
Length = Annotated[int, Field(ge=1, le=2**20)]
"""A number of tokens or of pixels."""
Share = Annotated[Number, Field(ge=0, le=1)]
Scalar = Text | bool | int | float | None
Figures = Annotated[dict[Label, Scalar | Annotated[list[Scalar], Field(max_length=1000)]], Field(max_length=1000)]


@with_config(STRICT)
class ConceptData(TypedDict):
    """A concept, as `Concept.to_dict`."""

    target: Text
    kind: NotRequired[Kind]
    anchor: NotRequired[Text | None]
    retain: NotRequired[Annotated[list[Text], Field(max_length=10_000)]]
    synonyms: NotRequired[Annotated[list[Text], Field(max_length=10_000)]]
    templates: NotRequired[Annotated[list[Text], Field(max_length=10_000)]]


@with_config(STRICT)
class Base(TypedDict, total=False):
    """The model that an erasure was made for."""

    model: Text | None
    """Name of the model, empty when unknown."""
    revision: Name | None
    """Commit of its repository."""
    tensors: Annotated[dict[Key, Digests], Field(max_length=files.TENSORS_LIMIT)]
    """Digests of every changed tensor."""
    text_encoders: Annotated[dict[Encoder, Digests], Field()]
    """Sampled fingerprints of the text encoders that an edit of the denoiser was fitted with."""
    learned_tokens: dict[Encoder, Annotated[dict[Name, Digests], Field(max_length=10_000)]]
    """Digests of the vectors of learned tokens (textual inversion) in the concepts' texts, by text encoder and
    token."""


@with_config(STRICT)
class Rates(TypedDict):
    """Accuracy of a score for a concept."""

    tpr: Share
    """True positive rate: share of the prompts with the concept in which the gate opens."""
    fpr: Share
    """False positive rate: share of the other prompts in which the gate opens."""
    auc: Share
    """Area below the ROC curve."""
    roc: Annotated[list[Annotated[list[Share], Field(min_length=2, max_length=2)]], Field(max_length=1000)]
    """ROC curve: pairs of false and true positive rate."""


@with_config(STRICT)
class GateFigures(TypedDict):
    """Accuracy of a gate on its calibration prompts."""

    decides: Literal["features", "probe"]
    features: Rates
    probe: Rates
    prompts_with: NotRequired[Annotated[int, Field(ge=0)]]
    prompts_without: NotRequired[Annotated[int, Field(ge=0)]]


@with_config(STRICT)
class Request(TypedDict):
    """One of the successive requests of an erasure."""

    concepts: Annotated[list[Text], Field(min_length=1, max_length=10_000)]
    """Targets of the concepts that the request erases, in the order of the config."""
    strategy: Name
    """Name of the strategy of the request."""
    options: Annotated[dict[Name, JsonValue], Field(max_length=1000)]
    """Options of the strategy that differed from its defaults at that time."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)]
    """Seed of all random choices."""
    version: Text
    """Version of this package; empty when unknown."""
    cost: Annotated[dict[Label, Number], Field(max_length=100_000)]
    """Cost: `seconds`, and further figures."""


@with_config(STRICT)
class Sampling(TypedDict):
    """How a one-step generator is sampled."""

    steps: Literal[1]
    """Number of denoising steps."""
    guidance: Literal[1]
    """Guidance scale; 1 is no guidance."""
    level: Annotated[int, Field(ge=1, lt=100_000)]
    """Timestep of its one step, as the scheduler counts them."""


@dataclass
class ErasureConfig:
    """Description of an erasure: everything but its tensors."""

    __pydantic_config__ = STRICT

    strategy: Name
    """Name of the strategy that made it."""
    concepts: Annotated[list[dict[str, object]], Field(min_length=1, max_length=10_000)]
    """Erased concepts, as from `Concept.to_dict`."""
    family: Name
    """Model family, as `Backbone.family`."""
    strategy_config: Annotated[dict[Name, object], Field(max_length=1000)] = field(default_factory=dict)
    """The strategy's options."""
    base: dict[str, Any] = field(default_factory=dict)
    """`model`, `revision`, and `tensors`: sha256 by dtype of every base tensor that it changes; see `Base`."""
    carriers: Annotated[list[Name], Field(max_length=20)] = field(default_factory=list)
    """Carriers of the erasure: `weights`, `activations`, `attention`, `guidance`."""
    protects: Text = ""
    """Threat model: `hosted pipeline` or `released weights`."""
    versions: Annotated[dict[Name, Name], Field(max_length=100)] = field(default_factory=dict)
    """Versions of the libraries with which it was made."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] = 0
    """Seed with which it was made."""
    cost: Annotated[dict[Label, Number], Field(max_length=100_000)] = field(default_factory=dict)
    """Cost: `seconds`, and further figures."""
    gates: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Rates and ROC curve of each concept's gate, and of a linear probe, on the calibration prompts, by concept;
    see `GateFigures`."""
    evaluation: Annotated[dict[str, object], Field(max_length=1000)] = field(default_factory=dict)
    """Summary of an evaluation; empty when not evaluated."""
    text_length: Length | None = None
    """Number of tokens to which prompts were padded for T5; `None` without T5, or where unknown."""
    size: Annotated[list[Length], Field(min_length=2, max_length=2)] | None = None
    """Height and width in pixels of the images for which it was made; `None` where unknown."""
    requests: Annotated[list[dict[str, object]], Field(max_length=10_000)] = field(default_factory=list)
    """Requests of the erasure in their order, see `Request`; empty where all concepts were given at once."""
    sampling: dict[str, object] | None = None
    """How the erased model is sampled, where that differs from the base model: see `Sampling`."""
    format_version: int = FORMAT_VERSION
    """Version of the folder's layout."""

    @classmethod
    def from_dict(cls, data: Any, where: str) -> ErasureConfig:
        """Validate and read plain data.

        Args:
            data: Data as read from JSON.
            where: Name of the file, for messages.

        Raises:
            ArtifactError: The format is newer, a key is missing or unknown, a value is invalid, or the data are not a
                config.
        """
        found = data.get("format_version") if isinstance(data, dict) else None
        if type(found) is not int or found < 1:
            raise ArtifactError(f"{where}: key 'format_version' is missing or no whole number; is this an erasure?")
        if found > FORMAT_VERSION:
            raise ArtifactError(
                f"{where} has format version {found}, this erasure package reads up to {FORMAT_VERSION}: "
                "pip install --upgrade erasure-diffusers"
            )
        fields = {f.name: f for f in dataclasses.fields(cls)}
        missing = [key for key in ("strategy", "concepts", "family", "base", "carriers") if key not in data]
        unknown = sorted(set(data) - set(fields))
        if missing:
            raise ArtifactError(f"{where} lacks {missing}: the file is damaged or no erasure config; make it again")
        if unknown:
            raise ArtifactError(f"{where} has unknown keys {files.shown(unknown)}; allowed: {sorted(fields)}")
        config: ErasureConfig = files.validated(data, cls, where)
        for key, (schema, value) in config._nested().items():
            files.validated(value, schema, f"{where}: {key}")
        try:
            for concept in config.concepts:
                Concept.from_dict(concept)
        except ConceptError as error:
            raise ArtifactError(f"{where}: 'concepts' cannot be read ({error}): the file is damaged") from error
        config._check_requests(where)
        return config

    def _check_requests(self, where: str) -> None:
        """Raise `ArtifactError` unless the requests match the concepts and the strategy."""
        if not self.requests:
            return
        asked = [target for request in self.ledger for target in request["concepts"]]
        targets = [concept["target"] for concept in self.concepts]
        if asked != targets:
            raise ArtifactError(
                f"{where}: 'requests' are for {files.shown(asked, 200)}, 'concepts' are {files.shown(targets, 200)}: "
                "the file is damaged or was edited; make the erasure again"
            )
        if (found := strategies_of(self.ledger)) != self.strategy:
            raise ArtifactError(
                f"{where}: 'requests' are by {files.shown(found)}, 'strategy' is {files.shown(self.strategy)}: the "
                "file is damaged or was edited; make the erasure again"
            )

    @property
    def ledger(self) -> list[Request]:
        """List the requests in their order; a single one where all concepts were given at once.

        The single request then has all options of the config, with defaults.
        """
        if self.requests:
            return cast("list[Request]", self.requests)
        targets = [str(concept["target"]) for concept in self.concepts]
        options = cast("dict[str, JsonValue]", dict(self.strategy_config))
        return [
            Request(
                concepts=targets, strategy=self.strategy, options=options, seed=self.seed,
                version=self.versions.get("erasure-diffusers", ""), cost=dict(self.cost),
            )
        ]  # fmt: skip

    def _nested(self) -> Mapping[str, tuple[object, object]]:
        """Give the schemas of the fields that users see as plain dicts."""
        return {
            "concepts": (list[ConceptData], self.concepts),
            "base": (Base, self.base),
            "strategy_config": (JsonValue, self.strategy_config),
            "gates": (dict[Label, GateFigures], self.gates),
            "evaluation": (Figures, self.evaluation),
            "requests": (list[Request], self.requests),
            "sampling": (Sampling | None, self.sampling),
        }


def strategies_of(requests: Sequence[Request]) -> str:
    """Name the strategies of requests, each once: `uce + esd`."""
    return " + ".join(dict.fromkeys(request["strategy"] for request in requests))
