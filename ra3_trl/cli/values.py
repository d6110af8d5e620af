"""Values of options that hold a mapping or a list, or may be `None`: the same from a flag and from YAML.

`--model_init_kwargs '{"subfolder": "x"}'`, `--lora_target_modules q_proj v_proj` (or `'["q_proj", "v_proj"]'`),
`--eval_documents none`.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin


_NONE = ("none", "null")
_PATHS = ("accelerator_config", "deepspeed", "fsdp_config")  # a file may stand for the mapping
_OWN_NONE = ("report_to",)  # `none` is a value of its own there


def _parts(hint: Any) -> tuple[Any, ...]:
    """`list[int] | None` -> `(list[int], NoneType)`; `list[int]` -> `(list[int],)`."""
    return (hint,) if get_origin(hint) in (list, dict) or not get_args(hint) else get_args(hint)


def is_mapping(hint: Any) -> bool:
    """Whether a field of this type holds a mapping."""
    return any(part is dict or get_origin(part) is dict for part in _parts(hint))


def is_list(hint: Any) -> bool:
    """Whether a field of this type may hold a list."""
    return any(get_origin(part) is list for part in _parts(hint))


def takes_none(hint: Any) -> bool:
    """Whether `None` may be given."""
    return NoneType in _parts(hint)


def element_of(hint: Any) -> Any:
    """Type of a list's elements."""
    (element,) = get_args(next(part for part in _parts(hint) if get_origin(part) is list))
    return element


def read_value(name: str, hint: Any, value: Any) -> Any:
    """The value of the field `name` from what a flag or YAML gave; other fields than lists and mappings pass.

    Raises:
        `ValueError`: if it is neither JSON nor what the field may hold.
    """
    if takes_none(hint) and name not in _OWN_NONE and _is_none(value):
        return None
    if is_list(hint):
        return _read_list(name, hint, value)
    if is_mapping(hint):
        return _read_mapping(name, value)
    if Literal[False] in _parts(hint) and str(value).lower() == "false":
        return False
    if isinstance(value, (list, dict)):
        raise ValueError(f"`{name}` is {value!r}; it takes a single value.")
    return value


def _is_none(value: Any) -> bool:
    words = value if isinstance(value, list) else [value]
    return len(words) == 1 and isinstance(words[0], str) and words[0].lower() in _NONE


def _read_mapping(name: str, value: Any) -> Any:
    if value is None or isinstance(value, dict):
        return value
    text = str(value)
    if name in _PATHS and not text.lstrip().startswith("{"):
        return text
    read = _read_json(name, text)
    if not isinstance(read, dict):
        raise ValueError(f"`{name}` is {text!r}; it takes a mapping, as JSON: '{{\"key\": value}}'.")
    return read


def _read_list(name: str, hint: Any, value: Any) -> Any:
    if value is None:
        return "none" if name in _OWN_NONE else None
    words = value if isinstance(value, list) else [value]
    if len(words) == 1 and isinstance(words[0], str) and words[0].lstrip().startswith("["):
        words = _read_json(name, words[0])
    elif len(words) == 1 and isinstance(words[0], str) and str in _parts(hint):
        return words[0]
    return [_read_element(name, hint, word) for word in words]


def _read_element(name: str, hint: Any, word: Any) -> Any:
    kind = element_of(hint)
    if is_dataclass(kind):  # made of the mapping by the config
        word = _read_json(name, word) if isinstance(word, str) else word
        known = [field.name for field in fields(kind)]
        if not isinstance(word, dict) or not set(word) <= set(known) or known[0] not in word:
            raise ValueError(f"`{name}` holds {word!r}; each element is a mapping of {', '.join(known)}.")
        return word
    try:
        return kind(word)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` holds {word!r}, which is no {kind.__name__}.") from error


def _read_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is {text!r}, which is not JSON: {error}.") from error
