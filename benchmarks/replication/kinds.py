"""Programs of other kinds than integers, of the same form as those of `traces.py`.

    def mix(s, t):
        s = s[::-1]
        t = t + s
        s = s.upper()
        return s

    result = mix('abc', 'de')
    # s = 'cba', t = 'decba', s = 'CBA'
    assert result == 'CBA'

The trace has the value of each assignment that is made, and of what is appended to. A program is drawn anew until its
values are short enough. Values are computed by Python, one step after the other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .records import TraceTask


FUNCTIONS = ("compute", "update", "score", "mix", "shift", "combine", "f", "run", "apply_rule", "next_value")
_NAMES = {"strings": ("s", "t", "text", "word", "name"), "lists": ("xs", "items", "values", "nums", "data")}
_NUMBERS = ("a", "b", "n", "x", "y", "total", "count", "step", "size", "k")
_BUILTINS = {"__builtins__": {}, "sorted": sorted, "sum": sum, "len": len, "max": max}
_MOST, _LETTERS, _ITEMS = 99, 8, 4  # of a number, of letters, of items
Values = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """What changes one variable: the `rows` of a program and the expression that is the variable's new value.

    With a `condition` the rows are those of an `if`, and `otherwise` is the value where it is false.
    """

    rows: tuple[str, ...]
    name: str
    value: str
    condition: str = "True"
    otherwise: str = ""

    def run(self, values: Values) -> Any:
        """The new value."""
        return _value(self.value if _value(self.condition, values) else self.otherwise, values)


def stated(trace: Iterable[tuple[str, Any]]) -> str:
    """The comment that tells a trace: `# x = 3, y = 7, x = 6`."""
    return "# " + ", ".join(f"{name} = {value!r}" for name, value in trace)


def kind_task(rng: random.Random, kind: str, right: bool = True) -> TraceTask:
    """A program of a kind up to its assertion; the trace has random values where it is not to be `right`."""
    while (found := _try(rng, kind)) is None:
        pass
    names, arguments, steps, trace, returned = found
    values = arguments | dict(trace)
    rows = [f"    {row}" for step in steps for row in step.rows]
    call = f"{rng.choice(FUNCTIONS)}({{}}, {{}})"
    prompt = [
        f"def {call.format(*names)}:",
        *rows,
        f"    return {returned}",
        "",
        f"result = {call.format(*(repr(arguments[name]) for name in names))}",
    ]
    said = trace if right else _wrong(rng, trace)
    return TraceTask("\n".join(prompt) + "\n", stated(said), _value(returned, values))


def _try(rng: random.Random, kind: str) -> tuple[Any, ...] | None:
    """Names, arguments, steps, trace and what is returned; `None` if a value is too long."""
    names, arguments, draw, returns = _PARTS[kind](rng)
    values, steps, trace = dict(arguments), [], []
    for place in (0, 1, 0):
        step = draw(rng, names, place)
        values[step.name] = step.run(values)
        steps.append(step)
        trace.append((step.name, values[step.name]))
        if not _short(values[step.name]):
            return None
    returned = rng.choice(returns)
    return (names, arguments, steps, trace, returned) if _short(_value(returned, values)) else None


def _strings(rng: random.Random) -> tuple[Any, ...]:
    names = first, second = tuple(rng.sample(_NAMES["strings"], 2))
    arguments = {name: "".join(rng.choices("abcdefgh", k=rng.randint(2, 5))) for name in names}
    return names, arguments, _string_step, (first, f"{first} + {second}", f"len({first})")


def _string_step(rng: random.Random, names: Sequence[str], place: int) -> Step:
    s, t = names[place], names[1 - place]
    values = (f"{s}[::-1]", f"{s}.upper()", f"{s}[1:]", f"{s}[:2]", f"{s} + {t}", f"{t} + {s}", f"{s} + {t}[0]")
    value = rng.choice(values)
    return Step((f"{s} = {value}",), s, value)


def _lists(rng: random.Random) -> tuple[Any, ...]:
    names = xs, n = rng.choice(_NAMES["lists"]), rng.choice(_NUMBERS)
    arguments = {xs: [rng.randint(0, 9) for _ in range(rng.randint(2, 3))], n: rng.randint(0, 9)}
    return names, arguments, _list_step, (xs, n, f"{n} + {xs}[0]", f"len({xs})")


def _list_step(rng: random.Random, names: Sequence[str], place: int) -> Step:
    xs, n = names
    if place:
        value = rng.choice((f"sum({xs})", f"{n} + {xs}[0]", f"max({xs})", f"{n} + len({xs})"))
        return Step((f"{n} = {value}",), n, value)
    if rng.random() < 0.3:
        return Step((f"{xs}.append({n})",), xs, f"{xs} + [{n}]")
    value = rng.choice((f"sorted({xs})", f"{xs}[::-1]", f"{xs}[1:]", f"{xs} + [{n}]"))
    return Step((f"{xs} = {value}",), xs, value)


def _conditionals(rng: random.Random) -> tuple[Any, ...]:
    names = first, second = tuple(rng.sample(_NUMBERS, 2))
    arguments = {name: rng.randint(2, 19) for name in names}
    return names, arguments, _conditional_step, (first, f"{first} + {second}")


def _conditional_step(rng: random.Random, names: Sequence[str], place: int) -> Step:
    x, y = names[place], names[1 - place]

    def changed() -> str:
        symbol = rng.choice("+-*")
        return f"{x} {symbol} {rng.randint(2, 4) if symbol == '*' else rng.choice((y, str(rng.randint(2, 9))))}"

    if place:
        value = changed()
        return Step((f"{x} = {value}",), x, value)
    condition = rng.choice((f"{x} > {rng.randint(5, 15)}", f"{x} > {y}", f"{x} % 2 == 0"))
    one, other = changed(), changed()
    rows = (f"if {condition}:", f"    {x} = {one}", "else:", f"    {x} = {other}")
    return Step(rows, x, one, condition, other)


_PARTS: dict[str, Callable[[random.Random], tuple[Any, ...]]] = {
    "strings": _strings,
    "lists": _lists,
    "conditionals": _conditionals,
}


def _wrong(rng: random.Random, trace: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """A trace of the same names with values that have nothing to do with the program."""

    def drawn(value: Any) -> Any:
        if isinstance(value, str):
            return "".join(rng.choices("abcdefgh", k=rng.randint(1, 5)))
        return [rng.randint(0, 9) for _ in value] if isinstance(value, list) else rng.randint(0, 60)

    return [(name, drawn(value)) for name, value in trace]


def _value(expression: str, values: Values) -> Any:
    return eval(expression, dict(_BUILTINS), dict(values))  # our own expressions, a few of them


def _short(value: Any) -> bool:
    if isinstance(value, str):
        return 1 <= len(value) <= _LETTERS
    if isinstance(value, list):
        return 1 <= len(value) <= _ITEMS and all(0 <= item <= _MOST for item in value)
    return 0 <= value <= _MOST
