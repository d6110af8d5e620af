"""A program's calls: the assertions of its text, its doctests, the tests of its row."""

from __future__ import annotations

import ast
import doctest
from collections.abc import Iterator, Mapping
from typing import Any


COLUMNS = ("tests", "test_list")  # of a row: Python sources with assertions; MBPP's have the second name
SETUP = "test_setup_code"
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)


def parse(text: str) -> ast.Module | None:
    """Parses a text; `None` for what is no Python."""
    try:
        return ast.parse(text)
    except _UNREADABLE:
        return None


def calls_of(text: str, row: Mapping[str, Any]) -> list[str]:
    """Lists what calls a program's functions besides what runs with it: its test functions, doctests, the tests of its
    row. Each is Python that runs in the program's namespace, where what was expected is asserted."""
    setup = row.get(SETUP)
    before = f"{setup}\n" if isinstance(setup, str) and setup.strip() else ""
    tree = parse(text) or ast.Module([], [])
    doctests = _doctests(tree) if ">>>" in text else ()
    return [*_test_functions(tree), *doctests, *(before + test for test in _tests(row))]


def _test_functions(tree: ast.Module) -> Iterator[str]:
    """Calls of the functions that pytest would call without fixtures."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            arguments = node.args
            if not (arguments.posonlyargs or arguments.args or arguments.kwonlyargs or arguments.vararg):
                yield f"{node.name}()"


def _tests(row: Mapping[str, Any]) -> Iterator[str]:
    for column in COLUMNS:
        tests = row.get(column)
        for test in [tests] if isinstance(tests, str) else tests if isinstance(tests, list | tuple) else ():
            if isinstance(test, str) and test.strip():
                yield test


def _doctests(tree: ast.Module) -> Iterator[str]:
    kinds = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in ast.walk(tree):
        docstring = ast.get_docstring(node) if isinstance(node, kinds) else None
        try:
            examples = doctest.DocTestParser().get_examples(docstring or "")
        except ValueError:  # no doctest, though it looks like one
            continue
        for example in examples:
            expected = example.want.strip()
            value = parse(example.source)
            if value is None:
                continue
            if expected and len(value.body) == 1 and isinstance(value.body[0], ast.Expr):
                yield f"assert repr({ast.unparse(value.body[0])}) == {expected!r}"
            else:  # what comes before
                yield example.source


def answers_of(tree: ast.Module) -> dict[int, str]:
    """Finds what each assertion states, by the line where it begins: `assert f(2) == 4` states `4`, `assert f(2)`
    states `True`. Left out is what compares otherwise."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found[node.lineno] = _answer(node.test)
    return {line: answer for line, answer in found.items() if answer is not None}


def _answer(test: ast.expr) -> str | None:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return "False"
    if isinstance(test, ast.Call | ast.Name):
        return "True"
    if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Eq | ast.Is):
        return None
    sides = [test.left, test.comparators[0]]
    stated = [s for s in sides if not any(isinstance(n, ast.Call | ast.Name) for n in ast.walk(s))]
    try:
        return ast.unparse(stated[0]) if stated else None
    except _UNREADABLE:
        return None
