"""Run scripts in a separate process that cannot import this project."""

# Also where `make` has installed the project: its packages are refused like any that does not exist.
WITHOUT_PROJECT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("modeling_gsva", "data_scripts", "conversion", "trainers", "metrics", "run_gres", "convert_checkpoint"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
try:
    import modeling_gsva
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the project is importable: nothing would be shown")
"""
