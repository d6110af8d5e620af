"""Plain Python's word on pairs of program and test: which tests pass. Reads and writes JSON; imports nothing of ours.

Each pair runs in a process of its own: the program as a module, the test in the same namespace behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from tempfile import TemporaryDirectory


SECONDS = 10


def passes(program: str, test: str) -> bool:
    """Whether a test of a program's functions passes."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(SECONDS)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            module = sys.modules["program"] = sys.modules["__main__"] = types.ModuleType("program")
            exec(compile(program, "<program>", "exec", dont_inherit=True), vars(module))
            module.__name__ = "__main__"
            exec(compile(test, "<test>", "exec", dont_inherit=True), vars(module))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    return status == 0


def prints(program: str, stdin: str, expected: str) -> bool:
    """Whether a script ends well and prints what is expected, but for spaces at the ends of lines."""
    with TemporaryDirectory() as folder:
        file, read = Path(folder, "program.py"), Path(folder, "stdin.txt")
        file.write_text(program, encoding="utf-8")
        read.write_text(stdin, encoding="utf-8")
        run = subprocess.run(
            [sys.executable, str(file)], stdin=read.open("rb"), capture_output=True, cwd=folder, timeout=SECONDS,
            check=False, env={"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"},
        )  # fmt: skip
    said = run.stdout.decode(errors="surrogateescape")
    lines, wanted = ([line.rstrip(" ") for line in text.rstrip().split("\n")] for text in (said, expected))
    return run.returncode == 0 and lines == wanted


if __name__ == "__main__":
    sys.stdout.write(json.dumps([(prints if len(row) == 3 else passes)(*row) for row in json.load(sys.stdin)]))
