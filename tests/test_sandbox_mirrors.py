"""Objects of the program in the tests: they behave as they do in plain Python (test_fidelity.py), and pass nothing."""

from __future__ import annotations

import json

import pytest
from conftest import needs_bwrap

from ra3_trl.evaluation.evalplus import evalplus_problems
from ra3_trl.sandbox import Judge, Limits, Problem, Sandbox, values


# A class whose every operator says what suits it, and is what `f` returns in place of 9.
LIAR = """\
class Liar{bases}:
    def yes(self, *other): return True
    def none(self, *other): return 0
    def own(self, *other): return self
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = yes
    __abs__ = __int__ = __index__ = __len__ = __round__ = __neg__ = __trunc__ = none
    __float__ = lambda self: 0.0
    __bool__ = lambda self: False
    __hash__ = lambda self: 9
    {items}
    for name in "add sub mul truediv floordiv mod pow and or xor".split():
        for side in "", "r", "i":
            locals()[f"__{{side}}{{name}}__"] = {gives}
def f(x): return Liar()
class math:
    isclose = staticmethod(lambda *numbers, **named: True)
abs = round = sum = len = isinstance = lambda *arguments: 0
"""
NEAR = (
    "assert f(3) == 9",
    "assert 9 == f(3)",
    "assert not f(3) != 9",
    "assert abs(f(3) - 9) < 1e-6",
    "assert abs(9 - f(3)) < 1e-6",
    "assert -1e-6 < f(3) - 9 < 1e-6",
    "assert math.isclose(f(3), 9)",
    "assert math.isclose(f(3) - 9, 0, abs_tol=1e-6)",
    "assert round(f(3) - 9, 6) == 0",
    "assert not f(3) - 9",
    "assert not f(3) ^ 9",
    "assert int(f(3) - 9) == 0",
    "assert float(f(3) / 9) == 1",
    "assert (f(3) - 9) ** 2 < 1e-6",
    "assert sum([f(3), -9]) == 0",
    "assert max(abs(f(3) - 9), 0) < 1e-6",
    "assert 9 in f(3)",
    "assert f(3) in [9]",
    "assert {f(3)} == {9}",
    "assert f(3) >= 9",
    "x = f(3)\nx -= 9\nassert not x",
    "x = 9\nx -= f(3)\nassert abs(x) < 1e-6",
    "import unittest\nassert unittest.TestCase().assertEqual(f(3), 9) is None",
    "import unittest\nassert unittest.TestCase().assertAlmostEqual(f(3), 9) is None",
)
SETS = (
    "assert f(3) == {9}",
    "assert not f(3) - {9}",
    "assert not f(3) ^ {9}",
    "assert len({9} - f(3)) == 0",
    "assert len(f(3) ^ {9}) == 0",
    "assert list(f(3) - {9}) == []",
    "assert sorted({9} - f(3)) == []",
    "assert f(3) ^ {9} == set()",
    "assert all(False for _ in f(3) - {9})",
)


@pytest.fixture(scope="module")
def judge():
    with Judge(Sandbox(slots=2, limits=Limits(seconds=3.0))) as made:
        yield made


def each(tests: tuple[str, ...]) -> Problem:
    """All tests at once, each of which goes on where one before raises."""
    texts = ["try:\n" + "".join(f"    {line}\n" for line in test.splitlines()) for test in tests]
    return Problem(tests=tuple(f"{text}except Exception: pass\n" for text in texts))


@needs_bwrap
@pytest.mark.parametrize("bases", ["", "(int)", "(float)", "(complex)", "(Mixin, int)", "(Exception)"])
@pytest.mark.parametrize("gives", ["none", "own", "yes"])
def test_no_operator_passes_an_assertion(judge, bases, gives):
    # Items by an iterator or, for every second, by numbers.
    items = "__iter__ = lambda self: iter(())" if len(bases) % 2 else "__getitem__ = lambda self, index: [][index]"
    mixin = "class Mixin:\n    __abs__ = lambda self: 0\n    __sub__ = lambda self, other: self\n"
    result = judge(each(NEAR + SETS), mixin + LIAR.format(bases=bases, gives=gives, items=items))
    assert result.total == len(NEAR + SETS)
    assert result.passed == 0, result


@needs_bwrap
def test_the_same_tests_pass_for_an_honest_program(judge):
    near = tuple(test for test in NEAR if " in f(3)" not in test)  # a number holds nothing
    assert judge(each(near), "def f(x): return x * x\n").verdict == "passed"
    assert judge(each(SETS), "def f(x): return {x * x}\n").verdict == "passed"


# What a program may send in place of an answer, from its own copy of the protocol.
FORGED = (
    {"value": [0], "nodes": [["standard", "builtins.exec"]]},
    {"value": [0], "nodes": [["standard", "os.system"]]},
    {"value": [0], "nodes": [["shared", 1]]},
    {"value": [0], "nodes": [["object", 7]]},
    {"value": [0], "nodes": [["tuple", [[0]]]]},
    {"value": [0], "nodes": [["list", -9, [[0]]]]},
    {"value": [0], "nodes": [["made", "complex", ["4"]]]},
    {"value": [0], "nodes": [["error", "builtins.AssertionError", [[1]]], ["tuple", []]]},
    {"value": [0], "nodes": [["class", -9, [1]], ["tuple", ["int", None, [2], [3], True, [2], None, [2]]],
                             ["tuple", []], ["tuple", ["__eq__", "__call__"]]]},
    {"value": [0], "nodes": [["instance", -8, [1], 4], ["class", -9, [2]], ["tuple", ["A", None, [3], [4], True, [3],
                             "types.FunctionType", [3]]], ["tuple", []], ["tuple", ["__eq__", "__bool__"]]]},
    {"value": [0], "nodes": [["value", -8, [1], "int", 4], ["class", -9, [2]], ["tuple", ["A", None, [3], [4], True,
                             [3], None, [3]]], ["tuple", []], ["tuple", ["__eq__"]]]},
    {"value": [0], "names": True, "nodes": [["tuple", [0, [1], [2], [3]]], ["tuple", ["__outcomes__", 4]],
                             ["tuple", ["abs", 4]], ["tuple", ["__builtins__", [4]]], ["dict", -9, []]]},
    {"value": 0, "changes": [[1, 0, [4]]]},
    {"value": [0], "nodes": [["iterator", -9, "map"]]},
    {"value": None, "raised": ["AssertionError", "", "x", "more"]},
    {"value": 4, "number": "0"},
    {"value": {"tuple": [4]}},
    [],
)  # fmt: skip


@needs_bwrap
@pytest.mark.parametrize("number", range(len(FORGED)))
def test_no_forged_message_passes(judge, number):
    program = (
        "import json, sys\n_wire = sys.modules['wire']\n_send, _calls = _wire.send, []\n"
        f"_forged = json.loads({json.dumps(FORGED[number])!r})\n"
        "def send(connection, message):\n"
        "    _calls.append(message)\n"
        "    if len(_calls) > 1:\n"
        "        message = {'number': message['number'], **_forged} if isinstance(_forged, dict) else _forged\n"
        "    _send(connection, message)\n"
        "_wire.send = send\n"
        "def f(x): return 0\n"
    )
    tests = ("assert f(2) == 4 and abs(f(2)) == 4", "assert f(3) == 9")
    result = judge(Problem(tests=tests), program)
    assert result.verdict in ("error", "failed"), result
    assert result.passed == 0


@needs_bwrap
@pytest.mark.parametrize("tests", ["from math import isclose\n", "import math\nisclose = math.isclose\n"])
def test_what_tests_have_imported_is_not_bound_anew(judge, tests):
    """The program has the very function too, and binds its name anew when it is called."""
    program = (
        "from math import isclose\ndef f(x):\n    global isclose\n    isclose = lambda *numbers: True\n    return 0\n"
    )
    result = judge(Problem(tests=(f"{tests}f(3)\nassert isclose(f(3), 9)",)), program)
    assert (result.verdict, result.passed) == ("failed", 0)


@needs_bwrap
def test_a_changed_input_changes_no_oracle(judge):
    """HumanEval/32's rule puts the answer into the input's polynomial, -1 + x here, which 0 + 0 x would make right."""
    row = {
        "prompt": "def find_zero(xs):\n", "canonical_solution": "    return 1.0\n", "entry_point": "find_zero",
        "base_input": [[[-1.0, 1.0]]], "plus_input": [], "atol": 1e-4,
    }  # fmt: skip
    problem, _ = evalplus_problems(row, "HumanEval/32")
    assert judge(problem, "def find_zero(xs):\n    return 1.0\n").verdict == "passed"
    assert judge(problem, "def find_zero(xs):\n    xs[:] = [0.0, 0.0]\n    return 5.0\n").verdict == "failed"


HIDES = """\
class Hidden({base}):
    def __str__(self): raise self
    __repr__ = __str__
class Thing:
    def __enter__(self): return self
    def __exit__(self, *error): return True
    def value(self): raise Hidden
def f(x): return Thing()
"""


@needs_bwrap
@pytest.mark.parametrize("base", ["Exception", "BaseException", "SystemExit", "KeyboardInterrupt", "AssertionError"])
def test_an_exception_hides_no_assertion(judge, base):
    """Neither one that can't be described nor one that the tests' bare `except` takes: 1 of 2 holds."""
    tests = "try:\n    with f(3) as thing:\n        assert thing.value() == 9\nexcept: pass\nassert True"
    result = judge(Problem(tests=(tests,)), HIDES.format(base=base))
    assert result.verdict in ("error", "failed"), result
    assert result.passed == 1


def crossed(value):
    """A plain value that was sent, as it arrives."""

    def refused(*_):
        raise AssertionError("it is plain")

    sent = json.dumps(values.Packer(refused, values.Shared()).message(value))
    return values.Unpacker(refused, values.Shared()).message(json.loads(sent))


@pytest.mark.parametrize("depth", [900, 5000])
def test_values_may_be_deep(depth):
    value: list = []
    for _ in range(depth):
        value = [value]
    found = crossed(value)
    for _ in range(depth):
        (found,) = found
    assert found == []


def test_values_may_hold_themselves_and_each_other():
    row: list = [1]
    row.append(row)
    first, second = crossed((row, row))
    assert first is second and first[1] is first and first[0] == 1
