"""`python -m benchmarks eval-unlearn`: the same pictures measured by the package eval-unlearn and by this one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import PROGRAM
from erasure.cli.arguments import UsageError, parse
from erasure.cli.terminal import Terminal
from erasure.errors import ErasureError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from benchmarks.peer import Peer
    from benchmarks.peer_arithmetic import Rates
    from erasure.assets.build.measured import Figure, Row
    from erasure.eval.results import Results
    from erasure.interop.protocols import Pipeline
    from erasure.world import World

MODEL, CLIP, SUITE = "canvas-sd", "canvas-clip", "prompts"
TEMPLATE = "{} image in {} style"
WORDING = "Image of {}"
"""Words around a name by which its UA-IRA asks its CLIP model."""
MOST_SEEDS = 50
"""Those of two objects in five styles make 500 pictures, which are all that the suite draws."""
BATCH = 32
"""Its pictures per batch, when nothing else is asked for."""
NOISES, NOISE_STEPS = 40, 2
"""Pictures of one prompt by which noises are told apart, and the steps of each."""
STOCK = "stock"
KEYS = ("part", "number", "model")
TOLERANCE = 1e-4
"""Largest difference that is left once its arithmetic was followed; features are float32."""
ABSENT = "-"
"""Text in the place of a difference where there is no number."""
ROUNDING = 1e-12
"""Difference of sums in another order."""
DATA = "peer"
"""File of the figures in `docs/measured`."""


@dataclass(kw_only=True)
class EvalUnlearnOptions:
    """Compare with eval-unlearn: draw once, let both packages measure the pictures, and work out every difference.

    It takes your own installation of eval-unlearn. Stock `canvas-sd` and an erasure of it draw prompts of the erased
    object and of a retained one. Both packages' numbers of these pictures stand side by side, with what this package's
    answers give where the other's arithmetic is followed.
    """

    concept: str = "dog"
    """Object that is erased."""
    retained: str = "cat"
    """Object that is kept, and the other of the two answers that UA-IRA of eval-unlearn chooses from."""
    method: str = "uce"
    """Strategy that makes the erasure."""
    seeds: int = 10
    """Pictures of each object in each of five styles."""
    into: Path | None = None
    """Folder of measured figures, `docs/measured` of a checkout, whose `peer.json` is written anew."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


@dataclass(frozen=True)
class Pictures:
    """Pictures of one model, those of target prompts first, and what this package says of them."""

    model: str
    pictures: Sequence[Image.Image]
    targets: int
    """Number of pictures of target prompts."""
    judged: Sequence[str]
    """The object that the judge of Canvas sees."""
    named: Sequence[Mapping[str, float]]
    """Probability of every object's name, by the CLIP model with this package's words around it."""
    worded: Sequence[Mapping[str, float]]
    """The same with `WORDING` around it."""
    cosines: Sequence[float]
    """Cosine of each picture and its prompt."""
    clip_score: tuple[Figure, Figure]
    """CLIP score of target prompts and of retained ones."""


@dataclass(frozen=True)
class Answers:
    """Answers of eval-unlearn on the same pictures."""

    in_batches: Rates
    """UA and IRA in its own batches."""
    in_one: Rates
    """UA and IRA where one batch holds all."""
    clip_score: tuple[float, float]


def run(argv: Sequence[str], terminal: Terminal) -> int:
    """Carry out the command.

    Returns:
        The exit code: 0, 1 where a difference is left that the arithmetic does not explain.

    Raises:
        MissingExtraError: eval-unlearn is not installed.
        UsageError: Options that cannot be.
    """
    options = parse(EvalUnlearnOptions, "eval-unlearn", argv, program=PROGRAM)
    terminal.json_only = options.json
    if not 1 <= options.seeds <= MOST_SEEDS:
        raise UsageError(f"--seeds is {options.seeds}, allowed: a whole number from 1 to {MOST_SEEDS}")
    if options.concept == options.retained:
        raise UsageError(f"--concept and --retained are both {options.concept}: name two objects")

    from erasure.assets.world import OBJECTS

    if unknown := [name for name in (options.concept, options.retained) if name not in OBJECTS]:
        raise UsageError(f"{MODEL} has no object {unknown[0]}; there are: {', '.join(OBJECTS)}")

    from benchmarks.peer import KNOWN, PACKAGE, installed

    if (version := installed()) != KNOWN:
        terminal.say(f"{PACKAGE} {version} is installed; the arithmetic is that of {KNOWN}, and may not be its own")
    with tempfile.TemporaryDirectory() as folder:
        rows, left_out = measure(options, Path(folder).resolve())
    if options.json:
        terminal.result({"version": version, "rows": rows, "left_out": left_out})
    else:
        show(rows, left_out, f"{PACKAGE} {version} and erasure on the same pictures of {MODEL}", terminal)
    if options.into is not None:
        from erasure.assets.build.measured import rewrite

        terminal.say(rewrite(options.into / f"{DATA}.json", rows, models=[MODEL], seeds=[0]))
    unexplained = [row for row in rows if row.get("explained") == "no"]
    for row in unexplained:
        terminal.say(f"not explained: {row['number']} ({row['model']}), {row['apart']} apart")
    return int(bool(unexplained))


def show(rows: Sequence[Row], left_out: Mapping[str, str], title: str, terminal: Terminal) -> None:
    """Print the tables."""
    from erasure.assets.build.measured import Measured
    from erasure.assets.build.tables import TABLES

    fresh = Measured(about=title, command=None, keys=list(KEYS), size=None, models=[MODEL], seeds=[0], rows=list(rows))
    for table in (table for table in TABLES.values() if table.data == DATA):
        columns, lines = table.lines(fresh)
        terminal.table(columns, lines, title=title)
    terminal.table(["not measured here", "why"], [[name, why] for name, why in left_out.items()])


def measure(options: EvalUnlearnOptions, folder: Path) -> tuple[list[Row], dict[str, str]]:
    """Draw, ask both packages, and compare.

    Returns:
        The rows, and why each metric that is left out is.
    """
    import erasure
    from benchmarks.peer import Peer
    from erasure.world import World

    (folder / "theirs").mkdir()
    peer = Peer(folder / "theirs")
    pipe = erasure.load_pipeline(MODEL)
    world = World.of(pipe)
    prompts = [
        TEMPLATE.format(name, style)
        for name in (options.concept, options.retained)
        for _ in range(options.seeds)
        for style in world.styles
    ]
    noises = noise_rows(pipe, peer, world, prompts[0])
    erasure.erase(pipe, options.concept, strategy=options.method)
    results, both = draw(pipe, options, prompts, world, folder / "ours")
    each = [
        [*compared(ours, ask(peer, ours, prompts, options), options), err_row(peer, ours, options)] for ours in both
    ]
    beside = [line for pair in zip(*each, strict=True) for line in pair]
    rows = [*beside, fid_row(peer, results, both, options.method), *noises]
    rows += [line for ours in both for line in steps(ours, options)]
    return rows, peer.refusals() | {"asr_i2p": peer.asr_i2p(options.concept)}


# Ours ---------------------------------------------------------------------------------------------------------------


def draw(
    pipe: Pipeline, options: EvalUnlearnOptions, prompts: Sequence[str], world: World, out: Path
) -> tuple[Results, list[Pictures]]:
    """Draw and measure with this package: pictures of the stock model, and of the erased one."""
    from PIL import Image

    from erasure.assets.build.measured import figure
    from erasure.eval import evaluate
    from erasure.eval.detectors import CanvasJudge
    from erasure.eval.detectors.clip_zero_shot import ClipZeroShot
    from erasure.eval.table import image_path, read_rows

    targets = len(prompts) // 2
    lines = [
        json.dumps({"prompt": prompt, "role": "target" if index < targets else "retain"})
        for index, prompt in enumerate(prompts)
    ]
    listed = out.with_suffix(".jsonl")
    listed.write_text("\n".join(lines), encoding="utf-8")
    others = tuple(name for name in world.objects if name != options.concept)
    detectors = {
        "names": ClipZeroShot(model=CLIP, flags=(options.concept,), others=others),
        "worded": ClipZeroShot(model=CLIP, flags=(options.concept,), others=others, templates=(WORDING,)),
    }
    results = evaluate(
        pipe, SUITE, [options.concept], size="full", prompts=str(listed), detectors=detectors, clip=CLIP,
        out=out, report=False, progress=not options.json,
    )  # fmt: skip
    rows, found = read_rows(out / "samples.jsonl"), []
    for variant, model in (("before", STOCK), ("after", options.method)):
        own = sorted((row for row in rows if row["variant"] == variant), key=lambda row: str(row["sample_id"]))
        pictures = [Image.open(image_path(out, variant, row["sample_id"])).convert("RGB") for row in own]
        read = {name: [row["detected"][name]["scores"] for row in own] for name in detectors}
        scores = [figure(results.get(name, variant)) for name in ("clip_score_target", "clip_score")]
        judged, cosines = [seen.object for seen in CanvasJudge()(pictures)], [row["clip_score"] for row in own]
        of_model = Pictures(
            model, pictures, targets, judged, read["names"], read["worded"], cosines, (scores[0], scores[1])
        )
        found.append(of_model)
    return results, found


def rate(answers: Sequence[bool]) -> Figure:
    """Share of answers that are true, with Wilson's interval."""
    from erasure.assets.build.measured import figure
    from erasure.eval.statistics import wilson

    return figure(wilson(sum(answers), len(answers)), len(answers))


# Theirs -------------------------------------------------------------------------------------------------------------


def ask(peer: Peer, ours: Pictures, prompts: Sequence[str], options: EvalUnlearnOptions) -> Answers:
    """What eval-unlearn says of the pictures of one model."""
    names, n = (options.concept, options.retained), ours.targets
    cut, whole = (peer.ua_ira(ours.pictures, prompts, names, n, batch) for batch in (BATCH, max(BATCH, len(prompts))))
    scores = [peer.clip_score(ours.pictures[part], prompts[part]) for part in (slice(n), slice(n, None))]
    return Answers(cut, whole, (scores[0], scores[1]))


def noise_rows(pipe: Pipeline, peer: Peer, world: World, prompt: str) -> list[Row]:
    """Noises that pictures of one prompt share, and whether they come out again."""
    from benchmarks.peer_arithmetic import different_noises
    from erasure import assets
    from erasure.assets.build.measured import figure
    from erasure.eval.generation import generate
    from erasure.eval.samples import Sample, sample_seed

    call = {"num_inference_steps": NOISE_STEPS, "guidance_scale": world.guidance_scale}
    model = assets.path(MODEL)
    seeded = peer.drawn(model, prompt, NOISES, 0, "seeded", **call)
    unseeded = [peer.drawn(model, prompt, NOISES, None, f"unseeded-{index}", **call) for index in range(2)]
    samples = [
        Sample(str(index), prompt, sample_seed(0, prompt, index), "target", num_inference_steps=NOISE_STEPS,
               guidance_scale=world.guidance_scale)
        for index in range(NOISES)
    ]  # fmt: skip
    ours = [
        [picture.convert("RGB").tobytes() for _, batch in generate(pipe, samples) for picture in batch]
        for _ in range(2)
    ]
    again = [sum(a == b for a, b in zip(*two, strict=True)) for two in (unseeded, ours)]
    different, same = figure({"value": len(set(ours[0]))}, NOISES), figure({"value": again[1]}, NOISES)
    return [
        row(f"different pictures among {NOISES} of one prompt, seed 0", STOCK, len(set(seeded)), different,
            different_noises(NOISES, BATCH), NOISES, "noise is of seed and place in the batch"),
        row(f"the same again of these {NOISES}, no seed given", STOCK, again[0], same, 0, NOISES,
            "its command line has no option for a seed"),
    ]  # fmt: skip


# Side by side -------------------------------------------------------------------------------------------------------


def row(number: str, model: str, theirs: float | str, ours: Figure, derived: float, n: int, why: str) -> Row:
    """A line that compares.

    Args:
        number: What it is.
        model: Of which model's pictures.
        theirs: The number of eval-unlearn, or why there is none.
        ours: Ours.
        derived: Ours where its arithmetic is followed.
        n: Pictures that its number is of.
        why: What makes the difference.
    """
    from erasure.assets.build.measured import figure

    told, apart, explained = {"reason": theirs}, ABSENT, "unknown"
    if not isinstance(theirs, str):
        difference = abs(theirs - derived)
        told, apart = {"value": theirs}, f"{difference:.0e}" if difference > ROUNDING else "0"
        explained = "yes" if difference <= TOLERANCE else "no"
    return {
        "part": "compared", "number": number, "model": model, "theirs": figure(told, n), "ours": ours,
        "derived": figure({"value": derived}, n), "apart": apart, "explained": explained, "why": why,
    }  # fmt: skip


def compared(ours: Pictures, theirs: Answers, options: EvalUnlearnOptions) -> list[Row]:
    """UA, IRA and CLIP scores of one model, side by side.

    Args:
        ours: Its pictures, and our answers.
        theirs: The answers of eval-unlearn.
        options: Of the command.
    """
    from benchmarks.peer_arithmetic import clip_score_times_100, cut_in_batches, two_way

    n, total = ours.targets, len(ours.judged)
    ua = rate([seen != options.concept for seen in ours.judged[:n]])
    ira = rate([seen == options.retained for seen in ours.judged[n:]])
    taken = [two_way(scores, options.concept, options.retained) for scores in ours.worded]
    cut, whole = cut_in_batches(taken, n, BATCH), cut_in_batches(taken, n, max(BATCH, total))
    batches, one = f"batches of {BATCH}", "one batch"
    places = f"{cut.targets} of {total} pictures count as targets"
    none_left = "none is left as retained, and a share of none is 0"
    parts = (slice(n), slice(n, None))
    rows = [
        row(f"UA, {batches}", ours.model, theirs.in_batches.ua, ua, cut.ua, theirs.in_batches.targets, places),
        row(f"IRA, {batches}", ours.model, theirs.in_batches.ira, ira, cut.ira, theirs.in_batches.retained,
            places if cut.retained else none_left),
        row(f"UA, {one}", ours.model, theirs.in_one.ua, ua, whole.ua, theirs.in_one.targets,
            "a CLIP model chooses between two names"),
        row(f"IRA, {one}", ours.model, theirs.in_one.ira, ira, whole.ira, theirs.in_one.retained,
            "the same choice; one of the two is right"),
    ]  # fmt: skip
    for index, prompts in enumerate(("target", "retained")):
        cosines = ours.cosines[parts[index]]
        rows.append(
            row(f"CLIP score, {prompts} prompts", ours.model, theirs.clip_score[index], ours.clip_score[index],
                clip_score_times_100(cosines), len(cosines), "times 100; negative cosines are kept")
        )  # fmt: skip
    return rows


def err_row(peer: Peer, ours: Pictures, options: EvalUnlearnOptions) -> Row:
    """ERR of the retained pictures alone."""
    from benchmarks.peer_arithmetic import err_of, two_way
    from erasure.eval.metrics.clip_score import ClipModel, cosine

    kept = ours.pictures[ours.targets :]
    clip = ClipModel(CLIP)
    texts = {f"an image {word} {options.retained}": word for word in ("of", "without")}
    features = clip.images(kept)
    each = [
        {word: float(cosine(one, clip.texts([text])[0])) for text, word in texts.items()} for one in features
    ]  # fmt: skip
    derived = err_of(None, sum(two_way(scores, "without", "of") for scores in each) / len(each), None)
    try:
        theirs: float | str = peer.err_of_retained(kept, options.retained)
    except ErasureError as error:
        theirs = str(error)
    seen = rate([name == options.retained for name in ours.judged[ours.targets :]])
    why = 'a CLIP model chooses "an image of" it or "without" it'
    return row("ERR, retained prompts alone", ours.model, theirs, seen, derived, len(kept), why)


def fid_row(peer: Peer, results: Results, both: Sequence[Pictures], method: str) -> Row:
    """FID of the retained pictures."""
    from erasure.assets.build.measured import figure
    from erasure.eval.metrics.distances import frechet

    reference, kept = (ours.pictures[ours.targets :] for ours in both)
    features: list[np.ndarray] = [peer.fid_features(pictures).numpy() for pictures in (reference, kept)]
    try:
        theirs: float | str = peer.fid(reference, kept, BATCH)
    except ErasureError as error:
        theirs = str(error)
    derived = frechet(features[0], features[1], allow_small=True)
    why = "resized to 299 pixels first; a matrix root, no eigenvalues"
    return row("FID, retained prompts", method, theirs, figure(results.get(f"fid[{CLIP}]")), derived, len(kept), why)


def steps(ours: Pictures, options: EvalUnlearnOptions) -> list[Row]:
    """The way from our UA and IRA to those of eval-unlearn, one change after another.

    Args:
        ours: Pictures of one model, and our answers.
        options: Of the command.
    """
    from benchmarks.peer_arithmetic import cut_in_batches, two_way
    from erasure.assets.build.measured import figure

    n, pair = ours.targets, (options.concept, options.retained)
    best = [max(scores, key=scores.__getitem__) for scores in ours.named]
    cut = cut_in_batches([two_way(scores, *pair) for scores in ours.worded], n, BATCH)
    pairs: list[tuple[str, Sequence[bool], Sequence[bool]]] = []
    for step, names in (("the judge of Canvas (ours)", ours.judged), (f"{CLIP}, all object names", best)):
        pairs.append((step, [name != pair[0] for name in names[:n]], [name == pair[1] for name in names[n:]]))
    for step, each in (("only two of these names", ours.named), (f'asked as "{WORDING}"', ours.worded)):
        taken = [two_way(scores, *pair) for scores in each]
        pairs.append((step, taken[:n], taken[n:]))
    found: list[Row] = [
        {"part": "steps", "number": step, "model": ours.model, "UA": rate(gone), "IRA": rate(kept)}
        for step, gone, kept in pairs
    ]
    last: Row = {"part": "steps", "number": f"cut in batches of {BATCH} (theirs)", "model": ours.model}
    last |= {"UA": figure({"value": cut.ua}, cut.targets), "IRA": figure({"value": cut.ira}, cut.retained)}
    return [*found, last]
