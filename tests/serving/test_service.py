"""What the service answers: pictures, refusals, and why."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erasure import ErasureManager
from erasure.cache import model_fingerprint
from erasure.errors import OptionError
from erasure.eval.detectors import Finding, ask
from erasure.interop import paths
from erasure.locking import AuditLog, verify_log
from erasure.picture_record import read_record
from erasure.serving.limits import Limits
from erasure.serving.server import listen
from erasure.state import ComponentState


def picture(png: str | bytes) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(png) if isinstance(png, str) else png))


def test_pictures_are_those_of_the_pipeline_and_say_what_made_them(pipe: Any, start: Any, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    expected = pipe("a photo of a house", height=32, width=32, num_inference_steps=1, generator=generator).images[0]
    _, client = start()
    answer = client.generate(seed=7, count=2)
    assert answer.status == 200
    assert answer.told["erasures"] == ["cat"]
    assert [image["seed"] for image in answer.told["images"]] == [7, 8]
    first = picture(answer.told["images"][0]["png"])
    assert np.abs(np.asarray(first).astype(int) - np.asarray(expected)).max() <= 1
    (tmp_path / "one.png").write_bytes(base64.b64decode(answer.told["images"][0]["png"]))
    made = read_record(tmp_path / "one.png")
    assert (made["command"], made["seed"], made["prompt"]) == ("serve", 7, "a photo of a house")
    assert made["settings"]["num_inference_steps"] == 1
    assert [each["name"] for each in made["erasures"]] == ["cat"]
    assert made["fingerprint"] == model_fingerprint(ErasureManager(pipe).stock())
    single = client.generate("ein Haus im Überfluß 🏠", seed=7, accept="image/png")
    assert single.headers["content-type"] == "image/png"
    assert single.headers["x-seed"] == "7"
    assert json.loads(picture(single.content).text["erasure"])["prompt"] == "ein Haus im Überfluß 🏠"
    assert client.generate(count=2, accept="image/png").status == 406


def test_it_says_what_is_erased_and_how_it_is(start: Any) -> None:
    service, client = start()
    assert client.generate().status == 200
    told = client.ask("GET", "/erasures").told
    assert [(each["name"], each["concepts"], each["strength"]) for each in told["erasures"]] == [("cat", ["cat"], 1.0)]
    assert len(told["erasures"][0]["fingerprint"]) == 16
    assert told["refuses"] == ["controls", "image_prompts", "loras", "noise", "pictures", "schedulers"]
    health = client.ask("GET", "/health")
    assert health.status == 200
    told = health.told
    assert (told["status"], told["accepted"], told["drawn"], told["waiting"]) == ("ok", 1, 1, 0)
    assert health.told["verified_tensors"] == service.lock.tensors > 0
    assert len(health.told["seconds_p50_p95"]) == 2


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "x" * 2001}, "prompt has 2,001 characters, at most 2,000 are allowed"),
        ({"negative_prompt": "x" * 2001}, "negative_prompt has 2,001 characters"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": "a \ud800"}, "half a character"),
        ({"prompt": ["a", "b"]}, "prompt: Input should be a valid string"),
        ({"prompt": "a <my-pet>"}, "<my-pet>"),
        ({"steps": 101}, "steps is 101, allowed: 1 to 100"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1.5}, "steps: Input should be a valid integer"),
        ({"count": 5}, "count is 5, allowed: 1 to 4"),
        ({"count": True}, "count: "),
        ({"height": 1032}, "height is 1,032, allowed: 8 to 1,024"),
        ({"width": 33}, "33"),
        ({"guidance": 51}, "guidance is 51"),
        ({"guidance": float("nan")}, "guidance"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is"),
        ({"prompt_embeds": [[0.0]]}, "prompt_embeds is no field of a request"),
        ({"latents": [0.0]}, "latents is no field of a request"),
    ],
)
def test_what_a_request_may_not_ask_for(start: Any, fields: dict[str, Any], said: str) -> None:
    service, client = start()
    answer = client.generate(**fields)
    assert (answer.status, answer.code) in {(422, "invalid"), (400, "invalid")}
    assert said in answer.message
    assert service.batcher.figures.batches == 0


def test_bodies_that_are_none_or_too_long(start: Any) -> None:
    _, client = start()
    long = client.generate("x" * 100_000)
    assert (long.status, long.code) == (413, "too_large")
    assert "65,536 bytes" in long.message
    pieces = client.ask("POST", "/generate", iter([b"x" * 10_000] * 10), content_type="application/json")  # type: ignore[arg-type]
    assert (pieces.status, pieces.code) == (413, "too_large")
    for body in (b"", b"{", b"\xff\xfe", b"[1]", b'"a"', b"{}"):
        answer = client.ask("POST", "/generate", body, content_type="application/json")
        assert answer.status in (400, 422), body
        assert "prompt" in answer.message
    assert client.ask("POST", "/generate", b"prompt=a").status == 422
    assert client.ask("GET", "/generate").status == 405
    elsewhere = client.ask("GET", "/docs")
    assert (elsewhere.status, elsewhere.code) == (404, "no_such_address")
    assert "POST /generate" in elsewhere.message


@pytest.mark.parametrize("in_pieces", [True, False])
def test_a_client_that_goes_on_sending_reads_why_it_was_refused(start: Any, in_pieces: bool) -> None:
    """Megabytes do not fit into what a connection buffers: the client still sends when it is answered."""
    _, client = start()
    pieces = [b"x" * 100_000] * 160
    body = iter(pieces) if in_pieces else b"".join(pieces)
    for _ in range(4):
        answer = client.ask("POST", "/generate", body, content_type="application/json")
        assert (answer.status, answer.code) == (413, "too_large")
        body = iter(pieces) if in_pieces else body


def test_a_client_that_never_ends_is_given_up(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("erasure.serving.app.LINGER", 0.2)
    _, client = start()
    with ThreadPoolExecutor(1) as others:
        endless = others.submit(client.ask, "POST", "/generate", repeat(b"x" * 100_000))  # type: ignore[arg-type]
        assert client.generate().status == 200
        assert isinstance(endless.exception(60), ConnectionError)


def test_an_upload_of_two_gigabytes_is_refused_before_it_is_read(start: Any) -> None:
    service, client = start()
    host, _, port = client.host.partition(":")
    lines = ("POST /generate HTTP/1.1", "Host: here", "Content-Type: application/json", "Content-Length: 2147483648")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        # Nothing more is sent: an answer that waited for the body would not come.
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert service.batcher.figures.accepted == 0
    assert client.generate().status == 200


def test_a_flood_of_requests_loses_none(start: Any) -> None:
    """Each is drawn or told to come again, and the counts say how many were."""
    _, client = start(max_queue=4, batch_size=2, wait=0.0)
    answers = client.many([{"seed": seed} for seed in range(100)])
    drawn = [answer for answer in answers if answer.status == 200]
    busy = [answer for answer in answers if answer.status == 429]
    assert len(drawn) + len(busy) == 100
    assert drawn
    assert busy
    assert all(answer.code == "busy" and int(answer.headers["retry-after"]) >= 1 for answer in busy)
    health = client.ask("GET", "/health").told
    assert (health["accepted"], health["drawn"], health["turned_away"]) == (len(drawn), len(drawn), len(busy))
    assert (health["status"], health["waiting"]) == ("ok", 0)


def test_what_the_lock_refuses_is_refused_and_the_rest_of_the_batch_is_drawn(start: Any, gate: Any) -> None:
    def looks(images: Any) -> Any:
        return [Finding(False, 0.0) for _ in images]

    service, client = start({"pictures": partial(ask, _Named(looks))}, batch_size=4, wait=0.2)
    gate.opened.set()
    asked = [{"prompt": "a house", "seed": seed} for seed in range(3)]
    answers = client.many([*asked, {"prompt": "a house", "negative_prompt": "a cat", "guidance": 5.0}])
    assert [answer.status for answer in answers] == [200, 200, 200, 403]
    assert "negative prompt names" in answers[3].message
    assert service.batcher.figures.refused == 1


class _Named:
    name, licence = "stub", "none"

    def __init__(self, looks: Any) -> None:
        self.looks = looks

    def recipe(self) -> dict[str, object]:
        return {}

    def __call__(self, images: Any) -> Any:
        return self.looks(images)


def test_pictures_that_a_detector_flags_are_kept_back_and_the_others_given(start: Any, tmp_path: Any) -> None:
    def looks(images: Any) -> Any:
        return [Finding(index == 1, 0.5) for index, _ in enumerate(images)]

    log = AuditLog(tmp_path / "audit.jsonl")
    service, client = start({"pictures": partial(ask, _Named(looks)), "audit": log}, batch_size=3, wait=2.0)
    answers = client.many([{"seed": seed} for seed in range(3)])
    assert sorted(answer.status for answer in answers) == [200, 200, 403]
    refused = next(answer for answer in answers if answer.status == 403)
    assert (refused.code, refused.message) == ("refused", "the picture is kept back: the detector flags it")
    assert (service.batcher.figures.drawn, service.batcher.figures.refused) == (2, 1)
    assert client.ask("GET", "/health").told["log_head"] == log.head
    assert verify_log(log.path).events["drawn"] == service.batcher.figures.batches


def test_a_full_queue_turns_requests_away(start: Any, gate: Any) -> None:
    service, client = start(max_queue=2, batch_size=1, wait=0.0)
    waiting = [threading.Thread(target=client.generate) for _ in range(3)]
    waiting[0].start()
    assert gate.reached.wait(30)
    for thread in waiting[1:]:
        thread.start()
    until(lambda: service.batcher.waiting == 2)
    answer = client.generate()
    assert (answer.status, answer.code) == (429, "busy")
    assert int(answer.headers["retry-after"]) >= 1
    assert client.ask("GET", "/health").told["turned_away"] == 1
    gate.opened.set()
    for thread in waiting:
        thread.join()
    assert (service.batcher.figures.accepted, service.batcher.figures.drawn) == (3, 3)
    assert client.generate().status == 200


def until(true: Any) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def test_requests_that_wait_too_long_are_given_up(start: Any, gate: Any) -> None:
    service, client = start(timeout=0.5, batch_size=1, wait=0.0)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(client.generate())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(answer.status, answer.code) for answer in answers] == [(504, "late")] * 2
    gate.opened.set()
    until(lambda: service.batcher.waiting == 0)
    service.limits = Limits()
    assert client.generate().status == 200


def test_what_is_alike_is_drawn_together(start: Any, gate: Any) -> None:
    service, client = start(batch_size=4, wait=0.0)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(client.generate)
        assert gate.reached.wait(30)
        others = threads.submit(client.many, [{"seed": seed, "steps": 1 + seed % 2} for seed in range(8)])
        until(lambda: service.batcher.waiting == 8)
        gate.opened.set()
        assert [answer.status for answer in [first.result(), *others.result()]] == [200] * 9
    assert service.batcher.figures.batches == 3


def test_a_request_waits_for_others_until_there_are_enough(start: Any) -> None:
    service, client = start(batch_size=2, wait=60.0)
    assert [answer.status for answer in client.many([{"seed": 1}, {"seed": 2}])] == [200] * 2
    assert service.batcher.figures.batches == 1


def test_a_service_whose_erasure_is_gone_draws_nothing_any_more(pipe: Any, start: Any) -> None:
    service, client = start()
    assert client.generate().status == 200
    state = ComponentState.of(pipe.text_encoder)
    assert state is not None
    with torch.no_grad():
        paths.parameter(pipe.text_encoder, next(iter(state.record.written.terms))).add_(1.0)
    for _ in range(2):
        answer = client.generate()
        assert (answer.status, answer.code) == (503, "unverified")
        assert "not as it was" in answer.message
    health = client.ask("GET", "/health")
    assert (health.status, health.told["status"]) == (503, "failing")
    assert service.batcher.figures.drawn == 1


def test_what_fails_to_be_drawn_says_no_more_than_its_kind(pipe: Any, start: Any, monkeypatch: Any) -> None:
    _, client = start()

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a secret of the service")

    with monkeypatch.context() as patch:
        patch.setattr(pipe, "encode_prompt", broken)
        answer = client.generate()
    assert (answer.status, answer.code) == (500, "failed")
    assert "RuntimeError" in answer.message
    assert "secret" not in answer.message
    assert client.generate().status == 200


def test_what_was_accepted_is_answered_before_the_end(pipe: Any, start: Any, gate: Any) -> None:
    service, client = start(batch_size=1, wait=0.0)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(client.generate())) for _ in range(4)]
    threads[0].start()
    assert gate.reached.wait(30)
    for thread in threads[1:]:
        thread.start()
    until(lambda: service.batcher.waiting == 3)
    closing = threading.Thread(target=service.batcher.close)
    closing.start()
    until(lambda: service.batcher.closing)
    late = client.generate()
    assert (late.status, late.code) == (503, "stopping")
    assert client.ask("GET", "/health").told["status"] == "stopping"
    gate.opened.set()
    closing.join()
    for thread in threads:
        thread.join()
    assert [answer.status for answer in answers] == [200] * 4


def test_no_free_port_and_no_such_address_are_clear_errors() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OptionError, match=f"cannot listen on 127.0.0.1:{port}: another program has it"):
            listen("127.0.0.1", port)
    with pytest.raises(OptionError, match="no address of this machine"):
        listen("192.0.2.1", 0)
    with pytest.raises(OptionError, match="is no address"):
        listen("no such host.invalid", 0)
    free = listen("127.0.0.1", 0)
    with pytest.raises(OptionError, match="another program has it"):
        listen("127.0.0.1", free.getsockname()[1])
    free.close()
