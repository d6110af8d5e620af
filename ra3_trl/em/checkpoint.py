"""Checkpoints that are whole or not there, and whether a run can go on from one exactly."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.logging import get_logger
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..config import RA3Config
from ..config_fields import own_fields
from ..files import naming, require_form, saying_what_is_full
from .schedule import Schedule
from .state import FROZEN, HEAD, read_state


logger = get_logger(__name__)  # of the main process
# Settings that a resumed run may change: what is logged and evaluated, memory, and the run's length, which
# `check_resumable` looks at by itself.
_FREE = {"model_init_kwargs", "dataset_num_proc", "dataset_license", "max_branch_tokens", "code_loss_tolerance"}
_FREE |= {"log_latents_steps", "eval_num_latents", "eval_max_boundaries", "em_iterations", "m_steps"}
_FREE |= {"trust_remote_code"}
_SHARED: tuple[str, ...] = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "optim",
    "lr_scheduler_type", "dataloader_drop_last", "train_sampling_strategy",
)  # fmt: skip
FREE_ROOM = "free some room, and go on with the checkpoint before"
ASIDE = "_incomplete"  # what begins with `_` is never pushed
_WEIGHTS = ("model", "adapter_model", "pytorch_model")
_DONE, _GONE = "done", "gone"  # in it: what is whole and has not yet its name, and what is no longer there


@contextmanager
def written_whole(args: RA3Config, run: Path, state: TrainerState) -> Iterator[Path]:
    """Inside, `Trainer` writes the checkpoint of this update into a folder aside, which this gives, and neither pushes
    nor deletes any; then it gets its name in `run`. Every process must come here."""
    settle(run, args.should_save)  # what a killed write left there would become part of this checkpoint
    final = run / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    before = args.output_dir, args.save_total_limit, args.push_to_hub
    args.output_dir, args.save_total_limit, args.push_to_hub = os.path.join(args.output_dir or "", ASIDE), None, False
    try:
        with saying_what_is_full(final, FREE_ROOM):
            yield run / ASIDE / final.name
    except OSError:
        if args.should_save:  # what there is of it takes room
            shutil.rmtree(run / ASIDE, ignore_errors=True)
        raise
    finally:
        args.output_dir, args.save_total_limit, args.push_to_hub = before
    if args.should_save:
        put_in_place(run / ASIDE / final.name, final, state)
    PartialState().wait_for_everyone()
    name_best(final, state)


@contextmanager
def rotation_taken_over(args: RA3Config) -> Iterator[int | None]:
    """`Trainer` deletes no checkpoints inside, since it does so in place; the limit that it is not told."""
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield limit
    finally:
        args.save_total_limit = limit


def put_in_place(aside: Path, final: Path, state: TrainerState) -> None:
    """Gives a checkpoint that is whole its name, and its trainer state the best checkpoint's path by that name."""
    if name_best(final, state):
        state.save_to_json(str(aside / TRAINER_STATE_NAME))
    (aside.parent / _DONE).mkdir(exist_ok=True)
    aside.rename(aside.parent / _DONE / final.name)
    _settle(final.parent)


def settle(run: Path, writes: bool) -> None:
    """Finishes what a killed save left in a run's folder: a whole checkpoint gets its name, half ones go. Every
    process must call it, and one of them `writes`.

    A checkpoint that is replaced leaves its name before the new one takes it. Between the two a kill finds the new one
    under `_incomplete/done`, from where this puts it in place.
    """
    if writes:
        _settle(run)
    PartialState().wait_for_everyone()


def _settle(run: Path) -> None:
    for done in sorted((run / ASIDE / _DONE).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        _take_away(run / done.name)
        done.rename(run / done.name)
    for left in run.glob(f"{ASIDE}*"):  # of single files too, such as the card
        shutil.rmtree(left, ignore_errors=True)


def rotate(run: Path, limit: int | None, keep: Iterable[str | Path | None]) -> None:
    """Deletes checkpoints but for `limit`, and none of `keep`: first those that are not whole, then the oldest.

    By the number of the update, since a half-deleted folder is the last changed. Each leaves its name before its files
    go.
    """
    if not limit or limit < 0:
        return
    kept = {Path(path).resolve() for path in keep if path is not None}
    folders = sorted(_checkpoints(run), key=lambda path: (is_whole(path), _number(path)))
    for folder in [path for path in folders if path.resolve() not in kept][: max(0, len(folders) - limit)]:
        _take_away(folder)
    shutil.rmtree(run / ASIDE, ignore_errors=True)


def keep_best_alone(state: TrainerState) -> None:
    """Deletes all checkpoints but the best, if one is known: what `Trainer` does at the end with a limit of 1."""
    if best := state.best_model_checkpoint:
        rotate(Path(best).parent, 1, [best])


def is_whole(checkpoint: Path) -> bool:
    """Whether a folder has what every checkpoint has: weights, their configuration, and where training stood."""
    names = {path.name for path in checkpoint.iterdir()} if checkpoint.is_dir() else set()
    weights = any(name.startswith(_WEIGHTS) and name.endswith((".safetensors", ".bin")) for name in names)
    return weights and TRAINER_STATE_NAME in names and bool(names & {CONFIG_NAME, ADAPTER_CONFIG_NAME})


def _checkpoints(run: Path) -> list[Path]:
    names = (path for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir())
    return [path for path in names if re.fullmatch("[0-9]+", path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))]


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[-1])


def _take_away(folder: Path) -> None:
    """Renames a checkpoint, if there is one, and then deletes it: a kill never leaves half of it under its name."""
    gone = folder.parent / ASIDE / _GONE / folder.name
    if folder.exists():
        shutil.rmtree(gone, ignore_errors=True)
        gone.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def name_best(final: Path, state: TrainerState) -> bool:
    """Names the best checkpoint by its place, not by where it was written aside; every process must, since each loads
    it at the end."""
    best = final.with_name(f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
    known = bool(state.best_global_step) and (best == final or best.exists())
    if known:
        state.best_model_checkpoint = str(best)
    return known


def run_settings(args: RA3Config, facts: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run must share with the one that wrote the checkpoint: settings, and `facts` of the run; what can
    be written as JSON."""
    names = [*(name for name in own_fields(type(args)) if name not in _FREE), *_SHARED]
    return json.loads(json.dumps({"world_size": args.world_size} | {n: getattr(args, n) for n in names} | facts))


def resumed_folder(resume_from_checkpoint: str | bool | None, output_dir: str) -> Path | None:
    """The checkpoint that a run goes on from; `None` where there is none. Of `True` the last one that is whole, or the
    last one if none seems so (sharded weights are in folders of their own)."""
    if resume_from_checkpoint is not True:
        return Path(resume_from_checkpoint) if resume_from_checkpoint else None
    folders = sorted(_checkpoints(Path(output_dir)), key=_number)
    whole = [folder for folder in folders if is_whole(folder)] or folders
    if whole and whole[-1] != folders[-1]:
        logger.warning("%s is not whole; the run goes on from %s.", folders[-1], whole[-1])
    return whole[-1] if whole else None


def check_resumable(folder: Path, now: dict[str, Any], schedule: Schedule, with_optimizer: bool) -> None:
    """Refuses a checkpoint that a run can't go on from exactly, before anything is loaded or written.

    Args:
        folder (`Path`):
            The checkpoint.
        now (`dict[str, Any]`):
            [`run_settings`] of the run.
        schedule ([`Schedule`]):
            The run's.
        with_optimizer (`bool`):
            Whether optimizer and scheduler must be in files of their own.

    Raises:
        `ValueError`: if a file is missing, or the checkpoint is of another configuration or number of processes.
    """
    state = read_state(folder)
    wanted = [TRAINER_STATE_NAME, *([FROZEN] if state["frozen"] else [])]
    wanted += [HEAD] if state.get("head_trained_on") is not None else []
    wanted += ["optimizer.pt", "scheduler.pt"] if with_optimizer else []
    for name in wanted:
        if not (folder / name).is_file():
            raise ValueError(f"`resume_from_checkpoint`: {folder / name} is missing; take an earlier checkpoint.")
    for name, value in state["settings"].items():
        if name not in now:
            raise ValueError(
                f"`resume_from_checkpoint`: {folder} has the setting `{name}`, which this run does not know: another "
                "version of ra3-trl or another trainer began it. Go on with that, or start anew from its weights with "
                "`model=...`."
            )
        if name == "world_size" and now[name] != value:
            raise ValueError(
                f"`resume_from_checkpoint`: {folder} was written by {value} processes and this run has {now[name]}; "
                f"go on with {value}, or start anew from its weights with `model=...`."
            )
        if now[name] != value:
            raise ValueError(
                f"`{name}` is {now[name]!r}, but {folder} was written with {value!r}; set it back, or start anew "
                "from the checkpoint's weights with `model=...`."
            )
    with naming(folder / TRAINER_STATE_NAME, "take an earlier checkpoint", ValueError):
        step = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
        require_form({"global_step": step}, {"global_step": int})
    phase = schedule.phase_at(step - 1)
    if [phase.kind, phase.iteration, phase.step] != state["last_update"] or step > schedule.total:
        raise ValueError(
            f"`m_steps` or `em_iterations`: update {step} of {folder} was number {state['last_update'][2] + 1} of "
            f"{state['last_update'][0]}-phase {state['last_update'][1] + 1}, and is not in this run of "
            f"{schedule.iterations} x ({schedule.e_steps} + {schedule.m_steps}) updates; only the last M-phase may be "
            "made longer."
        )
