"""docs/versions.md, from what `results.json` has."""

from __future__ import annotations

from collections import Counter

from beside import SHOWN, name_of
from reasons import reason


HEAD = """# Versions

Written by `make test-versions`, which builds these environments with uv from PyPI and runs the suite in each, on CPU,
without the slow tests. PyPI's CUDA builds of torch run there with stubs in place of NVIDIA's libraries
(`.ci/versions/no_cuda.py`). *lowest* has the lowest version of each direct dependency that `pyproject.toml` admits,
*pinned* those of `constraints.txt`, *latest* and *py313* the newest. *trl-1.10*, *trl-1.8* and *hub-1.5* run the tests
of RLVR and of the Hub alone; *trl-...* with the other packages as pinned.
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def _suite(cells: dict[str, dict]) -> str:
    rows, notes = [], []
    for name, cell in cells.items():
        if why := cell.get("missing"):
            rows.append([name, *[""] * (len(SHOWN) + 4), f"not run: {why}"])
            continue
        versions = [cell["versions"][package] for package in ("python", *SHOWN)]
        counts = [str(cell[what]) for what in ("passed", "failed", "skipped")]
        rows.append([name, *versions, *counts, f"{cell['date']}, {cell['commit']}"])
        whys = Counter(reason(name, test) or f"no reason yet: `{test}`" for test in cell["failures"])
        notes += [f"- *{name}*, {count} failed: {why}" for why, count in whys.items()]
        notes += [f"- *{name}*: {cell['stopped']}"] if "stopped" in cell else []
        if run := cell.get("again"):
            notes += [f"- *{name}*: {run['tests']} tests that failed at {run['first']} ran again by themselves"]
        notes += [f"- *{name}*, {count} skipped: {why}" for why, count in cell["skips"].items()]
    head = ["", "Python", *SHOWN, "passed", "failed", "skipped", "run"]
    return f"\n## The suite\n\n{_table(head, rows)}\n" + "\n".join(notes) + "\n"


def _beside(found: dict) -> str:
    rows = []
    for row in found["rows"]:
        versions = row.get("versions", {})
        with_version = [f"{name} {versions[name]}" if versions else name for name in map(name_of, row["beside"])]
        shown = [versions.get(name, "") for name in SHOWN]
        rows.append([", ".join(with_version), *shown, "no: " + row["conflict"] if "conflict" in row else "yes"])
    text = (
        f"What uv chose for Python 3.12 on {found['date']} at {found['commit']}: resolved, neither installed nor run."
        " It may choose an older version of a project to make it fit."
    )
    return f"\n## Beside other projects\n\n{text}\n\n{_table(['beside', *SHOWN, 'goes together'], rows)}"


def _wheel(found: dict) -> str:
    rows = [
        [f"`{row['command']}`", "passed" if row["code"] == 0 else f"failed: {row['said']}"] for row in found["rows"]
    ]
    text = (
        f"Built, and installed without the checkout and without constraints, on {found['date']} at {found['commit']}."
    )
    return f"\n## The wheel\n\n{text}\n\n{_table(['command', ''], rows)}"


def write_page(results: dict) -> str:
    """Returns the page's text."""
    parts = [_suite(results["cells"])]
    parts += [_beside(results["beside"])] if "beside" in results else []
    parts += [_wheel(results["wheel"])] if "wheel" in results else []
    return HEAD + "".join(parts)
