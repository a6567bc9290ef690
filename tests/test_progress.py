"""Progress: a bar in a terminal, lines in a file or a pipe, or a function of the caller's."""

from __future__ import annotations

import io
from typing import Any

import pytest
from tqdm.std import tqdm

from erasure import progress
from erasure.cli.terminal import Terminal
from erasure.progress import Lines, bar, reporting


class Screen(io.StringIO):
    """A terminal in memory."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which stands still until a test moves it; no work has begun."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Lines, "last", None)
    return now


def in_a_second(report: Any, clock: list[float]) -> None:
    """A work of 100 seconds."""
    for second in range(100):
        clock[0] += 1
        report((second + 1) / 100)


def test_a_line_now_and_then_where_nobody_sees_a_bar(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(True, "uce") as report:
        in_a_second(report, clock)
    assert capsys.readouterr().err == "uce: 30%, 0:30\nuce: 60%, 1:00\nuce: 90%, 1:30\n"
    with reporting(False, "uce") as report:
        in_a_second(report, clock)
    assert capsys.readouterr() == ("", "")


def test_what_is_soon_done_gives_no_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(True, "uce") as report:
        report(0.5)
        clock[0] += 29
        report(1.0)
    with bar("after", 3, unit="image") as shown:
        shown.update(3)
    assert capsys.readouterr() == ("", "")


def test_short_works_one_after_the_other_share_their_lines(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(7):
        with bar(f"prompt \x1b{index}", 2, unit="text") as shown:
            clock[0] += 10
            shown.set_postfix_str("loss 1.000")
            shown.update()
    assert capsys.readouterr().err == (
        "prompt \\x1b2: 1 of 2 texts, 50%, 0:10, loss 1.000\nprompt \\x1b5: 1 of 2 texts, 50%, 0:10, loss 1.000\n"
    )


def test_what_was_done_before_counts(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with bar("after", 8, done=5, unit="image") as shown:
        clock[0] += 3600
        shown.update()
    assert capsys.readouterr().err == "after: 6 of 8 images, 75%, 60:00\n"


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", screen := Screen())
    shown = bar("after", 3, unit="image")
    assert isinstance(shown, tqdm)
    with shown:
        shown.update(3)
    with reporting(True, "uce") as report:
        report(1.0)
    assert "after: 100%" in screen.getvalue()
    assert "uce:   0%|" in screen.getvalue()
    before = screen.getvalue()
    with bar("after", 3, shown=False) as shown:
        shown.update(3)
    assert screen.getvalue() == before


def test_a_closed_stream_is_no_obstacle(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with reporting(True, "uce") as report:
        in_a_second(report, clock)


@pytest.mark.parametrize("total", [2, 0])
def test_commands_print_lines_where_nobody_sees_a_bar(
    total: int, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal().progress(total) as shown:
        shown.stage("a photo of a cat\x07")
        shown.advance()
        clock[0] += 45
        with shown.part() as report:
            report(0.5)
            clock[0] += 5
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"a photo of a cat\\x07: {75 if total else 100}%, 0:45\n"


def test_commands_have_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", screen := Screen())
    with Terminal().progress(2) as shown:
        shown.stage("a photo of a cat")
        shown.advance()
        with shown.part() as report:
            report(0.5)
    assert "a photo of a cat" in screen.getvalue()
    assert "100%" in screen.getvalue()
