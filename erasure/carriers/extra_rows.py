"""Additional rows in a denoiser's pass, for safety guidance, prompt filters and gates.

A hook on the denoiser adds rows with the concept's encoding to a call, and removes their predictions after it has
changed those for the prompts by `erasure.carriers.safety`. Stock pipelines need no change, whatever else they pass (a
picture, a mask, a ControlNet, embeddings instead of a prompt), and nothing is encoded during sampling. The pipeline's
call shows which rows are negative prompts; without negative prompts, more rows predict for the empty prompt. A
guidance-distilled transformer with scale `w` predicts `e_0 + w (e_p - e_0)`, so differences of its predictions are
divided by `w`, and the change is multiplied by it.

Prompt filters (`erasure.carriers.filters`) are applied here too: the conditioning of a prompt is changed, and where
features are compared (`erasure.carriers.skips`), a row with the unchanged prompt is added last. The permeability of
each row's prompt (`erasure.carriers.permeability`) is passed to the branches beside layers
(`erasure.carriers.membranes`): 1 for unknown prompts, and 0 for negative prompts, unless their gates are to be open as
far as those of the prompts that they guide.

Guidance begins after its share of the noise levels of the call's schedule. Levels are counted, not denoiser calls,
because higher-order samplers evaluate a level twice. Momentum belongs to one image's sampling in one thread. A pass of
`Backbone.predict` is not part of a sampling and has no momentum; a pass in which an attention layer is recorded
(`erasure.carriers.calls.measured`) is not changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.backbones import Backbone
from erasure.carriers import guidance, membranes, readings, skips
from erasure.carriers.calls import NamedArguments, is_measured, latents_of, of_rows
from erasure.carriers.drawings import Drawing, begin, is_over, levels_of
from erasure.carriers.filters import PromptFilter
from erasure.carriers.gating import GateTerm, Gating
from erasure.carriers.safety import CONCEPT, NOTHING, Moments, SafetyGuidance, direction
from erasure.carriers.terms import same_terms
from erasure.errors import UnsupportedModelError
from erasure.interop import hooks
from erasure.interop.callers import nearest_caller
from erasure.interop.protocols import Arguments, Settings

_HOOK = "erasure_extra_rows"
TOKENS, POOLED = "encoder_hidden_states", "pooled_projections"
MASKS = ("attention_mask", "encoder_attention_mask")
"""Attention masks: of text first, and after it of the transformer's image tokens."""
REFUSE = (
    "an erasure cannot tell the rows of this pass apart: {reason}. disable_erasures() for such calls, or use a "
    "strategy that edits weights (uce, esd, hirm)"
)


class Term(NamedTuple):
    """A safety guidance in force."""

    strength: float
    """Factor of its change."""
    edit: SafetyGuidance


class FilterTerm(NamedTuple):
    """A prompt filter in force."""

    strength: float
    """Factor of its change."""
    edit: PromptFilter


class Family(NamedTuple):
    """Properties of a model family; see `Backbone`."""

    noisiest: float
    guides_in_one_call: bool


FAMILY = Family(Backbone.noisiest, Backbone.guides_in_one_call)
"""Properties of most families."""


class _Pass(NamedTuple):
    """Layout of the rows of the current pass."""

    rows: int
    """Number of the caller's rows."""
    pictures: int
    """Number of rows of prompts, which are the last ones; as many are added for each guidance."""
    guided: bool
    """Whether as many rows of negative prompts are before them."""
    guidance: float
    """Guidance scale that a guidance-distilled denoiser reads."""
    level: Tensor
    """Timesteps, `(pictures,)`."""
    drawing: Drawing | None
    """Sampling of an image to which the pass belongs; `None` outside of one."""
    texts: int = 0
    """Number of added rows for each image, without those of `plain`."""
    plain: tuple[int, ...] = ()
    """Rows with changed prompts, which are computed once more with the unchanged prompts."""


class _Thread(threading.local):
    """State of the thread that runs the denoiser."""

    def __init__(self) -> None:
        self.drawing = Drawing()
        self.under_way: _Pass | None = None
        self.tokens: weakref.ref[Tensor] | None = None
        self.changes: list[tuple[float, readings.Change]] = []

    def __reduce__(self) -> tuple[type[_Thread], tuple[()]]:
        """Copy and pickle it as a new one: a copy of a network is at no drawing."""
        return _Thread, ()


class _ExtraRows(NamedArguments):
    """Hook on a denoiser that adds rows to its input, and changes the prompts' predictions by theirs.

    Args:
        denoiser: UNet or transformer.
        terms: Safety guidance in force.
        filtering: Prompt filters in force.
        gating: Gates of branches in force.
        family: Properties of the model's family.
    """

    def __init__(
        self, denoiser: nn.Module, terms: Sequence[Term], filtering: Sequence[FilterTerm],
        gating: Sequence[GateTerm], family: Family,
    ) -> None:  # fmt: skip
        super().__init__(denoiser)
        self.terms, self.filtering, self.family = tuple(terms), tuple(filtering), family
        self.gating = Gating(gating)
        self.thread = _Thread()

    # This is not compiled, because it inspects call frames; the denoiser itself is compiled.
    @torch.compiler.disable
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Add the rows, unless the pass must stay unchanged."""
        arguments = self.by_name(args, kwargs)
        skips.compare(None)
        self.thread.under_way = under_way = None if is_measured() else self.look(module, arguments)
        if under_way is None:
            # One that is read draws nothing: its rows may be anybody's.
            self.gating.say(arguments, len(latents_of(arguments)) if is_measured() else 0)
            return args, kwargs
        filtered, factors = self.filtered(arguments, under_way)
        under_way = under_way._replace(texts=self.texts(under_way), plain=tuple(factors))
        self.thread.under_way = under_way
        added = under_way.texts * under_way.pictures
        self.gating.say(arguments, under_way.pictures, added, under_way.plain)
        wide = self.widened(filtered, under_way)
        if factors:
            count, rows = len(factors), torch.tensor(list(factors))
            wide[TOKENS] = torch.cat([wide[TOKENS][:-count], arguments[TOKENS][list(factors)]])
            last = len(wide[TOKENS]) - count + torch.arange(count)
            skips.compare(skips.Pairs(rows, last, torch.stack(list(factors.values()))))
        return self.as_called(wide, len(args))

    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Remove the added rows, and change the prompts' predictions."""
        under_way, self.thread.under_way = self.thread.under_way, None
        skips.compare(None)
        membranes.let_through(None)
        if under_way is None:
            return output
        if isinstance(output, tuple):
            return (self.changed(output[0], under_way), *output[1:])
        return type(output)(sample=self.changed(output.sample, under_way))

    def look(self, module: nn.Module, arguments: Settings) -> _Pass | None:
        """Find the layout of a pass's rows; `None` for a pass that is not changed."""
        _refuse_other_rows(module)
        caller = nearest_caller(DiffusionPipeline, Backbone)
        pipe = caller if isinstance(caller, DiffusionPipeline) else None
        latents = latents_of(arguments)
        level = torch.as_tensor(arguments["timestep"]).detach().float().cpu().reshape(-1)
        rows, guidance = len(latents), arguments.get("guidance")
        drawing = None if isinstance(caller, Backbone) else self._drawing(pipe, float(level.max()))
        if drawing is not None:
            if self._is_negative(pipe, drawing, arguments, float(level.max())):
                return None
            drawing.latents = latents.detach()
        guided = drawing is not None and self._is_guided(pipe, arguments)
        pictures = rows // 2 if guided else rows
        scale = 1.0 if guidance is None else float(guidance.detach().flatten()[0])
        # A model that is told 0 or less predicts for no prompt, whatever it is asked about.
        return _Pass(rows, pictures, guided, max(scale, 1e-3), level.expand(rows)[-pictures:], drawing)

    def _drawing(self, pipe: DiffusionPipeline | None, level: float) -> Drawing:
        """Get the current sampling of this thread, or begin a new one."""
        schedule = None if pipe is None else getattr(pipe.scheduler, "timesteps", None)
        known = self.thread.drawing
        if schedule is not known.schedule or level > known.level:
            known = self.thread.drawing = Drawing(schedule, levels_of(schedule, self.family.noisiest), level)
        return known

    def _is_negative(
        self, pipe: DiffusionPipeline | None, drawing: Drawing, arguments: Settings, level: float
    ) -> bool:
        """Whether a pass is not for a prompt: for a negative prompt, or for a comparison by the pipeline.

        Pipelines with a separate pass for the negative prompt run it after the prompt's, on equal latents.
        """
        if pipe is None:
            return bool(self.terms) and _same_rows(arguments[TOKENS], self.terms[0].edit.tokens[NOTHING])
        if arguments.get("skip_layers") is not None:
            return True
        again = not self.family.guides_in_one_call and drawing.level == level
        return again and drawing.latents is not None and _equal(drawing.latents, latents_of(arguments))

    def _is_guided(self, pipe: DiffusionPipeline | None, arguments: Settings) -> bool:
        """Whether the first half of the rows is for negative prompts.

        Raises:
            UnsupportedModelError: The pipeline's way of guidance is unknown.
        """
        if not self.family.guides_in_one_call:
            return False
        first, second = halves if len(halves := latents_of(arguments).chunk(2)) == 2 else (None, None)
        paired = first is not None and second is not None and _equal(first, second)
        if pipe is None:
            ahead = arguments[TOKENS][: len(arguments[TOKENS]) // 2]
            return paired and bool(self.terms) and _same_rows(ahead, self.terms[0].edit.tokens[NOTHING])
        guides = getattr(pipe, "do_classifier_free_guidance", paired)
        if getattr(pipe, "do_perturbed_attention_guidance", False) or (guides and not paired):
            kind = type(pipe).__name__
            raise UnsupportedModelError(REFUSE.format(reason=f"{kind} guides with other rows than two for a picture"))
        return bool(guides)

    def filtered(self, arguments: Settings, under_way: _Pass) -> tuple[Settings, dict[int, Tensor]]:
        """Filter the prompts in the arguments; give the arguments, and the skip-feature factors by row."""
        tokens, level, factors = arguments[TOKENS], float(under_way.level.max()), dict[int, Tensor]()
        changed = tokens
        for strength, change in self.changes(tokens, under_way):
            if is_over(change.steps, under_way.drawing, level):
                continue
            changed = readings.changed(changed, change, strength)
            if change.edit.attenuation.numel():
                own = (1 + strength * (change.edit.attenuation.float().cpu() - 1)).clamp(min=0)
                factors[change.row] = own * factors.get(change.row, torch.ones(2))
        return {**arguments, TOKENS: changed}, factors

    def changes(self, tokens: Tensor, under_way: _Pass) -> list[tuple[float, readings.Change]]:
        """Find the filters' changes of a pass's prompts, with strengths; they are cached for a whole drawing."""
        if self.thread.tokens is None or self.thread.tokens() is not tokens or tokens.requires_grad:
            rows = range(under_way.rows - under_way.pictures, under_way.rows)
            self.thread.changes = [
                (term.strength, change)
                for term in self.filtering
                for change in readings.changes(tokens, term.edit, rows)
            ]
            self.thread.tokens = weakref.ref(tokens)
        return self.thread.changes

    def texts(self, under_way: _Pass) -> int:
        """Number of rows that guidance adds per picture: one per concept, and one more without negative prompts."""
        return len(self.terms) + (not under_way.guided) if self.terms else 0

    def widened(self, arguments: Settings, under_way: _Pass) -> Settings:
        """The arguments with the rows that are added: each concept's, and no prompt's where the pipeline has none."""
        texts = [(term.edit, CONCEPT) for term in self.terms]
        if len(texts) < under_way.texts:
            texts.append((self.terms[0].edit, NOTHING))
        # Behind the negative prompt's are the same pictures, and what else it is told is not the prompt's.
        like, plain = slice(0, under_way.pictures), list(under_way.plain)
        if not texts and not plain:
            return arguments
        wide = of_rows(
            arguments, under_way.rows, lambda part: torch.cat([part, *[part[like]] * len(texts), part[plain]])
        )
        return _with_texts(wide, texts, under_way) if texts else wide

    def changed(self, predicted: Tensor, under_way: _Pass) -> Tensor:
        """Give the caller's predictions, those of prompts changed by guidance."""
        rows, count = under_way.rows, under_way.pictures
        own, asked = predicted[rows - count : rows], predicted[:rows]
        if not self.terms:
            if under_way.drawing is not None:
                under_way.drawing.level = float(under_way.level.max())
            return asked
        precise = torch.promote_types(predicted.dtype, torch.float32)
        added = [part.to(precise) for part in predicted[rows:].split(count)[: under_way.texts]]
        null = predicted[:count].to(precise) if under_way.guided else added[-1]
        own, guidance, drawing = own.to(precise), under_way.guidance, under_way.drawing
        total = torch.zeros_like(own)
        for place, ((strength, edit), concept) in enumerate(zip(self.terms, added, strict=False)):
            moments = None if drawing is None else drawing.moments.get(place)
            if moments is not None and moments.after.shape != own.shape:
                moments = None
            again = drawing is not None and drawing.level == float(under_way.level.max())
            before = None if moments is None else moments.before if again else moments.after
            g = direction(own / guidance, null / guidance, concept / guidance, before, edit.figures)
            if drawing is not None:
                drawing.moments[place] = Moments.next(before, g.detach(), float(edit.figures[3]))
            acts = under_way.level < begin(int(edit.warmup), drawing, self.family.noisiest)
            total = total + strength * guidance * g * acts.to(g).view(-1, *[1] * (g.ndim - 1))
        if drawing is not None:
            drawing.level = float(under_way.level.max())
        return torch.cat([asked[: rows - count], (own - total).to(asked.dtype)])


def _with_texts(wide: Settings, texts: Sequence[tuple[SafetyGuidance, int]], under_way: _Pass) -> Settings:
    """Replace the conditioning of the rows behind the caller's by the encodings of texts."""
    first, count = under_way.rows, under_way.pictures

    def with_texts(given: Tensor, parts: Sequence[Tensor]) -> Tensor:
        rows = [part.to(given).expand(count, *part.shape) for part in parts]
        return torch.cat([given[:first], *rows, given[first + count * len(rows) :]])

    length = wide[TOKENS].shape[1]
    wide = {**wide, TOKENS: with_texts(wide[TOKENS], [_fitted(edit.tokens[row], length) for edit, row in texts])}
    for name in MASKS:
        if (mask := wide.get(name)) is not None:
            behind = mask[0, length:]
            rows = [torch.cat([_fitted(edit.mask[row], length, 0).to(mask), behind]) for edit, row in texts]
            wide[name] = with_texts(mask, rows)
    pooled = [edit.pooled[row] for edit, row in texts]
    if wide.get(POOLED) is not None:
        wide[POOLED] = with_texts(wide[POOLED], pooled)
    added = wide.get("added_cond_kwargs")
    if added and added.get("text_embeds") is not None:
        wide["added_cond_kwargs"] = {**added, "text_embeds": with_texts(added["text_embeds"], pooled)}
    return wide


def _fitted(tokens: Tensor, length: int, filler: int | None = None) -> Tensor:
    """Cut or pad tokens to a length, with the last token or a number; calls can choose T5's text length."""
    if len(tokens) >= length:
        return tokens[:length]
    last = tokens[-1:] if filler is None else torch.full_like(tokens[-1:], filler)
    return torch.cat([tokens, last.expand(length - len(tokens), *tokens.shape[1:])])


def _same_rows(conditioning: Tensor, tokens: Tensor) -> bool:
    """Whether every row of the conditioning is the same encoding, but for rounding of half precision."""
    known = _fitted(tokens, conditioning.shape[1]).to(conditioning)
    return known.shape == conditioning.shape[1:] and bool(
        torch.allclose(conditioning.detach(), known.expand_as(conditioning), 0.01, 0.01)
    )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)


def _refuse_other_rows(denoiser: nn.Module) -> None:
    """Raise `UnsupportedModelError` where something else adds or drops rows, which would be taken for others."""
    if guidance.has_branches(denoiser):
        raise UnsupportedModelError(REFUSE.format(reason="the removal of objects adds rows of its own"))
    if hooks.drops_rows(denoiser):
        raise UnsupportedModelError(REFUSE.format(reason="FasterCache drops the rows of negative prompts"))


class ExtraRows:
    """The safety guidance, prompt filters and branch gates of a denoiser, as a hook."""

    @staticmethod
    def write(
        denoiser: nn.Module, terms: Sequence[Term], filtering: Sequence[FilterTerm] = (), family: Family = FAMILY,
        gating: Sequence[GateTerm] = (),
    ) -> None:  # fmt: skip
        """Make exactly these terms, filters and gates active on a denoiser; none removes the hooks."""
        if ExtraRows.is_written(denoiser, terms, filtering, gating):
            return
        hooks.remove_hook(denoiser, _HOOK)
        skips.watch(denoiser, _compares(filtering))
        if terms or filtering or gating:
            hooks.register_hook(denoiser, _ExtraRows(denoiser, terms, filtering, gating, family), _HOOK)

    @staticmethod
    def is_written(
        denoiser: nn.Module, terms: Sequence[Term], filtering: Sequence[FilterTerm] = (),
        gating: Sequence[GateTerm] = (),
    ) -> bool:  # fmt: skip
        """Whether exactly these terms, filters and gates are active."""
        hook = hooks.find_hook(denoiser, _HOOK)
        if not (skips.is_watched(denoiser) if _compares(filtering) else not skips.has_hooks(denoiser)):
            return False
        if not terms and not filtering and not gating:
            return hook is None
        if not isinstance(hook, _ExtraRows) or not hooks.runs_hook(denoiser, _HOOK):
            return False
        same = same_terms(hook.terms, terms) and same_terms(hook.filtering, filtering)
        return same and hook.gating.is_of(gating)


def _compares(filtering: Sequence[FilterTerm]) -> bool:
    """Whether a filter compares skip features of rows."""
    return any(term.edit.attenuation.numel() for term in filtering)
