"""Execution traces: what variables really were, in words; nothing that another run would not say; hostile programs."""

from __future__ import annotations

import ast
from collections import Counter, OrderedDict, defaultdict, deque

import pytest
from conftest import needs_bwrap

from ra3_trl.policy import Annotation, Source
from ra3_trl.policy.traces import Change, Trace, TraceAnnotator, Tracer, calls_of, write_trace
from ra3_trl.policy.traces.annotator import COPIES_ANSWER, NO_CHANGE
from ra3_trl.policy.traces.annotator import TOO_LONG as TOO_MANY_CHARACTERS
from ra3_trl.policy.traces.calls import answers_of, parse
from ra3_trl.policy.traces.forms import only_says
from ra3_trl.policy.traces.guest import show
from ra3_trl.policy.traces.run import (
    ASKS,
    DIFFERS,
    FAILS,
    GONE,
    LIMITS,
    MEMORY,
    NO_CALL,
    NO_PYTHON,
    RAISED,
    TIMEOUT,
    TOO_MANY_STEPS,
)
from ra3_trl.sandbox import Sandbox


BODY = "def f(n):\n    a = n + 1\n    b = a * 2\n    return b - 1\n"
HOLDS = f"{BODY}assert f(1) == 3\n"  # line 5: a = 2, b = 4
TOTAL = "def total(xs):\n    t = 0\n    for x in xs:\n        t += x\n    return t\n"


@pytest.fixture(scope="module")
def annotator():
    found = TraceAnnotator(tracer=Tracer(Sandbox(slots=1, limits=LIMITS)))
    yield found
    found.close()


def said(annotator, text: str, **row) -> tuple[dict[int, str], dict[str, int]]:
    """The comments by their line, and how often there was none, by the reason."""
    (proposed,) = annotator.propose([Source(text, row=row)])
    return {comment.line: comment.text for comment in proposed.comments}, dict(proposed.none)


# ---- in words ----


def trace(*pairs: tuple[str, str], count: int | None = None) -> Trace:
    return Trace(tuple(Change(2, *pair) for pair in pairs), len(pairs) if count is None else count)


def test_forms():
    """`t += x` is line 2."""
    rows = ["def f(x):", "    t += x"]
    one = trace(("t", "0"), ("x", "1"), ("t", "1"))
    assert write_trace(one) == "t = 0, x = 1, t = 1"
    assert write_trace(one, form="last") == "x = 1, t = 1"
    assert write_trace(one, rows, "lines") == "t += x -> 0; x = 1; t += x -> 1"


def test_a_long_loop_is_told_by_its_ends():
    """Of 13 changes the first 4 and the last 7; of 12 all. A trace that is too long even so is none."""
    pairs = [("t", str(i)) for i in range(13)]
    assert write_trace(trace(*pairs)) == "t = 0, t = 1, t = 2, t = 3, ..., " + ", ".join(
        f"t = {i}" for i in range(6, 13)
    )
    assert write_trace(trace(*pairs[:12])) == ", ".join(f"t = {i}" for i in range(12))
    assert trace(*pairs[:12]).short and not trace(*pairs).short and not trace().short
    assert write_trace(trace(*pairs), form="last") == "t = 12"
    wide = trace(*[("name", "'" + "x" * 30 + "'")] * 5)  # 5 * 39 and 4 separators of 2 are 203 characters
    assert write_trace(wide) is None and not wide.short


@pytest.mark.parametrize(
    ("values", "answer", "copies"),
    [
        (["4"], "4", True), (["[1, 2]"], "[1,2]", True), (["4", "4"], "4", True), (["3", "4"], "4", False),
        (["1"], "True", False), (["4"], None, False), (["Counter({'a': 1})"], "Counter({'a': 1})", True),
    ],
)  # fmt: skip
def test_a_trace_that_only_says_the_answer(values, answer, copies):
    assert only_says(trace(*(("r", value) for value in values)), answer) is copies


def test_what_assertions_state():
    """By the line where each begins; nothing where another comparison, or no side without a name, says it."""
    tests = ("f(1)", "ok", "not f(2)", "f(3) == [1,\n 2]", "4 is x", "x < 5", "x == y")
    text = "".join(f"assert {test}\n" for test in tests)
    assert answers_of(parse(text)) == {1: "True", 2: "True", 3: "False", 4: "[1, 2]", 6: "4"}


def test_values_as_python_writes_them():
    """Up to 40 characters; sets sorted, shorter first; what is no plain value is not shown, whatever it says."""

    class Sly(int):
        def __repr__(self):
            return "7"

    for value in (None, True, -3, 1.5, 2j, "a'b", b"\0", [], (1,), (1, [2]), {}, {"a": {1: 2}}, frozenset(), set()):
        assert show(value) == repr(value)
    assert show({10, 9, 1}) == "{1, 9, 10}" and show(frozenset({2, 1})) == "frozenset({1, 2})"
    assert show(Counter("aab")) == "Counter({'a': 2, 'b': 1})" and show(deque([1])) == "deque([1])"
    assert show(defaultdict(int, a=1)) == "{'a': 1}" and show(OrderedDict(a=1)) == "OrderedDict({'a': 1})"
    deep = []
    for _ in range(6):
        deep = [deep]
    loop: list = []
    loop.append(loop)
    for value in ("x" * 40, [1] * 14, 10**60, Sly(3), object(), deep, loop, [object()], "\ud800", "\u202e"):
        text = show(value)
        assert text is None or text.isprintable() and len(text) <= 40
    assert show("x" * 38) == repr("x" * 38) and show("x" * 39) is None and show([object()]) is None
    assert show(Sly(3)) is None and show(bytearray(10**8)) is None and show(range(3)) is None


def test_calls_beside_the_text():
    text = (
        "def f(n):\n    '''Adds.\n\n    >>> f(1)\n    2\n    >>> y = 3\n    '''\n"
        "    return n + 1\n\ndef test_f():\n    pass\n"
    )
    row = {"tests": "assert f(2) == 3", "test_list": ["assert f(3) == 4", None, " "], "test_setup_code": "import os"}
    own = ["test_f()", "assert repr(f(1)) == '2'", "y = 3\n"]
    assert calls_of(text, row) == [*own, "import os\nassert f(2) == 3", "import os\nassert f(3) == 4"]
    assert calls_of("x = (", {"tests": 7}) == [] and calls_of("'''>>> f(\n'''", {"tests": None}) == []


# ---- in the sandbox ----


@needs_bwrap
@pytest.mark.parametrize(
    ("text", "comments"),
    [
        (HOLDS, {5: " a = 2, b = 4"}),
        (HOLDS.replace("\n", "\r\n"), {5: " a = 2, b = 4"}),
        (f"\ufeff{HOLDS}", {5: " a = 2, b = 4"}),  # as some editors begin a file
        (f"{TOTAL}y = total((4,\n  5))\nassert (\n    y == 9)\n", {8: " t = 0, x = 4, t = 4, x = 5, t = 9"}),
        # each assertion has its own; arguments are not told, the text says them
        (f"{HOLDS}assert f(2) == 5\n", {5: " a = 2, b = 4", 6: " a = 3, b = 6"}),
        (f"{BODY}x = f(9)\nassert f(1) == 3\n", {6: " a = 2, b = 4"}),
        # all calls in order, inner ones first to be done
        ("def g(n):\n    r = 1 if n < 2 else n * g(n - 1)\n    return r\nassert g(3) == 6\n"
         "", {4: " r = 1, r = 2, r = 6"}),
        ("def f(a, b):\n    a, b = b, a\n    c = [x for x in\n         (a, b)]\n    return c[0]\n"
         "assert f(1, 2) == 2\n",
         {6: " a = 2, b = 1, c = [2, 1]"}),
        ("def g(n):\n    t = 0\n    for i in range(n):\n        t += i\n        yield t\n"
         "assert list(g(2)) == [0, 1]\n",
         {6: " t = 0, i = 0, i = 1, t = 1"}),
        # a change of an outer function's variable is told once, when that goes on
        ("def f(n):\n    t = 0\n    def g():\n        nonlocal t\n        t += n\n    g()\n    g()\n    return t * 5\n"
         "assert f(1) == 10\n", {9: " t = 0, t = 1, t = 2"}),
        ("def f(xs):\n    s = []\n    s.append(xs[0])\n    s.append(2)\n    return s\nassert f([1]) == [1, 2]\n",
         {6: " s = [], s = [1], s = [1, 2]"}),
        (f"{BODY}def test_f():\n    r = f(1)\n    assert r == 3\n", {7: " a = 2, b = 4"}),
        ("def f(n):\n    assert n > 0\n    a = n + 1\n    b = a * 2\n    return b\n"
         "assert f(1) == 4\n", {6: " a = 2, b = 4"}),
    ],
)  # fmt: skip
def test_traces_before_assertions(annotator, text, comments):
    assert said(annotator, text) == (comments, {})


@needs_bwrap
def test_traces_of_calls_that_stand_elsewhere(annotator):
    """Before the line at which the function returned, arguments first; of two calls that return there the first."""
    tests = ["assert f(1) == 3", "assert f(2) == 5"]
    assert said(annotator, BODY, tests=tests) == ({4: " n = 1, a = 2, b = 4"}, {})
    documented = "def f(n):\n    '''\n    >>> f(1)\n    4\n    '''\n    a = n + 1\n    b = a * 2\n    return b\n"
    assert said(annotator, documented) == ({8: " n = 1, a = 2, b = 4"}, {})
    wrong = documented.replace("    4\n", "    5\n", 1)
    assert said(annotator, wrong) == ({}, {FAILS: 1})
    caught = "def f(n):\n    try:\n        int('a')\n    except ValueError:\n        a = n + 1\n    return a\n"
    assert said(annotator, caught, tests=["assert f(1) == 2"]) == ({6: " n = 1, a = 2"}, {})
    # It returns at its own assertion, which is told; the call has no place besides, and is not counted as one without.
    checked = f"{BODY}def check(n):\n    assert f(n) == 3\n"
    assert said(annotator, checked, tests=["assert check(1) is None"]) == ({6: " a = 2, b = 4"}, {})


@needs_bwrap
def test_a_forked_process_tells_nothing(annotator):
    """It ends before the parent goes on, with an assertion that holds for it and other values."""
    text = f"import os\nchild = os.fork() == 0\nif not child: os.wait()\nn = 5 if child else 1\n{BODY}"
    found, reasons = said(annotator, f"{text}assert f(n) in (3, 11)\n")
    assert found == {9: " a = 2, b = 4"} and not reasons


@needs_bwrap
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("    a = __import__('random').random()\n    b = 2\n", ASKS),
        ("    import random\n    random.seed(1)\n    a = random.choice([1, 2])\n    b = 2\n", ASKS),
        ("    import time\n    a = time.time() > 5\n    b = 2\n", ASKS),
        ("    from datetime import datetime\n    a = datetime.now().year\n    b = 2\n", ASKS),
        ("    import time\n    a = time.strftime('%Y')\n    b = 2\n", ASKS),
        ("    import os\n    a = int(os.stat('/tmp').st_mtime) // 10**9\n    b = 2\n", ASKS),
        ("    a = id(n) % 1\n    b = 2\n", ASKS),
        ("    import os\n    a = os.environ['PYTHONHASHSEED']\n    b = 2\n", DIFFERS),
        ("    a = str(object())\n    b = 2\n", DIFFERS),
        ("    a = 'A at 0x7f00'\n    b = 2\n", DIFFERS),  # as forks of one process have the same addresses
        ("    a = [x for x in {'a', 'b', 'c', 'd'}]\n    b = 2\n", DIFFERS),
        ("    a = list(set('ab'))\n    b = 2\n", DIFFERS),
        ("    r = n + 1\n", COPIES_ANSWER),
        ("    pass\n", NO_CHANGE),
        ("    aaaaaaaa, b, c, d, e = ['x' * 36] * 5\n", TOO_MANY_CHARACTERS),
    ],
)
def test_what_another_run_would_not_say_or_is_no_thought(annotator, body, reason):
    assert said(annotator, f"def f(n):\n{body}    return 2\nassert f(1) == 2\n") == ({}, {reason: 1})


@needs_bwrap
@pytest.mark.parametrize(
    "asks", ["import time\na = time.time() > 3\n", "import datetime\na = datetime.date.today().year\n",
             "import random\na = random.randint(0, 0)\n", "import os\na = len(os.urandom(1))\n"],
)  # fmt: skip
def test_what_was_asked_for_may_be_kept_by_the_program(annotator, asks):
    """So the assertion before it is told, and none behind it, though all runs agree."""
    text = f"{HOLDS}{asks}def g(n):\n    b = n + 1\n    c = a\n    return b * 2\nassert g(1) == 4\n"
    assert said(annotator, text) == ({5: " a = 2, b = 4"}, {ASKS: 1})


@needs_bwrap
def test_what_modules_do_is_not_the_programs_affair(annotator):
    """Imports take more steps than a program may, and read clocks; `deepcopy` asks for addresses."""
    imports = "def f(n):\n    import http.server, xml.dom.minidom, unittest.mock, copy\n"
    text = f"{imports}    a = copy.deepcopy([n])\n    return a * 2\nassert f(1) == [1, 1]\n"
    assert said(annotator, text) == ({5: " a = [1]"}, {})


@needs_bwrap
def test_runs_differ_by_their_hash_seeds(annotator):
    """Of all sandboxes of a tracer; each keeps its own."""
    sandboxes = (annotator.tracer.sandbox, *annotator.tracer._seeded.values())
    job = {"role": "script", "program": "print(hash('a'))"}
    said = [[sandbox.run(dict(job))["stdout"] for _ in range(2)] for sandbox in sandboxes]
    assert all(first == second for first, second in said) and len({first for first, _ in said}) == 4


@needs_bwrap
@pytest.mark.parametrize(
    ("text", "comments", "none"),
    [
        (f"{HOLDS}while True: pass\n", 1, {TIMEOUT: 1}),  # what was finished is kept
        (f"{HOLDS}while True:\n    x = 1\n", 1, {TOO_MANY_STEPS: 1}),
        (f"{HOLDS}import os\nos.fork()\nassert f(2) == 5\n", 2, {}),
        (f"{HOLDS}import os\nos._exit(0)\n", 1, {GONE: 1}),
        (f"{HOLDS}import sys\nsys.exit()\n", 1, {RAISED: 1}),
        (f"import nothing_such\n{HOLDS}", 0, {RAISED: 1}),
        (f"print('assert', *'5101234', sep=chr(31))\nopen('/tmp/x', 'w').write('a')\n{HOLDS}", 1, {}),
        (f"{HOLDS}import os\nos.kill(os.getppid(), 9)\nassert f(2) == 5\n", 2, {}),
        (f"import sys\nsys.settrace(None)\n{HOLDS}", 0, {NO_CALL: 1}),
        ("def f(n):\n    a = n\n    return f(n + 1)\nassert f(0) == 1\n", 0, {RAISED: 1}),
        ("def f(n):\n    a = 'x' * n\n    b = [0] * (n // 8)\n    c = 3\n    d = 4\n    return c\n"
         "assert f(10**8) == 3\n", 1, {}),
        ("def f(n):\n    a = bytearray(n)\n    return 1\nassert f(10**10) == 1\n", 0, {MEMORY: 1, FAILS: 1}),
        (f"{BODY}for n in (1, 1):\n    assert f(n) == 3\n", 0, {FAILS: 1}),
        (f"{BODY}assert f(1) == 4\n", 0, {FAILS: 1, RAISED: 1}),
        ("x = 1\n", 0, {NO_CALL: 1}),
        ("assert (\n", 0, {NO_PYTHON: 1}),
        ("assert 1 == 1\0\n", 0, {NO_PYTHON: 1}),
        ("x = " + "(" * 300 + "1" + ")" * 300 + "\nassert x == 1\n", 0, {NO_PYTHON: 1}),
        (HOLDS.replace("\n", "\r"), 0, {NO_PYTHON: 1}),
        ("class A:\n    def __eq__(self, o): 1 / 0\ndef f(n):\n    a = A()\n    b = 1\n    c = 2\n"
         "    return 1\nassert f(1) == 1\n",
         1, {}),
    ],
)  # fmt: skip
def test_hostile_and_broken_programs(annotator, text, comments, none):
    found, reasons = said(annotator, text)
    assert (len(found), reasons) == (comments, none)


def test_forms_that_there_are_not():
    with pytest.raises(ValueError, match=r"`form` is 'poem'; use one of 'changes', 'last', 'lines'"):
        TraceAnnotator("poem")


@needs_bwrap
def test_traces_are_spliced_before_assertions(annotator, make_trainer):
    """The one that fits; what is longer than a latent may be is counted."""
    text = f"{HOLDS}assert f(100) == 201\n"
    policy = make_trainer([text], max_length=256, max_latent_length=13).policy
    annotation = Annotation(annotator, keep_all=True)
    with policy.inference():
        (examples,) = annotation(policy, [(text, {}, policy.segment(text))], policy._noise)
    spliced = policy.text(examples[0])
    assert "    return b - 1\n    # a = 2, b = 4\nassert f(1) == 3\n" in spliced
    assert ast.dump(ast.parse(spliced)) == ast.dump(ast.parse(text))
    assert annotation.tally.kept == spliced.count("#") and annotation.tally.proposed == 2
