"""The sandbox: programs per second, alone and with 64 in line, and what 10,000 programs leave behind."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import time
from collections import Counter, deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from ra3_trl.rewards import Judge, Limits, Problem, Sandbox


SQUARE = Problem(tests=("assert f(2) == 4", "assert f(3) == 9"))
HOSTILE = (
    "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "x = []\nwhile True: x.append(bytearray(10**7))",
    "while True: pass",
    "import os\nos._exit(0)",
    "while True: print('x' * 1000)",
    "open('/tmp/x', 'wb').write(bytes(10**8))",
    "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(100)\ndef f(x): return 0",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--programs", type=int, default=1000, help="short programs to time")
    parser.add_argument("--soak", type=int, default=10_000, help="programs, 1 %% hostile, before leaks are counted")
    parser.add_argument("--humaneval", type=Path, help="HumanEval.jsonl.gz: its own solutions, passed and seconds")
    parser.add_argument("--mbpp", type=Path, help="mbpp.jsonl, the same")
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of a program of these two")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements; `leaks` counts processes, descriptors and files in /tmp and /dev/shm."""
    with Judge(Sandbox(limits=Limits(seconds=1.0)), remember=1) as judge:
        judged(judge, short(20, "warm"), 2)
        slots = judge.sandbox.slots
        alone = rate(judge, list(short(args.programs, "alone")), slots)
        loaded = rate(judge, list(short(args.programs, "loaded")), 64)
        found = {"slots": slots, "programs_per_s": alone, "under_load_ratio": loaded / alone}
        before = traces()
        verdicts = judged(judge, mixed(args.soak), 64)
        time.sleep(1)
        left = {name: max(0, count - before[name]) for name, count in traces().items()}
    wrong = sum(count for (hostile, verdict), count in verdicts.items() if hostile is (verdict == "passed"))
    found |= {"soak": args.soak, "wrong_verdicts": wrong, "leaks": sum(left.values())}
    for name in ("humaneval", "mbpp"):
        if (path := vars(args)[name]) is not None:
            found |= {f"{name}_{key}": value for key, value in own_solutions(path, args.seconds).items()}
    return found


def short(count: int, name: str) -> Iterable[tuple[bool, Problem, str]]:
    return ((False, SQUARE, f"def f(x): return x * x  # {name} {i}") for i in range(count))


def mixed(count: int) -> Iterable[tuple[bool, Problem, str]]:
    """Short programs, one in a hundred hostile."""
    drawn = random.Random(0)
    for i, (_, problem, program) in enumerate(short(count, "soak")):
        hostile = drawn.random() < 0.01
        yield hostile, problem, f"{drawn.choice(HOSTILE)}\n# {i}" if hostile else program


def rate(judge: Judge, programs: list[tuple[bool, Problem, str]], in_flight: int) -> float:
    """Programs per second, all of which must pass."""
    start = time.perf_counter()
    assert set(judged(judge, programs, in_flight)) == {(False, "passed")}
    return len(programs) / (time.perf_counter() - start)


def judged(judge: Judge, programs: Iterable[tuple[bool, Problem, str]], in_flight: int) -> Counter:
    """How often each verdict came, by whether the program was hostile; at most `in_flight` requests at a time."""
    verdicts, line = Counter(), deque()
    for hostile, problem, program in programs:
        if len(line) == in_flight:
            was, future = line.popleft()
            verdicts[was, future.result().verdict] += 1
        line.append((hostile, judge.submit(problem, program)))
    return verdicts + Counter((was, future.result().verdict) for was, future in line)


def own_solutions(path: Path, seconds: float) -> dict[str, float]:
    """How many of a benchmark's own solutions pass its tests, and the time of all."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    solutions = [
        row["prompt"] + row["canonical_solution"] if "canonical_solution" in row else row["code"] for row in rows
    ]
    programs = [(False, Problem.from_row(row), solution) for row, solution in zip(rows, solutions, strict=True)]
    with Judge(Sandbox(limits=Limits(seconds=seconds)), remember=1) as judge:
        judged(judge, short(20, "warm"), 2)
        start = time.perf_counter()
        verdicts = judged(judge, programs, 64)
        return {"of": len(rows), "passed": verdicts[False, "passed"], "s": time.perf_counter() - start}


def traces() -> dict[str, int]:
    """What programs could leave on the host."""
    alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    folders = {name: len(os.listdir(name)) for name in ("/tmp", "/dev/shm", "/proc/self/fd")}
    return {"processes": len(alive), **folders}
