"""Students: trainable variants of a frozen network, which need no second copy of it.

The network itself stays the stock model and is the teacher; it is the student only inside of `Student.active()`. A
teacher's call between the student's forward and backward pass changes no gradient, `requires_grad` is never changed,
and gradient checkpointing runs its second forward pass as the student again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from erasure.carriers.edits import Edits, LowRank
from erasure.carriers.membranes import features_of
from erasure.errors import NoMatchingModuleError
from erasure.interop import paths, scopes
from erasure.training.turns import Output, Player


class Student(Player, ABC):
    """Trainable float32 tensors that change a network inside of `active()`.

    Args:
        network: The pipeline component. It is frozen, used in place, and is not registered as a child module.
    """

    network: nn.Module
    paths: list[str]
    """Paths of the trained layers or parameters."""
    columns: Mapping[str, slice] = {}
    """Trained weight columns by path of the layer, for layers in which not all are trained."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # This bypasses `nn.Module.__setattr__`: the weights of a child module would be trained, saved and sent to
        # processes.
        object.__setattr__(self, "network", network)
        self._depth = 0

    def forward(self, run: Callable[[], Output]) -> Output:
        """Call `run` with the network switched to the student."""
        with self.active():
            return run()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Switch the network to the student inside of the block; may be nested."""
        self._depth += 1
        try:
            if self._depth > 1:
                yield
            else:
                with self._put_in():
                    yield
        finally:
            self._depth -= 1

    @abstractmethod
    @contextmanager
    def _put_in(self) -> Iterator[None]:
        """Switch the network to the student inside of the block."""

    @abstractmethod
    def low_rank(self) -> dict[str, LowRank]:
        """Give low-rank changes in float16 on the CPU, by module path, without layers that were pruned to zero."""

    @abstractmethod
    def deltas(self) -> dict[str, Tensor]:
        """Give dense changes in float16 on the CPU, by canonical parameter path."""

    def edits(self, component: str) -> Edits:
        """Give the changes as edits of a pipeline's component."""
        low_rank = {f"{component}/{path}": pair for path, pair in self.low_rank().items()}
        return Edits(low_rank, {f"{component}/{path}": delta for path, delta in self.deltas().items()})

    @property
    def is_active(self) -> bool:
        """Whether the network is switched to the student now."""
        return self._depth > 0


@contextmanager
def checkpointed(denoiser: nn.Module, students: Sequence[Student]) -> Iterator[None]:
    """Use gradient checkpointing inside of the block, with blocks that run again as the student that they were.

    The stock implementation would run blocks again after `active()` has been left, with the teacher's weights.

    Args:
        denoiser: Denoiser whose blocks are checkpointed.
        students: Every student that the network can be switched to.
    """

    def run(block: Callable[..., object], *args: object) -> object:
        active = [student for student in students if student.is_active]
        return checkpoint(partial(_again, active, block), *args, use_reentrant=False)

    with scopes.gradient_checkpointing(denoiser, run):
        yield


def _again(students: Sequence[Student], block: Callable[..., object], *args: object) -> object:
    with ExitStack() as stack:
        for student in students:
            stack.enter_context(student.active())
        return block(*args)


class LowRankStudent(Student):
    """`W + up @ down` on linear layers: a LoRA of scale 1, starting at zero.

    The change is added to the layers' outputs, so that no dense matrix is formed.

    Args:
        network: The component.
        layers: Paths of linear layers, and of convolutions with a kernel of one pixel, which act as linear layers.
        rank: Rank of each change, at most the layer's smaller side.
        generator: Draws `down` as PEFT does (Kaiming uniform, a = sqrt 5).
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], rank: int, generator: torch.Generator) -> None:
        super().__init__(network)
        self.paths = list(layers)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for path in self.paths:
            layer, device = paths.layer(network, path), paths.parameter(network, f"{path}.weight").device
            size = features_of(layer)
            assert size is not None, f"{path} is no linear layer"
            inputs, outputs = size
            width = min(rank, outputs, inputs)
            bound = 1 / math.sqrt(inputs)
            down = (2 * torch.rand(width, inputs, generator=generator) - 1) * bound
            self.down.append(nn.Parameter(down.to(device)))
            self.up.append(nn.Parameter(torch.zeros(outputs, width, device=device)))

    @contextmanager
    def _put_in(self) -> Iterator[None]:
        handles = []
        try:
            for path, down, up in zip(self.paths, self.down, self.up, strict=True):
                layer = paths.layer(self.network, path)
                handles.append(layer.register_forward_hook(partial(_add, down, up)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def low_rank(self) -> dict[str, LowRank]:
        """See `Student.low_rank`."""
        return {
            path: LowRank(down.half().cpu(), up.half().cpu())
            for path, down, up in zip(self.paths, self.down, self.up, strict=True)
            if up.any() and down.any()
        }

    def deltas(self) -> dict[str, Tensor]:
        """Give no dense changes: all are low-rank."""
        return {}


def _add(down: Tensor, up: Tensor, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    x = args[0]
    if isinstance(layer, nn.Conv2d):
        pixels = F.conv2d(F.conv2d(x, down.to(x.dtype)[..., None, None]), up.to(x.dtype)[..., None, None])
        return output + pixels.to(output.dtype)
    return output + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)).to(output.dtype)


class SubsetStudent(Student):
    """A student that trains some parameters of the network in full.

    Args:
        network: The component.
        trained: Canonical paths of parameters.
    """

    def __init__(self, network: nn.Module, trained: Sequence[str]) -> None:
        super().__init__(network)
        self.paths = list(trained)
        stock = [paths.parameter(network, path).detach() for path in self.paths]
        self.values = nn.ParameterList(nn.Parameter(value.float().clone()) for value in stock)

    @contextmanager
    def _put_in(self) -> Iterator[None]:
        with scopes.swapped(self.network, dict(zip(self.paths, self.values, strict=True))):
            yield

    def low_rank(self) -> dict[str, LowRank]:
        """Give no low-rank changes: all are dense."""
        return {}

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """See `Student.deltas`."""
        return {
            path: (value - paths.parameter(self.network, path).float()).half().cpu()
            for path, value in zip(self.paths, self.values, strict=True)
        }


def train_columns(student: Student, columns: Mapping[str, slice]) -> None:
    """Train only given columns of some layers' weights; the other columns stay.

    Args:
        student: Student with the layers.
        columns: Trained columns by path of the layer; layers that are not trained are ignored.
    """
    if isinstance(student, LowRankStudent):
        trained = dict(zip(student.paths, student.down, strict=True))
    else:
        values = dict(student.named_parameters()).values()
        pairs = zip(student.paths, values, strict=True)
        trained = {path.removesuffix(".weight"): value for path, value in pairs if path.endswith(".weight")}
    student.columns = {path: kept for path, kept in columns.items() if path in trained and kept != slice(None)}
    for path, kept in student.columns.items():
        mask = torch.zeros_like(trained[path][:1])
        mask[:, kept] = 1
        if isinstance(student, LowRankStudent):
            with torch.no_grad():
                trained[path].mul_(mask)
        trained[path].register_hook(partial(torch.mul, mask))


def make_student(
    network: nn.Module, parameters: Sequence[str], rank: int, generator: torch.Generator, sought: str
) -> Student:
    """Make a student of a pipeline component.

    Args:
        network: The component.
        parameters: Canonical paths of the parameters to train.
        rank: Rank of a LoRA on the linear layers among them; 0 trains all of them in full.
        generator: See `LowRankStudent`.
        sought: Description of how the paths were chosen, for the message.

    Raises:
        NoMatchingModuleError: No parameter matches, or no linear layer for a LoRA.
    """
    if rank:
        owners = dict.fromkeys(path.rsplit(".", 1)[0] for path in parameters if path.endswith(".weight"))
        layers = [path for path in owners if isinstance(paths.layer(network, path), nn.Linear)]
        if layers:
            return LowRankStudent(network, layers, rank, generator)
    elif parameters:
        return SubsetStudent(network, parameters)
    kind = "linear layer" if rank else "parameter"
    raise NoMatchingModuleError(
        f"no {kind} of {type(network).__name__} matches {sought}: there would be nothing to train"
    )
