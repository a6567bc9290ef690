"""Locks on the erasures of a pipeline, and their checks of every call."""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

from erasure import guards
from erasure.attach import ErasureManager
from erasure.errors import AttachError, LockedError, OptionError, RefusedError, VerificationError
from erasure.guards import Refusable
from erasure.interop.pipelines import LOCK, components_of, origin
from erasure.leases import Lease
from erasure.locking.audit import AuditLog
from erasure.locking.gates import Gates
from erasure.locking.seal import Seal, described
from erasure.shown import visible
from erasure.state import Locked
from erasure.twins import states_of
from erasure.versions import library_versions

SHARE = 0.005
"""Largest share of the sampling time that complete verifications may take."""
TEXTS = ("prompt", "negative_prompt")
"""Text arguments; those of further text encoders have a number appended."""


class PictureJudgement(Protocol):
    """Judgement of one picture; a `Finding` of `erasure.eval.detectors` is one."""

    @property
    def flagged(self) -> bool | None:
        """Whether it shows forbidden content; `None` where that is unknown, which counts as true."""

    @property
    def reason(self) -> str | None:
        """Reason why it is unknown."""


Looks = Callable[[Sequence[Image.Image]], Sequence[PictureJudgement]]
"""Function that judges pictures, for instance `functools.partial(erasure.eval.detectors.ask, detector)`."""


@dataclass
class Costs:
    """Seconds of calls, and the lock's share of them."""

    calls: int = 0
    drawing: float = 0.0
    """Seconds of complete calls."""
    marks: float = 0.0
    """Seconds of comparing the pipeline's components."""
    proofs: float = 0.0
    """Seconds of complete verifications."""
    verifications: int = 0
    """Number of complete verifications."""

    @property
    def share(self) -> float:
        """Share of all calls' time that verification took, 0-1."""
        return (self.marks + self.proofs) / self.drawing if self.drawing else 0.0


class _UnderWay(threading.local):
    """Pipelines whose calls this thread is inside of."""

    pipes: tuple[int, ...] = ()


_UNDER_WAY = _UnderWay()


@contextmanager
def _under_way(pipe: DiffusionPipeline) -> Iterator[None]:
    before, _UNDER_WAY.pipes = _UNDER_WAY.pipes, (*_UNDER_WAY.pipes, id(pipe))
    try:
        yield
    finally:
        _UNDER_WAY.pipes = before


class Lock:
    """A lock on the erasures of one pipeline; `lock` makes it.

    Args:
        pipe: The pipeline; nothing may draw with it meanwhile.
        locked: Lock object on the pipeline's components.
        key: Key for unlocking.
        prompts: Gates that detect concepts in prompts.
        pictures: Function that judges pictures.
        audit: Log of all calls.
        share: See `SHARE`.
        owns_audit: Whether to close the log when unlocking.
    """

    def __init__(
        self, pipe: DiffusionPipeline, locked: Locked, key: str, prompts: Gates | None, pictures: Looks | None,
        audit: AuditLog | None, share: float, *, owns_audit: bool = False,
    ) -> None:  # fmt: skip
        self.owns_audit = owns_audit
        self.locked, self.key, self.audit, self.share = locked, key, audit, share
        self._gates, self._pictures = prompts, pictures
        self._turn = threading.Lock()
        self.costs = Costs()
        started = time.perf_counter()
        self.tensors = ErasureManager(pipe).verify()
        self._proof = time.perf_counter() - started
        self._since = 0.0
        self._seal = Seal(pipe, locked.refuses)
        self.erasures = dict(described(states_of(pipe)))
        """The erasures in force by name, with strategy, concepts, strength and fingerprint."""

    def __deepcopy__(self, memo: dict[int, object]) -> Lock:
        """Give the same object: a copy of the pipeline is another one, and refused."""
        return self

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: what another process made of it would be locked by nobody.

        Raises:
            LockedError: Always.
        """
        raise LockedError(
            "this pipeline is locked, and a locked pipeline cannot be pickled or sent to another process: "
            "unlock_erasures(key) first, and lock it again there"
        )

    @staticmethod
    def of(pipe: object) -> Lock | None:
        """The lock on a pipeline, if there is one."""
        held = vars(pipe).get(LOCK)
        return held if isinstance(held, Lock) else None

    # Calls --------------------------------------------------------------------------------------------------------

    @contextmanager
    def call(self, pipe: DiffusionPipeline, given: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
        """Check a call of the pipeline before it runs.

        Args:
            pipe: The pipeline that is called.
            given: Arguments by name.

        Gives:
            A function that checks the call's result, logs it, and returns it.

        Raises:
            VerificationError: An erasure is not in force, or the pipeline is not what was locked.
            LockedError: An argument bypasses the erasures.
            RefusedError: A prompt contains an erased concept.
            ArtifactError: The audit log cannot be written.
        """
        if id(pipe) in _UNDER_WAY.pipes:
            yield lambda result: result  # A call that this pipeline's own call hands on to.
            return
        started = time.perf_counter()
        texts = texts_of(given)
        try:
            whole = self.verify(pipe)
            guards.check_call(components_of(pipe), given)
            self._check_output(given)
            self._check_prompts(texts)
            with guards.admitted(self.locked), _under_way(pipe):
                yield lambda result: self._settled(result, given, texts, started, whole)
        except BaseException as error:
            self._note(error, texts)
            raise

    def verify(self, pipe: DiffusionPipeline, *, whole: bool = False) -> bool:
        """Verify that the erasures are in force: quickly, and completely from time to time.

        Args:
            pipe: The pipeline.
            whole: Whether to verify completely now.

        Returns:
            Whether the verification was complete: every tensor and hook, and the pipeline's outputs.

        Raises:
            VerificationError: An erasure is not in force, or the pipeline is not what was locked.
            LockedError: A LoRA was added that the lock refuses.
        """
        started = time.perf_counter()
        if not self._seal.is_whole(pipe):
            self._seal = self._seal.renewed(pipe)
            whole = True
            if self.audit is not None:
                self.audit.write("changed", message="a LoRA on layers that no erasure edits came or went")
        if self._seal.locks() != {self.locked}:
            raise VerificationError(
                "the lock of this pipeline is not on its networks any more: it was unlocked through another pipeline. "
                "unlock_erasures(key) here too, and lock it again"
            )
        with self._turn:
            due = whole or self._since * self.share >= self._proof
            if due:
                # It is due again at the next call, unless it succeeds.
                self._since = math.inf
            self.costs.marks += time.perf_counter() - started
        if due:
            started = time.perf_counter()
            self.tensors = ErasureManager(pipe).verify()
            with self._turn:
                self._since, self._proof = 0.0, time.perf_counter() - started
                self.costs.proofs += self._proof
                self.costs.verifications += 1
        return due

    def _check_output(self, given: Mapping[str, Any]) -> None:
        """Refuse output types that the detector cannot judge."""
        kind = given.get("output_type") or "pil"
        if self._pictures is not None and kind != "pil":
            raise LockedError(
                f"output_type={kind!r} is refused: this pipeline is locked with a detector, which looks at pictures. "
                "Pass output_type='pil'"
            )

    def _check_prompts(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Refuse prompts that open a gate.

        Raises:
            RefusedError: A prompt opens a gate.
        """
        if self._gates is None:
            return
        refused: dict[int, str] = {}
        for name, each in texts.items():
            if name.startswith("negative"):
                continue  # What a drawing is pushed away from is told by words, see `erasure.guards.calls`.
            for place, holding in enumerate(self._gates.found(each)):
                if holding:
                    refused[place] = f"the prompt holds {', '.join(holding)}, which is erased"
        if refused:
            raise RefusedError(_count("prompt", refused), refused)

    def _settled(
        self, result: Any, given: Mapping[str, Any], texts: Mapping[str, Sequence[str]], started: float, whole: bool
    ) -> Any:
        """Check the result of a call, and log it."""
        pictures = _pictures_of(result)
        refused = self._refused(pictures)
        seconds = time.perf_counter() - started
        with self._turn:
            self.costs.calls += 1
            self.costs.drawing += seconds
            self._since += seconds
        if self.audit is not None:
            facts = {name: given[name] for name in ("num_inference_steps", "height", "width") if name in given}
            self.audit.write(
                "drawn", prompts=self.audit.as_logged([text for each in texts.values() for text in each]),
                pictures=[digest_of(picture) for picture in pictures], refused=sorted(refused),
                seconds=round(seconds, 4), whole=whole, **{k: v for k, v in facts.items() if isinstance(v, int)},
            )  # fmt: skip
        if refused:
            passed = [None if place in refused else picture for place, picture in enumerate(pictures)]
            raise RefusedError(_count("picture", refused), refused, passed)
        return result

    def _refused(self, pictures: Sequence[object]) -> dict[int, str]:
        """Give the reasons for refused pictures, by index; pictures that cannot be judged are refused."""
        if self._pictures is None:
            return {}
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            return dict.fromkeys(range(len(pictures)), "it is no picture that the detector could look at")
        seen = self._pictures(cast("Sequence[Image.Image]", pictures))
        if len(seen) != len(pictures):
            return dict.fromkeys(range(len(pictures)), f"the detector gave {len(seen)} answers for {len(pictures)}")
        return {
            place: "the detector flags it" if flagged else f"the detector cannot judge it ({_reason(answer)})"
            for place, answer in enumerate(seen)
            if (flagged := getattr(answer, "flagged", None)) is not False
        }

    def _note(self, error: BaseException, texts: Mapping[str, Sequence[str]]) -> None:
        """Log why a call failed."""
        if self.audit is None or (isinstance(error, RefusedError) and error.pictures):
            return
        event = "refused" if isinstance(error, LockedError) else "failed"
        logged_prompts = self.audit.as_logged([text for each in texts.values() for text in each])
        # Errors from other code may quote a prompt, so they are not logged.
        reason = visible(error, 500) if isinstance(error, LockedError | VerificationError) else ""
        self.audit.write(event, kind=type(error).__name__, message=reason, prompts=logged_prompts)

    # Others -------------------------------------------------------------------------------------------------------

    def shared_with(self, pipe: DiffusionPipeline) -> None:
        """Apply this lock, with its checks, log and key, to another pipeline on the same networks."""
        gates = None if self._gates is None else Gates(pipe)
        vars(pipe)[LOCK] = Lock(
            pipe, self.locked, self.key, gates, self._pictures, self.audit, self.share, owns_audit=self.owns_audit
        )


def lock(
    pipe: DiffusionPipeline,
    *,
    refuse: Collection[Refusable] = (),
    prompts: bool = False,
    pictures: Looks | None = None,
    audit: AuditLog | str | Path | None = None,
    share: float = SHARE,
) -> str:
    """Lock the erasures of a pipeline; see `ErasureMixin.lock_erasures`."""
    if Lock.of(pipe) is not None:
        raise LockedError("this pipeline is locked: unlock_erasures(key) first, with the key that lock_erasures gave")
    names = {refuse} if isinstance(refuse, str) else set(refuse)
    if unknown := sorted(names - set(guards.REFUSABLE)):
        raise OptionError(
            f"refuse= names {unknown[0]!r}, which a lock knows nothing of; there are: {', '.join(guards.REFUSABLE)}. "
            "All that goes around an erasure by words or embeddings is refused anyway"
        )
    if not 0 < share < 1:
        raise OptionError(f"share={share!r}: give the share of the time that whole verifications may take, 0 to 1")
    manager, modules = ErasureManager(pipe), components_of(pipe)
    log = AuditLog(audit) if isinstance(audit, str | Path) else audit
    locked, key = Locked(frozenset(names)), secrets.token_urlsafe(24)
    try:
        with Lease(modules.values(), exclusive=True):
            states = states_of(pipe)
            if guards.lock_of(states.values()) is not None:
                raise LockedError(
                    "the networks of this pipeline are locked through another pipeline: unlock that first"
                )
            if not manager.active_erasures():
                raise AttachError(
                    "no erasure is in force, so there is nothing to lock: erase() or load_erasure() first"
                )
            gates, owns = Gates(pipe) if prompts else None, log is not audit
            made = Lock(pipe, locked, key, gates, pictures, log, share, owns_audit=owns)
            _log_locked(pipe, made, prompts)
            for state in states.values():
                state.locked = locked
            vars(pipe)[LOCK] = made
    except BaseException:
        if log is not None and log is not audit:
            log.close()
        raise
    return key


def unlock(pipe: DiffusionPipeline, key: str) -> None:
    """Unlock the erasures of a pipeline; see `ErasureMixin.unlock_erasures`."""
    held = Lock.of(pipe)
    if held is None:
        raise LockedError("this pipeline is not locked, so there is nothing to unlock")
    if not isinstance(key, str) or not hmac.compare_digest(key.encode(), held.key.encode()):
        if held.audit is not None:
            held.audit.write("refused", kind="LockedError", message="another key was given to unlock", prompts=None)
        raise LockedError("this key does not unlock this pipeline: pass the one that lock_erasures gave")
    with Lease(components_of(pipe).values(), exclusive=True):
        if held.audit is not None and guards.lock_of(states_of(pipe).values()) is not None:
            held.audit.write("unlocked", calls=held.costs.calls)
        for state in states_of(pipe).values():
            if state.locked is held.locked:
                state.locked = None
        del vars(pipe)[LOCK]
        if held.audit is not None and held.owns_audit:
            held.audit.close()


@contextmanager
def calling(pipe: DiffusionPipeline, given: Mapping[str, Any]) -> Iterator[Callable[[Any], Any]]:
    """Check a call of a drop-in pipeline by its lock; do nothing without one."""
    held = Lock.of(pipe)
    if held is None:
        guards.check_call(components_of(pipe), given)
        yield lambda result: result
        return
    with held.call(pipe, given) as settled:
        yield settled


def share(pipe: DiffusionPipeline, other: DiffusionPipeline) -> None:
    """Lock another pipeline on the same networks by this one's lock, if there is one."""
    held = Lock.of(pipe)
    if held is not None:
        held.shared_with(other)


def texts_of(given: Mapping[str, Any]) -> dict[str, list[str]]:
    """Give the texts of a call, by name of the argument."""
    found = {}
    for name, value in given.items():
        if name.rstrip("0123456789_") in TEXTS and value is not None:
            listed = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
            found[name] = [text for text in listed if isinstance(text, str)]
    return found


def digest_of(picture: object) -> str:
    """Compute the sha256 of a picture's size and RGB values, or of another result's values."""
    if isinstance(picture, Image.Image):
        content = picture.convert("RGB").tobytes()
        return hashlib.sha256(f"{picture.width}x{picture.height}".encode() + content).hexdigest()
    values = picture.detach().float().cpu().numpy() if hasattr(picture, "detach") else np.asarray(picture)
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _pictures_of(result: Any) -> list[object]:
    """List a call's results."""
    images = getattr(result, "images", None)
    if images is None:
        images = result[0] if isinstance(result, tuple) else result
    return list(images)


def _reason(answer: object) -> str:
    return visible(getattr(answer, "reason", None) or "it gave no answer", 200)


def _count(what: str, refused: Mapping[int, str]) -> str:
    place, why = next(iter(refused.items()))
    return f"{len(refused)} {what}{'s are' if len(refused) > 1 else ' is'} refused; number {place}: {why}"


def _log_locked(pipe: DiffusionPipeline, made: Lock, prompts: bool) -> None:
    if made.audit is not None:
        name, commit = origin(pipe)
        made.audit.write(
            "locked", erasures=made.erasures, model=visible(name, 300), commit=commit, tensors=made.tensors,
            refuses=sorted(made.locked.refuses), checks_prompts=prompts, checks_pictures=made._pictures is not None,
            versions=library_versions(),
        )  # fmt: skip
