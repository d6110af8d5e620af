"""The sandbox: hostile programs never pass, are stopped, and leave nothing behind. All are bounded by its limits."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path

import psutil
import pytest
from conftest import needs_bwrap

from ra3_trl.sandbox import Judge, Limits, Problem, Sandbox, SandboxError, values, wire


SQUARE = Problem(tests=("assert f(2) == 4", "assert f(3) == 9"))
HONEST = "def f(x):\n    return x * x\n"
EQUAL_TO_ALL = "    __eq__ = lambda self, other: True\n    __ne__ = lambda self, other: False\n"
LOOK = "def f(x):\n    return "

# Programs that try to pass without squaring, with the verdicts that may come of it.
FORGERS = {
    "os_exit": ("import os\nos._exit(0)", {"error"}),
    "system_exit": ("raise SystemExit(0)", {"error"}),
    "exit_in_call": ("import os\ndef f(x):\n    os._exit(0)", {"error"}),
    "prints_success": ("print('[0, true]\\n[1, true]\\n[\"end\"]\\npassed')\ndef f(x): return 0", {"failed"}),
    "equal_to_all": (f"class A:\n{EQUAL_TO_ALL}def f(x): return A()", {"failed"}),
    "equal_int": (f"class A(int):\n{EQUAL_TO_ALL}    __hash__ = int.__hash__\ndef f(x): return A(0)", {"failed"}),
    "equal_list": (f"class A(list):\n{EQUAL_TO_ALL}def f(x): return A([0])", {"failed"}),
    "false_class": (f"class A:\n    __class__ = int\n{EQUAL_TO_ALL}def f(x): return A()", {"failed"}),
    "builtins": (
        "import builtins\nbuiltins.AssertionError = type('A', (Exception,), {})\nbuiltins.Exception = BaseException\n"
        "builtins.abs = lambda x: 0\ndef f(x): return 0",
        {"failed", "error"},
    ),
    "wire": ("import sys\nsys.modules['wire'].send = lambda *a: None\ndef f(x): return 0", {"timeout"}),
    "modules": ("import sys\nfor name in list(sys.modules): sys.modules[name] = None\ndef f(x): return 0", {"failed"}),
    "frames": (
        "import sys\nframe = sys._getframe()\nwhile frame:\n    print(frame.f_locals)\n    frame = frame.f_back\n"
        "def f(x): return 0",
        {"failed"},
    ),
    "parent_dies": ("import os\nif os.fork(): os._exit(0)\ndef f(x): return x * x", {"error"}),
    "two_answer": ("import os\nos.fork()\ndef f(x): return 0", {"error", "failed"}),
    "all_descriptors": (
        "import os\nfor i in range(64):\n    try: os.write(i, b'\\0\\0\\0\\x12[0, true]\\n[\"end\"]\\n')\n"
        "    except OSError: pass\ndef f(x): return 0",
        {"error"},
    ),
    "answers_before": (
        "import json, os, struct\nm = json.dumps({'number': '0', 'value': 4}).encode()\nfor i in range(3, 64):\n"
        "    try: os.write(i, (struct.pack('!I', len(m)) + m) * 4)\n    except OSError: pass\ndef f(x): return 4",
        {"error"},
    ),
    "raises_assertion": ("def f(x): raise AssertionError", {"failed"}),
    "odd_exception": ("class E(BaseException):\n    __str__ = None\ndef f(x): raise E", {"error"}),
    "nan": ("def f(x): return float('nan')", {"failed"}),
    "kills_itself": ("import os\nos.kill(os.getpid(), 9)\nos.kill(-1, 9)\ndef f(x): return 0", {"failed", "error"}),
}

# Programs that would do harm, and the verdict.
HARMFUL = {
    "fork_bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "fork": ("import os\nwhile True: os.fork()", "blocked"),
    "threads": ("import threading as t\nwhile True: t.Thread(target=t.Event().wait).start()", "blocked"),
    "memory": ("x = []\nwhile True: x.append(bytearray(10**7))", "memory"),
    "memory_of_many": (
        "import os, time\nfor _ in range(12):\n    if os.fork() == 0: break\nx = bytearray(40 * 2**20)\n"
        "for i in range(0, len(x), 4096): x[i] = 1\ntime.sleep(9)",
        "memory",
    ),
    "memory_file": ("import os\nos.memfd_create('x')", "blocked"),
    "disk": ("for i in range(99): open(f'/tmp/{i}', 'wb').write(bytes(10**6))", "blocked"),
    "large_file": ("open('/dev/shm/x', 'wb').write(bytes(10**8))", "blocked"),
    "many_files": ("for i in range(10**5): open(f'/tmp/{i}', 'wb')", "blocked"),
    "endless_output": ("while True: print('x' * 1000)", "blocked"),
    "loop": ("while True: pass", "timeout"),
    "loop_in_c": ("sum(1 for _ in iter(int, 1))", "timeout"),
    "catches_alarm": ("import signal as s\nfor i in (14, 15, 24): s.signal(i, print)\nwhile True: pass", "timeout"),
    "blocks_signals": ("import signal as s\ns.pthread_sigmask(0, range(1, 32))\nwhile True: pass", "timeout"),
    "no_parent": ("import ctypes\nctypes.CDLL(None).prctl(1, 0)\nwhile True: pass", "timeout"),
    "network": ("import socket\nsocket.create_connection(('192.0.2.1', 80))", "blocked"),
    "names": ("import socket\nsocket.getaddrinfo('example.com', 80)", "blocked"),
    "system_file": ("open('/usr/x', 'w')", "blocked"),
    "root_file": ("open('/x', 'w')", "blocked"),
    "guest_file": ("open('/guest/guest.py', 'a')", "blocked"),
    "namespaces": ("import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\nif l.unshare(0x10000000):\n"
                   "    raise OSError(ctypes.get_errno(), '')", "blocked"),
    "ptrace": ("import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\nif l.ptrace(16, 1, 0, 0):\n"
               "    raise OSError(ctypes.get_errno(), '')", "blocked"),
    "segfault": ("import ctypes\nctypes.string_at(0)", "error"),
    "long_answer": ("def f(x): return 'a' * 10**7", "error"),
    "deep_answer": ("def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y", "error"),
    "endless_answer": ("def f(x):\n    while True: yield x", "failed"),
}  # fmt: skip


@pytest.fixture(scope="module")
def judge():
    limits = Limits(seconds=2.0, memory_mb=256, disk_mb=8, processes=16)
    with Judge(Sandbox(slots=2, limits=limits)) as found:
        yield found


@needs_bwrap
@pytest.mark.parametrize("name", FORGERS)
def test_no_forger_passes(judge, name):
    program, verdicts = FORGERS[name]
    result = judge(SQUARE, program)
    assert result.verdict in verdicts, result
    assert result.passed == 0
    assert not result.forgeable


@needs_bwrap
@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_programs_are_stopped(judge, name):
    program, verdict = HARMFUL[name]
    start = time.monotonic()
    result = judge(SQUARE, program)
    assert result.verdict == verdict, result
    assert result.passed == 0
    assert len(result.output) <= 2000
    assert time.monotonic() - start < 5
    assert judge(SQUARE, f"{HONEST}# after {name}").verdict == "passed"


@needs_bwrap
def test_others_go_on_beside_a_hostile_one(judge):
    hostile = judge.submit(SQUARE, HARMFUL["fork_bomb"][0] + "  # again")
    honest = [judge.submit(SQUARE, f"{HONEST}# {i}") for i in range(10)]
    assert {found.result().verdict for found in honest} == {"passed"}
    assert hostile.result().verdict == "timeout"


@needs_bwrap
def test_a_program_sees_nothing_of_the_host(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_not_to_be_seen")
    (tmp_path / "secret").write_text("x")
    looks = {
        "sorted(__import__('os').environ)": ["HOME", "LANG", "OMP_NUM_THREADS", "PATH", "PWD", "PYTHONHASHSEED"],
        "b'hf_not' in open('/proc/1/environ', 'rb').read()": False,
        "[p for p in __import__('os').listdir('/proc') if p.isdecimal()]": ["1"],
        "__import__('os').listdir('/tmp')": [],
        "__import__('os').path.exists('/home')": False,
        f"__import__('os').path.exists({str(tmp_path)!r})": False,
        f"__import__('os').path.exists({str(Path.home() / '.cache')!r})": False,
        "[name for _, name in __import__('socket').if_nameindex()]": ["lo"],
        "open('/proc/self/status').read().split('CapEff:')[1].split()[0]": "0" * 16,
        "__import__('os').getuid()": 1000,
    }
    with Judge(Sandbox(slots=1)) as fresh:
        for look, seen in looks.items():
            result = fresh(Problem(tests=(f"assert f(0) == {seen!r}",)), LOOK + look)
            assert result.verdict == "passed", (look, result)


@needs_bwrap
def test_what_is_expected_is_nowhere_in_the_programs_memory():
    """The program counts 12 digits, which it has in two halves, in its own memory: at most some copies that the search
    itself makes, never fewer than one where the tests' source is there too."""
    program = (
        "import re\ndef f(a, b):\n    found = 0\n    for line in open('/proc/self/maps'):\n"
        "        span, mode, *rest = line.split()\n        if 'rw' in mode:\n"
        "            low, high = (int(part, 16) for part in span.split('-'))\n"
        "            with open('/proc/self/mem', 'rb', 0) as memory:\n                memory.seek(low)\n"
        "                data = memory.read(high - low)\n"
        "            found += sum(data[m.end():m.end() + 6] == b for m in re.finditer(re.escape(a), data))\n"
        "    return found\n"
    )
    tests = ("# 720391845562\nassert f(b'720391', b'845562') == 0",)
    with Judge(Sandbox(slots=1)) as judge:
        assert judge(Problem(tests=tests), program).verdict == "passed"
        told = judge(Problem(tests=tests, inside=True), program)
        assert (told.verdict, told.forgeable) == ("failed", True)


@needs_bwrap
def test_programs_leave_nothing_to_the_next():
    leave = (
        "import os, time\nopen('/tmp/left', 'w').write('x')\nopen('/dev/shm/left', 'w').write('x')\n"
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\ndef f(x): return 0"
    )
    look = LOOK + "[*os.listdir('/tmp'), *os.listdir('/dev/shm'), *(p for p in os.listdir('/proc') if p.isdecimal())]"
    before = descendants()
    with Judge(Sandbox(slots=1)) as fresh:
        assert fresh(SQUARE, HONEST).verdict == "passed"
        started, descriptors = descendants(), len(os.listdir("/proc/self/fd"))
        for i in range(3):
            assert fresh(SQUARE, f"{leave}  # {i}").verdict == "failed"
            seen = fresh(Problem(tests=("assert f(0) == ['1']",)), f"import os\n{look}  # {i}")
            assert seen.verdict == "passed", seen
        assert len(os.listdir("/proc/self/fd")) == descriptors
        assert descendants() == started
    assert descendants() == before


def descendants() -> set[int]:
    """Processes of this test and of all it started, sandboxes included; but those that are about to be collected."""
    found = psutil.Process().children(recursive=True)
    return {process.pid for process in found if process.status() != psutil.STATUS_ZOMBIE}


@needs_bwrap
def test_a_closed_sandbox_ends_its_servers():
    sandbox = Sandbox(slots=1)
    sandbox.run({"role": "script", "program": "print(1)"})
    servers = [pair[0].process for pair in sandbox._servers]
    sandbox.close()
    assert servers[0].returncode is not None


@needs_bwrap
def test_a_forked_child_never_answers(judge):
    """It could, before its parent's end reaches it: seen once in some hundred runs."""
    in_call = "import os\ndef f(x):\n    if os.fork(): os._exit(0)\n    return x * x"
    programs = [f"{program}\n#{i}" for program in (FORGERS["parent_dies"][0], in_call) for i in range(60)]
    found = [judge.submit(SQUARE, program) for program in programs]
    assert {future.result().verdict for future in found} == {"error"}


@needs_bwrap
@pytest.mark.parametrize("child, status", [("pass", 0), ("1 / 0", 256), ("raise SystemExit(3)", 768)])
def test_a_forked_child_ends_as_a_program(judge, child, status):
    """Whatever it comes to: its parent goes on, and sees the status (256 times the exit code) that Python gives it."""
    ends = f"import os\nif os.fork() == 0:\n    {child}\nelse:\n    status = os.wait()[1]\ndef f(x): return x * x\n"
    found = [judge.submit(Problem(tests=(f"assert status == {status}",)), f"{ends}#{i}") for i in range(20)]
    assert {future.result().verdict for future in found} == {"passed"}, found[0].result()


@needs_bwrap
def test_a_lost_server_is_replaced():
    with Judge(Sandbox(slots=1)) as judge:
        assert judge(SQUARE, HONEST).verdict == "passed"
        server = judge.sandbox._servers[0][0]
        os.killpg(server.process.pid, 9)
        assert judge(SQUARE, HONEST + "#1").verdict in ("error", "passed")  # as it was found out, by the job or before
        assert judge(SQUARE, HONEST + "#2").verdict == "passed"


@needs_bwrap
def test_programs_see_the_packages_they_are_given(tmp_path):
    (tmp_path / "given.py").write_text("NUMBER = 7\n")
    tmp_path.chmod(0o755)
    with Judge(Sandbox(slots=1, packages=[str(tmp_path)])) as judge:
        problem = Problem(tests=("assert f() == 7",))
        assert judge(problem, "import given\ndef f(): return given.NUMBER").verdict == "passed"
        assert judge(problem, "import given\nopen(given.__file__, 'a')").verdict == "blocked"
    with pytest.raises(ValueError, match="`packages` names 'nowhere'"):
        Sandbox(packages=["nowhere"])


def test_it_refuses_without_bubblewrap(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(SandboxError, match="bubblewrap is missing.*apt-get install bubblewrap.*HF_ALLOW_CODE_EVAL=1"):
        Sandbox(slots=1)


@needs_bwrap
def test_what_the_system_refuses_is_found_out_at_the_start(monkeypatch):
    """No file system is half a MiB: no program can be isolated, and nothing is left running."""
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    before = descendants()
    with pytest.raises(SandboxError, match="could not run a program: .*mount tmpfs.*would run unprotected"):
        Sandbox(slots=1, limits=Limits(disk_mb=0.5))
    assert descendants() == before


def test_allowed_without_bubblewrap_it_says_what_is_not_protected(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    with pytest.warns(UserWarning, match="NOT protected: your files.*network.*forged"):
        sandbox = Sandbox(slots=1, limits=Limits(seconds=1.0))
    with Judge(sandbox) as judge:
        passed = judge(SQUARE, HONEST)
        assert (passed.verdict, passed.forgeable) == ("passed", True)
        assert judge(SQUARE, "while True: pass").verdict == "timeout"
        assert judge(SQUARE, "x = bytearray(10**9)").verdict == "memory"


def test_limits_are_checked():
    with pytest.raises(ValueError, match="`processes` is 0; a limit must be above 0"):
        Limits(processes=0)
    with pytest.raises(ValueError, match="`slots` is 0"):
        Sandbox(slots=0)


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(2**53), 2**70, 1.5, float("inf"), "a\ud800\n", b"\0x", bytearray(b"y"), 1 - 2j, (),
     (1, [2, {3}]), frozenset({1}), {"a": 1, (1, 2): None}, range(1, 9, 2), int, {1: 2}.keys(), {1: 2}.items()],
)  # fmt: skip
def test_values_cross_the_wire_unchanged(value):
    packed = json.loads(json.dumps(values.Packer(refused, values.Shared()).message(value)))
    found = values.Unpacker(refused, values.Shared()).message(packed)
    assert found == value
    assert type(found) is type(value)


def refused(value, _):
    raise AssertionError(value)


@pytest.mark.parametrize(
    ("nodes", "why"),
    [([], "no node"), ([["int", "0x"]], "ValueError"), ([["int", 7]], "TypeError"), ([["nothing", [1]]], "TypeError"),
     ([["set", 1, [[1]]], ["list", 2, []]], "TypeError"), ([["dict", 1, [1]]], "ValueError"),
     ([["made", "builtins.range", ["a"]]], "TypeError"), ([["standard", "builtins.eval"]], "KeyError: .*eval"),
     ([["made", "fractions.Fraction", [1, 0]]], "ZeroDivisionError"), ([["bytes", "zz"]], "ValueError"),
     ([["array", 1, ["Q", -1]]], "OverflowError"), ([["tuple", 3]], "TypeError"), ([["tuple", [{}]]], "no element"),
     ([["tuple", [[0]]]], "RecursionError"), ([["tuple", [[-1]]]], "no node"), ([["shared", 1]], "KeyError: 1"),
     ([["error", "builtins.int", [[1]]], ["tuple", []]], "no exception"),
     ([["list", 1, []], ["list", 1, []]], "a number that is taken")],
)  # fmt: skip
def test_what_is_no_value_is_refused(nodes, why):
    with pytest.raises(wire.WireError, match=f"^{why}"):
        values.Unpacker(refused, values.Shared()).message({"value": [0], "nodes": nodes})


@pytest.mark.parametrize("message", [{}, {"nodes": []}])
def test_a_message_without_a_value_is_refused(message):
    with pytest.raises(wire.WireError, match="^KeyError: 'value'"):
        values.Unpacker(refused, values.Shared()).message(message)


def test_messages_are_bounded():
    one, other = socket.socketpair()
    with one, other:
        one.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(wire.WireError, match="more than"):
            wire.receive(other)
        one.sendall(b"\0\0\0\3{{{")
        with pytest.raises(wire.WireError, match="no JSON"):
            wire.receive(other)
        one.close()
        with pytest.raises(EOFError):
            wire.receive(other)
