"""EvalPlus's problems (https://huggingface.co/papers/2305.01210): inputs, and a solution that says what is expected.

Rows are those of HumanEvalPlus.jsonl and MbppPlus.jsonl. The solution runs with the tests, in a namespace of its own,
for each program anew; the program sees nothing of it. Values are compared as evalplus 0.3.1 does, by its rules for
single tasks too (Mbpp/164 takes whatever is returned), but

- a tolerance for floats holds for that value only, where EvalPlus keeps it for the values behind it;
- HumanEval/32 passes if the polynomial's value is near 0, which 0.3.1 finds too and then counts as failed;
- time is limited for all inputs together (`Limits.seconds`), and not for each by the solution's own time: give the
  sandbox more than its 3 seconds, since some hundred inputs run twice, once for the solution;
- there is no numpy, neither for tests nor programs, unless the sandbox shows it.

All inputs are one `assert` in a loop, so that a [`Result`]'s `total` is 1. `contract` is not needed: it tells which
inputs are valid, and all in the files are.
"""

from __future__ import annotations

import ast
import base64
import inspect
import pickle
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain, repeat
from typing import Any

from ..sandbox import Problem


MBPP = "Mbpp/"  # begins the ids of its tasks
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SETUP = """\
from __future__ import annotations
from base64 import b64decode as _decode
from copy import deepcopy as _copy
from pickle import loads as _loads
{functions}
_space = {{"__name__": "reference"}}
exec({solution!r}, _space)
_reference = _space[{entry_point!r}]
_inputs = _loads(_decode({inputs!r}))
"""
_TEST = """\
for _given in _inputs:
    _expected = _reference(*_copy(_given))
    assert {rule}({entry_point}(*_copy(_given)), _expected, _given, {atol!r})
"""


def evalplus_problems(row: Mapping[str, Any], task_id: str) -> tuple[Problem, Problem]:
    """Makes the two problems of a row: HumanEval's or MBPP's own inputs, and these with EvalPlus's.

    Args:
        row (`Mapping`):
            With `prompt`, `canonical_solution` (which continues it), `entry_point`, `base_input`, `plus_input` (lists
            of argument lists) and perhaps `atol`.
        task_id (`str`):
            The task's id; one that begins with `Mbpp/` tells how JSON's lists become its arguments.

    Raises:
        `ValueError`: if a column is missing or does not fit, naming it.
    """
    entry_point, atol = row.get("entry_point"), row.get("atol") or 0
    if not entry_point:
        raise ValueError("it has a `base_input` and no `entry_point`; name the function that it checks.")
    if not isinstance(atol, (int, float)) or not 0 <= atol < float("inf"):
        raise ValueError(f"`atol` is {atol!r}; give a number that is not negative.")
    solution = _solution_of(row, entry_point)
    base, plus = (_inputs(row, name, task_id) for name in ("base_input", "plus_input"))
    if not base:
        raise ValueError("`base_input` is empty; nothing would be tested.")
    rule = _RULES.get((task_id.startswith(MBPP), entry_point), _alike)
    test = _TEST.format(rule=rule.__name__, entry_point=entry_point, atol=atol)
    functions = "\n".join(_source(function) for function in dict.fromkeys((_near, _alike, rule)))

    def problem(inputs: list) -> Problem:
        # A pickle since a literal of some MB takes a second and a lot of memory to read; the values are from JSON.
        packed = base64.b64encode(pickle.dumps(inputs, protocol=5)).decode()
        setup = _SETUP.format(functions=functions, solution=solution, entry_point=entry_point, inputs=packed)
        return Problem((test,), setup, entry_point)

    return problem(base), problem(base + plus)


def _solution_of(row: Mapping[str, Any], entry_point: str) -> str:
    rest = row.get("canonical_solution")
    if not isinstance(rest, str):
        raise ValueError("it has no `canonical_solution`, which tells what is expected; give it.")
    try:
        body = ast.parse(row["prompt"] + rest).body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"`prompt` and `canonical_solution` are no Python: {error}; correct them.") from error
    if entry_point not in {node.name for node in body if isinstance(node, _DEFINITIONS)}:
        raise ValueError(f"`canonical_solution` does not define `{entry_point}`, the `entry_point`.")
    return row["prompt"] + rest


def _inputs(row: Mapping[str, Any], name: str, task_id: str) -> list[list]:
    """Argument lists, with the types that JSON has not."""
    rows = row.get(name) or []
    if not isinstance(rows, list) or not all(isinstance(arguments, list) for arguments in rows):
        raise ValueError(f"`{name}` is no list of argument lists; give one, perhaps empty.")
    number = task_id.removeprefix(MBPP)
    if number == task_id or not number.isdecimal():
        return rows
    makers = _MAKERS.get(int(number), ())
    pairs = [zip(chain(makers, repeat(_same)), arguments, strict=False) for arguments in rows]
    return [[make(value) for make, value in row] for row in pairs]


def _same(value: Any) -> Any:
    return value


def _tuples(value: list) -> list:
    return [tuple(item) for item in value]


def _tuple_or_item(value: list) -> tuple:
    return tuple(tuple(item) if isinstance(item, list) else item for item in value)


def _sets(value: list) -> list:
    return [set(item) if isinstance(item, list) and item else {} for item in value]


def _dict_of_tuples(value: dict) -> dict:
    return {name: tuple(item) for name, item in value.items()}


def _deep(value: Any) -> Any:
    return tuple(_deep(item) for item in value) if isinstance(value, list) else value


# Of MBPP's tasks: what makes each argument of what JSON holds; those behind the last stay as they are.
_MAKERS: dict[int, tuple[Callable, ...]] = {
    number: makers
    for makers, numbers in (
        ((tuple,) * 9, (2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630, 726,
                        740, 744, 809)),
        ((_tuples,) * 9, (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780)),
        ((_tuple_or_item,) * 9, (259, 401, 445)),
        ((_deep,) * 9, (580, 615, 791)),
        ((_tuples,), (75, 413, 444, 753)),
        ((tuple,), (250, 307, 405, 446, 617, 720, 763, 808)),
        ((_same, tuple), (106, 750)),
        ((_sets,), (115,)),
        ((_tuple_or_item,), (278,)),
        ((_dict_of_tuples,), (722,)),
        ((float, complex), (124,)),
        ((complex,), (252,)),
    )
    for number in numbers
}  # fmt: skip


# What follows runs on the tests' side, by its source: no names but builtins, and no annotations but these. As the
# texts above it is part of a benchmark's fingerprint: to change a letter makes results of before incomparable.
_source = cache(inspect.getsource)


def _near(found: object, expected: object, atol: float) -> bool:
    """Whether numbers, alone or in lists of the same lengths, differ by no more than `atol` and 1e-7 of `expected`."""
    if isinstance(expected, (list, tuple)):
        same = isinstance(found, (list, tuple)) and len(found) == len(expected)
        return same and all(_near(a, b, atol) for a, b in zip(found, expected, strict=True))
    if not isinstance(found, (int, float, complex)) or not isinstance(expected, (int, float, complex)):
        return False
    return found == expected or abs(found - expected) <= atol + 1e-7 * abs(expected) < float("inf")


def _alike(found: object, expected: object, given: list, atol: float) -> bool:
    """Equal; or near, where the task has a tolerance or floats are expected, alone or in one list."""
    if found == expected:
        return True
    values = expected if isinstance(expected, (list, tuple)) and expected else [expected]
    if atol == 0 and all(isinstance(value, float) for value in values):
        atol = 1e-6
    return atol != 0 and type(found) is type(expected) and _near(found, expected, atol)


def _anything(found: object, expected: object, given: list, atol: float) -> bool:
    return True


def _alike_or_zero(found: object, expected: object, given: list, atol: float) -> bool:
    return found == 0 or _alike(found, expected, given, atol)


def _same_set(found: object, expected: object, given: list, atol: float) -> bool:
    return set(found) == set(expected) or _alike(found, expected, given, atol)


def _both_or_none(found: object, expected: object, given: list, atol: float) -> bool:
    """`expected` may be an object that can't be compared: it counts whether it is something."""
    return (found if isinstance(found, bool) else found is not None) == (expected is not None)


def _surface(found: object, expected: object, given: list, atol: float) -> bool:
    """The height of the pyramid may be its own, or its side's."""
    edge, height = given
    surface = round(edge**2 + 2 * edge * ((edge / 2) ** 2 + height**2) ** 0.5)
    return _alike(found, expected, given, atol) or abs(found - surface) <= atol


def _digit_distance(found: object, expected: object, given: list, atol: float) -> bool:
    """The digits' differences, with zeros before the shorter number, or as the solution has it."""
    if _alike(found, expected, given, atol):
        return True
    one, other = (str(number) for number in given)
    width = max(len(one), len(other))
    pairs = zip(one.zfill(width), other.zfill(width), strict=True)
    return found == sum(abs(int(a) - int(b)) for a, b in pairs)


def _root(found: object, expected: object, given: list, atol: float) -> bool:
    """A polynomial may have many roots: its value is looked at."""
    return (
        isinstance(found, (int, float))
        and abs(sum(factor * found**power for power, factor in enumerate(given[0]))) <= atol
    )


_SETS = (
    "similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
    "intersection_array", "find_dissimilar", "Diff",
)  # fmt: skip
# By whether a task is MBPP's, and its entry point.
_RULES: dict[tuple[bool, str], Callable] = {
    (False, "find_zero"): _root,
    (True, "are_equivalent"): _anything,
    (True, "sum_div"): _alike_or_zero,
    (True, "surface_Area"): _surface,
    (True, "digit_distance_nums"): _digit_distance,
    **{(True, name): _same_set for name in _SETS},
    **{(True, name): _both_or_none for name in ("check_str", "text_match_three", "text_starta_endb")},
}
