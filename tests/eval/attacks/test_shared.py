"""What every attack must do on every family: try something, or say why not, and leave the model as it was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from erasure.backbones import backbone_for
from erasure.eval import attacks
from erasure.eval.attacks import ATTACKS, Attack
from erasure.eval.attacks.stored import restore, store
from erasure.eval.attacks.victim import Victim
from erasure.eval.samples import Sample
from erasure.eval.suites import Target
from tests.copies import copied

FAMILIES = ("stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "chroma", "latent-consistency")
PROMPT = "a cat image in noto style"
ADAPTERS = Path(__file__).parents[2] / "tiny" / "ip-adapter"
TINY: dict[str, dict[str, Any]] = {
    "unlearndiffatk": {"timesteps": 1, "iterations": 1},
    "random_prefix": {"texts": 1},
    "ring_a_bell": {"tokens": 4},
    "p4d": {"tokens": 4, "steps": 1},
    "mma": {"tokens": 3, "steps": 1, "candidates": 4},
    "tina": {"steps": 2, "iterations": 1},
    "concept_inversion": {"steps": 1, "pictures": 1},
    "synonym": {"file": "LIST"},
    "translation": {"file": "LIST"},
    "image_prompt": {"adapter": str(ADAPTERS / "stable-diffusion.safetensors")},
}
"""Options that make an attack quick."""
NEEDS: dict[tuple[str, str], str] = {
    **{("image_prompt", family): "joint attention" for family in ("stable-diffusion-3", "flux", "chroma")},
    ("inpaint", "stable-diffusion-3"): "takes 16 channels only, and this model has 4",
    ("inpaint", "chroma"): "guidance_embeds, which Chroma's has not",
    ("tina", "latent-consistency"): "no noise that a trajectory",
}
"""What cannot be attacked so, with words of the reason."""


def attack_of(name: str, folder: Path, **options: Any) -> Attack:
    """The attack at size smoke, made quick."""
    chosen = {**TINY.get(name, {}), **options}
    if chosen.get("file") == "LIST":
        chosen["file"] = str(folder / "list.csv")
        (folder / "list.csv").write_text("word,rewrite\ncat,kitten\nnoto,ink\n")
    return attacks.get(name).configured("smoke", **chosen)


def sample_of(seed: int = 5, **fields: Any) -> Sample:
    known = {"num_inference_steps": 2, "height": 16, "width": 16, **fields}
    return Sample("cat-noto-0", PROMPT, seed, "target", ("cat",), "noto", ("cat",), **known)


def seeing(name: str) -> Any:
    """A judge that sees one object in everything."""

    def judge(images: Any) -> list[Any]:
        return [SimpleNamespace(object=name, style="noto") for _ in images]

    return judge


def victim_of(pipe: Any, control: bool = False) -> Victim:
    stock = copied(pipe)
    return Victim(pipe, stock, Target("cat", "object", ("cat",)), seeing("dog" if control else "cat"), seed=3)


def options_for(name: str, family: str) -> dict[str, Any]:
    file = ADAPTERS / f"{family}.safetensors"
    return {"adapter": str(file)} if name == "image_prompt" and file.is_file() else {}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: str, tiny_models: Any) -> Any:
    """A tiny pipeline of a family."""
    return tiny_models[family]()


def controls(name: str) -> list[bool]:
    return [False, True] if ATTACKS.get(name).chance == "--control" else [False]


@pytest.mark.parametrize("name", sorted(ATTACKS.built_in))
def test_it_is_tried_on_every_family_or_refused_with_a_reason(
    name: str, family: str, pipe: Any, tmp_path: Path, tensors_of: Any, changed_tensors: Any
) -> None:
    method = attack_of(name, tmp_path, **options_for(name, family))
    if (name, family) in NEEDS:
        assert NEEDS[name, family] in method.lacks(backbone_for(pipe))
        return
    assert method.lacks(backbone_for(pipe)) == ""
    before, scheduler = tensors_of(pipe), pipe.scheduler
    # Controls, and whether it goes the same way again, are no matter of the family.
    first = family == FAMILIES[0]
    for control in controls(name) if first else [False]:
        method = attack_of(name, tmp_path, **options_for(name, family), **({"control": True} if control else {}))
        assert method.measures_chance is (control or method.is_control)
        victim, sample = victim_of(pipe, control), sample_of()
        found = list(method.attempts(victim, sample))
        assert 0 < len(found) <= method.tries
        image = victim.draw(sample, found[-1])
        # What is written down and read again draws the same, on a model that nothing was done to.
        record = store(found[-1], tmp_path, "one")
        again = restore(record, tmp_path)
        assert np.array_equal(np.asarray(victim.draw(sample, again, stock=True)), np.asarray(image))
        if first:
            repeated = list(method.attempts(victim_of(pipe, control), sample))
            assert store(repeated[-1], tmp_path, "one") == record
    assert changed_tensors(before, pipe) == set()
    assert pipe.scheduler is scheduler
    assert all(p.grad is None for part in (pipe.vae, backbone_for(pipe).denoiser) for p in part.parameters())
