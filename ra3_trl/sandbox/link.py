"""The tests' end of the socket: what they ask of the program, and what they have of it.

Imports nothing of this package by its name, since only this folder is there.
"""

from __future__ import annotations

import builtins
import secrets
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import mirrors
import standard
import values
import wire


_TRACKED = 2000  # items in containers that both sides have, beyond which the oldest are forgotten
_ENDS = (StopIteration, StopAsyncIteration)  # would end `all(map(f, inputs))` as if all held
_MAY_END = {"__next__", "__anext__"}


class Gone(BaseException):
    """The program ended, or answered what was not asked. No `Exception`, so that no test can catch it by accident."""


class ProgramError(values.NotPlain):
    """The program raised what would end the tests, or tests asked for what can't be."""


class Link:
    """The tests' end of the socket: one question at a time, each answer to the question just asked."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.shared = values.Shared(1)
        self.kept: dict[int, Any] = {}  # classes, exceptions and values that stand for the program's objects
        self.alive: dict[int, weakref.ref] = {}  # others, while tests have them
        self.makers: dict[int, Callable[[], Any]] = {}  # of these
        self.numbers: dict[int, int] = {}
        self.hashes: dict[int, int] = {}
        self.tainted: set[int] = set()  # objects that the program made of the tests' own values
        self.forgotten: list[int] = []
        self.names: dict[str, Any] = {}  # of the program, as it has them
        self.space: dict[str, Any] = {}  # the tests' own
        self.bound: set[str] = set()  # names that they bind
        self.last_raised: list[Any] = []
        self.gone: Gone | None = None  # kept, since a bare `except:` of the tests would swallow it
        self.busy = False
        self.turn = threading.RLock()  # tests may have threads
        mirrors.LINK[:] = [self]

    def ask(self, do: str, *arguments: Any) -> Any:
        """The program's answer, or what it raises instead.

        Raises:
            `Gone`: if it has ended, or answers what was not asked: from then on.
            `ProgramError`: for arguments that can't be sent, and what tests must not meet.
        """
        with self.turn:
            return self._ask(do, arguments)

    def _ask(self, do: str, arguments: tuple[Any, ...]) -> Any:
        if self.gone is not None:
            raise self.gone
        self.last_raised = []
        self._forget_unused()
        request = self._plain_call(do, arguments) or values.Packer(self._refer, self.shared).message(arguments)
        self.busy = True
        try:
            value, raised = self._exchange(do, request)
        except (EOFError, OSError):
            self.gone = Gone("ended before it answered")
        except (*values.MALFORMED, MemoryError) as error:
            self.gone = Gone(f"broke the protocol: {error}")
        finally:
            self.busy = False
        if self.gone is not None:
            raise self.gone
        if raised:
            self.last_raised = raised
            may_end = do == "result" or (do == "special" and arguments[1] in _MAY_END)
            if not isinstance(value, BaseException) or (isinstance(value, _ENDS) and not may_end):
                value = ProgramError(f"{raised[0]}: {raised[1]}")
            raise value
        return value

    def _plain_call(self, do: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """The request for most calls, which is made and read faster: a function and values that are JSON's own."""
        if do != "call" or arguments[2] or self.shared.values:
            return {}
        target, positional, _ = arguments
        number = self.numbers.get(id(target))
        plain = number is not None and all(
            type(value) in values.ATOMS or values.is_small(value) for value in positional
        )
        return {"call": number, "atoms": positional} if plain else {}

    def _exchange(self, do: str, request: dict[str, Any]) -> tuple[Any, list[Any]]:
        number = secrets.token_hex(8)
        request |= {"number": number, "do": do}
        if captures := sys.stdout is not sys.__stdout__:
            request["prints"] = True
        if self.forgotten or self.shared.dropped:
            request["forget"], self.forgotten = self.forgotten + self.shared.dropped, []
            self.shared.dropped = []
            for gone in request["forget"]:
                self.makers.pop(gone, None)
        wire.send(self.connection, request)
        answer = wire.receive(self.connection)
        if not isinstance(answer, dict) or answer.pop("number", None) != number or "value" not in answer:
            raise wire.WireError("an answer that was not asked for")
        if captures and "printed" in answer:
            sys.stdout.write(str(answer.pop("printed")))
        value = values.Unpacker(self._resolve, self.shared).message(answer)
        if answer.get("names"):
            value, *names = value
            self._rename(dict(names))
        raised = [str(part)[:500] for part in answer.get("raised", ())]
        if raised and len(raised) != 3:
            raise wire.WireError("no description of an exception")
        return value, raised

    def number(self, value: Any) -> int | None:
        """The number of the program's object that `value` mirrors."""
        return self.numbers.get(id(value))

    def load(self, wanted: list[str], needed: list[str], bound: list[str], space: dict[str, Any]) -> None:
        """Runs the program and gives tests the names that they asked for: no builtin that it may have replaced."""
        names = dict(self.ask("load", tuple(wanted), tuple(needed)))
        ask_all = {name for name in names if name not in vars(builtins) and not str(name).startswith("__")}
        self.names = {name: names[name] for name in (wanted or ask_all) if name in names}
        self.space, self.bound = space, set(bound)
        space.update(self.names)

    def _rename(self, names: dict[str, Any]) -> None:
        """Takes what the program has bound anew, but names that tests bind: what they import, it can't replace."""
        for name in (self.names.keys() & names.keys()) - self.bound:
            if self.space.get(name) is self.names[name]:
                self.space[name] = names[name]
            self.names[name] = names[name]

    def _forget_unused(self) -> None:
        """Forgets containers that tests do not have any more, and the oldest of too many."""
        items, table = 0, self.shared.values
        for number in reversed([*table]):
            if number in self.kept:
                continue
            if (sys.getrefcount(table[number][1]) <= 2 or items > _TRACKED) and not self.shared.is_changed(number):
                self.shared.forget(number)
                self.forgotten.append(number)
            else:
                items += 8 + len(self.shared.states[number])

    def _refer(self, value: Any, packer: values.Packer) -> list[Any]:
        if type(value) is mirrors.Number:
            return ["object", value.number]
        if id(value) in self.numbers:
            return ["object", self.numbers[id(value)]]
        if isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools"):
            return ["made", "iterator", packer.later(values.read_iterator(value))]
        raise ProgramError(f"tests pass a {type(value).__name__}, which is no plain value; run them inside")

    def _resolve(self, node: list, unpacker: values.Unpacker) -> Any:
        """What stands for an object of the program.

        Its node says what it is: `instance` is an object, `value` and `container` derive from plain classes.
        """
        tag, number, *about = node
        if tag == "object":
            return self._at(number)
        if type(number) is not int or number >= 0 or number in self.kept or number in self.makers:
            raise wire.WireError("no number of an object")
        if len(self.kept) + len(self.makers) > values.MAX_ITEMS:
            raise wire.WireError("too many objects")
        if tag in _LAZY:
            return self._keep_while_used(number, lambda: _LAZY[tag](number))
        if tag == "iterator":
            made = mirrors.mirror_iterator(number, str(about[0]))
            if about[0] == "generator":
                return self._keep_while_used(number, lambda: made)
            return self._keep(number, made)
        if tag == "class":
            return self._keep(number, mirrors.mirror_class(unpacker.of(about[0])))
        kind = unpacker.of(about[0])
        if type(kind) is not mirrors.MirrorType:
            raise wire.WireError("no class")
        if tag == "instance":
            if about[1] is not None:
                self.hashes[number] = int(about[1])
            return self._keep_while_used(number, lambda: object.__new__(kind))
        if tag == "raised":
            return self._keep(number, values.make_error(kind, *unpacker.items(about[1])))
        if tag == "container":
            base = standard.SHARED[about[1]]
            return self._keep(number, base.__new__(kind, *(about[2][:1] if about[1] == "array" else ())))
        base, (plain,) = standard.STANDARD[f"builtins.{about[1]}"], unpacker.items(about[2])
        return self._keep(number, base.__new__(kind, *([plain] if type(plain) is base else [])))

    def _keep(self, number: int, value: Any) -> Any:
        self.kept[number] = value
        self.numbers[id(value)] = number
        return value

    def _keep_while_used(self, number: int, make: Callable[[], Any]) -> Any:
        self.makers[number] = make
        value = make()
        key = id(value)

        def forget(_: weakref.ref) -> None:
            del self.alive[number], self.numbers[key]
            self.forgotten.append(number)

        self.alive[number] = weakref.ref(value, forget)
        self.numbers[key] = number
        return value

    def _at(self, number: Any) -> Any:
        if number in self.kept:
            return self.kept[number]
        value = self.alive[number]() if number in self.alive else None
        if value is None and number in self.makers:  # it was dropped a moment ago, and the program does not know yet
            if number in self.forgotten:
                self.forgotten.remove(number)
            return self._keep_while_used(number, self.makers[number])
        if value is None:
            raise wire.WireError("no number of an object")
        return value


_LAZY: dict[str, Callable[[int], Any]] = {
    "coroutine": mirrors.mirror_coroutine,
    "async_generator": mirrors.mirror_async_generator,
}
