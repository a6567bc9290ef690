"""What an attack or a stress test tries: another call of the pipeline, on a pipeline that may be changed for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from erasure.eval.samples import Sample

# No import of torch here: attacks are listed without it.

Change: TypeAlias = "Callable[[DiffusionPipeline], AbstractContextManager[DiffusionPipeline]]"
"""Changes a pipeline while a context lasts, and gives the one to be called: the same with another sampler or other
weights, or another class with the same components. Everything is put back when the context ends."""


@contextmanager
def unchanged(pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    """Change nothing."""
    yield pipe


@dataclass(frozen=True)
class Attempt:
    """One try to bring a concept back, in the place of a sample's ordinary call."""

    call: Mapping[str, object] = field(default_factory=dict)
    """Arguments of the pipeline's call in the place of those of the sample: `prompt`, `prompt_2`, `prompt_embeds`,
    `latents`, `image`, `num_inference_steps`, ... Texts are of one sample; everything else is as the pipeline takes it
    for a batch of one. One that is `None` is left out of the call."""
    change: Change = unchanged
    """Change of the pipeline for this call."""
    steps: int = 0
    """Gradient steps since the last attempt."""
    loss: float | None = None
    """Mean loss of those; `None` where nothing is optimised."""
    changed: bool = False
    """Whether the tokeniser reads a text as other tokens than were optimised."""
    cut: bool = False
    """Whether a text is too long, so that the pipeline would cut words of the original prompt off: it is not drawn."""
    box: tuple[int, int, int, int] | None = None
    """Left, top, right and bottom, in pixels, of the part of the picture that the judge is shown; the whole when left
    out. For a picture of which the attacker has given the rest."""

    @property
    def text(self) -> str | None:
        """The prompt; `None` where the sample's own is kept, or none is read."""
        given = self.call.get("prompt")
        return given if isinstance(given, str) else None

    @property
    def others(self) -> dict[str, str]:
        """Texts for other text encoders, by argument of the call (`prompt_2`)."""
        return {
            name: given for name, given in self.call.items() if name.startswith("prompt_") and isinstance(given, str)
        }

    @property
    def is_text(self) -> bool:
        """Whether it is nothing but texts, so that it can be written down and tried on another model."""
        texts = (self.text is not None) + len(self.others)
        return self.change is unchanged and self.box is None and len(self.call) == texts

    @property
    def key(self) -> tuple[tuple[str, str], ...] | None:
        """What gives the same image again, for attempts of texts; `None` for others."""
        if not self.is_text:
            return None
        return tuple(sorted((name, str(given)) for name, given in self.call.items()))

    def plain(self, sample: Sample) -> Sample | None:
        """The sample whose ordinary call this is: the given one, or it with another prompt; `None` where it is more.

        Args:
            sample: In the place of whose ordinary call it is tried.
        """
        if not self.call and self.change is unchanged:
            return sample
        text = self.text
        if text is None or self.change is not unchanged or set(self.call) != {"prompt"}:
            return None
        return replace(sample, prompt=text)

    def arguments(self) -> dict[str, object]:
        """The call's arguments for a batch of one."""
        return {name: [given] if isinstance(given, str) else given for name, given in self.call.items()}
