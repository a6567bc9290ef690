"""`python -m erasure.assets.build STEP`: make the embedded world from artwork to exported models.

Every step resumes where it was stopped and is seeded. The order is: sprites, vae, clip, judge, denoiser, export, sae,
evaluate, words, methods, several, requests, attacks, audited, suite, ways, gates, controls, localiser, layouts;
`everything` measures all of it. With `--into docs/measured` a step writes the figures of docs anew, and
`python docs/reference.py` then writes the pages.

The models of the larger families start from the shipped `canvas-sd`. `canvas-flux` takes the steps t5, flux and
distil, `canvas-sdxl` takes towers and sdxl, `canvas-sd3` takes t5, towers and sd3; `families` writes them, and
`evaluate` measures each, and `across` every strategy on all of them. `ip_adapter` trains, writes and measures the
IP-Adapter of `canvas-sd`, and `turbo` the LoRA with which it draws in one step. `detectors` fetches the weights of
detectors of other projects.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import tyro

from erasure.assets import ROOT
from erasure.assets.build.beside import WORK, distil, families, flux, ip_adapter, sd3, sdxl, t5, towers, turbo
from erasure.assets.build.measuring import (
    across,
    attacks,
    audited,
    controls,
    gates,
    learning,
    methods,
    requests,
    several,
    suite,
    ways,
)


def sprites(work: Path = WORK) -> None:
    """Fetch the artwork with npm and render the sprite atlas."""
    from erasure.assets.build.sprites import build

    build(work / "artwork")


def vae(work: Path = WORK, steps: int = 5500, batch: int = 8) -> None:
    """Train the autoencoder."""
    from erasure.assets.build.vae import train

    train(work, steps, batch)


def clip(work: Path = WORK, steps: int = 1400, batch: int = 128) -> None:
    """Train the text and image towers."""
    from erasure.assets.build.clip import train

    train(work, steps, batch)


def judge(work: Path = WORK, steps: int = 1500, batch: int = 64) -> None:
    """Train the classifier of objects and styles."""
    from erasure.assets.build.judge import train

    train(work, steps, batch)


def newcomers(scenes: int = 2000) -> None:
    """Train what tells new things apart, on what the judge sees."""
    from erasure.assets.build.newcomers import build

    print(build(scenes))


def denoiser(
    work: Path = WORK,
    steps: int = 7000,
    batch: int = 16,
    bank: int = 12_000,
    pairs: float = 0.4,
    peak: float = 1e-3,
    emptied: float = 0.4,
    grounding: float = 0.3,
    grounded: float = 0.8,
    shipped: bool = False,
) -> None:
    """Train the denoiser; `torchrun --nproc_per_node 2 -m erasure.assets.build denoiser` uses two cores.

    Args:
        work: Where the other steps left their parts, and where the training is kept.
        steps: Optimiser steps in all.
        batch: Scenes of each process per step.
        bank: Scenes whose latents each process keeps.
        pairs: Share of two-object scenes.
        peak: Greatest learning rate.
        emptied: Share of captions whose end token and padding have the states of the empty prompt.
        grounding: Weight of the loss on words' attention.
        grounded: Share of attention that an object's word should draw on the object.
        shipped: Go on from the shipped denoiser, with the shipped autoencoder and text tower.
    """
    from erasure.assets.build.denoiser import train

    train(
        work, steps, batch, peak, bank=bank, pairs=pairs, emptied=emptied, grounding=grounding, grounded=grounded,
        shipped=shipped,
    )  # fmt: skip


def export(work: Path = WORK) -> None:
    """Write the shipped folders from the trained parts (or from the denoiser's last checkpoint)."""
    from erasure.assets.build.export import export as write

    write(work)


def sae(out: Path = ROOT / "canvas-sae") -> None:
    """Train the sparse autoencoder of the shipped text encoder, as a user would with `erasure sae train`."""
    settings = "--layer 0 --d-sae 1024 --k 8 --steps 3000 --learning-rate 1e-3 --dead-after 50000"
    command = [sys.executable, "-m", "erasure", "sae", "train", "--model", "canvas-sd", "--out", str(out)]
    raise SystemExit(subprocess.call([*command, *settings.split()]))


def evaluate(
    seeds: int = 2, pairs: int = 120, grids: Path | None = None, model: str = "canvas-sd", into: Path | None = None
) -> None:
    """Measure a model and record the figures in its canvas.json.

    Args:
        seeds: Images of each object in each style.
        pairs: Images of two objects.
        grids: A folder for contact sheets to look at.
        model: Name of an embedded model, or a folder.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build import doors
    from erasure.assets.build import words as of_words
    from erasure.assets.build.evaluate import evaluate as measure
    from erasure.assets.build.tables import report

    found = measure(seeds, pairs, grids, model)
    for name, value in found.items():
        print(f"{name:28} {value:.4f}")
    if "word_share" in found:
        report("words", of_words.rows(found), ("model",), into, seeds=())
    else:
        name = Path(model).name
        report("doors", doors.rows(name, found), ("model", "part"), into, models=(name,), seeds=())


def words(picture: Path | None = None, before: Path | None = None) -> None:
    """Print how much attention objects' words draw, how well it lies on the objects, and what words alone draw.

    Args:
        picture: Where a picture of the maps is written.
        before: Folder of another UNet, whose maps are shown beside.
    """
    from erasure.assets.build.words import measure
    from erasure.assets.build.words import picture as draw

    for name, value in measure().items():
        print(f"{name:28} {value:.4f}")
    if picture is not None:
        draw(before).save(picture)


def localiser(scenes: int = 100, every: int = 1, picture: Path | None = None) -> None:
    """Print how well things are found by words, and how often words are refused.

    Args:
        scenes: How many, of one and of two objects.
        every: Of the 96 scenes in which words are looked for one by one, every how many are; 0 leaves them out.
        picture: Where a picture of removal by mask and by name is written.
    """
    from erasure.assets.build.localiser import measure, refusals, refused, table
    from erasure.assets.build.localiser import picture as draw

    if picture is not None:
        draw().save(picture)
    if scenes:
        print(table(measure(scenes)))
    if every:
        print(refused(refusals(every)))


def layouts(prompts: int = 24) -> None:
    """Print how often things stand where a layout asks for them, in images of A-STAR.

    Args:
        prompts: How many, each drawn with both layouts.
    """
    from erasure.assets.build.layouts import described, measure

    print(described(*measure(prompts)))


def detectors(work: Path = WORK) -> None:
    """Fetch the weights of detectors with npm, and write them as safetensors; the control picture too."""
    from erasure.assets.build.detectors import build

    build(work / "detectors")


def everything(
    out: Path = Path("results/everything"), processes: int = 2, only: tuple[str, ...] = (), into: Path | None = None
) -> None:
    """Make all figures anew that README and docs give of the embedded model (resumes), and print the hours.

    Args:
        out: Folder of all results.
        processes: Steps at once.
        only: Names of the steps to run.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build.everything import run

    for name, hours in run(out, processes, only, into).items():
        print(f"{name:28} {hours:.2f} h")


STEPS = {
    step.__name__: step
    for step in (
        sprites, vae, clip, judge, denoiser, export, sae, evaluate, words, methods, across, several, requests,
        attacks, audited, suite, ways, gates, controls, localiser, layouts, everything, t5, flux, distil, towers, sdxl,
        sd3, families, ip_adapter, turbo, newcomers, learning, detectors,
    )
}  # fmt: skip
"""Every step by its name."""


def main() -> None:
    """Run one step of the build."""
    tyro.extras.subcommand_cli_from_dict(STEPS, description=__doc__)


if __name__ == "__main__":
    main()
