"""`erasure detect DETECTOR`: what a detector finds in pictures, and what its findings are worth."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erasure.cli.arguments import UsageError
from erasure.cli.described import list_of, options_of, parse_with, value_of
from erasure.cli.terminal import Terminal, format_metric
from erasure.eval.detectors import DETECTORS
from erasure.shown import number

if TYPE_CHECKING:
    from erasure.eval.detectors.controls import Measured
    from erasure.eval.detectors.findings import Finding

HELP = """usage: erasure detect DETECTOR --images DIR [--controls DIR] [--out FILE] [options]

Reports what a detector finds in pictures. A picture that it cannot judge is reported as missing, never as "safe".

detectors:
{detectors}

The options of each: erasure detect DETECTOR --help"""

MOST_SCORES = 3
"""Scores of a picture that the table shows."""


@dataclass(kw_only=True)
class DetectOptions:
    """Which pictures to look at, and where to write what is found."""

    images: Path
    """Folder of pictures, which is searched with all its subfolders; or one picture."""
    controls: Path | None = None
    """Folder with pictures in `positive/` that show what the detector looks for, and in `negative/` that do not:
    sensitivity and specificity are measured on them. Without it, nobody knows what the detector overlooks."""
    preset: str | None = None
    """Named set of the detector's options, for instance those of a paper; further options change single values of
    it."""
    out: Path | None = None
    """JSON file to write the detector's recipe, its findings and its rates to."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    if not argv or argv[0] in ("-h", "--help"):
        terminal.whole(f"{HELP.format(detectors=list_of(DETECTORS))}\n")
        return
    name, *rest = argv
    if name.startswith("-"):
        raise UsageError(f"name the detector first: erasure detect {{{','.join(DETECTORS.names())}}} --images DIR")
    attributes, own = DETECTORS.facts(name).attributes, options_of(DETECTORS, name)
    start = own.configured(value_of(rest, "--preset"))
    presets = f" Presets: {', '.join(own.presets)}." if own.presets else ""
    needs = f" It needs the extra {attributes['extra']!r} of this package." if attributes["extra"] else ""
    about = f"{attributes['title']}. Licence of the weights: {attributes['licence']}.{needs}{presets}"
    parsed = parse_with(DetectOptions, start, f"detect {name}", rest, about)
    options: DetectOptions = parsed.command
    terminal.json_only = options.json
    if options.out is not None and (options.out.is_dir() or not options.out.absolute().parent.is_dir()):
        raise UsageError(f"--out {options.out} is a folder, or lies in none: name a file in a folder that is there")
    detect(name, {option: getattr(parsed.options, option) for option in own.option_names()}, options, terminal)


def detect(name: str, chosen: Mapping[str, Any], options: DetectOptions, terminal: Terminal) -> None:
    """Ask the detector about every picture, and tell."""
    from erasure.eval.detectors.controls import ask_files, measure, pictures_in, self_test, share
    from erasure.eval.detectors.findings import as_row
    from erasure.files import write_json

    files = [options.images] if os.path.isfile(options.images) else pictures_in(options.images)
    detector = DETECTORS.get(name)(**chosen)
    tested = self_test(detector)
    terminal.say(tested.remark)
    findings = ask_files(detector, files)
    base = options.images if len(files) > 1 or os.path.isdir(options.images) else options.images.parent
    found = {str(file.relative_to(base)): finding for file, finding in zip(files, findings, strict=True)}
    measured = None if options.controls is None else measure(detector, options.controls)
    flagged = [finding.flagged for finding in findings]
    rate = vars(share(flagged, True))
    # Here nobody knows what is right: what is missing may as well have been flagged.
    rate["worst"] = sum(each is not False for each in flagged) / len(flagged)
    report = {
        "recipe": detector.recipe(), "self_test": tested._asdict(), "flagged": rate,
        "controls": None if measured is None else measured.to_dict(),
        "findings": {file: as_row(finding) for file, finding in found.items()},
    }  # fmt: skip
    if options.out is not None and terminal.speaks:
        write_json(options.out, report)
        terminal.say(f"Wrote {options.out}")
    if options.json:
        terminal.result(report)
        return
    terminal.table(("picture", "flagged", "score", "labels", "scores"), [cells(*each) for each in found.items()])
    terminal.say(f"Flagged: {rated(rate)}", *(remarks(measured)))


def cells(file: str, finding: Finding) -> list[str]:
    """A finding as a row of the table."""
    if finding.flagged is None:
        return [file, "cannot say", "-", "", finding.reason or ""]
    highest = sorted(finding.scores.items(), key=lambda item: -item[1])[:MOST_SCORES]
    scores = ", ".join(f"{name} {number(value, '.3f')}" for name, value in highest)
    said = "flagged" if finding.flagged else "no"
    return [file, said, number(finding.score, ".3f"), ", ".join(sorted(finding.labels)), scores]


def remarks(measured: Measured | None) -> list[str]:
    """Results of the controls: what the findings are worth."""
    if measured is None:
        return ["Sensitivity was not measured: --controls DIR, with pictures in positive/ and negative/."]
    lines = [
        f"Sensitivity on your controls: {rated(vars(measured.sensitivity))}",
        f"Specificity on your controls: {rated(vars(measured.specificity))}",
    ]
    return [*lines, *(f"Wrong about {file}: {why}" for file, why in list(measured.wrong.items())[:20])]


def rated(rate: Mapping[str, Any]) -> str:
    """A rate with its interval, its size, and what is missing."""
    text = f"{format_metric(rate)} of {rate['n']} pictures"
    if rate["missing"]:
        text += f"; {rate['missing']} more cannot be judged, at worst {number(rate['worst'], '.3f')}"
    return f"{text} ({rate['reason']})" if rate["reason"] else text
