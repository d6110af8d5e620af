"""Arguments of public doors have the types that they are annotated with; others are refused by name, in one place."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache, wraps
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


_T = TypeVar("_T")
_LISTS = (list, tuple, Sequence, Collection)
_NO_LISTS = (str, bytes, Mapping, set, frozenset)
_FIRST = 4  # elements of a list that are looked at
_WORDS = {
    str: "one text", int: "a whole number", float: "a number", bool: "`True` or `False`", type(None): "`None`",
    Callable: "a function", Mapping: "a dict", dict: "a dict",
}  # fmt: skip


_SAID = {"model": "a folder, a Hub id or a model"}  # of arguments whose types do not say what they stand for


def shown(value: Any) -> str:
    """A value in a message: short ones as they are, others by their type."""
    plain = value is None or isinstance(value, (str, bool, int, float, list, tuple, dict))
    return text if plain and len(text := repr(value)) <= 60 else f"a {type(value).__name__}"


def check_bounds(name: str, value: float, least: float, most: float = math.inf, above: bool = False) -> None:
    """Refuses a number out of bounds; `least` is out of them itself if the value must be `above` it.

    Raises:
        `ValueError`: with name, value and bounds.
    """
    if (value > least if above else value >= least) and value <= most:  # NaN fails too
        return
    lower = "above" if above else "at least"
    upper = "" if most == math.inf else f" and at most {most}"
    raise ValueError(f"`{name}` is {value}; it must be {lower} {least}{upper}.")


def check_kind(name: str, value: Any, hint: Any) -> None:
    """Refuses a value that is not of an annotated type.

    Raises:
        `ValueError`: with name, value and what it may be.
    """
    if not predicate(hint)(value):
        wanted = _SAID.get(name) or " or ".join(dict.fromkeys(words(hint)))
        raise ValueError(f"`{name}` is {shown(value)}; give {wanted}.")


@cache
def predicate(hint: Any) -> Callable[[Any], bool]:
    """Makes the test whether a value is of a type. Any list will do for a tuple, a whole number for a float; of long
    lists the first elements count. Made once a type, since records are made by the thousand.

    >>> predicate(tuple[int, ...])([1, 2]), predicate(tuple[int, ...])("12"), predicate(int)(True), predicate(float)(1)
    (True, False, False, True)
    """
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is Any:
        return lambda value: True
    if origin in (Union, types.UnionType):
        tests = [predicate(one) for one in inner]
        return lambda value: any(test(value) for test in tests)
    if origin is Literal:
        return lambda value: value in inner
    if origin in (int, float):
        kind = Integral if origin is int else Real
        return lambda value: isinstance(value, kind) and not isinstance(value, bool)
    if origin is Callable:
        return callable
    if origin in _LISTS:
        each = predicate(inner[0]) if len(inner) == 1 or inner[1:] == (...,) else None

        def is_list(value: Any) -> bool:
            several = isinstance(value, Collection) and not isinstance(value, _NO_LISTS)
            plain = each is not None and isinstance(value, (list, tuple))
            return several and (not plain or all(map(each, value[:_FIRST])))

        return is_list
    if origin is dict:
        return lambda value: isinstance(value, Mapping)
    if origin is type and inner:
        return lambda value: isinstance(value, type) and issubclass(value, inner)
    return (lambda value: isinstance(value, origin)) if isinstance(origin, type) else lambda value: True


def words(hint: Any) -> list[str]:
    """What may be given, in words.

    >>> words(float | None), words(tuple[int, ...])
    (['a number', '`None`'], ['a list (a whole number each)'])
    """
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return [word for one in inner for word in words(one)]
    if origin is Literal:
        return [repr(one) for one in inner]
    if origin in _LISTS:
        return [f"a list ({' or '.join(words(inner[0]))} each)" if inner and inner[0] is not Any else "a list"]
    if origin is type and inner:
        return [f"a class of `{inner[0].__name__}`"]
    return [_WORDS.get(origin) or f"a `{origin.__name__ if isinstance(origin, type) else origin}`"]


def checked(door: _T) -> _T:
    """Makes a function, a dataclass or the public methods of a class refuse arguments of other types than annotated,
    with a `ValueError` that names the argument."""
    if not isinstance(door, type):
        return _checked_function(door)  # type: ignore[arg-type, return-value]
    if is_dataclass(door):
        door.__init__ = _checked_function(door.__init__, door)  # type: ignore[misc]
    for name, member in list(vars(door).items()):
        inner = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        public = not name.startswith("_") or (name in ("__init__", "__call__") and not is_dataclass(door))
        if public and inspect.isfunction(inner):
            made = _checked_function(inner)
            setattr(door, name, type(member)(made) if inner is not member else made)
    return door


def _checked_function(function: Callable[..., Any], annotated: Any = None) -> Callable[..., Any]:
    """`function` with its arguments checked; the types stand in `annotated`, by default its own annotations."""
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    single = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}

    @cache  # when it is first called: names in annotations may be of modules that are not loaded yet
    def hints() -> dict[str, Any]:
        return {n: hint for n, hint in get_type_hints(annotated or function).items() if n in single}

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name, value in (*zip(positional, args, strict=False), *kwargs.items()):
            if name in hints():
                check_kind(name, value, hints()[name])
        return function(*args, **kwargs)

    return call
