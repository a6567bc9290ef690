"""The trained tensors: vectors of new tokens, and weights of the denoiser if these are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from erasure.backbones import TextTower
from erasure.interop import learned, paths
from erasure.training.student import Student
from erasure.training.turns import Output, Player


class LearnedTensors(Player):
    """Vectors of new tokens in every text encoder, and weights of the denoiser.

    A vector is `start + rate * offset` with a trained offset, so that vectors learn `rate` times as fast as weights
    under one optimiser: Adam's steps do not depend on the scale of a gradient.

    Args:
        towers: The text encoders, whose tokenisers know the tokens.
        names: Names of the tokens.
        rate: Learning rate of vectors, as a multiple of that of weights.
        weights: Trained weights of the denoiser, if any.
        kept: Paths of the denoiser's layers whose output at the start token gets no gradient.
    """

    def __init__(
        self, towers: Sequence[TextTower], names: Sequence[str], rate: float, weights: Student | None = None,
        kept: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.names, self.rate, self.weights, self.kept = list(names), rate, weights, list(kept)
        self.offsets, self.places, self.starts = nn.ParameterDict(), dict[str, list[slice]](), dict[str, Tensor]()
        self.tables, self.ids = dict[str, nn.Embedding](), dict[str, Tensor]()
        for tower in towers:
            known, at = learned.ids_by_word(tower.tokenizer), 0
            words = [learned.words_of(tower.tokenizer, name) for name in self.names]
            table = paths.token_table(tower.root)
            ids = torch.tensor([known[word] for each in words for word in each], device=table.weight.device)
            start = table.weight.detach()[ids].float()
            self.places[tower.component] = [slice(at, at := at + len(each)) for each in words]
            self.starts[tower.component], self.ids[tower.component] = start, ids
            self.offsets[tower.component] = nn.Parameter(torch.zeros_like(start))
            # This bypasses `nn.Module.__setattr__` by a plain dict: as a child module the whole table would be
            # trained.
            self.tables[tower.component] = table

    def forward(self, run: Callable[[], Output]) -> Output:
        """Call `run` with the vectors in the text encoders and the weights in the denoiser."""
        with self.active():
            return run()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Put the vectors and weights in force inside of the block."""
        with ExitStack() as stack:
            for component, table in self.tables.items():
                hook = partial(_read, self.ids[component], self.rows(component))
                stack.callback(table.register_forward_hook(hook).remove)
            if self.weights is not None:
                stack.enter_context(self.weights.active())
                for path in self.kept:
                    layer = paths.layer(self.weights.network, path)
                    stack.callback(layer.register_forward_hook(_without_start).remove)
            yield

    def rows(self, component: str) -> Tensor:
        """Give the vectors of all tokens in one text encoder, `(vectors, dim)` float32."""
        return self.starts[component] + self.rate * self.offsets[component]

    @torch.no_grad()
    def vectors(self) -> Mapping[str, dict[str, Tensor]]:
        """Give the vectors by component and token, `(count, dim)` float32 on the CPU."""
        return {
            component: {
                name: self.rows(component)[place].cpu().clone() for name, place in zip(self.names, places, strict=True)
            }
            for component, places in self.places.items()
        }


def _read(own: Tensor, rows: Tensor, _table: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Replace rows of the token table by vectors; the product form gives every vector a gradient, used or not."""
    match = args[0][..., None] == own
    given = match.to(rows.dtype) @ rows
    return torch.where(match.any(-1, keepdim=True), given.to(output.dtype), output)


def _without_start(_layer: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Give a layer's output without a gradient at the start token, which is in every prompt."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], 1)
