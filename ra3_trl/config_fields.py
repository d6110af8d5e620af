"""Fields of a configuration with their meaning and their bounds, which one loop checks."""

from __future__ import annotations

import math
from dataclasses import MISSING, field, fields
from typing import Any, get_args, get_type_hints

from .versions import TrainingArguments


# Fields that went, and what to do instead.
GONE = {
    "annotation_think_prob": "set `prior_alpha` to 1 less it; none, with `exploration=0`, is the model's own gate",
    "latent_weight": 'set `exploration`, to 0 for what "gate" was',
    "baseline": "leave it out; latents are compared with each other",
    "gate_coef": "leave it out; it was 1",
    "gate_kl_coef": "leave it out; it was 0",
    "entropy_coef": "leave it out; raise `temperature` for latents that differ more",
    "head_learning_rate": "leave it out; it was 1e-3",
}
FORMER = {"max_sites": "max_boundaries", "eval_max_sites": "eval_max_boundaries"}  # names that are still taken


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


def _kinds_of(cls: type[TrainingArguments]) -> dict[str, tuple[type, ...]]:
    """Types that a value may have, of each own field of a plain kind; a whole number will do for a `float`."""
    kinds_by_name = {}
    for name, hint in get_type_hints(cls).items():
        kinds = get_args(hint) or (hint,)
        if name in own_fields(cls) and set(kinds) <= {int, float, bool, str, type(None)}:
            kinds_by_name[name] = (*kinds, int) if float in kinds else kinds
    return kinds_by_name


def check_fields(args: TrainingArguments) -> None:
    """Checks each own field by itself: its type, its choices, its bounds.

    Raises:
        `ValueError`: naming field, value and what it may be.
    """
    entries = {entry.name: entry for entry in fields(args)}
    for name in own_fields(type(args)):
        value, meaning = getattr(args, name), entries[name].metadata.get("help")
        bounds = meaning.bounds if isinstance(meaning, _Help) else {}
        kinds = _kinds_of(type(args)).get(name)
        if kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"`{name}` is {value!r}; it must be of type {wanted}.")
        if "choices" in bounds and value not in bounds["choices"]:
            raise ValueError(f"`{name}` is {value!r}; use one of {', '.join(map(repr, bounds['choices']))}.")
        if bounds.get("least") is not None and value is not None:
            _check_bounds(name, value, **{key: bounds[key] for key in ("least", "most", "above")})
            if value == math.inf and "infinite" not in bounds:
                raise ValueError(f"`{name}` is {value}; it must be finite.")


def _check_bounds(name: str, value: float, least: float, most: float, above: bool) -> None:
    if (value > least if above else value >= least) and value <= most:  # NaN fails too
        return
    lower = "above" if above else "at least"
    upper = "" if most == math.inf else f" and at most {most}"
    raise ValueError(f"`{name}` is {value}; it must be {lower} {least}{upper}.")


def field_docs(cls: type[TrainingArguments]) -> str:
    """The `Args:` section of a configuration in TRL's form, from the fields themselves."""
    hints = {entry.name: entry for entry in fields(cls)}
    lines = []
    for name in own_fields(cls):
        entry = hints[name]
        default = "" if entry.default is MISSING or entry.default is None else f", defaults to `{entry.default!r}`"
        lines.append(f"        {name} (`{entry.type}`, *optional*{default}):\n            {entry.metadata['help']}\n")
    return "    Args:\n" + "".join(lines)
