"""Import the files of examples/, which is no package: each is run, or loaded by a tool, by its path."""

import importlib.util
import sys
from types import ModuleType

from paths import ROOT


def load_example(name: str) -> ModuleType:
    """The module of a file of examples/."""
    path = ROOT / "examples" / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # what is pickled is found by its module
    spec.loader.exec_module(module)
    return module
