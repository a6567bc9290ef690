"""`erasure studio`: a page in the browser to erase, compare and remove with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erasure.cli.models import DeviceOptions, open_model
from erasure.cli.terminal import Terminal, UsageError, parse
from erasure.serving.limits import Limits

DRAWING_MODELS = ("canvas-sd", "canvas-sdxl", "canvas-sd3", "canvas-flux")
"""Embedded models that are offered beside those of the user."""


@dataclass(kw_only=True)
class StudioOptions(DeviceOptions):
    """Open a page for the browser: erase, compare on the same noise, remove objects. It needs the extra 'studio'."""

    model: tuple[str, ...] = ()
    """Models to offer beside the embedded ones: folders, or repositories of the Hugging Face Hub. The first is
    chosen at the beginning."""
    host: str = "127.0.0.1"
    """Address to listen on: this machine alone. There is no password: whoever reaches it may use it."""
    port: int = 7860
    """Port to listen on; 0 for one that is free."""
    max_side: int = Limits.max_side
    """Most pixels on a side of a picture."""
    max_steps: int = Limits.max_steps
    """Most denoising steps."""
    max_prompt: int = Limits.max_prompt
    """Most characters of a text."""
    max_queue: int = Limits.max_queue
    """Most jobs that wait; further ones are told to come again."""


def run(argv: Sequence[str], terminal: Terminal) -> None:
    """Carry out the command."""
    options = parse(StudioOptions, "studio", argv)
    limits = Limits(
        max_side=options.max_side, max_steps=options.max_steps, max_prompt=options.max_prompt,
        max_queue=options.max_queue,
    )  # fmt: skip
    if not 0 <= options.port <= 65535:
        raise UsageError(f"--port {options.port}: give a port from 0 to 65535")
    from erasure import assets
    from erasure.extras import require

    for module in ("fastapi", "uvicorn"):
        require(module)
    from erasure.serving.server import answer, listen

    bound = listen(options.host, options.port)
    try:
        from erasure.studio.page import application, gradio_module
        from erasure.studio.session import Studio

        gradio_module()

        embedded = [name for name in DRAWING_MODELS if name in assets.models()]
        studio = Studio([*options.model, *embedded], lambda model: open_model(options.of(model)), limits)
        # A model of the user's that cannot be loaded is told now, and not on the page.
        studio.session("start").choose(studio.models[0])
        studio.forget("start")
        with application(studio) as app:
            answer(app, bound, lambda address: terminal.say(f"The studio is at {address}; Ctrl-C ends it"), patience=2)
    finally:
        bound.close()
