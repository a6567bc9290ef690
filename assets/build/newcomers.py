"""Train and write `canvas-newcomers`: tells the new things of `erasure.assets.novel` apart, and from the known ones.

A linear layer on what the judge's two networks see of a picture. A quarter of the pictures has passed the autoencoder
of `canvas-sd`, whose traces every drawing of that model has.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erasure.assets import ROOT, novel
from erasure.assets.build.judge import disturb
from erasure.assets.scenes import Scene, render
from erasure.assets.world import BACKGROUNDS, OBJECTS, STYLES
from erasure.eval.detectors import CanvasJudge
from erasure.eval.detectors.newcomers import NAME, judge_features, save_newcomers
from erasure.interop.protocols import Autoencoder

BATCH = 64
"""Pictures that are looked at together."""


def sample(rng: np.random.Generator) -> Scene:
    """A scene with one or two things, two of three of them new, now and then in a new style; or with none."""
    things, known = list(novel.THINGS), list(OBJECTS)
    count = int(rng.choice(3, p=(0.04, 0.56, 0.4)))
    chosen: list[str] = []
    while len(chosen) < count:
        pool = things if rng.random() < 2 / 3 else known
        if (name := str(rng.choice(pool))) not in chosen:
            chosen.append(name)
    styles = [novel.PLAIN, *novel.STYLES] if set(chosen) & set(things) else [*STYLES, *novel.STYLES]
    weights = np.array([0.8, 0.1, 0.1]) if len(styles) == 3 else None
    reach = (2, 2) if count == 1 else (1, 4)
    offsets = tuple(
        (int(rng.integers(-reach[0], reach[0] + 1)), int(rng.integers(-reach[1], reach[1] + 1))) for _ in chosen
    )
    return Scene(tuple(chosen), str(rng.choice(styles, p=weights)), str(rng.choice(BACKGROUNDS)), offsets)


@torch.no_grad()
def looked_at(judge: CanvasJudge, vae: Autoencoder, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Show random scenes to the judge: `(scenes, features)`, and which things are there, `(scenes, things)`."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    names, features, labels = [*novel.THINGS, *OBJECTS], [], []
    for first in range(0, count, BATCH):
        scenes = [sample(rng) for _ in range(min(BATCH, count - first))]
        pixels = torch.from_numpy(np.stack([render(scene).image for scene in scenes])).permute(0, 3, 1, 2)
        pixels = pixels.float() / 127.5 - 1
        part = len(pixels) // 4
        passed = vae.decode(vae.encode(pixels[:part]).latent_dist.mode()).sample
        pixels = disturb(torch.cat([passed, pixels[part:]]).clamp(-1, 1), generator)
        features.append(judge_features(judge.network, pixels))
        labels.append(torch.tensor([[float(name in scene.objects) for name in names] for scene in scenes]))
    return torch.cat(features), torch.cat(labels)


def fitted(features: Tensor, labels: Tensor, decay: float = 1e-3, rounds: int = 200) -> nn.Linear:
    """Logistic regression of every thing, on features that are brought to one scale."""
    mean, scale = features.mean(0), features.std(0).clamp_min(1e-3)
    layer = nn.Linear(features.shape[1], labels.shape[1])
    nn.init.zeros_(layer.weight)
    x = (features - mean) / scale
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=rounds, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimiser.zero_grad()
        loss = F.binary_cross_entropy_with_logits(layer(x), labels, reduction="sum") / len(x)
        loss = loss + decay * layer.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(step)
    with torch.no_grad():
        layer.weight.div_(scale)
        layer.bias.sub_(layer.weight @ mean)
    return layer


def build(scenes: int = 2000, out: Path = ROOT / NAME, seed: int = 40) -> dict[str, float]:
    """Train on random scenes and write the folder; returns how often all that is there is said, on fresh scenes."""
    import erasure

    judge, vae = CanvasJudge(), erasure.load_pipeline("canvas-sd", device="cpu").vae
    layer = fitted(*looked_at(judge, vae, scenes, seed))
    save_newcomers(layer, out, list(novel.THINGS), list(OBJECTS))
    features, labels = looked_at(judge, vae, 500, seed + 1)
    with torch.no_grad():
        said = layer(features) > 0
    new = len(novel.THINGS)
    wrong = (said != (labels > 0.5))[:, :new]
    one = labels[:, :new].sum(1) == 1
    alone = one & (labels.sum(1) == 1)
    right = layer(features)[alone].argmax(1) == labels[alone].argmax(1)
    return {
        "new things exact": float((~wrong.any(1)).float().mean()), "new thing alone": float(right.float().mean()),
        "found": float(said[:, :new][labels[:, :new] > 0.5].float().mean()),
        "false": float(said[:, :new][labels[:, :new] < 0.5].float().mean()),
    }  # fmt: skip
