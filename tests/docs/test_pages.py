"""The pages: their links lead somewhere, their names exist, and their code runs, block after block of a page."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from erasure.assets import path as embedded
from erasure.assets.facts import FILE
from erasure.cli.main import COMMANDS, main
from erasure.eval.sweeps.plan import SweepPlan
from tests.behaviour.cases import QUICK
from tests.cli.test_learning import QUICK as QUICK_LEARNING
from tests.learning.conftest import mask, picture

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "integrations").rglob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")

TRAINED = {"docs/learning.md", "docs/remove.md"}
"""Pages whose MODEL must know what pictures show; elsewhere it is a model of random weights."""
SHORT: dict[str, tuple[str, ...]] = {
    "generate": ("--steps", "2"),
    "remove": ("--steps", "4"),
    "learn": QUICK_LEARNING,
    "sae train": ("--steps", "4", "--d-sae", "64", "--k", "4"),
    "attack unlearndiffatk": ("--samples", "1", "--timesteps", "1", "--iterations", "1", "--references", "1"),
    "attack random_prefix": ("--samples", "1", "--texts", "1"),
    "attack img2img": ("--samples", "1"),
    "stress quantise": ("--samples", "1", "--retained", "1", "--formats", "nf4"),
    "stress relearn": ("--samples", "1", "--retained", "1", "--steps", "1"),
    "stress merge": ("--samples", "1", "--retained", "1"),
}
"""Options that make a command take less time, where a page does not give them."""
ELSEWHERE = {
    "demo": "tests/cli/test_measuring.py runs it",
    "audit": "tests/eval/test_audits.py runs it",
    "--dataset": "it is on the Hub",
    "--adapter": "it is on the Hub",
    "push": "it needs the Hub (tests/hub runs it)",
    "pull": "it needs the Hub (tests/hub runs it)",
    "serve": "it does not end by itself (tests/cli/test_serve.py runs it)",
    "studio": "it does not end by itself (tests/studio runs its page)",
    "nudenet": "its weights are in an extra (tests/eval/detectors runs it)",
    "identity": "it needs faces (tests/eval/detectors runs it)",
    "i2p": "its list is on the Hub (tests/eval/test_photographs.py runs it)",
    "clip_zero_shot": "it needs a CLIP of one's own (tests/eval/detectors runs it)",
}
"""Commands and options that are parsed here and not run; so is an attack with the prompts of another, which needs some
that succeeded (tests/cli/test_attack.py runs it), and one of a model of one's own (tests/eval/test_own_models.py)."""
SHORT_SWEEP = """
models = [{model}]
concepts = ["cat"]
methods = [{{ strategy = "uce", options = {{ vocabulary = 0 }} }}]
suites = ["canvas"]
size = "smoke"
"""
"""What is run in the place of the sweep of a page, which is only read."""
FOREIGN = {"--nproc_per_node", "--with_prior_preservation", "--erase_from"}
"""Options of other programs."""


def script(name: str) -> Any:
    """A program in `docs/`, which is no package."""
    spec = spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = script("reference")


class Block(NamedTuple):
    """A code block of a page."""

    language: str
    text: str
    place: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = BLOCK.finditer(text)
    return [Block(each[1], each[2], f"{page.name}:{text[: each.start()].count(chr(10)) + 1}") for each in found]


def lines_of(block: Block) -> Iterator[list[str]]:
    """Words of every command of a shell block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


# Links and names ---------------------------------------------------------------------------------------------------


def anchors(page: Path) -> list[str]:
    """Headings of a page as forges name them in links."""
    titles = [line.lstrip("# ").lower() for line in BLOCK.sub("", page.read_text()).splitlines() if line[:1] == "#"]
    return [re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http:", "https:")):
            assert link.startswith("https://"), link
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{name}: {link}"
        assert target.is_relative_to(ROOT), f"{name}: {link}"
        if heading:
            assert heading in anchors(target), f"{name}: {link}"


def test_every_page_is_in_the_navigation_and_reached_from_the_readme() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/-]+\.md", json.dumps(config["nav"])))
    assert listed == {script("site").address(name) for name in NAMES} | {"LICENSES.md"}
    linked = {link.partition("#")[0] for link in LINK.findall((ROOT / "README.md").read_text())}
    assert set(NAMES) - {"README.md"} <= linked


def test_pages_of_methods_are_what_the_registry_says() -> None:
    """After a change: `python docs/reference.py`."""
    made = reference.pages()
    assert {page.stem for page in reference.FOLDER.glob("*.md")} == set(made)
    for name, text in made.items():
        assert (reference.FOLDER / f"{name}.md").read_text() == text, name


def test_the_map_of_rooms_is_that_of_the_tree() -> None:
    """After a change: `python docs/rooms.py`. Every room is in it, in the group that it has in tests/test_rooms.py."""
    rooms = script("rooms")
    text = rooms.PAGE.read_text()
    assert rooms.page(text) == text
    shown = set(re.findall(r"^\| `([\w/.]+)` \|", text, re.MULTILINE))
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("erasure", "eval")
        for path in (ROOT / folder).iterdir()
        if (path / "__init__.py").is_file() or (folder == "erasure" and path.suffix == ".py" and path.stem[:2] != "__")
    }
    assert shown == there | {"eval", "pipelines", "assets", "benchmarks", "integrations"}


def test_readme_is_short_and_says_what_its_words_mean() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for needed in ("`erasure.load_pipeline`", "`$ERASURE_CACHE`", ".[test]"):
        assert needed in text


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("CHANGELOG.md", "CONTRIBUTING.md")])
def test_rates_are_explained_before_their_first_use(name: str) -> None:
    meaning = {
        "UA": r"unlearning accuracy|do not show it|UA\*\* \(unlearning", "IRA": r"in-domain|others of its\s+kind",
        "CRA": r"cross-domain|the other kind|the same of the other", "AA": r"mean of|AA is the mean",
    }  # fmt: skip
    text = (ROOT / name).read_text()
    for rate, words in meaning.items():
        used = re.search(rf"\b{rate}\b", text)
        if used is not None:
            around = text[max(0, used.start() - 400) : used.end() + 400]
            assert re.search(words, around), f"{name} uses {rate} before it says what it is: {around[300:500]}"


@cache
def known_flags() -> set[str]:
    """Every option of every command, as the sources declare them."""
    fields = {"help", "version", "debug"}
    for folder in ("erasure", "eval", "assets/build", "benchmarks", "tests/fuzz"):
        for file in (ROOT / folder).rglob("*.py"):
            source = file.read_text()
            fields |= set(re.findall(r"^ {4}(\w+):", source, re.MULTILINE))
            fields |= set(re.findall(r"(?<=[(,] )?\b(\w+): [\w| .\[\]\"',]+ = ", source))
            fields |= set(re.findall(r"add_argument\(\"--([\w-]+)\"", source))
    flags = {f"--{field.replace('_', '-')}" for field in fields}
    return flags | {flag.replace("--", "--no-") for flag in flags} | FOREIGN


@pytest.mark.parametrize("name", NAMES)
def test_options_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    # Options of pytest, ruff and pip are theirs.
    ours = "\n".join(line for line in text.splitlines() if not re.match(r"\s*(pytest|ruff|pip) ", line))
    missing = set(FLAG.findall(ours)) - known_flags()
    assert not missing, f"{name}: {sorted(missing)}"


@pytest.mark.parametrize("name", NAMES)
def test_names_in_code_exist(name: str) -> None:
    """Methods of `pipe`, names of `erasure`, pipelines and commands that pages name in passing."""
    import erasure
    from erasure import pipelines

    text = BLOCK.sub("", (ROOT / name).read_text())
    code = " \n".join(re.findall(r"`([^`\n]+)`", text))
    for method in re.findall(r"\bpipe\.(\w+)", code):
        assert hasattr(pipelines.StableDiffusionErasurePipeline, method), method
    for dotted in re.findall(r"\berasure(?:\.[a-zA-Z]\w+)+", code):
        module, _, last = dotted.rpartition(".")
        if last not in ("json", "safetensors"):
            assert hasattr(import_module(module), last) or import_module(dotted), dotted
    for kind in re.findall(r"\b\w+(?:Erasure|ObjectRemoval|AStar)Pipeline\b", code):
        assert hasattr(pipelines, kind), kind
    for command in re.findall(r"(?:^|\n)erasure ([a-z]+)\b", code):
        assert command in COMMANDS, command
    for step in re.findall(r"-m erasure\.assets\.build ([a-z_]+)", code):
        assert step in steps(), step
    assert erasure.__version__


def test_every_method_is_in_the_tables() -> None:
    from erasure.strategies import available

    for page in ("README.md", "docs/methods.md", "docs/threat-model.md"):
        text = (ROOT / page).read_text()
        assert [name for name in available() if f"`{name}`" not in text] == [], page


def test_what_programs_load_is_what_the_exports_refuse() -> None:
    from erasure.exchange.loaders import FLUX, LOADERS, SD, SD3, XL

    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/share.md").read_text().splitlines()
        if line.startswith("|")
    ]
    families = (SD, XL, SD3, FLUX)
    for name, loader in LOADERS.items():
        (row,) = (row for row in rows if row[0] == f"`{name}`")
        for family, cell in zip(families, row[2:], strict=True):
            assert cell.startswith("no: " if family in loader.refused else "yes"), (name, family)
    (known,) = (row for row in rows if row[0].startswith("a program knows the name of every layer"))
    for family, cell in zip(families, known[1:], strict=True):
        names = [name for name, loader in LOADERS.items() if family not in loader.refused and name != "diffusers"]
        assert re.findall(r"`(\w+)`", cell) == names, family


def test_what_methods_protect_is_what_they_say() -> None:
    from erasure.strategies import STRATEGIES

    rows = re.findall(r"^\| \[`(\w+)`\].*$", (ROOT / "docs/methods.md").read_text(), re.MULTILINE)
    assert set(rows) == set(STRATEGIES.names())
    for row in (ROOT / "docs/methods.md").read_text().splitlines():
        if (name := re.match(r"\| \[`(\w+)`\]", row)) is not None:
            assert str(STRATEGIES.facts(name[1]).attributes["protects"]) in row, row


# Code --------------------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """A command's options were accepted."""


@cache
def steps() -> dict[str, Callable[..., object]]:
    """Steps of the build by name."""
    build = import_module("erasure.assets.build.__main__")
    return {name: step for name, step in vars(build).items() if inspect.isfunction(step)}


class Shell:
    """Runs commands of pages in this process, or checks those that need what is not here."""

    def __init__(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.monkeypatch = model, monkeypatch

    def run(self, words: Sequence[str]) -> None:
        words = list(words)
        while re.match(r"[A-Z_]+=", words[0]):
            variable = words.pop(0).partition("=")[0]
            assert variable.startswith("HF_") or self.is_read(variable), variable
        words[0] = words[0].removeprefix(".venv/bin/")
        text = " ".join(words)
        if launched := re.match(r"(accelerate launch|torchrun --nproc_per_node \d+|python) -m (.+)", text):
            module, *rest = words[len(shlex.split(launched[1])) + 1 :]
            self.module(module, rest)
        elif words[0] == "erasure":
            self.erasure(words[1:])
        elif words[:2] == ["pip", "install"]:
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            named = [each for extra in re.findall(r"\[([\w,]+)\]", text) for each in extra.split(",")]
            assert set(named) <= set(extras), text
        elif words[0].startswith(".ci/"):
            assert os.access(ROOT / words[0], os.X_OK), text
        elif words[0] in ("pytest", "python", "ruff"):
            paths = [word for word in words[1:] if "/" in word]
            assert all((ROOT / path).exists() for path in paths), text
        else:
            assert text in ("python3 -m venv .venv", "source .venv/bin/activate"), f"nothing checks {text!r}"

    @staticmethod
    @cache
    def is_read(variable: str) -> bool:
        sources = (file.read_text() for folder in ("erasure", "tests") for file in (ROOT / folder).rglob("*.py"))
        return any(f'"{variable}"' in source for source in sources)

    def module(self, name: str, words: list[str]) -> None:
        if name == "erasure":
            self.erasure(words)
        elif name == "venv":
            assert words == [".venv"]
        elif name == "benchmarks":
            from benchmarks.__main__ import COMMANDS as BENCHMARKS

            assert words[0] in BENCHMARKS
        else:
            assert name == "erasure.assets.build", name
            parameters = inspect.signature(steps()[words[0]]).parameters
            given = {word[2:].replace("-", "_") for word in words[1:] if word.startswith("--")}
            assert given - {"help"} <= set(parameters), words

    def erasure(self, words: list[str]) -> None:
        words = [self.model if word == "MODEL" else word for word in words]
        if words in (["--help"], ["--version"]):
            assert main(words) == 0
        elif not {*ELSEWHERE, *(("--prompts", "--suite") if words[0] == "attack" else ())}.isdisjoint(words):
            self.parses(words)
        else:
            assert main(self.shortened(words)) == 0, words

    def parses(self, words: list[str]) -> None:
        """Check that a command takes its options, and go no further."""
        import tyro

        real = tyro.cli

        def stop(*args: Any, **options: Any) -> None:
            real(*args, **options)
            raise Parsed

        with self.monkeypatch.context() as patch:
            patch.setattr(tyro, "cli", stop)
            with pytest.raises(Parsed):
                main(words)

    def shortened(self, words: list[str]) -> list[str]:
        words = [word.replace("quick", "smoke") if before == "--size" else word for before, word in pairs(words)]
        more = SHORT.get(words[0], SHORT.get(" ".join(words[:2]), ()))
        if words[0] == "erase":
            more = quick_flags(words[1])
        given = {word for word in words if word.startswith("--")}
        for flag, value in zip(more[::2], more[1::2], strict=True):
            words += [] if flag in given else [flag, value]
        return words


def pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    return list(zip(["", *words], words, strict=False))


def quick_options(strategy: str) -> dict[str, Any]:
    """Options of a strategy that make it quick."""
    from erasure.strategies import get

    quick = {**QUICK, "steps": 1, **({"retain_batch": 0, "contexts": 0} if strategy == "mace" else {})}
    return {
        key: value
        for key, value in quick.items()
        if key in {field.name for field in dataclasses.fields(get(strategy))}
    }


def quick_flags(strategy: str) -> tuple[str, ...]:
    given = quick_options(strategy).items()
    return tuple(word for key, value in given for word in (f"--{key.replace('_', '-')}", str(value)))


@pytest.fixture(scope="module")
def gun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An erasure of the embedded model, as somebody may have put on the Hub."""
    folder = tmp_path_factory.mktemp("hub") / "no-guns"
    assert main(["erase", "uce", "--model", "canvas-sd", "--concept", "gun", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, which draws in two steps where nothing else is said."""
    folder = tmp_path_factory.mktemp("hasty") / "canvas-sd"
    folder.mkdir()
    for part in embedded("canvas-sd").iterdir():
        (folder / part.name).symlink_to(part)
    facts = json.loads((folder / FILE).read_text())
    (folder / FILE).unlink()
    (folder / FILE).write_text(json.dumps(facts | {"generation": facts["generation"] | {"num_inference_steps": 2}}))
    return folder


def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let evaluations and pipelines draw little: that code runs is what pages are tested for."""
    from diffusers import StableDiffusionPipeline

    from erasure.eval.suites import SUITES, canvas

    monkeypatch.setattr(canvas, "SMOKE_SAMPLES", 2)
    about: Any = SUITES.get("prompts").about  # type: ignore[attr-defined]
    monkeypatch.setattr(SUITES.get("prompts"), "about", dataclasses.replace(about, sizes={"smoke": 2}))
    call: Any = inspect.unwrap(StableDiffusionPipeline.__call__)
    monkeypatch.setattr(call, "__defaults__", tuple(2 if value == 50 else value for value in call.__defaults__))


def own_files(folder: Path) -> None:
    """What a reader has: pictures, masks, lists, weights that somebody published."""
    picture("robot", "cactus").save(folder / "both.png")
    picture("robot").save(folder / "logo.png")
    picture("cat", "dog").save(folder / "scene.png")
    mask(0, "cat", "dog").save(folder / "mask.png")
    (folder / "artists.csv").write_text('concept,kind,anchor\n"van gogh",style,painting\nmonet,style,painting\n')
    (folder / "prompts.csv").write_text("prompt,seed\na photo of a cat,1\na photo of a dog,2\n")
    for name, made in (("photos", picture("cat", "dog")), ("masks", mask(0, "cat", "dog"))):
        (folder / name).mkdir()
        made.save(folder / name / "first.png")
    picture("cat", "dog").resize((160, 160)).save(folder / "large.png")
    mask(0, "cat", "dog").resize((160, 160)).save(folder / "large-mask.png")
    (folder / "outputs").mkdir()
    picture("cat").save(folder / "outputs" / "cat.png")
    door = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    with safe_open(embedded("canvas-sd") / "unet" / "diffusion_pytorch_model.safetensors", "pt") as weights:
        stock = weights.get_tensor(door).float()
    noise = torch.randn(stock.shape, generator=torch.Generator().manual_seed(0))
    save_file({door: stock + 0.1 * stock.std() * noise}, folder / "esd-cat.safetensors")
    (folder / "prompts.txt").write_text("".join(f"a photo of a {word}\n" for word in ("cat", "dog", "car", "house")))


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(ROOT / name)])
def test_code_runs_in_order(
    name: str, tiny_pipe_folder: Path, gun: Path, hasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erasure.strategies import STRATEGIES

    own_files(tmp_path)
    few_samples(monkeypatch)
    monkeypatch.chdir(tmp_path)
    if name not in TRAINED:  # a folder is preferred to an embedded model
        (tmp_path / "canvas-sd").symlink_to(hasty)
    monkeypatch.setattr(STRATEGIES, "_registered", dict(STRATEGIES._registered))
    model = "canvas-sd" if name in TRAINED else str(tiny_pipe_folder)
    shell = Shell(model, monkeypatch)
    replaced = {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": str(embedded("canvas-sd")), "someone/no-guns": str(gun),
        "torch.float16": "torch.float32", '"cuda"': '"cpu"', '"MODEL"': repr(model), 'size="quick"': 'size="smoke"',
        **{f'strategy="{method}"': f'strategy="{method}", **QUICK["{method}"]' for method in ("esd", "hirm", "uce")},
        "pipe(image, mask": "pipe(image, mask, num_inference_steps=4",
        "crop=True)": "crop=True, num_inference_steps=4)",
        'learn_concepts("logo.png", "<logo>")': 'learn_concepts("logo.png", "<logo>", **QUICK["learn"])',
    }  # fmt: skip
    learning = {flag[2:].replace("-", "_"): int(value) for flag, value in pairs(QUICK_LEARNING) if value.isdigit()}
    names = {"QUICK": {**{method: quick_options(method) for method in ("esd", "hirm", "uce")}, "learn": learning}}
    for block in blocks(ROOT / name):
        if block.language == "python":
            text = block.text
            for old, new in replaced.items():
                text = text.replace(old, new)
            exec(compile(text, block.place, "exec", dont_inherit=True), names)
        elif block.language == "toml":
            SweepPlan.of(tomllib.loads(block.text), block.place)
            (tmp_path / "sweep.toml").write_text(SHORT_SWEEP.format(model=json.dumps(model)))
        else:
            assert block.language == "bash", f"{block.place}: say what language this is, and test it"
            for words in lines_of(block):
                shell.run(words)


# The site ----------------------------------------------------------------------------------------------------------


def test_site_builds(tmp_path: Path) -> None:
    """MkDocs finds no broken link and no page that it does not list."""
    build = pytest.importorskip("mkdocs.commands.build", reason="extra docs is not installed")
    pytest.importorskip("material", reason="extra docs is not installed")
    from mkdocs.config import load_config

    build.build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    front = (tmp_path / "index.html").read_text()
    assert 'src="files/assets/demo.png"' in front
    assert (tmp_path / "files/assets/demo.png").is_file()
