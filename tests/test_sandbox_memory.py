"""What a job holds is bounded, of whatever kind: programs take all they can and print a byte for each MiB."""

from __future__ import annotations

import os

import pytest
from conftest import needs_bwrap

from benchmarks.memory_attacks import ATTACKS, LIMITS, held_mb
from ra3_trl.sandbox import Judge, Limits, Problem, Sandbox


pytestmark = needs_bwrap
SQUARE = Problem(tests=("assert f(3) == 9",))
HONEST = "def f(x): return x * x\n"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(slots=1, limits=Limits(seconds=1.5, memory_mb=LIMITS.memory_mb, processes=LIMITS.processes)) as made:
        yield made


@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_job_holds_is_bounded(sandbox, name):
    """Within 1.2 times the limit; refused kinds hold nothing, others at least 8 MiB, so that the attack is one."""
    held = held_mb(sandbox, ATTACKS[name])
    if ATTACKS[name].refused:
        assert held == 0
    else:
        assert 8 < held <= 1.2 * LIMITS.memory_mb


HONEST_USES = {
    # 100 MiB that six forked processes read are 100 MiB, not 700.
    "shared_by_fork": "import os\nx = b'x' * (100 * 2**20)\nfor _ in range(6):\n    if os.fork() == 0:\n"
    "        sum(x[::4096])\n        __import__('time').sleep(0.3)\n        os._exit(0)\n"
    "for _ in range(6): os.wait()\n",
    # 11 processes with 53 files open: as many sockets would be more than the limit.
    "open_files": "import os\nx = [open('/usr/bin/env') for _ in range(50)]\nfor _ in range(10):\n"
    "    if os.fork() == 0:\n        __import__('time').sleep(0.3)\n        os._exit(0)\n"
    "for _ in range(10): os.wait()\n",
    "event_loop": "import asyncio\nasync def g(): return 1\nassert asyncio.run(g()) == 1\n",
    "pool": "from multiprocessing import Array, Pool, Queue\na, q = Array('i', 10), Queue()\n"
    "def g(x): return x + a[0]\nwith Pool(3) as pool: assert pool.map(g, [1, 2]) == [1, 2]\n",
    "subprocess": "import subprocess\nx = b'x' * (100 * 2**20)\nfor _ in range(9): subprocess.run(['/usr/bin/env'])\n",
}


@pytest.mark.parametrize("name", HONEST_USES)
def test_honest_uses_are_counted_once(name):
    with Judge(Sandbox(slots=1, limits=Limits(seconds=5.0, memory_mb=256, processes=16))) as judge:
        result = judge(SQUARE, HONEST_USES[name] + HONEST)
    assert result.verdict == "passed", result


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="has one processor")
def test_a_job_that_shares_pages_leaves_the_first_processor_to_the_server():
    """7 processes with 100 MiB are 700 by the quick count, above 256: a slow one follows, and gives the processor."""
    program = (
        "import os, time\nx, all_of_them = b'x' * (100 * 2**20), os.sched_getaffinity(0)\nfor _ in range(6):\n"
        "    if os.fork() == 0:\n        time.sleep(3)\n        os._exit(0)\n"
        "end = time.monotonic() + 3\n"
        "while os.sched_getaffinity(0) == all_of_them and time.monotonic() < end: time.sleep(0.01)\n"
        "assert os.sched_getaffinity(0) == all_of_them - {min(all_of_them)}\n"
    )
    with Judge(Sandbox(slots=1, limits=Limits(seconds=5.0, memory_mb=256, processes=16))) as judge:
        result = judge(SQUARE, program + HONEST)
    assert result.verdict == "passed", result
