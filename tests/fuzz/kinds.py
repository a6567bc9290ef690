"""The kinds of files that the package reads: how a valid one is written, how it is read, which errors are allowed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from erasure.errors import ErasureError

KINDS: dict[str, Kind] = {}
"""By name. Every room that reads files adds its own with `kind`."""


@dataclass(frozen=True)
class Kind:
    """One kind of file."""

    write: Callable[[Path], None]
    """Writes a valid one, and what belongs to it, into an empty folder."""
    read: Callable[[Path], Any]
    """Reads it from there."""
    files: tuple[str, ...]
    """Paths in the folder that are mutated."""
    errors: tuple[type[Exception], ...] = (ErasureError,)
    """What reading may raise."""


def kind(
    name: str, *files: str, read: Callable[[Path], Any], errors: tuple[type[Exception], ...] = (ErasureError,)
) -> Any:
    """Add a kind: decorates the function that writes a valid one."""

    def add(write: Callable[[Path], None]) -> Callable[[Path], None]:
        KINDS[name] = Kind(write, read, files, errors)
        return write

    return add


# Erasures ------------------------------------------------------------------------------------------------------------


def read_erasure(folder: Path) -> None:
    """As a user meets it: read, shown, written again."""
    from erasure import Erasure

    made = Erasure.load(folder)
    assert made.size_bytes > 0
    made.save(folder / "again")


def make_erasure(*, features: bool) -> Any:
    """An erasure of every kind of edit, for no model in particular."""
    from erasure import Concept, Erasure, ErasureConfig
    from erasure.carriers.activations import Pinned
    from erasure.carriers.edits import Edits, LowRank
    from erasure.carriers.features import FeatureEdit
    from erasure.carriers.reconstruction import ReconstructionEdit
    from erasure.carriers.weights import fingerprint

    rng = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    edits = Edits({"unet/mid_block.attn2.to_k": LowRank(some(2, 4), some(5, 2))})
    edits.deltas["text_encoder/encoder.layers.0.mlp.fc1.bias"] = some(6).half()
    edits.pinned["text_encoder"] = Pinned(torch.arange(6).view(2, 3), some(2, 3, 4))
    if features:
        whole = [torch.tensor(number) for number in (0, 1, 1, 9)]
        pairs = torch.tensor([[0, 0], [0, 1]])
        edits.features["text_encoder/encoder.layers.1"] = FeatureEdit(
            some(4, 3), some(3), some(3, 4), some(3), some(3), some(3), pairs, pairs, some(2), some(1), some(1),
            some(4, 1), some(1), some(1), torch.zeros(0, 4), *whole,
        )  # fmt: skip
        edits.features["text_encoder/encoder.layers.2"] = ReconstructionEdit(
            some(4, 6), some(6), some(6, 4), some(4), torch.tensor(2), some(6), torch.tensor(0.5), torch.tensor(1),
            torch.tensor(9),
        )  # fmt: skip
    touched = [*edits.parameters, *(f"{block}.layer_norm1.weight" for block in edits.features)]
    rates = {"tpr": 0.9, "fpr": 0.1, "auc": 0.95, "roc": [[0.0, 0.5], [1.0, 1.0]]}
    config = ErasureConfig(
        strategy="hirm", strategy_config={"steps": 3, "lr": 1e-3, "layers": ["a", 2, None]},
        concepts=[Concept("Van Gogh", kind="style", retain=("Monet",), synonyms=("Vincent",)).to_dict()],
        family="stable-diffusion", carriers=edits.carriers, protects="hosted pipeline", seed=3, cost={"seconds": 1.5},
        base={
            "model": "someone/model", "revision": None,
            "tensors": {key: fingerprint(torch.ones(1)) for key in touched},
            "text_encoders": {"text_encoder": fingerprint(torch.ones(1))},
        },
        evaluation={"UA": 0.97}, versions={"torch": "2.6"},
        gates={"Van Gogh": {"decides": "probe", "features": rates, "probe": rates, "prompts_with": 3}},
    )  # fmt: skip
    return Erasure(config, edits)


@kind("erasure", "erasure_config.json", "erasure.safetensors", "pytorch_lora_weights.safetensors", read=read_erasure)
def write_erasure(folder: Path) -> None:
    make_erasure(features=False).save(folder)


@kind("erasure of features", "erasure_config.json", "erasure.safetensors", read=read_erasure)
def write_feature_erasure(folder: Path) -> None:
    make_erasure(features=True).save(folder)


@kind("erasure half written", ".erasure-commit/.files.json", ".erasure-commit/erasure_config.json", read=read_erasure)
def write_half_erasure(folder: Path) -> None:
    """As a process leaves it that is killed in the middle of an overwrite."""
    made = make_erasure(features=False)
    made.save(folder)
    journal = folder / ".erasure-commit"
    made.save(journal)
    names = sorted(path.name for path in journal.iterdir())
    (journal / "README.md").unlink()
    (journal / ".files.json").write_text(json.dumps({"new": names, "all": names}))


def read_lora(folder: Path) -> None:
    """As `erasure import` reads it, as far as no model is needed."""
    from erasure.exchange.lora_read import is_lora, parts_of_lora
    from erasure.exchange.reading import read_source

    for name in ("lora.safetensors", "lora.pt"):
        source = read_source(folder / name)
        if is_lora(source):
            layers, scales = parts_of_lora(source, [])
            assert set(scales) <= set(layers)


@kind("somebody's LoRA", "lora.safetensors", "lora.pt", read=read_lora)
def write_lora(folder: Path) -> None:
    from safetensors.torch import save_file

    stem = "lora_unet_mid_block_attentions_0_proj_in"
    held = {f"{stem}.lora_down.weight": torch.ones(2, 4), f"{stem}.lora_up.weight": torch.ones(3, 2)}
    save_file({**held, f"{stem}.alpha": torch.tensor(1.0)}, folder / "lora.safetensors", {"ss_sd_model_name": "v1"})
    torch.save({**held, f"{stem}.alpha": torch.tensor(1.0)}, folder / "lora.pt")


def read_beside(folder: Path) -> None:
    from erasure.pipelines.mixin import read_attached

    assert read_attached(folder)


@kind("erasures beside a pipeline", "erasures/attached.json", "erasures/cat/erasure_config.json", read=read_beside)
def write_beside(folder: Path) -> None:
    make_erasure(features=False).save(folder / "erasures" / "cat")
    (folder / "erasures" / "attached.json").write_text(json.dumps({"cat": 0.75}))


def read_baked(folder: Path) -> None:
    from erasure.baked import read_trace
    from erasure.cards import baked_card

    trace = read_trace(folder)
    assert baked_card([entry["strength"] for entry, _ in trace], [config for _, config in trace])


@kind("trace of erased weights", "erased.json", read=read_baked)
def write_baked(folder: Path) -> None:
    made = make_erasure(features=False)
    config = dataclasses.asdict(made.config) | {"base": {"model": "someone/model", "revision": None}}
    entry = {"name": "cat", "strength": 0.75, "fingerprint": made.fingerprint, "config": config}
    trace = {"format_version": 1, "date": "2026-01-31T12:00:00+00:00", "versions": {"torch": "2.6"}}
    (folder / "erased.json").write_text(json.dumps({**trace, "erasures": [entry, entry]}))


# Autoencoders --------------------------------------------------------------------------------------------------------


def make_autoencoder() -> Any:
    from erasure.sae import SAEConfig, SparseAutoencoder

    metadata = {"layer": 1, "hook_name": "text_encoder/encoder.layers.1", "fingerprint": {"float32": "0" * 64}}
    sae = SparseAutoencoder(SAEConfig(d_in=4, d_sae=8, k=2, architecture="jumprelu", metadata=metadata))
    sae.initialise(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1))
    return sae.requires_grad_(False)


def read_autoencoder(folder: Path) -> None:
    from erasure.sae import load, read_prompts

    load(folder)
    read_prompts(folder)


@kind("autoencoder", "cfg.json", "sae_weights.safetensors", "prompts.txt", read=read_autoencoder)
def write_autoencoder(folder: Path) -> None:
    from erasure.sae import save

    save(make_autoencoder(), folder, prompts=["a cat", "a dog"])


@kind("autoencoder of sparsify", "cfg.json", "sae.safetensors", read=read_autoencoder)
def write_sparsify(folder: Path) -> None:
    from safetensors.torch import save_file

    sae = make_autoencoder()
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": 4, "num_latents": 8, "k": 2, "expansion_factor": 2}))


@kind("autoencoder of OpenAI", "config.json", "state_dict.pth", read=read_autoencoder)
def write_openai(folder: Path) -> None:
    sae = make_autoencoder()
    state = {
        "pre_bias": sae.b_dec.data, "latent_bias": sae.b_enc.data, "encoder.weight": sae.W_enc.T.contiguous(),
        "decoder.weight": sae.W_dec.T.contiguous(),
    }  # fmt: skip
    torch.save(state, folder / "state_dict.pth")
    (folder / "config.json").write_text(json.dumps({"n_dirs": 8, "n_dirs_local": 8, "d_model": 4, "k": 2}))


# Trainings -----------------------------------------------------------------------------------------------------------


def checkpoint_of(folder: Path) -> Any:
    from erasure.training.checkpoint import Checkpoint

    model = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    checkpoint = Checkpoint(folder / "training.ckpt", model=model, optimiser=optimiser)
    return model, optimiser, checkpoint


def read_checkpoint(folder: Path) -> None:
    """Go on from it, one step."""
    model, optimiser, checkpoint = checkpoint_of(folder)
    checkpoint.resume(10)
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()


@kind("checkpoint", "training.ckpt", read=read_checkpoint)
def write_checkpoint(folder: Path) -> None:
    model, optimiser, checkpoint = checkpoint_of(folder)
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    checkpoint.save(3)


def read_recipe(folder: Path) -> None:
    from erasure.training.run import Run

    with Run(checkpoints=folder).opened({"strategy": "esd", "options": {"lr": 0.1, "layers": ["a"]}}):
        pass


@kind("recipe of a training", "training.json", read=read_recipe)
def write_recipe(folder: Path) -> None:
    read_recipe(folder)


class Scenes:
    """As much of a buffer of trajectories as its file is compared with."""

    @dataclass
    class Scene:
        asks: tuple[str, ...] = ("a",)

    class backbone:
        @staticmethod
        def noise(seeds: list[int]) -> torch.Tensor:
            return torch.zeros(len(seeds), 4, 2, 2)

    scenes = (Scene(), Scene())

    def __len__(self) -> int:
        return 6

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            "x": torch.zeros(6, 4, 2, 2), "t": torch.arange(6), "scene": torch.zeros(6, dtype=torch.int64),
            "own": torch.zeros(6, 4, 2, 2), "null": torch.zeros(6, 4, 2, 2), "asked": torch.zeros(6, 1, 4, 2, 2),
            "guidance": torch.ones(6),
        }  # fmt: skip


def read_trajectories(folder: Path) -> None:
    """A broken entry of the cache is made anew: reading it raises nothing at all."""
    from erasure.training import storage

    states = storage._read(folder / "ab.safetensors", Scenes())  # type: ignore[arg-type]
    assert states is None or {name: part.shape for name, part in states.items()} == {
        name: part.shape for name, part in Scenes().state_dict().items()
    }


@kind("trajectories", "ab.safetensors", read=read_trajectories, errors=())
def write_trajectories(folder: Path) -> None:
    from erasure.training import storage

    file = folder / "ab.safetensors"
    storage._write(file, Scenes().state_dict())
    assert storage._read(file, Scenes()) is not None, "a whole file is read"  # type: ignore[arg-type]


def replaced(kind: Kind, **changes: Any) -> Kind:
    """A kind with other fields."""
    return dataclasses.replace(kind, **changes)
