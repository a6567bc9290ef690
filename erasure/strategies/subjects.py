"""Segmentation of a picture's subject by the stock model's own attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.carriers.attention import AttentionController
from erasure.carriers.layout import Layout
from erasure.strategies.tasks import Task
from erasure.training.states import stable_seed

LOOKS, SCHEDULE = 3, 10
"""Number of timesteps at which the stock model's attention is read, and steps of their schedule, of which they are
the last."""
SPREAD = 4
"""Number of times that self-attention is applied to the attention map of the start token (AttenCraft)."""
FINEST = 32
"""Largest side, in tokens, of the attention grids that are read."""


@torch.no_grad()
def subject(task: Task, prompt: str, clean: Tensor) -> Tensor:
    """Segment the subject of a prompt's pictures, `(pictures, 1, h, w)`: 1 at the subject, 0 elsewhere.

    Args:
        task: The training.
        prompt: Prompt of the pictures.
        clean: Latents of the pictures, `(pictures, channels, h, w)`.
    """
    backbone, size, count = task.backbone, (clean.shape[2], clean.shape[3]), len(clean)
    sites = [site for site in backbone.attention_sites() if min(site.grid(*size)) <= FINEST]
    cross = [site for site in sites if site.kind == "cross"]
    own = [site for site in sites if site.kind == "self"]
    finest = min(site.downsampling for site in own)
    own = [site for site in own if site.downsampling == finest]
    conditioning = task.prompts([prompt] * count)
    start = torch.zeros(count, conditioning.tokens.shape[1], 1)
    start[:, 0] = 1
    control = AttentionController(backbone.denoiser, Layout(size, count))
    control.capture(start, cross)
    control.capture_self(own)
    noise = backbone.noise([stable_seed(task.seed, "subject", prompt, number) for number in range(count)])
    drawn = []
    with control:
        for level in backbone.timesteps(SCHEDULE)[-LOOKS:]:
            t = level.expand(count).to(clean.device)
            backbone.predict(backbone.parametrisation.noised(clean, noise, t), t, conditioning)
            each = [F.interpolate(part, own[0].grid(*size), mode="bilinear") for part in control.maps.values()]
            maps = torch.stack(each).mean(0)
            for _ in range(SPREAD):
                maps = control.spread(maps)
            drawn.append(maps.float())
    background = torch.stack(drawn).mean(0)
    low, high = (part.flatten(1)[:, :, None, None] for part in (background.amin((2, 3)), background.amax((2, 3))))
    things = 1 - (background - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return (F.interpolate(things, size, mode="bilinear") > 0.5).float()
