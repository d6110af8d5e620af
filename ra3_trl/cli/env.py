"""`ra3 env`: what a bug report needs, and no tokens."""

from __future__ import annotations

import os
import platform
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import torch

from .options import env_parser


PACKAGES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "evaluate", "huggingface-hub",
    "tokenizers", "safetensors", "numpy", "gguf", "bitsandbytes", "deepspeed",
)  # fmt: skip


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _own_version() -> str:
    """The version that is installed; of a checkout that has moved on since, what it says of itself, too."""
    installed, project = _version("ra3-trl"), Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        return installed
    there = tomllib.loads(project.read_text("utf-8")).get("project", {}).get("version", installed)
    moved = f" (the checkout is {there}: install it again, `pip install -e .`)"
    return installed + (moved if there != installed else "")


def _commit() -> str:
    """Commit of the checkout the package runs from, with a mark for local changes."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "not a checkout"
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with local changes" if changes else "")


def main(argv: list[str] | None = None) -> int:
    """Prints the environment; see `ra3 env --help`."""
    env_parser().parse_args(argv)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "ra3-trl": _own_version(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "ra3-trl commit": _commit(),
        **{package: _version(package) for package in PACKAGES},
        "CPU count": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "CUDA of torch": torch.version.cuda or "none",
        "accelerators": ", ".join(gpus) or ("MPS" if torch.backends.mps.is_available() else "none (CPU)"),
    }
    print("Please put this into your bug report:\n")
    for name, value in facts.items():
        print(f"- {name}: {value}")
    return 0
