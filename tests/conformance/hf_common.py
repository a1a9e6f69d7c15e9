"""Import the common tests of transformers from the folder that TRANSFORMERS_TESTS names (see README.md)."""

import importlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

PACKAGE = "hf_tests"


@cache
def local_picture(url: str) -> str:
    """What transformers' own helper does with its cache: a picture's URL → a file. Ours is drawn; others stay as they are."""
    if not url.endswith((".png", ".jpg")):
        return url
    import numpy as np
    from PIL import Image

    os.environ["GSVA_TRUSTED_FOLDERS"] = tempfile.gettempdir()  # chats may name files there
    path = Path(tempfile.mkdtemp(), url.rpartition("/")[2])
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    return str(path)


def _module(name: str, **content) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


@cache
def _open_package(folder: Path):
    """Makes `hf_tests` of the folder. What a source distribution lacks (it holds `tests/*.py` only) is made empty."""
    package = _module(PACKAGE, __path__=[str(folder)])
    for name, content in {
        "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "utils.test_configuration_utils": {"config_common_kwargs": {}},
    }.items():
        room, _, file = name.partition(".")
        if not (folder / room / f"{file}.py").exists():
            parent = sys.modules.get(f"{PACKAGE}.{room}") or _module(
                f"{PACKAGE}.{room}", __path__=[str(folder / room)]
            )
            setattr(package, room, parent)
            setattr(parent, file, _module(f"{PACKAGE}.{name}", **content))
    _module("fetch_hub_objects_for_ci", url_to_local_path=local_picture)


def load(name: str) -> ModuleType:
    """The module `name` of the common tests; skips the calling test file where there are none."""
    folder = os.environ.get("TRANSFORMERS_TESTS")
    if not folder:
        pytest.skip("needs the common tests of transformers: run `make conformance`", allow_module_level=True)
    _open_package(Path(folder).resolve())
    return importlib.import_module(f"{PACKAGE}.{name}")
