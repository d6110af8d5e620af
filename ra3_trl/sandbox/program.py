"""The program's side: it runs the program and answers what tests ask of it.

Objects that are not plain stay here; the tests have a number for each, with what they must know of its class
(mirrors.py). Imports nothing of this package by its name, since only this folder is there.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import copy
import linecache
import os
import random
import socket
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import standard
import values
import wire


_RECURSION = sys.getrecursionlimit()
_STEP = 0.002  # seconds that coroutines run before the tests' own have their turn
_BASES = (bool, int, float, complex, str, bytes, tuple, frozenset)
# Special methods of classes that tests use as Python does; comparisons only between objects of the program.
_SPECIAL = (
    "call len iter next reversed getitem setitem delitem contains missing repr str format enter exit "
    "await aiter anext aenter aexit eq ne lt le gt ge "
    "bool int float complex index round trunc floor ceil neg pos abs invert"
)
_OPERATORS = "add sub mul matmul truediv floordiv mod pow lshift rshift and or xor"
_NAMES = [f"__{name}__" for name in _SPECIAL.split()]
_NAMES += [f"__{side}{name}__" for side in ("", "r", "i") for name in _OPERATORS.split()]


def run_module(module: types.ModuleType, source: str, file: str) -> dict[str, Any]:
    """Runs a program as a module of its own, and returns its names."""
    sys.modules[module.__name__] = module
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.setrecursionlimit(_RECURSION + _depth())  # as deep as a program of its own may go
    exec(compile(source, file, "exec", dont_inherit=True), vars(module))
    return vars(module)


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
        run_module(module, source, module.__file__)
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
        self.own_pid, self.pid, self.end = os.getpid, os.getpid(), os._exit  # programs may replace those of `os`
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}
        self.last = 0
        self.shared = values.Shared(-1)
        self.names: dict[str, Any] = {}
        self.seen: dict[str, Any] = {}  # names that tests use, as they have them
        self.printed = 0  # bytes
        self.loop: asyncio.AbstractEventLoop | None = None

    def serve(self) -> None:
        while True:
            try:
                request = wire.receive(self.connection)
            except EOFError:
                return
            try:
                self._send(request, self._message(self._answer(request)) | self._printed(request))
            except BaseException as error:
                answer = {"raised": describe(error), **self._raised(error)}
                with contextlib.suppress(OSError):  # the file that it prints to may be full
                    answer |= self._printed(request)
                    traceback.print_exc(limit=-3)
                self._send(request, answer, error)

    def _send(self, request: dict[str, Any], answer: dict[str, Any], error: BaseException | None = None) -> None:
        """Sends an answer; a process that the program forked ends instead, since its parent answers, or nobody."""
        if self.own_pid() != self.pid:
            code = error.code if isinstance(error, SystemExit) else error
            self.end(code if isinstance(code, int) else code is not None)
        wire.send(self.connection, {"number": request["number"], **answer})

    def _message(self, value: Any) -> dict[str, Any]:
        """An answer, with the names that the program has bound anew since the last."""
        changed = {n: self.names[n] for n, seen in self.seen.items() if self.names.get(n, seen) is not seen}
        self.seen |= changed
        packer = values.Packer(self.refer, self.shared)
        if changed:
            return packer.message((value, *changed.items())) | {"names": True}
        return packer.message(value)

    def _printed(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the program has printed since the request, for tests that catch it."""
        sys.stdout.flush()
        if "prints" not in request:
            return {}
        size = min(os.fstat(1).st_size - self.printed, 2**20)
        return {"printed": os.pread(1, size, self.printed).decode(errors="replace")}

    def _raised(self, error: BaseException) -> dict[str, Any]:
        try:
            return self._message(error)
        except Exception:  # whatever the program's own class does: tests get the description alone
            return {"value": None}

    def _answer(self, request: dict[str, Any]) -> Any:
        for number in request.get("forget", ()):
            self._forget(number)
        if "prints" in request:
            self.printed = os.fstat(1).st_size
        if "call" in request:
            return self.objects[request["call"]](*request["atoms"])
        arguments = values.Unpacker(self._resolve, self.shared).message(request)
        return getattr(self, f"do_{request['do']}")(*arguments)

    def do_load(self, wanted: tuple[str, ...], needed: tuple[str, ...]) -> tuple[Any, ...]:
        self.names = names = run_module(types.ModuleType("program"), self.source, "<program>")
        if missing := [name for name in needed if name not in names]:
            raise NameError(f"the program has no `{missing[0]}`")
        self.seen = {name: names[name] for name in wanted or names if name in names and not name.startswith("__")}
        return tuple(self.seen.items())

    def do_call(self, target: Any, positional: tuple, named: tuple) -> Any:
        return target(*positional, **dict(named))

    def do_get(self, target: Any, name: str) -> Any:
        return getattr(target, name)

    def do_set(self, target: Any, name: str, value: Any) -> None:
        setattr(target, name, value)

    def do_delete(self, target: Any, name: str) -> None:
        delattr(target, name)

    def do_special(self, target: Any, name: str, *arguments: Any) -> Any:
        method = getattr(type(target), name, None)
        if method is None and name == "__getitem__" and isinstance(target, type):
            return target[arguments[0]]
        if method is None:
            raise TypeError(f"{type(target).__name__!r} object does not support `{name}`")
        return method(target, *arguments)

    def do_copy(self, target: Any, deep: bool) -> Any:
        return (copy.deepcopy if deep else copy.copy)(target)

    def do_resume(self, target: Any, how: str, value: Any, count: int) -> tuple[tuple, bool, Any]:
        """Up to `count` items of an iterator, whether it has ended, and what it has returned."""
        items: list[Any] = []
        try:
            if how == "close":
                target.close()
                return (), True, None
            if how == "throw":
                items.append(target.throw(value))
            elif how == "send":
                items.append(target.send(value))
            while len(items) < count:
                items.append(next(target))
        except StopIteration as end:
            return tuple(items), True, end.value
        return tuple(items), False, None

    def do_begin(self, target: Any, following: bool) -> Any:
        """Begins to wait for an object, or for the item that follows in it, beside what is waited for already."""
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self.loop)
        return self.loop.create_task(_waited_for(target, following))

    def do_step(self, task: Any) -> bool:
        """Runs what has begun for a moment, and tells whether `task` has ended."""
        if self.loop is not None and not task.done():
            self.loop.run_until_complete(asyncio.wait([task], timeout=_STEP))
        return task.done()

    def do_result(self, task: Any) -> Any:
        return task.result()

    def do_cancel(self, task: Any) -> None:
        task.cancel()

    def _resolve(self, node: list, _: values.Unpacker) -> Any:
        return self.objects[node[1]]

    def _forget(self, number: int) -> None:
        if number in self.objects:
            del self.numbers[id(self.objects.pop(number))]
        if number in self.shared.values:
            self.shared.forget(number)

    def refer(self, value: Any, packer: values.Packer) -> list[Any]:
        """The node of an object, which is kept, so that its id stays its own."""
        if id(value) in self.numbers:
            return ["object", self.numbers[id(value)]]
        self.shared.last -= 1
        number = self.shared.last
        self.numbers[id(value)], self.objects[number] = number, value
        kind = type(value)
        if issubclass(kind, type):
            return ["class", number, packer.element(describe_class(value))]
        if kind in (types.CoroutineType, types.AsyncGeneratorType):
            return [kind.__name__, number, None]
        if issubclass(kind, Iterator) and kind.__module__ in ("builtins", "itertools"):
            return ["iterator", number, kind.__name__]
        about = [number, self._class_of(kind, packer)]
        if issubclass(kind, BaseException):
            return ["raised", *about, packer.later([values.args_of(value), *values.details_of(value)])]
        for tag, base in standard.SHARED.items():
            if issubclass(kind, base):  # it has the same number as a container and as an object
                return ["container", *about, *packer.share(tag, value, number=number)[::2]]
        for base in _BASES:
            if issubclass(kind, base):
                return ["value", *about, base.__name__, packer.later([_as(base, value)])]
        return ["instance", *about, _hash(value)]

    def _class_of(self, kind: type[Any], packer: values.Packer) -> Any:
        """What stands for an object's class: by its description too where tests have the class by its name."""
        if id(kind) not in standard.NAMES:
            return packer.element(kind)
        packer.nodes.append(None)
        index = len(packer.nodes) - 1
        packer.nodes[index] = self.refer(kind, packer)
        return [index]


async def _waited_for(target: Any, following: bool) -> Any:
    return await (anext(target) if following else target)


def _as(base: type[Any], value: Any) -> Any:
    """`value` as one of its base class, read by the base's own methods."""
    if base in (tuple, frozenset):
        return base(base.__iter__(value))
    readers: dict[type[Any], Callable[[Any], Any]] = {
        int: int.__pos__, float: float.__pos__, complex: complex.__pos__, str: str.__str__, bytes: bytes.__bytes__,
    }  # fmt: skip
    return readers[base](value)


def _hash(value: Any) -> int | None:
    if type(value).__hash__ in (None, object.__hash__):
        return None
    try:
        return hash(value)
    except Exception:  # of the program's own method
        return None


def describe_class(kind: type[Any]) -> tuple[Any, ...]:
    """What tests know of a class: name, documentation, base classes, special methods, whether its objects have a hash
    of their own or none (`None`), names of its own, its name in the standard library, annotations."""
    plain = {*_BASES, *standard.SHARED.values()}
    own = {n for base in kind.__mro__ if base.__module__ != "builtins" and base not in plain for n in vars(base)}
    named = standard.NAMES.get(id(kind))
    special = tuple(name for name in _NAMES if name in own or (named and hasattr(kind, name)))
    hashed = None if kind.__hash__ is None else kind.__hash__ is not object.__hash__
    bases = tuple(base for base in kind.__bases__ if base is not object)
    doc = kind.__doc__ if isinstance(kind.__doc__, str) else None
    hints = vars(kind).get("__annotations__")
    hints = tuple(hints.items()) if isinstance(hints, dict) else ()
    return kind.__name__, doc, bases, special, hashed, tuple(n for n in own if not n.startswith("__")), named, hints


def describe(error: BaseException | None) -> list[Any]:
    """`[nearest class of Python's own, message, errno]` of what a program raised."""
    kind = next((k.__name__ for k in type(error).__mro__ if vars(builtins).get(k.__name__) is k), "BaseException")
    try:
        text = str(error) if kind == type(error).__name__ else f"{type(error).__name__}: {error}"
    except BaseException:  # the program's own method: what is raised must be known all the same
        text = type(error).__name__
    return [kind, text[:500], error.errno if isinstance(error, OSError) else None]
