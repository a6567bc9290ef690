"""The service's addresses and answers."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import numpy as np
from diffusers import DiffusionPipeline
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from erasure import __version__
from erasure.attach import ErasureManager
from erasure.cache import model_fingerprint
from erasure.images import png
from erasure.locking import Lock
from erasure.picture_record import FORMAT, AttachedErasure, PictureRecord
from erasure.serving.batches import Batcher
from erasure.serving.drawings import Drawing, GenerateRequest, Problem, drawings
from erasure.serving.limits import Limits
from erasure.shown import visible
from erasure.world import World

LINGER = 2.0
"""Seconds in which a client may send the rest of a refused request, so that it comes to read the answer."""


class _LimitedBody:
    """Refuses the bodies of requests that are too long, before they are read.

    Args:
        app: What is behind it.
        most: Bytes.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not said.isdigit() or int(said) > self.most:
            await self._refuse(scope, receive, send)
            return
        # What is sent in pieces says no length. It is read here, since nothing can be answered half-way.
        content, ended = b"", False
        while not ended:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            content += message.get("body", b"")
            ended = not message.get("more_body", False)
            if len(content) > self.most:
                await self._refuse(scope, receive, send)
                return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": content, "more_body": False}

        await self.app(scope, again, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer at once, then throw away what still comes.

        A connection that is closed while its client sends is lost to the client, with the answer in it.
        """
        message = f"the request is longer than {self.most:,} bytes: shorten the prompt"
        problem = Problem(413, "too_large", message, {"Connection": "close"})

        async def held_open(message: Message) -> None:
            await send({**message, "more_body": True} if message["type"] == "http.response.body" else message)

        await JSONResponse(problem.body(), problem.status, problem.headers)(scope, receive, held_open)
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b""})


class Service:
    """A locked pipeline with its queue.

    Args:
        pipe: The pipeline, locked.
        model: What it is called in answers.
        limits: What requests may ask for.
    """

    def __init__(self, pipe: DiffusionPipeline, model: str, limits: Limits) -> None:
        held = Lock.of(pipe)
        if held is None:
            raise ValueError("the pipeline is not locked: lock_erasures() first")
        self.pipe, self.model, self.limits, self.lock = pipe, model, limits, held
        self.world = World.of(pipe)
        self.fingerprint = model_fingerprint(ErasureManager(pipe).stock())
        self.erasures: list[AttachedErasure] = [
            {
                "name": name, "strategy": str(health["strategy"]), "fingerprint": str(health["fingerprint"]),
                "strength": health["strength"],
            }
            for name, health in held.erasures.items()
        ]  # fmt: skip
        self.batcher = Batcher(pipe, limits)
        self.started = time.time()

    async def draw(self, request: GenerateRequest) -> list[tuple[Drawing, bytes]]:
        """Draw the pictures of a request, as PNG files.

        Raises:
            Problem: It asks for too much, is refused, or cannot be drawn.
        """
        wanted = drawings(request, self.limits, self.world, self.pipe)
        futures = self.batcher.submit(wanted)
        try:
            pictures = await asyncio.wait_for(_all(futures), self.limits.timeout)
        except TimeoutError:
            for future in futures:
                future.cancel()
            raise Problem(504, "late", f"not drawn within {self.limits.timeout:g} s: ask for less, or later") from None
        return [
            (drawing, png(picture, self.record(drawing))) for drawing, picture in zip(wanted, pictures, strict=True)
        ]

    def record(self, drawing: Drawing) -> PictureRecord:
        """Make the record of a picture's origin."""
        record: PictureRecord = {
            "format": FORMAT, "version": __version__, "command": "serve", "model": self.model,
            "fingerprint": self.fingerprint, "erasures": self.erasures, "prompt": drawing.prompt,
            "seed": drawing.seed, "settings": {name: value for name, value in drawing.settings},
        }  # fmt: skip
        if drawing.negative_prompt:
            record["negative_prompt"] = drawing.negative_prompt
        return record

    def health(self) -> dict[str, object]:
        """Report the state of the service."""
        batcher, figures, costs = self.batcher, self.batcher.figures, self.lock.costs
        status = "failing" if batcher.failure else "stopping" if batcher.closing else "ok"
        seconds, log = list(figures.seconds), self.lock.audit
        times = [round(float(value), 4) for value in np.percentile(seconds, [50, 95])] if seconds else None
        return {
            "status": status, "reason": batcher.failure, "model": self.model, "erasures": list(self.lock.erasures),
            "locked": True, "waiting": batcher.waiting, "limit": self.limits.max_queue, "accepted": figures.accepted,
            "drawn": figures.drawn, "refused": figures.refused, "failed": figures.failed,
            "turned_away": figures.turned_away, "batches": figures.batches, "seconds_p50_p95": times,
            "verified_tensors": self.lock.tensors,
            "share_of_verification": round(costs.share, 5), "whole_verifications": costs.verifications,
            "log_lines": log.lines if log else None, "log_head": log.head if log else None,
            "up_seconds": round(time.time() - self.started),
        }  # fmt: skip


async def _all(futures: list[Future[Image.Image]]) -> list[Image.Image]:
    """Wait for all pictures, and raise the first problem then; every accepted picture is drawn."""
    results = await asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if isinstance(result, Image.Image)]


def application(service: Service) -> FastAPI:
    """The service as an ASGI application; when it is shut down, what was accepted is drawn first."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)
        if service.lock.audit is not None:
            service.lock.audit.close()

    # No pages of its own: they would load scripts from elsewhere.
    app = FastAPI(title="erasure", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(_LimitedBody, most=service.limits.max_body)

    @app.exception_handler(Problem)
    async def problem(_: Request, error: Problem) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return await problem(_, _of_validation(error))

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        asked = f"{visible(request.method, 20)} {visible(request.url.path, 200)}"
        message = f"{asked}: {error.detail}. There are POST /generate, GET /health and GET /erasures"
        headers = dict(error.headers or {})
        return await problem(request, Problem(error.status_code, "no_such_address", message, headers))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        return await problem(request, Problem(500, "failed", f"the service failed ({type(error).__name__})"))

    @app.post("/generate", response_model=None)
    async def generate(request: Request, wanted: Annotated[GenerateRequest, Body()]) -> Response:
        started = time.perf_counter()
        drawn = await service.draw(wanted)
        if "image/png" in request.headers.get("accept", ""):
            if len(drawn) > 1:
                raise Problem(406, "invalid", f"{len(drawn)} pictures do not fit into one PNG file: accept JSON")
            return Response(drawn[0][1], media_type="image/png", headers={"X-Seed": str(drawn[0][0].seed)})
        images = [{"seed": each.seed, "png": base64.b64encode(content).decode()} for each, content in drawn]
        seconds = round(time.perf_counter() - started, 4)
        return JSONResponse({"images": images, "erasures": list(service.lock.erasures), "seconds": seconds})

    @app.get("/health", response_model=None)
    async def health() -> Response:
        health = service.health()
        return JSONResponse(health, 200 if health["status"] == "ok" else 503)

    @app.get("/erasures", response_model=None)
    async def erasures() -> Response:
        listed = [{"name": name, **health} for name, health in service.lock.erasures.items()]
        refuses = sorted(service.lock.locked.refuses)
        return JSONResponse({"model": service.model, "erasures": listed, "refuses": refuses})

    return app


def _of_validation(error: RequestValidationError) -> Problem:
    """Describe what is wrong with a body, without its content."""
    found = error.errors()
    if any(each["type"] == "json_invalid" for each in found):
        return Problem(400, "invalid", "the body is no JSON: send an object with a 'prompt'")
    first = found[0]
    where = ".".join(str(step) for step in first["loc"] if step != "body")
    known = ", ".join(GenerateRequest.model_fields)
    messages: dict[str, Callable[[], str]] = {
        "extra_forbidden": lambda: f"{visible(where, 100)} is no field of a request",
        "missing": lambda: f"{where or 'the body'} is missing",
    }
    said = messages.get(str(first["type"]), lambda: f"{visible(where, 100) or 'the body'}: {first['msg']}")()
    return Problem(422, "invalid", f"{said}. A request is an object in JSON with these fields: {known}")
