"""The pair of a case and a family that a test runs for, and what is made once for all tests of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from erasure import Concept, Erasure, ErasureManager
from erasure.pipelines import pipeline_class
from erasure.strategies import transport

from .cases import SIDE, fit


@pytest.fixture(scope="package", autouse=True)
def few_ordinary() -> Iterator[None]:
    """Floors of gates are measured on few prompts: of random towers they mean nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport, "ORDINARY", 16)
        yield


@pytest.fixture(scope="session")
def originals(tiny_models: Any) -> Any:
    """The tiny pipeline of each family, made once, and those of other seeds: read them, never change them."""
    return functools.cache(lambda family, seed=0: tiny_models[family](seed=seed))


@pytest.fixture(scope="session")
def draw(draw: Any) -> Any:
    """Draws one image, of a quarter of the size that pipelines draw by themselves: `draw(pipe, "a cat")`."""
    return functools.partial(draw, height=SIDE, width=SIDE)


@pytest.fixture(scope="session")
def erasures(originals: Any) -> Any:
    """The erasure of a concept by a case on a family, made once."""
    return functools.cache(lambda case, family, concept: fit(originals(family), case, concept))


@pytest.fixture(scope="session")
def pictures(originals: Any, erasures: Any, draw: Any, copy_of: Any) -> Any:
    """What the pipeline of a family draws, without an erasure and with that of "cat" by a case; each drawn once."""

    def picture(family: str, case: str | None = None) -> torch.Tensor:
        pipe = originals(family)
        if case is not None:
            pipe = copy_of(pipe)
            ErasureManager(pipe).add(erasures(case, family, "cat"), "cat")
        return draw(pipe)

    return functools.cache(picture)


@pytest.fixture
def case(pair: tuple[str, str]) -> str:
    return pair[0]


@pytest.fixture
def family(pair: tuple[str, str]) -> str:
    return pair[1]


@pytest.fixture
def tiny_pipe_factory(family: str, originals: Any, copy_of: Any) -> Any:
    """Makes tiny pipelines of the pair's family that the test may change."""
    return lambda seed=0: copy_of(originals(family, seed))


@pytest.fixture
def tiny_pipe_original(family: str, originals: Any) -> Any:
    return originals(family)


@pytest.fixture
def stock_class(tiny_pipe_original: Any) -> Any:
    """The family's pipeline of diffusers."""
    return type(tiny_pipe_original)


@pytest.fixture
def drop_in(stock_class: Any) -> Any:
    """Its drop-in."""
    return pipeline_class(stock_class.__name__)


@pytest.fixture
def made(pair: tuple[str, str], erasures: Any) -> Erasure:
    """An erasure of "cat" by the case, made for the pipeline of the session."""
    return erasures(*pair, "cat")


@pytest.fixture
def other(pair: tuple[str, str], erasures: Any) -> Erasure:
    """An erasure of "monet" by the case."""
    return erasures(*pair, Concept("monet", kind="style"))


@pytest.fixture
def base(tiny_pipe_original: Any, tensors_of: Any) -> dict[str, Any]:
    """The tensors of the test's pipeline before anything happens."""
    return tensors_of(tiny_pipe_original)


@pytest.fixture
def base_image(family: str, pictures: Any) -> Any:
    """What the stock pipeline draws."""
    return pictures(family)


@pytest.fixture
def erased_image(pair: tuple[str, str], pictures: Any) -> Any:
    """What a fresh copy of the pipeline draws with the erasure."""
    return pictures(pair[1], pair[0])


@pytest.fixture
def manager(tiny_pipe: Any) -> ErasureManager:
    return ErasureManager(tiny_pipe)
