"""`erasure studio`: a page in the browser to erase, compare and remove with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from erasure.cli.described import parse_with
from erasure.cli.models import ModelOptions, open_model
from erasure.cli.terminal import Terminal, UsageError
from erasure.serving.limits import Limits

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DRAWING_MODELS = ("canvas-sd", "canvas-sdxl", "canvas-sd3", "canvas-flux")
"""Embedded models that are offered beside those of the user."""
ABOUT = (
    "Open a page for the browser: erase concepts, compare before with after on the same noise, change strengths, "
    "remove objects with a brush or by name, download erasures. It needs the extra 'studio' of this package."
)


@dataclass(kw_only=True)
class StudioOptions:
    """Which models, and where the page is."""

    model: tuple[str, ...] = ()
    """Models to offer beside the embedded ones: folders, or repositories of the Hugging Face Hub. The first is
    chosen at the beginning."""
    device: str | None = None
    """Where to run: cpu, cuda, cuda:1, mps. The fastest that is there when left out."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Precision of the weights; the one that suits the device when left out."""
    host: str = "127.0.0.1"
    """Address to listen on: this machine alone. There is no password: whoever reaches it may use it."""
    port: int = 7860
    """Port to listen on; 0 for one that is free."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    parsed = parse_with(StudioOptions, Limits(), "studio", argv, ABOUT)
    options: StudioOptions = parsed.command
    limits: Limits = parsed.options
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: give a port from 0 to 65535")
    from erasure import assets
    from erasure.extras import require

    for module in ("fastapi", "uvicorn"):
        require(module)
    from erasure.serving.server import answer, listen

    bound = listen(options.host, options.port)
    try:
        from erasure.studio.page import application
        from erasure.studio.session import Studio

        def opened(model: str) -> DiffusionPipeline:
            return open_model(ModelOptions(model=model, device=options.device, dtype=options.dtype))

        embedded = [name for name in DRAWING_MODELS if name in assets.models()]
        studio = Studio([*options.model, *embedded], opened, limits)
        # A model of the user's that cannot be loaded is told now, and not on the page.
        studio.session("start").choose(studio.models[0])
        studio.forget("start")
        with application(studio) as app:
            answer(app, bound, lambda address: terminal.say(f"The studio is at {address}; Ctrl-C ends it"), patience=2)
    finally:
        bound.close()
