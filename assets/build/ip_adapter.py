"""Train and write `canvas-ip-adapter`: an IP-Adapter with which `canvas-sd` draws what a picture shows.

It is of the kind that Ye et al. (arXiv 2308.06721) call IP-Adapter: four tokens, projected from the embedding that
canvas-clip's image tower makes of a picture, with keys and values of their own beside those of the words.
"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import erasure
from erasure.assets import ROOT
from erasure.assets import path as embedded
from erasure.assets.build.bank import Bank
from erasure.assets.build.evaluate import generate, sheet
from erasure.assets.build.export import GENERATION
from erasure.assets.build.fit import fit, processes, trained
from erasure.assets.build.image_tower import drawn, image_tower, seen
from erasure.assets.build.loop import cosine, log
from erasure.assets.build.tokenizer import CONTEXT
from erasure.assets.facts import FILE
from erasure.assets.scenes import caption, sample_scene
from erasure.assets.world import OBJECTS, STYLES, noun_phrase
from erasure.eval.detectors import CanvasJudge
from erasure.files import write_json
from erasure.interop.image_prompts import ENCODER, cross_attention
from erasure.interop.protocols import Denoiser

NAME = "canvas-ip-adapter"
WEIGHTS = "ip-adapter_canvas-sd.safetensors"
SUBFOLDER = "models"
TOKENS = 4
"""Tokens that an adapter makes of a picture. Diffusers knows no other number for this kind of adapter."""


class Adapter(ModelMixin, ConfigMixin):
    """The tensors of an IP-Adapter, under the names of its file.

    Args:
        image_width: Width of a picture's embedding.
        width: Width of a token, that of the UNet's words.
        channels: Width of each cross-attention layer, in the order of the UNet's processors.
    """

    @register_to_config
    def __init__(self, image_width: int, width: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.image_proj = nn.ModuleDict(
            {"proj": nn.Linear(image_width, TOKENS * width), "norm": nn.LayerNorm(width)}
        )  # fmt: skip
        # Self-attention layers count as well, and come first in each block.
        self.ip_adapter = nn.ModuleDict(
            {
                str(2 * index + 1): nn.ModuleDict(
                    {name: nn.Linear(width, wide, bias=False) for name in ("to_k_ip", "to_v_ip")}
                )
                for index, wide in enumerate(channels)
            }
        )

    @classmethod
    def of(cls, unet: UNet2DConditionModel, image_width: int) -> Adapter:
        """An adapter whose keys and values are those that a UNet has for words."""
        layers = attention_layers(unet)
        made = cls(image_width, unet.config.cross_attention_dim, tuple(layer.to_k.out_features for layer in layers))
        for own, layer in zip(made.layers, layers, strict=True):
            own["to_k_ip"].load_state_dict(layer.to_k.state_dict())
            own["to_v_ip"].load_state_dict(layer.to_v.state_dict())
        return made

    @property
    def layers(self) -> list[nn.ModuleDict]:
        """Keys and values for each cross-attention layer."""
        return [cast(nn.ModuleDict, part) for part in self.ip_adapter.values()]

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """The tensors, as diffusers takes them when they are in no file."""
        return {name: dict(getattr(self, name).state_dict()) for name in ("image_proj", "ip_adapter")}

    def put_into(self, pipe: StableDiffusionPipeline) -> None:
        """Load this adapter into a pipeline, whose UNet then runs these very tensors."""
        pipe.load_ip_adapter(self.parts(), subfolder="", weight_name="", image_encoder_folder=None)
        projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        assert isinstance(projection, ImageProjection)
        projection.image_embeds, projection.norm = self.image_proj["proj"], self.image_proj["norm"]
        for own, (name, _) in zip(self.layers, cross_attention(pipe.unet), strict=True):
            processor = pipe.unet.attn_processors[f"{name}.processor"]
            processor.to_k_ip[0], processor.to_v_ip[0] = own["to_k_ip"], own["to_v_ip"]


def attention_layers(unet: UNet2DConditionModel) -> list[Attention]:
    """The layers that look at words, in the order in which adapters number them."""
    return [layer for _, layer in cross_attention(cast(Denoiser, unet))]


class PictureTraining(NamedTuple):
    """Queries of the cross-attention layers, and how words change the answers; a tensor for each layer."""

    queries: list[Tensor]
    """`(scenes, places, channels)`."""
    wanted: list[Tensor]
    """Answer for the scene's caption without that for the empty prompt, `(scenes, places, channels)`."""


@torch.no_grad()
def lesson(pipe: StableDiffusionPipeline, stored: Bank, scenes: int, places: int, seed: int) -> PictureTraining:
    """Ask the stock model about noised scenes, each with its caption.

    Args:
        pipe: The model, without an adapter.
        stored: Scenes.
        scenes: How many of them.
        places: Places of the picture that are kept of each layer.
        seed: Seeds captions, noise and places.
    """
    rng, layers = np.random.default_rng(seed), attention_layers(pipe.unet)
    queries: list[list[Tensor]] = [[] for _ in layers]
    wanted: list[list[Tensor]] = [[] for _ in layers]
    nothing = states_of(pipe, [""])
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, scenes, 50):
        rows = np.arange(first, min(first + 50, scenes))
        words = states_of(pipe, [caption(stored.scenes[row], rng) for row in rows])
        clean = stored.latents[rows]
        t = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
        noisy = pipe.scheduler.add_noise(clean, torch.randn(clean.shape, generator=generator), t)
        with ExitStack() as stack:
            asked: dict[int, Tensor] = {}
            for number, layer in enumerate(layers):
                hook = layer.to_q.register_forward_hook(
                    lambda _layer, _args, made, at=(asked, number): at[0].update({at[1]: made})
                )
                stack.callback(hook.remove)
            pipe.unet(noisy, t, words)
        for number, layer in enumerate(layers):
            chosen = torch.randint(asked[number].shape[1], (places,), generator=generator)
            query = asked[number][:, chosen]
            own, none = (
                attended(query, layer.to_k(told), layer.to_v(told), layer.heads)
                for told in (words, nothing.expand(len(rows), -1, -1))
            )
            queries[number].append(query)
            wanted[number].append(own - none)
    return PictureTraining([torch.cat(parts) for parts in queries], [torch.cat(parts) for parts in wanted])


def states_of(pipe: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """Encode captions, `(captions, tokens, width)`."""
    ids = pipe.tokenizer(captions, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
    states: Tensor = pipe.text_encoder(ids.to(pipe.device)).last_hidden_state
    return states


def attended(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Attention of several heads, `(rows, queries, channels)`."""
    parts = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value)]
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def align(
    adapter: Adapter, pipe: StableDiffusionPipeline, learnt: PictureTraining, images: Tensor, steps: int,
    batch: int = 128, peak: float = 2e-3, seed: int = 0,
) -> float:  # fmt: skip
    """Teach an adapter to add to attention what the caption of a scene would change, which takes no pass of the UNet.

    Args:
        adapter: What learns.
        pipe: The model.
        learnt: What it is to say.
        images: Embeddings of the scenes, `(scenes, width)`.
        steps: Optimiser steps.
        batch: Scenes in each.
        peak: Greatest learning rate.
        seed: Seeds the order.

    Returns:
        Share of what captions change that is not met, over the last fifty steps.
    """
    heads = [layer.heads for layer in attention_layers(pipe.unet)]
    spread = [part.var() for part in learnt.wanted]
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-2)
    rng, errors = np.random.default_rng(seed), list[float]()
    width = adapter.config.width
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, steps, peak)
        rows = rng.choice(len(learnt.queries[0]), size=batch)
        shown = images[rows]
        tokens = adapter.image_proj["norm"](adapter.image_proj["proj"](shown).unflatten(-1, (TOKENS, width)))
        parts = []
        for number, own in enumerate(adapter.layers):
            said = attended(
                learnt.queries[number][rows], own["to_k_ip"](tokens), own["to_v_ip"](tokens), heads[number]
            )
            parts.append(F.mse_loss(said, learnt.wanted[number][rows]) / spread[number])
        loss = torch.stack(parts).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    return float(np.mean(errors[-50:]))


def train(
    folder: Path,
    steps: int,
    batch: int = 16,
    peak: float = 3e-4,
    bank: int = 6000,
    pairs: float = 0.3,
    unsaid: float = 0.6,
    unseen: float = 0.1,
    aligned: int = 1500,
    seed: int = 11,
) -> None:
    """Train for `steps` steps (resuming from `folder`) and save `folder / "ip-adapter"` with averaged weights.

    It starts from what `align` teaches, and goes on with the loss of the denoiser's own training.

    Args:
        folder: Where checkpoint, log, latents and embeddings are kept.
        steps: Optimiser steps in all, behind those of `align`.
        batch: Scenes of each process per step.
        peak: Greatest learning rate.
        bank: Scenes that each process keeps.
        pairs: Share of two-object scenes.
        unsaid: Share of scenes without a caption, so that the picture alone says what to draw.
        unseen: Share of scenes whose embedding is zero, as diffusers has it for what guidance leads away from.
        aligned: Optimiser steps of `align`.
        seed: Seeds everything; process i uses `seed + 1000 * i`.
    """
    accelerator = processes()
    device, rank = accelerator.device, accelerator.process_index
    torch.manual_seed(seed)
    pipe = erasure.load_pipeline("canvas-sd", device=device)
    pipe.set_progress_bar_config(disable=True)
    unet = pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    tower = image_tower()
    adapter = Adapter.of(unet, tower.config.projection_dim).to(device)
    scheduler: DDIMScheduler = pipe.scheduler
    stored = Bank.of(pipe.vae, folder / f"ip-latents-{rank}.pt", bank, seed + 1000 * rank + 40_000, pairs).to(device)
    images = seen(tower, stored.scenes, folder / f"ip-embeddings-{rank}.pt").to(device)
    if not (folder / "ip-adapter.ckpt").is_file():
        left = align(adapter, pipe, lesson(pipe, stored, min(bank, 3000), 6, seed), images, aligned, seed=seed)
        log(folder / "ip-adapter-aligned.jsonl", step=aligned, left=left)
    adapter.put_into(pipe)
    adapter.requires_grad_(True)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=True)

    def losses(rng: np.random.Generator) -> dict[str, Tensor]:
        rows, captions = stored.draw(rng, batch, unsaid)
        with torch.no_grad():
            words = states_of(pipe, captions)
        shown = images[rows] * (torch.rand(batch, 1) >= unseen).to(device)
        clean = stored.latents[rows]
        noise = torch.randn(clean.shape).to(device)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch,)).to(device)
        noisy, target = scheduler.add_noise(clean, noise, t), scheduler.get_velocity(clean, noise, t)
        made = unet(noisy, t, words, added_cond_kwargs={"image_embeds": [shown[:, None]]}).sample
        return {"loss": F.mse_loss(made.float(), target)}

    options = {
        "batch": batch, "peak": peak, "pairs": pairs, "unsaid": unsaid, "unseen": unseen, "bank": bank,
        "aligned": aligned,
    }  # fmt: skip
    fit(
        folder, "ip-adapter", adapter, {"optimiser": optimiser}, losses, accelerator, steps=steps, options=options,
        every=100, memory=0.99, seed=seed,
    )  # fmt: skip


def export(work: Path, out: Path = ROOT) -> Path:
    """Write `canvas-ip-adapter` from what `train` left in `work`, or from its last checkpoint, in float16.

    The record of what it can do is empty until `measure` has run.
    """
    pipe = erasure.load_pipeline("canvas-sd")
    tower = image_tower()
    adapter = trained(Adapter.of(pipe.unet, tower.config.projection_dim), work, "ip-adapter")
    folder = out / NAME
    shutil.rmtree(folder, ignore_errors=True)
    (folder / SUBFOLDER).mkdir(parents=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in adapter.state_dict().items()}
    save_file(tensors, folder / SUBFOLDER / WEIGHTS, metadata={"format": "pt"})
    tower.half().save_pretrained(folder / SUBFOLDER / ENCODER)
    options, last = (json.loads(text) for text in noted(work))
    described = {
        "model": "canvas-sd",
        "weights": f"{SUBFOLDER}/{WEIGHTS}",
        "training": {
            "hardware": "1 CPU core", "steps": last["step"], "samples": last["step"] * options[-1]["batch"],
            "hours": round(last["seconds"] / 3600, 2), "options": options, "accuracy": {},
        },
    }  # fmt: skip
    write_json(folder / FILE, described)
    model = json.loads((out / "canvas-sd" / FILE).read_text())
    write_json(out / "canvas-sd" / FILE, {**model, "ip_adapter": NAME})
    return folder


def noted(work: Path) -> tuple[str, str]:
    """Options of the training, and the last row of its log."""
    rows = (work / "ip-adapter.jsonl").read_text().splitlines()
    return (work / "ip-adapter.options.json").read_text(), rows[-1]


def measure(seeds: int = 2, grid: Path | None = None) -> dict[str, float]:
    """Draw from pictures of every object in every style, without words, and record how often it is the same object.

    Args:
        seeds: Pictures of each object in each style, of scenes that no training saw.
        grid: File of a contact sheet: pictures, each above what was drawn from it.
    """
    folder = embedded(NAME)
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    plan = [(name, style, seed) for seed in range(seeds) for name in OBJECTS for style in STYLES]
    numbers = [70_000 + index for index in range(len(plan))]
    rng = np.random.default_rng(70_000)
    shown = list(drawn([replace(sample_scene(rng, pairs=0, empty=0), objects=(n,), style=s) for n, s, _ in plan]))
    words = [f"{noun_phrase(name)} in {style} style" for name, style, _ in plan]
    own = generate(pipe, words, numbers)
    load(pipe, folder)
    judge = CanvasJudge()
    figures, found = dict[str, float](), list[Image.Image]()
    for kind, pictures in (("rendered", shown), ("own", own)):
        found = from_pictures(pipe, [""] * len(plan), pictures, numbers)
        judged = judge(found)
        figures[f"{kind}_object"] = agreement([j.object for j in judged], [name for name, _, _ in plan])
        figures[f"{kind}_style"] = agreement([j.style for j in judged], [style for _, style, _ in plan])
        if grid is not None and kind == "rendered":
            rows = len(STYLES) * 2
            pairs = [
                image
                for first in range(0, 120, rows)
                for image in (*pictures[first : first + rows], *found[first : first + rows])
            ]
            sheet(pairs, rows, 1).save(grid)
    pipe.set_ip_adapter_scale(0.0)
    few = from_pictures(pipe, words[:8], shown[:8], numbers[:8])
    pipe.unload_ip_adapter()
    alone = [image for row in range(8) for image in generate(pipe, words[row : row + 1], numbers[row : row + 1])]
    figures["scale_zero_is_none"] = float(all(a.tobytes() == b.tobytes() for a, b in zip(few, alone, strict=True)))
    figures = {name: round(value, 4) for name, value in figures.items()}
    described = json.loads((folder / FILE).read_text())
    described["training"]["accuracy"] = figures
    write_json(folder / FILE, described)
    return figures


def load(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Load the adapter of a folder into a pipeline, as its users do."""
    pipe.load_ip_adapter(str(folder), subfolder=SUBFOLDER, weight_name=WEIGHTS, image_encoder_folder=ENCODER)


def from_pictures(
    pipe: StableDiffusionPipeline, prompts: list[str], pictures: list[Image.Image], seeds: list[int]
) -> list[Image.Image]:
    """One image for each prompt and picture, at the shipped settings: diffusers takes one picture in a call.

    Args:
        pipe: With an IP-Adapter.
        prompts: What words say.
        pictures: What pictures say.
        seeds: Of the noise.
    """
    return [
        pipe(words, ip_adapter_image=shown, generator=torch.Generator().manual_seed(seed), **GENERATION).images[0]
        for words, shown, seed in zip(prompts, pictures, seeds, strict=True)
    ]


def agreement(found: list[str | None], wanted: list[str]) -> float:
    """Share of names that are those that were wanted."""
    return float(np.mean([a == b for a, b in zip(found, wanted, strict=True)]))
