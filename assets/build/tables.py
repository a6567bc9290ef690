"""Layout of the tables of README and docs, and format of the figures in them; `measured.py` has the figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from erasure.assets.build.measured import Cell, Measured, Row, rewrite
from erasure.errors import EvaluationError
from erasure.shown import visible

ABSENT = "-"
"""Text of a cell for which nothing was measured."""


NOTHING = "nothing"
"""Text in the place of a method where nothing was erased."""


class Shown:
    """A cell that `format` writes: `{UA:3}` has three decimals, `{UA:3/2}` an interval of two decimals besides."""

    def __init__(self, cell: Cell | None) -> None:
        self.cell = cell

    def __format__(self, layout: str) -> str:
        """Write it; whole numbers and texts as they are, and the reason in the place of a value that is missing.

        `{method:code}` is a name as code, but for `NOTHING`; `{p:short}` has two digits, of however small a number.
        """
        cell = self.cell
        if cell is None:
            return ABSENT
        if layout == "short" and isinstance(cell, int | float):
            return f"{cell:.2g}"
        if layout == "code":
            return str(cell) if cell == NOTHING else f"`{cell}`"
        if not isinstance(cell, dict):
            return _number(cell, layout.partition("/")[0])
        if cell["value"] is None:
            return cell["reason"]
        digits, _, bounds = layout.partition("/")
        value = _number(cell["value"], digits)
        if not bounds or "low" not in cell:
            return value
        return f"{value} ({_number(cell['low'], bounds)}-{_number(cell['high'], bounds)})"


def _number(value: str | int | float, digits: str) -> str:
    return f"{value:.{int(digits)}f}" if isinstance(value, float) and digits else str(value)


class _Line(dict[str, Any]):
    """Cells of a line by name; those that are absent are written as `ABSENT`."""

    def __missing__(self, name: str) -> Shown:
        return Shown(None)

    @classmethod
    def of(cls, row: Row, words: Mapping[str, str]) -> _Line:
        """Cells of a row, with texts as they are called in the table."""
        called = {name: words.get(cell, cell) if isinstance(cell, str) else cell for name, cell in row.items()}
        return cls({name: Shown(cell) for name, cell in called.items()})


@dataclass(frozen=True)
class Table:
    """A table: which rows of which file, and what stands in each column.

    Titles and templates are texts with names in braces, as `str.format` has them: `{UA:3/2}` is the cell UA of the
    row, see `Shown`. Where several rows make one line, `{dog[UA]:3}` is that of the row whose `across` is dog.
    """

    data: str
    """Name of the file in `docs/measured`, without its ending."""
    columns: Sequence[tuple[str, str]]
    """Title and template of each column."""
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Values that a cell of a row must have for the row to be shown; all rows when empty."""
    across: str = ""
    """Cell whose values stand beside one another in one line, each with columns of its own."""
    each: Sequence[tuple[str, str]] = ()
    """Titles and templates of these columns, where `{each}` is the row of a value; title `{value}` is the value."""
    last: Sequence[tuple[str, str]] = ()
    """Columns behind those."""
    words: Mapping[str, str] = field(default_factory=dict)
    """What texts of the file are called in the table, where that is something else."""
    grouped: bool = False
    """Whether what is in the first column is left out where it is as in the line above."""

    def lines(self, measured: Measured) -> tuple[list[str], list[list[str]]]:
        """Titles, and the cells of every line.

        Args:
            measured: The file.
        """
        rows = self.rows(measured)
        if not self.across:
            own = [_Line.of(row, self.words) for row in rows]
            return [title for title, _ in self.columns], [_written(self.columns, line) for line in own]
        merged: dict[tuple[str, ...], _Line] = {}
        for row in rows:
            key = tuple(str(row[name]) for name in measured.keys if name != self.across)
            line = merged.setdefault(key, _Line.of(row, self.words))
            line[str(row[self.across])] = _Line.of(row, self.words)
        values = list(self.where.get(self.across, ())) or list(dict.fromkeys(str(row[self.across]) for row in rows))
        titles = [title.format_map(next(iter(merged.values()), _Line())) for title, _ in self.columns]
        titles += [title.format(value=value) for value in values for title, _ in self.each]
        titles += [title for title, _ in self.last]
        lines = []
        for line in merged.values():
            cells = _written(self.columns, line)
            for value in values:
                cells += _written(self.each, _Line(each=line.get(value, _Line())))
            lines.append([*cells, *_written(self.last, line)])
        return titles, lines

    def rows(self, measured: Measured) -> list[Row]:
        """The rows of a file that are shown."""
        return [row for row in measured.rows if all(str(row.get(k)) in values for k, values in self.where.items())]

    def check(self, measured: Measured) -> None:
        """Refuse a table that shows nothing of a file, or a column that would be absent from every line.

        Raises:
            EvaluationError: No row is as `where` has it, or a template names what no row has.
        """
        if not measured.rows:
            return
        rows, file = self.rows(measured), f"measured/{self.data}.json"
        if not rows:
            raise EvaluationError(f"{file} has no row with {dict(self.where)}: name others, or none")
        known = {name for row in rows for name in row}
        values = {str(row[self.across]) for row in rows if self.across in row}
        for _, template in (*self.columns, *self.each, *self.last):
            for _, field_name, _, _ in Formatter().parse(template):
                if field_name is None:
                    continue
                *value, name = field_name.rstrip("]").split("[")
                if name not in known:
                    raise EvaluationError(
                        f"a table of {file} shows {visible(name)!r}, which no row has; there are: "
                        f"{', '.join(sorted(known))}"
                    )
                if value and value[0] not in {"each", *values}:
                    raise EvaluationError(
                        f"a table of {file} shows {visible(value[0])!r}, which is no {self.across}; there are: "
                        f"{', '.join(sorted(values))}"
                    )

    def markdown(self, measured: Measured) -> str:
        """The table, or what to run where nothing was measured yet."""
        if not measured.rows:
            return "Not measured yet." + (f" `{measured.command}` does it." if measured.command else "")
        titles, lines = self.lines(measured)
        if self.grouped:
            firsts = [line[0] for line in lines]
            lines = [
                ["" if number and first == firsts[number - 1] else first, *line[1:]]
                for number, (first, line) in enumerate(zip(firsts, lines, strict=True))
            ]
        return markdown(titles, lines)


def _written(columns: Sequence[tuple[str, str]], line: _Line) -> list[str]:
    return [template.format_map(line) for _, template in columns]


def markdown(titles: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(titles)
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, lines)])


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell.replace('|', chr(92) + '|')} " if cell else " " for cell in cells) + "|"


def report(
    data: str,
    found: Sequence[Row],
    keys: Sequence[str],
    into: Path | None,
    *,
    size: str | None = None,
    models: Sequence[str] = ("canvas-sd",),
    seeds: Sequence[int] = (0,),
) -> None:
    """Print the tables of what was just measured, and put its rows into the file of figures.

    Args:
        data: Name of the file, without its ending.
        found: The rows.
        keys: Cells that tell rows apart.
        into: Folder of the files, `docs/measured` of a checkout; nothing is written when `None`.
        size: At which it was measured; `None` where rows have a cell `size`, or where there is none.
        models: What was measured.
        seeds: Of what was measured.

    Raises:
        EvaluationError: See `erasure.assets.build.measured.rewrite`.
    """
    fresh = Measured(about=data, command=None, keys=list(keys), size=size, models=list(models), seeds=list(seeds),
                     rows=list(found))  # fmt: skip
    shown = [table for table in TABLES.values() if table.data == data and table.rows(fresh)]
    print(*(table.markdown(fresh) for table in shown), sep="\n\n", flush=True)
    if into is not None:
        print(rewrite(into / f"{data}.json", found, size=size, models=models, seeds=seeds))


RATES = (("UA", "{UA:3/2}"), ("IRA", "{IRA:3/2}"), ("CRA", "{CRA:3/2}"), ("AA", "{AA:3/2}"))
COST = (("seconds", "{seconds:1}"), ("kB", "{kB:0}"))
METHOD = ("method", "`{method}`")
CONCEPT = ("concept", "{concept}")
PLAIN_RATES = tuple((rate, f"{{{rate}:3}}") for rate in ("UA", "IRA", "CRA", "AA"))
EVERY_METHOD = "methods"
"""File of all methods on one model, and table of its objects."""
EACH_CONCEPT = "methods-concepts"
"""File of the figures of each concept, of which those of `EVERY_METHOD` are the means."""
LOOK_ALIKES = "look-alikes kept"
OWN_STYLE = "own style kept"
OF_EVERY_METHOD = (
    METHOD, RATES[0], ("UA, unseen phrasings", "{UA_canvas-unseen:3/2}"), RATES[1], (LOOK_ALIKES, "{IRA_group:3/2}"),
    *RATES[2:], (OWN_STYLE, "{own_style:3}"), ("drift", "{drift:3/3}"), *COST,
)  # fmt: skip
WEAPONS = "weapons, counted above too"
"""Group of the objects that are weapons."""
SHARED = "measured on every family"
"""Group of the concepts of the table of families."""
COMPARED = ("uce", "hirm", "itd", "esd", "advunlearn")
"""Methods of the README's table of rates."""
OF_ATTACKER = {
    "prompts": "prompts", "gradients": "the weights, to search with", "inputs": "other inputs",
    "weights": "the weights, to change",
}  # fmt: skip
"""Names of what an attacker has, by grade of an audit."""
ATTACKED = (
    ("erased with", "{method:code}"),
    ("prompts", "{prompts}"),
    ("as they are (`pre_ASR`)", "{pre_ASR:2/2}"),
    ("with the attack (`ASR`)", "{ASR:2/2}"),
    ("with random words instead (`chance_ASR`)", "{chance_ASR:2/2}"),
)
WAY_IN = (
    ("way in", "{part}"),
    ("alone: object, style", "{alone_object:2}, {alone_style:2}"),
    ("without it: object", "{without_object:2}"),
    ("exchanged: object, change", "{swapped_object:2}, {swapped_change:3}"),
)
FAMILIES = "families"
"""Table and file of methods on several models, from which pages of methods and README take their rows, too."""
OF_FAMILY = (("model", "`{model}`"), ("size", "{size}"), *RATES, *COST)
"""Columns of the table of families besides the method."""

TABLES: dict[str, Table] = {
    "words": Table(
        "words",
        (
            ("", "{model}"), ("steps", "{steps}"), ("the word's share of attention", "{word_share:3}"),
            ("AUC, 4x4", "{word_auc_4:2}"), ("8x8", "{word_auc_8:2}"), ("16x16", "{word_auc_16:2}"),
        ),
    ),
    EVERY_METHOD: Table(EVERY_METHOD, OF_EVERY_METHOD, where={"group": ("objects",)}),
    "methods-styles": Table(
        EVERY_METHOD, [column for column in OF_EVERY_METHOD if column[0] not in (LOOK_ALIKES, OWN_STYLE)],
        where={"group": ("styles",)},
    ),
    **{
        f"methods-{ending}": Table(EVERY_METHOD, (METHOD, *RATES, *COST), where={"group": (group,)})
        for ending, group in (("weapons", WEAPONS), ("shared", SHARED))
    },
    "methods-short": Table(
        EVERY_METHOD,
        (
            METHOD,
            ("objects ({objects[concepts]}): UA, AA", "{objects[UA]:3/2}, {objects[AA]:3/2}"),
            ("styles ({styles[concepts]}): UA, AA", "{styles[UA]:3/2}, {styles[AA]:3/2}"),
            ("seconds", "{objects[seconds]:1}"), ("kB", "{objects[kB]:0}"),
        ),
        where={"method": COMPARED, "group": ("objects", "styles")}, across="group",
    ),
    **{
        f"methods-{rate}": Table(
            EACH_CONCEPT, (METHOD,), across="concept", each=(("{value}", f"{{each[{rate}]:2}}"),)
        )
        for rate in ("UA", "AA")
    },
    "attacks": Table("attacks", ATTACKED),
    "attack-pairs": Table(
        "attack-pairs",
        (
            METHOD, ("beside", "`{other}`"), ("prompts", "{prompts}"), ("succeed on the first alone", "{only_method}"),
            ("on the second alone", "{only_other}"), ("p (McNemar)", "{p:short}"),
            ("adjusted (Holm)", "{p_adjusted:short}"),
        ),
        grouped=True,
    ),
    "attacks-flux": Table("attacks-flux", ATTACKED),
    **{
        f"audit{ending}": Table(
            "audit", (("an attacker has", "{grade}"), ("what is tried", "`{part}`")), where={"model": (model,)},
            words=OF_ATTACKER, grouped=True, across="method",
            each=(("`{value}`", "{each[shown]:2/2} / {each[chance]:2}"),),
        )
        for ending, model in (("", "canvas-sd"), ("-flux", "canvas-flux"))
    },
    "audit-words": Table(
        "audit-words",
        (
            ("model", "`{model}`"), METHOD,
            *((title, f"{{{grade}}}") for grade, title in OF_ATTACKER.items()),
        ),
        grouped=True,
    ),
    "relearning": Table(
        "relearning",
        (
            ("model", "`{model}`"), METHOD, ("the concept, erased model (`S50`)", "{S50:0/0}"),
            ("a new thing, stock model", "{S50_new:0/0}"), ("a new thing, erased model", "{S50_new_erased:0/0}"),
            ("`savings`", "{savings:2/2}"), ("", "{verdict}"),
        ),
        grouped=True,
    ),
    "requests": Table(
        "requests",
        (
            ("strategy", "`{strategy}`"), ("retain lists", "{retained}"), ("requests", "{requests}"),
            ("UA", "{UA:3/2}"),
            ("UA of the first", "{UA_first:3/2}"), ("IRA", "{IRA:3/2}"), ("drift", "{drift:3/2}"),
            ("this request, s", "{seconds:1}"), ("kB", "{kB:0}"),
        ),
    ),
    "training": Table(
        "training",
        (
            ("method", "`{strategy}`"), ("updates", "{updates}"), ("passes a state", "{per_state_kept:1}"),
            ("states made anew", "{per_state_online:1}"), ("released recipe", "{per_state_released:1}"),
            ("times fewer than that", "{fewer_than_released:1}"), ("passes of a run", "{passes_kept}"),
            ("of the released recipe", "{passes_released}"),
            ("times faster than with states made anew", "{faster_than_online:1}"),
        ),
    ),
    "learning": Table(
        "learning",
        (
            ("thing", "{thing}"), ("mask, IoU", "{mask:2}"), ("drawn apart", "{drawn:2/2}"),
            ("gone when erased", "{erased:2/2}"), ("still drawn when the other is erased", "{kept:2/2}"),
            ("both in one image", "{both:2/2}"), ("known things still drawn", "{known:2/2}"), *COST,
        ),
    ),
    "removal": Table(
        "removal",
        (
            ("", "{variant}"), ("object gone", "{object_gone:3/3}"), ("PSNR in its place, dB", "{psnr_fill:1/1}"),
            ("PSNR elsewhere, dB", "{psnr_outside:1/1}"), ("likeness to the truth", "{fill_similarity:2/2}"),
            ("consensus of seeds", "{seed_consensus:2/2}"),
        ),
        words={
            "inpainting": "blended-latent inpainting", "attentive_eraser": "Attentive Eraser",
            "aas_only": "AAS alone (guidance scale 1)", "sarg_only": "SARG alone",
        },
    ),
    "composition": Table(
        "composition",
        (
            ("", "{variant}"), ("both found", "{both_found:3/3}"),
            ('"a cat and a dog"', "{both_found_template_1:2/2}"), ('"cat and dog"', "{both_found_template_2:2/2}"),
            ("things found", "{objects_found:2/2}"), ("CLIP, lesser object", "{clip_minimum_object:3/3}"),
        ),
        words={
            "stock": "stock model", "attend_and_excite": "Attend-and-Excite", "a_star": "A-STAR",
            "segregation": "its segregation alone",
        },
    ),
    "ways": Table(
        "ways", (("way around", "{way}"),), across="method", each=(("`{value}`", "{each[shown]}"),),
        last=(("what is said", "{said}"),),
    ),
    FAMILIES: Table(FAMILIES, (METHOD, *OF_FAMILY), grouped=True),
    "blocks": Table(
        "blocks", (("edited after block", "{block}"),), across="concept", each=(("{value}", "{each[distance]:2}"),)
    ),
    "doors-sdxl": Table(
        "doors", WAY_IN, where={"model": ("canvas-sdxl",)},
        words={
            "tokens_1": "tokens of the first text encoder", "tokens_2": "tokens of the second",
            "pooled": "the pooled vector",
        },
    ),
    "doors-sd3": Table(
        "doors", WAY_IN, where={"model": ("canvas-sd3",)},
        words={
            "tokens_1": "tokens of the first CLIP", "tokens_2": "tokens of the second CLIP",
            "tokens_3": "T5's tokens", "pooled": "both pooled vectors",
        },
    ),
    "doors-flux": Table(
        "doors", WAY_IN, where={"model": ("canvas-flux",)},
        words={"tokens": "T5's tokens", "pooled": "CLIP's pooled vector"},
    ),
    "closed-forms": Table(
        "closed-forms",
        (
            CONCEPT, METHOD, *PLAIN_RATES, ("look-alikes kept", "{lookalikes:3}"), ("kB", "{kB:0}"),
            ("rank", "{rank}"),
        ),
    ),
    "gates": Table(
        "gates",
        (
            ("prompts", "{prompts}"), ("opened by features", "{features:3/3}"), ("by the linear probe", "{probe:3/3}"),
            ("prompts in all", "{n}"),
        ),
    ),
    "controls": Table(
        "controls",
        (("features behind the concept's gate", "{features}"), ("UA", "{UA:3/3}"), ("images", "{n}")),
    ),
    "anchored": Table(
        "anchored",
        (
            CONCEPT, ("its anchor", "{anchor}"), ("one vector, 3 times", "{vector:2}"),
            ("each latent its own", "{latents:2}"),
        ),
    ),
    "several": Table(
        "several",
        (
            ("concepts at once", "{concepts}"), ("sets", "{sets}"), *RATES, ("least AA", "{least:3} ({least_of})"),
        ),
    ),
    "peer": Table(
        "peer",
        (
            ("", "{number}"), ("erased with", "{model:code}"), ("eval-unlearn", "{theirs:4}"), ("ours", "{ours:4/2}"),
            ("ours by its arithmetic", "{derived:4}"), ("left", "{apart}"), ("what differs", "{why}"),
        ),
        where={"part": ("compared",)}, words={"stock": NOTHING}, grouped=True,
    ),
    "peer-steps": Table(
        "peer", (("", "{number}"),), where={"part": ("steps",)}, across="model",
        each=(("`{value}`: UA", "{each[UA]:2}"), ("IRA", "{each[IRA]:2}")),
    ),
}  # fmt: skip
"""Tables of README and docs by the name that stands in their marks."""
