"""Programs that take memory of one kind, as fast as they can, and print a byte for each MiB that they hold."""

from __future__ import annotations

from dataclasses import dataclass

from ra3_trl.sandbox import Limits, Sandbox


LIMITS = Limits(seconds=4.0, memory_mb=256, processes=16)
_BEGIN = """\
import fcntl, mmap, os, socket, time
for _ in range({others}):
    if os.fork() == 0: break
kept, held = [], 0
def hold(size):
    global held
    before, held = held, held + size
    os.write(1, b"x" * (held // 2**20 - before // 2**20))
def fill(put, size):
    try:
        while True: hold(put(bytes(size)))
    except BlockingIOError: pass
while True:
    try:
{attack}
    except (OSError, MemoryError): time.sleep(0.01)
"""


@dataclass(frozen=True)
class Attack:
    """What each of several processes does over and over, and whether the sandbox refuses it from the start."""

    code: str
    refused: bool = False
    others: int = 15

    @property
    def program(self) -> str:
        return _BEGIN.format(others=self.others, attack=self.code.replace("\n", "\n" + 8 * " ").join((8 * " ", "")))


ATTACKS = {
    "private": Attack("kept.append(b'x' * 2**20); hold(2**20)"),
    "private_of_one": Attack("kept.append(b'x' * 2**20); hold(2**20)", others=0),
    "private_by_copies": Attack(
        "x = bytearray(b'x') * (100 * 2**20); hold(len(x))\n"
        "for _ in range(15):\n    if os.fork() == 0: break\n"
        "for i in range(0, len(x), 2**20): x[i : i + 2**20] = bytes(2**20); hold(2**20)\n"
        "while True: time.sleep(1)",
        others=0,
    ),
    "private_by_copies_at_once": Attack(  # by one call of the kernel's, without a fault of the program's own
        "import ctypes as c\nmadvise = c.CDLL(None).madvise; madvise.argtypes = [c.c_void_p, c.c_size_t, c.c_int]\n"
        "m = mmap.mmap(-1, 100 * 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); m[:] = b'x' * len(m); hold(len(m))\n"
        "for _ in range(15):\n    if os.fork() == 0: break\n"
        "start = c.addressof(c.c_char.from_buffer(m))\n"
        "for i in range(0, len(m), 2**20):\n    if madvise(start + i, 2**20, 23) == 0: hold(2**20)\n"
        "while True: time.sleep(1)",
        others=0,
    ),
    "private_hidden": Attack(
        "import ctypes; ctypes.CDLL(None).prctl(4, 0)\nwhile True: kept.append(b'x' * 2**20); hold(2**20)"
    ),
    "shared": Attack("m = mmap.mmap(-1, 2**20); m.write(bytes(2**20)); kept.append(m); hold(2**20)", refused=True),
    "shared_of_a_device": Attack(
        "m = mmap.mmap(os.open('/dev/zero', os.O_RDWR), 2**20); m.write(bytes(2**20)); kept.append(m); hold(2**20)",
        refused=True,
    ),
    "memfd": Attack("kept.append(os.memfd_create('x')); hold(os.write(kept[-1], bytes(2**20)))", refused=True),
    "tmpfs": Attack(
        "for folder in ('/tmp', '/dev/shm'):\n"
        "    for i in range(40):\n"
        "        try: hold(os.write(os.open(f'{folder}/{i}', os.O_CREAT | os.O_EXCL | os.O_WRONLY), bytes(2**20)))\n"
        "        except OSError: pass\n"
        "while True: kept.append(b'x' * 2**20); hold(2**20)"
    ),
    "sockets": Attack(
        "kept.append(socket.socketpair())\n"
        "for s in kept[-1]:\n    s.setblocking(False)\n    fill(s.send, 2**15)"
    ),
    "sockets_of_small_messages": Attack(
        "kept.append(socket.socketpair())\nfor s in kept[-1]:\n    s.setblocking(False)\n    fill(s.send, 2**10)"
    ),
    "sockets_on_their_way": Attack(  # sent by another one and closed: no process has them open
        "road = socket.socketpair(); kept.append(road); road[0].setblocking(False)\n"
        "while True:\n"
        "    pair = socket.socketpair()\n"
        "    for s in pair:\n        s.setblocking(False)\n        fill(s.send, 2**15)\n"
        "    socket.send_fds(road[0], [b'x'], [s.fileno() for s in pair])\n"
        "    for s in pair: s.close()"
    ),
    "larger_sockets": Attack(
        "kept.append(socket.socketpair())\n"
        "for s in kept[-1]:\n"
        "    s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)\n    s.setblocking(False)\n"
        "    fill(s.send, 2**15)",
        refused=True,
    ),
    "datagrams": Attack(
        "kept.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))\nkept[-1][0].setblocking(False)\n"
        "fill(kept[-1][0].send, 2**15)",
        refused=True,
    ),
    "listening": Attack(
        "s = socket.socket(socket.AF_UNIX); s.bind('\\0x'); s.listen(4096); kept.append(s)\n"
        "while True:\n"
        "    with socket.socket(socket.AF_UNIX) as t:\n"
        "        t.connect('\\0x'); t.setblocking(False); fill(t.send, 2**15)",
        refused=True,
    ),
    "pipes": Attack("r, w = os.pipe(); os.set_blocking(w, False); fill(lambda data: os.write(w, data), 2**12)"),
    "larger_pipes": Attack(
        "r, w = os.pipe(); fcntl.fcntl(w, 1031, 2**20); os.set_blocking(w, False)\n"
        "fill(lambda data: os.write(w, data), 2**12)",
        refused=True,
    ),
}  # fmt: skip


def held_mb(sandbox: Sandbox, attack: Attack) -> int:
    """MiB that an attack came to hold."""
    return sandbox.run({"role": "script", "program": attack.program})["stdout"].count("x")


def measure_memory() -> dict[str, float]:
    """The most that an attack came to hold, as a share of the limit."""
    with Sandbox(slots=1, limits=LIMITS) as sandbox:
        held = max(held_mb(sandbox, attack) for attack in ATTACKS.values())
    return {"memory_bound_ratio": held / LIMITS.memory_mb}
