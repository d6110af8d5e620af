"""What a player does: serve a program's functions, run a script, or run tests on functions that live elsewhere.

Tests and program are two players in two sandboxes with a socket between them. The tests' player sees the program's
functions and objects as mirrors (mirrors.py): what they do, the program does (program.py), and what is expected, the
comparison and the verdict stay on the tests' side. `inside` runs both in one process, where a program could forge.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import random
import socket
import sys
import types
from typing import Any

from link import Gone, Link
from program import Program, describe, run_module


# Imported once by the server, so that no program waits for them.
WARM = (
    "array", "asyncio", "base64", "bisect", "calendar", "cmath", "collections", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "math", "operator",
    "os", "pathlib", "random", "re", "statistics", "string", "textwrap", "time", "typing",
)  # fmt: skip
for _name in WARM:
    importlib.import_module(_name)


def play(job: dict[str, Any], channel: int | None, verdict: int) -> int:
    """Does the job and returns the exit code.

    `job` has a `role` and what it needs: `"program"` has the source `program`; `"tests"` has `setup`, `tests`
    (sources), `names` (that the tests may have of the program), `needed` (that it must define), `bound` (that the
    tests bind) and `modules` (that they use, with the attributes that they read of each); `"inside"` has all.
    `channel` is the socket between program and tests, `verdict` the file for the tests' outcomes: descriptors.
    """
    random.seed(0)  # the same program gets the same verdict
    if job["role"] == "program":
        Program(job["program"], socket.socket(fileno=channel)).serve()
        return 0
    outcomes = Outcomes(verdict)
    try:
        if job["role"] == "tests":
            outcomes.link = Link(socket.socket(fileno=channel))
        _run_tests(job, outcomes)
    except BaseException as error:
        outcomes.end(error)
    return 0


class Outcomes:
    """Writes, as it happens, which `assert` held and which did not: lines of JSON."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.holds: dict[int, bool] = {}  # by the assertion's number
        self.link: Link | None = None

    def held(self, number: int) -> None:
        if number not in self.holds:
            self._note(number, True)

    def broke(self, number: int) -> None:
        if self.holds.get(number, True):
            self._note(number, False, *self.why(sys.exc_info()[1]))

    def end(self, error: BaseException | None = None) -> None:
        error = (self.link and self.link.gone) or error
        self._write(["end"] if error is None else ["stopped", *self.why(error)])

    def why(self, error: BaseException | None) -> list[Any]:
        """What the tests met: `[class, message, errno]`, the program's own report where it raised."""
        if isinstance(error, Gone):
            return ["Gone", str(error), None]
        if self.link is not None and self.link.last_raised and not isinstance(error, AssertionError):
            return self.link.last_raised
        return describe(error)

    def _note(self, number: int, holds: bool, *why: Any) -> None:
        self.holds[number] = holds
        self._write([number, holds, *why])

    def _write(self, row: list[Any]) -> None:
        os.write(self.descriptor, (json.dumps(row) + "\n").encode())


class Marks(ast.NodeTransformer):
    """Makes each `assert` tell its outcome and go on: a failed one does not hide those behind it."""

    count = 0

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        held, broke = (ast.parse(f"__outcomes__.{name}({self.count})").body for name in ("held", "broke"))
        self.count += 1
        caught = ast.ExceptHandler(type=ast.Name("Exception", ast.Load()), name=None, body=broke)
        ends = ast.ExceptHandler(type=None, name=None, body=[*broke, ast.Raise()])  # what tests may catch around it
        marked = ast.Try(body=[node], handlers=[caught, ends], orelse=held, finalbody=[])
        return ast.fix_missing_locations(ast.copy_location(marked, node))


def _run_tests(job: dict[str, Any], outcomes: Outcomes) -> None:
    """Runs `setup`, then each of `tests` with marked asserts, in one namespace that begins with the program's."""
    module = types.ModuleType("__main__")  # as which they read `__name__`
    space = vars(module)
    if outcomes.link is not None:
        outcomes.link.load(job["names"], job["needed"], job["bound"], space)
    else:
        space |= run_module(types.ModuleType("program"), job["program"], "<program>") | {"__name__": "__main__"}
    sys.modules["__main__"] = module
    names = set(space)
    for name, attributes in job["modules"].items():
        standard = importlib.import_module(name)
        # A program's own `queue` is no `queue` of the standard library; but its `math` would judge.
        if name not in names or all(hasattr(standard, attribute) for attribute in attributes):
            space[name] = standard
    exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), space)
    space["__outcomes__"] = outcomes
    marks = Marks()
    for source in job["tests"]:
        exec(compile(marks.visit(ast.parse(source)), "<tests>", "exec", dont_inherit=True), space)
    outcomes.end()
