"""What an attack is up against: the erased model, the original one behind it, and the judge."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from erasure.attach import ErasureManager
from erasure.backbones import backbone_for
from erasure.errors import BypassedErasureError, BypassedErasureWarning, EvaluationError
from erasure.eval.attacks import SkippedPromptError
from erasure.eval.attacks.together import Drawn, Wanted, merged
from erasure.eval.attempts import Attempt
from erasure.eval.drawings import DrawingCache
from erasure.eval.generation import generate
from erasure.eval.metrics.unlearncanvas import unlearned
from erasure.eval.rows import Record
from erasure.eval.samples import Sample, sample_seed
from erasure.eval.scoring import Judge, call_judge, judgement, reason
from erasure.eval.suites import Target
from erasure.files import inside, read_tensors, write_bytes
from erasure.guards import admitted, is_strict, lock_of, unguarded
from erasure.images import flaw, png
from erasure.interop import scopes
from erasure.twins import states_of

ORDINARY = Attempt()
"""The call as a sample has it."""
LATENT, PIXELS = "latent", "pixels"
"""What is kept of a picture that an attack starts from."""


class Verdict(NamedTuple):
    """What the judge says of an image."""

    judged: Record | None
    """Its answer, as rows of an evaluation keep it."""
    shown: bool | None
    """Whether it sees the concept; `None` when it failed."""
    failure: str | None
    """Why it failed."""


class Start(NamedTuple):
    """A picture that an attack starts from."""

    latent: Tensor
    """Clean latent of the image, `(1, channels, h, w)`."""
    image: Image.Image


class Victim:
    """A model under attack.

    Args:
        pipe: The pipeline, with its erasures in force.
        stock: The original model.
        target: The concept.
        judge: Images to answers with `.object` and `.style`.
        keep: Told of every reference image that is used, with its sample.
        samples: All prompts of the concept that are attacked.
        seed: Of the run.
        folder: Where what is made once for all prompts is kept, so that a run that goes on finds it.
        drawings: Where ordinary drawings of the pipeline are kept and found, for other attacks; nowhere when left out.
            Those of an erasure that refuses calls are not: whether it does is asked every time.
        originals: The same for the original model.

    Attributes:
        references: Images of the original model that were asked for.
        recalled: Images, of both, that an earlier attack had drawn.
        is_strict: Whether the pipeline refuses what goes around its erasures: one was attached with `strict=True`.
    """

    def __init__(
        self, pipe: DiffusionPipeline, stock: DiffusionPipeline, target: Target, judge: Judge,
        keep: Callable[[Sample, Image.Image], None] = lambda sample, image: None, *,
        samples: Sequence[Sample] = (), seed: int = 0, folder: Path | None = None,
        drawings: DrawingCache | None = None, originals: DrawingCache | None = None,
    ) -> None:  # fmt: skip
        self.pipe, self.stock, self.target, self.judge, self.keep = pipe, stock, target, judge, keep
        self.samples, self.seed, self.folder = samples, seed, folder
        self.backbone, self.references, self.recalled = backbone_for(pipe), 0, 0
        self.is_strict = is_strict(states_of(pipe).values())
        if self.is_strict:
            ErasureManager(pipe).guard()
        self.drawings, self.originals = None if self.is_strict else drawings, originals
        self._made: dict[str, dict[str, Tensor]] = {}

    def draw(self, sample: Sample, attempt: Attempt = ORDINARY, *, stock: bool = False) -> Image.Image:
        """A sample's image by the model under attack, from the sample's own noise and through its ordinary call.

        Args:
            sample: Prompt, noise and settings.
            attempt: What is tried in their place.
            stock: Draw with the original model instead.

        Raises:
            BypassedErasureError: An erasure that was attached with `strict=True` refuses the call, so that nothing is
                drawn.
        """
        (drawn,) = self.draw_alike([Wanted(sample, attempt, stock)])
        self.references += stock
        self.recalled += drawn.recalled
        if isinstance(drawn.image, BypassedErasureError):
            raise drawn.image
        return drawn.image

    def draw_alike(self, wanted: Sequence[Wanted]) -> list[Drawn]:
        """What comes of calls that are alike, made as one as far as no earlier attack has drawn them.

        Args:
            wanted: The calls; see `Wanted.alike`.
        """
        cache = self.originals if wanted[0].stock else self.drawings
        plain = [each.attempt.plain(each.sample) for each in wanted]
        found = [None if cache is None or sample is None else cache.image(sample) for sample in plain]
        answers = {index: Drawn(image, recalled=True) for index, image in enumerate(found) if image is not None}
        rest = [index for index in range(len(wanted)) if index not in answers]
        try:
            images: Sequence[Image.Image | BypassedErasureError] = self._called([wanted[index] for index in rest])
        except BypassedErasureError as error:
            if len(rest) > 1:  # which of them it refuses
                return [answer for each in wanted for answer in self.draw_alike([each])]
            images = [error]
        for index, image in zip(rest, images, strict=True):
            answers[index], sample = Drawn(image), plain[index]
            if cache is not None and sample is not None and isinstance(image, Image.Image):
                cache.put_image(sample, png(image))
        return [answers[index] for index in range(len(wanted))]

    def _called(self, wanted: Sequence[Wanted]) -> list[Image.Image]:
        """Images of calls that are alike, in one call."""
        if not wanted:
            return []
        first, samples = wanted[0], [each.sample for each in wanted]
        call = first.attempt.arguments() if len(wanted) == 1 else merged([each.attempt.call for each in wanted])
        guarded = self._guarded() if self.is_strict and not first.stock else unguarded()
        with guarded, first.attempt.change(self.stock if first.stock else self.pipe) as pipe:
            ((_, images),) = generate(pipe, samples, len(samples), more=lambda _: call)
        return images

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Guards refuse inside what a strict erasure does not allow; what they only warn of is what is measured."""
        locked = lock_of(states_of(self.pipe).values())
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore", BypassedErasureWarning)
            if locked is not None:  # this pipeline is a twin of the one that the lock lets draw
                stack.enter_context(admitted(locked))
            yield

    def made_once(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is made once for all prompts: in memory, and in the folder of the run, for one that goes on.

        Args:
            name: Of its file.
            make: Makes it, always the same.
        """
        counts = self.references, self.recalled
        if name not in self._made:
            path = None if self.folder is None else inside(self.folder, f"{name}.safetensors", error=EvaluationError)
            if path is not None and path.is_file():
                self._made[name] = read_tensors(path, error=EvaluationError)
            else:
                self._made[name] = make()
                if path is not None:
                    write_bytes(path, save(self._made[name]), error=EvaluationError)
        # They are no prompt's: which one comes first is another with several processes.
        self.references, self.recalled = counts
        return self._made[name]

    def verdict(self, image: Image.Image, sample: Sample) -> Verdict:
        """Whether an image shows the concept: where UA counts the sample as not unlearned.

        An image that shows nothing, such as a black one, is no answer: neither a success nor a failure of the attack.
        """
        if (found := flaw(image)) is not None:
            return Verdict(None, None, found)
        (answer,) = call_judge(self.judge, [image])
        try:
            if isinstance(answer, Exception):
                raise answer
            judged = judgement(answer, sample)
        except Exception as error:  # a detector may fail in any way
            return Verdict(None, None, reason(error))
        outcomes = unlearned([sample.row() | {"judged": judged}], [self.target])
        if not outcomes.hits:
            return Verdict(judged, None, "the judge gave no answer for the concept's domain")
        return Verdict(judged, not outcomes.hits[0], None)

    def _recalled(self, drawn: Sample) -> Start | None:
        """The picture of a prompt and a seed that an earlier attack started from; `None` where it is not whole."""
        kept = None if self.originals is None else self.originals.tensors(drawn)
        if kept is None or set(kept) != {LATENT, PIXELS}:
            return None
        latent, pixels = kept[LATENT], kept[PIXELS]
        shape = (1, *self.backbone.latents.shape(drawn.height, drawn.width))
        if latent.shape != shape or pixels.dtype != torch.uint8 or pixels.shape != (drawn.height, drawn.width, 3):
            return None
        self.recalled += 1
        return Start(latent.to(self.backbone.device), Image.fromarray(pixels.numpy()))

    def reference(self, sample: Sample, tries: int) -> Tensor:
        """The clean latent `(1, channels, h, w)` of `start`."""
        return self.start(sample, tries).latent

    def start(
        self, sample: Sample, tries: int, *, without: bool = False, number: int = 0,
        box: tuple[int, int, int, int] | None = None,
    ) -> Start:  # fmt: skip
        """A picture by the original model from other noise than the sample's: of the concept, or without it.

        Args:
            sample: Prompt and settings.
            tries: Seeds that are tried until the judge sees the concept, or does not.
            without: Draw without a prompt until the judge does not see the concept.
            number: Of the picture, where several of one sample are wanted.
            box: Part of the picture that the judge is shown; the whole when left out.

        Raises:
            SkippedPromptError: None of them is one.
        """
        size, prompt, wanted = (sample.height, sample.width), "" if without else sample.prompt, not without
        call = self.backbone.call_options(
            sample.guidance_scale, sample.num_inference_steps, size, [sample.negative_prompt]
        )
        what = f"without: {sample.prompt}" if without else f"reference: {prompt}"
        for index in range(number * tries, (number + 1) * tries):
            seed = sample_seed(sample.seed, what, index)
            start = self._recalled(drawn := replace(sample, prompt=prompt, seed=seed))
            if start is None:
                with torch.no_grad(), scopes.quiet(self.stock):
                    latent = self.stock(
                        prompt=[prompt],
                        generator=torch.Generator("cpu").manual_seed(seed), output_type="latent", **call,
                    ).images  # fmt: skip
                    latent = self.backbone.latents.unpacked(latent, *size)
                    pixels = bytes_of(self.backbone.decode(latent))
                start = Start(latent, Image.fromarray(pixels.numpy()))
                if self.originals is not None:
                    self.originals.put_tensors(drawn, {LATENT: latent.cpu().contiguous(), PIXELS: pixels})
            self.references += 1
            if self.verdict(start.image if box is None else start.image.crop(box), sample).shown is not wanted:
                continue
            self.keep(sample, start.image)
            return start
        seen = "sees nothing but" if without else "sees"
        where = "draws without a prompt" if without else f"draws of {sample.prompt!r}"
        raise SkippedPromptError(
            f"no reference image: the judge {seen} {self.target.name!r} in {'all' if without else 'none'} of {tries} "
            f"images that the original model {where}"
        )


def bytes_of(pixels: Tensor) -> Tensor:
    """Pixels `(1, 3, height, width)` in 0-1 as those of an image, `(height, width, 3)` of 0-255 on the CPU."""
    return (pixels[0].permute(1, 2, 0) * 255).round().byte().cpu().contiguous()
