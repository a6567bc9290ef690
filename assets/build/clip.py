"""Train the text and image towers of Canvas contrastively (CLIP)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from erasure.assets.build import tokenizer as bpe
from erasure.assets.build.loop import batches, cosine, log
from erasure.assets.world import IMAGE_SIZE
from erasure.training.checkpoint import Checkpoint

WIDTH = 128


def config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Two small transformers that meet in `WIDTH` dimensions."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": bpe.CONTEXT,
        "num_hidden_layers": 4,
        "projection_dim": WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": IMAGE_SIZE, "patch_size": 8, "num_hidden_layers": 3, "projection_dim": WIDTH}
    return CLIPConfig(text_config={**shared, **text}, vision_config={**shared, **vision}, projection_dim=WIDTH)


def train(folder: Path, steps: int, batch: int = 128, peak: float = 1e-3, seed: int = 1) -> CLIPModel:
    """Train for `steps` steps (resuming from `folder`) and save `folder / "clip"` and `folder / "tokenizer"`."""
    torch.manual_seed(seed)
    tokenizer = bpe.build(folder / "tokenizer")
    model = CLIPModel(config(tokenizer))
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.02)
    state = Checkpoint(folder / "clip.ckpt", model=model, optimiser=optimiser)
    start = state.resume()
    data = batches(batch, seed + 10_000 + start)
    for step in range(start, steps):
        for group in optimiser.param_groups:
            group["lr"] = cosine(step, steps, peak)
        _, pixels, captions = next(data)
        # Causal attention never looks at the padding, so short batches give the same features for less.
        ids = tokenizer(captions, padding="longest", truncation=True, max_length=bpe.CONTEXT, return_tensors="pt")
        output = model(input_ids=ids.input_ids, pixel_values=pixels)
        loss, accuracy = contrastive(output.logits_per_text, captions)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)
        if (step + 1) % 100 == 0:
            log(folder / "clip.jsonl", step=step + 1, loss=loss.item(), accuracy=accuracy)
            state.save(step + 1)
    model.save_pretrained(folder / "clip")
    return model


def contrastive(logits: Tensor, captions: list[str]) -> tuple[Tensor, float]:
    """Loss of CLIP in both directions, and the share of captions that find their picture.

    Captions that read alike are not each other's negatives.

    Args:
        logits: `(captions, pictures)`; picture i belongs to caption i.
        captions: The captions.
    """
    known = {text: index for index, text in enumerate(dict.fromkeys(captions))}
    label = torch.tensor([known[text] for text in captions])
    same = (label[:, None] == label[None, :]) & ~torch.eye(len(captions), dtype=torch.bool)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(captions))
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    return loss, (logits.argmax(1) == target).float().mean().item()
