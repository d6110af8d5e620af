"""What crosses between program and tests as it is: plain values, and what the standard library has by a name.

Imports nothing of this package, since it runs inside the sandbox.
"""

from __future__ import annotations

import builtins
import collections
import collections.abc
import dataclasses
import datetime
import decimal
import fractions
import ipaddress
import itertools
import math
import operator
import pathlib
import re
import types
import uuid
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any


# Classes and functions that cross by their names: none that does more than to compute a value.
_FUNCTIONS = (
    "abs all any ascii bin callable chr divmod format hash hex isinstance issubclass iter len max min next oct ord "
    "pow repr reversed round sorted sum"
)
_MODULES = (collections, collections.abc, datetime, decimal, fractions, ipaddress, itertools, math, operator, pathlib)
STANDARD: dict[str, Any] = {
    **{f"builtins.{name}": getattr(builtins, name) for name in _FUNCTIONS.split()},
    **{f"builtins.{name}": kind for name, kind in vars(builtins).items() if isinstance(kind, type)},
    **{f"types.{name}": kind for name, kind in vars(types).items() if isinstance(kind, type)},
    **{f"{m.__name__}.{name}": v for m in _MODULES for name, v in vars(m).items() if name[0] != "_" and callable(v)},
    **{f"{kind.__module__}.{kind.__name__}": kind for kind in (array, re.Pattern, re.Match, uuid.UUID)},
    # By which `dataclasses.fields`, and so `asdict`, know fields of classes in another process.
    **{f"dataclasses.{name}": vars(dataclasses)[name] for name in ("MISSING", "_FIELD", "_FIELD_INITVAR")},
    "Ellipsis": ...,
    "NotImplemented": NotImplemented,
}
NAMES = {id(value): name for name, value in reversed(STANDARD.items())}

# How plain values that do not change are read, and made again of what was read.
MADE: dict[type[Any], tuple[Callable[[Any], tuple], Callable[..., Any]]] = {
    complex: (lambda v: (v.real, v.imag), complex),
    range: (lambda v: (v.start, v.stop, v.step), range),
    slice: (lambda v: (v.start, v.stop, v.step), slice),
    memoryview: (lambda v: (v.tobytes(),), memoryview),
    decimal.Decimal: (lambda v: (str(v),), decimal.Decimal),
    fractions.Fraction: (lambda v: (v.numerator, v.denominator), fractions.Fraction),
    datetime.date: (lambda v: (v.year, v.month, v.day), datetime.date),
    datetime.datetime: (
        lambda v: (v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.tzinfo, v.fold),
        lambda *parts: datetime.datetime(*parts[:8], fold=parts[8]),
    ),
    datetime.time: (
        lambda v: (v.hour, v.minute, v.second, v.microsecond, v.tzinfo, v.fold),
        lambda *parts: datetime.time(*parts[:5], fold=parts[5]),
    ),
    datetime.timedelta: (lambda v: (v.days, v.seconds, v.microseconds), datetime.timedelta),
    datetime.timezone: (lambda v: (v.utcoffset(None), v.tzname(None)), datetime.timezone),
    uuid.UUID: (lambda v: (v.int,), lambda number: uuid.UUID(int=number)),
    re.Pattern: (lambda v: (v.pattern, v.flags), re.compile),
    types.SimpleNamespace: (lambda v: tuple(vars(v).items()), lambda *names: types.SimpleNamespace(**dict(names))),
    collections.ChainMap: (lambda v: tuple(v.maps), collections.ChainMap),
    collections.UserDict: (lambda v: tuple(v.data.items()), lambda *pairs: collections.UserDict(pairs)),
    collections.UserList: (lambda v: tuple(v.data), lambda *items: collections.UserList(items)),
    type({}.keys()): (lambda v: (dict.fromkeys(v),), dict.keys),
    type({}.values()): (lambda v: (dict(enumerate(v)),), dict.values),
    type({}.items()): (lambda v: (dict(v),), dict.items),
    **{
        kind: (lambda v: (str(v),), kind)
        for module in (pathlib, ipaddress)
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__name__.startswith(("Pure", "Posix", "IPv4", "IPv6"))
    },
}
MAKERS: dict[str, Callable[..., Any]] = {"iterator": lambda *items: iter(items)} | {
    NAMES.get(id(kind), kind.__name__): make for kind, (_, make) in MADE.items()
}
MADE_NAMES = {kind: NAMES.get(id(kind), kind.__name__) for kind in MADE}
FIXED: dict[str, type[Any]] = {"tuple": tuple, "frozenset": frozenset}
# Containers that change, a class before those that it derives from.
SHARED: dict[str, type[Any]] = {
    "OrderedDict": OrderedDict, "Counter": Counter, "defaultdict": defaultdict, "dict": dict, "list": list,
    "set": set, "deque": deque, "bytearray": bytearray, "array": array,
}  # fmt: skip
SHARED_TAGS = {kind: tag for tag, kind in SHARED.items()}


def items_of(tag: str, value: Any) -> list[Any]:
    """What a container holds, read by the base's own methods, since a class may have overridden them."""
    base = SHARED.get(tag) or FIXED[tag]
    if issubclass(base, dict):
        items = [part for pair in base.items(value) for part in pair]
        return [value.default_factory, *items] if tag == "defaultdict" else items
    if tag == "bytearray":
        return [bytes(value)]
    if tag == "array":
        return [value.typecode, *value]
    return [*([value.maxlen] if tag == "deque" else []), *base.__iter__(value)]


def refill(tag: str, value: Any, items: list[Any]) -> None:
    """Makes a container hold what `items_of` read."""
    base = SHARED[tag]
    if tag in ("defaultdict", "deque"):
        items = items[1:]
    if issubclass(base, dict):
        pairs = list(zip(items[::2], items[1::2], strict=True))
        dict.clear(value) if base is not OrderedDict else OrderedDict.clear(value)
        for key, item in pairs:
            (OrderedDict if base is OrderedDict else dict).__setitem__(value, key, item)
    elif tag == "bytearray":
        bytearray.__setitem__(value, slice(None), items[0])
    elif tag in ("list", "array"):
        base.__setitem__(value, slice(None), items if tag == "list" else array(*_typed(items)))
    else:
        base.clear(value)
        (base.update if base is set else base.extend)(value, items)


def _typed(items: list[Any]) -> tuple[str, list[Any]]:
    return items[0], items[1:]


def empty(tag: str, items: list[Any]) -> Any:
    if tag == "array":
        return array(items[0])
    if tag == "deque":
        return deque((), items[0])
    return SHARED[tag]()
