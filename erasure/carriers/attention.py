"""Control of a denoiser's attention: masked keys are dropped or weighted, and attention to words is recorded.

The controller changes chosen layers inside of a `with` block and restores everything afterwards, also after an error.
It does not count calls: layers are known by name, and the caller says which share of the steps is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.backbones import AttentionSite, attention_sites
from erasure.carriers.calls import measured
from erasure.carriers.kernels import attend, attend_weighted, attend_without, attention_mass
from erasure.carriers.layout import Layout, TextTokens, to_grid
from erasure.carriers.projections import Rotary, finish, is_fused, project, project_cross
from erasure.errors import NoMatchingModuleError, UnsupportedModelError
from erasure.interop import hooks, patches, paths
from erasure.interop.attention import Backend, ChosenBackend
from erasure.interop.hooks import ModelHook
from erasure.interop.protocols import Arguments, AttentionLayer

_CAPTURE, _TEXT, _OWN = "erasure_attention_capture", "erasure_attention_text", ":own"


class AttentionController(AbstractContextManager["AttentionController"]):
    """Changes and reads attention layers of a denoiser inside of a `with` block.

    Args:
        denoiser: UNet or transformer.
        layout: Layout of the denoiser's batches.

    Raises:
        UnsupportedModelError: DeepCache or tomesd has replaced the layers.

    Example:
        >>> control = AttentionController(denoiser, Layout((64, 64), samples=1, branches=2, changed=(1,)))
        >>> control.drop_keys(mask, decoder_self_attention, query_scale=0.3, scale_until=0.25)
        >>> with control:
        ...     for index, t in enumerate(timesteps):
        ...         control.at(index / len(timesteps))
        ...         denoiser(torch.cat([latents, latents]), t, text)
    """

    def __init__(self, denoiser: nn.Module, layout: Layout) -> None:
        patches.refuse_deep_cache([denoiser], "control of attention (removal, localisation, composition)")
        self.denoiser, self.layout = denoiser, layout
        self._text_tokens = TextTokens(paths.uncompiled(denoiser))
        self._edits: dict[str, tuple[AttentionSite, _Edit]] = {}
        self._captures: dict[str, tuple[AttentionSite, _Capture]] = {}
        self._stack = ExitStack()

    # What to do -----------------------------------------------------------------------------------------------------

    def drop_keys(
        self,
        masks: Tensor,
        sites: Sequence[AttentionSite],
        *,
        query_scale: float = 1.0,
        scale_until: float = 0.0,
        until: float = 1.0,
    ) -> None:
        """Remove attention to the masked part of the image; a mask of the whole image changes nothing.

        Masks are brought to the layers' grids by `to_grid`. In joint attention neither image tokens nor text tokens
        attend to the masked tokens, because text tokens would pass the information on. Tokens of reference images
        after the image's own tokens stay.

        Args:
            masks: `(samples, height, width)` bool, of the latent's size or a multiple of it.
            sites: Self- or joint attention layers.
            query_scale: Factor of the image's queries under the mask; below 1 their attention is more uniform.
            scale_until: Share of the steps, 0 to 1, in which queries are scaled.
            until: Share of the steps, 0 to 1, in which keys are dropped.
        """
        self._edit(masks, sites, None, query_scale, scale_until, until)

    def weight_keys(
        self,
        masks: Tensor,
        log_weight: float,
        sites: Sequence[AttentionSite],
        *,
        query_scale: float = 1.0,
        scale_until: float = 0.0,
        until: float = 1.0,
    ) -> None:
        """Multiply attention to the masked part of the image by `exp(log_weight)`; otherwise as `drop_keys`."""
        self._edit(masks, sites, log_weight, query_scale, scale_until, until)

    def capture(self, weights: Tensor, sites: Sequence[AttentionSite]) -> None:
        """Record each image token's attention to weighted text tokens; see `maps`.

        Args:
            weights: `(samples, text tokens, maps)` float: 1 for one token and 0 elsewhere gives its column.
            sites: Cross- or joint attention layers.
        """
        for site in self._wanted(sites, ("cross", "joint")):
            self._captures[site.name] = site, _Capture(site, self.layout, self._text_tokens, weights)

    def capture_self(self, sites: Sequence[AttentionSite]) -> None:
        """Record queries and keys of image tokens, so that `spread` can apply self-attention to maps.

        In joint attention only the attention among image tokens is used.
        """
        for site in self._wanted(sites, ("self", "joint")):
            self._captures[f"{site.name}{_OWN}"] = site, _Capture(site, self.layout, self._text_tokens, None)

    def _edit(
        self, masks: Tensor, sites: Sequence[AttentionSite], log_weight: float | None, query_scale: float,
        scale_until: float, until: float,
    ) -> None:  # fmt: skip
        device = next(self.denoiser.parameters()).device
        for site in self._wanted(sites, ("self", "joint")):
            grid = to_grid(masks, self.layout.latent_size, site).flatten(1).to(device)
            edit = _Edit(site, grid, self.layout, self._text_tokens, log_weight, query_scale, scale_until, until)
            self._edits[site.name] = site, edit

    def _wanted(self, sites: Sequence[AttentionSite], kinds: Sequence[str]) -> Sequence[AttentionSite]:
        if not sites:
            raise NoMatchingModuleError("no attention layer was chosen: the denoiser has none of that kind or size")
        for site in sites:
            if site.kind not in kinds:
                raise UnsupportedModelError(f"{site.name} is {site.kind}-attention; wanted: {' or '.join(kinds)}")
        for kind in {site.kind for site in sites}:
            patches.refuse_merged_tokens(self.denoiser, kind, "control of attention (removal, localisation)")
        return sites

    # While it runs --------------------------------------------------------------------------------------------------

    def __enter__(self) -> AttentionController:
        """Put the processors and hooks in place.

        Raises:
            UnsupportedModelError: A step cache is on, or a layer's processor has weights of its own (an IP-Adapter's),
                which would be bypassed.
        """
        if hooks.is_stateful(self._text_tokens.denoiser):
            raise UnsupportedModelError(
                "a step cache is on (enable_cache), which answers for layers with what they gave at an earlier step: "
                "disable_cache() first"
            )
        with ExitStack() as stack:
            stack.enter_context(hooks.hooked(self._text_tokens.denoiser, self._text_tokens, f"{_TEXT}_{id(self)}"))
            for site, edit in self._edits.values():
                module = cast(AttentionLayer, site.module)
                # Registered before the change, so that an interruption between the two does not leave it in place.
                stack.callback(module.set_processor, module.processor)
                module.set_processor(EditedAttention(site, edit, module.processor))
            if self._captures:
                stack.enter_context(measured())
            for key, (site, capture) in self._captures.items():
                stack.enter_context(hooks.hooked(site.module, capture, f"{_CAPTURE}_{id(self)}_{key}"))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        """Restore the processors and remove the hooks."""
        self._stack.close()

    def at(self, share: float) -> None:
        """Set the share of the steps, 0 to 1, that is done."""
        for _, edit in self._edits.values():
            edit.at(share)

    def collect(self, forward: Callable[[], object]) -> None:
        """Run the denoiser, uncompiled, only up to the last captured layer."""
        names = [site.name for site in attention_sites(self.denoiser)]
        # Of two hooks on one layer, the one that was added first runs last.
        ends = max(reversed(self._captures.values()), key=lambda capture: names.index(capture[0].name))[1]
        ends.stops = True
        try:
            with torch.compiler.set_stance("force_eager"):
                forward()
        except _Enough:
            pass
        finally:
            ends.stops = False

    @property
    def maps(self) -> Mapping[str, Tensor]:
        """Recorded attention of the last pass by layer, mean over heads: `(rows, maps, grid rows, grid columns)`."""
        return {site.name: capture.map for site, capture in self._captures.values() if capture.map is not None}

    def spread(self, maps: Tensor) -> Tensor:
        """Apply the recorded self-attention to maps `(rows, maps, grid rows, grid columns)`; mean over layers."""
        flat = maps.flatten(2).transpose(1, 2)
        found = [attention_mass(*c.pair, flat) for _, c in self._captures.values() if c.pair is not None]
        return torch.stack(found).mean(0).transpose(1, 2).unflatten(2, maps.shape[2:])


class _Enough(Exception):
    """Raised to stop the pass once everything has been captured."""


class _Edit:
    """The edit of one layer's keys."""

    def __init__(
        self, site: AttentionSite, covered: Tensor, layout: Layout, text_tokens: TextTokens, log_weight: float | None,
        query_scale: float, scale_until: float, until: float,
    ) -> None:  # fmt: skip
        self.site, self.layout, self.text_tokens, self.log_weight = site, layout, text_tokens, log_weight
        self.query_scale, self.scale_until, self.until = query_scale, scale_until, until
        # A sample whose mask covers no token or all tokens is not changed in this layer.
        usable = covered.any(1) & ~covered.all(1)
        self.covered = covered & usable[:, None]
        self.groups = _groups(self.covered)
        self.needed = bool(usable.any())
        self.scale = torch.ones(self.covered.shape, device=covered.device)
        self.at(0.0)

    def at(self, share: float) -> None:
        """See `AttentionController.at`."""
        self.on = self.needed and share < self.until
        factor = self.query_scale if share < self.scale_until else 1.0
        # Values are changed in place, so that a compiled graph sees them in the same buffer.
        self.scale.copy_(torch.where(self.covered, factor, 1.0))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, backend: Backend) -> Tensor:
        """Compute the attention's output, `(rows, tokens, heads, dim)`."""
        if not self.on:
            return attend(query, key, value, backend)
        layout, image = self.layout, self.text_tokens.image(self.site, query.shape[1], self.layout)
        per_branch = layout.per_branch(query.shape[0])
        parts = []
        for branch in range(layout.branches):
            rows = slice(branch * per_branch, (branch + 1) * per_branch)
            q, k, v = query[rows], key[rows], value[rows]
            changed = branch in layout.changed
            parts.append(self._changed(q, k, v, image, backend) if changed else attend(q, k, v, backend))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _changed(self, query: Tensor, key: Tensor, value: Tensor, image: slice, backend: Backend) -> Tensor:
        repeats, tokens = query.shape[0] // self.layout.samples, query.shape[1]
        around = (image.start, tokens - image.stop)
        scale = F.pad(self.scale, around, value=1.0).repeat(repeats, 1)
        query = query * scale.to(query.dtype)[:, :, None, None]
        if self.log_weight is not None:
            bias = F.pad(self.covered * self.log_weight, around).repeat(repeats, 1)
            return attend_weighted(query, key, value, bias, backend)
        places = torch.arange(tokens, device=query.device)
        out = None
        for members, keep in self.groups:
            kept = torch.cat([places[: image.start], keep + image.start, places[image.stop :]])
            if len(self.groups) == 1:
                return attend_without(query, key, value, kept, backend)
            rows = torch.cat([members + repeat * self.layout.samples for repeat in range(repeats)])
            out = torch.empty_like(query) if out is None else out
            out[rows] = attend_without(query[rows], key[rows], value[rows], kept, backend)
        assert out is not None
        return out


def _groups(covered: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Group samples `(samples, tokens)` by mask: the samples of each mask, and the keys that it keeps."""
    masks, which = covered.unique(dim=0, return_inverse=True)
    return [((which == index).nonzero()[:, 0], (~mask).nonzero()[:, 0]) for index, mask in enumerate(masks)]


class EditedAttention(ChosenBackend):
    """Attention processor that drops or weights keys; LoRA and fused projections work as before.

    Args:
        site: The layer.
        edit: Edit of the layer's keys.
        before: The layer's former processor, whose attention backend is used.

    Raises:
        UnsupportedModelError: The former processor has weights of its own, which would be bypassed.
    """

    def __init__(self, site: AttentionSite, edit: _Edit, before: object) -> None:
        super().__init__(before)
        if isinstance(before, nn.Module):
            raise UnsupportedModelError(
                f"{site.name} runs with {type(before).__name__}, whose own weights a change of its attention would "
                "pass over: unload the IP-Adapter first"
            )
        self.site, self.edit = site, edit
        self.fused = is_fused(site.module, before)

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: Rotary = None, *args: object, **kwargs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """Run the layer, with the signature of diffusers' attention processors."""
        if attention_mask is not None:
            raise UnsupportedModelError(
                f"{self.site.name} is given an attention mask, which cannot be combined with an edit of attention: "
                "call the pipeline without it"
            )
        query, key, value = project(self.site, hidden_states, encoder_hidden_states, image_rotary_emb, self.fused)
        out = self.edit(query, key, value, self.backend)
        return finish(self.site, out.to(query.dtype), encoder_hidden_states)


class _Capture(ModelHook):
    """Hook that records a layer's attention to text tokens, or its queries and keys, whatever its processor is."""

    def __init__(self, site: AttentionSite, layout: Layout, text_tokens: TextTokens, weights: Tensor | None) -> None:
        super().__init__()
        self.site, self.layout, self.text_tokens, self.weights = site, layout, text_tokens, weights
        self.map: Tensor | None = None
        self.pair: tuple[Tensor, Tensor] | None = None
        self.stops = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        text: Any = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        if kwargs.get("attention_mask", args[2] if len(args) > 2 else None) is not None:
            raise UnsupportedModelError(
                f"{self.site.name} is given an attention mask, whose attention is not read: call the pipeline "
                "without it"
            )
        if self.site.kind == "cross":
            query, key = project_cross(self.site, hidden, text)
            words = slice(0, key.shape[1])
        else:
            fused = is_fused(module, module.processor)
            query, key, _ = project(self.site, hidden, text, kwargs.get("image_rotary_emb"), fused)
            image = self.text_tokens.image(self.site, query.shape[1], self.layout)
            words = slice(0, image.start) if self.site.text == "first" else slice(image.stop, key.shape[1])
            query = query[:, image]
        if self.weights is None:
            self.pair = query, key[:, image]
        else:
            self.map = self._mass(query, key, words)
        if self.stops:
            raise _Enough
        return args, kwargs

    def _mass(self, query: Tensor, key: Tensor, words: slice) -> Tensor:
        """Compute each image token's attention to the weighted text, `(rows, maps, grid rows, grid columns)`."""
        assert self.weights is not None
        weights, count = self.weights.to(query.device), words.stop - words.start
        if weights.shape[1] > count:
            raise UnsupportedModelError(
                f"{self.site.name} is given {count} tokens of text, and the attention to {weights.shape[1]} is asked "
                "for: encode the prompt at the same length"
            )
        # Additional tokens, of an IP-Adapter or of longer prompts, have no weights.
        weights = weights.repeat(query.shape[0] // weights.shape[0], 1, 1)
        weights = F.pad(weights, (0, 0, words.start, key.shape[1] - words.start - weights.shape[1]))
        mass = attention_mass(query, key, weights).float()
        return mass.transpose(1, 2).unflatten(2, self.site.grid(*self.layout.latent_size))
