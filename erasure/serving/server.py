"""The service on a port."""

from __future__ import annotations

import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from erasure.errors import OptionError
from erasure.serving.app import Service, application

BACKLOG = 2048
"""Connections that wait to be taken."""


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket to an address, before anything that takes long.

    Args:
        host: Address of this machine.
        port: Number of the port, 0 for one that is free.

    Raises:
        OptionError: Another program has the port, it needs more rights, or the address is not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise OptionError(f"--host {host!r:.100} is no address ({error}): 127.0.0.1 is this machine alone") from error
    family, kind, _, _, bound_to = found[0]
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(bound_to)
        # Two programs could be bound to a port that neither listens on.
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        why = {
            errno.EADDRINUSE: "another program has it: stop that, give another --port, or --port 0 for a free one",
            errno.EACCES: "ports below 1024 need more rights: give another --port",
            errno.EADDRNOTAVAIL: "it is no address of this machine: 127.0.0.1 is this machine alone",
        }.get(error.errno or 0, str(error))
        raise OptionError(f"cannot listen on {host}:{port}: {why}") from error
    return made


class _Server(uvicorn.Server):
    """A server that reports when it is ready."""

    def __init__(
        self, app: ASGIApp, bound: socket.socket, ready: Callable[[str], None], patience: int | None = None
    ) -> None:
        # A connection that nobody uses must not keep the process from ending.
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=5,
            timeout_graceful_shutdown=patience,
        )  # fmt: skip
        super().__init__(config)
        self.bound, self.ready = bound, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start answering requests."""
        await super().startup(sockets)
        if self.started:
            self.ready(address_of(self.bound))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop in order on a signal; uvicorn itself would raise the signal again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def address_of(bound: socket.socket) -> str:
    """Give the address of a socket as a URL."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(service: Service, bound: socket.socket, ready: Callable[[str], None] = lambda address: None) -> None:
    """Answer requests until the process is told to stop (Ctrl-C, SIGTERM); what was accepted is answered first.

    Args:
        service: What answers.
        bound: See `listen`.
        ready: Is told the address when requests are answered.
    """
    answer(application(service), bound, ready)


def answer(
    app: ASGIApp, bound: socket.socket, ready: Callable[[str], None] = lambda address: None,
    patience: int | None = None,
) -> None:  # fmt: skip
    """Answer the requests for an application until the process is told to stop (Ctrl-C, SIGTERM).

    Args:
        app: What answers.
        bound: See `listen`.
        ready: Is told the address when requests are answered.
        patience: Seconds that answers under way have left then; as long as they take when left out.
    """
    _Server(app, bound, ready, patience).run([bound])


@contextmanager
def running(
    service: Service | ASGIApp, host: str = "127.0.0.1", port: int = 0, patience: int | None = None
) -> Iterator[str]:
    """A service in a thread of its own while the block lasts; gives its address.

    Args:
        service: What answers: a service, or any application. It has ended when the block has.
        host: See `listen`.
        port: See `listen`.
        patience: See `answer`.

    Raises:
        OptionError: See `listen`.
    """
    app = application(service) if isinstance(service, Service) else service
    bound, begun = listen(host, port), threading.Event()
    server = _Server(app, bound, lambda address: begun.set(), patience)
    thread = threading.Thread(target=server.run, args=([bound],), name="erasure-serving", daemon=True)
    thread.start()
    try:
        while not begun.wait(0.1):
            if not thread.is_alive():
                raise OptionError("the service did not begin to answer: its log says why")
        yield address_of(bound)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()
