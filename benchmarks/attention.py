"""`python -m benchmarks attention`: redirected attention, shared trunks and early exits, against plain code."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks import PROGRAM
from erasure.cli.arguments import UsageError, parse
from erasure.cli.terminal import Terminal

if TYPE_CHECKING:
    from torch import Tensor

    from erasure.interop.protocols import Denoiser

HEADS, WIDTH, COVERED = 10, 64, 0.2
"""Of SDXL's layers of 64x64 tokens, and the share that the mask covers."""
LAYOUTS = {"sd15": (320, 640, 1280, 1280), "quarter": (80, 160, 320, 320)}
"""Channels of Stable Diffusion 1.5's UNet, and a quarter of them for timing on a CPU."""


@dataclass(kw_only=True)
class BenchAttentionOptions:
    """Measure what attention control costs, each against a plain implementation in the same run.

    A layer of Attentive Eraser with all probabilities formed, as its authors' code does; a removal step whose two
    branches run whole; and a guidance pass of A-STAR through the whole UNet.
    """

    tokens: int = 4096
    """Image tokens of the layer."""
    side: int = 64
    """Of the latent, for the UNet."""
    device: str = "cpu"
    """Where to run."""
    repeats: int = 3
    """Rounds of each pair in turn; medians are reported."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(BenchAttentionOptions, "attention", argv, program=PROGRAM)
    terminal.json_only = options.json
    if min(options.repeats, options.tokens, options.side) < 1:
        raise UsageError("--tokens, --side and --repeats are at least 1")
    with terminal.progress(3) as progress:
        progress.stage("layer")
        layer = time_layer(options.tokens, options.device, options.repeats)
        progress.advance()
        progress.stage("shared trunk")
        trunk = both_ratios(removal_step, options)
        progress.advance()
        progress.stage("early exit")
        passes = both_ratios(guidance_pass, options)
        progress.advance()
    if options.json:
        terminal.result({"device": options.device, "layer": layer, "shared_trunk": trunk, "early_exit": passes})
        return
    rows = [
        [f"attention layer, {options.tokens} tokens, time", "plain", f"{layer['speedup']:.1f}x faster"],
        ["the same, peak extra memory", "plain", f"1/{layer['memory_ratio']:.0f}" if layer["memory_ratio"] else "-"],
        ["removal step with shared trunk, FLOPs (SD 1.5)", "two branches", f"{trunk['flops']:.3f}x"],
        ["the same, time (quarter of its width)", "two branches", f"{trunk['time']:.3f}x"],
        ["A-STAR's guidance pass, FLOPs (SD 1.5)", "whole UNet", f"{passes['flops']:.3f}x"],
        ["the same, time (quarter of its width)", "whole UNet", f"{passes['time']:.3f}x"],
    ]
    terminal.table(["", "against", "ratio"], rows)


def both_ratios(make: Callable[..., Callable[[], object]], options: BenchAttentionOptions) -> dict[str, float]:
    """FLOPs and time of a step in its cheap form over those in its plain one."""
    return {
        "flops": flops_ratio(make, options.side),
        "time": time_ratio(make, options.side, options.device, options.repeats),
    }


def in_turn(actions: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of actions that take turns, after one round that does not count."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for index in range(repeats + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if index:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


# The layer ----------------------------------------------------------------------------------------------------------


def materialised(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """A redirected layer as Attentive Eraser's code computes it: every probability, several times.

    Args:
        query: `(2, heads, tokens, dim)`, the ordinary branch and the redirected one.
        key: The same.
        value: The same.
        mask: `(tokens,)` bool.
        scale: Of the logits of queries under the mask.
    """
    import torch

    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    ordinary = logits.softmax(-1)[:1] @ value[:1]
    bias = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, torch.finfo(query.dtype).min)
    both = torch.cat([logits[1:] * scale + bias, logits[1:] + bias]).softmax(-1)
    foreground, background = (both @ value[1:]).chunk(2)
    return torch.cat([ordinary, torch.where(mask[:, None], foreground, background)])


def time_layer(tokens: int, device: str, repeats: int) -> dict[str, float | None]:
    """Time and extra memory of one layer of two branches, and how far the results are apart."""
    import torch

    from erasure.carriers.kernels import attend, attend_without

    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.float16
    q, k, v = (torch.randn(2, tokens, HEADS, WIDTH, generator=generator).to(device, dtype) for _ in range(3))
    mask = torch.zeros(tokens, dtype=torch.bool, device=device)
    mask[: int(COVERED * tokens)] = True
    keep = (~mask).nonzero()[:, 0]
    factor = torch.ones(tokens, device=device, dtype=dtype).masked_fill(mask, 0.3)[:, None, None]
    heads_first = [part.transpose(1, 2) for part in (q, k, v)]

    def plain() -> Tensor:
        return materialised(heads_first[0], heads_first[1], heads_first[2], mask, 0.3)

    def ours() -> Tensor:
        return torch.cat([attend(q[:1], k[:1], v[:1]), attend_without(q[1:] * factor, k[1:], v[1:], keep)])

    with torch.no_grad():
        apart = float((plain().transpose(1, 2) - ours()).abs().max())
        seconds = in_turn({"plain": plain, "ours": ours}, repeats, device)
        extra = {name: extra_memory(action, device) for name, action in (("ours", ours), ("plain", plain))}
    known = extra["ours"] is not None and extra["plain"] is not None
    return {
        "plain_seconds": seconds["plain"],
        "seconds": seconds["ours"],
        "speedup": seconds["plain"] / seconds["ours"],
        "plain_extra_mb": extra["plain"],
        "extra_mb": extra["ours"],
        "memory_ratio": extra["plain"] / max(extra["ours"], 1e-3) if known else None,  # type: ignore[operator,type-var]
        "largest_difference": apart,
    }


def extra_memory(action: Callable[[], object], device: str) -> float | None:
    """Most megabytes that tensors made by an action hold at once, its result included."""
    import torch

    # Ahead of its import: the profiler tells of missing GPUs on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    from torch.profiler import ProfilerActivity, profile

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        action()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most / 2**20 if most else None


# The UNet -----------------------------------------------------------------------------------------------------------


def make_unet(layout: str, device: str) -> Denoiser:
    """A UNet of Stable Diffusion 1.5's layout with random weights."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=LAYOUTS[layout], cross_attention_dim=768, attention_head_dim=8,
            norm_num_groups=16,
        )  # fmt: skip
    return unet.eval().requires_grad_(False)


def removal_step(unet: Denoiser, side: int, *, cheap: bool) -> Callable[[], object]:
    """One step of object removal with both branches, whole or with a shared trunk."""
    import torch

    from erasure.backbones import attention_sites
    from erasure.carriers.attention import AttentionController, Layout
    from erasure.carriers.guidance import BranchGuidance

    device = next(unet.parameters()).device
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, : side // 2, : side // 3] = True
    sites = [site for site in attention_sites(unet) if site.kind == "self" and site.in_decoder]
    control = AttentionController(unet, Layout((side, side), 1, branches=2, changed=(1,)))
    if device.type != "meta":
        control.drop_keys(mask, sites, query_scale=0.3, scale_until=0.25)
    latents, text = torch.randn(1, 4, side, side, device=device), torch.randn(1, 77, 768, device=device)

    def step() -> object:
        with torch.no_grad(), control, BranchGuidance(unet, 9.0, shared_trunk=cheap):
            return unet(latents, torch.tensor(500, device=device), encoder_hidden_states=text).sample

    return step


def guidance_pass(unet: Denoiser, side: int, *, cheap: bool) -> Callable[[], object]:
    """One forward and backward pass of A-STAR's segregation loss, through the whole UNet or as far as it reads."""
    import torch

    from erasure.carriers.attention import AttentionController, Layout
    from erasure.pipelines.a_star import composition_sites
    from erasure.pipelines.attention_losses import ranged, segregation

    device = next(unet.parameters()).device
    control = AttentionController(unet, Layout((side, side)))
    weights = torch.zeros(1, 77, 2, device=device)
    if device.type != "meta":
        weights[0, 2, 0] = weights[0, 5, 1] = 1
    control.capture(weights, composition_sites(unet, (side, side), 16))
    latents = torch.randn(1, 4, side, side, device=device).requires_grad_(True)
    text, present = torch.randn(1, 77, 768, device=device), torch.ones(1, 2, dtype=torch.bool, device=device)

    def step() -> object:
        def forward() -> Tensor:
            return unet(latents, torch.tensor(500, device=device), encoder_hidden_states=text).sample

        with torch.enable_grad(), control:
            made = torch.zeros((), device=device)
            if cheap:
                control.collect(forward)
            else:
                # Without an exit, the prediction is part of the graph; its share of the loss is nothing.
                made = 0 * forward().sum()
            loss = segregation(ranged(torch.stack(list(control.maps.values())).mean(0)), present).sum() + made
            latents.grad = None
            loss.backward()
            return latents.grad

    return step


def flops_ratio(make: Callable[..., Callable[[], object]], side: int) -> float:
    """FLOPs of a step in its cheap form over those in its plain one, at Stable Diffusion 1.5's full width.

    The keys that redirected layers leave out, which make both forms cheaper, are not subtracted.
    """
    unet = make_unet("sd15", "meta")
    return count(make(unet, side, cheap=True)) / count(make(unet, side, cheap=False))


def time_ratio(make: Callable[..., Callable[[], object]], side: int, device: str, repeats: int) -> float:
    """The same in time, at a quarter of the width."""
    unet = make_unet("quarter", device)
    seconds = in_turn({name: make(unet, side, cheap=name == "cheap") for name in ("cheap", "plain")}, repeats, device)
    return seconds["cheap"] / seconds["plain"]


def count(action: Callable[[], object]) -> int:
    """FLOPs of an action."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()
