"""Types of the objects of diffusers and transformers, as far as the package uses them.

These libraries have no complete types, so a misspelled attribute would otherwise show up at run time only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from PIL import Image
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a call."""
Settings = dict[str, Any]
"""Named options or plain data, by name."""


class Config(Protocol):
    """Settings that a component was made with; which there are depends on its class."""

    def __getattr__(self, name: str) -> Any:
        """One setting."""

    def get(self, name: str, default: object = None) -> Any:
        """One setting, or the default where the class has none of this name."""


class Tokenizer(Protocol):
    """A tokeniser of transformers."""

    model_max_length: int
    bos_token_id: int | None
    eos_token_id: int
    pad_token_id: int
    unk_token_id: int | None
    all_special_ids: Sequence[int]

    @property
    def added_tokens_encoder(self) -> Mapping[str, int]:
        """Ids of the tokens that stand beside the vocabulary that it was trained with."""

    def __call__(self, text: str | list[str], **options: object) -> TokenIds:
        """Tokenise one text or several."""

    def __len__(self) -> int:
        """How many tokens it knows."""

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """How tokens are spelled."""

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens as text."""


class TokenIds(Protocol):
    """What a tokeniser gives: lists for one text or several, tensors where they were asked for."""

    input_ids: Any
    attention_mask: Tensor


class Scheduler(Protocol):
    """A noise schedule with its sampler."""

    config: Config
    timesteps: Tensor
    init_noise_sigma: float
    betas: Tensor
    alphas_cumprod: Tensor

    def set_timesteps(self, steps: int, device: torch.device | str | None = None) -> None:
        """Choose the noise levels of a run."""

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Latents as the denoiser wants them."""

    def step(self, prediction: Tensor, timestep: Tensor, sample: Tensor) -> SchedulerStep:
        """Go on to the next noise level."""


class SchedulerStep(Protocol):
    """What a step of a scheduler gives."""

    prev_sample: Tensor


class Denoiser(nn.Module):
    """A UNet or transformer. For annotations only, as the modules below: a protocol cannot be a module besides."""

    config: Config
    dtype: torch.dtype


class Prediction(Protocol):
    """What a denoiser or a decoder gives, unless it was asked for a tuple."""

    sample: Tensor


class Latents(Protocol):
    """The distribution of an image's latents."""

    mean: Tensor
    std: Tensor

    def mode(self) -> Tensor:
        """The likeliest."""

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One of them."""


class Encoded(Protocol):
    """What an encoder gives."""

    latent_dist: Latents


class Autoencoder(nn.Module):
    """The network between pixels and latents."""

    config: Config
    dtype: torch.dtype

    def encode(self, pixels: Tensor) -> Encoded:
        """The distribution of an image's latents."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Prediction:
        """The image of latents."""
        raise NotImplementedError


class AttentionLayer(nn.Module):
    """An attention layer of a denoiser."""

    heads: int
    processor: object
    fused_projections: bool
    norm_cross: bool
    norm_encoder_hidden_states: Callable[[Tensor], Tensor]
    to_q: nn.Module
    to_k: nn.Module
    to_add_out: nn.Module
    set_processor: Callable[[object], None]


class EncoderOutput(Protocol):
    """What a text encoder gives; some have no pooled vector, or none that is projected."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    pooler_output: Tensor


class ImageProcessor(Protocol):
    """Images as a pipeline takes them and gives them back."""

    def preprocess(self, images: object, *, height: int, width: int) -> Tensor:
        """As tensors in -1 to 1."""

    def postprocess(self, images: Tensor, *, output_type: str, do_denormalize: list[bool]) -> object:
        """In the form that was asked for."""


class Drawn(Protocol):
    """What the call of a pipeline gives, unless it was asked for a tuple."""

    images: list[Image.Image]


class Pipeline(Protocol):
    """A pipeline that diffuses latents with a UNet."""

    components: Mapping[str, object]
    scheduler: Scheduler
    unet: Denoiser
    vae: Autoencoder
    image_processor: ImageProcessor
    vae_scale_factor: int
    num_timesteps: int
    device: torch.device
    dtype: torch.dtype

    def __call__(self, *args: object, **options: object) -> Drawn:
        """Draw images."""

    def set_progress_bar_config(self, **options: object) -> None:
        """How it shows its progress."""


Callback = Callable[[Pipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""What diffusers calls at the end of every step, with the tensors that it was asked for."""


def as_pipeline(mixin: object) -> Pipeline:
    """The pipeline that a mixin is a part of."""
    return cast(Pipeline, mixin)
