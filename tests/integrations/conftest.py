"""The pack of nodes, loaded as ComfyUI loads it, among stand-ins of ComfyUI's modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.integrations.stand_ins import program

PACK = Path(__file__).resolve().parents[2] / "integrations/comfyui"


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folder of models."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("erasures", "diffusers", "checkpoints"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="session")
def pack(models_dir: Path) -> Iterator[ModuleType]:
    """The pack under a name that ComfyUI would make of its path."""
    name = "/ComfyUI/custom_nodes/comfyui-erasure"
    with pytest.MonkeyPatch.context() as patch:
        for module, stand_in in program(models_dir).items():
            patch.setitem(sys.modules, module, stand_in)
        spec = spec_from_file_location(name, PACK / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        made = module_from_spec(spec)
        patch.setitem(sys.modules, name, made)
        spec.loader.exec_module(made)
        yield made
        for module in [each for each in sys.modules if each.startswith(f"{name}.")]:
            del sys.modules[module]


@pytest.fixture(scope="session")
def nodes(pack: ModuleType) -> dict[str, Any]:
    """The nodes by the names that workflows keep."""
    return pack.NODE_CLASS_MAPPINGS
