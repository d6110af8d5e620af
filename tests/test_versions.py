"""`make test-versions`: what its parts count, choose and write. The environments themselves are its own to run."""

from __future__ import annotations

import importlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml


ROOT = Path(__file__).parents[1]
TOOLS = ROOT / ".ci" / "versions"


@pytest.fixture
def tools(monkeypatch):
    """The modules of `.ci/versions`, imported as its `__main__` imports them."""
    monkeypatch.syspath_prepend(str(TOOLS))
    names = ("environments", "no_cuda", "page", "reasons", "beside", "wheel")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


@pytest.fixture
def main(tools):
    return runpy.run_path(str(TOOLS / "__main__.py"), run_name="versions")


def test_the_workflow_runs_every_environment(tools):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "versions.yml").read_text("utf-8"))
    parts = workflow["jobs"]["versions"]["strategy"]["matrix"]["part"]
    assert parts == [*tools["environments"].CELLS, "--resolve", "--wheel"]


def test_the_page_is_that_of_the_results(tools):
    results = json.loads((TOOLS / "results.json").read_text("utf-8"))
    assert (ROOT / "docs" / "versions.md").read_text("utf-8") == tools["page"].write_page(results)


def test_a_report_is_counted(main):
    """Five cases: one passes, one fails, one errs in its teardown after it passed, two are skipped for one reason."""
    report = ElementTree.fromstring(
        """<testsuites><testsuite>
        <testcase classname="tests.test_a" name="test_passes"/>
        <testcase classname="tests.test_a" name="test_fails[1]"><failure message="no"/></testcase>
        <testcase classname="tests.test_b" name="test_errs"/>
        <testcase classname="tests.test_b" name="test_errs"><error message="teardown"/></testcase>
        <testcase classname="tests.test_b" name="test_skipped"><skipped message="no GPU"/></testcase>
        <testcase classname="tests.test_b" name="test_skipped_too"><skipped message="no GPU"/></testcase>
        </testsuite></testsuites>"""
    )
    assert main["count"](report) == {
        "passed": 1,
        "failed": 2,
        "skipped": 2,
        "failures": ["test_a.py::test_fails[1]", "test_b.py::test_errs"],
        "skips": {"no GPU": 2},
    }


def test_a_failure_needs_a_reason(main, tools, monkeypatch):
    rows = (("image", "test_a.py::test_*", "transformers loads it so"), ("*", "test_b.py::test_x[[]1]", "slow"))
    monkeypatch.setattr(tools["reasons"], "REASONS", rows)
    cells = {
        "image": {"failures": ["test_a.py::test_one", "test_b.py::test_x[1]", "test_b.py::test_x[2]"]},
        "latest": {"failures": ["test_a.py::test_one"]},
        "py313": {"missing": "no Python 3.13 on this machine"},
    }
    assert main["unexplained"](cells) == ["image: test_b.py::test_x[2]", "latest: test_a.py::test_one"]


def test_failed_tests_run_again(main, monkeypatch, tmp_path):
    """Of 9 passed, 2 failed: one passes the second time, one is skipped, so 10 passed, none failed, 1 + 1 skipped."""
    row = {"passed": 9, "failed": 2, "skipped": 1, "skips": {"no GPU": 1}, "commit": "abc"}
    row |= {"failures": ["test_a.py::test_one", "test_a.py::test_two"]}
    (tmp_path / "results.json").write_text(json.dumps({"cells": {"image": row}}))
    new = {"passed": 1, "failed": 0, "skipped": 1, "failures": [], "skips": {"no GPU": 1}, "commit": "def"}
    calls = []
    monkeypatch.setitem(main["again"].__globals__, "RESULTS", tmp_path / "results.json")
    monkeypatch.setitem(main["again"].__globals__, "run_cell", lambda *call: calls.append(call) or new)
    counts = {"passed": 10, "failed": 0, "skipped": 2, "failures": [], "skips": {"no GPU": 2}}
    assert main["again"]("image", 1) == counts | {"commit": "def", "again": {"tests": 2, "first": "abc"}}
    assert calls == [("image", ("tests/test_a.py::test_one", "tests/test_a.py::test_two"), 1)]


def test_the_page_says_why(tools, monkeypatch):
    monkeypatch.setattr(tools["reasons"], "REASONS", (("image", "test_a.py::*", "transformers loads it so"),))
    versions = dict.fromkeys(("python", *tools["page"].SHOWN), "1.2")
    ran = {"date": "2026-11-28", "commit": "abc", "versions": versions, "passed": 7, "failed": 2, "skipped": 1}
    ran |= {"failures": ["test_a.py::test_one", "test_b.py::test_two"], "skips": {"no GPU": 1}}
    text = tools["page"].write_page({"cells": {"image": ran, "py313": {"missing": "no Python 3.13"}}})
    assert f"| image | {' | '.join(['1.2'] * 8)} | 7 | 2 | 1 | 2026-11-28, abc |" in text
    assert "- *image*, 1 failed: transformers loads it so\n" in text
    assert "- *image*, 1 failed: no reason yet: `test_b.py::test_two`\n" in text
    assert "- *image*, 1 skipped: no GPU\n" in text
    assert "| not run: no Python 3.13 |" in text


def test_a_pinned_environment_fixes_each_package_once(tools):
    """What a cell fixes takes the place of that package's line in constraints.txt."""
    cell = tools["environments"].CELLS["trl-1.8"]
    lines = cell.constraints()
    assert "trl==1.8.*" in lines and "trl==1.16.0" not in lines
    assert len(lines) == sum("==" in line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()) + 1
    assert tools["environments"].CELLS["latest"].constraints() == []


def test_only_what_a_gpu_needs_is_left_out(tools):
    unused = tools["environments"].UNUSED
    left_out = ("nvidia-cublas==13.4.1.3", "nvidia-nccl-cu12==2.27.5", "triton==3.6.0", "cuda-toolkit==13.0.2")
    kept = ("nvidia-cuda-runtime==13.2.86", "nvidia-cuda-runtime-cu12==12.8.90", "torch==2.15.0", "numpy==2.0.0")
    assert all(unused.match(line) for line in left_out) and not any(unused.match(line) for line in kept)


@pytest.mark.skipif(not all(map(shutil.which, ("gcc", "nm", "readelf"))), reason="no gcc or binutils")
def test_a_library_without_its_cuda_loads_with_stubs(tools, tmp_path):
    """A library that needs `cublasInit` of version libcublas.so.9: loads only with the stub, which says 100."""
    lib = tmp_path / "lib" / "python3.11" / "site-packages" / "torch" / "lib"
    lib.mkdir(parents=True)

    def compile_c(source: str, name: str, *options: str) -> None:
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", name, *options]
        subprocess.run(command, input=source, text=True, check=True, cwd=lib)

    (lib / "v.map").write_text("libcublas.so.9 { cublasInit; };")
    real, name = "int cublasInit(void) { return 0; }", "libcublas.so.9"
    compile_c(real, name, f"-Wl,--version-script=v.map,-soname,{name}")
    needs = "int cublasInit(void); int ask(void) { return cublasInit(); }"
    compile_c(needs, "libtorch_cuda.so", "-L.", f"-l:{name}", "-Wl,-rpath,$ORIGIN")
    (lib / "libcublas.so.9").unlink()
    load = [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL('{lib}/libtorch_cuda.so').ask())"]
    assert subprocess.run(load, capture_output=True).returncode != 0
    tools["no_cuda"].stand_in_for_cuda(tmp_path / "bin" / "python")
    assert subprocess.run(load, capture_output=True, text=True, check=True).stdout == "100\n"
