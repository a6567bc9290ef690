"""What tests look at: an image that a pipeline draws, and the values of its tensors."""

from __future__ import annotations

import inspect
from typing import Any


def draw_image(
    pipe: Any, prompt: str | None = "a photo of a cat", *, steps: int = 2, seed: int = 7, **options: Any
) -> Any:
    """One image of a tiny pipeline as a float tensor `(32, 32, 3)`, from the noise of a seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    options = {"height": 32, "width": 32, "output_type": "np", **options}
    if "max_sequence_length" in inspect.signature(type(pipe).__call__).parameters:
        options.setdefault("max_sequence_length", 32)
    made = pipe(prompt, num_inference_steps=steps, generator=generator, **options).images[0]
    return torch.from_numpy(made)


def tensors_of_pipe(pipe: Any) -> dict[str, Any]:
    """A copy of every tensor of a pipeline, by component and name."""
    import torch

    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    # Paths as erasures have them, whichever way a text encoder's class nests its model.
    return {
        f"{name}/{key.removeprefix('text_model.')}": value.clone()
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }


def changed(before: dict[str, Any], pipe: Any) -> set[str]:
    """Names of the tensors of a pipeline that differ from a copy in a bit, or are in one of the two only."""
    import torch

    after = tensors_of_pipe(pipe)
    lost = set(before) ^ set(after)
    return lost | {key for key in set(before) & set(after) if not torch.equal(before[key], after[key])}
