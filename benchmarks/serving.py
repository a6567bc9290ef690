"""`python -m benchmarks serving`: many requests at once to a service on loopback, every picture judged."""

from __future__ import annotations

import base64
import http.client
import io
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import erasure
from benchmarks import PROGRAM
from erasure.cli.arguments import parse
from erasure.cli.terminal import Terminal
from erasure.errors import EvaluationError
from erasure.eval.detectors import CanvasJudge
from erasure.files import write_json
from erasure.guards import REFUSABLE
from erasure.locking import AuditLog, Lock, lock, verify_log
from erasure.serving.app import Service
from erasure.serving.limits import Limits
from erasure.serving.server import running

CONTROL = 0.75
"""Share of the stock model's pictures in which the judge must see the concept, so that its absence says something."""
CONTROLS = 16
"""Pictures of the stock model that are looked at."""
CONFIDENT = 0.5
"""Score from which the judge sees an object."""


@dataclass(kw_only=True)
class Serving:
    """Ask a service on loopback for many pictures at once: none may be lost, and none show what is erased.

    The service is that of `erasure serve`, in this process: locked, verified ahead of every batch, and logged. Half of
    the requests name the erased concept, the others further objects of the embedded world, whose judge looks at every
    picture. How often it sees what was asked for in the others is told as well: a service that drew nothing would
    erase everything.
    """

    model: str = "canvas-sd"
    """Embedded model."""
    concept: str = "cat"
    """Object to erase."""
    strategy: str = "uce"
    """Method of erasure, with its own options."""
    others: tuple[str, ...] = ("dog", "car", "house")
    """Objects that are not erased."""
    requests: int = 200
    """Requests, all sent at once."""
    steps: int = 6
    """Denoising steps: fewer than the model is made for, so that it is the service that is measured."""
    batch_size: int = 16
    """Pictures that are drawn at once."""
    out: Path | None = None
    """File with the figures."""


class Asked(NamedTuple):
    """One request and what came of it."""

    word: str
    status: int
    seconds: float
    picture: Image.Image | None


def run(argv: Sequence[str], terminal: Terminal) -> int:
    """Carry out the benchmark; gives 0 where nothing was lost and nothing unerased."""
    options = parse(Serving, "serving", argv, program=PROGRAM)
    figures = measure(options)
    terminal.say(*(f"{name}: {value}" for name, value in figures.items()))
    if options.out is not None:
        write_json(options.out, figures)
    good = figures["lost"] == 0 and figures["unerased"] == 0
    if not good:
        terminal.complain("error", "pictures were lost, or show what is erased")
    return 0 if good else 1


def measure(options: Serving) -> dict[str, object]:
    """The figures of a load test.

    Raises:
        EvaluationError: The judge does not know a word, or does not see the concept in what the stock model draws in
            so few steps.
    """
    judge = CanvasJudge()
    if unknown := [word for word in (options.concept, *options.others) if word not in judge.object_names]:
        raise EvaluationError(f"the judge knows no {unknown[0]!r}; it knows {', '.join(judge.object_names)}")
    pipe = erasure.load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    control = sees(judge, drawn(pipe, options), options.concept)
    if control < CONTROL:
        raise EvaluationError(
            f"the judge sees {options.concept!r} in {control:.0%} of the stock model's pictures of {options.steps} "
            f"steps, at least {CONTROL:.0%} are needed to tell whether it is erased: give more --steps"
        )
    erasure.erase(pipe, options.concept, options.strategy, progress=False)
    limits = Limits(max_queue=options.requests, batch_size=options.batch_size, wait=0.1)
    with tempfile.TemporaryDirectory() as scratch:
        log = AuditLog(Path(scratch) / "audit.jsonl", key=b"the secret of one load test")
        lock(pipe, refuse=REFUSABLE, audit=log)
        service = Service(pipe, options.model, limits)
        started = time.perf_counter()
        with running(service) as address:
            answers = ask_all(address, options)
            seconds = time.perf_counter() - started
        logged = verify_log(log.path, key=b"the secret of one load test", head=log.head)
    return {
        "requests": len(answers), "lost": sum(each.picture is None for each in answers),
        **judged(judge, answers, options), "seen in pictures of the stock model": round(control, 3),
        **times(answers), "pictures per second": round(len(answers) / seconds, 2),
        "batches": service.batcher.figures.batches, "log lines": logged.lines,
        "share of verification": round(held.costs.share, 5) if (held := Lock.of(pipe)) else None,
        "whole verifications": held.costs.verifications if held else None,
        "model": options.model, "strategy": options.strategy, "steps": options.steps,
    }  # fmt: skip


def drawn(pipe: DiffusionPipeline, options: Serving) -> list[Image.Image]:
    """Pictures of the concept by the stock model, in as many steps as are asked for later."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(CONTROLS)]
    prompts = [prompt(options.concept)] * CONTROLS
    images: list[Image.Image] = pipe(prompts, generator=generators, num_inference_steps=options.steps).images
    return images


def prompt(word: str) -> str:
    """Request of one word, by its number: each draws another picture."""
    return f"a photo of a {word}"


def sees(judge: CanvasJudge, pictures: Sequence[Image.Image], word: str) -> float:
    """Share of pictures in which the judge sees an object."""
    return sum(each.object_scores[word] >= CONFIDENT for each in judge(pictures)) / len(pictures)


def ask_all(address: str, options: Serving) -> list[Asked]:
    """Every request at once, each by a connection and a thread of its own."""
    words = [
        options.concept if index % 2 else options.others[index // 2 % len(options.others)]
        for index in range(options.requests)
    ]
    with ThreadPoolExecutor(options.requests) as threads:
        return list(threads.map(lambda seed, word: ask(address, seed, word, options.steps), range(len(words)), words))


def ask(address: str, seed: int, word: str, steps: int) -> Asked:
    """One request; without a picture where it fails in any way."""
    body = json.dumps({"prompt": prompt(word), "seed": seed, "steps": steps})
    started = time.perf_counter()
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=3600)
    try:
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        told = json.loads(answer.read())
        picture = None
        if answer.status == 200:
            picture = Image.open(io.BytesIO(base64.b64decode(told["images"][0]["png"])))
            picture.load()
        return Asked(word, answer.status, time.perf_counter() - started, picture)
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return Asked(word, 0, time.perf_counter() - started, None)
    finally:
        connection.close()


def judged(judge: CanvasJudge, answers: Sequence[Asked], options: Serving) -> dict[str, object]:
    """In how many pictures the judge sees the erased concept, and how often what else was asked for."""
    there = [each for each in answers if each.picture is not None]
    found = judge([each.picture for each in there if each.picture is not None])
    pairs = list(zip(there, found, strict=True))
    unerased = sum(each.object_scores[options.concept] >= CONFIDENT for _, each in pairs)
    others = [each.object_scores[asked.word] >= CONFIDENT for asked, each in pairs if asked.word != options.concept]
    return {"unerased": unerased, "others that show what was asked for": f"{sum(others)} of {len(others)}"}


def times(answers: Sequence[Asked]) -> dict[str, object]:
    """Seconds from request to answer."""
    seconds = [each.seconds for each in answers]
    return {f"p{share} seconds": round(float(np.percentile(seconds, share)), 3) for share in (50, 95)}
