"""`--reward_funcs my_module.my_func`: import paths to functions, as in `trl grpo`."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence


def load_reward_funcs(paths: Sequence[str] | None) -> list[Callable] | None:
    """The functions that `paths` name, `None` for none. Modules of the current folder are found too.

    Args:
        paths (`list[str]`, *optional*):
            Import paths such as `"my_lib.rewards.short"`.

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
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"`reward_funcs` holds {path!r}, but `import {module_name}` fails ({error}); run where the module is, or "
            "install it."
        ) from error
    if name not in vars(module):
        near = [found for found, value in vars(module).items() if callable(value) and not found.startswith("_")]
        has = f"it has {', '.join(near)}" if near else "it has no function"
        raise ValueError(f"`reward_funcs` holds {path!r}, but `{module_name}` has no `{name}`; {has}.")
    func = vars(module)[name]
    if not callable(func):
        raise ValueError(f"`reward_funcs` holds {path!r}, which is {func!r} and not a function.")
    return func
