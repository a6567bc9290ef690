"""Faces are found and described as by the original, and people are told apart by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from erasure.errors import EvaluationError
from erasure.eval.detectors import Reading, ask, get
from erasure.eval.detectors.faces import Faces, cut_out
from erasure.eval.detectors.findings import Box
from tests.eval.detectors.conftest import GOLDEN, gallery, noise, photograph


@pytest.fixture(scope="module")
def faces() -> Faces:
    return Faces()


@pytest.mark.parametrize("name", GOLDEN)
def test_faces_are_found_where_the_original_finds_them(name: str, faces: Faces) -> None:
    picture = photograph(name)
    found = faces.find(picture)
    # The original does not end its boxes at the picture's edge.
    expected = [(score, (max(0, a), max(0, b), min(picture.width, c), min(picture.height, d)))
                for score, a, b, c, d in GOLDEN[name]["faces"]]  # fmt: skip
    assert len(found) == len(expected)
    for (score, box), (wanted, place) in zip(found, expected, strict=True):
        assert score == pytest.approx(wanted, abs=1e-4)
        assert box == pytest.approx(place, abs=0.05)


@pytest.mark.parametrize("name", GOLDEN)
def test_descriptions_are_those_of_the_original(name: str, faces: Faces) -> None:
    (found,) = faces.describe([photograph(name)])
    torch.testing.assert_close(found, torch.tensor(GOLDEN[name]["descriptor"]), atol=5e-5, rtol=0)


def altered(picture: Image.Image) -> dict[str, Image.Image]:
    """The same face, otherwise."""
    return {
        "mirrored": ImageOps.mirror(picture), "turned": picture.rotate(10), "small": picture.resize((128, 128)),
        "dark": ImageEnhance.Brightness(picture).enhance(0.5),
    }  # fmt: skip


def test_a_person_is_known_again_and_another_is_not(tmp_path: Path) -> None:
    people = gallery(tmp_path / "people", astronaut=["astronaut.png"], cameraman=["camera.png"])
    detector = get("identity")(gallery=people, flags=("astronaut",))
    others = altered(photograph("astronaut.png"))
    for name, finding in zip(others, ask(detector, list(others.values())), strict=True):
        assert finding.flagged is True, name
        assert finding.labels == {"face", "astronaut"}
        assert finding.scores["cameraman"] == 0
    (other,) = ask(detector, [ImageEnhance.Brightness(photograph("camera.png")).enhance(0.8)])
    assert other.flagged is False
    assert other.labels == {"face", "cameraman"}
    everyone = get("identity")(gallery=people)
    assert ask(everyone, [photograph("camera.png")])[0].flagged is True
    (nobody,) = ask(detector, [photograph("coffee.png")])
    assert (nobody.flagged, nobody.score, nobody.labels) == (False, 0.0, frozenset())


def cameraman() -> Image.Image:
    """The other face among the photographs, from nearer."""
    return photograph("camera.png").crop((90, 60, 346, 316)).resize((512, 512))


def side_by_side() -> Image.Image:
    """Two faces; the one at the right is larger and less certain."""
    both = Image.new("RGB", (1024, 512))
    both.paste(photograph("astronaut.png"), (0, 0))
    both.paste(cameraman(), (512, 0))
    return both


def test_every_face_of_a_picture_is_asked_about(tmp_path: Path) -> None:
    people = gallery(tmp_path / "people", astronaut=["astronaut.png"], cameraman=[cameraman()])
    (finding,) = ask(get("identity")(gallery=people, face=0.4), [side_by_side()])
    assert finding.labels == {"face", "astronaut", "cameraman"}
    assert finding.boxes["astronaut"].right < 512 < finding.boxes["cameraman"].left
    assert {"face", "face#2"} <= set(finding.boxes)


def test_a_picture_with_several_faces_gives_the_largest(tmp_path: Path) -> None:
    people = gallery(tmp_path / "people", who=[side_by_side()])
    detector = get("identity")(gallery=people, face=0.4)
    assert [finding.flagged for finding in ask(detector, [cameraman(), photograph("astronaut.png")])] == [True, False]


def test_likeness_decides(tmp_path: Path) -> None:
    detector = get("identity")(gallery=tmp_path, flags=("ann",))
    for likeness, flagged in ((0.39, False), (0.4, True)):
        finding = detector.judge(Reading({"ann": likeness, "bob": 0.9, "face": 0.8}))
        assert finding.flagged is flagged
        assert finding.score == likeness
        assert "bob" in finding.labels


def test_a_gallery_that_tells_nothing_is_an_error(tmp_path: Path) -> None:
    def refused(said: str, **options: Any) -> None:
        with pytest.raises(EvaluationError, match=said):
            get("identity")(**options).recipe()
        with pytest.raises(EvaluationError, match=said):
            ask(get("identity")(**options), [noise(64, 64)])

    refused("has no gallery")
    refused("is no folder: expected a folder for each person", gallery=tmp_path / "nothing")
    refused("holds no folder of a person", gallery=tmp_path)
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "notes.txt").write_text("no picture")
    refused("has no picture of 'ann'", gallery=tmp_path)
    photograph("coffee.png").save(tmp_path / "ann" / "1.png")
    refused(r"no face is found in .*ann.1\.png", gallery=tmp_path)
    (tmp_path / "ann" / "1.png").write_bytes(b"no picture")
    refused(r"1\.png cannot be read", gallery=tmp_path)
    photograph("astronaut.png").save(tmp_path / "ann" / "1.png")
    refused("nobody in the gallery is called 'anne'.*Did you mean 'ann'", gallery=tmp_path, flags=("anne",))
    (tmp_path / "face").mkdir()
    refused("can be called 'face'", gallery=tmp_path)


def test_the_recipe_changes_with_the_gallery(tmp_path: Path) -> None:
    people = gallery(tmp_path / "people", astronaut=["astronaut.png"])
    before = get("identity")(gallery=people).recipe()
    photograph("control.webp").save(people / "astronaut" / "1.png")
    after = get("identity")(gallery=people).recipe()
    assert before["weights"] != after["weights"]
    assert before["known"] is after["known"] is True


def test_a_box_without_pixels_is_no_face() -> None:
    assert cut_out(noise(20, 20), Box(3.2, 3.2, 3.9, 9)) is None
    part = cut_out(noise(20, 20), Box(3.2, 3.2, 5.9, 9))
    assert part is not None
    assert part.size == (2, 6)
