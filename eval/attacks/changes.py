"""What attempts do to a pipeline for one call, and between its steps, as values that can be written down."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, cast, get_args

import diffusers
import torch
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from erasure import assets
from erasure.attach import ErasureManager
from erasure.backbones import TextTower, backbone_for
from erasure.errors import EvaluationError
from erasure.files import shown
from erasure.interop import hooks, image_prompts, paths
from erasure.interop.hooks import ModelHook

Task = Literal["Img2Img", "Inpaint"]
"""What else than drawing from text a pipeline may do, as diffusers' classes are called."""
_REDEFINED = "erasure_redefined_tokens"


class Described(ABC):
    """A value of an attempt that is a small object: subclass it as a frozen dataclass of plain data and tensors."""

    kind: ClassVar[str]
    """Name in files."""

    def expect(self, name: str, *kinds: type) -> None:
        """Refuse the value of a field, which may come from a file.

        Raises:
            EvaluationError: It is of none of these types.
        """
        value = getattr(self, name)
        if not isinstance(value, kinds):
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise EvaluationError(f"{self.kind}: {name} is {shown(value)}; expected: {allowed}")


# Another pipeline ----------------------------------------------------------------------------------------------------


def pipeline_class(pipe: DiffusionPipeline, task: Task) -> type[DiffusionPipeline] | None:
    """The class of diffusers that does another task with the networks of a pipeline; `None` where there is none."""
    for kind in type(pipe).__mro__:
        made = getattr(diffusers, kind.__name__.replace("Pipeline", f"{task}Pipeline"), None)
        if kind.__module__.startswith("diffusers.") and isinstance(made, type):
            return made
    return None


@dataclass(frozen=True)
class AnotherTask(Described):
    """The same networks in diffusers' pipeline for another task."""

    kind: ClassVar[str] = "task"

    task: Task

    def __post_init__(self) -> None:
        """Check what a file says."""
        self.expect("task", str)
        if self.task not in get_args(Task):
            raise EvaluationError(f"task is {shown(self.task)}; there are: {', '.join(get_args(Task))}")

    @contextmanager
    def __call__(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """Give the other pipeline.

        Raises:
            EvaluationError: There is none for such models.
        """
        kind = pipeline_class(pipe, self.task)
        if kind is None:
            raise EvaluationError(f"diffusers has no {self.task} pipeline for a {type(pipe).__name__}")
        # Not by `from_pipe`, which casts the networks that both share.
        known = {**pipe.config, "requires_safety_checker": False, **pipe.components}
        wanted = inspect.signature(kind.__init__).parameters
        made = kind(**{name: known[name] for name in wanted if name in known})
        ErasureManager(made).adopt()
        yield made


# Another sampler -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnotherSampler(Described):
    """Another scheduler on the noise levels of the pipeline's own."""

    kind: ClassVar[str] = "sampler"

    scheduler: str
    """Class of diffusers."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Of its config, in the place of those of the pipeline's own."""

    def __post_init__(self) -> None:
        """Check what a file says."""
        self.expect("scheduler", str)
        self.expect("options", dict)

    @contextmanager
    def __call__(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """Sample with it.

        Raises:
            EvaluationError: Diffusers has no such scheduler.
        """
        kind = getattr(diffusers, self.scheduler, None)
        if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
            raise EvaluationError(f"diffusers has no scheduler {self.scheduler!r}")
        own = pipe.scheduler
        pipe.scheduler = cast(type[ConfigMixin], kind).from_config({**own.config, **self.options})
        try:
            yield pipe
        finally:
            pipe.scheduler = own


# Other meanings of tokens --------------------------------------------------------------------------------------------


class _Redefine(ModelHook):
    """On the token embedding: gives some tokens other vectors, wherever they stand."""

    def __init__(self, vectors: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.vectors, self.ids = vectors, torch.empty(0)

    def pre_forward(self, module: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[object, object]:
        self.ids = args[0] if args else kwargs["input"]
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        for token, vector in self.vectors.items():
            output = torch.where((self.ids == token)[..., None], vector.to(output), output)
        return output


@contextmanager
def redefined(
    towers: Sequence[TextTower], ids: Mapping[str, Sequence[int]], rows: Mapping[str, Tensor]
) -> Iterator[None]:
    """Some tokens have other vectors inside, in every text that is read; differentiable.

    Args:
        towers: The text encoders.
        ids: Tokens, by component.
        rows: Their vectors `(tokens, dim)`, by component.
    """
    with ExitStack() as stack:
        for tower in towers:
            if tower.component in ids:
                chosen = dict(zip(ids[tower.component], rows[tower.component], strict=True))
                stack.enter_context(hooks.hooked(paths.token_table(tower.root), _Redefine(chosen), _REDEFINED))
        yield


@dataclass(frozen=True)
class Words(Described):
    """Vectors that were learned for tokens of the vocabulary."""

    kind: ClassVar[str] = "words"

    ids: Mapping[str, Sequence[int]]
    """Tokens, by text encoder."""
    vectors: Mapping[str, Tensor]
    """Their vectors `(tokens, dim)`, by text encoder."""

    def __post_init__(self) -> None:
        """Check what a file says."""
        self.expect("ids", dict)
        self.expect("vectors", dict)
        sound = set(self.ids) == set(self.vectors) and all(
            isinstance(rows, Tensor)
            and rows.ndim == 2
            and isinstance(self.ids[name], list)
            and all(type(token) is int and token >= 0 for token in self.ids[name])
            for name, rows in self.vectors.items()
        )
        if not sound:
            raise EvaluationError("words: expected tokens and a matrix of their vectors for each text encoder")

    @contextmanager
    def __call__(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """Read these tokens so.

        Raises:
            EvaluationError: They are of another text encoder.
        """
        towers = backbone_for(pipe).towers
        for tower in towers:
            if tower.component in self.ids:
                count, width = self.vectors[tower.component].shape
                tokens = self.ids[tower.component]
                if width != tower.width or count != len(tokens) or max(tokens) >= len(tower.tokenizer):
                    raise EvaluationError(
                        f"learned vectors of width {width} for the tokens {list(tokens)}, and the {tower.component} "
                        f"has {len(tower.tokenizer)} tokens of width {tower.width}: they are of another model"
                    )
        with redefined(towers, self.ids, self.vectors):
            yield pipe


# A picture beside the words ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImagePrompt(Described):
    """A picture that is told beside the words, through an IP-Adapter."""

    kind: ClassVar[str] = "image prompt"

    adapter: str
    """Its file or folder, or the name of an embedded one."""
    tokens: Tensor
    """What it makes of the pictures, one for each row of the denoiser's call, `(rows, tokens, width)`."""
    scale: float = 1.0
    """How much what is made of the picture counts beside what is made of the words."""
    encoder: str = ""
    """Folder of its image encoder; the one beside its file when empty."""

    def __post_init__(self) -> None:
        """Check what a file says."""
        self.expect("adapter", str)
        self.expect("tokens", Tensor)
        self.expect("scale", float, int)
        self.expect("encoder", str)

    @contextmanager
    def __call__(self, pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        """Tell it.

        Raises:
            OptionError: There is no such adapter; see `erasure.interop.image_prompts.opened`.
        """
        denoiser = backbone_for(pipe).denoiser
        encoder = Path(self.encoder) if self.encoder else None
        adapter = image_prompts.opened(assets.find(self.adapter) or Path(self.adapter), encoder, denoiser)
        for processor in adapter.processors.values():
            processor.scale = [self.scale]
        with adapter.listening(denoiser), image_prompts.showing(denoiser, self.tokens):
            yield pipe


# Between two steps ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resumed(Described):
    """Latents in the place of the pipeline's own behind one of its steps: `callback_on_step_end` of its call."""

    kind: ClassVar[str] = "resumed"

    step: int
    """Steps behind which they do."""
    latents: Tensor
    """As the pipeline has them."""

    def __post_init__(self) -> None:
        """Check what a file says."""
        self.expect("step", int)
        self.expect("latents", Tensor)

    def __call__(
        self, pipe: DiffusionPipeline, index: int, t: Tensor, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put them in."""
        own = tensors["latents"]
        return {**tensors, "latents": self.latents.to(own).expand_as(own)} if index == self.step - 1 else dict(tensors)


KINDS: dict[str, type[Described]] = {
    made.kind: made for made in (AnotherTask, AnotherSampler, Words, ImagePrompt, Resumed)
}
"""Every kind that files may name."""
