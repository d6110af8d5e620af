"""Environments with other versions of the libraries, built with uv from PyPI and kept under `.cache/versions`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from no_cuda import stand_in_for_cuda


ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "versions"
PINS = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
# PyPI's torch asks for gigabytes of CUDA libraries that a CPU never calls; `no_cuda.py` puts stubs in their place.
UNUSED = re.compile(r"nvidia-(?!cuda-runtime)|triton==|cuda-(bindings|pathfinder|toolkit)")
RLVR = ("tests/test_rlvr.py", "tests/test_code_rewards.py")
HUB = ("tests/test_hub.py", "tests/test_card.py")


class Missing(Exception):
    """A Python that is not here; its message is the reason on the page."""


@dataclass(frozen=True)
class Cell:
    """An environment: its Python, what is fixed besides pyproject.toml, and which tests run in it (none: all)."""

    python: str
    fixed: tuple[str, ...] = ()
    pinned: bool = False  # the rest as in constraints.txt, or else the newest that pyproject.toml admits
    options: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()  # what is installed besides this project
    left_out: tuple[str, ...] = ()  # packages that these ask for and never import

    def constraints(self) -> list[str]:
        names = {re.split("[=<>]", line)[0] for line in self.fixed}
        return [*self.fixed, *(line for line in PINS if self.pinned and line.split("==")[0] not in names)]


IMAGE = ("torch==2.11.0", "transformers==5.17.0", "accelerate==1.15.0", "huggingface-hub==1.33.0", "numpy==2.5.2")
CELLS = {
    "lowest": Cell("3.11", options=("--resolution", "lowest-direct")),
    "pinned": Cell("3.11", pinned=True),
    "image": Cell("3.12", (*IMAGE, "tokenizers==0.23.2")),
    "latest": Cell("3.11"),
    "py313": Cell("3.13"),
    "trl-1.10": Cell("3.11", ("trl==1.10.*",), pinned=True, tests=RLVR),
    "trl-1.8": Cell("3.11", ("trl==1.8.*",), pinned=True, tests=RLVR),
    "hub-1.5": Cell("3.11", ("huggingface-hub==1.5.*",), tests=HUB),
}


def uv(*words: str | Path, stdin: str | None = None) -> str:
    """Runs uv, which must succeed, and returns what it prints. It sees the Pythons of pyenv, if there is one."""
    settings = dict(os.environ)
    if shutil.which("pyenv"):
        bare = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True).stdout
        settings["PYENV_VERSION"] = ":".join(bare.split())
    command = [Path(sys.executable).with_name("uv"), *words]
    return subprocess.run(command, input=stdin, env=settings, text=True, check=True, capture_output=True).stdout


def make_venv(folder: Path, python: str) -> Path:
    """Makes an empty environment and returns its Python."""
    try:
        uv("venv", "--quiet", "--clear", "--python", python, folder)
    except subprocess.CalledProcessError as error:
        raise Missing(f"no Python {python} on this machine") from error
    return folder / "bin" / "python"


def find_links() -> list[str]:
    """uv's options for the folders of wheels that pip's settings name."""
    return [word for place in os.environ.get("PIP_FIND_LINKS", "").split() for word in ("--find-links", place)]


def resolve(python: str | Path, requirements: list[str], *options: str) -> list[str]:
    """Returns the lines `name==version` that uv chooses for `requirements` and for this project of the checkout."""
    chosen = uv(
        "pip", "compile", "--quiet", "--no-annotate", "--no-header", "--no-emit-find-links", "--python", python,
        *find_links(), *options, ROOT / "pyproject.toml", "-", stdin="\n".join(requirements),
    )  # fmt: skip
    return [line for line in chosen.splitlines() if "==" in line]


def install(python: Path, chosen: list[str], left_out: tuple[str, ...] = ()) -> None:
    """Installs exactly the lines of `chosen`, less what only a GPU needs and what is to be left out."""
    needed = "\n".join(line for line in chosen if not UNUSED.match(line) and line.partition("==")[0] not in left_out)
    uv("pip", "sync", "--quiet", "--python", python, *find_links(), "-", stdin=needed)
    stand_in_for_cuda(python)


def build(name: str, cell: Cell | None = None) -> tuple[Path, dict[str, str]]:
    """Builds the environment of a cell, unless the kept one has the same versions.

    Returns:
        Its Python, and the version of each package in it.
    """
    cell, folder = cell or CELLS[name], CACHE / name
    python, stamp = folder / "bin" / "python", folder / "chosen.txt"
    fixed = CACHE / f"{name}.constraints.txt"
    fixed.parent.mkdir(parents=True, exist_ok=True)
    fixed.write_text("\n".join(cell.constraints()), "utf-8")
    if not python.exists():
        make_venv(folder, cell.python)
    chosen = resolve(python, list(cell.beside), "--extra", "dev", "--constraints", str(fixed), *cell.options)
    if not stamp.exists() or stamp.read_text("utf-8").splitlines() != chosen:
        make_venv(folder, cell.python)
        install(python, chosen, cell.left_out)
        uv("pip", "install", "--quiet", "--python", python, "--no-deps", "--editable", ROOT)
        stamp.write_text("\n".join(chosen), "utf-8")
    version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    return python, {"python": version, **dict(line.split("==") for line in chosen)}
