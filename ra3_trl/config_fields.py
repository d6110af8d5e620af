"""Fields of a configuration with their meaning and their bounds, which one loop checks."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, field, fields
from typing import Any, get_args, get_origin, get_type_hints

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import SchedulerType, get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

from .files import DAMAGE, one_line
from .kinds import check_bounds, predicate, words
from .versions import TrainingArguments


FORMER = {"max_sites": "max_boundaries", "eval_max_sites": "eval_max_boundaries"}  # names that are still taken


MOST_UPDATES = 1_000_000_000  # what stands above is a slip, or a file that somebody has changed


class _Help(str):
    """What a field means, with the `bounds` of its value. Of other metadata argparse would make arguments."""

    bounds: dict[str, Any]


def setting(
    text: str,
    default: Any,
    least: float | None = None,
    most: float = math.inf,
    above: bool = False,
    **more: Any,
) -> Any:
    """A field with its meaning and its bounds: `least` (left out itself if `above`) to `most`; `choices`; `infinite`
    where infinity is a value too."""
    choices = [choice for choice in more.get("choices", ()) if choice is not None]
    meaning = _Help(f"{text} One of {', '.join(choices)}." if choices else text)
    meaning.bounds = {"least": least, "most": most, "above": above, **more}
    return field(default=default, metadata={"help": meaning})


def own_fields(cls: type[TrainingArguments]) -> tuple[str, ...]:
    """Names of the fields that `TrainingArguments` does not have, former ones left out."""
    inherited = {*FORMER, *(entry.name for entry in fields(TrainingArguments))}
    return tuple(entry.name for entry in fields(cls) if entry.name not in inherited)


_NONE = type(None)
# transformers takes more here than its type hints say.
_KINDS = {
    "accelerator_config": (AcceleratorConfig, dict, str, _NONE),
    "fsdp": (bool, str, list, _NONE),
    "debug": (str, list, _NONE),
}
# Of transformers' own fields: the least value where it checks none, or only after the model is loaded.
_LEAST = {
    "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 1,
    "dataloader_prefetch_factor": 1, "dataloader_num_workers": 0, "seed": 0, "data_seed": 0, "num_train_epochs": 0,
}  # fmt: skip
_JSON = ("model_init_kwargs", "lr_scheduler_kwargs", "activation_checkpointing_kwargs")  # a mapping, or its text


def _kinds_of(cls: type[TrainingArguments], hints: Mapping[str, Any]) -> dict[str, tuple[type, ...]]:
    """Types that a value of each field may have; a whole number will do for a `float`."""
    kinds_by_name: dict[str, tuple[type, ...]] = dict(_KINDS)
    for entry in fields(cls):
        hint = hints[entry.name]
        union = (hint,) if get_origin(hint) in (list, dict) else get_args(hint) or (hint,)
        kinds = tuple(get_origin(kind) or kind for kind in union)
        if entry.name not in _KINDS and all(isinstance(kind, type) for kind in kinds):  # `Literal[...]` is none
            kinds_by_name[entry.name] = (*kinds, int) if float in kinds else kinds
    return kinds_by_name


def check_fields(args: TrainingArguments) -> None:
    """Checks each field by itself: its type; of own ones its choices and bounds too.

    Raises:
        `ValueError`: naming field, value and what it may be.
    """
    hints = get_type_hints(type(args))  # evaluates the text of each annotation
    kinds_by_name = _kinds_of(type(args), hints)
    for entry in fields(args):
        name, value, meaning = entry.name, getattr(args, entry.name), entry.metadata.get("help")
        bounds = meaning.bounds if isinstance(meaning, _Help) else {}
        kinds = kinds_by_name.get(name)
        if kinds is None and not predicate(hints[name])(value):
            raise ValueError(f"`{name}` is {value!r}; give {' or '.join(words(hints[name]))}.")
        if kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            wanted = " or ".join(kind.__name__.replace("NoneType", "None") for kind in dict.fromkeys(kinds))
            raise ValueError(f"`{name}` is {value!r}; it must be of type {wanted}.")
        if name == "fsdp" and isinstance(value, list) and not all(isinstance(word, str) for word in value):
            raise ValueError(f"`fsdp` is {value!r}; give `True`, and the rest in `fsdp_config`.")
        if name in _JSON and isinstance(value, str):
            _check_mapping(name, value)
        if name in _LEAST and value is not None:
            check_bounds(name, value, _LEAST[name])
        if name in ("log_level", "log_level_replica"):
            bounds = {"choices": tuple(trainer_log_levels)}
        if "choices" in bounds and value not in bounds["choices"]:
            raise ValueError(f"`{name}` is {value!r}; use one of {', '.join(map(repr, bounds['choices']))}.")
        endless = value == math.inf and "infinite" in bounds
        if bounds.get("least") is not None and value is not None and not endless:
            check_bounds(name, value, **{key: bounds[key] for key in ("least", "most", "above")})
            if value == math.inf:
                raise ValueError(f"`{name}` is {value}; it must be finite.")


def _check_mapping(name: str, text: str) -> None:
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError:
        mapping = None
    if not isinstance(mapping, dict):
        raise ValueError(f"`{name}` is {text!r}; give a mapping, or one as JSON: '{{\"key\": value}}'.")


def field_docs(cls: type[TrainingArguments]) -> str:
    """The `Args:` section of a configuration in TRL's form, from the fields themselves."""
    hints = {entry.name: entry for entry in fields(cls)}
    lines = []
    for name in own_fields(cls):
        entry = hints[name]
        default = "" if entry.default is MISSING or entry.default is None else f", defaults to `{entry.default!r}`"
        lines.append(f"        {name} (`{entry.type}`, *optional*{default}):\n            {entry.metadata['help']}\n")
    return "    Args:\n" + "".join(lines)


def model_options(model_init_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """Reads `torch_dtype`, a former name that `from_pretrained` still takes, as `dtype`; with both it would not be
    heeded.

    Raises:
        `ValueError`: if both are there.
    """
    options = dict(model_init_kwargs or {})
    if {"dtype", "torch_dtype"} <= set(options):
        raise ValueError("`model_init_kwargs` has `dtype` and `torch_dtype`, its former name; leave the latter out.")
    return {"dtype" if name == "torch_dtype" else name: value for name, value in options.items()}


def scheduler_kwargs(kwargs: dict[str, Any] | None, kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Shares `lr_scheduler_kwargs` out: the schedule of each field in `kinds` gets those that it takes.

    Raises:
        `ValueError`: for one that none of the schedules takes, or a schedule that can't be made of its share.
    """
    if not isinstance(kwargs or {}, dict):
        raise ValueError(f"`lr_scheduler_kwargs` is {kwargs!r}; give a dict, such as {{'num_cycles': 2}}.")
    names = {}
    for field_name, kind in kinds.items():
        function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]
        taken = inspect.signature(function).parameters
        names[field_name] = set(taken) - {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    unknown = sorted(set(kwargs or {}) - set().union(*names.values()))
    if unknown:
        schedules = " nor ".join(f"{name}={SchedulerType(kind).value!r}" for name, kind in kinds.items())
        raise ValueError(f"`lr_scheduler_kwargs` has {unknown[0]!r}, which neither {schedules} takes; leave it out.")
    shares = {n: {key: value for key, value in (kwargs or {}).items() if key in names[n]} for n in kinds}
    for field_name, kind in kinds.items():
        try:
            get_scheduler(kind, torch.optim.SGD([torch.zeros(1)], lr=1.0), 0, 1, shares[field_name])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"`{field_name}` is {SchedulerType(kind).value!r}, which can't be made with `lr_scheduler_kwargs` "
                f"{shares[field_name]}: {error}"
            ) from error
    return shares


@contextmanager
def beside_trainers() -> Iterator[None]:
    """Lets settings be made inside without harm to trainers that are there."""
    # `TrainingArguments` empty the state that all accelerators share, without which those of before fail.
    shared = [cls._shared_state for cls in (AcceleratorState, PartialState)]
    before = [dict(state) for state in shared]
    try:
        yield
    finally:
        if before[0]:
            for state, values in zip(shared, before, strict=True):
                state.clear()
                state.update(values)


@contextmanager
def blaming(where: str, make: Callable[[], Any]) -> Iterator[None]:
    """Says which file it is whose settings, by themselves as `make` takes them, can't be made into a configuration.

    Raises:
        `ValueError`: naming the file where it is at fault, else what was raised inside.
    """
    try:
        yield
    except DAMAGE:
        try:
            with beside_trainers():
                make()
        except DAMAGE as error:
            raise ValueError(f"{where}: {one_line(error)} Mend it there, or set the field otherwise.") from error
        raise


def row_length(args: Any) -> int:
    """`max_length` of an `RA3Config`, once a model is there to say what `None` is."""
    assert args.max_length is not None
    return int(args.max_length)
