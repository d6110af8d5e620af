"""What a wheel and a source archive of this checkout have in them, and what importing the package loads."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")  # skips in a copy without git, such as an unpacked source archive
def archives(tmp_path_factory):
    """A wheel and a source archive, built by setuptools from a copy of the files that git has."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    source.mkdir()
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = set(listed.splitlines())
    subprocess.run(["tar", "-cf", folder / "files.tar", *sorted(files)], cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", folder / "files.tar"], cwd=source, check=True)
    code = "from setuptools import build_meta as b; b.build_wheel('..'); b.build_sdist('..')"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as opened:
        in_wheel = set(opened.namelist())
    with tarfile.open(sdist) as opened:
        in_sdist = {name.partition("/")[2] for name in opened.getnames() if "/" in name}
    return files, in_wheel, in_sdist


def test_the_wheel_has_the_package_and_nothing_else(archives):
    """Each file of the package that git has, templates and style sheets too; no tests, benchmarks or examples."""
    files, in_wheel, _ = archives
    package = {name for name in files if name.startswith("ra3_trl/")}
    assert {"ra3_trl/py.typed", "ra3_trl/hub/shared.md.jinja"} <= package
    assert {name for name in in_wheel if ".dist-info/" not in name} == package
    assert {name.split("/")[1] for name in in_wheel - package} >= {"METADATA", "entry_points.txt", "licenses"}


def test_the_source_archive_has_what_tests_and_pages_need(archives):
    files, _, in_sdist = archives
    assert files - in_sdist == set()


def test_importing_the_package_loads_nothing_heavy():
    """`ra3 --help` and Tab completion must not wait for them; `sys.modules` is that of a fresh process."""
    code = "import sys, ra3_trl, ra3_trl.cli.main; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "ra3_trl" in loaded
    assert not {"torch", "transformers", "trl", "datasets", "accelerate", "peft", "numpy"} & set(loaded)
