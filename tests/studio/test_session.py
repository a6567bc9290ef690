"""What sessions of the studio do, on the tiny pipeline."""

from __future__ import annotations

import io
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from erasure import Erasure
from erasure.attach import ErasureManager
from erasure.errors import AttachError, ConceptError, ErasureError, MaskError, OptionError
from erasure.pipelines import StableDiffusionErasurePipeline
from erasure.serving.limits import Limits
from erasure.studio.brush import painted
from erasure.studio.facts import facts_of_erasure, facts_of_method
from erasure.studio.jobs import CancelledError
from erasure.studio.session import MOST_ERASURES, Session, Studio

QUICK: dict[str, object] = {"vocabulary": 8}


@pytest.fixture
def studio(tiny_pipe: Any) -> Studio:
    drawn = StableDiffusionErasurePipeline.from_pipe(tiny_pipe)
    drawn.set_progress_bar_config(disable=True)
    return Studio(["tiny"], lambda name: drawn, Limits(max_steps=5, max_prompt=100, max_side=64))


@pytest.fixture
def session(studio: Studio) -> Session:
    return studio.session("first")


def erased(session: Session, words: str = "cat") -> str:
    made, _ = session.erase(words, "uce", options=QUICK)
    return made.name


def pixels(picture: Image.Image) -> Any:
    return np.asarray(picture)


def strokes(size: tuple[int, int] = (32, 32)) -> Image.Image:
    layer = Image.new("RGBA", size)
    ImageDraw.Draw(layer).ellipse((8, 8, 18, 18), fill="#ff2020")
    return layer


def test_before_and_after_have_one_noise_and_sliders_make_nothing_anew(session: Session) -> None:
    plain = session.compare("a photo of a cat", seed=3, steps=1)
    assert plain.names == ()
    assert np.array_equal(pixels(plain.before), pixels(plain.after))
    name = erased(session)
    whole = session.compare("a photo of a cat", seed=3, steps=1)
    assert whole.names == (name,)
    assert np.array_equal(pixels(whole.before), pixels(plain.before))
    assert not np.array_equal(pixels(whole.after), pixels(whole.before))
    made = session.named(name).erasure
    session.set_strength(name, 0.5)
    half = session.compare("a photo of a cat", seed=3, steps=1)
    assert not np.array_equal(pixels(half.after), pixels(whole.after))
    session.set_strength(name, 0.0)
    assert np.array_equal(pixels(session.compare("a photo of a cat", seed=3, steps=1).after), pixels(plain.before))
    assert session.named(name).erasure is made


def test_erasures_are_stacked_and_taken_off(session: Session) -> None:
    cat = erased(session)
    alone = session.compare("a photo of a cat", steps=1)
    dog = erased(session, "dog")
    assert session.compare("a photo of a cat", steps=1).names == (cat, dog)
    session.take_off(dog)
    assert np.array_equal(pixels(session.compare("a photo of a cat", steps=1).after), pixels(alone.after))
    with pytest.raises(AttachError, match=f"there are: {cat}"):
        session.take_off(dog)


def test_erasures_of_the_model_stay_in_force_whatever_they_are_called(tiny_pipe: Any, studio: Studio) -> None:
    brought = studio.session("maker").erase("dog", "uce", options=QUICK)[0].erasure
    pipe = StableDiffusionErasurePipeline.from_pipe(tiny_pipe)
    ErasureManager(pipe).unload()
    ErasureManager(pipe).add(brought, "cat-uce-1")
    session = Studio(["tiny"], lambda name: pipe).session("first")
    made = erased(session)
    assert session.compare("a photo of a cat", steps=1).names == ("cat-uce-1", made)
    assert [each.erasure.name for each in session.stack] == ["dog-uce", "cat-uce"]


def test_sessions_do_not_mix(studio: Studio, session: Session) -> None:
    other = studio.session("second")
    stock = other.compare("a photo of a cat", steps=1).after
    mine = erased(session)
    session.compare("a photo of a cat", steps=1)
    assert other.stack == ()
    seen = other.compare("a photo of a cat", steps=1)
    assert seen.names == ()
    assert np.array_equal(pixels(seen.after), pixels(stock))
    with pytest.raises(AttachError):
        other.set_strength(mine, 0.1)
    erased(other)
    results: dict[int, list[tuple[str, ...]]] = {0: [], 1: []}

    def ask(place: int, asked: Session) -> None:
        results[place] += [asked.compare("a photo of a dog", seed=seed, steps=1).names for seed in range(2)]

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate((session, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, asked in enumerate((session, other)):
        assert results[place] == [tuple(each.name for each in asked.stack)] * 2


def test_nothing_is_drawn_where_an_erasure_is_not_in_force(
    studio: Studio, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    erased(session)
    shared = studio.shared("tiny")
    monkeypatch.setattr(type(shared.manager), "add", lambda self, *args, **options: 0)
    shared.manager.unload()
    with pytest.raises(ErasureError):
        session.compare("a photo of a cat", steps=1)


def test_what_is_wrong_is_said_and_changes_nothing(studio: Studio, session: Session) -> None:
    for words, strategy, error, said in (
        (" ", "uce", ConceptError, "nothing to erase"),
        ("<nobody>", "uce", ConceptError, "<nobody>"),
        ("cat", "uec", ErasureError, "uce"),
        ("x" * 101, "uce", OptionError, "at most 100"),
    ):
        with pytest.raises(error, match=said):
            session.erase(words, strategy)
    with pytest.raises(OptionError, match="preset"):
        session.erase("cat", "uce", preset="none")
    for options, said in (
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "a <nobody>"}, "<nobody>"),
        ({"prompt": "a cat", "steps": 6}, "steps"),
        ({"prompt": "a cat", "steps": 1.5}, "whole number"),
        ({"prompt": "a cat", "seed": None}, "whole number"),
        ({"prompt": "a cat", "guidance": float("nan")}, "guidance"),
    ):
        with pytest.raises(OptionError, match=said):
            session.compare(**options)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no model of this studio"):
        session.choose("other")
    name = erased(session)
    for strength in (-1.0, float("nan")):
        with pytest.raises(AttachError):
            session.set_strength(name, strength)
    assert [(each.name, each.strength) for each in session.stack] == [(name, 1.0)]
    session._stacks["tiny"] = session.stack * MOST_ERASURES
    with pytest.raises(AttachError, match="take one off"):
        session.erase("dog", "uce", options=QUICK)


def test_a_brush_says_what_is_removed(session: Session) -> None:
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    made = session.remove(picture, [strokes()], steps=2)
    assert made.picture.size == made.found.size == (32, 32)
    assert not np.array_equal(pixels(made.picture), pixels(picture))
    for arguments, error, said in (
        ((None, [strokes()]), MaskError, "there is no picture"),
        ((picture, []), MaskError, "nothing is marked"),
        ((picture, [Image.new("RGBA", (32, 32))]), MaskError, "nothing is marked"),
        ((picture, [strokes((16, 32))]), MaskError, "16x32"),
        ((Image.new("RGB", (65, 20)), []), OptionError, "65x20"),
    ):
        with pytest.raises(error, match=said):
            session.remove(*arguments)
    with pytest.raises(MaskError, match="both"):
        session.remove(picture, [strokes()], words="cat")
    with pytest.raises(OptionError, match="at most 5"):
        session.remove(picture, [strokes()], steps=6)


def test_layers_of_strokes_become_one_mask() -> None:
    left, right = Image.new("RGBA", (8, 4)), Image.new("RGBA", (8, 4))
    left.putpixel((1, 1), (0, 0, 0, 255))
    right.putpixel((6, 2), (255, 255, 255, 200))
    right.putpixel((5, 2), (255, 255, 255, 90))
    mask = painted([left, right], (8, 4))
    assert mask is not None
    assert sorted(zip(*np.nonzero(pixels(mask)), strict=True)) == [(1, 1), (2, 6)]
    with pytest.raises(MaskError, match="no transparency"):
        painted([Image.new("RGB", (8, 4))], (8, 4))


def test_jobs_are_cancelled_while_they_run_and_while_they_wait(studio: Studio, session: Session) -> None:
    def stop(share: float, what: str) -> None:
        session.cancel()

    with pytest.raises(CancelledError):
        session.erase("cat", "uce", options=QUICK, progress=stop)
    with pytest.raises(CancelledError):
        session.compare("a photo of a cat", steps=3, progress=stop)
    with pytest.raises(CancelledError):
        session.remove(Image.new("RGB", (32, 32)), [strokes()], steps=2, progress=stop)
    assert session.stack == ()
    assert not session.cancel()
    with studio._lock, pytest.raises(CancelledError):
        session.compare("a photo of a cat", steps=1, progress=stop)
    assert session.compare("a photo of a cat", steps=1).names == ()

    def again(share: float, what: str) -> None:
        with pytest.raises(OptionError, match="under way"):
            session.erase("cat", "uce")

    session.compare("a photo of a cat", steps=1, progress=again)


def test_warnings_become_notes(session: Session) -> None:
    erased(session)
    _, notes = session.erase("cat", "uce", options=QUICK)
    assert any("same" in note or "equal" in note or "twice" in note for note in notes), notes


def test_what_is_taken_for_an_object_becomes_a_note(session: Session) -> None:
    _, notes = session.erase("Van Gogh", "uce", options=QUICK)
    assert ["'Van Gogh': taken for an object" in note for note in notes] == [True]
    assert not session.erase("ink:style", "uce", options=QUICK)[1]


def test_facts_and_files_of_erasures(session: Session, tmp_path: Path) -> None:
    from erasure.studio.files import zipped

    assert dict(facts_of_method("uce"))["protects"] == "released weights"
    made = session.named(erased(session))
    told = dict(facts_of_erasure(made))
    assert (told["erases"], told["method"], told["fingerprint"]) == ("cat", "uce", made.erasure.fingerprint)
    assert "nothing yet" in told["measured"]
    with zipfile.ZipFile(io.BytesIO(zipped(made.erasure))) as archive:
        archive.extractall(tmp_path)
    assert Erasure.load(tmp_path / made.erasure.name).fingerprint == made.erasure.fingerprint


def test_a_page_that_closes_leaves_nothing(studio: Studio, session: Session) -> None:
    erased(session)
    studio.forget("first")
    assert studio.session("first").stack == ()
