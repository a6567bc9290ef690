"""`python -m benchmarks itd`: what feature edits and the training of dictionaries cost on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

from benchmarks import PROGRAM
from erasure.cli.arguments import UsageError, parse
from erasure.cli.bench import draw, median_ratio, peak_memory, process_mb, timed
from erasure.cli.generate import call_settings
from erasure.cli.models import ModelOptions, open_model
from erasure.cli.terminal import Terminal

if TYPE_CHECKING:
    from torch import Generator

    from erasure.artifact import Erasure
    from erasure.carriers.features import FeatureEdit
    from erasure.interop.protocols import Pipeline, Settings
    from erasure.sae import SparseAutoencoder

CONCEPTS = (1, 10, 100, 1000)
EDITED, COUNTED = 8, 32
"""Latents that a concept edits, and that its gate counts."""
WIDTH, FEATURES, TOKENS = 768, 300, 77
"""Of the edit that is timed alone: Stable Diffusion 1.x's text encoder."""
D_SAE, K, BATCH = 8192, 32, 2048
"""Of the dictionary whose training is timed."""


@dataclass(kw_only=True)
class BenchItDOptions(ModelOptions):
    """Measure features: images with 1 to 1000 erased concepts, the edit of one prompt, training tokens per second."""

    model: str = "canvas-sd"
    """Repository of the Hugging Face Hub, folder, or embedded model (`canvas-sd`)."""
    dictionary: str = ""
    """Folders of the model's autoencoders, as the option of `itd`; as `itd` finds or makes them when left out."""
    repeats: int = 7
    """Rounds of stock and each number of concepts in turn; medians are reported, and the ratio of the least times."""
    steps: int | None = None
    """Denoising steps of an image; the model's own number when left out."""
    json: bool = False
    """Print JSON, and nothing else on stdout."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(BenchItDOptions, "itd", argv, program=PROGRAM)
    terminal.json_only = options.json
    if options.repeats < 1:
        raise UsageError("--repeats is at least 1")
    pipe = open_model(options)
    with terminal.progress(options.repeats + 2) as progress:
        progress.stage("images")
        images = time_images(pipe, options, progress.advance)
        progress.stage("edit")
        edit = time_edit()
        progress.advance()
        progress.stage("training")
        training = time_training()
        progress.advance()
    if options.json:
        terminal.result({"model": options.model, "device": str(pipe.device), "images": images, "edit": edit,
                         "training": training})  # fmt: skip
        return
    title = f"{options.model} on {pipe.device}, medians of {options.repeats} rounds; each image is a prompt's first"
    rows = [
        [str(row["concepts"]), f"{row['time_ratio']:.3f}x", f"{row['least_ratio']:.3f}x", f"{row['bytes'] / 1e6:.2f}"]
        for row in images
    ]
    terminal.table(("concepts attached", "time of an image", "least times", "size, MB"), rows, title=title)
    slice_rows = [[name, f"{value:.3f}"] for name, value in edit.items()]
    title = f"{FEATURES} features of width {WIDTH}, a prompt of {TOKENS} tokens, one CPU thread"
    terminal.table(("edit", "ms or MB"), slice_rows, title=title)
    both = [
        [name, f"{row['tokens_per_second']:.0f}", "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"]
        for name, row in training.items()
    ]
    title = f"training of {D_SAE} latents, k {K}, width {WIDTH}, {BATCH} tokens per step"
    terminal.table(("decoder", "tokens per second", "memory of a step, MB"), both, title=title)


def time_images(pipe: Pipeline, options: BenchItDOptions, advance: Callable[[], None]) -> list[Settings]:
    """An image with each number of concepts, against the stock pipeline in the same round.

    On a CPU the time is what this process computes for, which others that run beside it do not lengthen.
    """
    from erasure.attach import ErasureManager

    settings, manager = call_settings(options.model, options.steps), ErasureManager(pipe)
    erasures = [many_concepts(pipe, options.dictionary, count) for count in CONCEPTS]
    stock: list[float] = []
    found: list[list[float]] = [[] for _ in erasures]
    draw(pipe, settings)
    for _ in range(options.repeats):
        stock.append(spent(pipe, lambda: draw(pipe, settings)))
        for seconds, made in zip(found, erasures, strict=True):
            # A new hook each time: nothing is remembered from the round before.
            manager.add(made, "many")
            seconds.append(spent(pipe, lambda: draw(pipe, settings)))
            manager.delete("many")
        advance()
    return [
        {"concepts": count, "time_ratio": median_ratio(seconds, stock), "least_ratio": min(seconds) / min(stock),
         "seconds": statistics.median(seconds), "bytes": made.size_bytes}
        for count, seconds, made in zip(CONCEPTS, found, erasures, strict=True)
    ]  # fmt: skip


def spent(pipe: Pipeline, action: Callable[[], object]) -> float:
    """Seconds of an action: of this process' computing on a CPU, of the clock on another device."""
    if pipe.device.type != "cpu":
        return timed(pipe, action)
    start = time.process_time()
    action()
    return time.process_time() - start


def many_concepts(pipe: Pipeline, dictionary: str, count: int) -> Erasure:
    """An erasure of so many concepts, each with random features of the dictionary of every text encoder."""
    import torch

    from erasure.artifact import Erasure, ErasureConfig
    from erasure.backbones import backbone_for
    from erasure.carriers.edits import Edits
    from erasure.sae import dictionaries
    from erasure.strategies.itd import ItD

    backbone = backbone_for(pipe)
    folders = dictionaries.assigned(dictionary, backbone.towers)
    edits = Edits()
    for tower in backbone.towers:
        folder = ItD().dictionary_of(tower, folders.get(tower.component), 0, lambda share: None)
        sae, layer = dictionaries.opened(tower, folder, None)
        generator = torch.Generator().manual_seed(0)
        edit = random_edit(sae, count, EDITED, COUNTED, generator, anchored=True)._replace(
            first=torch.tensor(tower.leading), end=torch.tensor(tower.end)
        )
        edits.features[tower.key(tower.block_path(layer))] = edit
    names: list[dict[str, object]] = [{"target": f"concept {index}"} for index in range(count)]
    config = ErasureConfig("itd", names, backbone.family, carriers=["activations"])
    return Erasure(config, edits)


def random_edit(
    sae: SparseAutoencoder, concepts: int, edited: int, counted: int, generator: Generator, *, anchored: bool = False
) -> FeatureEdit:
    """So many concepts with random latents of an autoencoder, each stored once; all gates but the first are shut.

    Args:
        sae: The autoencoder.
        concepts: How many.
        edited: Latents that each changes.
        counted: Latents that the gate of each counts.
        generator: Draws them.
        anchored: Let every latent that a concept changes write something of its own, as it does for an anchor.
    """
    import torch

    from erasure.carriers.features import FeatureEdit

    def draws(each: int) -> torch.Tensor:
        rows = [torch.randperm(sae.config.d_sae, generator=generator)[:each] for _ in range(concepts)]
        return torch.stack([torch.arange(concepts).repeat_interleave(each), torch.cat(rows)])

    edits, votes = draws(edited), draws(counted)
    used, place = torch.cat([edits[1], votes[1]]).unique(return_inverse=True)
    edits[1], votes[1] = place.split([edits.shape[1], votes.shape[1]])
    columns = torch.arange(len(used))
    if anchored:
        edits = torch.cat([edits, torch.stack([edits[0], len(used) + torch.arange(edits.shape[1])])], 1)
        columns = torch.cat([columns, edits[1, : edits.shape[1] // 2]])
    part, n = sae.slice(used[columns].tolist()), len(columns)
    half = {"w_enc": part.w_enc, "b_enc": part.b_enc, "w_dec": part.w_dec, "threshold": part.threshold,
            "gain": torch.full((n,), -3.0), "offset": torch.zeros(n), "probe": torch.zeros(sae.config.d_in, concepts),
            "filler": torch.zeros(0, sae.config.d_in)}  # fmt: skip
    gate = torch.full((concepts,), 1e4)
    gate[0] = -1e4
    return FeatureEdit(
        **{name: tensor.cpu().half() for name, tensor in half.items()},
        edits=edits, votes=votes, weight=torch.randn(votes.shape[1], generator=generator), gate=gate,
        bias=torch.zeros(concepts), probe_bias=torch.zeros(concepts), probe_gate=torch.zeros(concepts),
        rule=torch.tensor(0), local=torch.tensor(0), first=torch.tensor(1), end=torch.tensor(0),
    )  # fmt: skip


def time_edit(repeats: int = 300) -> dict[str, float]:
    """The edit of one prompt by one concept, beside encoding it with the whole dictionary."""
    import torch
    from safetensors.torch import save

    from erasure.carriers.edits import Edits
    from erasure.sae import SAEConfig, SparseAutoencoder

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        generator = torch.Generator().manual_seed(0)
        sae = SparseAutoencoder(SAEConfig(d_in=WIDTH, d_sae=D_SAE, k=K)).requires_grad_(False)
        x = torch.randn(1, TOKENS, WIDTH, generator=generator)
        sae.initialise(x[0], generator)
        edit = random_edit(sae, 1, FEATURES, 0, generator)
        placed, words = edit.on(torch.device("cpu")), torch.ones(1, TOKENS, dtype=torch.bool)
        size = len(save(Edits(features={"text_encoder/encoder.layers.8": edit}).delta_state_dict()))
        with torch.no_grad():
            own = best(lambda: placed.delta(x, words), repeats)
            whole = best(lambda: sae(x), max(repeats // 30, 3))
        return {
            "edit, ms": 1e3 * own,
            "whole dictionary, dense decode, ms": 1e3 * whole,
            "size in float16, MB": size / 1e6,
        }
    finally:
        torch.set_num_threads(threads)


def best(action: Callable[[], object], repeats: int) -> float:
    """Least seconds of an action."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def time_training(steps: int = 6) -> dict[str, dict[str, float | None]]:
    """Training steps with the sparse decoder, and with a dense one, in turn."""
    import torch
    from torch import Tensor

    from erasure.sae import SAEConfig, SparseAutoencoder, TrainingOptions
    from erasure.sae.training import TrainingLoss

    class Dense(TrainingLoss):
        """Decodes from the full matrix of latents."""

        def decode(self, values: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
            rows = torch.searchsorted(offsets, torch.arange(len(indices)), right=True) - 1
            latents = values.new_zeros(len(offsets), self.sae.config.d_sae).index_put((rows, indices), values)
            return latents @ self.sae.W_dec

    here = SimpleNamespace(device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    sae = SparseAutoencoder(SAEConfig(d_in=WIDTH, d_sae=D_SAE, k=K))
    sae.initialise(x, generator)
    options = TrainingOptions(d_sae=D_SAE, k=K)
    kinds: Settings = {"sparse": TrainingLoss(sae, options), "dense": Dense(sae, options)}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    memory: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(steps):
        for name, losses in kinds.items():
            sae.zero_grad(set_to_none=True)
            start_mb = process_mb("VmRSS") or 0.0
            with peak_memory(here, memory[name]):
                start = time.perf_counter()
                losses(x).total.backward()
                seconds[name].append(time.perf_counter() - start)
            if memory[name]:
                memory[name][-1] -= start_mb
    return {
        name: {"tokens_per_second": BATCH / statistics.median(seconds[name]),
               "peak_mb": statistics.median(memory[name]) if memory[name] else None}
        for name in kinds
    }  # fmt: skip
