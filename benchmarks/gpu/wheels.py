"""`python -m benchmarks.gpu.wheels FOLDER`: collects what a GPU machine without a network lacks, in pieces to carry.

There torch and transformers are installed, with what they need; all else that ra3_trl needs is downloaded as wheels of
the versions installed here, for its Python. Install there: `pip install --no-index --no-deps FOLDER/piece-*/*.whl`.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from ..common import say


THERE = ("torch", "transformers")
MOST = 60_000_000  # bytes of a piece: 64 MiB travel with a call, the checkout among them
_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def needed(python: str) -> list[str]:
    """Lists `name==version` of all that the project needs and the machine lacks."""
    roots = [Requirement(line).name for line in tomllib.loads(_PYPROJECT.read_text())["project"]["dependencies"]]
    lacking = closure(roots, python) - closure(THERE, python)
    return [f"{name}=={metadata.version(name)}" for name in sorted(lacking)]


def closure(roots: Iterable[str], python: str) -> set[str]:
    """Names of distributions and of all that they require on Linux, without extras."""
    found: set[str] = set()
    left = [_plain(name) for name in roots]
    markers = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": ""}
    markers |= {"platform_system": "Linux", "platform_machine": "x86_64", "platform_python_implementation": "CPython"}
    while left:
        name = left.pop()
        if name in found:
            continue
        found.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # what only that machine has, such as CUDA's libraries
            continue
        wanted = map(Requirement, lines)
        left += [_plain(one.name) for one in wanted if one.marker is None or one.marker.evaluate(markers)]
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pieces(sizes: dict[str, int], most: int = MOST) -> list[list[str]]:
    """Shares files out into as few pieces as first-fit decreasing needs.

    >>> pieces({"a": 5, "b": 4, "c": 3, "d": 2}, most=8)
    [['a', 'c'], ['b', 'd']]
    """
    shared: list[list[str]] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sizes[name] > most:
            raise ValueError(f"{name} has {sizes[name]:,} bytes, more than a piece of {most:,} may have.")
        fits = (piece for piece in shared if sum(sizes[other] for other in piece) + sizes[name] <= most)
        piece = next(fits, None)
        if piece is None:
            shared.append([name])
        else:
            piece.append(name)
    return shared


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.wheels", description=__doc__)
    parser.add_argument("folder", type=Path, help="of the pieces; it must not exist yet")
    parser.add_argument("--python", default="3.12", help="of the machine (default: %(default)s)")
    parser.add_argument("--pip", nargs="+", default=[sys.executable, "-m", "pip"], help="the command, if not `pip`")
    args = parser.parse_args(argv)
    if args.folder.exists():
        parser.error(f"{args.folder} exists; name a new folder")
    whole = args.folder / "all"
    whole.mkdir(parents=True)
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    words = [*args.pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(whole), *platforms]
    names = needed(args.python)
    subprocess.run([*words, "--python-version", args.python, *names], check=True)
    shared = pieces({path.name: path.stat().st_size for path in whole.iterdir()})
    for i, piece in enumerate(shared):
        place = args.folder / f"piece-{i}"
        place.mkdir()
        for name in piece:
            shutil.move(whole / name, place / name)
        say(f"{place}: {len(piece)} wheels, {sum((place / name).stat().st_size for name in piece) / 1e6:.1f} MB")
    whole.rmdir()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
