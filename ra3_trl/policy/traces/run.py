"""Programs with their calls in the sandbox, each several times, with hash seeds of their own."""

from __future__ import annotations

import marshal
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...sandbox import Limits, Sandbox
from .forms import Change, Trace


LIMITS = Limits(seconds=2.0)
_SOURCE = (Path(__file__).parent / "guest.py").read_text("utf-8")
# Compiled, since each run would do it anew: the interpreter in the sandbox is this one.
GUEST = f"import marshal\nexec(marshal.loads({marshal.dumps(compile(_SOURCE, '<guest>', 'exec'))!r}))\n"
# Of further runs: the first has the sandbox's own, 0. A set's order shows in one run of two at least if it has two
# texts, so texts with sets run more often.
SEEDS, SEEDS_OF_SETS = (1,), (1, 2, 3)
_MAY_HOLD_SETS = re.compile(r"\b(set|frozenset|keys)\b|\{[^:{}]*\}")
_NUMBER = re.compile(r"[0-9]{1,9}")
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")
# Why there is no trace, of a text or of an assertion or call.
NO_CALL, NO_PYTHON, TIMEOUT, MEMORY, GONE = (
    "no assertion or call", "no Python", "more time than the limit", "more memory than the limit", "ended by itself",
)  # fmt: skip
RAISED, TOO_MANY_STEPS = "raises before its calls are done", "too many steps"
FAILS, ASKS, DIFFERS = "does not hold, or not once", "asks for time, chance or addresses", "differs from run to run"


@dataclass(frozen=True)
class Traced:
    """What is known of a program: traces of its assertions, by line; of its calls, by the line at which their function
    returned; and how often there was `none`, by the reason."""

    asserts: dict[int, Trace] = field(default_factory=dict)
    calls: dict[int, list[Trace]] = field(default_factory=dict)
    none: Counter[str] = field(default_factory=Counter)


# By kind, line and number of the call: whether it holds, whether something was asked for, how many changes, changes.
_Rows = dict[tuple[str, int, int], tuple[str, ...]]


class Tracer:
    """Traces programs in a sandbox; threads may share it.

    Args:
        sandbox ([`~ra3_trl.sandbox.Sandbox`], *optional*):
            Where they run; `None` makes one, two seconds a run.

    Raises:
        `SandboxError`: if there is none here and `HF_ALLOW_CODE_EVAL` is not `1`.
    """

    def __init__(self, sandbox: Sandbox | None = None):
        self.sandbox = sandbox or Sandbox(limits=LIMITS)
        self._seeded = {seed: self.sandbox.seeded(seed) for seed in SEEDS_OF_SETS}

    def __call__(self, text: str, calls: Sequence[str] = ()) -> Traced:
        """Runs a text and then the calls in its namespace, and keeps what all runs agree on."""
        if not calls and "assert" not in text:
            return Traced(none=Counter([NO_CALL]))
        job = repr((text, list(calls)))
        first, why = self._run(self.sandbox, job)
        none = Counter(why and [why])
        traced = Traced(none=none)
        if not first:
            none.update([] if why else [NO_CALL])
            return traced
        seeds = SEEDS_OF_SETS if _MAY_HOLD_SETS.search("\n".join([text, *calls])) else SEEDS
        others = [self._run(self._seeded[seed], job)[0] for seed in seeds]
        for key, fields in first.items():
            reason = _refused(fields, [other.get(key) for other in others])
            if reason:
                none[reason] += 1
            elif key[0] == "assert":
                traced.asserts[key[1]] = _read(fields)
            else:
                traced.calls.setdefault(key[1], []).append(_read(fields))
        return traced

    def _run(self, sandbox: Sandbox, job: str) -> tuple[_Rows, str]:
        """What one run printed, and why that is not all, if it is not."""
        report = sandbox.run({"role": "script", "program": GUEST, "stdin": job})
        rows: _Rows = {}
        why = {"timeout": TIMEOUT, "memory": MEMORY}.get(report["ended"], GONE)
        for line in report["stdout"].split("\n"):
            kind, *fields = line.split("\x1f")
            if kind == "end":
                ends = {"": "", "steps": TOO_MANY_STEPS, "SyntaxError": NO_PYTHON, "MemoryError": MEMORY}
                why = ends.get("".join(fields), RAISED)
                continue
            if kind == "fails":
                rows["fails", 0, len(rows)] = ("0", "0", "0")
            if kind not in ("assert", "call") or len(fields) % 3 != 1:
                continue
            if all(map(_NUMBER.fullmatch, [*fields[:4], *fields[4::3]])):
                first, second, *rest = fields
                place = ("assert", int(first), 0) if kind == "assert" else ("call", int(second), int(first))
                holds = "0" if place in rows or (kind == "assert" and second != "1") else "1"
                rows[place] = (holds, *rest)
        return rows, why

    def close(self) -> None:
        """Ends the sandbox."""
        for sandbox in (self.sandbox, *self._seeded.values()):
            sandbox.close()


def _refused(fields: tuple[str, ...], others: Sequence[tuple[str, ...] | None]) -> str:
    """Why a trace is none, nothing if it is one."""
    holds, asked, *_ = fields
    if holds != "1":
        return FAILS
    if asked != "0":
        return ASKS
    return DIFFERS if any(other != fields for other in others) or _ADDRESS.search(" ".join(fields)) else ""


def _read(fields: tuple[str, ...]) -> Trace:
    """The trace in what was printed."""
    count, rest = int(fields[2]), fields[3:]
    changes = zip(map(int, rest[::3]), rest[1::3], rest[2::3], strict=True)
    return Trace(tuple(Change(*change) for change in changes), count)
