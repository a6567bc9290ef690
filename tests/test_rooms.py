"""The rooms of the package: which may know of which, and where the private parts of other libraries may stand.

Read from the sources, so that an import inside of a function counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("erasure", "pipelines", "eval", "assets", "benchmarks", "integrations")

GROUND = frozenset(
    {
        "concept", "errors", "extras", "files", "hub", "images", "interop", "lazy", "leases", "needs", "options",
        "pages", "parsing", "picture_record", "progress", "registry", "shown", "versions",
    }
)  # fmt: skip
LIBRARY = frozenset(
    {
        "adding", "api", "artifact", "attach", "baked", "bases", "canary", "cards", "exchange", "fitting", "guards",
        "ledger", "proof", "schema", "state", "switching", "twins",
    }
)  # fmt: skip
"""What makes an erasure a file and attaches it."""
WORKSHOPS = frozenset({"learning", "sae", "strategies", "training"})
"""What makes an erasure, or a concept that can be erased."""
USERS = frozenset({"assets", "benchmarks", "eval", "integrations", "pipelines", "serving", "studio"})
"""What is built on the library."""

ABOVE = LIBRARY | WORKSHOPS | USERS

NEVER: dict[str, frozenset[str]] = {
    **dict.fromkeys(GROUND, frozenset({"backbones", "cache", "carriers", "masks", "text"}) | ABOVE),
    **dict.fromkeys(("cache", "masks"), frozenset({"backbones", "carriers", "text"}) | ABOVE),
    "backbones": frozenset({"carriers", "text"}) | ABOVE,
    "text": frozenset({"carriers"}) | ABOVE,
    "carriers": ABOVE,
    "training": frozenset({"learning", "sae", "strategies"}) | LIBRARY | USERS,
    # What the embedded models declare is data of `assets`.
    "world": frozenset({"backbones", "cache", "carriers", "masks", "text"}) | ABOVE - {"assets"},
    # The embedded dictionary and prompts are data of `assets`.
    "sae": frozenset({"learning", "strategies"}) | USERS - {"assets"},
    "strategies": LIBRARY | USERS | {"learning"},
    "learning": frozenset({"sae", "strategies"}) | USERS,
    **dict.fromkeys(LIBRARY - {"adding", "api"}, WORKSHOPS | USERS),
    "adding": frozenset({"sae"}) | USERS,
    # Gates of feature edits tell concepts in prompts.
    "locking": frozenset({"learning", "strategies", "training"}) | USERS,
    # `load_pipeline` gives a drop-in pipeline or an embedded model: asked for when it is called.
    "api": frozenset({"learning", "sae", "eval", "benchmarks", "integrations", "serving", "studio"}),
    "pipelines": frozenset({"eval", "benchmarks", "integrations", "serving", "studio"}),
    "eval": frozenset({"benchmarks", "integrations", "serving", "studio"}),
    "assets": frozenset({"benchmarks", "integrations", "serving", "studio"}),
    # Nodes of other programs draw, erase and remove; they measure nothing.
    "integrations": frozenset({"assets", "benchmarks", "eval", "serving", "studio"}),
    "serving": frozenset({"benchmarks", "integrations", "studio"}),
    # Its page is built on pieces of the service.
    "studio": frozenset({"benchmarks", "eval", "integrations"}),
}  # fmt: skip
"""What each room never imports, anywhere. `cli`, `benchmarks` and `__main__` are in no list: they know everything."""
NEVER_AT_ONCE = {"api": frozenset({"assets", "pipelines"}), "world": frozenset({"assets"})}
"""What a room imports in functions only."""

OTHERS = ("accelerate", "diffusers", "peft", "torch", "transformers")
PRIVATE_MODULES = (
    "accelerate.hooks", "diffusers.hooks", "diffusers.loaders", "diffusers.models.attention_dispatch",
    "diffusers.pipelines.auto_pipeline", "peft.tuners", "peft.utils",
)  # fmt: skip
"""Modules that other libraries do not document: they move with any release."""
NAMED_TUPLES = frozenset({"_asdict", "_fields", "_make", "_replace"})
"""Public in spite of their names: methods of named tuples."""
FILE_KEYS = frozenset({"_class_name", "_diffusers_version"})
"""Keys of diffusers' files on disk, which everyone who reads them needs."""


class Source(NamedTuple):
    """A module of the package."""

    path: str
    room: str
    tree: ast.Module


@cache
def sources() -> tuple[Source, ...]:
    """Every module, parsed."""
    found = []
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            inside = file.relative_to(ROOT / folder)
            room = inside.parts[0].removesuffix(".py") if folder == "erasure" else folder
            found.append(Source(file.relative_to(ROOT).as_posix(), room, ast.parse(file.read_text())))
    return tuple(found)


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every import below a node, as a full name: `from a import b` is `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            ahead = "." * node.level
            yield from ((node, f"{ahead}{node.module}.{alias.name}") for alias in node.names)


def rooms_of(source: Source) -> Iterator[tuple[str, ast.stmt]]:
    """The rooms that a module imports."""
    for node, name in imports(source.tree):
        parts = name.split(".")
        if parts[0] == "erasure" and len(parts) > 1:
            yield parts[1], node


def test_every_room_has_its_arrows() -> None:
    rooms = {source.room for source in sources()} - {"__init__", "__main__", "benchmarks", "cli"}
    assert rooms <= set(NEVER), "say in NEVER what a new room must not know"


def test_imports_say_which_room_is_meant() -> None:
    """None is relative, but inside of a pack of nodes: the program that loads it gives its folder another name."""
    wrong = [
        f"{source.path}:{node.lineno}"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ImportFrom) and node.level > int(source.room == "integrations")
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", sorted(NEVER))
def test_arrows_point_one_way(room: str) -> None:
    wrong = [
        f"{source.path}:{node.lineno} imports erasure.{other}"
        for source in sources()
        if source.room == room
        for other, node in rooms_of(source)
        if other in NEVER[room] | {"cli"} or (other in NEVER_AT_ONCE.get(room, ()) and node in source.tree.body)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_is_light() -> None:
    (package,) = (source for source in sources() if source.path == "erasure/__init__.py")
    at_once = [name for node, name in imports(package.tree) if node in package.tree.body]
    assert [name for name in at_once if name.split(".")[0] in (*OTHERS, "erasure")] == []


# Private names -------------------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name not in NAMED_TUPLES | {"_"}


@cache
def own_names() -> frozenset[str]:
    """Names with an underscore of functions, classes, variables and attributes that the package defines."""
    found = set()
    for source in (source for source in sources() if source.room != "interop"):
        functions = {node.name for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_one(node, functions):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "_erasure" in node.value:
                # Attributes that are set on the objects of others by a name that is kept in a variable.
                found.add(node.value)
    return frozenset(found)


def of_one(node: ast.Attribute, functions: set[str]) -> bool:
    """Whether an attribute is of the object itself, or of a function of the same module."""
    return isinstance(node.value, ast.Name) and node.value.id in {"self", "cls", *functions}


def named_by_text(node: ast.AST) -> Iterator[str]:
    """Attributes and keys that are named by a text: `getattr(x, "_y")`, `x.get("_y")`, `x["_y"]`."""
    texts: list[ast.expr] = []
    if isinstance(node, ast.Call):
        texts = node.args[:2]
    elif isinstance(node, ast.Subscript):
        texts = [node.slice]
    yield from (text.value for text in texts if isinstance(text, ast.Constant) and isinstance(text.value, str))


def strangers(source: Source) -> Iterator[str]:
    """What a module reaches of other libraries' private parts."""
    for node, name in imports(source.tree):
        parts = name.split(".")
        hidden = any(is_private(part) for part in parts)
        deep = any(name == module or name.startswith(f"{module}.") for module in PRIVATE_MODULES)
        if parts[0] in OTHERS and (hidden or deep):
            yield f"{source.path}:{node.lineno} imports {name}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own_names():
            yield f"{source.path}:{node.lineno} reaches {ast.unparse(node)}"
        for text in named_by_text(node):
            if text.isidentifier() and is_private(text) and text not in own_names() | FILE_KEYS:
                yield f"{source.path}:{node.lineno} names {text!r}"


def test_private_names_of_other_libraries_stand_in_interop_only() -> None:
    wrong = [line for source in sources() if source.room != "interop" for line in strangers(source)]
    assert not wrong, "move them to erasure/interop:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    "code",
    [
        "module._hf_hook",
        "pipe._interrupt = True",
        "del pipe._progress_bar_config",
        "getattr(module, '_orig_mod', module)",
        "config.get('_name_or_path')",
        "module.__dict__['_parameters']",
        "self._execution_device",
        "from diffusers.hooks import ModelHook",
        "from peft.tuners.tuners_utils import BaseTunerLayer",
        "import accelerate.hooks",
        "from diffusers.loaders.lora_base import _func_optionally_disable_offloading",
        "def f():\n    from torch._dynamo import reset",
    ],
)
def test_the_rule_sees(code: str) -> None:
    assert list(strangers(Source("example.py", "state", ast.parse(code))))


@pytest.mark.parametrize(
    "code",
    [
        "row._replace(a=1)",
        "row._asdict()",
        "config['_class_name']",
        "x.__class__",
        "self._states()",
        "import diffusers",
    ],
)
def test_the_rule_lets_through(code: str) -> None:
    assert not list(strangers(Source("example.py", "state", ast.parse(code))))


# Text becomes tokens in one place ------------------------------------------------------------------------------------

TOKENISING = {"erasure/backbones/towers.py", "erasure/interop/learned.py"}
OWN_TOKENISERS = {"eval/metrics/clip_models.py"}
"""Models with a tokeniser of their own, which is no pipeline's."""


def test_text_becomes_tokens_where_learned_tokens_are_known() -> None:
    wrong = [
        f"{source.path}:{node.lineno} {ast.unparse(node)[:80]}"
        for source in sources()
        if source.path not in TOKENISING | OWN_TOKENISERS and not source.path.startswith("assets/build/")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and (called := ast.unparse(node.func).split("."))
        and (called[-1].startswith("tokenizer") or (called[-1] in ("encode", "tokenize") and "tokenizer" in called))
    ]
    assert not wrong, "ask the tower (tokenize, prompt_ids, word_ids):\n" + "\n".join(wrong)


# What belongs to one family stands in that family's file -------------------------------------------------------------

OF_FAMILIES = ("erasure/backbones/", "assets/build/")
"""Where families are told apart, and where the embedded models of one of them are made."""
OF_ONE_FAMILY: dict[str, str] = {
    "pipelines/inversion.py": "DDIM, forwards and backwards, goes by these noise levels",
    "erasure/carriers/lora_names.py": "other programs have names of their own for what is in a UNet",
    "erasure/exchange/loaders.py": "other programs have names of their own for what is in a UNet",
    "erasure/files/recognise.py": "it tells networks' files apart by the names in them",
    "erasure/interop/paths.py": "FreeU is a switch of UNets",
    "erasure/interop/protocols.py": "it says what the objects of diffusers have",
}  # fmt: skip
"""Files beside those that name what one family has, with the reason."""


def family_names(source: Source) -> Iterator[str]:
    """What a module says that holds for one family only."""
    for node in ast.walk(source.tree):
        where = f"{source.path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute) and node.attr in ("unet", "alphas_cumprod"):
            yield f"{where} reaches .{node.attr}"
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) in ("unet", "alphas_cumprod", "families"):
            yield f"{where} declares {ast.unparse(node.target)}"
        elif isinstance(node, ast.Subscript) and ast.unparse(node).endswith("towers[0]"):
            yield f"{where} takes the first of several text encoders"
        elif isinstance(node, ast.keyword) and node.arg == "families":
            yield f"{where} lists families"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and names_a_part(node.value):
            yield f"{where} writes {node.value[:40]!r}"


def names_a_part(text: str) -> bool:
    return any(part in text for part in ("up_blocks", "unet/", "alphas_cumprod", "towers[0]", "pipe.unet"))


def test_what_one_family_has_is_named_in_its_own_file() -> None:
    wrong = [
        line
        for source in sources()
        if not source.path.startswith(OF_FAMILIES) and source.path not in OF_ONE_FAMILY
        for line in family_names(source)
    ]
    assert not wrong, "ask the backbone, or say in OF_ONE_FAMILY why not:\n" + "\n".join(wrong)


def test_no_exception_is_listed_that_needs_none() -> None:
    named = {source.path for source in sources() if any(family_names(source))}
    assert set(OF_ONE_FAMILY) <= named


@pytest.mark.parametrize(
    "code",
    [
        "backbone.towers[0]",
        "pipe.unet.config",
        "site.name.startswith('up_blocks.')",
        "families: tuple[str, ...] = ('stable-diffusion',)",
        "scheduler.alphas_cumprod[t]",
        "key = f'unet/{path}'",
        "def f():\n    'Give it pipe.unet.'",
    ],
)
def test_the_rule_of_families_sees(code: str) -> None:
    assert any(family_names(Source("example.py", "strategies", ast.parse(code))))
