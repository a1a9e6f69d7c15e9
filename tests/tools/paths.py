"""Paths of the project, the fixtures and the specification folder, for tests."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
BASE = ROOT / "assets" / "tiny_gsva"
# The original's golden numbers in full. They are no part of the project; tests that need them are skipped without them.
SHARED = Path(os.environ.get("GSVA_SHARED", ROOT.parent / "shared"))
