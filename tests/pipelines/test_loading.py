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
from diffusers.loaders import FromSingleFileMixin
from PIL import Image
from safetensors.torch import save_file

import erasure
from erasure.errors import ArtifactError, AttachError, OptionError, UnsupportedModelError
from erasure.interop import single_files
from erasure.pipelines import StableDiffusionErasurePipeline, pipeline_class


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


def test_a_file_has_no_variants(tmp_path: Path) -> None:
    save_file({"model.diffusion_model.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(OptionError, match="variant='fp16' is for folders and repositories"):
        erasure.load_pipeline(tmp_path / "model.safetensors", variant="fp16", device="cpu")


def test_the_drop_in_draws_what_stock_draws(
    tiny_pipe_folder: Path, tiny_pipe_original: Any, draw: Any, same_picture: Any
) -> None:
    pipe = erasure.load_pipeline(tiny_pipe_folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    same_picture(draw(pipe), draw(tiny_pipe_original))


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


@pytest.mark.parametrize("family", ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux", "chroma"])
def test_every_family_is_loaded_by_its_own_drop_in(
    tiny_models: Any, tmp_path: Path, family: str, draw: Any, same_picture: Any
) -> None:
    stock = tiny_models[family]()
    stock.save_pretrained(tmp_path / "stock")
    pipe = erasure.load_pipeline(tmp_path / "stock", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is pipeline_class(type(stock).__name__)
    assert isinstance(pipe, type(stock))
    same_picture(draw(pipe), draw(stock))
    pipe.save_pretrained(tmp_path / "ours")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "ours")) is type(stock)
    assert type(AutoPipelineForText2Image.from_pipe(pipe)).__name__ in (type(stock).__name__, type(pipe).__name__)


def test_sd3_comes_without_its_t5(tiny_models: Any, tmp_path: Path, draw: Any, same_picture: Any) -> None:
    stock = tiny_models["stable-diffusion-3"]()
    stock.register_modules(text_encoder_3=None, tokenizer_3=None)
    stock.save_pretrained(tmp_path / "stock")
    pipe = erasure.load_pipeline(tmp_path / "stock", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    before = draw(pipe)
    same_picture(before, draw(stock))
    pipe.erase("cat", "uce", vocabulary=4, progress=False)
    assert pipe.verify_erasures() == 2
    erased = draw(pipe)
    assert not torch.equal(erased, before)
    pipe.save_erased_pipeline(tmp_path / "erased", fuse=False)
    for again in (type(pipe).from_pretrained(tmp_path / "erased"), erasure.load_pipeline(tmp_path / "erased")):
        again.set_progress_bar_config(disable=True)
        same_picture(draw(again), erased)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Flux2Pipeline", "Not supported yet: FLUX.2 reads three layers of one language model"),
        ("QwenImagePipeline", "Not supported yet: Qwen-Image reads"),
        ("ZImagePipeline", "Not supported yet: Z-Image reads"),
        ("SanaPipeline", "Not supported yet: SANA reads"),
        ("NeverHeardOfPipeline", "supported: StableDiff"),
    ],
)
def test_unsupported_classes_are_named(tiny_pipe_folder: Path, tmp_path: Path, name: str, known: str) -> None:
    folder = shutil.copytree(tiny_pipe_folder, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": name}))
    with pytest.raises(UnsupportedModelError, match=rf"{name} that does text-to-image; supported: .*{known}|{known}"):
        erasure.load_pipeline(folder)


def test_an_unknown_transformer_is_named(tiny_models: Any) -> None:
    from diffusers import SanaTransformer2DModel

    pipe = tiny_models["flux"]()
    pipe.transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"SanaTransformer2DModel belongs to no .* yet: SANA reads"):
        erasure.erase(pipe, "cat", "uce")


V1 = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CHECKPOINTS = {
    "StableDiffusionErasurePipeline": {V1: (1, 1)},
    "StableDiffusionXLErasurePipeline": {
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1,), V1: (1, 1),
    },
    "StableDiffusion3ErasurePipeline": {
        "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
        "model.diffusion_model.pos_embed": (1, 36864, 1),
    },
    "FluxErasurePipeline": {
        "double_blocks.0.img_attn.norm.key_norm.scale": (1,), "guidance_in.in_layer.bias": (1,),
        "img_in.weight": (1, 64),
    },
    "ChromaErasurePipeline": {"distilled_guidance_layer.in_proj.bias": (1,), "double_blocks.0.x": (1,)},
}  # fmt: skip
"""Tensors by which checkpoints of each family are known."""


def write_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


@pytest.mark.parametrize("drop_in", CHECKPOINTS)
def test_single_files_are_loaded_by_the_drop_in_of_their_kind(
    tmp_path: Path, drop_in: str, monkeypatch: pytest.MonkeyPatch, tiny_pipe_original: Any
) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", CHECKPOINTS[drop_in])
    asked: list[Any] = []

    def read(cls: type, file: str, **options: Any) -> Any:
        asked.append((cls.__name__, file, options))
        return tiny_pipe_original

    monkeypatch.setattr(FromSingleFileMixin, "from_single_file", classmethod(read))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": drop_in.replace("Erasure", "")}))
    erasure.load_pipeline(path, device="cpu", config=tmp_path)
    assert asked == [(drop_in, str(path), {"dtype": torch.float32, "config": str(tmp_path)})]


def test_a_single_file_and_configs_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", CHECKPOINTS["StableDiffusionErasurePipeline"])
    with pytest.raises(OptionError, match=r"of a StableDiffusionPipeline, .* those of a FluxPipeline: name"):
        erasure.load_pipeline(path, config="canvas-flux")
    with pytest.raises(ArtifactError, match=r"no file named model_index.json"):
        erasure.load_pipeline(path, config=tmp_path)


def test_a_single_file_of_a_flux_of_another_width_is_refused(tmp_path: Path) -> None:
    shapes = {**CHECKPOINTS["FluxErasurePipeline"], "double_blocks.0.img_attn.qkv.weight": (96, 32)}
    path = write_checkpoint(tmp_path / "model.safetensors", shapes)
    with pytest.raises(UnsupportedModelError, match=r"FLUX.1 of width 32, .* width 3072 only"):
        erasure.load_pipeline(path, config="canvas-flux")


def test_configs_say_the_kind_of_a_single_file_that_diffusers_does_not_know(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", {"model.diffusion_model.joint_blocks.0.x": (1,)})
    with pytest.raises(UnsupportedModelError, match=r"of no kind that is known.*needs config=FOLDER"):
        erasure.load_pipeline(path)
    assert single_files.stock_class(path, "StableDiffusion3Pipeline") == "StableDiffusion3Pipeline"
    with pytest.raises(UnsupportedModelError, match="of no kind that is known"):
        single_files.stock_class(path, "SanaPipeline")


def test_parts_that_a_single_file_lacks_are_named(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
    }  # fmt: skip
    inside = {
        "vae": "first_stage_model.x",
        "text_encoder": "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.weight",
        "text_encoder_3": "text_encoders.t5xxl.transformer.shared.weight",
    }
    for name in (None, *inside):
        there = {"model.diffusion_model.x": (1,)} | ({} if name is None else {inside[name]: (1,)})
        path = write_checkpoint(tmp_path / "model.safetensors", there)
        assert single_files.missing_parts(path, index) == [part for part in inside if part != name]


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"model.diffusion_model.nothing_known.weight": (1,)}, "of no kind that is known"),
        (
            {"single_stream_modulation.lin.weight": (1,), "double_blocks.0.x": (1,)},
            "of the kind 'flux-2-dev'",
        ),
        (
            {"double_blocks.0.img_attn.norm.key_norm.scale": (1,), "guidance_in.in_layer.bias": (1,),
             "img_in.weight": (1, 384)},
            "of the kind 'flux-fill'",
        ),
    ],
)  # fmt: skip
def test_single_files_of_other_kinds_are_refused(tmp_path: Path, shapes: Any, what: str) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", shapes)
    with pytest.raises(UnsupportedModelError, match=f"{what}; supported: v1, v2"):
        erasure.load_pipeline(path)


def test_single_files_that_lack_parts_are_refused(tmp_path: Path, tiny_pipe_folder: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", {V1: (1, 1)})
    with pytest.raises(ArtifactError, match="cannot load the model"):
        erasure.load_pipeline(path, device="cpu", config=tiny_pipe_folder)
    with pytest.raises(OptionError, match=r"config=.* is for single-file checkpoints"):
        erasure.load_pipeline(tiny_pipe_folder, config=tiny_pipe_folder)


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


def test_the_methods(tiny_pipe_folder: Path, draw: Any, tmp_path: Path, same_picture: Any) -> None:
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
    same_picture(draw(baked), erased)
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
