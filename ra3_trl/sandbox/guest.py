"""What runs inside the sandbox: a warm server that forks one player for each job, watches it and ends it.

    server     in bubblewrap's namespaces; has imported what programs may want; sees no byte of any job
    player     first process of user, pid, mount and IPC namespaces of its own; no capabilities, limits, own /tmp and
               /proc; the only one that runs foreign code (players.py), and what it can reach ends with it

The network namespace is the server's, which has no way out and nobody else in it. Imports nothing of this package
by its name, since only this folder is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import select
import signal
import socket
import time
from typing import Any

import confine
import players
import program
import wire
from memory import Memory, processes


_NEW_MOUNTS, _NEW_IPC, _NEW_USERS, _NEW_PIDS = 0x20000, 0x8000000, 0x10000000, 0x20000000
_CLONE = {"x86_64": 56, "aarch64": 220}
_python = ctypes.PyDLL(None, use_errno=True)


def main(control: int, jobs: int, limits: dict[str, Any], isolated: bool) -> Any:
    """Serves jobs until the host is gone: `s` on the socket `control` starts one, `k` ends it, once for each job.

    The job itself comes by the socket `jobs`, which only players read: one message, and with it descriptors for
    standard output, for what else is printed and for the verdict, and perhaps a socket between program and tests.
    After each comes a report: `ended` (`"exit"`, `"timeout"`, `"memory"` or `"stopped"`), `status` (exit code, or
    minus the signal) and `seconds`. Without `isolated` only limits apply.

    Returns in a player that has run a script, with what it exits by, so that Python ends it as it ends any script:
    threads are joined, `atexit` and `__del__` run, files are flushed.
    """
    host = socket.socket(fileno=control)
    gc.collect()
    gc.freeze()  # so that a player's collections do not copy the server's pages
    wire.send(host, "ready")
    while host.recv(1) == b"s":
        start = time.monotonic()
        pid = _clone() if isolated else os.fork()
        if pid == 0:
            host.detach()  # its number will be a file's of the program
            return _play(jobs, limits, isolated)
        ended = _watch(pid, host, limits, isolated)
        _kill(pid, isolated)
        _, status = os.waitpid(pid, 0)
        status = os.waitstatus_to_exitcode(status)
        wire.send(host, {"ended": ended, "status": status, "seconds": time.monotonic() - start})
        if ended != "stopped":
            host.recv(1)
    return None


def _clone() -> int:
    """`os.fork` into new namespaces, whose first process the child is."""
    flags = _NEW_USERS | _NEW_MOUNTS | _NEW_PIDS | _NEW_IPC | signal.SIGCHLD
    _python.PyOS_BeforeFork()
    pid = _python.syscall(_CLONE[platform.machine()], flags, 0, 0, 0, 0)
    if pid == 0:
        _python.PyOS_AfterFork_Child()
    else:
        _python.PyOS_AfterFork_Parent()
        if pid < 0:
            raise OSError(ctypes.get_errno(), f"new namespaces: {os.strerror(ctypes.get_errno())}")
    return pid


def _play(jobs: int, limits: dict[str, Any], isolated: bool) -> Any:
    """The player's life; returns what a script exits by, and never for other roles."""
    status = 1
    script = False
    try:
        received: list[int] = []
        with socket.socket(fileno=jobs) as connection:
            job = wire.receive(connection, received)
        stdout, tail, verdict, *channel = received
        try:
            _prepare(job, stdout, tail, limits, isolated)
        except (OSError, ValueError) as error:
            os.write(verdict, f"{wire.BROKEN}{type(error).__name__}: {error}".encode(errors="replace"))
            raise
        confine.close_but([verdict, *channel] if job["role"] in ("tests", "inside") else channel)
        if job["role"] == "script":
            result = program.run_script(job["program"], isolated)
            script = True
            return result
        status = players.play(job, channel[0] if channel else None, verdict)
    finally:
        if not script:
            os._exit(status)


def _prepare(job: dict[str, Any], stdout: int, tail: int, limits: dict[str, Any], isolated: bool) -> None:
    """Isolates this process, gives it its standard streams and limits it."""
    os.setsid()
    if isolated:
        confine.own_folders(limits)
    os.dup2(stdout if job["role"] == "script" else tail, 1)
    os.dup2(tail, 2)
    confine.set_stdin(job.get("stdin", ""))
    confine.limit(limits, isolated)


def _watch(pid: int, host: socket.socket, limits: dict[str, Any], isolated: bool) -> str:
    """Waits until the player ends, or must, and returns how it ended."""
    deadline = time.monotonic() + limits["seconds"]
    pidfd = os.pidfd_open(pid)
    memory = Memory(pid, limits["memory_mb"] * 2**20, limits["socket_kb"] * 2**10, confine.DESCRIPTORS)
    wait = 0.02
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(host, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in poll.poll(1000 * min(left, wait))]
            if pidfd in ready:
                return "exit"
            if ready:
                host.recv(1)  # b"k", or nothing where the host is gone
                return "stopped"
            wait = memory.wait() if isolated else wait
            if wait == 0:
                for name in processes():  # at once; its first process would die when its turn comes, and they with it
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(name), signal.SIGKILL)
                return "memory"
        return "timeout"
    finally:
        os.close(pidfd)


def _kill(pid: int, isolated: bool) -> None:
    """Ends the player; with it, as the first of its pid namespace, everything it started."""
    if isolated:
        os.kill(pid, signal.SIGKILL)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
