"""What `ra3 train` and `ra3 rlvr` share: the model's arguments, and a run that can be stopped and go on."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import disable_progress_bars
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_bitsandbytes_available
from transformers.utils import logging as transformers_logging
from trl import ModelConfig, get_quantization_config

from ..report.runs import TrainingRun
from ..report.summary import measured_after, peak_memory, summary_text
from ..saving import stopped_message


_NOT_REPEATED = ("--resume_from_checkpoint", "--hub_token", "--hub-token")  # a log is no place for a token
_UNNAMED = "trainer_output"  # what TrainingArguments writes to when nobody names a folder


def named(model_args: ModelConfig, args: TrainingArguments, suffix: str) -> str:
    """Reads the model's name, and calls `output_dir` by it unless the user says otherwise.

    Raises:
        `ValueError`: if there is none.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("`model_name_or_path` is missing; name a folder or a model on the Hub.")
    if args.output_dir == _UNNAMED:
        args.output_dir = f"{Path(name.rstrip('/')).name}-{suffix}"
    return name


def model_flags(model_args: ModelConfig) -> dict[str, Any]:
    """Makes the arguments of `from_pretrained` that the flags ask for.

    Raises:
        `ValueError`: for a quantization if bitsandbytes is not installed.
    """
    flag = next((name for name in ("load_in_4bit", "load_in_8bit") if vars(model_args)[name]), None)
    if flag and not is_bitsandbytes_available():
        raise ValueError(
            f"`{flag}` is true, but bitsandbytes is not installed: `pip install bitsandbytes`, or leave it out."
        )
    options: dict[str, Any] = {
        "revision": model_args.model_revision, "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype, "quantization_config": get_quantization_config(model_args),
    }  # fmt: skip
    if options["quantization_config"] is not None:
        options["device_map"] = {"": PartialState().local_process_index}
    return {name: value for name, value in options.items() if value is not None}


def resume_point(args: TrainingArguments) -> bool | str | None:
    """Reads what `Trainer.train` wants: the config's field is a string, on the command line `true` is meant as `True`.

    Raises:
        `ValueError`: if there is no such checkpoint.
    """
    value = args.resume_from_checkpoint
    if value is None or str(value).lower() in ("false", "none", "no", ""):
        return None
    if str(value).lower() in ("true", "yes"):
        if _last_checkpoint(args.output_dir) is None:
            raise ValueError(
                f"`resume_from_checkpoint` is true, but `output_dir` {args.output_dir!r} holds no checkpoint; "
                "leave it out to start anew."
            )
        return True
    if not Path(value).is_dir():
        raise ValueError(
            f"`resume_from_checkpoint` is {value!r}, which is no folder; use `true` or a checkpoint's path."
        )
    return value


def resume_command(typed: str) -> str:
    """Puts `--resume_from_checkpoint true` into a command, in the place of any other, and takes tokens out."""
    words, kept = iter(shlex.split(typed)), []
    for word in words:
        if word in _NOT_REPEATED:
            next(words, None)
        elif word.partition("=")[0] not in _NOT_REPEATED:
            kept.append(word)
    return shlex.join([*kept, "--resume_from_checkpoint", "true"])


def run_until_stopped(trainer: Trainer, args: TrainingArguments, typed: str, work: Callable[[], None]) -> int:
    """Does `work`, the run of a trainer, and returns its exit code; after Ctrl-C it says how to go on."""
    says = trainer.is_world_process_zero()
    if says and resume_point(args) is None and _last_checkpoint(args.output_dir) is not None:
        logging.warning("%s holds checkpoints of an earlier run; this one starts anew.", args.output_dir)
    try:
        work()
    except KeyboardInterrupt:
        if says:
            print(stopped_message(args, resume_command(typed)), file=sys.stderr)
        return 130
    return 0


def end_in_words(trainer: Trainer, kind: str, seconds: float, following: str) -> None:
    """Prints what a run changed, its time and memory, and the command to go on with; once for all processes."""
    peak = sum(gather_object([peak_memory()]))
    if trainer.is_world_process_zero():
        now = measured_after(trainer.state, trainer.args.load_best_model_at_end)
        text = summary_text(TrainingRun("", kind, trainer.state.log_history), seconds, peak, now)
        print(f"{text}\nSaved to {trainer.args.output_dir}. Next:\n  {following}")


def quiet_others() -> None:
    """Has a process other than the first say errors only: what all have to say is said once."""
    if int(os.environ.get("RANK", "0")) == 0:
        return
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def _last_checkpoint(folder: str | None) -> str | None:
    """As `get_last_checkpoint`, for a folder that may not be there (another process makes it)."""
    return get_last_checkpoint(folder) if folder and Path(folder).is_dir() else None
