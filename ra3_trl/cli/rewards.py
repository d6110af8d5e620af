"""`--reward_funcs my_module.my_func`: import paths to functions, as in `trl grpo`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence


def load_reward_funcs(paths: Sequence[str] | None) -> list[Callable] | None:
    """Loads the functions that `paths` name, such as `"my_lib.rewards.short"`; `None` for none. Modules of the current
    folder are found too.

    Raises:
        `ValueError`: if there is no such module or attribute, or it can't be called.
    """
    if not paths:
        return None
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return [_load(path) for path in paths]


def _load(path: str) -> Callable:
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"`reward_funcs` holds {path!r}, which is no import path; write `module.function`.")
    try:
        names = vars(importlib.import_module(module_name))
    except ImportError as error:
        raise ValueError(
            f"`reward_funcs` holds {path!r}, but `import {module_name}` fails ({error}); run where the module is, or "
            "install it."
        ) from error
    if name not in names:
        near = ", ".join(other for other, value in names.items() if callable(value) and not other.startswith("_"))
        raise ValueError(
            f"`reward_funcs` holds {path!r}, but `{module_name}` has no `{name}`; it has {near or 'no function'}."
        )
    if not callable(names[name]):
        raise ValueError(f"`reward_funcs` holds {path!r}, which is {names[name]!r} and not a function.")
    return names[name]
