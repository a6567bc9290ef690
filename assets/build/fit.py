"""The loop that trains every denoiser of Canvas.

Runs under `torchrun` or `accelerate launch` on any number of processes, each with its own share of scenes. They train
on their own and average their weights every few steps (local SGD): on CPU cores that other work shares, waiting for
the slowest process at every step would cost about a third of the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from erasure.assets.build.loop import log
from erasure.training.checkpoint import Checkpoint

Network = TypeVar("Network", bound=ModelMixin)
Losses = Callable[[np.random.Generator], Mapping[str, Tensor]]
"""Losses of one step, by name; the generator says which scenes and captions."""


def processes(*, reduced: bool = False) -> Accelerator:
    """The processes that train together, on the GPU where there is one.

    Args:
        reduced: Whether a GPU computes losses in bfloat16. The tiny matrices gain nothing by it on a CPU.
    """
    gpu = torch.cuda.is_available()
    # Processes on CPU cores find each other only when they are told that it is a CPU.
    return Accelerator(cpu=not gpu, mixed_precision="bf16" if gpu and reduced else "no")


def fit(
    folder: Path,
    name: str,
    network: ModelMixin,
    optimisers: Mapping[str, torch.optim.Optimizer],
    losses: Losses,
    accelerator: Accelerator,
    *,
    steps: int,
    options: Mapping[str, float],
    weights: Mapping[str, float] | None = None,
    decay: float = 0.3,
    sync: int = 8,
    every: int = 200,
    memory: float = 0.995,
    seed: int = 3,
) -> None:
    """Train for `steps` steps (resuming from `folder`) and save `folder / name` with averaged weights.

    Args:
        folder: Where checkpoint, log and options are kept, as `name.ckpt`, `name.jsonl` and `name.options.json`.
        name: Name of the network.
        network: What trains, on the accelerator's device.
        optimisers: What trains it, each with its greatest learning rate, by the name in the checkpoint.
        losses: Losses of one step.
        accelerator: The processes; see `processes`.
        steps: Optimiser steps in all; may be changed when resuming before the decay starts.
        options: What `name.options.json` says of the training.
        weights: Weight of each loss, 1 where none is given.
        decay: Share of the run over which the learning rates fall to zero, linearly.
        sync: Steps between two averagings over the processes; the saved weights are a running mean of them.
        every: Steps between two checkpoints, a multiple of `sync`.
        memory: Share of the running mean that stays when the weights of a `sync` are added.
        seed: Seeds everything; process i uses `seed + 1000 * i`.
    """
    rank = accelerator.process_index
    average = EMAModel(network.parameters(), decay=memory, inv_gamma=1.0, power=0.75, use_ema_warmup=True)
    # Resuming puts the rates of the last step into the groups.
    peaks = [group["lr"] for optimiser in optimisers.values() for group in optimiser.param_groups]
    state = Checkpoint(folder / f"{name}.ckpt", model=network, average=average, **optimisers)
    start = state.resume()
    groups = [group for optimiser in optimisers.values() for group in optimiser.param_groups]
    average.to(accelerator.device)
    if accelerator.is_main_process:
        where = {"processes": accelerator.num_processes, "device": accelerator.device.type}
        note(folder / f"{name}.options.json", start, where | dict(options))
    rng = np.random.default_rng([seed, rank, start])
    torch.manual_seed(seed + 1000 * rank + start)
    rows = []
    for step in range(start, steps):
        share = min(1.0, (step + 1) / 200, (steps - step) / (decay * steps))
        for group, rate in zip(groups, peaks, strict=True):
            group["lr"] = rate * share
        with accelerator.autocast():
            errors = losses(rng)
        loss = torch.stack([(weights or {}).get(key, 1.0) * error for key, error in errors.items()]).sum()
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimiser in optimisers.values():
            optimiser.step()
        rows.append({key: error.item() for key, error in errors.items()})
        if (step + 1) % sync == 0 or step + 1 == steps:
            share_weights(accelerator, network)
            average.step(network.parameters())
        if ((step + 1) % every == 0 or step + 1 == steps) and accelerator.is_main_process:
            log(folder / f"{name}.jsonl", step=step + 1, seconds=state.elapsed, **means(rows))
            rows = []
            state.save(step + 1)
    if accelerator.is_main_process:
        average.copy_to(network.parameters())
        network.save_pretrained(folder / name)


def trained(network: Network, work: Path, name: str) -> Network:
    """Give a network the weights of its training: the finished ones, or the averages of the last checkpoint.

    Args:
        network: A new one.
        work: Folder of the training.
        name: Name of the network there.
    """
    if (work / name).is_dir():
        network.load_state_dict(type(network).from_pretrained(work / name).state_dict())
        return network
    average = EMAModel(network.parameters())
    average.load_state_dict(torch.load(work / f"{name}.ckpt", map_location="cpu", weights_only=True)["average"])
    average.copy_to(network.parameters())
    return network


def note(path: Path, step: int, options: Mapping[str, float | str]) -> None:
    """Note the options of a training from a step on, after those of the steps before."""
    rows = json.loads(path.read_text()) if path.exists() and step else []
    if not rows or {**rows[-1], "from_step": 0} != {**options, "from_step": 0}:
        rows.append({"from_step": step, **options})
    path.write_text(json.dumps(rows))


@torch.no_grad()
def share_weights(accelerator: Accelerator, network: nn.Module) -> None:
    """Replace the weights of every process by their mean."""
    if accelerator.num_processes > 1:
        parameters = list(network.parameters())
        mean = accelerator.reduce(torch.nn.utils.parameters_to_vector(parameters), reduction="mean")
        torch.nn.utils.vector_to_parameters(mean, parameters)


def means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each column."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
