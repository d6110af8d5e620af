"""Objects of the program as tests see them.

An object's mirror behaves as the object does: calls, attributes, operators, iteration, `with` and `await` are asked of
the program. A class's mirror is a class, with the same bases, so `isinstance` and `except` work. Where a class derives
from a plain one, the mirror does too, and is a value by itself: `class Big(int)` arrives as an `int` of a class `Big`.

So that no overloaded operator passes an assertion:

- objects compare with each other, as the program says, and never with what tests have: `f(2) == 4` is false for all
  of a program's objects, and `4 in f(2)` looks at what it iterates over;
- an operator with one of the tests' own values gives an object of the program again or is refused, and that object
  has no truth, length or items and is no number: else `abs(f(2) - 4) < 1e-6` could be what the program likes.

Imports nothing of this package by its name, since only this folder is there.
"""

from __future__ import annotations

import asyncio
import builtins
import itertools
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, Protocol

import standard


_ONE_BY_ONE, _AT_ONCE = 16, 512  # items of an iterator that are asked for singly, and then at most together
_COMPARISONS = "eq ne lt le gt ge"
_TELLING = "bool int float complex index round trunc floor ceil neg pos abs invert len iter reversed"
_OPERATORS = "add sub mul matmul truediv floordiv mod pow lshift rshift and or xor"
# What a value that derives from a plain one asks of the program all the same, if its class has it.
_OF_VALUES = "call enter exit repr str format missing getitem setitem delitem len iter"
_PLAIN = (int, float, complex, str, bytes, tuple, frozenset, *standard.SHARED.values())
_VALUES = (*_PLAIN, BaseException)
_MODULE = "program"


class Asks(Protocol):
    """What mirrors need of the tests' end of the socket (link.py)."""

    busy: bool
    hashes: dict[int, int]
    tainted: set[int]

    def ask(self, do: str, *arguments: Any) -> Any: ...

    def number(self, value: Any) -> int | None: ...


LINK: list[Asks] = []  # the one there is


class Number:
    """Stands for the object of a number, where there is no mirror to pass."""

    def __init__(self, number: int):
        self.number = number


def _ask(do: str, *arguments: Any) -> Any:
    return LINK[0].ask(do, *arguments)


class MirrorType(type):
    """A class of the program."""

    def __new__(cls, name: str, bases: tuple[type[Any], ...], space: dict[str, Any]) -> Any:
        if space["__module__"] != _MODULE:
            raise TypeError(f"tests derive a class from `{bases[0].__name__}` of the program; run them inside")
        return super().__new__(cls, name, bases, space)

    def __call__(cls, *positional: Any, **named: Any) -> Any:
        return _ask("call", cls, positional, tuple(named.items()))

    def __getattr__(cls, name: str) -> Any:
        return _ask("get", cls, name)

    def __setattr__(cls, name: str, value: Any) -> None:
        _ask("set", cls, name, value)

    def __dir__(cls) -> Any:
        return _ask("special", cls, "__dir__")

    @property
    def __dict__(cls) -> Any:
        return _ask("get", cls, "__dict__")

    def __bool__(cls) -> bool:
        return True

    def __iter__(cls) -> Iterator[Any]:
        return _ask("special", cls, "__iter__")

    def __len__(cls) -> int:
        return _ask("special", cls, "__len__")

    def __getitem__(cls, key: Any) -> Any:
        return _ask("special", cls, "__getitem__", key)

    def __contains__(cls, item: Any) -> bool:
        return any(item is member for member in cls)


class Mirror:
    """An object of the program."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return _ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(self, BaseException) and name.startswith("__"):
            object.__setattr__(self, name, value)
        else:
            _ask("set", self, name, value)

    def __delattr__(self, name: str) -> None:
        _ask("delete", self, name)

    def __dir__(self) -> Any:
        return _ask("special", self, "__dir__")

    def __copy__(self) -> Any:
        return _ask("copy", self, False)

    def __deepcopy__(self, memo: dict) -> Any:
        return _ask("copy", self, True)


class Object(Mirror):
    """One that is no plain value, and so can be forgotten when tests do not have it any more."""

    __slots__ = ("__weakref__",)


def mirror_class(described: tuple[Any, ...]) -> type[Any]:
    """A class like the one that `program.describe_class` describes.

    Special methods stand in the class, since Python looks for them there; all else is asked for when it is used.
    """
    name, doc, bases, special, hashed, own, kind, hints = described
    bases = tuple(b for b in bases if type(b) is MirrorType or b in _PLAIN or issubclass(b, BaseException))
    of_value = any(issubclass(base, _VALUES) for base in bases)
    space: dict[str, Any] = {"__module__": _MODULE, "__slots__": (), "__doc__": doc, "__annotations__": dict(hints)}
    if not of_value:
        space["__hash__"] = _hash if hashed else None if hashed is None else object.__hash__
        if "__len__" in special:
            space["__bool__"] = _special("__len__", "bool")
    for method in special:
        short = method.strip("_")
        if not of_value or short in _OF_VALUES.split():
            space[method] = _special(method, short)
        if "__getitem__" in special and "__iter__" not in special:
            space["__iter__"] = _items
    if of_value:  # its own methods come before those of the plain class
        plain = {attribute for base in bases if type(base) is not MirrorType for attribute in dir(base)}
        space |= {attribute: _asked_for(attribute) for attribute in plain & set(own)}
    if kind is not None and kind.startswith("types."):
        space["__class__"] = property(lambda self: standard.STANDARD[kind])  # so that `inspect` knows a function
        space |= {name: _asked_for(name) for name in ("__doc__", "__annotations__")}
    if not any(issubclass(base, Mirror) for base in bases):
        bases = (Mirror if of_value else Object, *bases)
    try:
        return MirrorType(name, bases, space)
    except TypeError:  # bases that do not go together here
        return MirrorType(name, (Object,), space)


def _asked_for(name: str) -> property:
    return property(lambda self: _ask("get", self, name))


def _hash(self: Any) -> int:
    number = LINK[0].number(self)
    hashes = LINK[0].hashes
    return hashes[number] if number in hashes else _ask("special", self, "__hash__")


def _special(name: str, short: str) -> Callable[..., Any]:
    """A special method that the program does, but for what would let it judge."""

    def ask(self: Any, *arguments: Any) -> Any:
        return _ask("special", self, name, *arguments)

    def call(self: Any, *positional: Any, **named: Any) -> Any:
        return _ask("call", self, positional, tuple(named.items()))

    def compare(self: Any, other: Any) -> Any:
        return NotImplemented if LINK[0].number(other) is None else ask(self, other)

    def contains(self: Any, item: Any) -> bool:
        return ask(self, item) if LINK[0].number(item) is not None else any(item is x or item == x for x in self)

    def tell(self: Any, *arguments: Any) -> Any:
        if LINK[0].number(self) in LINK[0].tainted:
            raise TypeError(f"`{name}` of an object that the program made of a value of the tests")
        result = ask(self, *arguments)
        return bool(result) if short == "bool" else result

    def leave(self: Any, kind: Any, error: Any, trace: Any) -> Any:
        return ask(self, *_plain_error(kind, error), None)

    special = {
        "call": call, "contains": contains, "exit": leave,
        "await": lambda self: _awaited(self).__await__(),
        "anext": lambda self: _awaited(self, following=True),
        "aexit": lambda self, kind, error, trace: ask(self, *_plain_error(kind, error), None),
    }  # fmt: skip
    if short in _COMPARISONS.split():
        return compare
    if short in _OPERATORS.split() or short[1:] in _OPERATORS.split():
        return lambda self, other: _operate(name, self, other)
    return tell if short in _TELLING.split() else special.get(short, ask)


def _items(self: Any) -> Iterator[Any]:
    """The items of an object that Python would iterate over by its numbered items."""
    if LINK[0].number(self) in LINK[0].tainted:
        raise TypeError("items of an object that the program made of a value of the tests")
    for index in itertools.count():
        try:
            item = self[index]
        except IndexError:
            return
        yield item


def _operate(name: str, left: Any, right: Any) -> Any:
    link = LINK[0]
    result = link.ask("special", left, name, right)
    mixed = link.number(right) is None or not {link.number(left), link.number(right)}.isdisjoint(link.tainted)
    if mixed and result is not NotImplemented:
        if not isinstance(result, Object) or isinstance(result, _VALUES):
            raise TypeError(f"`{name}` of a program's object and a value of the tests gives no object")
        link.tainted.add(link.number(result) or 0)
    return result


def _plain_error(kind: Any, error: Any) -> tuple[Any, Any]:
    """An exception as the program may see it: of the nearest class of Python's own, if its class is the tests'."""
    if error is None or type(kind) is MirrorType:
        return kind, error
    nearest = next(base for base in kind.__mro__ if vars(builtins).get(base.__name__) is base)
    return (nearest, error) if nearest is kind else (nearest, nearest(str(error)))


def mirror_iterator(number: int, kind: str) -> Any:
    """An iterator of the program, as lazy as that is."""
    items = _resumed(number)
    kinds = {"generator": lambda: items, "map": lambda: map(_same, items), "filter": lambda: filter(_true, items)}
    return kinds.get(kind, lambda: Items(items, kind))()


class Items:
    """An iterator of another class, as which `isinstance` takes it."""

    def __init__(self, items: Iterator[Any], kind: str):
        self.items, self.kind = items, kind

    def __iter__(self) -> Items:
        return self

    def __next__(self) -> Any:
        return next(self.items)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        return standard.STANDARD.get(f"builtins.{self.kind}", Items)


def _same(item: Any) -> Any:
    return item


def _true(item: Any) -> bool:
    return True


def _resumed(number: int) -> Generator[Any, Any, Any]:
    """Goes on in step with the program's generator; where items are only taken, some are asked for at a time."""
    how, value, taken, count = "next", None, 0, 1
    while True:
        items, ended, result = _ask("resume", Number(number), how, value, count)
        how, value = "next", None
        for item in items:
            taken += 1
            try:
                value = yield item
            except GeneratorExit:
                if not LINK[0].busy:
                    _ask("resume", Number(number), "close", None, 0)
                raise
            except BaseException as error:
                how, value = "throw", _plain_error(type(error), error)[1]
            else:
                how = "next" if value is None else "send"
            if how != "next":
                taken = 0
        if ended:
            return result
        count = min(2 * count, _AT_ONCE) if taken >= _ONE_BY_ONE else 1


async def mirror_coroutine(number: int) -> Any:
    return await _awaited(Number(number))


async def mirror_async_generator(number: int) -> AsyncIterator[Any]:
    while True:
        try:
            item = await _awaited(Number(number), following=True)
        except StopAsyncIteration:
            return
        yield item


async def _awaited(target: Any, following: bool = False) -> Any:
    """Runs what the program awaits there, beside what else has begun; the tests' own coroutines have their turns."""
    task = _ask("begin", target, following)
    try:
        while not _ask("step", task):
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        _ask("cancel", task)
        raise
    return _ask("result", task)
