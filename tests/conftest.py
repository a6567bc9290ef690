"""Fixtures that several folders share; what they give is made in `models`, `copies` and `looks`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import looks, models
from tests.copies import copied

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Benchmarks stand in the checkout and are not installed: they are found there, behind whatever is.
sys.path.append(str(Path(__file__).parents[1]))
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers that each take every core wait for one another. Programs that tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported: it would go through it again with every copied pipeline."""
    gc.collect()
    gc.freeze()
    # It comes after every 700 new objects by itself, which is several times for each copied pipeline.
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def disk() -> Iterator[None]:
    """Do not wait for the disk: files of tests outlast no power cut. A file that is closed is still refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """A worker among several has one thread, whatever imported torch ahead of this file."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep what they cache to themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERASURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """The tokeniser of the tiny pipeline: read it, never change it."""
    return models.make_tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_models() -> dict[str, Callable[..., Any]]:
    """Makes tiny pipelines of a family: `tiny_models["stable-diffusion"](seed=1)`."""
    return models.MODELS


@pytest.fixture(scope="session")
def tiny_clip() -> Callable[..., Any]:
    """Makes CLIP text encoders: `tiny_clip(tokenizer, projected=True, seed=2)`."""
    return models.make_tiny_clip


@pytest.fixture(scope="session")
def tiny_t5() -> Callable[..., Any]:
    """Makes a T5 encoder and its tokeniser: `encoder, tokenizer = tiny_t5()`."""
    return models.make_tiny_t5


@pytest.fixture(scope="session")
def tiny_pipe_factory() -> Callable[..., Any]:
    """Makes tiny pipelines: `tiny_pipe_factory(seed=1)` has other weights."""
    return models.make_tiny_pipe


@pytest.fixture(scope="session")
def tiny_pipe_original() -> Any:
    """The tiny pipeline of the session: read it, never change it."""
    return models.make_tiny_pipe()


@pytest.fixture(scope="session")
def copy_of() -> Callable[[Any], Any]:
    """Copies a pipeline that a test may not change: `copy_of(tiny_pipe_original)`."""
    return copied


@pytest.fixture
def tiny_pipe(tiny_pipe_original: Any) -> Any:
    """A copy of the tiny pipeline that the test may change."""
    return copied(tiny_pipe_original)


@pytest.fixture(scope="session")
def tiny_xl_original() -> Any:
    """A tiny SDXL pipeline of the session, with two text encoders: read it, never change it."""
    return models.MODELS["stable-diffusion-xl"]()


@pytest.fixture
def tiny_xl(tiny_xl_original: Any) -> Any:
    """A copy of it that the test may change."""
    return copied(tiny_xl_original)


@pytest.fixture(scope="session")
def tiny_pipe_folder(tiny_pipe_original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as a folder on disk: read it, never change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tiny_pipe_original.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def draw() -> Callable[..., Any]:
    """Draws one image: `draw(pipe, "a cat")`."""
    return looks.draw_image


@pytest.fixture(scope="session")
def same_picture() -> Callable[[Any, Any], None]:
    """Compares pictures of a pipeline and of what was read back from its files, whose weights are the same bits.

    Files are mapped into memory where they lie, and the products of some CPUs are rounded by where a row begins.
    """
    import torch

    return partial(torch.testing.assert_close, rtol=0, atol=1e-5)


@pytest.fixture(scope="session")
def tensors_of() -> Callable[[Any], dict[str, Any]]:
    """Copies every tensor of a pipeline."""
    return looks.tensors_of_pipe


@pytest.fixture(scope="session")
def changed_tensors() -> Callable[[dict[str, Any], Any], set[str]]:
    """Names of the tensors of a pipeline that differ from a copy in a bit, or are in one of the two only."""
    return looks.changed


@pytest.fixture(scope="session")
def load_tiny_ip_adapter() -> Callable[[Any], dict[str, Any]]:
    """Loads an IP-Adapter with random weights into a tiny pipeline."""
    return models.add_tiny_ip_adapter


@pytest.fixture(scope="session")
def teach() -> Callable[..., None]:
    """Loads a learned token into a pipeline: `teach(pipe, "a", "cat")` gives `<my-pet>` two vectors."""
    return models.teach_token
