"""Checkpoints that are whole or not there, and whether a run can go on from one exactly."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..config import RA3Config
from ..config_fields import own_fields
from .schedule import Schedule
from .state import FROZEN, HEAD, read_state


# Settings that a resumed run may change: what is logged and evaluated, memory, and the run's length, which
# `check_resumable` looks at by itself.
_FREE = {"model_init_kwargs", "dataset_num_proc", "dataset_license", "max_branch_tokens", "code_loss_tolerance"}
_FREE |= {
    "trust_remote_code",
    "log_latents_steps",
    "eval_num_latents",
    "eval_max_boundaries",
    "em_iterations",
    "m_steps",
}
_SHARED: tuple[str, ...] = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "optim",
    "lr_scheduler_type", "dataloader_drop_last", "train_sampling_strategy",
)  # fmt: skip
ASIDE = "_incomplete"  # what begins with `_` is never pushed


@contextmanager
def saving_aside(args: RA3Config) -> Iterator[None]:
    """`Trainer` writes checkpoints into a folder aside inside, and neither pushes nor deletes any."""
    before = args.output_dir, args.save_total_limit, args.push_to_hub
    args.output_dir, args.save_total_limit, args.push_to_hub = os.path.join(args.output_dir or "", ASIDE), None, False
    try:
        yield
    finally:
        args.output_dir, args.save_total_limit, args.push_to_hub = before


def put_in_place(aside: Path, final: Path, state: TrainerState) -> None:
    """Gives a checkpoint that is whole its name, and its trainer state the best checkpoint's path by that name."""
    if name_best(final, state):
        state.save_to_json(str(aside / "trainer_state.json"))
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    shutil.rmtree(aside.parent, ignore_errors=True)


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
    """The checkpoint that a run goes on from, as `Trainer.train` understands it; `None` where there is none."""
    last = get_last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    return Path(last) if last else None


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
    wanted = ["trainer_state.json", *([FROZEN] if state["frozen"] else [])]
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
    step = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
    phase = schedule.phase_at(step - 1)
    if [phase.kind, phase.iteration, phase.step] != state["last_update"] or step > schedule.total:
        raise ValueError(
            f"`m_steps` or `em_iterations`: update {step} of {folder} was number {state['last_update'][2] + 1} of "
            f"{state['last_update'][0]}-phase {state['last_update'][1] + 1}, and is not in this run of "
            f"{schedule.iterations} x ({schedule.e_steps} + {schedule.m_steps}) updates; only the last M-phase may be "
            "made longer."
        )
