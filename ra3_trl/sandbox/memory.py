"""How much memory a job holds, counted from outside of it: by the server, which sees all its processes.

    private      each process's own pages and page tables; pages that forked ones share count once
    files        what lies in /tmp and /dev/shm
    pipes        their full size, whatever is in them
    sockets      as much as each may hold, whatever is in it; sent and not yet received ones too

Shared memory is counted with /dev/shm, since `confine.py` refuses all that lies in no file, as it refuses larger
buffers and large pages. So a job holds `memory_mb` at most, and what it printed, and what grows between two looks:
these come the faster the less is left. Imports nothing of this package, since it runs inside the sandbox.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass


_PAGE = os.sysconf("SC_PAGE_SIZE")
_PIPE = 16 * _PAGE
_LOOK = 0.02, 0.001  # seconds between looks, at most and at least; `poll` knows no part of a millisecond
_STOP = 0.1  # seconds that stopping may take
_STILL = b"", b"T", b"t", b"Z", b"X"  # how a process is that does not run: ended or stopped
_GROWTH = 8 * 2**30  # bytes a second that a processor fills at most
_OTHERS = {name for name in os.listdir("/proc") if name.isdecimal()}  # the server, which imports this, and bubblewrap
_OWN = re.compile(rb"^(?:RssAnon|VmSwap):\s*(\d+)", re.M)
_SHARE = re.compile(rb"^(?:Pss_Anon|SwapPss):\s*(\d+)", re.M)
_TABLES = re.compile(rb"^VmPTE:\s*(\d+)", re.M)
_SOCKETS = re.compile(rb"^sockets: used (\d+)", re.M)


def processes() -> list[str]:
    """The job's processes: all that /proc shows, but those that were there before it."""
    return [name for name in os.listdir("/proc") if name.isdecimal() and name not in _OTHERS]


@dataclass
class Count:
    """The pages of some processes, each counted once, when none of them ran.

    Args:
        names (`set[str]`):
            The processes.
        pages (`int`):
            Bytes.
        faults (`int`):
            Page faults that they had had before: every page that is new since then, a copy of a shared one too, is one
            more.
    """

    names: set[str]
    pages: int
    faults: int


class Memory:
    """What the processes beside this one hold.

    Args:
        player (`int`):
            The job's first process, whose folders all of the job see.
        limit (`int`):
            Bytes that they may hold.
        socket (`int`):
            Bytes that a socket may hold in its buffer.
        descriptors (`int`):
            Files that a process may have open.
    """

    def __init__(self, player: int, limit: int, socket: int, descriptors: int):
        self.player, self.limit, self.socket, self.descriptors = player, limit, socket, descriptors
        self.processors = len(os.sched_getaffinity(0))
        self.count = Count(set(), 0, 0)

    def wait(self) -> float:
        """Seconds until it must be looked at again; 0 if there is more than the limit.

        The quick count is too high where processes share pages or files. If it is above the limit, they are stopped
        for a slow one, through their tables of pages. From then on, and as long as no process comes or goes, there can
        be no more than the slow count and a page for each fault.
        """
        names = processes()
        pages, faults = _pages(names), _faults(names)
        if self.count.names == set(names):
            pages = min(pages, self.count.pages + max(0, faults - self.count.faults) * _PAGE)
        held = pages + self._others(names, sum(self._files(name) for name in names))
        if held > self.limit:
            with _stopped(names):
                faults = _faults(names)  # first, for one that has not stopped yet
                self.count = Count(set(names), sum(_share(name) for name in names), faults)
                held = self.count.pages + self._others(
                    names, len({pipe for name in names for pipe in self._pipes(name)})
                )
        left = self.limit - held
        most, least = _LOOK
        return 0.0 if left < 0 else min(most, max(least, left / _GROWTH / self.processors))

    def _others(self, names: list[str], pipes: int) -> int:
        """Bytes of what is no page of a process."""
        held = pipes * _PIPE + sum(size for name in names for size in _kib(_TABLES, name, "status"))
        for folder in ("tmp", "dev/shm"):
            with contextlib.suppress(OSError):  # it has just ended
                there = os.statvfs(f"/proc/{self.player}/root/{folder}")
                held += (there.f_blocks - there.f_bfree) * there.f_frsize
        with open("/proc/self/net/sockstat", "rb", 0) as lines:  # the job is alone in the server's network
            return held + sum(int(used) for used in _SOCKETS.findall(lines.read())) * self.socket

    def _files(self, name: str) -> int:
        """How many files a process has open, as many as it may have if it hides them."""
        try:
            return len(os.listdir(f"/proc/{name}/fd"))
        except OSError:
            return self.descriptors if _pages([name]) else 0  # one that has ended has neither

    def _pipes(self, name: str) -> Iterator[str]:
        """The pipes that a process has open, as `pipe:[7]`, the same in all that share them."""
        try:
            numbers = os.listdir(f"/proc/{name}/fd")
        except OSError:
            yield from (f"hidden:{name}:{i}" for i in range(self._files(name)))
            return
        for number in numbers:
            with contextlib.suppress(OSError):
                file = os.readlink(f"/proc/{name}/fd/{number}")
                if file.startswith("pipe:"):
                    yield file


@contextlib.contextmanager
def _stopped(names: list[str]) -> Iterator[None]:
    """Keeps processes from running, and what they start until they have stopped, which it adds to `names`. Waits until
    they are still: where processors are busy, each first ends what it does in the kernel when its turn comes."""
    stopped: set[str] = set()
    going: list[str] = []  # others were stopped by the program itself
    end = time.monotonic() + _STOP
    try:
        while (new := [name for name in processes() if name not in stopped]) or (
            time.monotonic() < end and not all(_stat(name)[:1] in _STILL for name in stopped)
        ):
            stopped |= {*new}
            going += [name for name in new if _stat(name)[:1] not in _STILL]
            for name in new:
                _send(name, signal.SIGSTOP)
            time.sleep(0.0002)
        names[:] = [*stopped]
        yield
    finally:
        for name in going:
            _send(name, signal.SIGCONT)


def _send(name: str, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(name), number)


def _pages(names: list[str]) -> int:
    """Bytes of their own pages, where each process has what it shares."""
    return sum(sum(_kib(_OWN, name, "status")) for name in names)


def _share(name: str) -> int:
    """Bytes of a process's own pages, where what it shares is divided; all of them if it hides them."""
    return sum(_kib(_SHARE, name, "smaps_rollup")) or _pages([name])


def _faults(names: list[str]) -> int:
    return sum(int(fields[7]) for name in names if (fields := _stat(name).split()))


def _stat(name: str) -> bytes:
    """What follows the name of a process in its `stat`: first how it is; nothing of one that has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb", 0) as line:
        return line.read().rpartition(b") ")[2]
    return b""


def _kib(pattern: re.Pattern[bytes], name: str, file: str) -> Iterator[int]:
    """Bytes that lines of a process's file give in KiB; none of a process that has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{name}/{file}", "rb", 0) as lines:
        yield from (int(size) * 1024 for size in pattern.findall(lines.read()))
