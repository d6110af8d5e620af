"""The sandbox judges as plain Python does: scripts that end in every way, tests that name programs in every way."""

from __future__ import annotations

import pytest
from conftest import needs_bwrap

from benchmarks.fidelity import DOCUMENTED, TABLES, Pair, compare, plain_verdicts, read_pairs
from ra3_trl.sandbox import Judge, Limits, Problem, Sandbox


@pytest.fixture(scope="module")
def judge():
    with Judge(Sandbox(slots=2, limits=Limits(seconds=8.0))) as found:
        yield found


def test_plain_python_tells_right_from_wrong():
    """The reference itself: 2 of 4 pairs hold; the last script prints what is expected and ends badly."""
    pairs = [
        Pair("def f(x): return x", "assert f(1) == 1"),
        Pair("def f(x): return x", "assert f(1) == 2"),
        Pair("print(input())", case=("a\n", "a")),
        Pair("print('a')\n1 / 0", case=("", "a")),
    ]
    assert plain_verdicts(pairs) == [True, False, True, False]


@needs_bwrap
@pytest.mark.parametrize("table", TABLES)
def test_the_sandbox_agrees_with_plain_python(judge, table):
    assert compare(judge, read_pairs(table)) == []


@needs_bwrap
def test_what_is_documented_to_differ_does(judge):
    documented = read_pairs(DOCUMENTED)
    assert [pair for pair, *_ in compare(judge, documented)] == documented


def test_there_are_pairs_that_fail_and_pairs_that_pass():
    assert sum(len(read_pairs(name)) for name in TABLES) >= 500
    plain = plain_verdicts(read_pairs("classes"))
    assert 5 < plain.count(False) < len(plain) / 2


@needs_bwrap
def test_a_difference_is_seen(judge):
    """The judge's tests may use `math` without importing it, plain Python's may not: the one pair that differs."""
    pairs = [Pair("def f(x): return x", f"assert {test}") for test in ("f(1) == 1", "math.floor(1.5) == f(1)")]
    assert [pair.test for pair, *_ in compare(judge, pairs)] == [pairs[1].test]


@needs_bwrap
def test_output_that_is_cut_says_so(judge):
    """1 MiB more than the 2 bytes expected is kept, of output that has a byte more."""
    long = f"import sys\nsys.stdout.write('x' * ({2**20} + 3))"
    result = judge(Problem(cases=(("", "xx"),)), long)
    assert result.verdict == "failed"
    assert "cut" in result.detail and "[cut here]" in result.output
    assert judge(Problem(cases=(("", "x" * (2**20 + 3)),)), long).verdict == "passed"


@needs_bwrap
@pytest.mark.parametrize(("printed", "expected"), [("a\\x0bb", "a\nb"), ("a\\u2028b", "a\nb"), ("a\\x1c", "a")])
def test_only_newlines_end_lines_of_output(judge, printed, expected):
    assert judge(Problem(cases=(("", expected),)), f"print('{printed}')").verdict == "failed"
    assert judge(Problem(cases=(("", expected),)), f"print({expected!r})").verdict == "passed"


@needs_bwrap
def test_bytes_that_are_no_text_are_no_replacement_character(judge):
    program = "import sys\nsys.stdout.buffer.write(b'\\xff')"
    assert judge(Problem(cases=(("", "\ufffd"),)), program).verdict == "failed"


@needs_bwrap
def test_a_program_gives_no_name_that_was_not_asked_for(judge):
    """Tests that call `eval` may have all names of the program, but no builtin that it replaced."""
    program = "def f(x): return 0\ndef isinstance(*a): return True\n__builtins__ = {}\n"
    assert judge(Problem(tests=("assert eval('f(2)') == 0",)), program).verdict == "passed"
    assert judge(Problem(tests=("assert eval('isinstance(1, str)')",)), program).verdict == "failed"


@needs_bwrap
def test_a_module_of_the_standard_library_is_never_the_programs(judge):
    program = "class math:\n    isclose = staticmethod(lambda *a: True)\ndef f(x): return 0"
    assert judge(Problem(tests=("assert math.isclose(f(2), 4)",)), program).verdict == "failed"
