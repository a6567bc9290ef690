"""The function that learns concepts from pictures: preparation, training and result."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from erasure.attach import ErasureManager
from erasure.backbones import Backbone, backbone_for
from erasure.cache import model_fingerprint
from erasure.carriers.edits import Edits
from erasure.errors import AttachError, OptionError
from erasure.interop import scopes
from erasure.interop.pipelines import origin
from erasure.learning.attencraft import AttenCraft, in_latents
from erasure.learning.concepts import ConceptsConfig, LearnedConcepts, base_of
from erasure.learning.lessons import Balance, CutOuts, PictureTraining, Places
from erasure.learning.pictures import Pictures, cut_out, encoded, read_pictures
from erasure.learning.player import LearnedTensors
from erasure.learning.tokens import beside, check_names, put_in, reading_towers, start_vectors
from erasure.options import check_seed
from erasure.progress import reporting
from erasure.text.corpora import vocabulary, vocabulary_prompts
from erasure.text.encodings import Reader
from erasure.training import storage
from erasure.training.checkpoint import Stateful
from erasure.training.cost import DenoiserCost
from erasure.training.images import NoisedImages
from erasure.training.loop import Trainer, make_accelerator
from erasure.training.run import Run
from erasure.training.states import Scene, session_of, stable_seed
from erasure.training.trajectories import Rollout, rolling_out
from erasure.training.turns import Turn
from erasure.versions import library_versions

if TYPE_CHECKING:
    from accelerate import Accelerator

Picture = str | Path | Image.Image


def learn_concepts(
    pipe: DiffusionPipeline,
    images: Picture | Sequence[Picture],
    tokens: str | Sequence[str],
    *,
    like: Mapping[str, str] | None = None,
    masks: Sequence[Picture] | Sequence[Sequence[Picture]] = (),
    seed: int = 0,
    load: bool = True,
    preset: str | None = None,
    progress: bool | Callable[[float], None] = True,
    run: Run | None = None,
    **options: object,
) -> LearnedConcepts:
    """Learn new tokens for the contents of pictures, and load them into the pipeline.

    Prompts can then use the tokens, and `erasure.erase(pipe, "<logo>", ...)` erases what they stand for.

    Args:
        pipe: A pipeline of Stable Diffusion or SDXL, without erasures.
        images: Files or pictures, each of which shows all things to learn.
        tokens: New token for each thing in the pictures, such as `<logo>`. Without `like` and `masks`, tokens are
            assigned to the things from left to right.
        like: Known words that are similar to a thing, by token, from which its vectors start.
        masks: Mask of each thing (white on black), in the order of the tokens: a list for a single picture, a list of
            lists for several. The model finds masks that are left out.
        seed: Seed of all random choices.
        load: Whether to load the tokens into the pipeline; otherwise it does not change.
        preset: Name of a set of the method's options, for instance `paper`.
        progress: `True` for a progress bar, or a function that is called with the share of the work that is done, 0 to
            1.
        run: Folder of checkpoints, from which an interrupted training continues, and logging.
        **options: See `erasure.learning.attencraft.AttenCraft`.

    Raises:
        ConceptError: A token is a known word, has been learned already, or is given twice.
        ImageError: A picture cannot be read, is blank, or is too small.
        MaskError: The model cannot find or separate the things, or masks do not fit.
        OptionError: An option does not exist, or its value is not allowed.
        AttachError: An erasure is attached.
        UnsupportedModelError: The model reads words by T5, is quantised or offloaded, or has no cross-attention.
        DivergenceError: NaN or infinity occurred during optimisation.
        TrainingError: The run's folder is in use, holds something else, or cannot be written.
    """
    method = AttenCraft.configured(preset, **options)
    seed = check_seed(seed, "learning concepts")
    names = [tokens] if isinstance(tokens, str) else list(tokens)
    shown = [images] if isinstance(images, (str, Path, Image.Image)) else list(images)
    placed = _by_picture(masks)
    known = dict(like or {})
    backbone = backbone_for(pipe)
    towers = reading_towers(backbone)
    check_names(names, towers)
    if strangers := sorted(set(known) - set(names)):
        raise OptionError(f"'like' names {strangers[0]!r}, which is none of the tokens {', '.join(names)}")
    for word in filter(None, known.values()):
        for tower in towers:
            tower.check_words(word)
    if attached := list(ErasureManager(pipe).erasures):
        raise AttachError(
            f"the erasure {attached[0]!r} is attached: learn with the stock model, unload_erasures() first"
        )
    backbone.check_plain("learn with the plain model")
    side = method.resolution
    size = (side, side) if side else _own_size(backbone)
    read = read_pictures(shown, placed, len(names), size)
    started = time.perf_counter()
    stock = ErasureManager(pipe).stock(without_adapters=True)
    with ExitStack() as stack:
        stack.enter_context(scopes.same_gradient_mode())
        stack.enter_context(scopes.plain_precision())
        report = stack.enter_context(reporting(progress, "learning"))
        # The caller may have switched gradients off for generation.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(seed)
        made = _learned(beside(stock), backbone_for(stock), method, read, names, known, seed, report, run or Run())
    made.config.cost["seconds"] = round(
        time.perf_counter() - started + made.config.cost.pop("earlier_seconds", 0.0), 3
    )
    if load:
        made.load_into(pipe)
    return made


def _learned(
    pipe: DiffusionPipeline, stock: Backbone, method: AttenCraft, read: Pictures, names: Sequence[str],
    like: Mapping[str, str], seed: int, progress: Callable[[float], None], run: Run,
) -> LearnedConcepts:  # fmt: skip
    """Train, and describe the result; see `learn_concepts`."""
    size = (read.pixels.shape[2], read.pixels.shape[3])
    backbone = type(stock)(pipe, size=size)
    accelerator, cost = make_accelerator(run, backbone.device), DenoiserCost()
    method.check_batches({"batch": method.batch, "prior_batch": method.prior_batch}, accelerator.num_processes)
    model, prints = model_fingerprint(stock.pipe), [_print(part) for part in read.pixels]
    recipe = {
        "method": method.name, "options": dataclasses.asdict(method), "seed": seed, "model": model,
        "session": session_of(backbone), "tokens": list(names), "like": dict(like), "pictures": prints,
        "masks": None if read.masks is None else _print(read.masks),
    }  # fmt: skip
    base = base_of(stock, *origin(stock.pipe))
    generator = torch.Generator().manual_seed(seed)
    put_in(
        pipe,
        {
            tower.component: {
                name: start_vectors(tower, like.get(name, ""), method.vectors, method.spread, generator)
                for name in names
            }
            for tower in backbone.towers
        },
    )
    with run.opened(recipe, accelerator.is_main_process), ExitStack() as stack:
        stack.enter_context(scopes.frozen(backbone.denoiser, *(t.module for t in backbone.towers), pipe.vae))
        stack.enter_context(cost.counting(backbone.denoiser))
        stack.enter_context(rolling_out(backbone))
        lesson = _lesson(backbone, method, read, names, like, seed, accelerator)
        stack.enter_context(scopes.placed([pipe.vae], "cpu"))
        cost.begin("rollout")
        if lesson.prior is not None:
            storage.draw(lesson.prior, model)
        cost.begin("setup")
        parts: dict[str, Stateful] = {"balance": lesson.balance, "places": lesson.places}
        trainer = Trainer(
            turns=[
                Turn(
                    name="concepts", player=lesson.taught, losses=partial(method.losses, lesson),
                    descent=method.descent, after=(lesson.balance,),
                )
            ],
            prepare=partial(method.prepare, lesson), steps=method.steps, seed=seed, accumulation=method.accumulation,
            run=run, accelerator=accelerator, cost=cost, scales_losses=backbone.dtype == torch.float16,
            before=partial(method.renewed, lesson), parts=parts,
        )  # fmt: skip
        cost.begin("update")
        row = trainer.train(progress)
        cost.begin("setup")
    figures = {f"loss_{name}": round(value, 6) for name, value in row.items()}
    figures |= {name: round(value, 6) for name, value in lesson.balance.figures().items()}
    figures |= {"denoiser_forwards": float(cost.forwards), "earlier_seconds": cost.earlier_seconds}
    config = ConceptsConfig(
        tokens=list(names), family=backbone.family, base=base, options=dataclasses.asdict(method), like=dict(like),
        pictures=prints, seed=seed, cost=figures, versions=library_versions(),
    )  # fmt: skip
    weights = lesson.taught.weights
    edits = Edits() if weights is None else weights.edits(backbone.denoiser_component)
    return LearnedConcepts(config, lesson.taught.vectors(), edits)


def _lesson(
    backbone: Backbone, method: AttenCraft, read: Pictures, names: Sequence[str], like: Mapping[str, str], seed: int,
    accelerator: Accelerator,
) -> PictureTraining:  # fmt: skip
    """Make the latents, the masks, and the trained tensors."""
    clean = encoded(backbone, read.pixels)
    are_known = read.masks is not None or method.masks != "none"
    if read.masks is not None:
        masks = read.masks.bool()
    elif not are_known:
        masks = torch.ones(len(clean), len(names), *read.pixels.shape[2:], dtype=torch.bool)
    elif len(names) == 1 and not read.opaque.all():
        masks = read.opaque.bool()
    else:
        masks = method.first(backbone, clean, names, like, seed)
    alone = _alone(backbone, read.pixels, masks) if are_known and method.alone == "cut out" else None
    places = Places(in_latents(masks, clean), are_known)
    weights, kept = method.teaches(backbone, torch.Generator().manual_seed(seed + 1))
    taught = LearnedTensors(backbone.towers, names, method.vectors_rate, weights, kept)
    balance = Balance(len(names), accelerator.reduce)
    prior = None
    if weights is not None and method.prior_batch and method.prior_weight:
        reader, tower = Reader(backbone), backbone.reader
        words = vocabulary(tower, ())
        random = torch.Generator().manual_seed(stable_seed(seed, "prior"))
        prompts = (
            [method.prior_prompt] if method.prior_prompt else vocabulary_prompts(words, method.prior_prompts, random)
        )
        scenes = [Scene(prompt) for prompt in dict.fromkeys(prompts)]
        reader.read(["", *prompts])
        rollout = Rollout(seeds=method.prior_images, steps=method.prior_steps, guidance=3.0)
        prior = NoisedImages(
            backbone, scenes, reader, rollout, seed, asks_null=False, gather=accelerator.reduce,
            share=(accelerator.process_index, accelerator.num_processes),
        )  # fmt: skip
    return PictureTraining(
        backbone, list(names), clean, in_latents(read.inside, clean), places, taught, balance, prior, seed, alone
    )


def _alone(backbone: Backbone, pixels: Tensor, masks: Tensor) -> CutOuts:
    """Cut out each thing of each picture."""
    parts = [cut_out(picture, own) for picture, own in zip(pixels, masks, strict=True)]
    clean = torch.stack([encoded(backbone, things) for things, _ in parts])
    return CutOuts(clean, in_latents(torch.stack([own for _, own in parts]), clean[0]))


def _by_picture(masks: Sequence[Picture] | Sequence[Sequence[Picture]]) -> list[list[Picture]]:
    """Group masks by picture; those of a single picture may be given as a plain list."""
    alone = [mask for mask in masks if isinstance(mask, (str, Path, Image.Image))]
    return [alone] if alone else [list(each) for each in masks if not isinstance(each, (str, Path, Image.Image))]


def _own_size(backbone: Backbone) -> tuple[int, int]:
    """Give the height and width in pixels of the model's images."""
    factor, (_, rows, columns) = backbone.latents.factor, backbone.latents.shape()
    return factor * rows, factor * columns


def _print(values: Tensor) -> str:
    """Compute the sha256 of values in 0-1, as bytes."""
    return hashlib.sha256((255 * values).round().to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()
