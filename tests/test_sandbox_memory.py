"""What a job holds is bounded, of whatever kind: programs take all they can and print a byte for each MiB."""

from __future__ import annotations

import signal

import pytest
from conftest import needs_bwrap

from benchmarks.memory_attacks import ATTACKS, LIMITS, held_mb
from ra3_trl.sandbox import Judge, Limits, Problem, Sandbox, memory


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


def test_it_waits_until_a_stopped_process_is_still(monkeypatch):
    """One is in the kernel for two more looks; it is counted when it is still, and goes on after it."""
    states = iter([b"R 1", b"R 1", b"R 1", b"T 1"])  # whether it runs, then after each signal or pause
    seen = []
    monkeypatch.setattr(memory, "processes", lambda: ["7"])
    monkeypatch.setattr(memory, "_stat", lambda name: seen.append(next(states)) or seen[-1])
    monkeypatch.setattr(memory, "_send", lambda name, number: seen.append(number))
    monkeypatch.setattr(memory, "_STOP", 60.0)
    names = ["7"]
    with memory._stopped(names):
        seen.append("counted")
    assert seen == [b"R 1", signal.SIGSTOP, b"R 1", b"R 1", b"T 1", "counted", signal.SIGCONT]
    assert names == ["7"]


def test_it_does_not_wait_for_ever(monkeypatch):
    """A process that waits in the kernel, as for what it started, is counted as it is."""
    sent, looks = [], iter([b"D 1"] * 10_000)
    monkeypatch.setattr(memory, "processes", lambda: ["7"])
    monkeypatch.setattr(memory, "_stat", lambda name: next(looks))
    monkeypatch.setattr(memory, "_send", lambda name, number: sent.append(number))
    monkeypatch.setattr(memory, "_STOP", 0.01)
    with memory._stopped(["7"]):
        assert sent == [signal.SIGSTOP]
    assert sent == [signal.SIGSTOP, signal.SIGCONT]


def test_what_is_filled_during_a_slow_count_is_not_lost(monkeypatch):
    """300 pages by the quick count, over a limit of 200; the slow one finds 150, while the process fills 40 more. With
    20 after it, 210 may be there: too much, where faults counted after the pages would give 170."""
    faults, page = [0], memory._PAGE

    def share(name):
        faults[0] += 40
        return 150 * page

    monkeypatch.setattr(memory, "processes", lambda: ["7"])
    monkeypatch.setattr(memory, "_send", lambda name, number: None)
    monkeypatch.setattr(memory, "_stat", lambda name: b"T 1 1 1 1 1 1 %d" % faults[0])
    monkeypatch.setattr(memory, "_pages", lambda names: 300 * page)
    monkeypatch.setattr(memory, "_share", share)
    monkeypatch.setattr(memory.Memory, "_others", lambda self, names, pipes: 0)
    monkeypatch.setattr(memory.Memory, "_files", lambda self, name: 0)
    watcher = memory.Memory(player=7, limit=200 * page, socket=0, descriptors=0)
    assert watcher.wait() > 0
    assert watcher.count == memory.Count({"7"}, 150 * page, 0)
    faults[0] += 20
    assert watcher.wait() > 0 and watcher.count.faults == 60  # a slow count anew
