"""How much memory a job holds, counted from outside of it: by the server, which sees all its processes.

    private      each process's own pages and page tables; pages that forked ones share count once
    files        what lies in /tmp and /dev/shm
    pipes        their full size, whatever is in them
    sockets      as much as a pair may hold, whatever is in it

Shared memory is counted with /dev/shm, since `confine.py` refuses all that lies in no file, as it refuses larger
buffers. So a job holds `memory_mb` at most, and what it printed, and what grows between two looks: these come the
faster the less is left. Imports nothing of this package, since it runs inside the sandbox.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator


_PIPE = 16 * os.sysconf("SC_PAGE_SIZE")
_LOOK = 0.02, 0.0005  # seconds between looks, at most and at least
_GROWTH = 8 * 2**30  # bytes a second that a processor fills at most
_OTHERS = {name for name in os.listdir("/proc") if name.isdecimal()}  # the server, which imports this, and bubblewrap
_OWN = re.compile(rb"^(?:RssAnon|VmSwap|VmPTE):\s*(\d+)", re.M)
_SHARE = re.compile(rb"^(?:Pss_Anon|SwapPss):\s*(\d+)", re.M)
_TABLES = re.compile(rb"^VmPTE:\s*(\d+)", re.M)


def processes() -> list[str]:
    """The job's processes: all that /proc shows, but those that were there before it."""
    return [name for name in os.listdir("/proc") if name.isdecimal() and name not in _OTHERS]


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
        self.surplus: dict[str, int] = {}  # by process: what a quick count has too much
        self.counted = 0.0  # when that was found out

    def wait(self) -> float:
        """Seconds until it must be looked at again; 0 if there is more than the limit.

        The quick count is too high where processes share pages or have files open. If it is above the limit, a slow
        one reads through the tables of pages, and tells by how much for the looks to come: growth shows in both. Not
        for long, since what is shared may be given up, and taken anew, without a change of the quick count.
        """
        quick = {name: self._quickly(name) for name in processes()}
        if not self.surplus.keys() <= quick.keys() or time.monotonic() - self.counted > _LOOK[0]:
            self.surplus = {}
        held = self._files() + sum(quick.values()) - sum(self.surplus.values())
        if held > self.limit:
            exact = self._exactly([*quick])
            self.surplus = {name: quick[name] - exact[name] for name in quick}
            self.counted = time.monotonic()
            held = self._files() + sum(exact.values())
        left = self.limit - held
        most, least = _LOOK
        return 0.0 if left < 0 else min(most, max(least, left / _GROWTH / self.processors))

    def _files(self) -> int:
        held = 0
        for folder in ("tmp", "dev/shm"):
            with contextlib.suppress(OSError):  # it has just ended
                there = os.statvfs(f"/proc/{self.player}/root/{folder}")
                held += (there.f_blocks - there.f_bfree) * there.f_frsize
        return held

    def _quickly(self, name: str) -> int:
        own = sum(_kib(_OWN, name, "status"))
        with contextlib.suppress(OSError):
            return own + len(os.listdir(f"/proc/{name}/fd")) * max(self.socket, _PIPE)
        return own and own + self.descriptors * self.socket  # a process that hides its files; a dead one has no memory

    def _exactly(self, names: list[str]) -> dict[str, int]:
        exact, seen = {}, set()
        for name in names:
            share = [*_kib(_SHARE, name, "smaps_rollup"), *_kib(_TABLES, name, "status")]
            # A process that hides its pages counts in full.
            pages = sum(share) if len(share) > 1 else sum(_kib(_OWN, name, "status"))
            new = set(self._open(name)) - seen
            seen |= new
            exact[name] = pages + sum(_PIPE if file.startswith("pipe:") else self.socket for file in new)
        return exact

    def _open(self, name: str) -> Iterator[str]:
        """The pipes and sockets that a process has open, as `pipe:[7]`, the same in all that share them."""
        try:
            numbers = os.listdir(f"/proc/{name}/fd")
        except OSError:
            if sum(_kib(_OWN, name, "status")):
                yield from (f"hidden:{name}:{i}" for i in range(self.descriptors))
            return
        for number in numbers:
            with contextlib.suppress(OSError):
                file = os.readlink(f"/proc/{name}/fd/{number}")
                if file.startswith(("pipe:", "socket:")):
                    yield file


def _kib(pattern: re.Pattern[bytes], name: str, file: str) -> Iterator[int]:
    """Bytes that lines of a process's file give in KiB; none of a process that has ended."""
    with contextlib.suppress(OSError), open(f"/proc/{name}/{file}", "rb", 0) as lines:
        yield from (int(size) * 1024 for size in pattern.findall(lines.read()))
