from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline
from PIL import Image

import erasure
from erasure.errors import ArtifactError, AttachError, UnsupportedModelError
from erasure.pipelines import (
    PIPELINES,
    StableDiffusionErasurePipeline,
    StableDiffusionXLErasurePipeline,
    pipeline_class,
)


@pytest.fixture(scope="module")
def own_folder(tiny_pipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as the drop-in class writes it."""
    folder = tmp_path_factory.mktemp("own") / "model"
    StableDiffusionErasurePipeline.from_pretrained(tiny_pipe_folder).save_pretrained(folder)
    return folder


def test_load_pipeline_by_folder(tiny_pipe_folder: Path, tiny_pipe_original: Any, tensors_of: Any) -> None:
    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu")
    assert type(pipe) is StableDiffusionErasurePipeline
    assert pipe.dtype == torch.float32
    assert all(torch.equal(value, tensors_of(pipe)[key]) for key, value in tensors_of(tiny_pipe_original).items())
    assert erasure.load_pipeline(str(tiny_pipe_folder), dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_the_drop_in_draws_what_stock_draws(tiny_pipe_folder: Path, tiny_pipe_original: Any, draw: Any) -> None:
    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe), draw(tiny_pipe_original))


def test_model_index_names_the_stock_class(own_folder: Path, tiny_pipe_folder: Path) -> None:
    own, stock = (json.loads((folder / "model_index.json").read_text()) for folder in (own_folder, tiny_pipe_folder))
    assert own["_class_name"] == "StableDiffusionPipeline"
    differing = {key for key in {*own, *stock} if own.get(key) != stock.get(key)}
    assert differing <= {"_name_or_path"}


@pytest.mark.parametrize(
    ("loader", "kind"),
    [
        (DiffusionPipeline, StableDiffusionPipeline),
        (AutoPipelineForText2Image, StableDiffusionPipeline),
        (StableDiffusionPipeline, StableDiffusionPipeline),
        (StableDiffusionErasurePipeline, StableDiffusionErasurePipeline),
    ],
)
def test_every_loader_opens_what_the_drop_in_wrote(own_folder: Path, loader: Any, kind: type) -> None:
    assert type(loader.from_pretrained(own_folder)) is kind


def test_unsupported_classes_are_named(tiny_pipe_folder: Path, tmp_path: Path) -> None:
    assert pipeline_class("StableDiffusionPipeline") is StableDiffusionErasurePipeline
    assert pipeline_class("StableDiffusionXLPipeline") is StableDiffusionXLErasurePipeline
    drop_ins = {StableDiffusionErasurePipeline, StableDiffusionXLErasurePipeline}
    assert set(PIPELINES["text-to-image"].values()) == drop_ins
    folder = shutil.copytree(tiny_pipe_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxPipeline"}))
    with pytest.raises(UnsupportedModelError, match=r"FluxPipeline that does text-to-image; supported: StableDiff"):
        erasure.load_pipeline(folder)


def test_what_cannot_be_loaded(tmp_path: Path, tiny_pipe_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot load the model .*Give a Hub id, a folder"):
        erasure.load_pipeline(tmp_path)
    with pytest.raises(ArtifactError, match="cannot load the model 'no/such-model'"):
        erasure.load_pipeline("no/such-model")
    folder = shutil.copytree(tiny_pipe_folder, tmp_path / "model")
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot load the model"):
        erasure.load_pipeline(folder)


def test_the_methods(tiny_pipe_folder: Path, draw: Any, tmp_path: Path) -> None:
    """Every method of the mixin once, from making to removal."""
    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    stock = draw(pipe)
    made = pipe.erase("cat", "uce", vocabulary=4, progress=False)
    assert pipe.active_erasures() == ["cat-uce"]
    assert made.config.base["model"] == "tiny-sd", "somebody's absolute path must not travel"
    erased = draw(pipe)
    assert not torch.equal(erased, stock)
    assert pipe.verify_erasures() == len(made.edits)
    folder = pipe.save_erasure(tmp_path / "cat")
    with pytest.raises(ArtifactError, match="not empty"):
        pipe.save_erasure(folder)
    pipe.save_erasure(folder, "cat-uce", overwrite=True)
    pipe.load_erasure(folder, name="again")
    with pytest.raises(AttachError, match=r"2 erasures are attached .* say which"):
        pipe.save_erasure(tmp_path / "other")
    with pytest.raises(AttachError, match="no erasure named 'dog'"):
        pipe.save_erasure(tmp_path / "other", "dog")
    assert pipe.list_erasures() == {"unet": ["cat-uce", "again"]}
    pipe.delete_erasure("again")
    assert torch.equal(draw(pipe), erased)
    pipe.set_erasures("cat-uce", 0.5)
    pipe.disable_erasures()
    assert torch.equal(draw(pipe), stock)
    pipe.enable_erasures()
    pipe.set_erasures(["cat-uce"])
    pipe.fuse_erasure()
    assert pipe.fused_erasures == ["cat-uce"]
    pipe.unload_erasures()
    assert torch.equal(draw(pipe), erased)
    with pytest.raises(AttachError, match="fused"):
        pipe.save_erased_pipeline(tmp_path / "not fused", fuse=False)
    pipe.save_erased_pipeline(tmp_path / "fused")
    pipe.unfuse_erasure()
    pipe.unload_erasures()
    assert torch.equal(draw(pipe), stock)
    baked = StableDiffusionPipeline.from_pretrained(tmp_path / "fused")
    baked.set_progress_bar_config(disable=True)
    assert torch.equal(draw(baked), erased)
    with pytest.raises(ArtifactError, match="not saved with fuse=False"):
        StableDiffusionErasurePipeline.load_erased_pipeline(tmp_path / "fused")


def test_the_functions_for_stock_pipelines(tiny_pipe: Any, tmp_path: Path, draw: Any) -> None:
    stock = draw(tiny_pipe)
    made = erasure.erase(tiny_pipe, "cat", "uce", name="mine", vocabulary=4, progress=False)
    erased = draw(tiny_pipe)
    manager = erasure.ErasureManager(tiny_pipe)
    assert manager.active_erasures() == ["mine"]
    manager.unload()
    loaded = erasure.load(tiny_pipe, made.save(tmp_path / "cat"), name="theirs")
    assert loaded.config == made.config
    assert manager.active_erasures() == ["theirs"]
    assert torch.equal(draw(tiny_pipe), erased)
    assert not torch.equal(erased, stock)


def test_half_a_saved_pipeline_is_not_taken_for_the_base(
    tiny_pipe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu")
    pipe.erase("cat", "uce", vocabulary=0, progress=False)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(pipe.vae), "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_erased_pipeline(tmp_path / "model", fuse=False)
    assert pipe.verify_erasures() > 0
    with pytest.raises(ArtifactError):
        erasure.load_pipeline(tmp_path / "model")


def test_the_commands_for_attention_take_sdxl(tiny_xl_original: Any, tmp_path: Path) -> None:
    from PIL import Image

    from erasure.cli.main import main

    model, image, mask, out = (str(tmp_path / name) for name in ("xl", "image.png", "mask.png", "clean.png"))
    tiny_xl_original.save_pretrained(model)
    Image.effect_noise((32, 40), 60).save(image)
    hole = Image.new("L", (32, 40))
    hole.paste(255, (8, 8, 20, 20))
    hole.save(mask)
    start = ["remove", "--model", model, "--image", image, "--mask", mask, "--steps", "4", "--preset", "official-sdxl"]
    assert main([*start, "--out", out]) == 0
    assert Image.open(out).size == (32, 40)
    draw = ["generate", "--model", model, "--prompt", "a cat and a dog", "--compose", "cat", "dog", "--steps", "2"]
    assert main([*draw, "--out", str(tmp_path / "drawn")]) == 0
    assert type(erasure.load_pipeline(model, device="cpu")).__name__ == "StableDiffusionXLErasurePipeline"


@pytest.mark.parametrize("task", ["object-removal", "composition"])
def test_sdxl_comes_as_our_class_by_every_way_and_is_written_as_the_stock_one(
    tiny_xl_original: Any, tmp_path: Path, task: Any
) -> None:
    """`from_pretrained`, `from_pipe`, `load_pipeline`, and again from what it wrote."""
    import erasure
    from erasure.pipelines import StableDiffusionXLAStarPipeline, StableDiffusionXLObjectRemovalPipeline

    ours: Any = {
        "object-removal": StableDiffusionXLObjectRemovalPipeline,
        "composition": StableDiffusionXLAStarPipeline,
    }
    kind = ours[task]
    tiny_xl_original.save_pretrained(tmp_path / "stock")
    made = [
        kind.from_pretrained(tmp_path / "stock"),
        kind.from_pipe(tiny_xl_original),
        erasure.load_pipeline(tmp_path / "stock", task=task, device="cpu"),
    ]
    made[0].save_pretrained(tmp_path / "again")
    made.append(erasure.load_pipeline(tmp_path / "again", task=task, device="cpu"))
    made.append(kind.from_pretrained(tmp_path / "again"))
    assert [type(pipe) for pipe in made] == [kind] * 5
    stock = {"object-removal": "StableDiffusionXLInpaintPipeline", "composition": "StableDiffusionXLPipeline"}[task]
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "again")).__name__ == stock


def test_removal_returns_what_the_stock_class_returns(tiny_pipe_original: Any, tiny_xl_original: Any) -> None:
    from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
    from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput

    from erasure.pipelines import StableDiffusionObjectRemovalPipeline, StableDiffusionXLObjectRemovalPipeline

    image, mask = Image.new("RGB", (32, 32), "white"), np.zeros((32, 32), dtype=bool)
    for base, kind, output, count in (
        (tiny_pipe_original, StableDiffusionObjectRemovalPipeline, StableDiffusionPipelineOutput, 2),
        (tiny_xl_original, StableDiffusionXLObjectRemovalPipeline, StableDiffusionXLPipelineOutput, 1),
    ):
        pipe: Any = kind.from_pipe(base)
        pipe.set_progress_bar_config(disable=True)
        for covered in (mask, np.arange(1024).reshape(32, 32) % 32 < 8):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                assert type(pipe(image, covered, num_inference_steps=2)) is output
                assert len(pipe(image, covered, num_inference_steps=2, return_dict=False)) == count
