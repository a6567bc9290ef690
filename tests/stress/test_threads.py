"""Threads draw while others switch, detect, make, save and measure: every image is of one state, none is stock."""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import erasure
from erasure import ErasureManager
from erasure.errors import AttachError
from erasure.eval import evaluate

from .model import (
    Kit,
    colour_judge,
    differing,
    digest,
    draw,
    drop_in,
    give_world,
    hook_names,
    look,
    one_thread,
    option,
    tensors_of,
    tokens,
)  # fmt: skip

THREADS = 8
SECONDS = option("STRESS_SECONDS", 6)
"""How long threads draw: `STRESS_SECONDS=120` for the long run."""
PROMPTS = ("a photo of a cat", "a dog", "an apple on the blue background", "a white house")
SEEDS = (0, 1)
ATTACHED = ("delta", "low", "over", "pin", "itd")
A = {"delta": 1.0, "low": 1.0, "itd": 1.0, "over": 0.5, "pin": 1.0}
B = {"delta": 0.5, "low": 2.0, "itd": 2.0, "over": 1.0, "pin": 1.0}


@pytest.fixture(autouse=True)
def tight() -> Iterator[None]:
    """Torch on one thread, and Python changing threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with one_thread():
        yield
    sys.setswitchinterval(before)


class Crew:
    """Threads that go on until told to stop; whatever one of them raises is kept."""

    def __init__(self) -> None:
        self.stop, self.errors, self.threads = threading.Event(), [], []
        self.rounds: dict[str, int] = {}

    def go(self, name: str, work: Callable[[int], Any]) -> None:
        """Do some work again and again; it is told how often it was done."""

        def run() -> None:
            while not self.stop.is_set():
                try:
                    work(self.rounds.setdefault(name, 0))
                except BaseException as error:
                    self.errors.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
                    if len(self.errors) > 20:
                        self.stop.set()
                    return
                self.rounds[name] += 1

        self.threads.append(threading.Thread(target=run, name=name, daemon=True))

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """They work inside of the block."""
        for thread in self.threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in self.threads:
                thread.join(60)
        assert not [thread.name for thread in self.threads if thread.is_alive()], "a thread hangs"


def put(pipe: Any, state: dict[str, float]) -> None:
    """Put a state in force."""
    ErasureManager(pipe).set_erasures(list(state), list(state.values()))


def pictures(pipe: Any) -> dict[tuple[str, int], Tensor]:
    """What a pipeline draws of every prompt from every seed."""
    return {(prompt, seed): draw(pipe, prompt, steps=2, seed=seed) for prompt in PROMPTS for seed in SEEDS}


def named(image: Tensor, states: dict[str, Tensor]) -> str:
    """Which state an image is of, bit for bit."""
    return next((name for name, wanted in states.items() if torch.equal(image, wanted)), "neither")


@pytest.fixture
def pipe(kit: Kit, tiny_pipe: Any, tmp_path: Path) -> Any:
    """A drop-in pipeline with every erasure attached in state A, whose model has a world."""
    give_world(tiny_pipe, tmp_path / "world")
    made = drop_in(tiny_pipe)
    for kind in ATTACHED:
        ErasureManager(made).add(kit.erasures[kind], kind, A[kind])
    return made


def jobs(pipe: Any, folder: Path) -> dict[str, Callable[[int], Any]]:
    """What others do with the same modules meanwhile, each with a pipeline of its own."""

    def switch(pipe: Any) -> Callable[[int], Any]:
        return lambda turn: (put(pipe, (A, B)[turn % 2]), time.sleep(0.01))

    def detect(pipe: Any) -> Callable[[int], Any]:
        return lambda turn: pipe.detect_concepts([PROMPTS[turn % len(PROMPTS)], ""])

    def make(pipe: Any) -> Callable[[int], Any]:
        return lambda turn: erasure.erase(pipe, "dog", "uce", vocabulary=0, attach=False, progress=False)

    def save(pipe: Any) -> Callable[[int], Any]:
        return lambda turn: pipe.save_erased_pipeline(folder / f"saved-{turn}", fuse=False)

    def measure(pipe: Any) -> Callable[[int], Any]:
        return lambda turn: evaluate(
            pipe, "canvas", "cat", size="smoke", out=folder / f"measured-{turn}", judge=colour_judge,
            baseline_cache=folder / f"cache-{turn}", progress=False, images=False, report=False,
        )  # fmt: skip

    return {work.__name__: work(drop_in(pipe)) for work in (switch, detect, make, save, measure)}


@pytest.mark.parametrize("company", [(), ("switch",), ("detect",), ("make",), ("save",), ("measure",), "all"])
def test_every_image_is_of_one_state(company: Any, pipe: Any, tmp_path: Path, tiny_pipe_original: Any) -> None:
    states = {"stock": pictures(tiny_pipe_original)}
    for name, state in {"B": B, "A": A}.items():
        put(pipe, state)
        states[name] = pictures(pipe)
    base = {key: tensor.clone() for key, tensor in tensors_of(tiny_pipe_original).items()}
    crew, seen = Crew(), dict.fromkeys(("A", "B", "stock", "neither"), 0)
    counted = threading.Lock()
    for number in range(THREADS):
        own = drop_in(pipe) if number % 2 else copy.copy(pipe)
        own.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)

        def look_at_one(turn: int, own: Any = own, number: int = number) -> None:
            prompt, seed = PROMPTS[(turn + number) % len(PROMPTS)], SEEDS[turn % len(SEEDS)]
            image = draw(own, prompt, steps=2, seed=seed)
            which = named(image, {name: found[prompt, seed] for name, found in states.items()})
            with counted:
                seen[which] += 1

        crew.go(f"artist {number}", look_at_one)
    others = jobs(pipe, tmp_path)
    chosen = list(others) if company == "all" else list(company)
    for name in chosen:
        crew.go(name, others[name])
    with crew.at_work():
        crew.stop.wait(SECONDS if company == "all" else SECONDS / 3)
    assert not crew.errors, "\n".join(crew.errors)
    assert seen["stock"] == seen["neither"] == 0, f"images of each state: {seen}"
    assert seen["A"] + seen["B"] >= THREADS
    if "switch" in chosen:
        assert crew.rounds["switch"] >= 2, "the switch never came to its turn"
    else:
        assert not seen["B"]
    assert all(crew.rounds[name] >= 1 for name in chosen), crew.rounds
    ErasureManager(pipe).verify()
    ErasureManager(pipe).unload()
    assert all(torch.equal(tensor, base[key]) for key, tensor in tensors_of(pipe).items())


@pytest.mark.parametrize("kinds", [("itd",), ("pin",), ("itd", "pin", "delta")])
@pytest.mark.parametrize("entry", ["encoder", "encode_prompt"])
def test_each_thread_gets_its_own_encoding(kinds: tuple[str, ...], entry: str, kit: Kit, tiny_pipe: Any) -> None:
    """Batches of different prompts, lengths and sizes through one text encoder at the same time."""
    for kind in kinds:
        ErasureManager(tiny_pipe).add(kit.erasures[kind], kind)
    batches = [("a photo of a cat",), ("", "a dog"), ("an apple",), ("",), ("a cat", "", "a photo of a dog"),
               ("a white house on the blue background", "a cat"), ("cat",), ("a dog", "a dog")]  # fmt: skip
    pipes = [drop_in(tiny_pipe) for _ in batches]
    ids = [tokens(tiny_pipe, batch) for batch in batches]

    def run(number: int) -> Tensor:
        if entry == "encoder":
            with torch.no_grad():
                return tiny_pipe.text_encoder(ids[number])[0]
        with torch.no_grad():
            return pipes[number].encode_prompt(list(batches[number]), "cpu", 1, False)[0]

    wanted = [run(number) for number in range(len(batches))]
    crew, wrong = Crew(), []
    for number in range(len(batches)):

        def check(turn: int, number: int = number) -> None:
            if not torch.equal(run(number), wanted[number]):
                wrong.append(batches[number])

        crew.go(f"reader {number}", check)
    with crew.at_work():
        crew.stop.wait(SECONDS / 3)
    assert not crew.errors, "\n".join(crew.errors)
    total = sum(crew.rounds.values())
    assert total > 50
    assert not wrong, f"{len(wrong)} of {total} encodings are another prompt's or stock"


# The lease -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["same", "from_pipe", "copy", "stock"])
@pytest.mark.parametrize("switch", SWITCHES)
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


# The embedded model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not option("STRESS_CANVAS", 0), reason="a minute of drawing: STRESS_CANVAS=1")
def test_nobody_sees_the_cat(tmp_path: Path) -> None:
    """canvas-sd with the judge: eight threads ask for a cat while two erasures of it are switched and measured."""
    from erasure.eval.detectors import CanvasJudge

    pipe = erasure.load_pipeline("canvas-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    judge, lock, seen = CanvasJudge(), threading.Lock(), []

    def paint(own: Any, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return own("cat image in noto style", num_inference_steps=8, generator=generator).images[0]

    stock = [paint(pipe, seed) for seed in range(4)]
    assert sum("cat" in judge([image])[0].objects for image in stock) >= 3, "the stock model draws no cats"
    pipe.erase("cat", "uce", name="uce", progress=False)
    pipe.erase("cat", "hirm", name="hirm", progress=False)
    wanted = []
    for state in (["hirm"], ["uce"]):
        pipe.set_erasures(state)
        wanted.append([paint(pipe, seed).tobytes() for seed in range(4)])
    crew = Crew()
    for number in range(THREADS):
        own = drop_in(pipe)

        def work(turn: int, own: Any = own, number: int = number) -> None:
            seed = (turn + number) % 4
            image = paint(own, seed)
            with lock:
                seen.append(
                    (image.tobytes() in (wanted[0][seed], wanted[1][seed]), "cat" in judge([image])[0].objects)
                )

        crew.go(f"artist {number}", work)
    switcher, maker = drop_in(pipe), drop_in(pipe)
    crew.go("switch", lambda turn: (switcher.set_erasures([("uce", "hirm")[turn % 2]]), time.sleep(0.05)))
    crew.go("make", lambda turn: erasure.erase(maker, "dog", "uce", attach=False, progress=False))
    with crew.at_work():
        crew.stop.wait(max(SECONDS, 60))
    assert not crew.errors, "\n".join(crew.errors)
    assert all(same for same, _ in seen), f"{sum(not same for same, _ in seen)} of {len(seen)} images are of no state"
    assert sum(cat for _, cat in seen) <= 0.05 * len(seen)
