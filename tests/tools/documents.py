"""The code blocks of Markdown pages: run as a reader would, or checked where they cannot run here.

The words behind a fence's language say what is done with its block: nothing - it runs; `slow` - it runs with the slow tests
only; `no-run` - it needs weights, a card or a port, and its commands are only checked.
"""

import argparse
import configparser
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import yaml
from paths import ROOT

FENCE = re.compile(r"^```(\w+)((?: [\w-]+)*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKS = {"slow", "no-run"}
LANGUAGES = {"python", "bash", "json", "yaml", "text", "bibtex"}
# Commands that install, build, download or look. They are checked, never run, whatever the mark of their block.
OF_THE_READER = {"make", "pip", "git", "source", "curl", "cd"}
# Commands of tools that load files of examples/. Only the files that they name are checked.
OF_TOOLS = {"hf", "cvat-cli", "label-studio-ml"}
HARMLESS = {"mkdir", "cp", "ls", "cat"}
# What a run or a download makes: names below these folders need not exist.
MADE = ("runs/", "weights/")
# Programs that check their arguments further once they are parsed, with the function that does both.
PARSERS = {
    "run_gres.py": "trainers.arguments.parse_arguments",
    "convert_checkpoint.py": "convert_checkpoint.parse_args",
    "evaluation.calibrate": "evaluation.calibrate.parse",
}


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, its line there, its language, its marks and its text."""

    page: str
    line: int
    language: str
    marks: frozenset
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(path: Path) -> list[Block]:
    """Return the blocks of a page. Raises ValueError for a fence without a language, or with a word that is none of the marks."""
    text, page = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    found = [
        Block(page, text.count("\n", 0, match.start()) + 1, match[1], frozenset(match[2].split()), match[3])
        for match in FENCE.finditer(text)
    ]
    if len(found) * 2 != len(re.findall(r"^\s*```", text, re.MULTILINE)):
        raise ValueError(f"{page}: a fence names no language, is indented, or is not closed")
    for block in found:
        if block.language not in LANGUAGES or block.marks - MARKS:
            raise ValueError(f"{block}: {block.language} {' '.join(block.marks)} is no fence that is known")
    return found


def commands(block: Block) -> Iterator[tuple[list[str], str]]:
    """Yield the words and the text of each command of a bash block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            if words := shlex.split(part, comments=True):
                yield words, part


def run(block: Block, namespace: dict) -> None:
    """Run a block in the working directory. Python blocks of a page share a namespace; programs of the project run in this process.

    Raises:
        AssertionError: A command ends with another status than 0.
    """
    if block.language == "python":
        # Line numbers in a traceback are those of the page.
        exec(compile("\n" * block.line + block.text, ROOT / block.page, "exec"), namespace)  # noqa: S102
    elif block.language == "bash":
        for words, text in commands(block):
            if words[0] in OF_THE_READER:
                check_command(words)
            elif words[0] in HARMLESS:
                subprocess.run(["bash", "-c", text], check=True)
            else:
                status = run_program(program(words))
                assert status in (None, 0), f"{block}: {text} ended with {status}"
    else:
        check(block)


def check(block: Block) -> None:
    """Check a block without running it: its syntax, and each command by the program's own parser."""
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    elif block.language == "bash":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        for words, _ in commands(block):
            check_command(words)


def check_command(words: list[str]) -> None:
    """Check a command: the program exists, it understands its arguments, and the project has the files that are named.

    Raises:
        ValueError: Something is wrong with it.
    """
    if any("$(" in word for word in words):  # a command in a command; `bash -n` has read it
        return
    while words and re.match(r"\w+=", words[0]):  # variables that are set
        words = words[1:]
    if not words or words[0] in HARMLESS | (OF_THE_READER - {"make", "pip"}):
        return
    for word in words:
        first, _, rest = word.partition("/")
        if rest and (ROOT / first).is_dir() and not word.startswith(MADE) and not (ROOT / word).exists():
            raise ValueError(f"the project has no {word}")
    if words[0] in OF_TOOLS:
        return
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        if unknown := [word for word in words[1:] if "=" not in word and word not in {*targets, "--dry-run"}]:
            raise ValueError(f"the Makefile has no target {unknown}")
    elif words[0] == "pip":
        extras = configparser.ConfigParser()
        extras.read(ROOT / "setup.cfg")
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
            if extra not in extras["options.extras_require"]:
                raise ValueError(f"setup.cfg has no extra {extra!r}")
    else:
        check_program(program(words))


def program(words: list[str]) -> list[str]:
    """Return script or `-m module` with its arguments, of `python ...` and of `accelerate launch ...`."""
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(words[2:])
        return [args.training_script, *args.training_script_args]
    if words[:2] == ["accelerate", "merge-weights"]:
        return ["-m", "accelerate.commands.accelerate_cli", *words[1:]]
    if Path(words[0]).name in ("python", "python3"):
        return words[1:]
    raise ValueError(f"{words[0]} is no command that pages may name; see tests/tools/documents.py")


@contextmanager
def _as_main(words: list[str]) -> Iterator[None]:
    """Give a program its arguments, and the reader's working directory to import from."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [words[0], *words[1:]]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*found in sys.modules")
            yield
    finally:
        sys.argv, sys.path[:] = argv, path


def run_program(words: list[str]):
    """Run a program in this process, where torch and the project are imported already. Return its status."""
    try:
        if words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})  # noqa: S102
        elif words[0] == "-m":
            with _as_main(words[1:]):
                runpy.run_module(words[1], run_name="__main__")
        else:
            with _as_main(words):
                runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


class _Parsed(BaseException):
    """The program has understood its arguments. No `except Exception` catches it."""


def check_program(words: list[str]) -> None:
    """Let a program parse its arguments, and stop it then. Raises ValueError if it does not understand them."""
    if words[0] == "-c":
        compile(words[1], "-c", "exec")
    elif parser := PARSERS.get(words[0] if words[0] != "-m" else words[1]):
        module, _, function = parser.rpartition(".")
        no_card = ["--use_cpu"] * (words[0] == "run_gres.py")  # which bf16 would need already when it is parsed
        getattr(import_module(module), function)([*(words[2:] if words[0] == "-m" else words[1:]), *no_card])
    elif not words[0].startswith(MADE):
        parse = argparse.ArgumentParser.parse_args

        def parse_and_stop(parser, *args, **options):
            parse(parser, *args, **options)
            raise _Parsed

        said = io.StringIO()
        argparse.ArgumentParser.parse_args = parse_and_stop
        try:
            with redirect_stderr(said):
                status = run_program(words)
            if status not in (None, 0):  # 0: --help
                raise ValueError(f"{words} is not understood, the program ends with {status}: {said.getvalue()}")
        except _Parsed:
            pass
        finally:
            argparse.ArgumentParser.parse_args = parse


def links(path: Path) -> list[str]:
    """Return the files that the links of a page name, relative to the page, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", path.read_text(encoding="utf-8")))
    return [target for target in targets if "://" not in target]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def make_reader_folder(folder: Path) -> None:
    """Link the project's files into a folder, where a reader's commands may then write."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            os.symlink(path, folder / path.name)
