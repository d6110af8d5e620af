"""What a player does: serve a program's functions, run a script, or run tests on functions that live elsewhere.

Tests and program are two players in two sandboxes with a socket between them. The tests' player sees the program's
functions as [`Remote`] objects: a call sends plain values and gets plain values back, and what is expected, the
comparison and the verdict stay on the tests' side. `inside` runs both in one process, where a program could forge.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import json
import linecache
import os
import random
import secrets
import signal
import socket
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import wire


# Imported once by the server, so that no program waits for them.
WARM = (
    "array", "base64", "bisect", "calendar", "cmath", "collections", "copy", "datetime", "decimal", "enum",
    "fractions", "functools", "hashlib", "heapq", "io", "itertools", "json", "math", "operator", "os", "random", "re",
    "statistics", "string", "textwrap", "time", "typing",
)  # fmt: skip
for _name in WARM:
    importlib.import_module(_name)
_RECURSION = sys.getrecursionlimit()


def play(job: dict[str, Any], channel: int | None, verdict: int) -> int:
    """Does the job and returns the exit code.

    `job` has a `role` and what it needs: `"program"` has the source `program`; `"tests"` has `setup`, `tests`
    (sources), `names` (that the tests may have of the program), `needed` (that it must define) and `modules` (that the
    tests use, with the attributes that they read of each); `"inside"` has all.
    `channel` is the socket between program and tests, `verdict` the file for the tests' outcomes: descriptors.
    """
    random.seed(0)  # the same program gets the same verdict
    if job["role"] == "program":
        Program(job["program"], socket.socket(fileno=channel)).serve()
        return 0
    outcomes = Outcomes(verdict)
    try:
        if job["role"] == "tests":
            outcomes.link = link = Link(socket.socket(fileno=channel))
            names = _asked_for(job["names"], link.ask("load", job["names"], job["needed"]))
        else:
            names = _run_module(types.ModuleType("program"), job["program"], "<program>")
        _run_tests(job, outcomes, names)
    except BaseException as error:
        outcomes.end(error)
    return 0


def _run_module(module: types.ModuleType, source: str, file: str) -> dict[str, Any]:
    """Runs a program as a module of its own, and returns its names."""
    sys.modules[module.__name__] = module
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.setrecursionlimit(_RECURSION + _depth())  # as deep as a program of its own may go
    exec(compile(source, file, "exec", dont_inherit=True), vars(module))
    return vars(module)


def _asked_for(wanted: list[str], names: Any) -> dict[str, Any]:
    """Of the names that a program gives, those that tests asked for: no builtin that it may have replaced."""
    if type(names) is not dict:
        raise wire.WireError("no names")
    return {
        name: value
        for name, value in names.items()
        if (name in wanted if wanted else name not in vars(builtins) and not str(name).startswith("__"))
    }


def _depth() -> int:
    frame, depth = sys._getframe(), 0
    while frame := frame.f_back:
        depth += 1
    return depth


def run_script(source: str, isolated: bool) -> Any:
    """Runs a program as Python runs a script, and returns what it exits by: `None`, a number or a text."""
    random.seed(0)
    module = types.ModuleType("__main__")
    module.__file__ = str(Path.cwd() / "program.py")
    if isolated:  # in a folder of its own
        Path(module.__file__).write_text(source, encoding="utf-8")
    vars(module).update(__builtins__=builtins, __annotations__={}, __cached__=None)
    sys.argv = [module.__file__]
    sys.path.insert(0, str(Path.cwd()))
    try:
        _run_module(module, source, module.__file__)
    except SystemExit as error:
        return error.code
    except BaseException as error:
        for _ in range(2):  # the frames of this file
            error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return None


class Program:
    """Answers requests for a program's functions; each answer carries its request's number."""

    def __init__(self, source: str, connection: socket.socket):
        self.source, self.connection = source, connection
        self.own_pid, self.pid = os.getpid, os.getpid()  # programs may replace `os.getpid`
        self.objects: list[Any] = []
        self.numbers: dict[int, int] = {}

    def serve(self) -> None:
        while True:
            try:
                request = wire.receive(self.connection)
            except EOFError:
                return
            number = request["number"]
            try:
                value = wire.pack(self._answer(request), self._refer)
                sys.stdout.flush()
                if self.own_pid() != self.pid:  # forked by the program: its parent answers, or nobody
                    os.kill(self.own_pid(), signal.SIGKILL)
                wire.send(self.connection, {"number": number, "value": value})
            except BaseException as error:
                with contextlib.suppress(OSError):  # the file that it prints to may be full
                    traceback.print_exc(limit=-3)
                    sys.stdout.flush()
                wire.send(self.connection, {"number": number, "raised": describe(error)})

    def _answer(self, request: dict[str, Any]) -> Any:
        arguments = wire.unpack(request["arguments"], self.objects.__getitem__)
        match request["do"]:
            case "load":
                names = _run_module(types.ModuleType("program"), self.source, "<program>")
                wanted, needed = arguments
                if missing := [name for name in needed if name not in names]:
                    raise NameError(f"the program has no `{missing[0]}`")
                return {name: names[name] for name in wanted or names if name in names and not name.startswith("__")}
            case "call":
                target, positional, named = arguments
                return target(*positional, **named)
            case "get":
                return getattr(*arguments)
            case "set":
                return setattr(*arguments)

    def _refer(self, value: Any) -> int:
        """The number that stands for an object here, which is kept, so that its id stays its own."""
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self.numbers[id(value)]


class Gone(BaseException):
    """The program ended, or answered what was not asked. No `Exception`, so that no test can catch it by accident."""


class ProgramError(Exception):
    """The program raised an exception that is not one of Python's own."""


class Remote:
    """An object of the program, seen from the tests: calls and public attributes; equal to nothing but itself."""

    __slots__ = ("_link", "_number")

    def __init__(self, link: Link, number: int):
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._link.ask("call", self, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._link.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("set", self, name, value)


class Link:
    """The tests' end of the socket: one question at a time, each answer to the question just asked."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.remotes: dict[int, Remote] = {}
        self.last_raised: list[str] = []
        self.gone: Gone | None = None  # kept, since a bare `except:` of the tests would swallow it

    def ask(self, do: str, *arguments: Any) -> Any:
        if self.gone is not None:
            raise self.gone
        self.last_raised = []
        number = secrets.token_hex(8)
        packed = wire.pack(arguments, self._refer)["tuple"]
        try:
            wire.send(self.connection, {"number": number, "do": do, "arguments": packed})
            answer = wire.receive(self.connection)
            if not isinstance(answer, dict) or answer.get("number") != number or len(answer) != 2:
                raise wire.WireError("an answer that was not asked for")
            if "raised" not in answer:
                return wire.unpack(answer["value"], self._resolve)
            name, text, code = (str(part)[:500] for part in answer["raised"])
        except (EOFError, OSError):
            self.gone = Gone("ended before it answered")
        except (wire.WireError, RecursionError, MemoryError, TypeError, ValueError, KeyError) as error:
            self.gone = Gone(f"broke the protocol: {error}")
        else:
            self.last_raised = [name, text, code]
            raise _exception(name, text)
        raise self.gone

    def _refer(self, value: Any) -> int:
        if type(value) is not Remote:
            raise ProgramError(f"tests pass a {type(value).__name__}, which is no plain value; run them inside")
        return value._number

    def _resolve(self, number: int) -> Remote:
        if not isinstance(number, int) or len(self.remotes) > wire.MAX_ITEMS:
            raise wire.WireError("no number of an object")
        return self.remotes.setdefault(number, Remote(self, number))


def _exception(name: str, text: str) -> Exception:
    """What tests see of an exception of the program: Python's own class, so that they can expect it."""
    kind = vars(builtins).get(name)
    ends = (StopIteration, StopAsyncIteration)  # would end `all(map(f, inputs))` as if all held
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ends):
        with contextlib.suppress(TypeError):  # some take more than a message
            return kind(text)
    return ProgramError(f"{name}: {text}")


def describe(error: BaseException | None) -> list[Any]:
    """`[nearest class of Python's own, message, errno]` of what a program raised."""
    kind = next((k.__name__ for k in type(error).__mro__ if vars(builtins).get(k.__name__) is k), "BaseException")
    text = str(error) if kind == type(error).__name__ else f"{type(error).__name__}: {error}"
    return [kind, text[:500], error.errno if isinstance(error, OSError) else None]


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
        marked = ast.Try(body=[node], handlers=[caught], orelse=held, finalbody=[])
        return ast.fix_missing_locations(ast.copy_location(marked, node))


def _run_tests(job: dict[str, Any], outcomes: Outcomes, names: dict[str, Any]) -> None:
    """Runs `setup`, then each of `tests` with marked asserts, in one namespace that starts with `names`."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")  # as which they read `__name__`
    space = vars(module)
    space.update(names)
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
