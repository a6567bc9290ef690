"""Threads draw while others switch, detect, make, save and measure: every image is of one state, none is stock."""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import erasure
from erasure import ErasureManager
from erasure.eval import evaluate

from .crew import THREADS, A, B, Crew, put
from .looks import colour_judge, drop_in
from .model import Kit, draw, option, tensors_of, tokens

pytestmark = pytest.mark.usefixtures("tight")

SECONDS = option("STRESS_SECONDS", 3)
"""How long threads draw: `STRESS_SECONDS=120` for the long run."""
PROMPTS = ("a photo of a cat", "a dog", "an apple on the blue background", "a white house")
SEEDS = (0, 1)


def pictures(pipe: Any) -> dict[tuple[str, int], Tensor]:
    """What a pipeline draws of every prompt from every seed."""
    return {(prompt, seed): draw(pipe, prompt, steps=2, seed=seed) for prompt in PROMPTS for seed in SEEDS}


def named(image: Tensor, states: dict[str, Tensor]) -> str:
    """Which state an image is of, bit for bit."""
    return next((name for name, wanted in states.items() if torch.equal(image, wanted)), "neither")


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
    wanted = {**dict.fromkeys(chosen, 1), **({"switch": 2} if "switch" in chosen else {})}

    def had_a_turn() -> bool:
        rounds = all(crew.rounds.get(name, 0) >= least for name, least in wanted.items())
        return rounds and sum(seen.values()) >= THREADS

    with crew.at_work():
        crew.work(SECONDS if company == "all" else SECONDS / 3, had_a_turn)
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
        crew.work(SECONDS / 3, lambda: sum(crew.rounds.copy().values()) > 50)
    assert not crew.errors, "\n".join(crew.errors)
    total = sum(crew.rounds.values())
    assert total > 50
    assert not wrong, f"{len(wrong)} of {total} encodings are another prompt's or stock"


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
    wanted = {"stock": [image.tobytes() for image in stock]}
    for state in ("hirm", "uce"):
        pipe.set_erasures([state])
        wanted[state] = [paint(pipe, seed).tobytes() for seed in range(4)]
    crew = Crew()
    for number in range(THREADS):
        own = drop_in(pipe)

        def work(turn: int, own: Any = own, number: int = number) -> None:
            seed = (turn + number) % 4
            image = paint(own, seed)
            which = next((state for state in wanted if wanted[state][seed] == image.tobytes()), "neither")
            with lock:
                seen.append((which, "cat" in judge([image])[0].objects))

        crew.go(f"artist {number}", work)
    switcher, maker = drop_in(pipe), drop_in(pipe)
    crew.go("switch", lambda turn: (switcher.set_erasures([("uce", "hirm")[turn % 2]]), time.sleep(0.05)))
    crew.go("make", lambda turn: erasure.erase(maker, "dog", "uce", attach=False, progress=False))
    with crew.at_work():
        crew.stop.wait(max(SECONDS, 60))
    assert not crew.errors, "\n".join(crew.errors)
    counts = Counter(which for which, _ in seen)
    print(f"{len(seen)} images: {dict(counts)}, {sum(cat for _, cat in seen)} with a cat; rounds: {crew.rounds}")
    assert not counts["stock"] + counts["neither"], counts
    assert sum(cat for _, cat in seen) <= 0.05 * len(seen)
