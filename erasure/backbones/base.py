"""The interface to a model family. Strategies use it and never test for the family's name."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from erasure.backbones.conditioning import Conditioning, Source
from erasure.backbones.latents import Latents
from erasure.backbones.layouts import Layout
from erasure.backbones.parametrisation import TIMESTEPS, Parametrisation
from erasure.backbones.sites import AttentionSite, attention_sites
from erasure.backbones.towers import TextTower, TowerOutput, text_towers
from erasure.errors import UnsupportedModelError
from erasure.interop import paths
from erasure.interop.protocols import Denoiser, Scheduler, Settings
from erasure.interop.rounds import together
from erasure.needs import Need

Part = Literal["keys", "values", "both"]
"""Role of a layer's output in attention."""


class EntryLayer(NamedTuple):
    """A linear layer through which text features enter the denoiser: what closed-form methods edit."""

    key: str
    """`component/module.path`."""
    module: nn.Linear
    source: Source = "tokens"
    """Part of the conditioning that the layer reads."""
    columns: slice = slice(None)
    """Columns of its weight that read this part, the same in all layers of a source; other columns read other
    inputs."""
    part: Part = "both"
    """Role of its output in attention; `both` for layers before all attention."""

    @property
    def path(self) -> str:
        """Path inside of the denoiser."""
        return self.key.split("/", 1)[1]


class TokenRun(NamedTuple):
    """A run of adjacent tokens of a conditioning, and the text encoders whose states are concatenated in each."""

    towers: tuple[TextTower, ...]
    """The text encoders, which read the same tokens."""
    first: int = 0
    """Index of the first token in the conditioning."""
    tokens: int | None = None
    """Number of tokens; all from the first on when `None`."""

    @property
    def tower(self) -> TextTower:
        """The text encoder that gives the positions of words."""
        return self.towers[0]


class TowerSlice(NamedTuple):
    """Slices of a conditioning with the output of one text encoder: of its tokens, or of its pooled vector."""

    component: str
    places: slice
    """Slice of the tokens."""
    columns: slice
    """Slice of the features."""


class Backbone(ABC):
    """A pipeline and its model family, behind one interface.

    Args:
        pipe: The pipeline; its modules are used in place.
        size: Height and width of images in pixels; the family's own when left out.
        length: Number of tokens to which prompts are padded for T5; the pipeline's own when left out.
    """

    family: ClassVar[str]
    denoiser_component: ClassVar[str]
    reads_kohya_names: ClassVar[bool] = False
    """Whether loaders read kohya's names of LoRA layers."""
    noisiest: ClassVar[float] = float(TIMESTEPS)
    """Timestep of pure noise."""
    guides_in_one_call: ClassVar[bool] = True
    """Whether pipelines pass negative prompts and prompts to the denoiser in one call, in this order; otherwise in
    two calls, prompts first."""

    def __init__(
        self, pipe: DiffusionPipeline, *, size: tuple[int, int] | None = None, length: int | None = None
    ) -> None:
        self.pipe, self.size, self.length = pipe, size, length

    @classmethod
    def published_layout(cls, denoiser: Denoiser | None) -> Layout | None:
        """Give the names of the denoiser's parameters in the files that its makers published.

        Args:
            denoiser: The network; without it, what is the same in the whole family.

        Returns:
            The layout; `None` where none is known, or it depends on the network and there is none.
        """
        return None

    @classmethod
    def layout_of(cls, names: Collection[str]) -> Layout | None:
        """Give `published_layout` from a published file, without a network of diffusers.

        Args:
            names: Names of the denoiser's tensors in the file.
        """
        return cls.published_layout(None)

    @classmethod
    @abstractmethod
    def matches(cls, pipe: DiffusionPipeline) -> bool:
        """Whether a pipeline is of this family."""

    def lacks(self, need: Need) -> str:
        """Say why the model does not meet a requirement of a strategy; empty where it does."""
        if need == "one step":
            return (
                "its noise is that of flow matching, and what makes a one-step generator here (score identity "
                "distillation) is defined for the noise of diffusion models: take a model of Stable Diffusion or "
                "SDXL, or a strategy that keeps the number of steps (esd, doco, uce)"
            )
        if need == "image prompts":
            return (
                "text and picture attend to each other in one joint attention there, and the IP-Adapters that exist "
                "for that are of another form than those of UNets: take a model of Stable Diffusion or SDXL, or a "
                "strategy that needs no pictures (esd, advunlearn)"
            )
        if need == "cross-attention":
            return (
                "text and picture attend to each other in one joint attention there, whose keys and values of the "
                "text depend on the picture behind the first block: take a model of Stable Diffusion or SDXL, or a "
                "strategy that works on both (uce, esd, concept_ablation)"
            )
        return ""

    def check_plain(self, advice: str) -> None:
        """Refuse quantised or offloaded text encoders and denoisers.

        Args:
            advice: What to do instead, for the message.

        Raises:
            UnsupportedModelError: A network is quantised or offloaded.
        """
        parts = {tower.component: tower.module for tower in self.towers}
        for name, module in {**parts, self.denoiser_component: self.denoiser}.items():
            unlike = next((p for p in module.parameters() if not paths.is_plain(p)), None)
            if unlike is not None:
                raise UnsupportedModelError(
                    f"the {name} is quantised or offloaded ({type(unlike).__name__}, {unlike.dtype}, "
                    f"{unlike.device}): {advice}"
                )

    # Parts -----------------------------------------------------------------------------------------------------------

    @property
    def towers(self) -> list[TextTower]:
        """The text encoders, in the order in which the pipeline uses them."""
        return text_towers(self.pipe, self.length)

    @property
    def text_length(self) -> int | None:
        """Number of tokens to which prompts are padded for T5; `None` where all lengths are fixed."""
        return next((tower.max_length for tower in self.towers if not tower.causal), None)

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser: a UNet or a transformer."""
        return getattr(self.pipe, self.denoiser_component)

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser's arithmetic; its weights may be stored in a lower one."""
        return cast(Denoiser, paths.uncompiled(self.denoiser)).dtype

    def attention_sites(self) -> list[AttentionSite]:
        """Every attention layer of the denoiser in order of execution."""
        return attention_sites(self.denoiser)

    @abstractmethod
    def entry_layers(self) -> list[EntryLayer]:
        """The linear layers through which text enters the denoiser."""

    def entry(self, path: str, source: Source = "tokens", columns: slice = slice(None)) -> EntryLayer:
        """Make the entry layer at a path of the denoiser, see `EntryLayer`."""
        layer = cast(nn.Linear, paths.layer(paths.uncompiled(self.denoiser), path))
        return EntryLayer(f"{self.denoiser_component}/{path}", layer, source, columns)

    def text_layers(self) -> list[str]:
        """Paths of the denoiser's text-only modules: entry layers, and the text stream of joint attention."""
        doors = [layer.path for layer in self.entry_layers()]
        return [*doors, *(path for site in self.attention_sites() for path in site.text_only(self.denoiser))]

    # Text ------------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def token_runs(self) -> list[TokenRun]:
        """The tokens of a conditioning by text encoder, without gaps."""

    @property
    def reader(self) -> TextTower:
        """The text encoder whose tokens the denoiser reads first, and whose tokeniser gives the words."""
        return self.token_runs[0].tower

    def written(self) -> list[TowerSlice]:
        """Slices of a conditioning's tokens with the states of each text encoder."""
        parts = []
        for run in self.token_runs:
            column, end = 0, None if run.tokens is None else run.first + run.tokens
            for tower in run.towers:
                parts.append(TowerSlice(tower.component, slice(run.first, end), slice(column, column + tower.width)))
                column += tower.width
        return parts

    def pooled(self) -> list[TowerSlice]:
        """Slices of a conditioning's pooled vector by text encoder, concatenated in order."""
        parts, column = [], 0
        for tower in self.towers:
            if tower.pooled:
                parts.append(TowerSlice(tower.component, slice(None), slice(column, column + tower.pooled_width)))
                column += tower.pooled_width
        return parts

    def tower(self, component: str) -> TextTower:
        """Find a text encoder by its component's name."""
        return next(tower for tower in self.towers if tower.component == component)

    @abstractmethod
    def compose(self, parts: Mapping[str, TowerOutput]) -> Conditioning:
        """Combine the text encoders' outputs, by component, into a conditioning.

        Only this method knows how states are concatenated and padded.
        """

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts as the pipeline does; differentiable in the text encoders' weights."""
        return self.compose(_encoded(self.towers, prompts))

    def composed(self, component: str, output: TowerOutput, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, with a given output instead of that of one text encoder.

        Args:
            component: Name of the text encoder.
            output: Its output for the prompts.
            prompts: Prompts that the other text encoders read.
        """
        others = [tower for tower in self.towers if tower.component != component]
        return self.compose({**_encoded(others, prompts), component: output})

    def null(self, empty: Conditioning) -> Conditioning:
        """Give the null conditioning of classifier-free guidance, used where no negative prompt is given.

        Args:
            empty: The encoding of the empty prompt, one row or several.
        """
        return empty

    # Noise -----------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def parametrisation(self) -> Parametrisation:
        """The denoiser's type of prediction, and the noising of its training.

        Raises:
            UnsupportedModelError: The scheduler's type of prediction is unknown to the family.
        """

    @property
    @abstractmethod
    def latents(self) -> Latents:
        """Shape and scale of the latents."""

    @abstractmethod
    def rollout_scheduler(self) -> Scheduler:
        """Make a deterministic first-order sampler with the model's noise schedule.

        It has no state between steps, so rows of a batch may end at any step.
        """

    @abstractmethod
    def timesteps(self, steps: int) -> Tensor:
        """Give the timesteps of a sampling run, highest first."""

    def noise(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
        """Draw initial latents, one seed each, on the CPU in float32: `(seeds, channels, h, w)`."""
        shape = self.latents.shape(height, width)
        rows = [randn_tensor((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(rows).to(self.device, self.dtype)

    @abstractmethod
    def model_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Scale a sampler's latents to the denoiser's input; some schedulers have another scale."""

    @property
    def takes_guidance(self) -> bool:
        """Whether the denoiser has a guidance input, so that a step needs one pass and no empty prompt."""
        return False

    @abstractmethod
    def predict(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance: float | Tensor | None = None
    ) -> Tensor:
        """Run the denoiser once, with a result shaped as `x_t`; differentiable.

        Args:
            x_t: Noised latents, `(batch, channels, h, w)`, not packed.
            t: Timesteps: one for the batch, or `(batch,)`.
            conditioning: Conditioning, one row per latent.
            guidance: Guidance scale of a guidance-distilled model, one for the batch or `(batch,)`; 1 (no guidance)
                when left out.
        """

    def guided(self, own: Tensor, null: Tensor, scale: float) -> Tensor:
        """Apply classifier-free guidance: `null + scale (own - null)`."""
        return null + scale * (own - null)

    @abstractmethod
    def step(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """Take one step of the pipeline's scheduler from `t` (one timestep for the batch) to the next."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents to pixels `(batch, 3, height, width)` in 0-1."""
        pixels = self.pipe.vae.decode(self.latents.for_vae(latents)).sample
        return (pixels / 2 + 0.5).clamp(0, 1)

    # The pipeline's call ---------------------------------------------------------------------------------------------

    def call_options(
        self, guidance: float | None = None, steps: int | None = None,
        size: tuple[int | None, int | None] | None = None, negative: Sequence[str] = ("",),
    ) -> Settings:  # fmt: skip
        """Give the stock pipeline's call arguments for a list of prompts; what is left out is the pipeline's own.

        Args:
            guidance: Guidance scale.
            steps: Number of denoising steps.
            size: Height and width in pixels; this backbone's `size` when left out.
            negative: Negative prompt of each prompt.

        Raises:
            OptionError: The model cannot draw the size, or would ignore a negative prompt.
        """
        height, width = size or self.size or (None, None)
        self.latents.shape(height, width)
        given = {
            "num_inference_steps": steps, "height": height, "width": width,
            "max_sequence_length": self.length if self.takes_length else None,
        }  # fmt: skip
        given_options = {name: value for name, value in given.items() if value is not None}
        return {**self.guidance_options(guidance, negative), **given_options}

    @property
    def takes_length(self) -> bool:
        """Whether the pipeline's call has an argument for the number of tokens (`max_sequence_length`)."""
        # A subclass may pass options on, so the stock class's call counts too.
        calls = (vars(kind)["__call__"] for kind in type(self.pipe).__mro__ if "__call__" in vars(kind))
        return any("max_sequence_length" in inspect.signature(call).parameters for call in calls)

    def guidance_options(self, guidance: float | None, negative: Sequence[str]) -> Settings:
        """Give the stock pipeline's call arguments for guidance; see `call_options`.

        Where all negative prompts are empty, none is passed, because some models use `null` and not the empty prompt
        then.
        """
        given_options: Settings = {} if guidance is None else {"guidance_scale": guidance}
        return {**given_options, "negative_prompt": list(negative)} if any(negative) else given_options


def _encoded(towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, TowerOutput]:
    """Encode prompts by text encoders, by component; gates that open in one encoder also open in the others."""
    return together(lambda: {tower.component: tower.encode(tower.tokenize(prompts)) for tower in towers})
