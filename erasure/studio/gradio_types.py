"""Types of gradio's objects, as far as the studio uses them; gradio itself is an optional dependency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypedDict

from PIL import Image


class PageRequest(Protocol):
    """A request of gradio, as far as the page uses it."""

    session_hash: str | None


class Bar(Protocol):
    """A progress bar of gradio."""

    def __call__(self, share: float, /, *, desc: str) -> object:
        """Show the share that is done, 0-1, and what is being done."""


class Listener(Protocol):
    """An event of a component of gradio, to which a function can be attached."""

    def __call__(
        self, function: Callable[..., object], inputs: Sequence[object] | None, outputs: Sequence[object] | None, /, *,
        api_name: str | Literal[False],
    ) -> Dependency:  # fmt: skip
        """Call a function at the event, with the values of some components, and show its results in others."""


class Dependency(Protocol):
    """An attached function of gradio."""

    success: Listener


class Slider(Protocol):
    """A slider of gradio."""

    release: Listener


class Button(Protocol):
    """A button of gradio."""

    click: Listener


class Dropdown(Protocol):
    """A list of gradio to choose from."""

    input: Listener


class Painting(TypedDict, total=False):
    """What gradio's image editor gives: the picture, and what was painted over it."""

    background: Image.Image | None
    layers: list[Image.Image] | None


class Draw(Protocol):
    """The function that draws before and after."""

    def __call__(self, text: str, number: int, count: int | None, request: PageRequest, bar: Bar) -> object:
        """Draw, and return what the page shows."""
