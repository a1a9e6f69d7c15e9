"""What `benchmarks/gpu.py` knows of its machine, and the JSON and the page that it keeps. It imports no library that may be too old."""

from __future__ import annotations

import configparser
import importlib.metadata
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from data_scripts.files import render, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
STATES = ("done", "failed", "skipped")
ALSO = ("triton", "bitsandbytes", "deepspeed", "flash-attn")  # whose versions matter where they are installed
# What nvidia-smi says of the card, by the names that it takes.
SMI = {"driver": "driver_version", "power_limit": "power.limit", "highest_clock": "clocks.max.sm"}


@dataclass(frozen=True)
class Figure:
    """A measured number, or the reason why there is none."""

    what: str
    value: float | None
    unit: str = ""
    reason: str = ""


@dataclass
class Result:
    """What became of a part: its state, the reason of one that is not done, and its figures."""

    name: str
    title: str
    state: str = "skipped"
    reason: str = "not reached"
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)


def declared() -> list[Requirement]:
    """Return what setup.cfg requires to run and to test; nothing where the project is installed without it."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config.get("options", "install_requires", fallback="").splitlines()
    lines += config.get("options.extras_require", "test", fallback="").splitlines()
    return [Requirement(line) for line in map(str.strip, lines) if line and not line.startswith("#")]


def versions() -> tuple[dict[str, str], list[str]]:
    """Return the versions of what is declared, and sentences about those outside their range."""
    found, notes = {"python": platform.python_version()}, []
    for requirement in declared():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            notes.append(
                f"{requirement.name} is not installed: the tests and parts that need it are named below as left out."
            )
            continue
        found[requirement.name] = version
        if not requirement.specifier.contains(version, prereleases=True):
            notes.append(
                f"{requirement.name} {version} is outside {requirement.specifier}: what needs more is named below."
            )
    for name in ALSO:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found, notes


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return what a reader of the figures has to know of the device and of how it computes."""
    if device.type != "cuda":
        return {"device": f"a CPU ({platform.machine()})"}
    facts = torch.cuda.get_device_properties(device)
    return {
        "device": facts.name, "devices": torch.cuda.device_count(), "memory_gib": round(facts.total_memory / 2**30, 1),
        "capability": f"{facts.major}.{facts.minor}", "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "flash_attention": torch.backends.cuda.is_flash_attention_available(),
        "tf32_in_matrix_products": torch.backends.cuda.matmul.allow_tf32,
        "tf32_in_convolutions": torch.backends.cudnn.allow_tf32, **smi("GPU-" + str(getattr(facts, "uuid", "")).removeprefix("GPU-")),
    }  # fmt: skip


def smi(card: str) -> dict[str, str]:
    """Return what nvidia-smi says of a card by its UUID (it numbers also those that CUDA_VISIBLE_DEVICES hides), else nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [f"--query-gpu={','.join(SMI.values())}", "--format=csv,noheader", f"--id={card}"]
    try:
        run = subprocess.run([program, *query], capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return {}
    return dict(zip(SMI, (value.strip() for value in run.stdout.strip().split(","))))


def page(facts: dict[str, Any], results: list[Result]) -> str:
    """Return the page."""
    parts = [asdict(result) for result in results]
    for part in parts:
        for figure in part["figures"]:
            value = figure["value"]
            figure["shown"] = "" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    machine = {name: value for name, value in facts.items() if name not in ("date", "dry_run", "versions", "notes")}
    template = Path(__file__).resolve().parent / "templates/gpu.html.jinja"
    return render(template, facts=facts, machine=machine, parts=parts)


def write(output: Path, facts: dict[str, Any], results: list[Result]) -> None:
    """Write gpu.json and gpu.html, each whole or not at all."""
    write_json(output / "gpu.json", {**facts, "parts": [asdict(result) for result in results]})
    write_text(output / "gpu.html", page(facts, results))
