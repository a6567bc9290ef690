"""An append-only log of the calls of a locked pipeline: JSON lines, each with the digest of the line before.

Every line has the digest of the line before and its own. With a key the digests are HMACs, so that whoever can write
to the file without the key cannot forge a valid chain. Changed, moved or removed lines break the chain; removed lines
at the end do not, but are noticed by a copy of the last digest that is kept elsewhere (`head`). Prompts are stored as
HMACs unless configured otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from erasure.errors import ArtifactError
from erasure.files import at_home, shown

Prompts = Literal["digest", "clear", "none"]
"""How prompts are stored in a log."""
START = "0" * 64
"""Value of the former line's digest in the first line."""
LONGEST_LINE = 2**20
"""Largest size of a line in bytes."""
OWN = ("n", "time", "event", "previous", "hash")
"""Fields that every line has."""


@dataclass(frozen=True)
class Verified:
    """Summary of a log with a valid chain."""

    lines: int
    """Number of lines."""
    head: str
    """Digest of the last line."""
    events: Mapping[str, int]
    """Number of lines of each event."""
    keyed: bool
    """Whether the digests are HMACs with a key. Without a key, whoever can write the file can replace all of it."""
    torn: int
    """Number of lines that a killed process left unfinished, each recorded by the following line."""


class AuditLog:
    """A log that is open for writing, by one process and any number of its threads.

    Args:
        path: The file; an existing log is verified and continued.
        key: Secret of the digests, at least 16 bytes; see the module.
        prompts: How prompts are stored: `digest` (an HMAC with the key; without a key with a salt from the first line,
            so that whoever has the log can test guesses), `clear`, or `none`.

    Raises:
        ArtifactError: The file cannot be read or written, another process writes it, or its chain is broken.
    """

    def __init__(self, path: str | Path, *, key: bytes | None = None, prompts: Prompts = "digest") -> None:
        self.path, self.prompts, self._key = at_home(path), prompts, _checked(key)
        self._turn = threading.Lock()
        self._owner = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._owner.acquire(timeout=0)
        except Timeout:
            raise ArtifactError(
                f"another process writes the audit log {self.path}: give each process a log of its own"
            ) from None
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._lines, self._head, self._salt, torn = self._there()
            # The file is unbuffered, so that a written line has reached the operating system.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            self._owner.release()
            raise self._unusable(error) from error
        except BaseException:
            self._owner.release()
            raise
        if torn is not None:
            self._put(b"\n")
            self.write("resumed", torn=torn)
        elif not self._lines:
            self._salt = secrets.token_hex(16)
            self.write("opened", format=1, keyed=key is not None, salt=self._salt, prompts=prompts)

    def _there(self) -> tuple[int, str, str, str | None]:
        """Lines, last digest, salt, and the digest of an unfinished last line of what stands in the file."""
        if not self.path.exists() or not self.path.stat().st_size:
            return 0, START, "", None
        lines, head, salt, torn = 0, START, "", None
        for line in _read(self.path, self._key):
            if line.entry is None:
                torn = line.torn
                continue
            lines, head, torn = lines + 1, str(line.entry["hash"]), None
            salt = salt or str(line.entry.get("salt", ""))
        if not lines:
            raise ArtifactError(f"{self.path} holds no line of an audit log: give another file")
        return lines, head, salt, torn

    @property
    def head(self) -> str:
        """Digest of the last line. A copy that is kept elsewhere shows whether lines are missing at the end."""
        return self._head

    @property
    def lines(self) -> int:
        """Number of lines."""
        return self._lines

    def digest(self, text: str) -> str:
        """Compute the HMAC of a text as in this log, to find out whether a prompt is in it."""
        return _digest_of(text, self._key, self._salt)

    def as_logged(self, prompts: Sequence[str]) -> list[str] | None:
        """Convert prompts to their form in this log."""
        if self.prompts == "none":
            return None
        return list(prompts) if self.prompts == "clear" else [self.digest(prompt) for prompt in prompts]

    def write(self, event: str, **facts: object) -> str:
        """Append a line, and give its digest.

        Args:
            event: What happened.
            **facts: Plain data.

        Raises:
            ArtifactError: The line cannot be written; the logged action must then not happen.
        """
        if taken := set(facts) & set(OWN):
            raise ArtifactError(
                f"a line of the audit log has a field {sorted(taken)[0]!r} of its own: name it otherwise"
            )
        with self._turn:
            entry = {"n": self._lines + 1, "time": _now(), "event": event, **facts, "previous": self._head}
            digest = _hash(entry, self._key)
            content = (json.dumps({**entry, "hash": digest}, ensure_ascii=True) + "\n").encode()
            if len(content) > LONGEST_LINE:
                raise ArtifactError(f"a line of {len(content)} bytes is too long for the audit log {self.path}")
            self._put(content)
            self._lines, self._head = self._lines + 1, digest
            return digest

    def _put(self, content: bytes) -> None:
        try:
            if self._file.write(content) != len(content):
                raise OSError("the disk is full")
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ArtifactError:
        return ArtifactError(
            f"the audit log {self.path} cannot be written ({error}): make room or name another file; nothing is drawn "
            "without it"
        )

    def close(self) -> None:
        """Flush the log to the disk and release it for other processes."""
        with self._turn, contextlib.suppress(OSError, ValueError):
            os.fsync(self._file.fileno())
            self._file.close()
        self._owner.release()


def verify_log(path: str | Path, *, key: bytes | None = None, head: str | None = None) -> Verified:
    """Check the chain of a log.

    Args:
        path: The file.
        key: Secret with which it was written.
        head: Digest of a line that must be in the log, kept elsewhere, to notice missing lines at the end.

    Raises:
        ArtifactError: A line was changed, moved, removed or cut short; the message says which.
    """
    key, last, seen, torn, keyed = _checked(key), START, False, 0, False
    events: dict[str, int] = {}
    lines, open_end = 0, False
    for line in _read(at_home(path), key):
        if line.entry is None:
            torn, open_end = torn + 1, True
            continue
        open_end = False
        lines, last = lines + 1, str(line.entry["hash"])
        seen = seen or last == head
        keyed = keyed or line.entry.get("keyed") is True
        event = str(line.entry["event"])
        events[event] = events.get(event, 0) + 1
    if not lines:
        raise ArtifactError(f"{path} holds no line of an audit log: check the path")
    if open_end:
        raise ArtifactError(
            f"the last line of {path} is cut short: a process was killed while it wrote it, or somebody cut it. "
            "Opening the log again accounts for it"
        )
    if head is not None and not seen:
        raise ArtifactError(f"{path} has no line with the digest {shown(head)}: lines at its end were removed")
    return Verified(lines, last, events, keyed, torn)


def find(path: str | Path, prompt: str, *, key: bytes | None = None) -> list[int]:
    """Find the numbers of the lines about a prompt.

    Raises:
        ArtifactError: See `verify_log`.
    """
    key, salt, found = _checked(key), "", []
    for line in _read(Path(path), key):
        if line.entry is None:
            continue
        salt = salt or str(line.entry.get("salt", ""))
        prompts = line.entry.get("prompts")
        if isinstance(prompts, list) and {prompt, _digest_of(prompt, key, salt)} & set(map(str, prompts)):
            found.append(line.number)
    return found


@dataclass(frozen=True)
class _Line:
    """One line: an entry whose digest holds, or an unfinished one at the end or ahead of a `resumed` entry."""

    number: int
    entry: Mapping[str, object] | None
    torn: str | None = None


def _read(path: Path, key: bytes | None) -> Iterator[_Line]:
    """The lines of a log, each checked against the one before."""
    previous, count, torn = START, 0, None
    try:
        with open(path, "rb") as file:
            number = 0
            while content := file.readline(LONGEST_LINE + 1):
                number += 1
                if torn is not None:
                    yield _Line(number - 1, None, torn)
                entry = _parsed(content)
                if torn is not None and (entry is None or entry.get("torn") != torn):
                    raise ArtifactError(f"line {number - 1} of {path} is no entry of an audit log: it was changed")
                torn = None
                if entry is None:
                    # Only a process that was killed leaves such a line, and the next one accounts for it.
                    torn = hashlib.sha256(content.rstrip(b"\n")).hexdigest()
                    continue
                count += 1
                claimed = str(entry.pop("hash", ""))
                if entry.get("n") != count or entry.get("previous") != previous:
                    raise ArtifactError(
                        f"line {number} of {path} does not follow the line before it (it is entry {entry.get('n')}, "
                        f"expected {count}): lines were removed, moved or put in"
                    )
                if not hmac.compare_digest(claimed, _hash(entry, key)):
                    keyed = " or the key is another one" if key is not None or count == 1 else ""
                    raise ArtifactError(f"line {number} of {path} does not have its digest: it was changed{keyed}")
                previous = claimed
                yield _Line(number, {**entry, "hash": claimed})
            if torn is not None:
                yield _Line(number, None, torn)
    except OSError as error:
        raise ArtifactError(f"the audit log {path} cannot be read ({error.strerror or error})") from error


def _parsed(content: bytes) -> dict[str, object] | None:
    """An entry; `None` for what is none, such as a line that was cut short."""
    if not content.endswith(b"\n"):
        return None
    try:
        entry = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and set(OWN) <= set(entry) else None


def _hash(entry: Mapping[str, object], key: bytes | None) -> str:
    content = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()
    return hashlib.sha256(content).hexdigest() if key is None else hmac.new(key, content, hashlib.sha256).hexdigest()


def _digest_of(text: str, key: bytes | None, salt: str) -> str:
    # Of the key, so that a digest of a text is never a digest of a line.
    secret = salt.encode() if key is None else hmac.new(key, b"prompts" + salt.encode(), hashlib.sha256).digest()
    return hmac.new(secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def _checked(key: bytes | None) -> bytes | None:
    if key is not None and len(key) < 16:
        raise ArtifactError(
            f"the key of an audit log has {len(key)} bytes, at least 16 are needed: choose a longer key"
        )
    return key


def _now() -> str:
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1e6):06d}Z"
