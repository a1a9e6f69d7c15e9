"""
Unpack the common tests of the installed transformers from its source distribution, and print their folder.

    python tests/conformance/fetch.py FOLDER

pip downloads from the configured package index and checks the index's hash. Only `tests/*.py` is unpacked.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

PACKAGE = "transformers"


def unpack_tests(archive: Path, folder: Path) -> Path:
    """`tests/*.py` of a source distribution → `folder`, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        with tarfile.open(archive) as tar:
            wanted = [member for member in tar if member.isfile() and PurePosixPath(member.name).match("*/tests/*.py")]
            if not wanted:
                raise SystemExit(
                    f"{archive.name} holds no tests/*.py: this version's common tests cannot be had from it."
                )
            tar.extractall(temporary, wanted, filter="data")
        unpacked = Path(temporary, *PurePosixPath(wanted[0].name).parent.parts)
        (unpacked / "__init__.py").touch()  # left out of source distributions, but asked for by a test
        os.replace(unpacked, folder)
    return folder


def fetch(folder: Path) -> Path:
    """Downloads what is not there yet; → the folder with the installed version's test files."""
    release = version(PACKAGE)
    tests = folder / f"{PACKAGE}-{release}"
    if tests.is_dir():
        return tests
    with tempfile.TemporaryDirectory() as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        subprocess.run([*command, "--dest", downloads, f"{PACKAGE}=={release}"], check=True, stdout=sys.stderr)
        (archive,) = Path(downloads).iterdir()
        return unpack_tests(archive, tests)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(fetch(Path(sys.argv[1]).resolve()))
