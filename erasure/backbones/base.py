"""The protocol of a model family. Strategies ask it and never look at the family's name."""

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
    """Which part of the conditioning it reads."""
    columns: slice = slice(None)
    """Columns of its weight that read it, the same in all layers of a source; the others read something else."""
    part: Part = "both"
    """Role of its output in attention; both where it stands ahead of all attention."""

    @property
    def path(self) -> str:
        """Path inside of the denoiser."""
        return self.key.split("/", 1)[1]


class TokenRun(NamedTuple):
    """Neighbouring tokens of a conditioning, and the text encoders whose states stand side by side in each."""

    towers: tuple[TextTower, ...]
    """The text encoders, which read the same tokens."""
    first: int = 0
    """Place of their first token among those of the conditioning."""
    tokens: int | None = None
    """How many; all from the first on when left out."""

    @property
    def tower(self) -> TextTower:
        """The one that is asked what stands where."""
        return self.towers[0]


class Written(NamedTuple):
    """Where the states of one text encoder stand in the tokens of a conditioning, or its vector in the pooled one."""

    component: str
    places: slice
    """Tokens."""
    columns: slice
    """Features."""


class Backbone(ABC):
    """One pipeline seen through its family.

    Args:
        pipe: The pipeline; its modules are used in place.
        size: Height and width in pixels of what is drawn; the family's own when left out.
        length: Tokens that text encoders of free length pad prompts to; the pipeline's own when left out.
    """

    family: ClassVar[str]
    denoiser_component: ClassVar[str]
    reads_kohya_names: ClassVar[bool] = False
    """Whether loaders read the names that kohya gives the layers of a LoRA."""
    noisiest: ClassVar[float] = float(TIMESTEPS)
    """Noise level that the denoiser is told where nothing but noise is left."""
    guides_in_one_call: ClassVar[bool] = True
    """Whether pipelines ask about negative prompts and prompts in one call of the denoiser, in this order; else in two
    calls, the prompts' first."""

    def __init__(
        self, pipe: DiffusionPipeline, *, size: tuple[int, int] | None = None, length: int | None = None
    ) -> None:
        self.pipe, self.size, self.length = pipe, size, length

    @classmethod
    def published_layout(cls, denoiser: Denoiser | None) -> Layout | None:
        """Give the names of the denoiser's parameters in the files that its makers published.

        Args:
            denoiser: The network; what is the same for all of the family where there is none.

        Returns:
            The layout; `None` where none is known, or it depends on the network and there is none.
        """
        return None

    @classmethod
    def layout_of(cls, names: Collection[str]) -> Layout | None:
        """Give the same as `published_layout` by a published file, where no network of diffusers is there.

        Args:
            names: Names of the denoiser's tensors in the file.
        """
        return cls.published_layout(None)

    @classmethod
    @abstractmethod
    def matches(cls, pipe: DiffusionPipeline) -> bool:
        """Whether a pipeline is of this family."""

    def lacks(self, need: Need) -> str:
        """Say why the model cannot give what a strategy needs; empty where it can."""
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
        """Refuse text encoders and a denoiser whose weights are not there as plain numbers.

        Args:
            advice: What to do instead, for the message.

        Raises:
            UnsupportedModelError: One is quantised or offloaded.
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
        """Tokens that the text encoder of free length pads prompts to; `None` where all have a fixed length."""
        return next((tower.max_length for tower in self.towers if not tower.causal), None)

    @property
    def denoiser(self) -> Denoiser:
        """The network that denoises, a module."""
        return getattr(self.pipe, self.denoiser_component)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the denoiser computes in, which weights may be stored below."""
        return cast(Denoiser, paths.uncompiled(self.denoiser)).dtype

    def attention_sites(self) -> list[AttentionSite]:
        """Every attention layer of the denoiser in order of execution."""
        return attention_sites(self.denoiser)

    @abstractmethod
    def entry_layers(self) -> list[EntryLayer]:
        """The linear layers through which text enters the denoiser."""

    def entry(self, path: str, source: Source = "tokens", columns: slice = slice(None)) -> EntryLayer:
        """The linear layer at a path of the denoiser; the rest is as `EntryLayer` says."""
        layer = cast(nn.Linear, paths.layer(paths.uncompiled(self.denoiser), path))
        return EntryLayer(f"{self.denoiser_component}/{path}", layer, source, columns)

    def text_layers(self) -> list[str]:
        """Paths of the denoiser's modules that text alone passes: where it enters, and its half of joint attention."""
        doors = [layer.path for layer in self.entry_layers()]
        return [*doors, *(path for site in self.attention_sites() for path in site.text_only(self.denoiser))]

    # Text ------------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def token_runs(self) -> list[TokenRun]:
        """The tokens of a conditioning by the text encoders that wrote them, without gaps."""

    @property
    def reader(self) -> TextTower:
        """The text encoder whose tokens the denoiser reads first: its tokeniser says which words there are."""
        return self.token_runs[0].tower

    def written(self) -> list[Written]:
        """Where the states of each text encoder stand in the tokens of a conditioning."""
        parts = []
        for run in self.token_runs:
            column, end = 0, None if run.tokens is None else run.first + run.tokens
            for tower in run.towers:
                parts.append(Written(tower.component, slice(run.first, end), slice(column, column + tower.width)))
                column += tower.width
        return parts

    def pooled(self) -> list[Written]:
        """Where the pooled vector of each text encoder stands in that of a conditioning: side by side, in order."""
        parts, column = [], 0
        for tower in self.towers:
            if tower.pooled:
                parts.append(Written(tower.component, slice(None), slice(column, column + tower.pooled_width)))
                column += tower.pooled_width
        return parts

    def tower(self, component: str) -> TextTower:
        """The text encoder of a name."""
        return next(tower for tower in self.towers if tower.component == component)

    @abstractmethod
    def compose(self, parts: Mapping[str, TowerOutput]) -> Conditioning:
        """What the denoiser is told, from what each text encoder gives, by component.

        The one place that knows how states are put beside and behind one another, and which are padded.
        """

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts as the pipeline does; differentiable in the text encoders' weights."""
        return self.compose(_encoded(self.towers, prompts))

    def composed(self, component: str, output: TowerOutput, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts with an output of one text encoder in the place of its own; the others encode as they are.

        Args:
            component: That text encoder.
            output: What it gives for the prompts.
            prompts: What the others read.
        """
        others = [tower for tower in self.towers if tower.component != component]
        return self.compose({**_encoded(others, prompts), component: output})

    def null(self, empty: Conditioning) -> Conditioning:
        """What the pipeline tells the denoiser for guidance where no negative prompt is given.

        Args:
            empty: The encoding of the empty prompt, one row or several.
        """
        return empty

    # Noise -----------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def parametrisation(self) -> Parametrisation:
        """What the denoiser predicts, and how its training noises.

        Raises:
            UnsupportedModelError: The pipeline's scheduler says something that the family does not know.
        """

    @property
    @abstractmethod
    def latents(self) -> Latents:
        """Shape and scale of what is denoised."""

    @abstractmethod
    def rollout_scheduler(self) -> Scheduler:
        """A new deterministic first-order sampler of the model's noise schedule.

        It keeps nothing between steps, so rows of a batch may end at any of them.
        """

    @abstractmethod
    def timesteps(self, steps: int) -> Tensor:
        """The noise levels of a sampling run, highest first."""

    def noise(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
        """Initial latents, one seed each, drawn on the CPU in float32: `(seeds, channels, h, w)`."""
        shape = self.latents.shape(height, width)
        rows = [randn_tensor((1, *shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.cat(rows).to(self.device, self.dtype)

    @abstractmethod
    def model_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Latents of a sampling run as the denoiser wants them: some schedulers carry them at another scale."""

    @property
    def told_guidance(self) -> bool:
        """Whether the denoiser is told the scale of guidance, so that a step takes one pass and no empty prompt."""
        return False

    @abstractmethod
    def predict(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance: float | Tensor | None = None
    ) -> Tensor:
        """One forward pass of the denoiser, shaped as `x_t`; differentiable.

        Args:
            x_t: `(batch, channels, h, w)`, never packed.
            t: Noise levels: one for the batch, or `(batch,)`.
            conditioning: Of as many prompts.
            guidance: Scale that a model which was distilled for guidance is told, one for the batch or `(batch,)`; 1,
                which is none, when left out.
        """

    def guided(self, own: Tensor, null: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance: `null + scale (own - null)` of predictions for prompts and without."""
        return null + scale * (own - null)

    @abstractmethod
    def step(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
        """One step of the pipeline's scheduler from `t` (one level for the whole batch) to the next."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels `(batch, 3, height, width)` in 0-1 of clean latents."""
        pixels = self.pipe.vae.decode(self.latents.for_vae(latents)).sample
        return (pixels / 2 + 0.5).clamp(0, 1)

    # The pipeline's call ---------------------------------------------------------------------------------------------

    def call_options(
        self, guidance: float | None = None, steps: int | None = None,
        size: tuple[int | None, int | None] | None = None, negative: Sequence[str] = ("",),
    ) -> Settings:  # fmt: skip
        """Arguments of the stock pipeline's call for a list of prompts; what is left out is the pipeline's own.

        Args:
            guidance: Scale of guidance.
            steps: Denoising steps.
            size: Height and width in pixels; those of the session when left out.
            negative: Negative prompt of each prompt.

        Raises:
            OptionError: A size that the model cannot draw, or a negative prompt that it would not read.
        """
        height, width = size or self.size or (None, None)
        self.latents.shape(height, width)
        given = {
            "num_inference_steps": steps, "height": height, "width": width,
            "max_sequence_length": self.length if self.takes_length else None,
        }  # fmt: skip
        told = {name: value for name, value in given.items() if value is not None}
        return {**self.guidance_options(guidance, negative), **told}

    @property
    def takes_length(self) -> bool:
        """Whether the pipeline's call says how many tokens prompts are padded to."""
        # Of a class that hands options on, the stock class's call below it says so.
        calls = (vars(kind)["__call__"] for kind in type(self.pipe).__mro__ if "__call__" in vars(kind))
        return any("max_sequence_length" in inspect.signature(call).parameters for call in calls)

    def guidance_options(self, guidance: float | None, negative: Sequence[str]) -> Settings:
        """Arguments of the stock pipeline's call that say how it is guided; see `call_options`.

        Where all negative prompts are empty there is none: that is another input to some models, for which `null`
        stands in.
        """
        told: Settings = {} if guidance is None else {"guidance_scale": guidance}
        return {**told, "negative_prompt": list(negative)} if any(negative) else told


def _encoded(towers: Sequence[TextTower], prompts: Sequence[str]) -> dict[str, TowerOutput]:
    """What text encoders give for prompts, by component; what one finds in them the others are told."""
    return together(lambda: {tower.component: tower.encode(tower.tokenize(prompts)) for tower in towers})
