"""`erasure studio`: a page in the browser to erase, compare and remove with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from erasure.cli.arguments import UsageError, parse
from erasure.cli.models import DeviceOptions, open_model
from erasure.cli.terminal import Terminal
from erasure.serving.limits import Limits

DRAWING_MODELS = ("canvas-sd", "canvas-sdxl", "canvas-sd3", "canvas-flux")
"""Embedded models that are offered beside those of the user."""


@dataclass(kw_only=True)
class StudioOptions(DeviceOptions):
    """Open a page in the browser to make erasures, compare pictures on the same noise, and remove objects.

    Needs the extra 'studio' of this package.
    """

    model: tuple[str, ...] = ()
    """Models to offer beside the embedded ones: folders, or repositories of the Hugging Face Hub. The first is
    chosen at the beginning."""
    host: str = "127.0.0.1"
    """Address to listen on; the default can be reached from this machine only. There is no password: whoever reaches
    the page can use it."""
    port: int = 7860
    """Port to listen on; 0 for any free port."""
    max_side: int = Limits.max_side
    """Largest side of a picture in pixels."""
    max_steps: int = Limits.max_steps
    """Largest number of denoising steps."""
    max_prompt: int = Limits.max_prompt
    """Largest number of characters of a text."""
    max_queue: int = Limits.max_queue
    """Largest number of waiting jobs; further ones are refused with a request to try again later."""


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
