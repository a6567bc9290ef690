"""What the package asks of the objects of diffusers and transformers, as far as it uses them.

Those libraries are not typed for others, so a name written wrong would show up at run time only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
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

    def __call__(self, text: str | list[str], **options: Any) -> TokenIds:
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


class Component(Protocol):
    """A network of a pipeline: a module with a config."""

    config: Config
    dtype: torch.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One pass."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights."""

    def to(self, *args: torch.dtype | torch.device | str) -> nn.Module:
        """Move or cast it."""


class Autoencoder(Component, Protocol):
    """The network between pixels and latents."""

    def encode(self, pixels: Tensor) -> Any:
        """The distribution of an image's latents."""

    def decode(self, latents: Tensor) -> Any:
        """The image of latents."""


class ImageProcessor(Protocol):
    """Images as a pipeline takes them and gives them back."""

    def preprocess(self, images: object, *, height: int, width: int) -> Tensor:
        """As tensors in -1 to 1."""

    def postprocess(self, images: Tensor, *, output_type: str, do_denormalize: list[bool]) -> Any:
        """In the form that was asked for."""


class Pipeline(Protocol):
    """A pipeline that diffuses latents with a UNet."""

    components: Mapping[str, Any]
    scheduler: Any
    unet: Any
    vae: Autoencoder
    image_processor: ImageProcessor
    vae_scale_factor: int
    num_timesteps: int
    device: torch.device
    dtype: torch.dtype

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Draw images."""

    def set_progress_bar_config(self, **options: Any) -> None:
        """How it shows its progress."""


Callback = Callable[[Pipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""What diffusers calls at the end of every step, with the tensors that it was asked for."""


def as_pipeline(mixin: object) -> Pipeline:
    """The pipeline that a mixin is a part of."""
    return cast(Pipeline, mixin)
