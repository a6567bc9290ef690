"""Train the judge: objects and style in colour, objects in greyscale."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.assets.build.loop import batches, cosine, log
from erasure.assets.scenes import Scene
from erasure.assets.world import OBJECTS, STYLES
from erasure.eval.detectors.canvas import JudgeNetwork, save_judge
from erasure.training.checkpoint import Checkpoint


def labels(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Which objects are there `(batch, objects)`, the style `(batch,)`, and whether it can be seen `(batch,)`."""
    names = list(OBJECTS)
    present = torch.tensor([[float(name in scene.objects) for name in names] for scene in scenes])
    style = torch.tensor([STYLES.index(scene.style) for scene in scenes])
    return present, style, present.sum(1) > 0


def disturb(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, noise and small changes of brightness, contrast and position, so that generated images are judged well."""
    count = len(pixels)
    uniform = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    low = F.interpolate(F.interpolate(pixels, scale_factor=0.5, mode="area"), size=pixels.shape[-2:], mode="bilinear")
    pixels = torch.lerp(pixels, low, uniform(count, 1, 1, 1))
    pixels = pixels * (0.85 + 0.3 * uniform(count, 1, 1, 1)) + 0.2 * (uniform(count, 1, 1, 1) - 0.5)
    pixels = pixels + 0.12 * uniform(count, 1, 1, 1) * torch.randn(pixels.shape, generator=generator)
    shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return torch.roll(pixels, shift, dims=(2, 3)).clamp(-1, 1)


def train(folder: Path, steps: int, batch: int = 64, peak: float = 2e-3, seed: int = 2) -> JudgeNetwork:
    """Train for `steps` steps (resuming from `folder`) and save `folder / "judge"`."""
    torch.manual_seed(seed)
    network = JudgeNetwork(len(OBJECTS), len(STYLES))
    optimiser = torch.optim.AdamW(network.parameters(), lr=peak, weight_decay=0.02)
    state = Checkpoint(folder / "judge.ckpt", model=network, optimiser=optimiser)
    start = state.resume()
    data = batches(batch, seed + 20_000 + start, pairs=0.45)
    generator = torch.Generator().manual_seed(seed + start)
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, steps, peak)
        scenes, pixels, _ = next(data)
        present, style, visible = labels(scenes)
        objects, styles, shapes = network(disturb(pixels, generator))
        loss = (
            F.binary_cross_entropy_with_logits(objects, present) * len(OBJECTS)
            + F.binary_cross_entropy_with_logits(shapes, present) * len(OBJECTS)
            + F.cross_entropy(styles[visible], style[visible])
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 100 == 0:
            found = ((objects > 0) == (present > 0.5)).all(1).float().mean().item()
            right = (styles.argmax(1) == style)[visible].float().mean().item()
            grey = ((shapes > 0) == (present > 0.5)).all(1).float().mean().item()
            log(folder / "judge.jsonl", step=step + 1, loss=loss.item(), exact=found, style=right, grey_exact=grey)
            state.save(step + 1)
    save_judge(network, folder / "judge", list(OBJECTS), STYLES)
    return network
