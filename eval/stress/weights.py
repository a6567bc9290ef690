"""Changes of weights: other values in the place of parameters while a condition is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.errors import EvaluationError
from erasure.eval.attempts import Change
from erasure.eval.stress.bench import Edited
from erasure.interop import paths, scopes
from erasure.interop.pipelines import components_of
from erasure.training.states import stable_seed

Values = Callable[[str, str, Tensor], Tensor]
"""Gives the value of a parameter from its component, its canonical path and what it is."""


def with_values(chosen: Edited, values: Values) -> Change:
    """Make a change that replaces some parameters' values, and restores them bit for bit.

    Args:
        chosen: Which.
        values: What takes their place.
    """

    @contextmanager
    def change(pipe: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
        parts = components_of(pipe)
        with ExitStack() as stack:
            for component, some in chosen.items():
                network = parts[component]
                with torch.no_grad():
                    made = {path: values(component, path, plain(network, path)) for path in some}
                stack.enter_context(scopes.swapped(network, made))
            yield pipe

    return change


def plain(network: torch.nn.Module, path: str) -> Tensor:
    """Find a parameter, and refuse one that is quantised.

    Raises:
        EvaluationError: It is quantised or offloaded.
    """
    found = paths.parameter(network, path)
    if not paths.is_plain(found):
        raise EvaluationError(
            f"{path} of {type(network).__name__} is quantised or offloaded ({type(found).__name__}, {found.dtype}, "
            f"{found.device}): test the model in plain precision, on one device"
        )
    return found


def noise_like(value: Tensor, level: float, *seed: object) -> Tensor:
    """Draw Gaussian noise of `level` times the standard deviation of a parameter's values, on the CPU in float32.

    Args:
        value: The parameter.
        level: Standard deviation of the noise over that of the values; over their mean size where they are all alike.
        *seed: What the noise is drawn from.
    """
    generator = torch.Generator().manual_seed(stable_seed(*seed))
    drawn = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.device)
    own = value.float()
    size = own.std() if own.numel() > 1 else own.abs().mean()
    return level * torch.where(size > 0, size, own.abs().mean()) * drawn


def mean_of(weights: Mapping[str, Mapping[str, Tensor]], share: float) -> Values:
    """Average a model's own values with others.

    Args:
        weights: The others, by component and path.
        share: Their share, 0-1.
    """

    def values(component: str, path: str, own: Tensor) -> Tensor:
        return torch.lerp(own.float(), weights[component][path].float(), share)

    return values
