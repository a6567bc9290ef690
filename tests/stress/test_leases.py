"""A switch waits for the calls in flight, and they for it; inside of a call it is refused."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from erasure import ErasureManager
from erasure.errors import AttachError
from erasure.leases import Lease

from .crew import THREADS, B, Crew, put
from .lines import Lines
from .looks import differing, digest, drop_in, hook_names, look
from .model import Kit, draw, tensors_of

pytestmark = pytest.mark.usefixtures("tight")


class Paused:
    """A call of a pipeline in a thread of its own that stands still at the end of its first step until let go."""

    def __init__(self, pipe: Any, run: Callable[..., Tensor]) -> None:
        self.inside, self.go, self.result = threading.Event(), threading.Event(), []

        def callback(pipe: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
            self.inside.set()
            assert self.go.wait(30)
            return {}

        def work() -> None:
            try:
                self.result.append(run(pipe, callback))
            except BaseException as error:
                self.errors.append(error)
            self.inside.set()

        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        assert self.inside.wait(30)
        assert not self.errors, self.errors

    def finish(self) -> Tensor:
        """Let it go, and wait for the image."""
        self.go.set()
        self.thread.join(30)
        assert not self.errors, self.errors
        return self.result[0]


def with_callback(pipe: Any, callback: Any) -> Tensor:
    return draw(pipe, steps=2, callback_on_step_end=callback)


def in_use(pipe: Any, callback: Any) -> Tensor:
    with ErasureManager(pipe).in_use():
        return draw(pipe, steps=2, callback_on_step_end=callback)


def second(pipe: Any, kind: str) -> Any:
    """Another pipeline object over the same modules."""
    if kind == "copy":
        made = copy.copy(pipe)
        made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        return made
    return {"same": lambda: pipe, "from_pipe": lambda: drop_in(pipe),
            "stock": lambda: StableDiffusionPipeline(**pipe.components, requires_safety_checker=False),
            }[kind]()  # fmt: skip


def standing(pipe: Any) -> tuple[str, list[str]]:
    """Weights and hooks, read without asking the package."""
    return digest(tensors_of(pipe)), hook_names(pipe)


SWITCHES: dict[str, Callable[[Any, Kit], Any]] = {
    "set": lambda pipe, kit: put(pipe, B),
    "disable": lambda pipe, kit: ErasureManager(pipe).disable(),
    "unload": lambda pipe, kit: ErasureManager(pipe).unload(),
    "add": lambda pipe, kit: ErasureManager(pipe).add(kit.erasures["low"], "more"),
    "delete": lambda pipe, kit: ErasureManager(pipe).delete("low"),
}


@pytest.mark.parametrize(("kind", "switch"), [
    *(("same", switch) for switch in SWITCHES),
    ("from_pipe", "set"), ("from_pipe", "delete"), ("copy", "disable"), ("copy", "add"), ("stock", "unload"),
    ("stock", "set"),
])  # fmt: skip
def test_a_switch_waits_for_calls_in_flight(kind: str, switch: str, pipe: Any, kit: Kit) -> None:
    whole, before = draw(pipe, steps=2), standing(pipe)
    other = second(pipe, kind)
    call = Paused(pipe, with_callback)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (SWITCHES[switch](other, kit), done.set()), daemon=True)
    thread.start()
    try:
        assert not done.wait(0.15), "the switch did not wait"
        assert standing(pipe) == before, "the switch went half way and waits"
    finally:
        image = call.finish()
    assert torch.equal(image, whole), "the call saw two states"
    assert done.wait(30), "the switch never came to its turn"
    assert standing(pipe) != before


def test_a_stock_pipeline_says_that_it_is_in_use(pipe: Any, kit: Kit) -> None:
    stock = second(pipe, "stock")
    stock.set_progress_bar_config(disable=True)
    whole = draw(stock, steps=2)
    call = Paused(stock, in_use)
    done = threading.Event()
    threading.Thread(target=lambda: (put(pipe, B), done.set()), daemon=True).start()
    try:
        assert not done.wait(0.15)
    finally:
        image = call.finish()
    assert torch.equal(image, whole)
    assert done.wait(30)


def test_calls_in_flight_share(pipe: Any) -> None:
    """Two calls at once, and encodings beside them: nobody waits for whoever only reads."""
    first = Paused(pipe, with_callback)
    second_call = Paused(drop_in(pipe), with_callback)
    assert torch.equal(first.finish(), second_call.finish())


def test_calls_that_come_later_do_not_hold_up_a_switch(pipe: Any) -> None:
    """Eight threads that draw without a break, one switch: it comes to its turn."""
    crew = Crew()
    for number in range(THREADS):
        own = drop_in(pipe)
        crew.go(f"artist {number}", lambda turn, own=own: draw(own, steps=2))
    with crew.at_work():
        time.sleep(0.3)
        clock = time.perf_counter()
        put(pipe, B)
        assert time.perf_counter() - clock < 10
    assert not crew.errors, "\n".join(crew.errors)


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_from_inside_a_call_is_refused(switch: str, pipe: Any, kit: Kit) -> None:
    whole, before, refused = draw(pipe, steps=2), look(pipe), []
    others = [drop_in(pipe), second(pipe, "copy"), second(pipe, "stock")]

    def callback(inner: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        for other in (inner, *others):
            with pytest.raises(AttachError) as caught:
                SWITCHES[switch](other, kit)
            refused.append(str(caught.value))
        return {}

    assert torch.equal(draw(pipe, steps=2, callback_on_step_end=callback), whole)
    assert len(refused) == 8
    assert not differing(look(pipe), before)


def test_a_call_that_fails_gives_the_lease_back(pipe: Any) -> None:
    def callback(*arguments: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=callback)
    thread = threading.Thread(target=lambda: put(pipe, B), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_an_interrupt_at_any_line_holds_nobody_up() -> None:
    """Not at the end of a block of a lock either, where an interrupt would leave it locked for ever."""
    thing = object()

    def use() -> None:
        with Lease([thing], exclusive=True):
            pass

    with Lines() as whole:
        use()
    for at in range(1, whole.lines + 1):
        with Lines(at), contextlib.suppress(KeyboardInterrupt):
            use()
        other = threading.Thread(target=use, daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive(), f"line {at} of {whole.lines}"
