"""Files that are no erasure for this model: what is wrong is said, and nothing is written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure import Concept, erase
from erasure.errors import ArtifactError, ConceptError, ErasureError, UnsupportedModelError, WrongBaseError
from erasure.exchange.checkpoints import ERASED, export_checkpoint
from erasure.exchange.importing import import_file
from erasure.exchange.lora_files import CONFIG, EXPORT, export_lora

CAT = [Concept("cat")]
KEY = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
STEM = f"lora_unet_{KEY.replace('.', '_')}"
OTHER = STEM.replace("to_k", "to_v")
DOWN, UP, ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"


@pytest.fixture(scope="module")
def pipe(tiny_pipe_original: Any) -> Any:
    return tiny_pipe_original


@pytest.fixture
def wrote(tmp_path: Path) -> Callable[..., Path]:
    """Writes a safetensors file."""

    def write(held: Mapping[str, torch.Tensor], **metadata: str) -> Path:
        path = tmp_path / "file.safetensors"
        save_file(dict(held), path, metadata)
        return path

    return write


def pair(stem: str = STEM, rank: int = 4, into: int = 32, out: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(stem))
    return {
        f"{stem}{DOWN}": torch.randn(rank, into, generator=generator),
        f"{stem}{UP}": torch.randn(out, rank, generator=generator),
    }


WHOLE = {**pair(), f"{STEM}{ALPHA}": torch.tensor(4.0)}
PEFT = {f"unet.{KEY.replace('to_k', 'to_v')}.lora_A.weight": torch.ones(2, 32),
        f"unet.{KEY.replace('to_k', 'to_v')}.lora_B.weight": torch.ones(64, 2)}  # fmt: skip


def without(held: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in held.items() if key != name}


@pytest.mark.parametrize(
    ("held", "error", "told"),
    [
        (without(WHOLE, f"{STEM}{UP}"), ArtifactError, r"has no up \(B\) factor: the file is half of a LoRA"),
        (without(WHOLE, f"{STEM}{DOWN}"), ArtifactError, r"has no down \(A\) factor: the file is half of a LoRA"),
        ({f"{STEM}{ALPHA}": torch.tensor(4.0), **pair(OTHER)}, ArtifactError, "has an alpha and no factors"),
        ({**WHOLE, **pair(OTHER)}, ArtifactError, r"an alpha for 1 of 2 layers, and none for .*to_v"),
        ({**WHOLE, **PEFT}, ArtifactError, r"names of two kinds, PEFT's .* and kohya's .*Split it"),
        ({**pair(), f"{STEM}{ALPHA}": torch.tensor(0.0)}, ArtifactError, "alpha of .* other than 0"),
        ({**pair(), f"{STEM}{ALPHA}": torch.ones(2)}, ArtifactError, "alpha of .* expected one number"),
        ({**pair(), f"{STEM}{ALPHA}": torch.tensor(float("nan"))}, ArtifactError, "alpha of .* expected one number"),
        ({**WHOLE, f"{STEM}.strange": torch.ones(1)}, ArtifactError, "which is no part of a LoRA"),
        (pair("lora_unet_nothing_known"), WrongBaseError, "1 of them are none of this StableDiffusionPipeline"),
        (pair(into=48), WrongBaseError, r"is for a layer of shape \(64, 48\), the model's has \(64, 32\)"),
        (pair(out=48), WrongBaseError, r"is for a layer of shape \(48, 32\)"),
        ({**pair(), f"{STEM}{UP}": torch.ones(64, 3)}, ArtifactError, "factors that do not go together"),
        ({**pair(), f"{STEM}{UP}": torch.ones(64)}, ArtifactError, "dimensions, expected 2 or 4"),
        ({**pair(), f"{STEM}{UP}": torch.ones(64, 4, dtype=torch.int32)}, ArtifactError, "2 or 4 of numbers"),
        ({name: tensor * float("nan") for name, tensor in pair().items()}, ArtifactError, "NaN or infinity"),
        ({name: tensor * 0 for name, tensor in pair().items()}, ArtifactError, "changes nothing"),
        ({f"{STEM}.hada_w1_a": torch.ones(2, 2)}, UnsupportedModelError, "is a LoHa .* merge it into its model"),
        ({**pair(), f"{STEM}.dora_scale": torch.ones(1)}, UnsupportedModelError, "is a DoRA"),
        ({**pair(), **pair(STEM.replace("lora_unet", "lycoris"))}, ArtifactError, "again, which another name"),
        ({f"{KEY}.weight": torch.ones(64, 48)}, WrongBaseError, r"\(64, 48\) of float32, and unet/.* has \(64, 32\)"),
        ({f"{KEY}.weight": torch.full((64, 32), float("inf"))}, ArtifactError, "holds NaN or infinity"),
        ({"nothing.weight": torch.ones(2, 2)}, WrongBaseError, r"holds 1 tensors, and 1 of them are none of this"),
        ({"first_stage_model.x": torch.ones(2)}, WrongBaseError, "holds nothing that an erasure changes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(
    pipe: Any, wrote: Any, held: Mapping[str, torch.Tensor], error: type[ErasureError], told: str
) -> None:
    with pytest.raises(error, match=told):
        import_file(wrote(held), pipe, CAT)


def test_weights_of_another_model(pipe: Any, wrote: Any, tiny_pipe_factory: Any) -> None:
    """The same shapes, and nothing of the model's values."""
    held = {
        name: tensor.clone() for name, tensor in tiny_pipe_factory(seed=1).unet.state_dict().items() if "attn2" in name
    }
    with pytest.raises(WrongBaseError, match=r"little to do with those of this .*made from another model"):
        import_file(wrote(held), pipe, CAT)


def test_weights_that_are_those_of_the_model(pipe: Any, wrote: Any) -> None:
    held = {f"{KEY}.weight": pipe.unet.get_submodule(KEY).weight.detach().clone()}
    with pytest.raises(ArtifactError, match="changes nothing"):
        import_file(wrote(held), pipe, CAT)


def test_one_tensor_under_two_names(pipe: Any, wrote: Any) -> None:
    stock = pipe.unet.get_submodule(KEY).weight.detach()
    with pytest.raises(ArtifactError, match="under two names with different values"):
        import_file(wrote({f"{KEY}.weight": stock + 1, f"unet.{KEY}.weight": stock + 2}), pipe, CAT)


@pytest.mark.parametrize("said", ["sdxl_base_v1-0", "flux1", "sd3m", "stable-diffusion-xl-v1-base/lora"])
def test_a_file_that_names_another_family(pipe: Any, wrote: Any, said: str) -> None:
    text = "modelspec.architecture" if "/" in said else "ss_base_model_version"
    with pytest.raises(WrongBaseError, match=rf"says that it is for '{said}' .*is stable-diffusion: name the model"):
        import_file(wrote(WHOLE, **{text: said}), pipe, CAT)
    assert import_file(wrote(WHOLE, ss_base_model_version="sd_v1"), pipe, CAT).erasure.low_rank


def test_nobody_says_what_it_erases(pipe: Any, wrote: Any) -> None:
    with pytest.raises(ConceptError, match=r"does not say what it erases: say it \(--concept\)"):
        import_file(wrote(WHOLE), pipe)


@pytest.mark.parametrize("told", ["not json", "[1]", json.dumps({"unet.lora_alpha": "4"}), "{" * 10_000])
def test_headers_of_diffusers_that_cannot_be_read(pipe: Any, wrote: Any, told: str) -> None:
    held = {name.replace("to_v", "to_k"): tensor for name, tensor in PEFT.items()}
    with pytest.raises(ArtifactError, match=r"lora_adapter_metadata|expected a number"):
        import_file(wrote(held, lora_adapter_metadata=told), pipe, CAT)


# Files that are none -------------------------------------------------------------------------------------------------


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["file.pkl", "file.pickle", "file.bin", "file.pt", "file.ckpt"])
def test_pickles_are_refused_and_never_run(pipe: Any, tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    (tmp_path / name).write_bytes(pickle.dumps({"unet": Evil(trace)}))
    with pytest.raises(ArtifactError, match=r"convert it where you trust it: .*safetensors.torch.save_file"):
        import_file(tmp_path / name, pipe, CAT)
    torch.save({"unet": {f"{KEY}.weight": torch.ones(64, 32)}, "more": Evil(trace)}, tmp_path / "evil.pt")
    with pytest.raises(ArtifactError, match=r"holds more than tensors.*convert it where you trust it"):
        import_file(tmp_path / "evil.pt", pipe, CAT)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ([torch.ones(2)], "holds a list"), ({"optimizer": {"x": torch.ones(2)}}, "no network known here"),
        ({3: torch.ones(2)}, "which is no text"), ({"unet": [1]}, "holds 'unet', a list"), ({}, "holds no tensors"),
        ({"unet": {"unet": {"unet": {"unet": {"unet": {"unet": {"x": torch.ones(1)}}}}}}}, "holds a dict"),
        ({"x": torch.ones(2).to_sparse()}, "is sparse"),
    ],
)  # fmt: skip
def test_archives_of_something_else(pipe: Any, tmp_path: Path, held: Any, told: str) -> None:
    torch.save(held, tmp_path / "file.pt")
    with pytest.raises(ArtifactError, match=told):
        import_file(tmp_path / "file.pt", pipe, CAT)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_files_that_were_cut_short(pipe: Any, wrote: Any, share: float) -> None:
    path = wrote(WHOLE)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ArtifactError, match="cannot be read"):
        import_file(path, pipe, CAT)


def test_folders_and_files_that_are_not_there(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="check the path"):
        import_file(tmp_path / "file.safetensors", pipe, CAT)
    with pytest.raises(ArtifactError, match="is a folder: name the file with the weights; it holds none"):
        import_file(tmp_path, pipe, CAT)
    save_file(dict(WHOLE), tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"is a folder: name the file .*'model.safetensors'"):
        import_file(tmp_path, pipe, CAT)
    made = erase(pipe, "cat", "uce", vocabulary=4, attach=False, progress=False).save(tmp_path / "made")
    with pytest.raises(ArtifactError, match="is an erasure already"):
        import_file(made, pipe, CAT)


# Our own files, changed by somebody ----------------------------------------------------------------------------------


@pytest.fixture
def exported(pipe: Any, tmp_path: Path) -> Path:
    made = erase(pipe, "cat", "uce", vocabulary=4, saved_as="lora", attach=False, progress=False)
    return export_lora(made, "kohya", tmp_path / "cat.safetensors").path


def test_our_file_on_another_model(exported: Path, tiny_pipe_factory: Any) -> None:
    with pytest.raises(WrongBaseError, match=r"was made for a model without a name .*another: name that model"):
        import_file(exported, tiny_pipe_factory(seed=1))


def header(path: Path) -> dict[str, str]:
    from erasure import files

    return files.read_metadata(path)


def test_our_file_with_layers_of_another(pipe: Any, exported: Path) -> None:
    save_file({**load_file(exported), **_bigger(exported)}, exported, header(exported))
    with pytest.raises(ArtifactError, match="its header does not tell of it"):
        import_file(exported, pipe)


def _bigger(path: Path) -> dict[str, torch.Tensor]:
    rank = max(len(tensor) for name, tensor in load_file(path).items() if name.endswith(DOWN))
    stem = STEM.replace("attn2", "attn1")
    return {**pair(stem, rank, 64, 64), f"{stem}{ALPHA}": torch.tensor(float(rank))}


@pytest.mark.parametrize("text", [CONFIG, EXPORT])
@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 99}', '"\\ud800"'])
def test_our_headers_are_not_trusted(pipe: Any, exported: Path, text: str, content: str) -> None:
    save_file(load_file(exported), exported, {**header(exported), text: content})
    if text == EXPORT and content == '{"format_version": 99}':
        assert not import_file(exported, pipe).notes
        return
    with pytest.raises(ArtifactError):
        import_file(exported, pipe)


@pytest.mark.parametrize("content", ["", "{", "{}", '[{"name": "cat"}]', '"\\ud800"'])
def test_the_header_of_our_checkpoints_is_not_trusted(pipe: Any, tmp_path: Path, content: str) -> None:
    made = erase(pipe, "cat", "uce", vocabulary=4, attach=False, progress=False)
    path = export_checkpoint(made, pipe, tmp_path / "erased.safetensors").path
    save_file(load_file(path), path, {**header(path), ERASED: content})
    with pytest.raises(ArtifactError, match="erasures in its header"):
        import_file(path, pipe)
