"""Any sequence of calls: expected weights, encodings and images, truthful lists and `verify`, the base at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from erasure import ErasureManager
from tests.copies import copied

from .company import InCompany
from .looks import one_thread, relative
from .model import Kit, ReferencePipe, draw, encode, foreign, option, tensors_of, user_lora

STEPS = option("STRESS_STEPS", 250)
"""How many steps are taken in all, about eleven a second: `STRESS_STEPS=20000` for the long run."""
AT_ONCE = 50
"""Steps with one pipeline; some sequences are shorter."""
KINDS = ("delta", "low", "over", "pin", "itd")


@pytest.fixture
def machine(kit: Kit, tiny_pipe_factory: Any, tmp_path: Path, load_tiny_ip_adapter: Callable[[Any], Any]) -> Any:
    original, other = tiny_pipe_factory(), tiny_pipe_factory(seed=1)
    with_ip = copied(original)
    load_tiny_ip_adapter(with_ip)
    for kind in KINDS:
        kit.erasures[kind].save(tmp_path / kind)

    class Machine(InCompany):
        steps = 0

    Machine.original, Machine.kit, Machine.folders = original, kit, tmp_path
    Machine.base = {key: tensor.clone() for key, tensor in tensors_of(original).items()}
    Machine.wrong = {kind: foreign(kit.erasures[kind], other) for kind in ("low", "itd")}
    Machine.loras = {"mine": user_lora(original, 300, True), "yours": user_lora(original, 500, False)}
    Machine.references = {False: ReferencePipe(original), True: ReferencePipe(with_ip)}
    Machine.add_ip = staticmethod(load_tiny_ip_adapter)
    with one_thread():
        yield Machine


def test_the_erasures_can_be_told_apart(kit: Kit, tiny_pipe: Any) -> None:
    """Each changes encodings or images by far more than what counts as equal."""
    stock, image, manager = encode(tiny_pipe), draw(tiny_pipe), ErasureManager(tiny_pipe)
    for kind in KINDS:
        manager.add(kit.erasures[kind], kind)
        assert max(relative(encode(tiny_pipe), stock), relative(draw(tiny_pipe), image)) > 1e-2
        assert relative(draw(tiny_pipe), image) > 1e-2
        manager.unload()


def test_any_sequence_of_calls(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=STEPS // 38 + 1, stateful_step_count=AT_ONCE, derandomize=True, database=None,
            deadline=None, suppress_health_check=list(HealthCheck), print_blob=False,
            phases=[Phase.generate, Phase.shrink] if option("STRESS_SHRINK", 0) else [Phase.generate],
        ),
    )  # fmt: skip
    # A sequence may end early, which the number of sequences makes up for on average, and on few less surely.
    assert machine.steps >= 0.5 * STEPS
