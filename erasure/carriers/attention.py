"""Control of a denoiser's attention: keys left out or weighted under a mask, and the attention that words receive.

The controller changes chosen layers while a `with` block runs and puts everything back afterwards, whatever happens in
it. It never counts calls: layers know their names, and the caller says which share of the steps has been done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.backbones import AttentionSite, attention_sites
from erasure.carriers.kernels import attend, attend_weighted, attend_without, attention_mass
from erasure.carriers.projections import Rotary, finish, is_fused, project, project_cross
from erasure.errors import NoMatchingModuleError, UnsupportedModelError
from erasure.interop import hooks, patches
from erasure.interop.attention import Backend, ChosenBackend
from erasure.interop.hooks import ModelHook
from erasure.interop.protocols import Arguments, AttentionLayer

_CAPTURE = "erasure_attention_capture"


class Layout(NamedTuple):
    """How the rows of the denoiser's batch, and the tokens of an image, are laid out."""

    latent_size: tuple[int, int]
    """Height and width of the latent."""
    samples: int = 1
    """Images. The batch repeats them in the same order, for each half of classifier-free guidance and each branch."""
    branches: int = 1
    """Parts that the batch falls into, one after the other."""
    changed: tuple[int, ...] = (0,)
    """The branches in which keys are left out or weighted."""

    def per_branch(self, rows: int) -> int:
        """Rows of one branch.

        Raises:
            UnsupportedModelError: The batch does not fall into so many branches of so many samples.
        """
        if rows % (self.branches * self.samples):
            raise UnsupportedModelError(
                f"a batch of {rows} rows does not fall into {self.branches} branches of {self.samples} samples"
            )
        return rows // self.branches


def to_grid(masks: Tensor, latent_size: tuple[int, int], site: AttentionSite) -> Tensor:
    """Masks as the tokens of a layer see them, `(samples, rows, columns)` bool: a token that a mask touches is in it.

    On a coarse grid a mask may touch every token although it leaves a part of the image. The tokens that it covers
    least are then out of it, down to half of what is left of the emptiest one.

    Args:
        masks: `(samples, height, width)` bool, of the latent's size or a multiple of it.
        latent_size: Height and width of the latent.
        site: The layer.
    """
    rows, columns = site.grid(*latent_size)
    side = site.downsampling * (masks.shape[1] // latent_size[0])
    beyond = (0, columns * side - masks.shape[2], 0, rows * side - masks.shape[1])
    covered = F.avg_pool2d(F.pad(masks.float()[:, None], beyond), side)[:, 0]
    inside = F.avg_pool2d(F.pad(torch.ones_like(masks[:, None], dtype=torch.float32), beyond), side)[:, 0]
    free = 1 - covered / inside
    most = free.amax((1, 2), keepdim=True)
    full = (covered > 0).flatten(1).all(1)[:, None, None] & (most > 0)
    return (covered > 0) & ~(full & (free >= most / 2))


class AttentionController(AbstractContextManager["AttentionController"]):
    """Changes and reads attention layers of a denoiser while the block runs.

    Args:
        denoiser: UNet or transformer.
        layout: Of the batches that it will be given.

    Raises:
        UnsupportedModelError: DeepCache or tomesd has replaced what is to be changed.

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
        """Let nothing attend to what a mask covers; see `to_grid`. A mask of the whole image changes nothing.

        Args:
            masks: `(samples, height, width)` bool, of the latent's size or a multiple of it.
            sites: Self- or joint attention layers.
            query_scale: What the queries under the mask are multiplied by, so that they look about more evenly.
            scale_until: For this share of the steps.
            until: Share of the steps in which keys are left out.
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
        """Multiply the attention to what a mask covers by `exp(log_weight)`; otherwise as `drop_keys`."""
        self._edit(masks, sites, log_weight, query_scale, scale_until, until)

    def capture(self, weights: Tensor, sites: Sequence[AttentionSite]) -> None:
        """Keep how much attention each image token pays to weighted text tokens; see `maps`.

        Args:
            weights: `(samples, text tokens, maps)` float: 1 for one token and 0 elsewhere gives its column.
            sites: Cross- or joint attention layers.
        """
        for site in self._wanted(sites, ("cross", "joint")):
            self._captures[site.name] = site, _Capture(site, self.layout, weights)

    def capture_self(self, sites: Sequence[AttentionSite]) -> None:
        """Keep the queries and keys of image tokens, so that `spread` can apply the attention to maps."""
        for site in self._wanted(sites, ("self",)):
            self._captures[site.name] = site, _Capture(site, self.layout, None)

    def _edit(
        self, masks: Tensor, sites: Sequence[AttentionSite], log_weight: float | None, query_scale: float,
        scale_until: float, until: float,
    ) -> None:  # fmt: skip
        device = next(self.denoiser.parameters()).device
        for site in self._wanted(sites, ("self", "joint")):
            grid = to_grid(masks, self.layout.latent_size, site).flatten(1).to(device)
            self._edits[site.name] = site, _Edit(grid, self.layout, log_weight, query_scale, scale_until, until)

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
        """Put the processors and hooks in place."""
        with ExitStack() as stack:
            for site, edit in self._edits.values():
                module = cast(AttentionLayer, site.module)
                # Ahead of the change: an interruption in between must not leave it.
                stack.callback(module.set_processor, module.processor)
                module.set_processor(EditedAttention(site, edit, module.processor))
            for site, capture in self._captures.values():
                name = f"{_CAPTURE}_{id(self)}"
                stack.enter_context(hooks.hooked(site.module, capture, name))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *failure: object) -> None:
        """Put back what was there."""
        self._stack.close()

    def at(self, share: float) -> None:
        """Say that this share of the steps has been done."""
        for _, edit in self._edits.values():
            edit.at(share)

    def collect(self, forward: Callable[[], object]) -> None:
        """Run the denoiser only as far as the last layer that is captured, uncompiled."""
        names = [site.name for site in attention_sites(self.denoiser)]
        ends = self._captures[max(self._captures, key=names.index)][1]
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
        """What the last pass paid, mean over heads, by layer: `(rows, maps, grid rows, grid columns)` float32."""
        return {name: c.map for name, (_, c) in self._captures.items() if c.map is not None}

    def spread(self, maps: Tensor) -> Tensor:
        """Captured self-attention applied to maps `(rows, maps, grid rows, grid columns)`, mean over layers."""
        flat = maps.flatten(2).transpose(1, 2)
        found = [attention_mass(*c.pair, flat) for _, c in self._captures.values() if c.pair is not None]
        return torch.stack(found).mean(0).transpose(1, 2).unflatten(2, maps.shape[2:])


class _Enough(Exception):
    """All that was wanted has been captured."""


class _Edit:
    """What is done to the keys of one layer."""

    def __init__(
        self, covered: Tensor, layout: Layout, log_weight: float | None, query_scale: float, scale_until: float,
        until: float,
    ) -> None:  # fmt: skip
        self.layout, self.log_weight = layout, log_weight
        self.query_scale, self.scale_until, self.until = query_scale, scale_until, until
        self.tokens = covered.shape[1]
        # Nothing under the mask, or nothing beside it: the layer stays as it is for that sample.
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
        # In place: a compiled graph sees new values in the same buffer.
        self.scale.copy_(torch.where(self.covered, factor, 1.0))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, text_first: bool, backend: Backend) -> Tensor:
        """The attention's output, `(rows, tokens, heads, dim)`; image tokens come after or before the text's."""
        if not self.on:
            return attend(query, key, value, backend)
        layout, text = self.layout, query.shape[1] - self.tokens
        per_branch = layout.per_branch(query.shape[0])
        parts = []
        for branch in range(layout.branches):
            rows = slice(branch * per_branch, (branch + 1) * per_branch)
            q, k, v = query[rows], key[rows], value[rows]
            changed = branch in layout.changed
            parts.append(self._changed(q, k, v, text, text_first, backend) if changed else attend(q, k, v, backend))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _changed(
        self, query: Tensor, key: Tensor, value: Tensor, text: int, text_first: bool, backend: Backend
    ) -> Tensor:
        repeats = query.shape[0] // self.layout.samples
        lead, trail = (text, 0) if text_first else (0, text)
        scale = F.pad(self.scale, (lead, trail), value=1.0).repeat(repeats, 1)
        query = query * scale.to(query.dtype)[:, :, None, None]
        if self.log_weight is not None:
            bias = F.pad(self.covered * self.log_weight, (lead, trail)).repeat(repeats, 1)
            return attend_weighted(query, key, value, bias, backend)
        words = torch.arange(text, device=query.device) + (0 if text_first else self.tokens)
        out = None
        for members, keep in self.groups:
            kept = torch.cat([words, keep + lead]) if text else keep
            if len(self.groups) == 1:
                return attend_without(query, key, value, kept, backend)
            rows = torch.cat([members + repeat * self.layout.samples for repeat in range(repeats)])
            out = torch.empty_like(query) if out is None else out
            out[rows] = attend_without(query[rows], key[rows], value[rows], kept, backend)
        assert out is not None
        return out


def _groups(covered: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Samples that share a mask, and the keys that it leaves, for every mask `(samples, tokens)`."""
    masks, which = covered.unique(dim=0, return_inverse=True)
    return [((which == index).nonzero()[:, 0], (~mask).nonzero()[:, 0]) for index, mask in enumerate(masks)]


class EditedAttention(ChosenBackend):
    """Processor of a layer whose keys are left out or weighted; LoRA and fused projections work as before.

    Args:
        site: The layer.
        edit: What to do.
        before: The processor that was there; its backend is respected.
    """

    def __init__(self, site: AttentionSite, edit: _Edit, before: object) -> None:
        super().__init__(before)
        self.site, self.edit = site, edit
        self.fused = is_fused(site.module, before)

    def __call__(
        self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None, image_rotary_emb: Rotary = None, *args: object, **kwargs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """As diffusers' processors are called."""
        if attention_mask is not None:
            raise UnsupportedModelError(f"{self.site.name} is given an attention mask, which cannot be combined")
        query, key, value = project(self.site, hidden_states, encoder_hidden_states, image_rotary_emb, self.fused)
        out = self.edit(query, key, value, self.site.text == "first", self.backend)
        return finish(self.site, out.to(query.dtype), encoder_hidden_states)


class _Capture(ModelHook):
    """Keeps what a layer's queries pay to text tokens, or its queries and keys, beside whatever processor it has."""

    def __init__(self, site: AttentionSite, layout: Layout, weights: Tensor | None) -> None:
        super().__init__()
        self.site, self.layout, self.weights = site, layout, weights
        self.map: Tensor | None = None
        self.pair: tuple[Tensor, Tensor] | None = None
        self.stops = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        text: Any = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
        rows, columns = self.site.grid(*self.layout.latent_size)
        if self.site.kind == "cross":
            query, key = project_cross(self.site, hidden, text)
            lead = 0
        else:
            fused = is_fused(module, module.processor)
            query, key, _ = project(self.site, hidden, text, kwargs.get("image_rotary_emb"), fused)
            lead = query.shape[1] - rows * columns if self.site.text == "first" else 0
            query = query[:, lead : lead + rows * columns]
        if self.weights is None:
            self.pair = query, key
        else:
            weights = self.weights.to(query.device).repeat(query.shape[0] // self.weights.shape[0], 1, 1)
            ahead = 0 if lead or self.site.kind == "cross" else rows * columns
            weights = F.pad(weights, (0, 0, ahead, key.shape[1] - ahead - weights.shape[1]))
            mass = attention_mass(query, key, weights).float()
            self.map = mass.transpose(1, 2).unflatten(2, (rows, columns))
        if self.stops:
            raise _Enough
        return args, kwargs
