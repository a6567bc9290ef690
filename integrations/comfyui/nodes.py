"""The nodes, as ComfyUI's documented interface has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from erasure import Erasure
from erasure.errors import ErasureError

from . import patches, places
from .loaded import Clip, Patcher
from .removal import Remover, removed

if TYPE_CHECKING:
    from torch import Tensor

Inputs = dict[str, dict[str, tuple[object, ...]]]
"""By `required` and `optional`: inputs by name, each a type and its settings."""
CATEGORY = "erasure"
STRENGTH: tuple[object, ...] = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 10.0, "step": 0.05})

places.register()


class LoadErasure:
    """Reads an erasure from a folder or the Hub."""

    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("ERASURE", "STRING")
    RETURN_NAMES = ("erasure", "summary")
    DESCRIPTION = "Reads an erasure: a folder below models/erasures, the path of a folder, or owner/name of the Hub."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Give the inputs."""
        named = {
            "default": "",
            "tooltip": "Folder below models/erasures, path, or owner/name of the Hugging Face Hub.",
        }
        pinned = {"default": "", "tooltip": "Commit, tag or branch of the Hub. A commit never changes."}
        return {"required": {"source": ("STRING", named)}, "optional": {"revision": ("STRING", pinned)}}

    @classmethod
    def VALIDATE_INPUTS(cls, source: str | None = None) -> Literal[True] | str:
        """Say what is wrong before anything runs; texts that come from another node are not known yet."""
        try:
            if source is not None:
                places.erasure_at(source)
        except ErasureError as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, source: str, revision: str = "") -> str:
        """Give a text that changes with the erasure's files."""
        return places.stamp(source, revision)

    def load(self, source: str, revision: str = "") -> tuple[Erasure, str]:
        """Read it."""
        made = places.load_erasure(source, revision)
        words = ", ".join(concept.target for concept in made.concepts)
        parts = ", ".join(made.components)
        base = made.config.base.get("model") or "a model without a name"
        return made, f"{made.name}: erases {words} by {made.config.strategy} from {base}; changes {parts}"


class ApplyErasure:
    """Applies an erasure to a MODEL and a CLIP."""

    CATEGORY = CATEGORY
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "report")
    DESCRIPTION = (
        "Patches MODEL and CLIP so that they cannot draw what the erasure erases. Refuses another base model."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Give the inputs."""
        check = {"default": True, "tooltip": "Compare the weights with the fingerprints of the model it was made for."}
        return {
            "required": {"model": ("MODEL",), "erasure": ("ERASURE",), "strength": STRENGTH},
            "optional": {"clip": ("CLIP",), "check_base": ("BOOLEAN", check)},
        }

    def apply(
        self, model: Patcher, erasure: Erasure, strength: float, clip: Clip | None = None, check_base: bool = True
    ) -> tuple[Patcher, Clip | None, str]:
        """Patch copies."""
        return patches.applied(erasure, model, clip, strength, check_base)


class VerifyErasure:
    """Makes sure that an erasure is in force."""

    CATEGORY = CATEGORY
    FUNCTION = "verify"
    RETURN_TYPES = ("MODEL", "CLIP", "STRING")
    RETURN_NAMES = ("model", "clip", "report")
    DESCRIPTION = (
        "Stops the workflow unless the erasure is in force. Put it last, ahead of the sampler and the prompts."
    )

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Give the inputs."""
        return {
            "required": {"model": ("MODEL",), "erasure": ("ERASURE",), "strength": STRENGTH},
            "optional": {"clip": ("CLIP",)},
        }

    def verify(
        self, model: Patcher, erasure: Erasure, strength: float, clip: Clip | None = None
    ) -> tuple[Patcher, Clip | None, str]:
        """Pass on what came, or raise."""
        return model, clip, patches.verified(erasure, model, clip, strength)


class RemoveObject:
    """Takes out of pictures what a mask covers or what words name."""

    CATEGORY = CATEGORY
    FUNCTION = "remove"
    RETURN_TYPES = ("IMAGE", "MASK")
    RETURN_NAMES = ("image", "removed")
    DESCRIPTION = "Takes out of a picture what a mask covers, or what words name, and fills its place with background."

    def __init__(self) -> None:
        self.remover = Remover()

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Give the inputs."""
        source = "Folder below models/diffusers, file below models/checkpoints, path, or owner/name of the Hub."
        seeds = {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}
        return {
            "required": {
                "image": ("IMAGE",),
                "model": ("STRING", {"default": "", "tooltip": source}),
                "seed": ("INT", seeds),
                "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0 is the model's own number."}),
            },
            "optional": {
                "mask": ("MASK",),
                "words": ("STRING", {"default": "", "tooltip": "Without a mask: what goes, with commas between."}),
                "others": ("STRING", {"default": "", "tooltip": "With words: what else is there and stays."}),
                "prompt": ("STRING", {"default": "", "tooltip": "What should be in its place; else background."}),
            },
        }

    def remove(
        self, image: Tensor, model: str, seed: int, steps: int, mask: Tensor | None = None, words: str = "",
        others: str = "", prompt: str = "",
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Remove it."""
        return removed(self.remover, places.model_at(model), image, mask, words, others, prompt, seed, steps)


NODE_CLASS_MAPPINGS: dict[str, type] = {
    "ErasureLoad": LoadErasure,
    "ErasureApply": ApplyErasure,
    "ErasureVerify": VerifyErasure,
    "ErasureRemoveObject": RemoveObject,
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    "ErasureLoad": "Load Erasure",
    "ErasureApply": "Apply Erasure",
    "ErasureVerify": "Verify Erasure",
    "ErasureRemoveObject": "Remove Object",
}
