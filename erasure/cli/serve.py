"""`erasure serve`: a pipeline with erasures as an HTTP service that nothing goes around."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from erasure.cli.arguments import UsageError
from erasure.cli.described import parse_with
from erasure.cli.models import ErasedModelOptions, attach, check_strengths, load_erasures, open_model
from erasure.cli.terminal import Terminal
from erasure.picture_record import called
from erasure.serving.limits import Limits

if TYPE_CHECKING:
    from erasure.eval.detectors import NamedDetector
    from erasure.locking import AuditLog

KEY = "ERASURE_AUDIT_KEY"
"""Variable of the environment with the secret of the audit log."""
ABOUT = (
    "Serve a model with erasures over HTTP: POST /generate, GET /health, GET /erasures. The pipeline is locked: "
    "requests that bypass its erasures are refused, and the erasures are verified before every batch. Needs the extra "
    "'serve' of this package."
)


@dataclass(kw_only=True)
class ServeOptions(ErasedModelOptions):
    """Model, erasures, address and checks of the service."""

    host: str = "127.0.0.1"
    """Address to listen on; the default can be reached from this machine only. The service has no password: put a
    server that asks for one in front of it."""
    port: int = 8000
    """Port to listen on; 0 for any free port."""
    check_prompts: bool = False
    """Refuse prompts in which the gates of an erasure find its concept (erasures made with itd or spm)."""
    detector: str | None = None
    """Detector that checks every picture, see `erasure detect`: pictures that it flags, or cannot judge, are not
    sent."""
    detector_option: tuple[str, ...] = ()
    """Options of the detector, each as NAME=VALUE."""
    audit: Path | None = None
    """Log of every request, chained so that a change is noticed; `erasure log` checks it. The variable
    ERASURE_AUDIT_KEY may hold a secret for it."""
    audit_prompts: Literal["digest", "clear", "none"] = "digest"
    """How prompts are logged: as digests, as plain text, or not at all."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    parsed = parse_with(ServeOptions, Limits(), "serve", argv, ABOUT)
    options: ServeOptions = parsed.command
    limits: Limits = parsed.options
    check_strengths(options)
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: give a port from 0 to 65535")
    if options.detector is None and options.detector_option:
        raise UsageError("--detector-option says how a detector works: name one with --detector")
    from erasure.extras import require

    for module in ("fastapi", "uvicorn"):
        require(module)
    from erasure.serving.server import listen

    bound = listen(options.host, options.port)
    try:
        serve(options, limits, bound, terminal)
    finally:
        bound.close()


def serve(options: ServeOptions, limits: Limits, bound: object, terminal: Terminal) -> None:
    """Load everything, lock it, and answer until the process is told to stop."""
    import socket

    from erasure.guards import REFUSABLE
    from erasure.locking import lock
    from erasure.serving.app import Service
    from erasure.serving.server import serve as answer

    assert isinstance(bound, socket.socket), "the port is taken ahead of all that takes time"
    detector = None if options.detector is None else named_detector(options.detector, options.detector_option)
    erasures = load_erasures(options)
    log = opened_log(options)
    try:
        pipe = open_model(options)
        manager = attach(pipe, erasures, options.strength)
        if not manager.active_erasures():
            raise UsageError(
                "no erasure is in force: give --erasure, or a model that save_erased_pipeline(fuse=False) has written"
            )
        pictures = None
        if detector is not None:
            from erasure.eval.detectors import ask
            from erasure.eval.detectors.controls import self_test

            terminal.say(self_test(detector).remark)
            pictures = partial(ask, detector)
        lock(pipe, refuse=REFUSABLE, prompts=options.check_prompts, pictures=pictures, audit=log)
        service = Service(pipe, called(options.model), limits)
    except BaseException:
        if log is not None:
            log.close()
        raise
    names = ", ".join(service.lock.erasures)
    answer(service, bound, lambda address: terminal.say(f"Serving {options.model} without {names} on {address}"))
    figures = service.batcher.figures
    terminal.say(f"Stopped: {figures.drawn} pictures drawn, {figures.refused} refused, {figures.failed} failed")


def opened_log(options: ServeOptions) -> AuditLog | None:
    """The audit log, if one is wanted."""
    if options.audit is None:
        return None
    from erasure.locking import AuditLog

    return AuditLog(options.audit, key=secret(), prompts=options.audit_prompts)


def secret() -> bytes | None:
    """The secret of audit logs, if the environment has one."""
    return os.environ[KEY].encode() if os.environ.get("ERASURE_AUDIT_KEY") else None


def named_detector(name: str, given: Sequence[str]) -> NamedDetector:
    """A detector by name, with options as `NAME=VALUE`.

    Raises:
        ErasureError: There is no such detector, or it does not have such an option.
    """
    from erasure.eval.detectors import DETECTORS

    options: dict[str, object] = {}
    for each in given:
        option, equals, value = each.partition("=")
        if not equals:
            raise UsageError(f"--detector-option {each!r:.100}: write NAME=VALUE")
        try:
            options[option.replace("-", "_")] = json.loads(value)
        except ValueError:
            options[option.replace("-", "_")] = value
    return DETECTORS.get(name).configured(None, **options)
