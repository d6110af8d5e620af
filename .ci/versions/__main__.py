"""`make test-versions`: the suite with other versions of the libraries, and whether we install beside other projects.

make test-versions                            all of it; writes results.json and docs/versions.md
make test-versions ARGS="image latest"        these environments; the other rows stay as they are
make test-versions ARGS="image --again"       of these environments, the tests that failed; the row says so
make test-versions ARGS="--resolve --wheel"   resolution beside others; the built wheel in a fresh environment
make test-versions ARGS=--short               a few tests on the lowest and the latest; writes nothing
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from beside import SHOWN, resolve_all
from environments import CELLS, ROOT, Missing, build
from page import write_page
from reasons import reason
from wheel import check_wheel


RESULTS = Path(__file__).with_name("results.json")
PAGE = ROOT / "docs" / "versions.md"
SHORT = ("lowest", "latest")
# Import, trainer with the equality to TRL's SFTTrainer, checkpoints.
SHORT_TESTS = ("tests/test_imports.py", "tests/test_trainer.py", "tests/test_resume.py")


def now() -> dict[str, str]:
    """The day and the commit that a result is of."""
    git = ["git", "-C", str(ROOT)]
    describe = [*git, "describe", "--always", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    # What earlier rows wrote is no change of the code.
    changed = [
        *git,
        "diff",
        "HEAD",
        "--quiet",
        "--",
        ".",
        f":!{RESULTS.relative_to(ROOT)}",
        f":!{PAGE.relative_to(ROOT)}",
    ]
    dirty = "-dirty" if subprocess.run(changed).returncode else ""
    return {"date": datetime.date.today().isoformat(), "commit": commit + dirty}


def run_tests(python: Path, tests: tuple[str, ...], workers: int) -> dict:
    """Runs pytest in an environment and counts what its report has."""
    settings = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        spread = ["--numprocesses", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", *spread, f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=ROOT, env=settings)
        if not report.exists():
            sys.exit("pytest wrote no report: see above")
        return count(ElementTree.parse(report).getroot())


def count(report: ElementTree.Element) -> dict:
    """Counts the tests of a JUnit report, names those that failed and says why others were skipped."""
    cases = list(report.iter("testcase"))
    names = {id(case): f"{case.get('classname', '').split('.')[-1]}.py::{case.get('name')}" for case in cases}
    failures = sorted({names[id(c)] for c in cases if c.find("failure") is not None or c.find("error") is not None})
    skips = Counter(skip.get("message", "") for case in cases for skip in case.iter("skipped"))
    failed, skipped = len(failures), sum(skips.values())
    passed = len(set(names.values())) - failed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "failures": failures, "skips": dict(skips)}


def run_cell(name: str, tests: tuple[str, ...], workers: int) -> dict:
    """Builds an environment and runs `tests` in it; a Python that is not here is the result's `missing`."""
    print(f"==== {name}", flush=True)
    begin = time.monotonic()
    try:
        python, versions = build(name)
    except Missing as why:
        print(f"{name} is not run: {why}", flush=True)
        return now() | {"missing": str(why)}
    print(f"built in {time.monotonic() - begin:.0f} s: " + " ".join(map("==".join, versions.items())), flush=True)
    shown = {name: versions[name] for name in ("python", *SHOWN)}
    return now() | run_tests(python, tests, workers) | {"versions": shown}


def again(name: str, workers: int) -> dict:
    """Runs those tests that failed in the row of an environment once more, and returns the row as it is then."""
    row = json.loads(RESULTS.read_text("utf-8"))["cells"][name]
    if not row["failed"]:
        return row
    new = run_cell(name, tuple(f"tests/{test}" for test in row["failures"]), workers)
    counts = {"passed": row["passed"] + new["passed"], "skipped": row["skipped"] + new["skipped"]}
    skips = dict(Counter(row["skips"]) + Counter(new["skips"]))
    return new | counts | {"skips": skips, "again": {"tests": row["failed"], "first": row["commit"]}}


def unexplained(cells: dict[str, dict]) -> list[str]:
    """The failures that have no row in `reasons.py`."""
    return [
        f"{name}: {test}"
        for name, cell in cells.items()
        for test in cell.get("failures", [])
        if not reason(name, test)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="make test-versions", description=__doc__.split("\n")[0])
    parser.add_argument("cells", nargs="*", help=f"which environments: {', '.join(CELLS)}; all by default")
    parser.add_argument(
        "--short", action="store_true", help="a few tests on the lowest and the latest; writes nothing"
    )
    parser.add_argument("--resolve", action="store_true", help="resolve us together with other projects")
    parser.add_argument("--wheel", action="store_true", help="build the wheel and run it in a fresh environment")
    parser.add_argument("--again", action="store_true", help="of the environments named, those tests that failed")
    parser.add_argument("--page", action="store_true", help="write docs/versions.md anew from results.json, no more")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest")
    args = parser.parse_args()
    if unknown := set(args.cells) - set(CELLS):
        parser.error(f"no such environment: {', '.join(unknown)}; use {', '.join(CELLS)}")
    everything = not (args.cells or args.short or args.resolve or args.wheel or args.page)
    cells = {}
    for name in SHORT if args.short else CELLS if everything else args.cells:
        tests = SHORT_TESTS if args.short else CELLS[name].tests
        cells[name] = again(name, args.workers) if args.again else run_cell(name, tests, args.workers)
        if not args.short:
            write({"cells": {name: cells[name]}})
    wheel = check_wheel() if everything or args.wheel else []
    if wheel:
        write({"wheel": now() | {"rows": wheel}})
    if everything or args.resolve:
        write({"beside": now() | {"rows": resolve_all()}})
    if args.page:
        write({})
    wrong = unexplained(cells) + [row["command"] for row in wheel if row["code"]]
    sys.exit("\n".join(["these failed, and .ci/versions/reasons.py has no reason:", *wrong]) if wrong else 0)


def write(new: dict) -> None:
    """Puts new rows in the place of older ones, in `results.json` and on the page."""
    results = json.loads(RESULTS.read_text("utf-8"))
    cells = results["cells"] | new.get("cells", {})
    results |= new | {"cells": {name: cells[name] for name in CELLS if name in cells}}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    PAGE.write_text(write_page(results), "utf-8")


if __name__ == "__main__":
    main()
