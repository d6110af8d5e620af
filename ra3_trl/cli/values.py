"""What a value of an option may be, by the source of its field; said before torch is imported, in the words of the
command. Whatever is in doubt is left to the command."""

from __future__ import annotations

import ast
import math
from typing import Any

from ..kinds import check_bounds
from .sources import SourceField, read_constant


_KINDS = {"int": int, "float": float, "int | None": int, "float | None": float}
_BOOLS = ("bool", "bool | None")
_BOOL_WORDS = ("yes", "no", "true", "false", "t", "f", "y", "n", "1", "0")
_LEAST = read_constant("config_fields.py", "_LEAST")  # of transformers' own fields


def without_none(word: str | None) -> str | None:
    """The word, unless it stands for `None`."""
    return None if word is None or word.lower() in ("none", "null") else word


def is_scalar(field: SourceField) -> bool:
    """Whether an option takes one word at most."""
    return field.hint in (*_KINDS, *_BOOLS, "str", "str | None")


def check_word(command: str, field: SourceField, word: str | None) -> None:
    """Refuses the word behind an option, `None` where there is none.

    Raises:
        `ValueError`: as the command would, naming option and value.
    """
    name, kind = field.name, _KINDS.get(field.hint)
    if word is None or word.startswith("--"):
        if kind is not None:
            raise ValueError(f"argument --{name}: expected one argument (see `ra3 {command} --help`)")
        return
    if without_none(word) is None:
        return
    if field.hint in _BOOLS:
        if word.lower() not in _BOOL_WORDS:
            raise ValueError(f"argument --{name}: invalid bool value: {word!r} (see `ra3 {command} --help`)")
    elif field.hint.startswith("Literal["):
        _check_choice(command, name, word, ast.literal_eval(f"({field.hint[len('Literal[') : -1]},)"))
    elif kind is not None:
        try:
            value = kind(word)
        except ValueError:
            raise ValueError(
                f"argument --{name}: invalid {kind.__name__} value: {word!r} (see `ra3 {command} --help`)"
            ) from None
        check_value(field, value)
    elif field.hint in ("str", "str | None"):
        check_value(field, word)


def _check_choice(command: str, name: str, word: str, choices: tuple[Any, ...]) -> None:
    if all(isinstance(choice, str) for choice in choices) and word not in choices:
        raise ValueError(f"argument --{name}: invalid choice: {word!r} (see `ra3 {command} --help`)")


def check_value(field: SourceField, value: Any) -> None:
    """Refuses a value that is out of a field's bounds or none of its choices.

    Raises:
        `ValueError`: as `config_fields.check_fields`.
    """
    if field.choices is not None and value not in field.choices:
        raise ValueError(f"`{field.name}` is {value!r}; use one of {', '.join(map(repr, field.choices))}.")
    if isinstance(value, str):
        return
    bounds = {"least": _LEAST[field.name]} if field.name in _LEAST else dict(field.bounds)
    endless = bounds.pop("infinite", False) and value == math.inf
    if "least" in bounds and not endless:
        check_bounds(field.name, value, **bounds)
