"""A table of programs and tests, each judged by plain Python and by the sandbox: do they agree?

The table is text beside this file. A paragraph with a line of dashes is a program and, below the dashes, its first
test; the paragraphs behind it are further tests. Each line of a paragraph of nothing but `assert` is a test of its
own. In `scripts.txt`, `<` begins a line that a script reads, `>` one that it should print. Some programs are wrong,
and some tests: what counts is that both say the same. `documented.txt` holds what docs/rewards.md says to differ.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_trl.sandbox import Judge, Problem


FOLDER = Path(__file__).parent
TABLES = (
    "values",
    "arguments",
    "exceptions",
    "iterators",
    "classes",
    "derived",
    "async",
    "names",
    "programs",
    "scripts",
)
DOCUMENTED = "documented"


@dataclass(frozen=True)
class Pair:
    """A program, with a `test` of its names, or with what it reads and should print (`case`)."""

    program: str
    test: str = ""
    case: tuple[str, str] | None = None

    @property
    def problem(self) -> Problem:
        return Problem(tests=(self.test,)) if self.case is None else Problem(cases=(self.case,))

    @property
    def row(self) -> tuple[str, ...]:
        """What plain.py reads."""
        return (self.program, self.test) if self.case is None else (self.program, *self.case)


def read_pairs(name: str) -> list[Pair]:
    """Reads one file of the table."""
    text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    paragraphs = [part.strip("\n") + "\n" for part in text.split("\n\n") if part.strip()][1:]  # behind the title
    return list(_scripts(paragraphs) if name == "scripts" else _tested(paragraphs))


def _tested(paragraphs: Sequence[str]) -> Iterator[Pair]:
    program = ""
    for paragraph in paragraphs:
        above, dashes, test = paragraph.rpartition("-----\n")
        program = above if dashes else program
        lines = test.splitlines()
        for one in lines if all(line.startswith("assert ") for line in lines) else [test]:
            yield Pair(program, one)


def _scripts(paragraphs: Sequence[str]) -> Iterator[Pair]:
    for paragraph in paragraphs:
        lines = paragraph.splitlines()
        program = "".join(f"{line}\n" for line in lines if line[:2] not in ("< ", "> "))
        read: list[str] = []
        printed: list[str] = []
        for mark, line in [(line[:2], line[2:]) for line in lines if line[:2] in ("< ", "> ")] + [("< ", "")]:
            if mark == "< " and printed:
                yield Pair(program, case=("".join(f"{r}\n" for r in read), "\n".join(printed)))
                read, printed = [], []
            (read if mark == "< " else printed).append(line)


def plain_verdicts(pairs: Sequence[Pair]) -> list[bool]:
    """Which pairs pass in plain Python."""
    rows = json.dumps([pair.row for pair in pairs])
    command = [sys.executable, "-I", str(FOLDER / "plain.py")]
    return json.loads(subprocess.run(command, input=rows, capture_output=True, text=True, check=True).stdout)


def compare(judge: Judge, pairs: Sequence[Pair]) -> list[tuple[Pair, bool, str]]:
    """The pairs on which plain Python and the sandbox differ: whether plain Python passes them, and the verdict."""
    plain = plain_verdicts(pairs)
    results = [judge.submit(pair.problem, pair.program) for pair in pairs]
    verdicts = [f"{result.result().verdict}: {result.result().detail}" for result in results]
    rows = zip(pairs, plain, verdicts, strict=True)
    return [(pair, passed, verdict) for pair, passed, verdict in rows if passed != verdict.startswith("passed")]


def measure_fidelity(judge: Judge) -> dict[str, Any]:
    """How many pairs there are, on how many both agree, and on which not; apart from those documented to differ."""
    pairs = [pair for name in TABLES for pair in read_pairs(name)]
    differing = compare(judge, pairs)
    for pair, passed, verdict in differing:
        print(
            f"plain Python {'passes' if passed else 'fails'}, {verdict}\n{pair.test or pair.program}", file=sys.stderr
        )
    documented = read_pairs(DOCUMENTED)
    return {
        "fidelity_pairs": len(pairs),
        "fidelity_agreed": len(pairs) - len(differing),
        "fidelity_documented": len(documented),
        "fidelity_documented_differing": len(compare(judge, documented)),
    }
