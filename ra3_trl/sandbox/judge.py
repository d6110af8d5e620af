"""Judges programs by tests: what is expected, the comparison and the verdict stay where the program can't reach.

`assert`s of any form run as they are, in a sandbox of the tests' own; the program's functions are remote there, by
plain values. So `assert f(x) == y`, tolerances, loops over random inputs and objects of the program's own classes all
work, and nothing that a program prints, exits with, patches or overloads can make an assertion true.
"""

from __future__ import annotations

import ast
import errno
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from signal import SIGKILL, SIGXCPU, SIGXFSZ
from typing import Any

from .names import Names, names_in
from .sandbox import Sandbox


VERDICTS = ("passed", "failed", "error", "timeout", "memory", "blocked")
_REFUSALS = {
    errno.EPERM, errno.EACCES, errno.EROFS, errno.EAGAIN, errno.EFBIG, errno.ENOSPC, errno.EMFILE, errno.ENETUNREACH,
    errno.ENOSYS,
    -2, -3,  # names are not resolved
}  # fmt: skip
_BLANK = " \t\r"


@dataclass(frozen=True)
class Problem:
    """What a program must do: tests that call its functions, or inputs and the outputs they must give.

    Args:
        tests (`tuple[str]`, *optional*):
            Python sources with `assert`s, run one after another in one namespace.
        setup (`str`, *optional*):
            Python source that runs before them, on their side: what it defines, the program can't redefine.
        entry_point (`str`, *optional*):
            Name of the program's function, which must then define it; needed only where it shadows a builtin.
        cases (`tuple[tuple[str, str]]`, *optional*):
            Standard input and the standard output it must give, compared line by line without trailing white space.
        inside (`bool`, *optional*, defaults to `False`):
            Run the tests in the program's own process, for tests that can't call it from outside, such as those that
            pass it functions. A program can then forge the verdict; the result says so.

    Raises:
        `ValueError`: for tests with a syntax error or without an `assert`, neither tests nor cases, or both.
    """

    tests: tuple[str, ...] = ()
    setup: str = ""
    entry_point: str | None = None
    cases: tuple[tuple[str, str], ...] = ()
    inside: bool = False

    def __post_init__(self):
        if isinstance(self.tests, str):
            raise ValueError(f"`tests` is the text {self.tests[:60]!r}; give a tuple of texts.")
        texts = {"tests": self.tests, "setup": [self.setup], "cases": [text for case in self.cases for text in case]}
        texts["entry_point"] = [] if self.entry_point is None else [self.entry_point]
        for name, values in texts.items():
            if odd := [value for value in values if not isinstance(value, str)]:
                raise ValueError(f"`{name}` holds {odd[0]!r}; give texts.")
        if bool(self.tests) == bool(self.cases):
            raise ValueError(f"a problem has {len(self.tests)} `tests` and {len(self.cases)} `cases`; give either.")
        if self.entry_point is not None and not self.entry_point.isidentifier():
            raise ValueError(f"`entry_point` is {self.entry_point!r}; give the name of a function.")
        if not self.total:  # which parses the tests
            raise ValueError(f"`tests` hold no `assert`: {self.tests[0][:60]!r}; nothing would be tested.")

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Problem:
        """Reads the problem of a data set's row.

        Args:
            row (`Mapping`):
                With the columns of HumanEval (`prompt`, `test`, `entry_point`), those of MBPP (`test_list` and
                `test_setup_code` or `test_imports`), or `inputs` and `outputs`; and perhaps `inside`.

        Raises:
            `ValueError`: if these are missing or do not fit.
        """
        # The first kind of columns that is filled decides: rows of merged data sets have the others too, empty.
        entry_point, inside = row.get("entry_point"), bool(row.get("inside"))
        if row.get("inputs") is not None:
            inputs, outputs = row["inputs"], row.get("outputs")
            for name, column in (("inputs", inputs), ("outputs", outputs)):
                if column is not None and not isinstance(column, list | tuple):
                    raise ValueError(f"`{name}` is {column!r}; give a list of texts.")
            if outputs is None or len(inputs) != len(outputs):
                raise ValueError("a problem needs as many `outputs` as `inputs`; give one output for each input.")
            return cls(cases=tuple(zip(inputs, outputs, strict=True)))
        if row.get("test") is not None:
            if not entry_point:
                raise ValueError("a problem has a `test` and no `entry_point`; name the function that it checks.")
            setup = _helpers(row.get("prompt"), entry_point)
            return cls((row["test"], f"check({entry_point})"), setup, entry_point, inside=inside)
        if (tests := row.get("test_list")) is not None:
            if not isinstance(tests, str | list | tuple):
                raise ValueError(f"`test_list` is {tests!r}; give a list of texts.")
            setup = "\n".join([*(row.get("test_imports") or ()), row.get("test_setup_code") or ""])
            return cls(tests if isinstance(tests, str) else tuple(tests), setup, entry_point, inside=inside)
        raise ValueError(
            f"a problem has the columns {sorted(row)}; it needs `test` and `entry_point`, `test_list`, or `inputs` "
            "and `outputs`."
        )

    @cached_property
    def total(self) -> int:
        """Number of `assert`s, as they stand in the tests, or of cases."""
        asserts = sum(isinstance(node, ast.Assert) for tree in self._trees[1:] for node in ast.walk(tree))
        return len(self.cases) or asserts

    @cached_property
    def _trees(self) -> list[ast.Module]:
        try:
            return [ast.parse(source) for source in (self.setup, *self.tests)]
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"a problem's `setup` or `tests` are no Python: {error}; correct them.") from error

    @cached_property
    def names(self) -> Names:
        """Names that tests may have of the program."""
        return names_in((self.setup, *self.tests), self._trees, self.entry_point)


@dataclass(frozen=True)
class Result:
    """What became of a program.

    `verdict` is one of `VERDICTS`; `passed` of `total` assertions or cases held. `forgeable`: the tests ran in the
    program's own process. `output` is the end of what it printed, `detail` what went wrong first, `seconds` the wall
    clock's.
    """

    verdict: str
    passed: int
    total: int
    forgeable: bool
    output: str
    detail: str
    seconds: float


class Judge:
    """Judges many programs at a time, each once: the same program for the same problem gets the same result.

    Args:
        sandbox ([`Sandbox`], *optional*):
            Where programs run; `None` makes one with default limits.
        remember (`int`, *optional*, defaults to `4096`):
            Results kept.

    Example:

    ```python
    >>> with Judge() as judge:
    ...     judge(Problem(tests=("assert double(2) == 4",)), "def double(x):\\n    return 2 * x\\n").verdict
    'passed'
    ```
    """

    def __init__(self, sandbox: Sandbox | None = None, remember: int = 4096):
        self.sandbox = sandbox or Sandbox()
        self.remember = remember
        self._workers = ThreadPoolExecutor(self.sandbox.slots, thread_name_prefix="judge")
        self._results: OrderedDict[tuple[Problem, str], Future[Result]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, problem: Problem, program: str) -> Result:
        """Waits for the result of one program."""
        return self.submit(problem, program).result()

    def submit(self, problem: Problem, program: str) -> Future[Result]:
        """Returns the result of one program as a future; programs beyond the sandbox's slots wait in line."""
        with self._lock:
            result = self._results.pop((problem, program), None)
            if result is None or (result.done() and result.exception() is not None):
                result = self._workers.submit(self._judge, problem, program)
            self._results[problem, program] = result  # the latest stand last
            while len(self._results) > self.remember:
                self._results.popitem(last=False)
            return result

    def close(self) -> None:
        """Ends the sandbox; programs in line are dropped, those that run are waited for."""
        self._workers.shutdown(cancel_futures=True)
        self.sandbox.close()

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _judge(self, problem: Problem, program: str) -> Result:
        program = program.encode(errors="replace").decode()
        if problem.cases:
            return self._judge_cases(problem, program)
        tests = {"setup": problem.setup, "tests": problem.tests, **asdict(problem.names)}
        forgeable = problem.inside or not self.sandbox.isolated
        if problem.inside:
            report = self.sandbox.run({"role": "inside", "program": program, **tests})
            return _result(problem, report, report, forgeable)
        reports = self.sandbox.run_pair({"role": "program", "program": program}, {"role": "tests", **tests})
        return _result(problem, *reports, forgeable)

    def _judge_cases(self, problem: Problem, program: str) -> Result:
        """One run for each case; after one that ran out of time the rest is not tried."""
        verdict, detail, output, passed, seconds = "passed", "", "", 0, 0.0
        for stdin, expected in problem.cases:
            # What is longer than what is expected by 1 MiB is cut, which tells enough.
            keep = len(expected.encode(errors="replace")) + 2**20
            report = self.sandbox.run({"role": "script", "program": program, "stdin": stdin, "keep": keep})
            of_case, why = _script_verdict(report, expected)
            seconds += report["seconds"]
            passed += of_case == "passed"
            if verdict == "passed" != of_case:
                verdict, detail, output = of_case, why, _printed(report)
            if of_case == "timeout":
                break
        return Result(verdict, passed, problem.total, not self.sandbox.isolated, output, detail, seconds)


def _result(problem: Problem, program: Mapping, tests: Mapping, forgeable: bool) -> Result:
    """The result that the reports on program and tests give."""
    held: dict[int, bool] = {}  # by the assertion's number; one in a loop holds if it always did
    ended, why = False, None
    for row in _rows(tests["verdict"]):
        if isinstance(row[0], int):
            held[row[0]] = held.get(row[0], True) and row[1]
        ended = ended or row[0] == "end"
        if row[0] == "stopped" or row[1:2] == [False]:
            why = why or row[-3:]
    # Nothing but all of it passes: the tests ran to their end, and there was an assertion.
    if tests["ended"] == "exit" and ended and held and all(held.values()):
        return Result("passed", problem.total, problem.total, forgeable, program["tail"], "", program["seconds"])
    verdict, detail = _verdict(program, tests, why) if held or not ended else ("error", "no assertion was reached")
    passed = min(sum(held.values()), problem.total)
    return Result(verdict, passed, problem.total, forgeable, program["tail"], detail, program["seconds"])


def _rows(text: str) -> Iterator[list[Any]]:
    """Rows that tests wrote; the last may be cut, and those written inside a program may be anything."""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        kinds = [type(part) for part in row] if isinstance(row, list) else []
        if kinds[:1] == [str] or kinds[:2] == [int, bool]:
            yield row


def _verdict(program: Mapping, tests: Mapping, why: Sequence[Any] | None) -> tuple[str, str]:
    """Verdict on a program that did not pass, and what went wrong first."""
    ends = {program["ended"], tests["ended"]}
    kind, text, code = why if why is not None and len(why) == 3 else ("", "", None)
    if "memory" in ends or kind == "MemoryError":
        return "memory", "more memory than the limit"
    if "timeout" in ends:
        return "timeout", "more time than the limit"
    if kind in ("", "Gone") and program["ended"] == "exit" and not str(text).startswith("broke"):
        return _exit_verdict(program["status"])
    if kind == "AssertionError":
        return "failed", f"an assertion does not hold {text}".strip()
    return "blocked" if _refused(f"[Errno {code}] {text}") else "error", f"{kind}: {text}"


def _exit_verdict(status: int | None) -> tuple[str, str]:
    if status == -SIGKILL:
        return "memory", "killed by the system"
    if status == -SIGXCPU:
        return "timeout", "more CPU time than the limit"
    if status == -SIGXFSZ:
        return "blocked", "a file larger than the limit"
    return "error", f"ended before it answered, exit code {status}"


def _script_verdict(report: Mapping, expected: str) -> tuple[str, str]:
    if report["ended"] in ("memory", "timeout"):
        return report["ended"], "more than the limit"
    if report["status"] == 0:
        if report["cut"]:
            return "failed", "more output than expected, cut where it is 1 MiB longer"
        same = _lines(report["exact"]) == _lines(expected)
        return ("passed", "") if same else ("failed", "other output than expected")
    last = (report["tail"].strip().splitlines() or [""])[-1]
    if "MemoryError" in last:
        return "memory", last
    if _refused(last):
        return "blocked", last
    return ("error", last) if last else _exit_verdict(report["status"])


def _printed(report: Mapping) -> str:
    """The end of what a script printed."""
    cut = "\n[cut here]\n" if report["cut"] else ""
    return (report["stdout"] + cut + report["tail"])[-2000:]


def _refused(message: str) -> bool:
    """Whether an error's message tells of something that the sandbox refuses."""
    codes = {int(code) for code in re.findall(r"\[Errno (-?\d{1,3})\]", message)}
    return bool(codes & _REFUSALS) or "can't start new thread" in message


def _lines(text: str) -> list[str]:
    r"""Lines without the white space at their ends; `\x0b`, `\u2028` and the like are characters as any other."""
    return "\n".join(line.rstrip(_BLANK) for line in text.split("\n")).rstrip("\n").split("\n")


def _helpers(prompt: Any, entry_point: str) -> str:
    """What a code prompt defines besides the function to be written: the tests' side has its own of these."""
    if not isinstance(prompt, str):
        return ""
    try:
        body = ast.parse(prompt).body
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return "\n".join(ast.unparse(n) for n in body if not (isinstance(n, kinds) and n.name == entry_point))
