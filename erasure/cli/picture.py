"""A labelled grid of images, for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL = 144, 8, 150
"""Side of an image, space between images, and width of the row labels, in pixels."""
INK, PAPER = (32, 32, 40), (255, 255, 255)


def grid(columns: Sequence[str], rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Images in a grid.

    Args:
        columns: What is above each column.
        rows: The images of each row, as many as columns, by what is left of the row.
    """
    font = ImageFont.load_default(15)
    heads = [textwrap.wrap(column, 19) for column in columns]
    head = 20 * max(map(len, heads)) + GAP
    size = (LABEL + len(columns) * (CELL + GAP) + GAP, head + len(rows) * (CELL + GAP) + GAP)
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for index, lines in enumerate(heads):
        middle = LABEL + GAP + index * (CELL + GAP) + CELL // 2
        for line, text in enumerate(reversed(lines)):
            draw.text((middle, head - 6 - 20 * line), text, fill=INK, font=font, anchor="ms")
    for index, (label, images) in enumerate(rows.items()):
        top = head + GAP // 2 + index * (CELL + GAP)
        lines = textwrap.wrap(label, 17)
        for line, text in enumerate(lines):
            draw.text(
                (GAP, top + CELL // 2 + 20 * (line - (len(lines) - 1) / 2)), text, fill=INK, font=font, anchor="lm"
            )
        for column, image in enumerate(images):
            shown = image.convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC)
            picture.paste(shown, (LABEL + GAP + column * (CELL + GAP), top))
    return picture
