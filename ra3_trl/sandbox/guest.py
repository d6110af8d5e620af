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
import resource
import select
import signal
import socket
import struct
import time
from pathlib import Path
from typing import Any

import players
import wire


UID = 1000
_NEW_MOUNTS, _NEW_IPC, _NEW_USERS, _NEW_PIDS = 0x20000, 0x8000000, 0x10000000, 0x20000000
_NOSUID_NODEV, _NOEXEC = 2 | 4, 8
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_CLONE = {"x86_64": 56, "aarch64": 220}
# System calls that hold memory past the limits (memory files, System V and POSIX queues, io_uring), reach other
# processes, or open doors of the kernel that no program here needs.
_REFUSED = {
    "x86_64": (
        0xC000003E,
        (29, 64, 68, 101, 155, 161, 165, 166, 175, 240, 246, 248, 249, 250, 272, 298, 308, 310, 311, 313, 319, 321,
         323, 425, 426, 427, 428, 429, 430, 432, 442, 447),
    ),
    "aarch64": (
        0xC00000B7,
        (39, 40, 41, 51, 97, 104, 105, 117, 180, 186, 190, 194, 217, 218, 219, 241, 268, 270, 271, 273, 279, 280, 282,
         425, 426, 427, 428, 429, 430, 432, 442, 447),
    ),
}  # fmt: skip
_POLL = 0.02  # seconds between looks at the memory
_libc = ctypes.CDLL(None, use_errno=True)
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
        _check(min(pid, 0), "new namespaces")
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
        _close_but([verdict, *channel] if job["role"] in ("tests", "inside") else channel)
        if job["role"] == "script":
            result = players.run_script(job["program"], isolated)
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
        _own_folders(limits)
    os.dup2(stdout if job["role"] == "script" else tail, 1)
    os.dup2(tail, 2)
    _stdin(job.get("stdin", ""))
    _limit(limits, isolated)


def _watch(pid: int, host: socket.socket, limits: dict[str, Any], isolated: bool) -> str:
    """Waits until the player ends, or must, and returns how it ended."""
    deadline = time.monotonic() + limits["seconds"]
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(host, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in poll.poll(1000 * min(left, _POLL))]
            if pidfd in ready:
                return "exit"
            if ready:
                host.recv(1)  # b"k", or nothing where the host is gone
                return "stopped"
            if isolated and _resident() > limits["memory_mb"] * 2**20:
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


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def _own_folders(limits: dict[str, Any]) -> None:
    """A user, own /proc, /tmp and /dev/shm, then no capabilities and no further user namespaces."""
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{UID} {UID} 1")
    Path("/proc/self/gid_map").write_text(f"{UID} {UID} 1")
    flags = _NOSUID_NODEV
    _check(_libc.mount(b"proc", b"/proc", b"proc", flags | _NOEXEC, None), "mount /proc")
    size = f"size={limits['disk_mb']}m,nr_inodes=4096,mode=1777".encode()
    for folder in (b"/tmp", b"/dev/shm"):
        _check(_libc.mount(b"tmpfs", folder, b"tmpfs", flags, size), "mount tmpfs")
    os.chdir("/tmp")
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_libc.capset(header, none), "capset")


def _stdin(text: str) -> None:
    """Makes `text` the standard input: a file without a name."""
    source = os.memfd_create("stdin")
    view = memoryview(text.encode("utf-8", "surrogatepass"))
    while view:
        view = view[os.write(source, view) :]
    os.lseek(source, 0, os.SEEK_SET)
    os.dup2(source, 0)


def _close_but(keep: list[int]) -> None:
    start = 3
    for descriptor in (*sorted(keep), 4096):
        os.closerange(start, descriptor)
        start = descriptor + 1


def _limit(limits: dict[str, Any], isolated: bool) -> None:
    """Limits of each process, and refused system calls."""
    memory, files = limits["memory_mb"] * 2**20, limits["disk_mb"] * 2**20
    seconds = int(limits["seconds"]) + 1
    bounds = {
        resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: files, resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: seconds, resource.RLIMIT_MSGQUEUE: 0,
    }  # fmt: skip
    if isolated:  # without a user namespace it would count all processes of the user
        bounds[resource.RLIMIT_NPROC] = limits["processes"]
    for name, bound in bounds.items():
        _, hard = resource.getrlimit(name)
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(name, (bound, bound))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    if isolated and platform.machine() in _REFUSED:
        _refuse_calls(*_REFUSED[platform.machine()])


def _refuse_calls(architecture: int, numbers: tuple[int, ...]) -> None:
    """A seccomp filter: the listed calls, x86's 32-bit numbers and other architectures fail with EPERM."""
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050001  # ALLOW, ERRNO | EPERM
    count = len(numbers)
    rows = [
        (load, 0, 0, 4),  # the architecture
        (equal, 0, count + 3, architecture),
        (load, 0, 0, 0),  # the call's number
        (at_least, count + 1, 0, 0x40000000),
        *((equal, count - index, 0, number) for index, number in enumerate(numbers)),
        (give, 0, 0, allow),
        (give, 0, 0, refuse),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    program = struct.pack("HxxxxxxP", len(rows), ctypes.addressof(code))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _resident() -> int:
    """Bytes that the job's processes hold; besides them /proc shows only the server and bubblewrap."""
    pages = 0
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            with contextlib.suppress(OSError):
                _, resident, shared, *_ = Path("/proc", name, "statm").read_text().split()
                pages += int(resident) - int(shared)
    return pages * resource.getpagesize()
