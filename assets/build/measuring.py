"""Steps of the build that measure, print tables of docs, and write their figures with `--into docs/measured`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import tyro


def methods(
    out: Path = Path("results/methods"),
    size: Literal["smoke", "quick", "full"] | None = None,
    share: tuple[int, int] = (1, 1),
    only_table: bool = False,
    into: Path | None = None,
) -> None:
    """Run the sweep `methods.toml`, every method on canvas-sd (resumes), then print its tables.

    Figures of concepts go into one file, so that several machines or days may measure some concepts each; the means
    are of all in that file.

    Args:
        out: Results, a folder for each erasure, as `erasure sweep` leaves them, too.
        size: Of the suites; the file's when left out.
        share: `i n` does the i-th of n shares, from 1 on, so that n processes share the work.
        only_table: Make and measure nothing, and take what there is.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build import each
    from erasure.assets.build.measured import Measured
    from erasure.assets.build.sweep import measure, plan
    from erasure.assets.build.tables import EACH_CONCEPT, EVERY_METHOD, report

    chosen = plan("methods", size)
    if not only_table:
        measure(chosen, out, share)
    if share[1] == 1:
        write = partial(report, into=into, size=chosen.measures[0].size, models=chosen.models, seeds=chosen.seeds)
        found = each.rows(chosen, out)
        write(EACH_CONCEPT, found, ("method", "concept"))
        all_found = found if into is None else Measured.read(into / f"{EACH_CONCEPT}.json").rows
        write(EVERY_METHOD, each.means(all_found, chosen.groups), ("method", "group"))


def across(
    out: Path = Path("results/across"),
    size: Literal["smoke", "quick", "full"] | None = None,
    share: tuple[int, int] = (1, 1),
    picture: Path | None = None,
    only_picture: bool = False,
    only_table: bool = False,
    folders: Path | None = None,
    methods: tuple[str, ...] = (),
    models: tuple[str, ...] = (),
    into: Path | None = None,
) -> None:
    """Run the sweep `across.toml`, six concepts on the larger families (resumes), then print its table.

    Args:
        out: Results, a folder for each erasure.
        size: Of the suite; the file's when left out.
        share: `i n` does the i-th of n shares, from 1 on, so that n processes share the work.
        picture: Where a picture of what every model draws is written, that of canvas-sd too.
        only_picture: Draw that, and measure nothing.
        only_table: Make and measure nothing, and take what there is.
        folders: Measure nothing, and take evaluations that no sweep made: folders MODEL/CONCEPT-METHOD in this one.
        methods: Which of those have rows; all when empty.
        models: On which; all when empty.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build.across import picture as draw
    from erasure.assets.build.sweep import RATES, chosen_cells, measure, plan, rows, rows_of_folders
    from erasure.assets.build.tables import FAMILIES, report

    if folders is None and (methods or models):
        raise SystemExit("--methods and --models choose among the evaluations of --folders: give that, too")
    chosen = plan("across", size)
    if picture is not None:
        draw(("canvas-sd", *chosen.models)).save(picture)
    if only_picture:
        return
    if folders is None and not only_table:
        measure(chosen, out, share)
    if share[1] == 1:
        made = rows(chosen, out) if folders is None else rows_of_folders(folders, chosen.concepts, methods, models)
        found = chosen_cells(made, ("method", "model", "size", *RATES, "seconds", "kB"))
        on = list(dict.fromkeys(str(row["model"]) for row in found))
        report(FAMILIES, found, ("method", "model"), into, models=on, seeds=chosen.seeds)


def several(
    out: Path = Path("results/several"),
    count: int = 5,
    draws: int = 20,
    strategy: str = "itd",
    size: Literal["smoke", "quick", "full"] = "quick",
    share: tuple[int, int] = (0, 1),
    into: Path | None = None,
) -> None:
    """Erase random sets of concepts, each in one erasure, and measure (resumes), then print a table.

    Args:
        out: Results, a folder for each set.
        count: Concepts in a set.
        draws: How many sets.
        strategy: What erases.
        size: Of the suite.
        share: `i n` does every n-th set from the i-th on, so that n processes share the work.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build import several as step
    from erasure.assets.build.tables import report

    sets = step.draws(count, draws)
    step.measure(out, strategy, sets, size, share)
    if share[1] == 1:
        report("several", step.rows(out, strategy, sets), ("concepts",), into, size=size)


def requests(
    out: Path = Path("results/requests"),
    strategy: str = "uce",
    count: int = 20,
    measured: tuple[int, ...] = (1, 5, 10, 15, 20),
    size: Literal["smoke", "quick", "full"] = "smoke",
    retain: bool = False,
    into: Path | None = None,
) -> None:
    """Erase one concept after another, each added to the erasure of those before (resumes), then print a table.

    Args:
        out: Results, a folder for each strategy, and in it one for each request.
        strategy: What erases.
        count: Requests.
        measured: Numbers of the requests after which it is measured.
        size: Of the suite.
        retain: Name all of the same kind that was not asked for so far on the retain lists.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build import requests as step
    from erasure.assets.build.tables import report

    step.measure(out, strategy, step.order(count), measured, size, retain)
    rows = step.rows(out, strategy, step.order(count), measured, retain)
    report("requests", rows, ("strategy", "retained", "requests"), into, size=size)


def attacks(
    out: Path = Path("results/attacks"),
    made: Path = Path("results/methods"),
    strategies: tuple[str, ...] = ("nothing", "hirm", "uce", "itd", "esd", "advunlearn", "co_erasing"),
    size: Literal["smoke", "quick", "full"] = "quick",
    prompts: int = 20,
    share: tuple[int, int] = (0, 1),
    into: Path | None = None,
) -> None:
    """Attack the erasures of step `methods`, with gradients and by chance (resumes), then print its tables.

    Args:
        out: Results, a folder for each attack.
        made: Results of step `methods`.
        strategies: Whose erasures; `nothing` for the stock model.
        size: Of the attacks.
        prompts: About each concept.
        share: `i n` does every n-th concept from the i-th on, so that n processes share the work.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build import attacks as step
    from erasure.assets.build.tables import report

    step.measure(out, made, strategies, size, prompts, share)
    if share[1] == 1:
        report("attacks", step.rows(out, strategies), ("method",), into, size=size)
        report("attack-pairs", step.pairs(out, strategies), ("method", "other"), into, size=size)


def audited(folders: tuple[Path, ...], concept: str = "dog", into: Path | None = None) -> None:
    """Print the tables of audits (`erasure audit --model MODEL --erasure ERASURE --out FOLDER`).

    Args:
        folders: Of audits of one erasure each.
        concept: What was erased.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build import audited as step
    from erasure.assets.build.tables import report

    audits = step.read(folders, concept)
    size, models = audits[0].size, list(dict.fromkeys(str(audit.about["model"]) for audit in audits))
    rows = [row for audit in audits for row in audit.rows()]
    report("audit", rows, ("model", "part", "method"), into, size=size, models=models)
    report("audit-words", [audit.words() for audit in audits], ("model", "method"), into, size=size, models=models)
    curves = [row for audit in audits for row in audit.relearning()]
    if curves:
        report("relearning", curves, ("model", "method"), into, size=size, models=models)


def learning(
    out: Path = Path("results/learning"),
    pairs: int = 4,
    images: int = 10,
    erasing: str = "uce",
    into: Path | None = None,
) -> None:
    """Learn pairs of new things from one picture each, draw and erase them (resumes), then print a table.

    Args:
        out: Folder of concepts and figures; what is there is not made again.
        pairs: Pictures, each of two things.
        images: Images of each thing.
        erasing: Strategy that each is erased with.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build import learning as step
    from erasure.assets.build.tables import report

    report("learning", step.rows(step.measured(out, pairs, images, erasing), images), ("thing",), into)


def suite(
    name: tyro.conf.Positional[Literal["removal", "composition"]],
    out: Path | None = None,
    size: Literal["smoke", "quick", "full"] = "full",
    into: Path | None = None,
) -> None:
    """Measure canvas-sd with a suite of ways to draw (resumes), then print its table.

    Args:
        name: Of the suite.
        out: Results, as `erasure eval` leaves them; results/NAME when left out.
        size: Of the suite.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build.suites import measure, rows
    from erasure.assets.build.tables import report

    folder = out or Path("results") / name
    measure(name, folder, size)
    report(name, rows(folder), ("variant",), into, size=size)


def ways(
    made: Path = Path("results/methods"),
    strategies: tuple[str, ...] = ("hirm", "uce", "itd", "diff_quickfix", "esd", "advunlearn"),
    into: Path | None = None,
) -> None:
    """Print what else than a prompt brings an erased dog back.

    Args:
        made: Results of step `methods`, for erasures that are there already.
        strategies: What erases.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build.tables import report
    from erasure.assets.build.ways import measure, rows

    report("ways", rows(measure(made, strategies)), ("way", "method"), into)


def gates(told: bool = True, into: Path | None = None) -> None:
    """Print how surely itd's gates tell every concept, on phrasings that nothing has seen.

    Args:
        told: Whether the strategy is given the concepts' synonyms, as it is for the table of docs.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build.gates import measure, rows
    from erasure.assets.build.tables import report

    if into is not None and not told:
        raise SystemExit("no page has a table of gates that were not told synonyms: leave --into or --no-told out")
    report("gates", rows(measure(told)), ("prompts",), into)


def controls(size: Literal["smoke", "quick", "full"] = "smoke", into: Path | None = None) -> None:
    """Print what random features, and those of another concept, erase behind a concept's gate.

    Args:
        size: Of the suite.
        into: Folder of figures, docs/measured of a checkout, whose files get the rows.
    """
    from erasure.assets.build.controls import measure, rows
    from erasure.assets.build.tables import report

    report("controls", rows(measure(size)), ("features",), into, size=size)
