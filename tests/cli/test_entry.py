"""The program itself: help, exit codes, one-line errors, what it imports."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from erasure import __version__
from erasure.cli.main import COMMANDS, main

HEAVY = ("torch", "diffusers", "transformers", "peft", "open_clip", "scipy", "matplotlib")


def loaded_by(code: str) -> set[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after running `code`."""
    check = f"{code}\nimport sys\nprint('loaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    first, *names = done.stdout.splitlines()[-1].split()
    assert first == "loaded"
    return set(names)


def test_import_is_light():
    assert loaded_by("import erasure") == set()


def test_help_is_light():
    assert loaded_by("from erasure.cli.main import main; main(['--help'])") == set()


QUICK = [
    *([command, "--help"] for command in COMMANDS),
    ["erase"], ["erase", "uce", "--help"], ["erase", "advunlearn", "--help"], ["erase", "ucee"], ["strategies"],
    ["erase", "uce", "--model", "m", "--concept", "cat", "--preset", "none"], ["sae", "train", "--help"],
    ["erase", "esd", "--model", "m", "--concept", "cat", "--steps", "-3"], ["sae", "info", "--help"],
    ["attack"], ["attack", "unlearndiffatk", "--help"], ["attack", "unlearndifatk"], ["attack", "--model", "m"],
    ["attack", "random_prefix", "--size", "huge", "--out", "o", "--model", "m"],
    ["stress"], ["stress", "relearn", "--help"], ["stress", "relern"], ["stress", "--model", "m"],
    ["eval", "canvass", "--model", "m", "--out", "o"], ["eval", "--modle", "m"], ["paint"],
]  # fmt: skip
"""Commands that only list, help or refuse a word."""


EACH = """
import contextlib, json, os, sys
from erasure.cli.main import main
with contextlib.suppress(SystemExit):
    main(["erase", "uce", "--help"])
for number, arguments in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0, arguments
        continue
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code
    with open(f"{sys.argv[2]}/{number}", "w") as file:
        file.write(" ".join(sys.modules))
    sys.stdout.flush()
    os._exit(0)
"""
"""Runs each command in a process that has loaded what all commands share, and nothing else."""


def test_helps_lists_and_refusals_of_words_are_light(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", EACH, json.dumps(QUICK), tmp_path], capture_output=True, check=True)
    for number, arguments in enumerate(QUICK):
        modules = (tmp_path / str(number)).read_text().split()
        assert "erasure.cli.main" in modules
        assert not {*HEAVY} & {*modules}, arguments


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"erasure {__version__}\n"


def test_module_form_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "erasure", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"erasure {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["paint"], ["paint", "erase", "--help"]),
        (["demo", "--sise", "full"], ["--sise", "erasure demo --help"]),
        (["demo", "--size", "huge"], ["huge", "smoke", "quick", "full"]),
        (["generate", "--prompt", "a cat"], ["--model", "--out"]),
        (["erase", "no-such", "--model", "m", "--concept", "cat"], ["no-such", "hirm", "uce"]),
        (["erase", "--model", "m"], ["strategy first", "hirm"]),
        (["erase", "uce", "--model", "m", "--concept", "cat", "--preset", "none-such"], ["none-such"]),
        (["erase", "hirm", "--model", "m", "--concept", "cat", "--steps", "many"], ["many", "--steps"]),
        (["eval", "no-such", "--model", "m", "--concept", "cat", "--out", "o"], ["no-such", "canvas"]),
        (["eval", "canvas", "--model", "m", "--strength", "0.5", "--out", "o"], ["--strength", "--erasure"]),
        (["info", "no/such-erasure"], ["no/such-erasure"]),
        (["info", "not a name"], ["not a name"]),
        (["compare"], ["compare"]),
        (["compare", "no-such-folder"], ["no-such-folder"]),
        (["bench", "--repeats", "0"], ["--repeats"]),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], names: list[str], capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("erasure: error: ")
    assert said.err.count("\n") == 1
    assert all(name in said.err for name in names), said.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["erse"], "erase"), (["Generate"], "generate"), (["comparison"], "compare"), (["sae", "trian"], "train"),
        (["generate", "--promt", "a cat"], "--prompt"), (["erase", "uce", "--concpet", "cat"], "--concept"),
        (["eval", "canvas", "--modle=m"], "--model"), (["demo", "--SIZE", "smoke"], "--size"),
        (["erase", "ucee"], "uce"), (["attack", "unlearndifattack"], "unlearndiffatk"),
        (["eval", "canvass"], "canvas"),
        (["attack", "unlearndiffatk", "--sampels", "3"], "--samples"), (["remove", "--mas", "m.png"], "--mask"),
    ],
)  # fmt: skip
def test_the_nearest_word_is_named(arguments: list[str], nearest: str, capsys: Any) -> None:
    assert main(arguments) == 2
    assert f"Did you mean {nearest!r}?" in capsys.readouterr().err


def on_a_terminal(arguments: list[str], environment: dict[str, str]) -> str:
    """Run the program as on a terminal, and give what it prints."""
    reading, writing = os.openpty()
    command = [sys.executable, "-m", "erasure", *arguments]
    with subprocess.Popen(command, env=environment, stdin=writing, stdout=writing, stderr=writing) as process:
        os.close(writing)
        said = b""
        # Linux tells by an error that the other end is closed.
        with contextlib.suppress(OSError):
            while chunk := os.read(reading, 4096):
                said += chunk
        os.close(reading)
    assert process.returncode == 0
    return said.decode()


def test_no_colour_where_none_is_wanted() -> None:
    plain = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    coloured, bare = (on_a_terminal(["info", "--help"], plain | more) for more in ({}, {"NO_COLOR": "1"}))
    assert "\x1b[" in coloured
    assert "\x1b[" not in bare
    assert "usage: erasure info" in bare


@pytest.fixture
def failing(monkeypatch):
    """Make `erasure strategies` raise the given error."""
    from erasure.cli import strategies

    def install(error: BaseException) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(strategies, "run", fail)

    return install


def test_unexpected_failure(failing, capsys):
    failing(RuntimeError("it\nbroke"))
    assert main(["strategies"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("erasure: error: RuntimeError: it broke")
    assert said.count("\n") == 1


def test_debug_shows_the_traceback(failing):
    failing(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        main(["strategies", "--debug"])


def test_interrupt(failing, capsys):
    failing(KeyboardInterrupt())
    assert main(["strategies"]) == 130
    said = capsys.readouterr().err
    assert said.startswith("erasure: interrupted")
    assert said.count("\n") == 1


def test_other_processes_are_silent(failing, capsys, monkeypatch):
    from erasure.errors import ConceptError

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    failing(ConceptError("empty"))
    assert main(["strategies"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "abc"), ("RANK", ""), ("PMI_RANK", "1.5")])
def test_processes_that_cannot_be_counted(name: str, value: str, capsys, monkeypatch):
    monkeypatch.setenv(name, value)
    assert main(["strategies"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"erasure: error: the environment variable {name} is")
    assert said.count("\n") == 1


WORKING = """
import os, sys, warnings
from erasure.cli import strategies
from erasure.cli.main import main
from erasure.errors import ErasureError

def run(argv, terminal):
    terminal.json_only = "--json" in argv
    warnings.warn("a remark", ErasureWarning)
    with terminal.progress(1) as bar:
        bar.stage("at work")
    open(argv[0], "w").close()
    if terminal.json_only:
        terminal.result({"found": 1})
    terminal.table(("name", "value"), [["a", "1"]])
    terminal.say("a line")

class ErasureWarning(UserWarning):
    __module__ = "erasure.warnings"

strategies.run = run
sys.exit(main(sys.argv[1:]))
"""
"""A command with a warning, a progress bar, a finished file, and something to say."""


def in_a_shell(script: str, *arguments: str, unbuffered: bool) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell in which `$0 $1 $2` begins a call of Python."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    command = ["bash", "-c", script, sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("arguments", ["--help", "--version", "strategies", "strategies --json", "info --help"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_output_that_cannot_be_written(arguments: str, unbuffered: bool) -> None:
    call = f"$0 -m erasure {arguments}"
    done = in_a_shell(f"{call} | true; exit ${{PIPESTATUS[0]}}", unbuffered=unbuffered)
    assert (done.stderr, done.returncode) == ("", 1)
    done = in_a_shell(f"{call} > /dev/full", unbuffered=unbuffered)
    assert done.stderr.startswith("erasure: error: cannot write to the standard output (No space left on device)")
    assert (done.stderr.count("\n"), done.returncode) == (1, 1)
    assert in_a_shell(f"{call} > /dev/full 2>&1", unbuffered=unbuffered).returncode == 1
    done = in_a_shell(f"{call} >&-", unbuffered=unbuffered)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize("mode", ["", "--json"])
@pytest.mark.parametrize(
    ("where", "code"), [("2> /dev/full", 0), ("2>&-", 0), ("2> >(true)", 0), ("2>&1 | true", 1), ("> /dev/full", 1)]
)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_work_goes_on_where_nobody_can_read_remarks(where: str, code: int, mode: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    done = in_a_shell(
        f'$0 -c "$1" strategies {made} {mode} {where}; exit ${{PIPESTATUS[0]}}', WORKING, unbuffered=False
    )
    assert done.returncode == code
    assert made.is_file()
    if code == 0:
        assert "a remark" not in done.stdout
        assert not mode or json.loads(done.stdout) == {"found": 1}


def test_an_error_is_not_printed_where_results_go() -> None:
    done = in_a_shell("$0 -m erasure paint 2>&-", unbuffered=False)
    assert (done.stdout, done.returncode) == ("", 2)
    assert in_a_shell("$0 -m erasure paint 2> /dev/full", unbuffered=False).returncode == 2
