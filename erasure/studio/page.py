"""The page of the studio: what people see, and which part of a session each button asks."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from PIL import Image

from erasure.artifact import Erasure
from erasure.errors import AttachError, ErasureError, ImageError
from erasure.extras import require
from erasure.shown import message
from erasure.strategies import STRATEGIES
from erasure.studio.facts import facts_of_erasure, facts_of_method, presets_of
from erasure.studio.files import zipped
from erasure.studio.gradio_types import Bar, Button, Draw, Dropdown, PageRequest, Painting, Slider
from erasure.studio.jobs import Progress
from erasure.studio.session import MOST_ERASURES, Session, Studio

Function = TypeVar("Function", bound=Callable[..., object])

STRONGEST = 2.0
"""End of the sliders; a strength of 1 is as the erasure was made."""
KEPT = 3600
"""Seconds that pictures of a page lie in the temporary folder."""
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; base-uri 'self'; "
    "form-action 'self'"
)
"""What a browser may load: nothing from another server."""
STYLE = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: 0 auto !important}
footer {display: none !important}
.picture img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
.facts table {width: 100%; border-collapse: collapse; font-size: 0.9rem}
.facts th {text-align: left; font-weight: 600; padding: 0.2rem 0.8rem 0.2rem 0; vertical-align: top}
.facts td {padding: 0.2rem 0; overflow-wrap: anywhere}
.facts th, .facts td, .facts tr, .facts table {border: 0 !important}
"""
MOST_UPLOAD = 32
"""Megabytes of a picture that is uploaded. Of larger ones, and of files that are no picture, gradio's editor shows
nothing, so the page says ahead what it takes."""
FONTS = ["system-ui", "sans-serif"]
MONOSPACED = ["ui-monospace", "monospace"]
METHODS_FIRST = "uce"


def table(rows: list[tuple[str, str]]) -> str:
    """Names and values as HTML."""
    lines = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{lines}</table>"


def gradio_module() -> ModuleType:
    """Import gradio with its statistics off.

    Raises:
        MissingExtraError: It is not installed.
    """
    # Read when it is imported: it would ask its makers' server for news otherwise.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return require("gradio")


@contextmanager
def application(studio: Studio) -> Iterator[FastAPI]:
    """The page as an ASGI application; when the block ends, jobs are cancelled and its files are gone.

    Raises:
        MissingExtraError: gradio is not installed.
    """
    gradio = gradio_module()
    with tempfile.TemporaryDirectory(prefix="erasure-studio-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            app = FastAPI(title="erasure studio", docs_url=None, redoc_url=None, openapi_url=None)

            @app.middleware("http")
            async def policy(request: Request, then: Callable[[Request], Awaitable[Response]]) -> Response:
                answer = await then(request)
                answer.headers["Content-Security-Policy"] = POLICY
                answer.headers["Referrer-Policy"] = "no-referrer"
                return answer

            theme = gradio.themes.Base(font=FONTS, font_mono=MONOSPACED)
            gradio.mount_gradio_app(
                app, Page(gradio, studio, Path(folder)).blocks(), path="/", theme=theme, css=STYLE, ssr_mode=False,
                footer_links=[], show_error=False, pwa=False, mcp_server=False, enable_monitoring=False,
                max_file_size=f"{MOST_UPLOAD}mb",
            )  # fmt: skip
            yield app
        finally:
            studio.stop()
            if before is None:
                os.environ.pop("GRADIO_TEMP_DIR", None)
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


class Page:
    """Parts of the page, and what happens when they are used.

    Args:
        gradio: The module.
        studio: Whose sessions the pages are.
        folder: Where files to download lie.
    """

    def __init__(self, gradio: ModuleType, studio: Studio, folder: Path) -> None:
        self.gradio, self.studio, self.folder = gradio, studio, folder

    # What is asked ------------------------------------------------------------------------------------------------

    def session(self, request: PageRequest) -> Session:
        """The session of the page that asks."""
        return self.studio.session(str(request.session_hash))

    @contextmanager
    def showing_errors(self) -> Iterator[None]:
        """Show errors of the library as messages, and everything else by its kind alone."""
        try:
            yield
        except ErasureError as error:
            raise self.gradio.Error(html.escape(message(error)), duration=20, print_exception=False) from error
        except Exception as error:
            said = f"this failed unexpectedly ({type(error).__name__}: {message(error, 300)})"
            raise self.gradio.Error(html.escape(said), duration=20) from error

    def asks(self, function: Function) -> Function:
        """Let gradio hand a function the request, which it tells by the annotation."""
        function.__annotations__ = {"request": self.gradio.Request}
        return function

    def note(self, notes: tuple[str, ...]) -> None:
        """Show warnings."""
        for each in notes:
            self.gradio.Warning(html.escape(each), duration=15)

    def rows(self, session: Session) -> list[object]:
        """What the rows of the erasures show: group, slider and facts of each, and the file to download."""
        found: list[object] = []
        for place in range(MOST_ERASURES):
            if place < len(session.stack):
                each = session.stack[place]
                label = f"{each.name}: strength"
                found += [
                    self.gradio.update(visible=True),
                    self.gradio.update(label=label, value=each.strength),
                    table(facts_of_erasure(each)),
                    self.gradio.update(value=str(self._file(each.name, each.erasure))),
                ]
            else:
                found += [self.gradio.update(visible=False), self.gradio.update(), "", self.gradio.update(value=None)]
        none = "" if session.stack else "No erasure yet: both pictures are the model's own."
        return [*found, none]

    def _file(self, name: str, made: Erasure) -> Path:
        """The ZIP file of an erasure, written once."""
        file = self.folder / name / f"{made.name}.zip"
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(zipped(made))
        return file

    def progress(self, bar: Bar) -> Progress:
        """What tells a bar of gradio how far a job is."""
        return lambda share, what: bar(share, desc=what)

    # The page -----------------------------------------------------------------------------------------------------

    def blocks(self) -> object:
        """The whole page."""
        gradio = self.gradio
        with gradio.Blocks(title="erasure studio", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
            with gradio.Row(equal_height=True):
                gradio.Markdown("# erasure studio")
                cancel = gradio.Button("Cancel", scale=0, min_width=120)
            model = gradio.Dropdown(list(self.studio.models), value=self.studio.models[0], label="Model")
            with gradio.Tab("Erase and compare"):
                rows, after = self._erasing(model)
            with gradio.Tab("Remove objects"):
                self._removing(after)

            @self.asks
            def do_load(request: PageRequest) -> list[object]:
                session = self.session(request)
                return [session.model, *self.rows(session)]

            @self.asks
            def do_close(request: PageRequest) -> None:
                self.studio.forget(str(request.session_hash))

            @self.asks
            def do_cancel(request: PageRequest) -> None:
                gradio.Info("Cancelling" if self.session(request).cancel() else "Nothing is running")

            page.load(do_load, None, [model, *rows], api_name="load")
            page.unload(do_close)
            cancel.click(do_cancel, None, None, queue=False, api_name="cancel")
        page.queue(default_concurrency_limit=None, max_size=self.studio.limits.max_queue)
        return page

    def _erasing(self, model: Dropdown) -> tuple[list[object], object]:
        """The tab to erase and to compare; gives what shows the erasures, and the picture that was drawn last."""
        gradio, first = self.gradio, METHODS_FIRST
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                concepts = gradio.Textbox(label="Concepts to erase", placeholder="cat; ink:style", max_lines=3)
                with gradio.Row():
                    method = gradio.Dropdown(list(STRATEGIES.names()), value=first, label="Method", min_width=140)
                    preset = gradio.Dropdown(self._presets(first), value="", label="Preset", min_width=140)
                erase = gradio.Button("Erase", variant="primary")
                facts = gradio.HTML(table(facts_of_method(first)), elem_classes="facts")
            with gradio.Column(scale=3, min_width=300):
                prompt = gradio.Textbox(label="Prompt", placeholder="a photo of a cat", max_lines=3)
                with gradio.Row():
                    seed = gradio.Number(0, label="Seed", precision=0, minimum=0, min_width=90)
                    steps = gradio.Number(None, label="Steps (empty: the model's)", precision=0, min_width=90)
                draw = gradio.Button("Draw before and after", variant="primary")
                with gradio.Row():
                    before = self._picture("Before")
                    after = self._picture("After")
                said = gradio.Markdown()
        gradio.Markdown("## Erasures on the model")
        none = gradio.Markdown()
        rows: list[object] = []
        controls = []
        for place in range(MOST_ERASURES):
            with gradio.Group(visible=False) as group:
                slider = gradio.Slider(
                    0, STRONGEST, value=1, step=0.05, label="strength", elem_id=f"strength-{place + 1}"
                )
                with gradio.Row():
                    off = gradio.Button("Take off", size="sm", min_width=120)
                    file = gradio.DownloadButton("Download", size="sm", min_width=120)
                with gradio.Accordion("What it is and what was measured", open=False):
                    text = gradio.HTML(elem_classes="facts")
            rows += [group, slider, text, file]
            controls.append((slider, off))
        rows.append(none)
        drawing, bar = ([prompt, seed, steps], [before, after, said]), gradio.Progress()

        @self.asks
        def do_erase(words: str, name: str, chosen: str, request: PageRequest, bar: Bar = bar) -> list[object]:
            session = self.session(request)
            with self.showing_errors():
                made, notes = session.erase(words or "", name, preset=chosen, progress=self.progress(bar))
                self.note(notes)
                gradio.Info(html.escape(f"Made {made.erasure.name}"))
                return self.rows(session)

        @self.asks
        def do_draw(text: str, number: int, count: int | None, request: PageRequest, bar: Bar = bar) -> object:
            with self.showing_errors():
                made = self.session(request).compare(
                    text or "", seed=number, steps=count, progress=self.progress(bar)
                )  # fmt: skip
                self.note(made.notes)
                names = ", ".join(map(html.escape, made.names))
                what = f"Erasures in force: {names}" if names else "No erasure is in force: the pictures are the same."
                return made.before, made.after, what

        @self.asks
        def do_choose(name: str, request: PageRequest, bar: Bar = bar) -> list[object]:
            session = self.session(request)
            try:
                with self.showing_errors():
                    session.choose(name, self.progress(bar))
            except gradio.Error as error:
                gradio.Warning(error.message, duration=20)
            return [session.model, *self.rows(session), None, None, ""]

        def do_tell(name: str) -> tuple[str, object]:
            with self.showing_errors():
                return table(facts_of_method(name)), gradio.update(choices=self._presets(name), value="")

        erase.click(do_erase, [concepts, method, preset], rows, api_name="erase")
        concepts.submit(do_erase, [concepts, method, preset], rows, api_name=False)
        draw.click(do_draw, *drawing, api_name="compare")
        prompt.submit(do_draw, *drawing, api_name=False)
        model.input(do_choose, [model], [model, *rows, before, after, said], api_name="choose")
        method.change(do_tell, [method], [facts, preset], api_name=False)
        for place, (slider, off) in enumerate(controls):
            self._row(place, slider, off, rows, do_draw, drawing)
        return rows, after

    def _row(
        self, place: int, slider: Slider, off: Button, rows: list[object], draw: Draw,
        drawing: tuple[list[object], list[object]],
    ) -> None:  # fmt: skip
        """What the slider and the button of one erasure do."""

        def name_at(session: Session) -> str:
            if place >= len(session.stack):
                raise AttachError("this erasure is not there any more: load the page again")
            return session.stack[place].name

        @self.asks
        def do_scale(strength: float, request: PageRequest) -> None:
            session = self.session(request)
            with self.showing_errors():
                session.set_strength(name_at(session), strength)

        @self.asks
        def do_take_off(request: PageRequest) -> list[object]:
            session = self.session(request)
            with self.showing_errors():
                session.take_off(name_at(session))
                return self.rows(session)

        # Drawn again only where something was drawn: an empty prompt would be an error that nobody asked for.
        scaled = slider.release(do_scale, [slider], None, api_name=f"strength_{place + 1}")
        scaled.success(self._redraw(draw), *drawing, api_name=False)
        off.click(do_take_off, None, rows, api_name=f"take_off_{place + 1}").success(
            self._redraw(draw), *drawing, api_name=False
        )

    def _redraw(self, draw: Draw) -> Callable[..., object]:
        bar = self.gradio.Progress()

        @self.asks
        def again(text: str, number: int, count: int | None, request: PageRequest, bar: Bar = bar) -> object:
            if not (text or "").strip():
                return [self.gradio.skip()] * 3
            return draw(text, number, count, request, bar)

        return again

    def _picture(self, label: str) -> object:
        return self.gradio.Image(
            label=label, type="pil", format="png", interactive=False, buttons=["download"], height=300, min_width=150,
            elem_classes="picture",
        )  # fmt: skip

    def _presets(self, name: str) -> list[tuple[str, str]]:
        return [("the method's own", ""), *((each, each) for each in presets_of(name))]

    def _removing(self, drawn: object) -> None:
        """The tab to remove objects."""
        gradio = self.gradio
        with gradio.Row():
            with gradio.Column(min_width=300):
                editor = gradio.ImageEditor(
                    label="Paint over what is to go", type="pil", format="png", image_mode="RGBA",
                    sources=["upload", "clipboard"], transforms=(), layers=False, height=440,
                    brush=gradio.Brush(colors=["#ff2020"], color_mode="fixed"), elem_id="brush",
                )  # fmt: skip
                gradio.Markdown(
                    f"A PNG, JPEG or WebP picture of at most {MOST_UPLOAD} MB. Where the editor stays empty, the file "
                    "is larger, or no picture."
                )
                take = gradio.Button("Take the picture after erasing", size="sm")
                words = gradio.Textbox(label="Or name it, without painting", placeholder="cat", max_lines=2)
                others = gradio.Textbox(label="What else is there and stays (surer)", placeholder="dog", max_lines=2)
                with gradio.Row():
                    shadow = gradio.Checkbox(label="Its shadow too", min_width=120)
                    crop = gradio.Checkbox(label="Large picture: work on a crop", min_width=120)
                seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
                remove = gradio.Button("Remove", variant="primary")
            with gradio.Column(min_width=300):
                result = self._picture("Without it")
                found = self._picture("What was removed")
                said = gradio.Markdown()

        bar = gradio.Progress()

        def do_take(picture: Image.Image | None) -> dict[str, object]:
            with self.showing_errors():
                if picture is None:
                    raise ImageError("no picture was drawn yet: draw one under Erase and compare, or upload one")
                return {"background": picture, "layers": [], "composite": picture}

        @self.asks
        def do_remove(painting: Painting | None, named: str, rest: str, dark: bool, part: bool, number: int,
                      request: PageRequest, bar: Bar = bar) -> object:  # fmt: skip
            painting = painting or Painting()
            with self.showing_errors():
                made = self.session(request).remove(
                    painting.get("background"), painting.get("layers") or (), words=named or "", others=rest or "",
                    shadow=dark, crop=part, seed=number, progress=self.progress(bar),
                )  # fmt: skip
                self.note(made.notes)
                scores = ", ".join(
                    f"{html.escape(word)}: found with {score:.2f}" for word, score in made.scores.items()
                )
                return made.picture, made.found, scores

        take.click(do_take, [drawn], [editor], api_name=False)
        remove.click(do_remove, [editor, words, others, shadow, crop, seed], [result, found, said], api_name="remove")
