"""`erasure demo`: erase an object and a style from the embedded model, and show before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from erasure.cli.arguments import UsageError, parse
from erasure.cli.generate import call_settings
from erasure.cli.models import ErasedModelOptions, ModelOptions, attach, open_model
from erasure.cli.output import check_output_folder
from erasure.cli.page import Table, write_page
from erasure.cli.processes import is_main_process
from erasure.cli.progress import Progress
from erasure.cli.recording import record
from erasure.cli.records import Maker
from erasure.cli.terminal import Terminal, format_metric
from erasure.concept import Concept
from erasure.world import World

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from erasure.artifact import Erasure
    from erasure.eval.results import Results
    from erasure.interop.protocols import Settings

MODEL = "canvas-sd"


class Part(NamedTuple):
    """One erasure of the demo."""

    word: str
    strategy: str

    @property
    def concept(self) -> Concept:
        """Say what the word means to the embedded model."""
        return World.at(MODEL).concept(self.word)


PARTS = (Part("cat", "hirm"), Part("ink", "uce"))

PROMPTS = (
    "a photo of a cat on a blue background",
    "a cat in pixel style",
    "a car in ink style on a pink background",
    "an apple in ink style",
    "a dog in noto style on a green background",
    "a castle in pixel style",
)
"""Columns of the picture: two with the object, two with the style, two that must stay as they are."""

METRICS = ("UA", "IRA", "CRA", "AA", "clip_score", "drift")
"""Rows of the table, where they were measured."""
MEANING = {
    "UA": "erased: share of images of the concept that no longer show it",
    "IRA": "kept: others of its kind are still drawn right",
    "CRA": "kept: the other kind is still drawn right",
    "AA": "mean of the three",
    "clip_score": "how well images fit prompts without the concept",
    "drift": "how far images without the concept moved",
}


@dataclass(kw_only=True)
class DemoOptions:
    """Erase a cat and the ink style from the embedded model, measure before and after, and draw both."""

    out: Path = Path("demo")
    """Folder of the results: report.html, demo.png, and the two erasures. Run the same command again to resume an
    interrupted run."""
    size: Literal["smoke", "quick", "full"] = "quick"
    """How much is measured: `smoke` takes seconds, `quick` minutes, `full` longer."""
    seed: int = 0
    """Seed of everything random."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(DemoOptions, "demo", argv)
    out = check_output_folder(options.out, may_hold=True)
    with terminal.progress(len(PARTS) * 2 + 1) as progress:
        progress.stage("loading the model")
        pipe = open_model(ModelOptions(model=MODEL))
        maker = Maker("demo", MODEL, pipe)
        erasures, measured = {}, {}
        for part in PARTS:
            name = f"{part.concept.target}-{part.strategy}"
            erasures[name] = make(pipe, part, out / name, options.seed, progress)
            measured[name] = measure(pipe, name, erasures[name], options, progress)
            if is_main_process():
                source = ErasedModelOptions(model=MODEL, erasure=(str(out / name),))
                record(source, {name: erasures[name]}, measured[name])
        if not is_main_process():
            return
        picture = draw(pipe, erasures, out / "demo.png", options.seed, progress, maker)
        progress.stage("done")
    columns, rows = table(measured)
    links = {f"{name}: every image, before and after": f"{name}-eval/report.html" for name in measured}
    about = f"Measured on the embedded model {MODEL}, with 95 % intervals. The same noise before and after."
    write_page(
        out / "report.html", "Before and after", [Table(about, columns, rows)], picture=picture, links=links
    )  # fmt: skip
    terminal.table(columns, rows, title=about)
    terminal.say(f"Picture:  {picture}", f"Report:   {out / 'report.html'}")
    terminal.say(*(f"Erasure:  {out / name}" for name in erasures))
    first = out / next(iter(erasures))
    terminal.say(
        f"Next:     erasure generate --model {MODEL} --erasure {first} --prompt 'a cat and a dog' --out images"
    )


def make(pipe: DiffusionPipeline, part: Part, folder: Path, seed: int, progress: Progress) -> Erasure:
    """Make and save one erasure."""
    import erasure

    progress.stage(f"erasing {part.concept.target} with {part.strategy}")
    with progress.part() as report:
        made = erasure.erase(pipe, [part.concept], strategy=part.strategy, seed=seed, attach=False, progress=report)
    if is_main_process():
        made.save(folder, overwrite=True)
    return made


def measure(pipe: DiffusionPipeline, name: str, made: Erasure, options: DemoOptions, progress: Progress) -> Results:
    """Attach one erasure, measure before and after, and take it off again."""
    from erasure.eval import evaluate

    progress.stage(f"measuring {name}")
    manager = attach(pipe, {name: made})
    with progress.part() as report:
        results = evaluate(
            pipe,
            "canvas",
            made.concepts,
            size=options.size,
            seed=options.seed,
            out=options.out / f"{name}-eval",
            progress=lambda variant, done, total: report((done / total + (variant == "after")) / 2),
        )
    manager.unload()
    return results


def draw(
    pipe: DiffusionPipeline, erasures: Mapping[str, Erasure], path: Path, seed: int, progress: Progress, maker: Maker
) -> Path:
    """The picture: the same prompts and noise with nothing, each erasure alone, and all together."""
    import torch

    from erasure.cli.picture import grid
    from erasure.files import write_bytes
    from erasure.images import png

    settings = call_settings(MODEL)
    variants: dict[str, list[str]] = {"original": []}
    for part, name in zip(PARTS, erasures, strict=True):
        style = " style" if part.concept.kind == "style" else ""
        variants[f"without “{part.concept.target}”{style} ({part.strategy})"] = [name]
    variants["without both"] = list(erasures)
    rows = {}
    for label, names in variants.items():
        progress.stage(f"drawing {label}")
        manager = attach(pipe, {name: erasures[name] for name in names})
        generators = [torch.Generator("cpu").manual_seed(seed + index) for index in range(len(PROMPTS))]
        rows[label] = pipe(list(PROMPTS), generator=generators, **settings).images
        manager.unload()
        progress.advance(1 / len(variants))
    record = maker.erased(erasures, {}).record(seed, settings, " | ".join(PROMPTS))
    return write_bytes(path, png(grid(PROMPTS, rows), record), error=UsageError)


def table(measured: Settings) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: each metric of each erasure, before and after."""
    rows = []
    for name, results in measured.items():
        cells: dict[str, dict[str, str]] = {}
        for row in results.metrics:
            cells.setdefault(row["name"], {}).setdefault(row.get("variant", "after"), format_metric(row))
        for metric in METRICS:
            if metric in cells:
                found = cells[metric]
                rows.append([name, metric, found.get("before", "-"), found.get("after", "-"), MEANING[metric]])
    return ["erasure", "metric", "before", "after", "what it says"], rows
