"""Adding concepts to an existing erasure: planning, fitting, and the config of the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields, replace

from diffusers import DiffusionPipeline
from pydantic import JsonValue
from torch import Tensor

from erasure import ledger
from erasure.artifact import Erasure
from erasure.attach import ErasureManager
from erasure.backbones import Backbone, backbone_for
from erasure.carriers.embeddings import warn_of_unlike_tokens
from erasure.concept import Concept, as_concepts
from erasure.errors import (
    OptionError,
    UnknownStrategyError,
    UnknownTokenWarning,
    UnsupportedModelError,
    WrongBaseError,
)
from erasure.fitting import check_fit, sources_of
from erasure.interop import paths
from erasure.interop.pipelines import components_of
from erasure.schema import ErasureConfig, Request, strategies_of
from erasure.strategies import Strategy, get
from erasure.strategies.base import EarlierErasure, Fit, Way
from erasure.strategies.looped import LoopedStrategy
from erasure.strategies.sums import Weight, added_up, refuse_on_top
from erasure.training.run import Run
from erasure.twins import apart_of
from erasure.world import World


@dataclass(frozen=True)
class Addition:
    """A request to add concepts to an erasure."""

    made: Erasure
    """The existing erasure."""
    concepts: ledger.Merged
    """All concepts, the new ones last."""
    method: Strategy
    """The strategy, with its options."""
    way: Way
    """Whether all concepts are fitted anew, or the new ones on top of the earlier edits."""
    seed: int
    """Seed of all random choices."""

    @classmethod
    def planned(
        cls, world: World, made: Erasure, new: Sequence[Concept], method: Strategy, given: Collection[str],
        seed: int | None,
    ) -> Addition:  # fmt: skip
        """Plan a request, and refuse an impossible one.

        Args:
            world: World of the model.
            made: Existing erasure.
            new: Concepts to add.
            method: Requested strategy with its options.
            given: Names of the options that the caller has set.
            seed: Seed from the caller, if any.

        Raises:
            ConceptError: See `ledger.merged`.
            OptionError: Options or a seed differ from the erasure's although all concepts are fitted anew; or the
                options retain nothing although concepts are fitted on top.
            UnsupportedModelError: The strategy cannot add to this erasure.
        """
        concepts = ledger.merged(world, made, new)
        way = method.adds([request["strategy"] for request in made.config.ledger])
        if way == "on top":
            if made.config.sampling is not None:
                raise UnsupportedModelError(
                    f"{made.name} makes the model a one-step generator, and {method.name} is made for one of many "
                    f"steps: erase all concepts with {made.config.strategy}, in one erasure or added to this one"
                )
            refuse_on_top(method, made.edits)
            return cls(made, concepts, method, way, seed or 0)
        before = type(method).configured(None, **made.config.strategy_config)
        for name in given:
            if getattr(method, name) != getattr(before, name):
                method.refuse(
                    name, getattr(method, name),
                    f"{getattr(before, name)!r}, as {made.name} has it: {method.name} fits all of its concepts "
                    "anew, together. Leave the option out, or make an erasure of all concepts at once",
                )  # fmt: skip
        if seed not in (None, made.config.seed):
            raise OptionError(
                f"{method.name}: the seed is {seed}; allowed: {made.config.seed}, as {made.name} has it: all of its "
                "concepts are fitted anew, together. Leave the seed out, or make an erasure of all concepts at once"
            )
        as_concepts(concepts.every)
        return cls(made, concepts, before, way, made.config.seed)

    @property
    def strategy(self) -> str:
        """The strategies that carried out all requests, each once."""
        names = [*(request["strategy"] for request in self.made.config.ledger), self.method.name]
        return " + ".join(dict.fromkeys(names))

    def check(self, stock: Backbone) -> None:
        """Raise unless the erasure was made for this model.

        Args:
            stock: The model without erasures.

        Raises:
            WrongBaseError: The erasure was made for another model, or with learned tokens that this model lacks.
        """
        pipe, made = stock.pipe, self.made
        check_fit(pipe, sources_of(pipe, components_of(pipe), made.name, made, False), made.name, made, True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UnknownTokenWarning)
            try:
                warn_of_unlike_tokens(made.name, stock.towers, made.config.base.get("learned_tokens", {}))
            except UnknownTokenWarning as unlike:
                raise WrongBaseError(str(unlike)) from unlike
        before, now = made.config.text_length, stock.text_length
        if before is not None and now is not None and before != now:
            raise WrongBaseError(
                f"{made.name} was made with texts of {before} tokens, this request would be with {now}: add to it "
                f"with text_length={before}, or make an erasure of all concepts at once"
            )

    def fit(self, stock: Backbone, progress: Callable[[float], None], run: Run | None) -> Fit:
        """Make the edits for all concepts together, relative to the stock model.

        Args:
            stock: The model without erasures, which does not change.
            progress: Called with the share of the work that is done, 0 to 1.
            run: Options for checkpoints of a training.
        """
        every = self.concepts.every
        if self.way == "anew":
            return self.method.fit(stock, every, seed=self.seed, progress=progress)
        erased = self.method.session(backbone_for(self.erased(stock.pipe)))
        # Earlier concepts whose anchor is erased now are fitted again, because otherwise their former anchor would
        # return.
        wanted = [*self.concepts.new, *self.concepts.moved]
        if isinstance(self.method, LoopedStrategy):
            earlier = EarlierErasure(self.made.fingerprint, self.concepts.still_erased)
            fit = self.method.train(
                erased, wanted, seed=self.seed, progress=progress, run=run or Run(), earlier=earlier
            )
        else:
            wanted = retaining(wanted, self.concepts.still_erased)
            fit = self.method.fit(erased, wanted, seed=self.seed, progress=progress)
        # All values must be finite here: in a sum with other edits a bad value would not be noticed.
        fit.edits.check_finite()
        if not len(fit.edits) or fit.edits.is_empty:
            raise UnsupportedModelError(
                f"{self.method.name} changed nothing on top of {self.made.name}: choose another strategy or preset "
                "for the added concepts"
            )
        edits = added_up(self.made.edits, fit.edits, _values(stock.pipe), _values(erased.pipe))
        return fit._replace(edits=edits, gates={**self.made.config.gates, **fit.gates})

    def erased(self, pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Make a twin of the stock pipeline (another object on the same weights) with the earlier erasure in force."""
        edits = self.made.edits
        made = apart_of(pipe, {component: list(edits.of(component)) for component in edits.components})
        with warnings.catch_warnings():
            # Warnings about drawing do not apply to this twin.
            warnings.simplefilter("ignore")
            ErasureManager(made).add(self.made, "earlier")
        return made

    def requests(self, version: str, cost: dict[str, float]) -> list[Request]:
        """List all requests, this one last.

        Args:
            version: Version of this package.
            cost: Cost of this request.
        """
        request = Request(
            concepts=[concept.target for concept in self.concepts.new], strategy=self.method.name,
            options=_told(self.method), seed=self.seed, version=version, cost=dict(cost),
        )  # fmt: skip
        return ledger.extended(self.made.config, request, _defaults(self.made.config.strategy))

    def described(self, config: ErasureConfig) -> ErasureConfig:
        """Make the config of the whole erasure from that of this request.

        Args:
            config: Config of an erasure of all concepts by this request's strategy.
        """
        requests = self.requests(config.versions["erasure-diffusers"], dict(config.cost))
        both = {self.made.config.protects, config.protects}
        cost = dict(config.cost)
        if self.way == "on top":
            # The result contains the edits of all requests, so their times are added.
            cost["seconds"] = round(sum(float(request["cost"].get("seconds", 0.0)) for request in requests), 3)
        return replace(
            config, strategy=strategies_of(requests), requests=[dict(request) for request in requests], cost=cost,
            # The weaker protection counts: a part that can be undone with the weights makes the whole so.
            protects="hosted pipeline" if "hosted pipeline" in both else config.protects,
        )  # fmt: skip

    def attached_as(self, manager: ErasureManager) -> str | None:
        """Give the name under which the erasure is attached to a pipeline, if it is."""
        own = self.made.fingerprint
        attached = manager.erasures.items()
        return next((name for name, each in attached if each is self.made or each.fingerprint == own), None)


def retaining(concepts: Sequence[Concept], erased: Sequence[Concept]) -> list[Concept]:
    """Add to retain lists the concepts that are erased already, and what those retain.

    Styles are added to a style's retain list where there is a style, and other concepts to an object's, because names
    on a retain list are used in the phrasings of their concept.
    """
    made = list(concepts)
    gone = {name for concept in concepts for name in concept.names}
    for other in erased:
        alike = (place for place, each in enumerate(made) if (each.kind == "style") == (other.kind == "style"))
        place = next(alike, 0)
        words = [word for word in (*other.names, *other.retain) if word not in gone]
        made[place] = replace(made[place], retain=tuple(dict.fromkeys([*made[place].retain, *words])))
    return made


def _values(pipe: DiffusionPipeline) -> Weight:
    def value(key: str) -> Tensor:
        component, path = key.split("/", 1)
        return paths.parameter(getattr(pipe, component), path)

    return value


def _defaults(strategy: str) -> dict[str, object]:
    """Give the default options of a strategy; empty for one that is not installed."""
    try:
        kind = get(strategy)
    except UnknownStrategyError:
        return {}
    return {field.name: field.default for field in fields(kind)}


def _told(method: Strategy) -> dict[str, JsonValue]:
    """Give the options of a strategy that differ from its defaults."""
    default = _defaults(method.name)
    return {name: value for name, value in asdict(method).items() if value != default.get(name, ...)}
