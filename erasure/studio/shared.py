"""A model that all sessions of the studio share, and the erasures that are put in force on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import DiffusionPipeline

from erasure.artifact import Erasure
from erasure.attach import ErasureManager
from erasure.errors import AttachError, VerificationError
from erasure.files import shown
from erasure.pipelines import drop_in
from erasure.world import World


@dataclass(frozen=True)
class Stacked:
    """An erasure of a session, with the name that it is attached under."""

    name: str
    erasure: Erasure
    strength: float = 1.0
    """Factor on its edits: 0 leaves it out, 1 is as made."""


class SharedModel:
    """A pipeline that all sessions share. Only the one that holds the studio's lock may touch it.

    Args:
        name: Embedded model, folder or repository.
        pipe: Its pipeline, of a drop-in class.
    """

    def __init__(self, name: str, pipe: DiffusionPipeline) -> None:
        self.name, self.pipe, self.manager = name, pipe, ErasureManager(pipe)
        self.world = World.of(pipe)
        if fused := self.manager.fused_erasures:
            raise AttachError(f"{shown(name)}: {fused[0]!r} is fused and cannot be taken off: unfuse_erasure() first")
        strengths = self.manager.strengths
        self.brought = tuple(Stacked(name, made, strengths[name]) for name, made in self.manager.erasures.items())
        """Erasures that the folder of the model came with."""
        self._remover: DiffusionPipeline | None = None

    @property
    def remover(self) -> DiffusionPipeline:
        """The pipeline that removes objects, on the same networks and with the same erasures.

        Raises:
            UnsupportedModelError: There is none for this family.
        """
        if self._remover is None:
            self._remover = drop_in(self.pipe, "object-removal").from_pipe(self.pipe)
            self._remover.set_progress_bar_config(disable=True)
        return self._remover

    def put_in_force(self, stack: Sequence[Stacked]) -> tuple[str, ...]:
        """Attach exactly these erasures, and prove that they are in force. Whatever fails leaves none attached.

        Returns:
            The names of those in force: all but those with strength 0.

        Raises:
            ErasureError: They do not go together, or are not in force; nothing may be drawn then.
        """
        wanted = {each.name: each for each in stack if each.strength > 0}
        manager = self.manager
        try:
            attached = manager.erasures
            if other := [
                name for name, made in attached.items() if name not in wanted or made is not wanted[name].erasure
            ]:
                manager.delete(other)
            for name, each in wanted.items():
                if name not in manager.erasures:
                    manager.add(each.erasure, name, each.strength)
            if wanted:
                manager.set_erasures(list(wanted), [each.strength for each in wanted.values()])
                manager.verify(least_strength=0.0)
            strengths = {name: each.strength for name, each in wanted.items()}
            if manager.strengths != strengths or set(manager.active_erasures()) != set(wanted):
                raise VerificationError(
                    f"in force are {', '.join(manager.active_erasures()) or 'none'}, and not "
                    f"{', '.join(wanted) or 'none'}: nothing was drawn; try again"
                )
        except BaseException:
            manager.unload()
            raise
        return tuple(wanted)
