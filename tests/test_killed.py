"""Killed at every file operation of a save: a run goes on from a whole checkpoint, and nothing foreign gets into one.

A child of this process saves and ends itself before its n-th operation, for all n: Python's audit events tell of each
file that is opened to write, renamed, made or deleted.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import PartialState
from peft import LoraConfig

from ra3_trl.em import check_resumable, resumed_folder, settle
from ra3_trl.em import state as em_state


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    return y\n" for i in range(4)]
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.move", "os.link", "os.truncate", "test.wait"}
KILLED = 9


def _count_down(number: int, work: Callable[[], None]) -> None:
    """Runs `work` and ends this process, before its file operation `number` if it comes to that."""
    left = [number]

    def count(event: str, arguments: tuple) -> None:
        if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            left[0] -= 1
            if left[0] < 0:
                os._exit(KILLED)

    try:
        sys.addaudithook(count)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Runs `work` in a child that ends before its file operation `number`; whether it came to that operation."""
    child = os.fork()
    if child == 0:
        _count_down(number, work)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def contents(folder: Path) -> dict[str, bytes]:
    """Its files. Of random numbers' states the name alone: they are those of this process by then."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: b"" if "rng_state" in name else path.read_bytes() for name, path in files.items()}


@pytest.fixture
def saver(make_trainer):
    """`saver(limit, adapter)`: a trainer, and `save(step)`, which writes a checkpoint with weights of its own."""

    def make(limit: int | None, adapter: bool = False):
        peft = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if adapter else None
        trainer = make_trainer(TEXTS, peft_config=peft, reward_model="frozen", m_steps=6)
        trainer.train()
        trainer.save_total_limit = limit

        def save(step: int) -> None:
            trainer.state.global_step = step
            next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(step)
            trainer._save_checkpoint(trainer.model, None)

        return trainer, save

    return make


CASES = [((), 1, None), ((1,), 2, 1), ((1, 2), 2, None), ((1, 2, 4), 3, 2)]


@pytest.mark.parametrize(
    "adapter, before, now, limit, stride",
    [(False, *CASES[2], 5), (False, *CASES[3], 5),
     *(pytest.param(adapter, *case, 1, marks=pytest.mark.slow) for adapter in (False, True) for case in CASES)],
)  # fmt: skip
def test_a_checkpoint_is_whole_or_not_there(saver, tmp_path, adapter, before, now, limit, stride):
    """The first save of a run; one whose rotation deletes the one before; one that replaces a checkpoint; and one of a
    run that began anew beside a later checkpoint. Every `stride`-th operation; all of them in the slow tests."""
    trainer, save = saver(limit, adapter)
    run, start = tmp_path / "run", tmp_path / "start"
    run.mkdir(exist_ok=True)
    for step in before:
        save(step)
    shutil.copytree(run, start)
    old = {path.name: contents(path) for path in run.iterdir() if path.is_dir()}
    cards = [path.read_bytes() for path in run.glob("README.md")] or [b""]
    assert not killed_at(10**6, lambda: save(now))
    clean = contents(run)
    new = contents(run / f"checkpoint-{now}")
    number = 0
    while killed_at(number, lambda: save(now)):
        # As a run that goes on does: before anything else.
        settle(run, writes=True)
        folder = resumed_folder(True, str(run))
        assert folder is not None or not before
        if folder is not None:
            check_resumable(folder, trainer._run_settings(), trainer.schedule, with_optimizer=True)
        card = run / "README.md"  # goes with each save, and is whole too
        assert not card.exists() or card.read_bytes() in (cards[0], clean["README.md"])
        for path in set(run.iterdir()) - {card}:
            assert contents(path) in (old.get(path.name), new if path.name == f"checkpoint-{now}" else None)
        assert len(old.keys() - {path.name for path in run.iterdir()}) <= 1  # what rotation was to delete
        # Killed at the same place once more, and then saved without a look at what was left.
        if stride == 1 or number % 6 == 0:
            killed_at(number, lambda: save(now))
            assert not killed_at(10**6, lambda: save(now))
            assert contents(run) == clean
        shutil.rmtree(run)
        shutil.copytree(start, run)
        number += stride
    assert number > 40  # a save of 16 files: each is opened, and moved with its folder


def test_saved_weights_can_be_loaded_at_any_time(make_trainer, tmp_path):
    """`save_model` over an older checkpoint: each file is the old or the new one, and nothing else is there."""
    trainer = make_trainer(TEXTS)
    place, start = tmp_path / "model", tmp_path / "start"
    trainer.save_model(place)
    shutil.copytree(place, start)
    before = contents(start)
    next(trainer.model.parameters()).data.fill_(1.0)
    assert not killed_at(10**6, lambda: trainer.save_model(place))
    after = contents(place)
    assert before.keys() == after.keys() and before["model.safetensors"] != after["model.safetensors"]
    number = 0
    while killed_at(number, lambda: trainer.save_model(place)):
        got = contents(place)
        assert got.keys() == before.keys() and all(content in (before[n], after[n]) for n, content in got.items())
        shutil.rmtree(place)
        shutil.copytree(start, place)
        number += 1
    assert number > 20


def test_half_a_checkpoint_goes_first(saver, tmp_path):
    """Left by an older version's rotation: neither resumed from nor kept in the place of a whole one."""
    _, save = saver(2)
    run = tmp_path / "run"
    for step in (1, 2):
        save(step)
    shutil.copytree(run / "checkpoint-2", run / "checkpoint-3")
    (run / "checkpoint-3" / "model.safetensors").unlink()
    assert resumed_folder(True, str(run)) == run / "checkpoint-2"
    save(4)
    assert sorted(path.name for path in run.iterdir()) == ["README.md", "checkpoint-2", "checkpoint-4"]


# ---- two processes ----


def killed_pair_at(number: int, victim: int, other_goes_on: bool, work: Callable[[], None]) -> bool:
    """As [`killed_at`], of two processes, of which `victim` ends; the other is ended by whoever started them, at once
    or when it waits for the first. What they exchange is a barrier."""
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def wait() -> None:
        sys.audit("test.wait")  # an operation before which one may end
        barrier.wait()

    def gather(objects: list) -> list:
        wait()
        return objects + objects

    def as_rank(rank: int) -> None:
        PartialState._shared_state |= {"process_index": rank, "local_process_index": rank, "num_processes": 2}
        PartialState.wait_for_everyone = lambda self: wait()
        em_state.gather_object = gather
        work()

    pids = []
    for rank in (0, 1):
        pids.append(os.fork())
        if pids[rank] == 0:
            _count_down(number if rank == victim else 10**6, lambda: as_rank(rank))  # noqa: B023
    ended, status = os.waitpid(pids[victim], 0)
    killed = os.waitstatus_to_exitcode(status) == KILLED
    if killed:
        time.sleep(0.2 * other_goes_on)
        os.kill(pids[1 - victim], signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pids[1 - victim], 0)[1])
    assert killed or (os.waitstatus_to_exitcode(status), code) == (0, 0)
    return killed


@pytest.mark.parametrize(
    "victim, other_goes_on, stride",
    [(0, True, 8), (1, False, 1),
     *(pytest.param(victim, on, 1, marks=pytest.mark.slow) for victim in (0, 1) for on in (False, True))],
)  # fmt: skip
def test_of_two_processes_either_may_be_killed(saver, tmp_path, victim, other_goes_on, stride):
    """One replaces a checkpoint of both, whose random numbers the other writes."""
    trainer, save = saver(2)
    run, start = tmp_path / "run", tmp_path / "start"
    run.mkdir(exist_ok=True)
    for step in (1, 2):
        assert not killed_pair_at(10**6, 0, False, lambda: save(step))  # noqa: B023
    shutil.copytree(run, start)
    old = {path.name: contents(path) for path in run.iterdir() if path.is_dir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} < set(old["checkpoint-2"])
    assert set(old) == {"checkpoint-1", "checkpoint-2"}
    assert not killed_pair_at(10**6, 0, False, lambda: save(3))
    new = contents(run / "checkpoint-3")
    shutil.rmtree(run)
    shutil.copytree(start, run)
    number = 0
    while killed_pair_at(number, victim, other_goes_on, lambda: save(3)):
        settle(run, writes=True)
        folder = resumed_folder(True, str(run))
        now = trainer._run_settings() | {"world_size": 2}
        check_resumable(folder, now, trainer.schedule, with_optimizer=True)
        for path in filter(Path.is_dir, run.iterdir()):
            assert contents(path) == (new if path.name == "checkpoint-3" else old[path.name])
        assert len(old.keys() - {path.name for path in run.iterdir()}) <= 1
        shutil.rmtree(run)
        shutil.copytree(start, run)
        number += stride
    assert number > (40 if victim == 0 else 2)


# ---- a full disk ----


def full_at(number: int, work: Callable[[], None]) -> str | None:
    """Runs `work` in a child in which file operation `number` finds the disk full; what it raised, if anything."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        left = [number]

        def refuse(event: str, arguments: tuple) -> None:
            if event == "open" and isinstance(arguments[0], str | Path) and arguments[2] & os.O_CREAT:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, "No space left on device", arguments[0])

        try:
            sys.addaudithook(refuse)
            work()
            os._exit(0)
        except OSError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1) and (code == 0 or said)
    return said or None


def test_a_full_disk_is_said_and_costs_no_checkpoint(saver, tmp_path):
    trainer, save = saver(2)
    run = tmp_path / "run"
    save(1)
    old, number = contents(run), 0
    while said := full_at(number, lambda: save(2)):
        assert "checkpoint-2 can't be written (" in said and "No space left" in said and "go on with" in said
        assert contents(run) == old  # nor does what there is of it take room
        number += 3
    assert number > 3 and resumed_folder(True, str(run)) == run / "checkpoint-2"


@pytest.mark.parametrize("room", [0, 500, 20_000])
def test_files_that_may_not_grow_are_said(saver, tmp_path, room):
    """By the limit of a file's size, which weights and pickles run into within a write."""
    trainer, save = saver(2)
    save(1)
    old = contents(tmp_path / "run")

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        save(2)

    said = full_at(10**6, limited)
    assert said is not None and "checkpoint-2 can't be written (" in said
    assert contents(tmp_path / "run") == old
