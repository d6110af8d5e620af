"""Execution traces of MBPP's programs: how many assertions have one, how fast, and what they bring a student."""

from __future__ import annotations

import argparse
import ast
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import load_dataset

from ra3_trl import Policy
from ra3_trl.analysis import Estimate
from ra3_trl.evaluation.tasks import HUB
from ra3_trl.losses import compute_returns
from ra3_trl.policy import Source
from ra3_trl.policy.annotators import as_latent, boundary_lines
from ra3_trl.policy.traces import FORMS, Trace, TraceAnnotator, Traced, write_trace
from ra3_trl.policy.traces.annotator import COPIES_ANSWER
from ra3_trl.policy.traces.calls import answers_of, parse
from ra3_trl.policy.traces.forms import FORM, only_says
from ra3_trl.records import Latent

from .common import default_model, say


MBPP = Path(__file__).resolve().parents[2] / "shared" / "data" / "mbpp.jsonl"
ASSERTION = "assert result =="
_TOKENS, _LATENT = 512, 160  # most tokens of a program with its assertion, and of a comment
_ABOVE = 0.5  # nats


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mbpp", help="mbpp.jsonl (default: beside the checkout in shared/data, else of the Hub)")
    parser.add_argument("--model", help="the student (default: the demo's SmolLM2-135M-Instruct)")
    parser.add_argument("--functions", type=int, default=60, help="functions that the student scores; 0 leaves it out")
    parser.add_argument("--programs", type=int, help="the first so many programs only")
    parser.add_argument("--threads", type=int, default=1)


def mbpp_rows(path: str | None = None) -> list[dict[str, Any]]:
    """All 974 rows of MBPP, of a file or of the Hub."""
    if path or MBPP.exists():
        return [json.loads(line) for line in Path(path or MBPP).read_text("utf-8").splitlines() if line.strip()]
    splits = load_dataset(HUB["mbpp"])
    return sorted((dict(row) for split in splits.values() for row in split), key=lambda row: row["task_id"])


def program(row: dict[str, Any], tests: Sequence[str] | None = None) -> str:
    """A row's code with its assertions behind it, or with `tests`."""
    code, setup = (row[name].replace("\r\n", "\n").rstrip() for name in ("code", "test_setup_code"))
    asserts = row["test_list"] if tests is None else tests
    return "\n".join([code, *([setup] if setup else []), "", *(test.strip() for test in asserts)]) + "\n"


def stated(test: str) -> tuple[str, str] | None:
    """The call and the value of `assert f(3) == 7`, as texts; `None` for an assertion of another form."""
    try:
        (statement,) = ast.parse(test.strip()).body
        sides = [statement.test.left, *statement.test.comparators]  # type: ignore[attr-defined]
        (call,) = [side for side in sides if isinstance(side, ast.Call)]
        (value,) = [side for side in sides if side is not call]
        ast.literal_eval(value)
        return ast.unparse(call), ast.unparse(value)
    except (SyntaxError, ValueError, AttributeError, TypeError):
        return None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Traces all programs by the clock, then scores some with the student."""
    torch.set_num_threads(args.threads)
    sources = [Source(program(row), row={"tests": row["test_list"]}) for row in mbpp_rows(args.mbpp)[: args.programs]]
    texts = [Source(source.text) for source in sources]  # whose assertions stand in them
    annotator = TraceAnnotator()
    try:
        annotator.trace(texts[:2])  # servers start with the first programs
        begin = time.perf_counter()
        traced = annotator.trace(texts)
        seconds = time.perf_counter() - begin
    finally:
        annotator.close()
    proposed = [annotator.say(source, one) for source, one in zip(texts, traced, strict=True)]
    none = sum((Counter(one.none) for one in proposed), Counter[str]())
    traces = [trace for one in traced for trace in one.asserts.values()]
    counts = {
        "programs": len(texts),
        "asserts": sum(len(source.row["tests"]) for source in sources),
        "traced": len(traces),
        "short": sum(trace.short for trace in traces),
        "copies": none[COPIES_ANSWER],
        "comments": sum(len(one.comments) for one in proposed),
        "none": dict(none.most_common()),
        "programs_per_s": len(texts) / seconds,
    }
    say(f"traced {len(texts)} programs in {seconds:.1f} s")
    return counts | (gains(args, texts, traced) if args.functions else {})


@dataclass(frozen=True)
class Pair:
    """A program with a call, and at `line` the assertion about its result; its trace, and another call's."""

    text: str
    line: int
    trace: Trace
    other: Trace

    @property
    def copies(self) -> bool:
        return only_says(self.trace, answers_of(parse(self.text) or ast.Module([], [])).get(self.line))


def pairs(texts: Sequence[Source], traced: Sequence[Traced]) -> Iterator[Pair]:
    """The first assertion of each program that has a short trace, with the next one's that says something else."""
    for source, one in zip(texts, traced, strict=True):
        rows = source.text.split("\n")
        short = [(line, trace) for line, trace in sorted(one.asserts.items()) if trace.short]
        for line, trace in short[:1]:
            others = [other for _, other in short[1:] if write_trace(other) != write_trace(trace)]
            said = stated(rows[line - 1])
            if others and said and all(write_trace(trace, rows, form) for form in FORMS):
                # The call stands before the thought, which else would be worth what it tells of the arguments; and of
                # all assertions nothing but this one is there.
                first = min(number for number, row in enumerate(rows, 1) if row.startswith("assert "))
                tail = [f"result = {said[0]}", f"{ASSERTION} {said[1]}", ""]
                yield Pair("\n".join([*rows[: first - 1], *tail]), first + 1, trace, others[0])


def gains(args: argparse.Namespace, texts: Sequence[Source], traced: Sequence[Traced]) -> dict[str, Any]:
    """Nats that a trace brings to `assert result == 7` behind `result = f(3)`, each in a text of its own, by the
    student as it is: in the form that annotation takes, as the trace of another call, and in the other forms."""
    policy = Policy.open(
        args.model or default_model(), use_cpu=True, horizon=1, max_length=_TOKENS + 256, max_latent_length=_LATENT
    )
    rows: list[dict[str, float]] = []
    copies: list[bool] = []
    with policy.inference():
        for pair in pairs(texts, traced):
            found = _score(policy, pair)
            if found is not None:
                rows.append(found)
                copies.append(pair.copies)
            if len(rows) == args.functions:
                break
    say(f"scored {len(rows)} functions")
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    told = [row[FORM] for row, copy in zip(rows, copies, strict=True) if not copy]
    other = [row["other"] for row, copy in zip(rows, copies, strict=True) if not copy]
    return {
        "functions": len(rows),
        "student_gain_true": _mean(columns.get(FORM, [])),
        "student_gain_other_call": _mean(columns.get("other", [])),
        "helps_true": _mean([float(gain > _ABOVE) for gain in columns.get(FORM, [])]),
        "helps_other_call": _mean([float(gain > _ABOVE) for gain in columns.get("other", [])]),
        "without_copies": {
            "functions": len(told),
            "student_gain_true": _mean(told),
            "student_gain_other_call": _mean(other),
        },
        "by_form": {form: _mean(columns.get(form, [])) for form in FORMS},
        "intervals": {name: asdict(Estimate.of(tuple(values))) for name, values in columns.items()},
    }


def _score(policy: Policy, pair: Pair) -> dict[str, float] | None:
    """The gain of each comment before the pair's assertion; `None` for a program that is too long."""
    document, *more = policy.segment(pair.text)
    rows = pair.text.split("\n")
    said = {form: write_trace(pair.trace, rows, form) for form in FORMS} | {"other": write_trace(pair.other)}
    latents = [as_latent(policy, f" {text}") for text in said.values()]
    known = [latent for latent in latents if isinstance(latent, Latent)]
    if more or len(document.input_ids) > _TOKENS or len(known) < len(said):
        return None
    (lines,) = boundary_lines(pair.text, [document], policy.engine.table.token_bytes)
    if pair.line not in lines:
        return None
    group = policy.score(document, [lines[pair.line]], [known])
    return dict(zip(said, compute_returns(group, 1, 1.0).gain_TG[0].tolist(), strict=True))


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
