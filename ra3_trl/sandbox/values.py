"""Values as JSON: what program and tests exchange.

Imports nothing of this package, since it runs inside the sandbox. A value is sent as JSON: `None`, booleans,
strings, floats and small integers as they are, everything else as the number of a node, `[0]`, and the nodes beside
it: `(1, [2])` is `{"value": [0], "nodes": [["tuple", [1, [1]]], ["list", 1, [2]]]}`. So values may be as deep as they
like, and hold each other. A container that can change has a number, by which both sides know it from then on: what
one of them does to it is sent along with the next message. Objects that are not plain are nodes of `refer`'s making.
"""

from __future__ import annotations

import importlib
import itertools
import operator
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any


standard = importlib.import_module(".standard" if __package__ else "standard", __package__)
MAX_DEPTH = 10_000
MAX_ITEMS = 200_000  # of an iterator, which may have no end
ATOMS = {type(None), bool, str, float}
MALFORMED = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

_OF_VALUES = {"int", "bytes", "shared", "standard", "made", "error", "object", *standard.FIXED, *standard.SHARED}


class WireError(ValueError):
    """What came is not what was agreed on, or too much of it."""


class NotPlain(Exception):
    """A value that can't be sent."""


class Shared:
    """The containers that both sides have, by their numbers: one side's go up from 1, the other's down from -1."""

    def __init__(self, step: int = 1):
        self.step, self.last = step, 0
        self.values: dict[int, tuple[str, Any]] = {}
        self.numbers: dict[int, int] = {}
        self.states: dict[int, list[Any]] = {}  # as both sides know them
        self.dropped: list[int] = []  # numbers that the other side must be told to forget

    def add(self, tag: str, value: Any, number: int | None = None) -> int:
        if number is None:
            self.last += self.step
            number = self.last
        elif number in self.values or not isinstance(number, int):
            raise WireError("a number that is taken")
        self.values[number] = tag, value
        self.numbers[id(value)] = number
        return number

    def forget(self, number: int) -> None:
        _, value = self.values.pop(number)
        self.states.pop(number, None)
        del self.numbers[id(value)]

    def note(self, number: int) -> None:
        """Takes the container as it is for what the other side has."""
        self.states[number] = standard.items_of(*self.values[number])

    def is_changed(self, number: int) -> bool:
        """Whether a container holds other things than the other side knows."""
        before, now = self.states[number], standard.items_of(*self.values[number])
        return len(now) != len(before) or (not all(map(operator.is_, now, before)) and not _same(now, before))


def _same(now: list[Any], before: list[Any]) -> bool:
    """Whether what was read anew, and so is never the same object, is equal: bytes and numbers."""
    kinds = (int, float, bytes, str)
    return all(
        a is b or (type(a) is type(b) and type(a) in kinds and a == b) for a, b in zip(now, before, strict=True)
    )


class Packer:
    """Turns values into JSON's types and nodes. `refer` gives the node of an object that is not plain, or raises."""

    def __init__(self, refer: Callable[[Any, Packer], list], shared: Shared):
        self.refer, self.shared = refer, shared
        self.nodes: list[Any] = []
        self.added: list[int] = []
        self.todo: deque[tuple[list[Any], Any, int]] = deque()

    def element(self, value: Any, depth: int = 0) -> Any:
        """What stands for `value`."""
        top = self._enter(value, depth)
        while self.todo:
            content, values, depth = self.todo.popleft()
            content.extend(self._enter(item, depth) for item in values)
        return top

    def message(self, value: Any) -> dict[str, Any]:
        """`value`, all nodes, and what changed since the last message; nothing is sent if it can't be packed."""
        if (type(value) in ATOMS or is_small(value)) and not self.shared.values:
            return {"value": value}
        try:
            message = {"value": self.element(value)}
        except BaseException:
            self._undo(0, 0)
            raise
        changes = []
        for number in [number for number in self.shared.states if self.shared.is_changed(number)]:
            nodes, added = len(self.nodes), len(self.added)
            try:
                changes.append([number, *self._change(number)])
            except NotPlain:  # it holds what can't be sent: from now on each side has its own
                self._undo(nodes, added)
                self.shared.forget(number)
                self.shared.dropped.append(number)
        if changes:
            message["changes"] = changes
        for number in (*self.added, *(number for number, *_ in changes)):
            self.shared.note(number)
        if self.nodes:
            message["nodes"] = self.nodes
        return message

    def _undo(self, nodes: int, added: int) -> None:
        """Goes back to so many nodes and containers."""
        for number in self.added[added:]:
            self.shared.forget(number)
        del self.nodes[nodes:], self.added[added:]
        self.todo.clear()

    def _change(self, number: int) -> tuple[int, list[Any]]:
        """How many items of a container are as they were, which is of use where lists grow, and those behind them."""
        tag, value = self.shared.values[number]
        now, before = standard.items_of(tag, value), self.shared.states[number]
        start = 0
        if tag == "list":
            pairs = enumerate(zip(now, before, strict=False))
            start = next((i for i, (a, b) in pairs if a is not b), min(len(now), len(before)))
        return start, self.content(now[start:])

    def content(self, items: Any) -> list[Any]:
        """What stands for each item; for more than a few, and whatever they hold, without recursion."""
        content: list[Any] = []
        self.todo.append((content, items, 0))
        self.element(None)
        return content

    def _enter(self, value: Any, depth: int) -> Any:
        kind: type[Any] = type(value)  # since a program may lie by `__class__`
        if kind in ATOMS or is_small(value):
            return value
        if depth > MAX_DEPTH:
            raise WireError(f"a value is nested more than {MAX_DEPTH} deep")
        index = len(self.nodes)
        self.nodes.append(None)
        self.nodes[index] = self._node(kind, value, depth + 1)
        return [index]

    def _node(self, kind: type[Any], value: Any, depth: int) -> list[Any]:
        if kind is int:
            return ["int", hex(value)]
        if kind is bytes:
            return ["bytes", value.hex()]
        if id(value) in self.shared.numbers:
            return ["shared", self.shared.numbers[id(value)]]
        if id(value) in standard.NAMES and standard.STANDARD[standard.NAMES[id(value)]] is value:
            return ["standard", standard.NAMES[id(value)]]
        if kind in standard.SHARED_TAGS:
            return self.share(standard.SHARED_TAGS[kind], value, depth)
        content: list[Any] = []
        if kind in (tuple, frozenset):
            self.todo.append((content, value, depth))
            return [kind.__name__, content]
        if kind in standard.MADE:
            self.todo.append((content, standard.MADE[kind][0](value), depth))
            return ["made", standard.MADE_NAMES[kind], content]
        if issubclass(kind, BaseException) and id(kind) in standard.NAMES:
            self.todo.append((content, (args_of(value), *details_of(value)), depth))
            return ["error", standard.NAMES[id(kind)], content]
        return self.refer(value, self)

    def later(self, items: Any) -> list[Any]:
        """What stands for each item, from when all else is packed: `refer` needs no recursion for what it holds."""
        content: list[Any] = []
        self.todo.append((content, items, 1))
        return content

    def share(self, tag: str, value: Any, depth: int = 1, number: int | None = None) -> list[Any]:
        """The node of a container that the other side does not have yet."""
        content: list[Any] = []
        number = self.shared.add(tag, value, number)
        self.added.append(number)
        self.todo.append((content, standard.items_of(tag, value), depth))
        return [tag, number, content]


def is_small(value: Any) -> bool:
    """Whether JSON's readers keep it: an integer that a float holds too."""
    return type(value) is int and -(2**53) < value < 2**53


def args_of(error: BaseException) -> tuple[Any, ...]:
    """An exception's arguments; of a group in a container that can be made full at once."""
    return (error.message, error.exceptions) if isinstance(error, BaseExceptionGroup) else error.args


def details_of(error: BaseException) -> list[tuple[str, Any]]:
    """Names and values of what an exception holds besides its arguments."""
    details = [(name, item) for name, item in vars(error).items() if isinstance(name, str)]
    if isinstance(error, NameError | AttributeError):
        details.append(("name", error.name))
    if isinstance(error, OSError) and error.filename is not None:
        details.append(("filename", str(error.filename)))
    if error.__cause__ is not None:
        details.append(("__cause__", error.__cause__))
    return details


class Unpacker:
    """Makes the values of which a `Packer` made a message. `resolve` makes what `refer`'s nodes stand for."""

    def __init__(self, resolve: Callable[[list, Unpacker], Any], shared: Shared):
        self.resolve, self.shared = resolve, shared
        self.nodes: list[Any] = []
        self.values: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}  # the nodes of objects that are new, by their numbers

    def message(self, message: dict[str, Any]) -> Any:
        """The value of a message, after containers that both sides have are as it says.

        Raises:
            `WireError`: for anything that `Packer.message` does not make.
        """
        if message.keys() == {"value"} and type(message["value"]) in (*ATOMS, int):
            return message["value"]
        try:
            self.nodes = message.get("nodes", [])
            changes = message.get("changes", [])
            self.numbers = {node[1]: i for i, node in enumerate(self.nodes) if node[0] not in _OF_VALUES}
            filled = self._containers()
            for index in reversed(range(len(self.nodes))):
                self._value(index)
            for tag, value, content in filled.values():
                standard.refill(tag, value, self.items(content))
            for number, start, content in changes:
                before = self.shared.states[number][:start]
                standard.refill(*self.shared.values[number], before + self.items(content))
                self.shared.note(number)
            for number in filled:
                self.shared.note(number)
            return self.of(message["value"])
        except WireError:
            raise
        except MALFORMED as error:
            raise WireError(f"{type(error).__name__}: {str(error)[:200]}") from error

    def _containers(self) -> dict[int, tuple[str, Any, list[Any]]]:
        """Containers that can change come first, empty: anything may hold them, and they anything."""
        made = {}
        for index, node in enumerate(self.nodes):
            tag, number, *about = node
            if tag in standard.SHARED or tag == "container":
                content = about[-1]
                if tag == "container":  # of a class that derives from one
                    tag, value = about[1], self._value(index)
                else:
                    value = self.values[index] = standard.empty(tag, content)
                if tag == "defaultdict":
                    object.__setattr__(value, "default_factory", self.of(content[0]))
                elif tag == "deque":
                    deque.__init__(value, (), content[0])
                self.shared.add(tag, value, number)
                made[number] = tag, value, content
        return made

    def items(self, content: list[Any]) -> list[Any]:
        return [self.of(element) for element in content]

    def of(self, element: Any) -> Any:
        """The value that an element stands for."""
        if isinstance(element, list):
            (index,) = element
            return self._value(index)
        if isinstance(element, dict):
            raise WireError("no element")
        return element

    def _value(self, index: int) -> Any:
        if index not in self.values:
            if not 0 <= index < len(self.nodes):
                raise WireError("no node")
            self.values[index] = self._made(self.nodes[index])
        return self.values[index]

    def _made(self, node: list[Any]) -> Any:
        tag, content, *rest = node
        if tag == "int":
            return int(content, 16)
        if tag == "bytes":
            return bytes.fromhex(content)
        if tag == "shared":
            return self.shared.values[content][1]
        if tag == "standard":
            return standard.STANDARD[content]
        if tag in standard.FIXED:
            return standard.FIXED[tag](self.items(content))
        if tag == "made":
            return standard.MAKERS[content](*self.items(rest[0]))
        if tag == "object" and content in self.numbers:
            return self._value(self.numbers[content])
        if tag == "error":
            return make_error(standard.STANDARD[content], *self.items(rest[0]))
        return self.resolve(node, self)


def make_error(kind: type[Any], args: Any, *details: Any) -> BaseException:
    """An exception as it was raised: of `kind`, with its arguments and what else it holds."""
    if not issubclass(kind, BaseException) or type(args) is not tuple:
        raise WireError("no exception")
    error = kind.__new__(kind, *args)
    if id(kind) in standard.NAMES:
        error.__init__(*args)
    object.__setattr__(error, "args", args)  # a class of the program's would ask it
    for name, value in details:
        object.__setattr__(error, name, value)
    return error


def read_iterator(items: Iterator[Any]) -> list[Any]:
    """What an iterator gives; a `WireError` if it is too much."""
    read = list(itertools.islice(items, MAX_ITEMS + 1))
    if len(read) > MAX_ITEMS:
        raise WireError(f"an iterator gives more than {MAX_ITEMS} items")
    return read
