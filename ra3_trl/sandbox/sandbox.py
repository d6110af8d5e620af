"""Runs untrusted Python, isolated by bubblewrap; `guest.py` is what runs inside.

A slot is two warm servers, one for programs and one for tests, each inside bubblewrap; there is one job at a time in
each. Time, memory and output are bounded inside, and the host kills the whole sandbox where that fails. What players
write goes to files in memory that belong to the host, bounded as all their files are.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import wire


ALLOW = "HF_ALLOW_CODE_EVAL"
_GRACE, _START = 5.0, 60.0  # seconds that a report may be late, and that a start may take
# Bytes of what a player wrote that are read.
_KEPT = {"stdout": 2**20, "tail": 2000, "verdict": wire.MAX_FRAME}
_NOBODY = 65534
_BOOT = """
import json, sys
settings = json.loads(sys.argv[1])
sys.path.insert(0, settings["folder"])
import guest
sys.path[:1] = settings["packages"]
sys.argv = [""]
raise SystemExit(guest.main(settings["control"], settings["jobs"], settings["limits"], settings["isolated"]))
"""
_UNPROTECTED = (
    "Code runs without isolation, since HF_ALLOW_CODE_EVAL=1. Limited are CPU time, "
    "wall-clock time, and of each process memory, open files and file size. NOT protected: your files, which programs "
    "can read, change and delete; the network; other processes of yours, this one included; the number of processes; "
    "programs from each other, and tests from programs, so that verdicts can be forged. Install bubblewrap."
)


class SandboxError(RuntimeError):
    """The sandbox itself does not work; says nothing about a program."""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Args:
        seconds (`float`, *optional*, defaults to `3.0`):
            Wall clock from its start to its last answer; the same number, rounded up, is each process's CPU time.
        memory_mb (`int`, *optional*, defaults to `512`):
            MiB of address space of each process, and of all that processes hold together: memory of their own and
            shared, files in `/tmp` and `/dev/shm`, and what pipes and sockets may hold.
        disk_mb (`int`, *optional*, defaults to `16`):
            MiB of `/tmp`, of `/dev/shm` and of a file.
        processes (`int`, *optional*, defaults to `32`):
            Processes and threads at a time.

    Raises:
        `ValueError`: for a limit that is not positive.
    """

    seconds: float = 3.0
    memory_mb: int = 512
    disk_mb: int = 16
    processes: int = 32

    def __post_init__(self):
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"`{name}` is {value!r}; a limit must be above 0.")


class Sandbox:
    """Some slots in which untrusted code runs; threads may share it.

    Args:
        slots (`int`, *optional*):
            Programs at a time; `None` is one for each CPU that this process may use.
        limits ([`Limits`], *optional*):
            What a program may use.
        packages (`Sequence[str]`, *optional*):
            Folders with modules that programs may import besides the standard library; they see them read-only. For
            root, everybody must be allowed to read them.

    Raises:
        `SandboxError`: if bubblewrap is missing or does not work here and `HF_ALLOW_CODE_EVAL` is not `1`.

    Example:

    ```python
    >>> with Sandbox(slots=1) as sandbox:
    ...     sandbox.run({"role": "script", "program": "print(input()[::-1])", "stdin": "abc"})["stdout"]
    'cba\\n'
    ```
    """

    def __init__(self, slots: int | None = None, limits: Limits | None = None, packages: Sequence[str] = ()):
        self.limits = limits or Limits()
        self.slots = len(os.sched_getaffinity(0)) if slots is None else slots
        if self.slots < 1:
            raise ValueError(f"`slots` is {slots}; a sandbox needs at least 1.")
        if missing := [folder for folder in packages if not Path(folder).is_dir()]:
            raise ValueError(f"`packages` names {missing[0]!r}, which is no folder; give folders that hold modules.")
        self.packages = tuple(packages)
        self.isolated = _can_isolate(self.limits, self.packages)
        self._make_servers(0)

    def _make_servers(self, hash_seed: int) -> None:
        """Makes the servers of all slots, each of which starts with its first job."""
        make = partial(_Server, self.isolated, self.limits, self.packages, hash_seed)
        self._servers = [(make(), make()) for _ in range(self.slots)]
        self._free: queue.SimpleQueue[tuple[_Server, _Server]] = queue.SimpleQueue()
        for pair in self._servers:
            self._free.put(pair)

    def seeded(self, hash_seed: int) -> Sandbox:
        """Makes a sandbox like this one, with servers of its own, whose Python hashes texts by another seed. Sets of
        texts have another order there; here the seed is 0."""
        other = copy.copy(self)
        other._make_servers(hash_seed)
        return other

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Runs one job by itself (role `"script"` or `"inside"`, see `players.play`), and returns the report on it."""
        with self._slot() as (server, _):
            return server.run(job)

    def run_pair(self, program: dict[str, Any], tests: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Runs a program and, in another sandbox, tests that call it; returns the reports on both in this order."""
        with self._slot() as (server, judge):
            server_end, judge_end = socket.socketpair()
            with server_end, judge_end:
                server.start_job(program, server_end.fileno())
                judge.start_job(tests, judge_end.fileno())
            report = judge.report(self.limits.seconds + _GRACE)
            judge.stop_job()
            server.stop_job()  # it serves until it is told to stop
            return server.report(_GRACE), report

    @contextlib.contextmanager
    def _slot(self) -> Iterator[tuple[_Server, _Server]]:
        pair = self._free.get()
        try:
            yield pair
        except BaseException:
            for server in pair:
                server.close()
            raise
        finally:
            self._free.put(pair)

    def close(self) -> None:
        """Ends all servers; with them goes all that still runs in them."""
        for pair in self._servers:
            for server in pair:
                server.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server:
    """The host's side of one warm server; starts it when there is work, and anew after it broke."""

    def __init__(self, isolated: bool, limits: Limits, packages: tuple[str, ...], hash_seed: int = 0):
        self.isolated, self.limits, self.packages, self.hash_seed = isolated, limits, packages, hash_seed
        self.files: dict[str, int] = {}
        self.process: subprocess.Popen | None = None

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        self.start_job(job)
        report = self.report(self.limits.seconds + _GRACE)
        self.stop_job()
        return report

    def start_job(self, job: dict[str, Any], descriptor: int | None = None) -> None:
        try:
            self._send_job(job, descriptor)
        except OSError:  # the server was lost since its last job
            self.close()
            self._send_job(job, descriptor)

    def _send_job(self, job: dict[str, Any], descriptor: int | None) -> None:
        if self.process is None:
            self.start()
        self.role = job["role"]
        self.kept = _KEPT | {"stdout": job.pop("keep", _KEPT["stdout"])}
        self.files = {name: os.memfd_create(name) for name in _KEPT}
        descriptors = (*self.files.values(), *([] if descriptor is None else [descriptor]))
        self.control.sendall(b"s")
        wire.send(self.jobs, job, descriptors)

    def stop_job(self) -> None:
        """Ends the job, or says that its report has come; once for each job."""
        if self.process is not None:
            with contextlib.suppress(OSError):  # a server that is lost is found out by `report`
                self.control.sendall(b"k")

    def report(self, seconds: float) -> dict[str, Any]:
        """The server's report and what the player wrote; a server that gives none in time is ended, with all in it."""
        self.control.settimeout(seconds)
        try:
            report = wire.receive(self.control)
        except (OSError, EOFError, wire.WireError):
            report = {"ended": "lost", "status": None, "seconds": seconds}
        if self.files:
            report["cut"] = os.fstat(self.files["stdout"]).st_size > self.kept["stdout"]
            report["exact"] = self._written("stdout", "surrogateescape")  # bytes that are no text stay apart
        report |= {name: self._written(name) for name in self.files}
        self._drop_files()
        if report["ended"] == "lost" and (said := self.close()):
            raise SandboxError(f"The sandbox broke: {said}")
        if report["verdict"].startswith(wire.BROKEN) and self.role != "inside":  # there it could be forged
            raise SandboxError(f"The sandbox could not run a program: {report['verdict']}.")
        return report

    def _written(self, name: str, errors: str = "replace") -> str:
        """What a player wrote, as much as is of use; of `tail` the end."""
        size, most = os.fstat(self.files[name]).st_size, self.kept[name]
        start = max(0, size - most) if name == "tail" else 0
        return os.pread(self.files[name], most, start).decode(errors=errors)

    def _drop_files(self) -> None:
        for file in self.files.values():
            os.close(file)
        self.files = {}

    def start(self) -> None:
        (self.control, control), (self.jobs, jobs) = socket.socketpair(), socket.socketpair()
        with control, jobs:
            settings = {
                "limits": {**asdict(self.limits), "socket_kb": _socket_kb()}, "isolated": self.isolated,
                "packages": self.packages, "control": control.fileno(), "jobs": jobs.fileno(),
            }  # fmt: skip
            self.process = subprocess.Popen(
                _command(settings, self.hash_seed), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, env={"PYTHONHASHSEED": str(self.hash_seed)}, cwd=tempfile.gettempdir(),
                pass_fds=(control.fileno(), jobs.fileno()), start_new_session=True,
            )  # fmt: skip
        self.control.settimeout(_START)
        self.jobs.settimeout(_START)
        try:
            wire.receive(self.control)
        except (OSError, EOFError) as error:
            raise SandboxError(f"The sandbox does not start: {self.close() or error!r}.") from error

    def close(self) -> str:
        """Ends the server and all that runs in it: what it said at last, nothing unless it broke."""
        self._drop_files()
        if self.process is None:
            return ""
        self.control.close()  # the server ends with it, and bubblewrap with the server
        self.jobs.close()
        try:
            _, said = self.process.communicate(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            _, said = self.process.communicate()
        self.process = None
        return said.decode(errors="replace").strip()[-500:]


def _can_isolate(limits: Limits, packages: tuple[str, ...]) -> bool:
    """Tries whether bubblewrap works here; without it, code runs only if the user says so."""
    try:
        if shutil.which("bwrap") is None:
            raise SandboxError("bubblewrap is missing.")
        with contextlib.closing(_Server(True, limits, packages)) as server:
            # It raises where namespaces or limits are refused, and says why.
            if server.run({"role": "script", "program": ""})["ended"] == "lost":
                raise SandboxError("bubblewrap ends without a word.")
        return True
    except SandboxError as error:
        if os.environ.get(ALLOW) != "1":
            raise SandboxError(
                f"{error} Code written by a model would run unprotected. Install bubblewrap (Debian and Ubuntu: "
                "`apt-get install bubblewrap`) and allow it user namespaces (a container may need more privileges) "
                f"or, where harm is impossible anyway, set {ALLOW}=1."
            ) from error
        warnings.warn(f"{error} {_UNPROTECTED}")
        return False


def _command(settings: dict[str, Any], hash_seed: int) -> list[str]:
    """The command line of a server; as root it first becomes nobody, since root has no limit of processes."""
    here, isolated = str(Path(__file__).parent), settings["isolated"]
    folder = "/guest" if isolated else here  # it may lie in /tmp, which programs get anew
    python = str(Path(sysconfig.get_config_var("BINDIR"), f"python{sys.version_info.major}.{sys.version_info.minor}"))
    packages = {path: f"/packages/{i}" if isolated else path for i, path in enumerate(settings["packages"])}
    settings = {**settings, "folder": folder, "packages": [*packages.values()]}
    # As with -I nothing of the user's is on the path; but -I would not read the hash seed.
    server = [python, "-s", "-P", "-c", _BOOT, json.dumps(settings)]
    if not isolated:
        return server
    prefixes = [path for path in (sys.base_prefix, sys.base_exec_prefix) if not Path(path).is_relative_to("/usr")]
    show = [*_system(), *_folders({**{path: path for path in prefixes}, here: folder, **packages})]
    inner = [
        "--unshare-all", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--cap-drop", "ALL",
        "--proc", "/proc", "--dev", "/dev", "--dev-bind", "/dev/null", "/dev/zero",  # which lends shared memory
        "--tmpfs", "/tmp", "--remount-ro", "/dev", "--remount-ro", "/",
        "--clearenv", "--setenv", "PATH", "/usr/bin:/bin", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8",
        "--setenv", "PYTHONHASHSEED", str(hash_seed), "--setenv", "OMP_NUM_THREADS", "1", "--chdir", "/tmp",
    ]  # fmt: skip
    bwrap = shutil.which("bwrap") or "bwrap"
    if os.getuid() != 0:
        return [bwrap, *show, *inner, *server]
    drop = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
    outer = [bwrap, *show, "--bind", "/proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp"]
    return [*outer, *drop, bwrap, "--ro-bind", "/", "/", *inner, *server]


def _socket_kb() -> int:
    """KiB that one end of a pair of sockets may hold: the system's buffer, which a last message may overrun."""
    default = Path("/proc/sys/net/core/wmem_default")  # containers may not show it
    return (int(default.read_text()) if default.exists() else 212_992) * 3 // 2 // 1024


def _system() -> list[str]:
    """Arguments that show the system's programs and libraries, read-only."""
    shown = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            shown += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            shown += ["--ro-bind", str(path), str(path)]
    for name in ("ld.so.cache", "alternatives", "localtime"):
        shown += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    return shown


def _folders(folders: Mapping[str, str]) -> list[str]:
    """Arguments that show folders, read-only, each under a name of its own."""
    shown = []
    for path, seen in folders.items():
        for parent in reversed(Path(seen).parents[:-1]):  # bubblewrap would copy a home's mode, 700
            shown += ["--perms", "0755", "--dir", str(parent)]
        shown += ["--ro-bind", path, seen]
    return shown
