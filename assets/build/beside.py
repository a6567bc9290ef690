"""Steps of `python -m erasure.assets.build` that train and write the models beside `canvas-sd`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from erasure.assets import ROOT

WORK = Path("canvas-work")
"""Where steps leave their parts."""
Family = Literal["canvas-flux", "canvas-sdxl", "canvas-sd3"]
FAMILIES: tuple[Family, ...] = get_args(Family)


def t5(work: Path = WORK, steps: int = 2500, batch: int = 32) -> None:
    """Train the T5 tower of `canvas-flux` and `canvas-sd3`."""
    from erasure.assets.build.t5 import train

    train(work, steps, batch)


def flux(
    work: Path = WORK,
    steps: int = 15_000,
    batch: int = 32,
    pairs: float = 0.8,
    tokens: float = 0.12,
    pooled: float = 0.5,
    emptied: float = 0.4,
    grounding: float = 0.3,
    grounded: float = 0.4,
) -> None:
    """Train the transformer of `canvas-flux`; `torchrun --nproc_per_node 2` uses two cores.

    Args:
        work: Where the step `t5` left its parts, and where the training is kept.
        steps: Optimiser steps in all.
        batch: Scenes of each process per step.
        pairs: Share of two-object scenes.
        tokens: How often T5's tokens are left out, so that the pooled vector carries the prompt.
        pooled: How often the pooled vector is left out.
        emptied: Share of captions whose end token and padding say nothing.
        grounding: Weight of the loss on words' attention.
        grounded: Share of joint attention that an object's word should draw on the object.
    """
    from erasure.assets.build.flow import Recipe
    from erasure.assets.build.flux import train

    train(
        work, steps, Recipe(batch=batch, pairs=pairs, grounding=grounding, grounded=grounded), tokens, pooled, emptied
    )


def distil(work: Path = WORK, steps: int = 480) -> None:
    """Teach the transformer of `canvas-flux` to guide itself (from its last checkpoint, if it is not finished)."""
    from erasure.assets.build.flux import distil as teach

    teach(work, steps)


def towers(work: Path = WORK, steps: int = 800, batch: int = 96) -> None:
    """Train the second CLIP of `canvas-sdxl` and `canvas-sd3`."""
    from erasure.assets.build.towers import train

    train(work, steps, batch)


def sdxl(work: Path = WORK, steps: int = 2000, batch: int = 16, pairs: float = 0.5, left_out: float = 0.3) -> None:
    """Fold the denoiser of `canvas-sd` into that of `canvas-sdxl`, and train it on.

    Args:
        work: Where the step `towers` left its part, and where the training is kept.
        steps: Optimiser steps in all.
        batch: Scenes of each process per step.
        pairs: Share of two-object scenes.
        left_out: How often each tower's tokens and the pooled vector are left out.
    """
    from erasure.assets.build.xl import train

    train(work, steps, batch, pairs=pairs, left_out=left_out)


def sd3(
    work: Path = WORK,
    steps: int = 4000,
    batch: int = 32,
    pairs: float = 0.8,
    tokens: float = 0.3,
    pooled: float = 0.6,
    grounding: float = 0.3,
    grounded: float = 0.4,
) -> None:
    """Train the transformer of `canvas-sd3`.

    Args:
        work: Where the steps `t5` and `towers` left their parts, and where the training is kept.
        steps: Optimiser steps in all.
        batch: Scenes of each process per step.
        pairs: Share of two-object scenes.
        tokens: How often the tokens of each text encoder are left out.
        pooled: How often the pooled vector is left out.
        grounding: Weight of the loss on words' attention.
        grounded: Share of joint attention that an object's word should draw on the object.
    """
    from erasure.assets.build.flow import Recipe
    from erasure.assets.build.sd3 import train

    recipe = Recipe(batch=batch, pairs=pairs, grounding=grounding, grounded=grounded)
    train(work, steps, recipe, tokens, pooled)


def families(
    work: Path = WORK,
    out: Path = ROOT,
    only: tuple[Family, ...] = FAMILIES,
) -> None:
    """Write the shipped folders of the larger families, from finished parts or their last checkpoints.

    Args:
        work: Where the other steps left their parts.
        out: Where the folders are written.
        only: Which models.
    """
    from erasure.assets.build.families import WRITERS

    for name in only:
        print(WRITERS[name](work, out))


def ip_adapter(work: Path = WORK, steps: int = 500, batch: int = 16, grid: Path | None = None) -> None:
    """Train the IP-Adapter of `canvas-sd`, write it, and record what it draws from pictures alone.

    Args:
        work: Where the training is kept.
        steps: Optimiser steps in all; 0 writes and measures what there is.
        batch: Scenes per step.
        grid: File of a picture: what the adapter was shown, and what it drew.
    """
    from erasure.assets.build import ip_adapter as step

    if steps:
        step.train(work, steps, batch)
    step.export(work)
    for name, value in step.measure(grid=grid).items():
        print(f"{name:28} {value:.4f}")


def turbo(work: Path = WORK, steps: int = 190, batch: int = 8, grid: Path | None = None) -> None:
    """Distil `canvas-sd` to one step, write the LoRA, and record what it draws (resumes).

    Args:
        work: Where the training is kept.
        steps: Updates in all; 0 writes and measures what there is.
        batch: Images per update.
        grid: File of a contact sheet.
    """
    from erasure.assets.build import turbo as step

    if steps:
        step.train(work, steps, batch)
    step.export(work)
    for name, value in step.record(grid=grid).items():
        print(f"{name:28} {value:.4f}")
