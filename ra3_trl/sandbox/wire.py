"""Plain values over a socket: the only thing that program, tests and host exchange.

Imports nothing of this package, since it runs inside the sandbox too. A value is sent as JSON: `None`, booleans,
strings, floats, small integers and lists as they are, everything else as an object of one tag, `(1, 2)` as
`{"tuple": [1, 2]}`. A subclass arrives as its base class, so a foreign `__eq__` never crosses; an object that is not
plain arrives as a number that stands for it, `{"object": 3}`.
"""

from __future__ import annotations

import builtins
import json
import socket
import struct
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import islice
from typing import Any


MAX_FRAME = 8 * 2**20  # bytes
MAX_DEPTH = 60
BROKEN = "sandbox: "  # begins what a player writes instead of outcomes where it could not begin
MAX_ITEMS = 200_000  # of an iterator, which may have no end
_HEADER = struct.Struct("!I")
_VIEWS = {"keys": type({}.keys()), "values": type({}.values()), "items": type({}.items())}
_SEQUENCES: dict[str, type[Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}
_TYPES: dict[str, type[Any]] = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
# How a subclass is read as its base: by the base's own methods, since it may have overridden them.
_AS_BASE: dict[type[Any], Callable[[Any], Any]] = {
    int: int.__pos__,
    float: float.__pos__,
    str: str.__str__,
    list: lambda value: [*list.__iter__(value)],
    dict: lambda value: dict(dict.items(value)),
}


class WireError(ValueError):
    """What came is not what was agreed on, or too much of it."""


def pack(value: Any, refer: Callable[[Any], int], depth: int = 0) -> Any:
    """Turns `value`, inside of `depth` containers, into JSON's types; `refer` gives the number that stands for an
    object that is not plain, or raises.

    Raises:
        `WireError`: if it is nested too deeply or an iterator gives too much.
    """
    if depth > MAX_DEPTH:
        raise WireError(f"a value is nested more than {MAX_DEPTH} deep")
    # `type(value)`, since a program may lie by `__class__`.
    kind: type[Any] = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if abs(value) < 2**53 else {"int": hex(value)}

    def many(items: Any) -> list:
        return [pack(item, refer, depth + 1) for item in items]

    if kind is list:
        return many(value)
    if kind is dict:
        return {"dict": [many(pair) for pair in value.items()]}
    for tag, base in _SEQUENCES.items():
        if issubclass(kind, base):
            return {tag: many(base.__iter__(value))}
    for base, read in _AS_BASE.items():
        if issubclass(kind, base):
            return pack(read(value), refer, depth)
    for base in (bytes, bytearray):
        if issubclass(kind, base):
            return {base.__name__: base.hex(value)}
    if issubclass(kind, complex):
        plain = complex.__pos__(value)
        return {"complex": [plain.real, plain.imag]}
    if kind is type and value in _TYPES.values():
        return {"type": value.__name__}
    for tag, view in _VIEWS.items():
        if kind is view:
            return {tag: many(value)}
    if kind is range:
        return {"range": many((value.start, value.stop, value.step))}
    if kind is array:
        return {"array": [value.typecode, many(value)]}
    if kind in (Decimal, Fraction):
        return {kind.__name__: str(value)}
    if issubclass(kind, Iterator):
        items = list(islice(value, MAX_ITEMS + 1))
        if len(items) > MAX_ITEMS:
            raise WireError(f"an iterator gives more than {MAX_ITEMS} items")
        return {"iterator": many(items)}
    return {"object": refer(value)}


def unpack(data: Any, resolve: Callable[[int], Any]) -> Any:
    """Makes the value of which `pack` made `data`; `resolve` gives what stands here for the object of a number.

    Raises:
        `WireError`: for anything that `pack` does not make.
    """
    if isinstance(data, list):
        return [unpack(item, resolve) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise WireError("a value without a tag")
    ((tag, content),) = data.items()
    try:
        return _unpack_tagged(tag, content, resolve)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        raise WireError(f"no {tag[:20]}: {str(error)[:200]}") from error


def _unpack_tagged(tag: str, content: Any, resolve: Callable[[int], Any]) -> Any:
    if tag == "object":
        return resolve(content)
    if tag == "int":
        return int(content, 16)
    if tag in ("bytes", "bytearray"):
        return _TYPES[tag].fromhex(content)
    if tag == "type":
        return _TYPES[content]
    if tag in ("Decimal", "Fraction"):
        return {"Decimal": Decimal, "Fraction": Fraction}[tag](content)
    items = [unpack(item, resolve) for item in content]
    if tag in _SEQUENCES:
        return _SEQUENCES[tag](items)
    makers = {
        "dict": lambda: dict(items),
        "keys": lambda: dict.fromkeys(items).keys(),
        "values": lambda: dict(enumerate(items)).values(),
        "items": lambda: dict(items).items(),
        "complex": lambda: complex(*items),
        "range": lambda: range(*items),
        "array": lambda: array(*items),
        "iterator": lambda: iter(items),
    }
    return makers[tag]()


def send(connection: socket.socket, message: Any, descriptors: tuple[int, ...] = ()) -> None:
    """Sends one message, and open file descriptors along with it; a `WireError` if it is longer than `MAX_FRAME`."""
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME:
        raise WireError(f"a message of {len(body)} bytes, more than {MAX_FRAME}")
    header = _HEADER.pack(len(body))
    if descriptors:
        socket.send_fds(connection, [header], descriptors)
        header = b""
    connection.sendall(header + body)


def receive(connection: socket.socket, descriptors: list[int] | None = None) -> Any:
    """Waits for the next message; descriptors that came with it are appended to `descriptors`.

    Raises:
        `EOFError`: if the other side has closed.
        `WireError`: if it is too long or no JSON.
    """
    if descriptors is None:
        header = connection.recv(_HEADER.size)
    else:
        header, received, _, _ = socket.recv_fds(connection, _HEADER.size, 4)
        descriptors += received
    if not header:
        raise EOFError
    (size,) = _HEADER.unpack(header + _exactly(connection, _HEADER.size - len(header)))
    if size > MAX_FRAME:
        raise WireError(f"a message of {size} bytes, more than {MAX_FRAME}")
    body = _exactly(connection, size)
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError(f"no JSON: {str(error)[:200]}") from error


def _exactly(connection: socket.socket, size: int) -> bytes:
    chunks = []
    while size:
        chunk = connection.recv(min(size, 2**16))
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
