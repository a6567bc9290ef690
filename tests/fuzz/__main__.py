"""Damage files of every kind and read them: `python tests/fuzz 2000`.

Reading either succeeds or raises an error of the package, within two seconds and a bounded memory: never a bare
exception, never a stall.
"""

from __future__ import annotations

import argparse
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import eval_kinds  # noqa: F401  (adds its kinds)
import list_kinds  # noqa: F401  (adds its kinds)
from kinds import KINDS
from mutations import mutate

SECONDS = 2.0
MEMORY = 2**30
"""Bytes that reading may take beyond what is taken already."""


class Stalled(BaseException):
    """Reading took too long; no handler of ordinary errors catches it."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `Stalled` inside after so many seconds."""

    def ring(*_: object) -> None:
        raise Stalled

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def limit_memory() -> None:
    """Refuse this process more than `MEMORY` beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, -1))


def attempt(name: str, seed: int, templates: dict[str, Path], scratch: Path) -> tuple[str, str]:
    """Damage and read one; gives what was done, and how it ended."""
    rng = random.Random(f"{name}/{seed}")
    kind, folder = KINDS[name], scratch / f"{seed}"
    shutil.copytree(templates[name], folder)
    file = rng.choice(kind.files)
    way = mutate(folder / file, rng)
    try:
        with alarm(SECONDS):
            kind.read(folder)
        return f"{file}, {way}", "read"
    except kind.errors as error:
        lines = len(str(error).splitlines())
        return f"{file}, {way}", "refused" if lines == 1 and len(
            str(error)
        ) < 2000 else f"{lines} lines: {error!s:.300}"
    except (Exception, Stalled) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{file}, {way}", f"{type(error).__name__}: {error!s:.200} ({where.filename}:{where.lineno})"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run so many; the exit status tells whether all ended as they should."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation")
    parser.add_argument("--kind", choices=sorted(KINDS), action="append", help="only these kinds")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = sorted(options.kind or KINDS)
    started, ends, failures = time.monotonic(), Counter(), []
    with tempfile.TemporaryDirectory() as root:
        templates = {name: Path(root) / "valid" / name for name in names}
        for name, folder in templates.items():
            folder.mkdir(parents=True)
            KINDS[name].write(folder)
            shutil.copytree(folder, Path(root) / "once" / name)
            KINDS[name].read(Path(root) / "once" / name)  # a valid one is read; imports happen here
        limit_memory()
        for number in range(options.seed, options.seed + options.count):
            name = names[number % len(names)]
            done, end = attempt(name, number, templates, Path(root))
            ends[end if end in ("read", "refused") else "failed"] += 1
            if end not in ("read", "refused"):
                failures.append(f"--kind {name!r} --seed {number} ({done}): {end}")
    print(*failures, sep="\n")
    print(f"{dict(ends)} of {options.count} mutations in {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
