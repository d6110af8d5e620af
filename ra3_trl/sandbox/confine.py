"""What a player gives up before foreign code runs in it: folders, capabilities, memory, and calls of the kernel.

Imports nothing of this package, since it runs inside the sandbox.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import resource
import socket
import struct
from pathlib import Path
from typing import Any


UID = 1000
DESCRIPTORS = 64  # open files of a process
_NOSUID_NODEV, _NOEXEC = 2 | 4, 8
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _PR_SET_THP_DISABLE = 4, 22, 38, 41
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# System calls that hold memory past the limits (memory files, System V and POSIX queues, inotify's, io_uring, pages
# given to pipes), reach other processes, or open doors of the kernel that no program here needs.
_REFUSED = {
    "x86_64": (
        29, 64, 68, 101, 155, 161, 165, 166, 175, 240, 246, 248, 249, 250, 253, 272, 278, 294, 298, 300, 308, 310, 311,
        313, 319, 321, 323, 425, 426, 427, 428, 429, 430, 432, 442, 447,
    ),
    "aarch64": (
        26, 39, 40, 41, 51, 75, 97, 104, 105, 117, 180, 186, 190, 194, 217, 218, 219, 241, 262, 268, 270, 271, 273,
        279, 280, 282, 425, 426, 427, 428, 429, 430, 432, 442, 447,
    ),
}  # fmt: skip
_CALLS = {
    "x86_64": {"mmap": 9, "socket": 41, "socketpair": 53, "setsockopt": 54, "fcntl": 72, "prctl": 157},
    "aarch64": {"mmap": 222, "socket": 198, "socketpair": 199, "setsockopt": 208, "fcntl": 25, "prctl": 167},
}
_SHARED_ANONYMOUS, _HUGE_PAGES = 0x21, 0x40000
_SOCKET_BUFFERS = (7, 8, 32, 33)  # SO_SNDBUF, SO_RCVBUF and the same by force
# Calls refused by the bits `mask` of their argument `index`: if they are `value`, or if they are not.
_REFUSED_IF = (
    ("mmap", 3, _SHARED_ANONYMOUS, _SHARED_ANONYMOUS),  # it stays when no process has it in its tables
    ("mmap", 3, _HUGE_PAGES, _HUGE_PAGES),
    ("prctl", 0, 0xFFFFFFFF, _PR_SET_DUMPABLE),  # it would hide what a process holds
    ("prctl", 0, 0xFFFFFFFF, _PR_SET_THP_DISABLE),
    ("fcntl", 1, 0xFFFFFFFF, fcntl.F_SETPIPE_SZ),
    *(("setsockopt", 2, 0xFFFFFFFF, option) for option in _SOCKET_BUFFERS),
)
_REFUSED_UNLESS = (
    ("socket", 0, 0xFFFFFFFF, socket.AF_NETLINK),  # others hold what nobody has accepted
    ("socketpair", 1, 0xF, socket.SOCK_STREAM),
)
_libc = ctypes.CDLL(None, use_errno=True)


def own_folders(limits: dict[str, Any]) -> None:
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


def set_stdin(text: str) -> None:
    """Makes `text` the standard input: a file without a name, that can't be changed."""
    source = os.memfd_create("stdin", os.MFD_ALLOW_SEALING)
    view = memoryview(text.encode("utf-8", "surrogatepass"))
    while view:
        view = view[os.write(source, view) :]
    os.lseek(source, 0, os.SEEK_SET)
    fcntl.fcntl(source, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK)
    os.dup2(source, 0)


def close_but(keep: list[int]) -> None:
    """Closes all open files but the standard ones and those in `keep`."""
    start = 3
    for descriptor in (*sorted(keep), 4096):
        os.closerange(start, descriptor)
        start = descriptor + 1


def limit(limits: dict[str, Any], isolated: bool) -> None:
    """Limits of each process, and refused system calls."""
    memory, files = limits["memory_mb"] * 2**20, limits["disk_mb"] * 2**20
    seconds = int(limits["seconds"]) + 1
    bounds = {
        resource.RLIMIT_AS: memory, resource.RLIMIT_FSIZE: files, resource.RLIMIT_NOFILE: DESCRIPTORS,
        resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: seconds, resource.RLIMIT_MSGQUEUE: 0,
    }  # fmt: skip
    if isolated:  # without a user namespace it would count all processes of the user
        bounds[resource.RLIMIT_NPROC] = limits["processes"]
    for name, bound in bounds.items():
        _, hard = resource.getrlimit(name)
        bound = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(name, (bound, bound))
    _check(_libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0), "no large pages")  # a fault is a page: memory.py counts so
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
    if isolated and platform.machine() in _ARCHITECTURES:
        _refuse_calls(platform.machine())


def _refuse_calls(machine: str) -> None:
    """A seccomp filter: refused calls, x86's 32-bit numbers and other architectures fail with EPERM."""
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x54, 0x06
    allow, refuse = 0x7FFF0000, 0x00050001  # ALLOW, ERRNO | EPERM
    refused = (give, 0, 0, refuse)
    rows = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, _ARCHITECTURES[machine]),
        refused,
        (load, 0, 0, 0),  # the call's number
        (at_least, 0, 1, 0x40000000),
        refused,
    ]
    for number in _REFUSED[machine]:
        rows += [(equal, 0, 1, number), refused]
    for unless, rules in enumerate((_REFUSED_IF, _REFUSED_UNLESS)):
        for call, index, mask, value in rules:
            # The low half of the argument; a row jumps over so many if it holds, and so many if not.
            skips = (1, 0) if unless else (0, 1)
            rows += [
                (load, 0, 0, 0), (equal, 0, 4, _CALLS[machine][call]),
                (load, 0, 0, 16 + 8 * index), (bits, 0, 0, mask), (equal, *skips, value), refused,
            ]  # fmt: skip
    rows.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in rows))
    program = struct.pack("HxxxxxxP", len(rows), ctypes.addressof(code))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
