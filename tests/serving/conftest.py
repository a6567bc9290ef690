"""A service on loopback, of the tiny pipeline with an erasure of its text encoder, and what asks it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="extra serve is not installed")
pytest.importorskip("uvicorn", reason="extra serve is not installed")

import erasure
from erasure import Concept, Erasure
from erasure.guards import REFUSABLE
from erasure.locking import lock
from erasure.pipelines import StableDiffusionErasurePipeline
from erasure.serving.app import Service
from erasure.serving.limits import Limits
from erasure.serving.server import running


class Answer(NamedTuple):
    """What a service has answered."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.content)

    @property
    def code(self) -> str:
        """The word of an error."""
        return str(self.told["error"]["code"])

    @property
    def message(self) -> str:
        return str(self.told["error"]["message"])


class Client:
    """Asks a service, with a connection for each request."""

    def __init__(self, address: str) -> None:
        self.host = urlsplit(address).netloc

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.host, timeout=120)
        try:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, found, answer.read())
        finally:
            connection.close()

    def generate(self, prompt: object = "a photo of a house", *, accept: str = "*/*", **fields: Any) -> Answer:
        body = json.dumps({"prompt": prompt, "steps": 1, "height": 32, "width": 32, **fields}).encode()
        return self.ask("POST", "/generate", body, content_type="application/json", accept=accept)

    def many(self, asked: list[dict[str, Any]]) -> list[Answer]:
        """Ask all at once."""
        with ThreadPoolExecutor(len(asked)) as threads:
            return list(threads.map(lambda fields: self.generate(**fields), asked))


@pytest.fixture(scope="session")
def cat(tiny_pipe_original: Any) -> Erasure:
    """An erasure in the text encoder."""
    concept = Concept("cat", anchor="dog")
    return erasure.erase(tiny_pipe_original, concept, "diff_quickfix", attach=False, progress=False)


@pytest.fixture
def pipe(tiny_pipe: Any, cat: Erasure) -> Any:
    drawn = StableDiffusionErasurePipeline.from_pipe(tiny_pipe)
    drawn.set_progress_bar_config(disable=True)
    drawn.load_erasure(cat, "cat")
    return drawn


@pytest.fixture
def start(pipe: Any) -> Iterator[Any]:
    """Starts a service with limits, and locks as they are told; gives it and its client."""
    with ExitStack() as stack:

        def begin(locks: Mapping[str, Any] | None = None, **limits: Any) -> tuple[Service, Client]:
            lock(pipe, **{"refuse": REFUSABLE, **(locks or {})})
            service = Service(pipe, "tiny", Limits(**limits))
            return service, Client(stack.enter_context(running(service)))

        yield begin


class Gate:
    """Keeps a pipeline from drawing until it is opened."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        encode = pipe.encode_prompt

        def waiting(*args: Any, **kwargs: Any) -> Any:
            self.reached.set()
            assert self.opened.wait(60)
            return encode(*args, **kwargs)

        monkeypatch.setattr(pipe, "encode_prompt", waiting)


@pytest.fixture
def gate(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(pipe, monkeypatch)
    yield made
    made.opened.set()
