"""`ra3 train`: `RA3MidTrainer` from the command line, with TRL's script, config and model arguments."""

from __future__ import annotations

import logging
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_bitsandbytes_available
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_peft_config,
    get_quantization_config,
)

from ..config import RA3Config
from ..trainer import RA3MidTrainer
from .data import STANDARD_LIBRARY, hold_out, limit, load_mixture, load_splits
from .estimate import estimate, render
from .launch import read_arguments
from .parser import TrainParser, normalise, read_config
from .rewards import load_reward_funcs


_NOT_REPEATED = ("--resume_from_checkpoint", "--hub_token", "--hub-token")  # a log is no place for a token
_UNNAMED = "trainer_output"  # what TrainingArguments writes to when nobody names a folder


@dataclass
class RA3ScriptArguments(ScriptArguments):
    """
    [`~trl.ScriptArguments`] with a folder of code as a source and documents held out.

    Args:
        code_dir (`str`, *optional*):
            Folder of .py files whose functions and classes are the documents. With neither `code_dir` nor
            `dataset_name` it is the standard library of the running Python.
        eval_documents (`int`, *optional*), eval_fraction (`float`, *optional*):
            Documents to hold out of the training data, or to take from the test split where there is one. With
            neither it is one in twenty, at most 64.
        reward_funcs (`list[str]`, *optional*):
            Import paths of reward functions; modules of the current folder are found.
        dry_run (`bool`, *optional*, defaults to `False`):
            Say what the run would take, and end.

    Raises:
        `ValueError`: for a bad value.
    """

    code_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of .py files whose functions and classes are the documents. With neither `code_dir` nor "
            "`dataset_name` it is the standard library of the running Python."
        },
    )
    eval_documents: int | None = field(
        default=None,
        metadata={"help": "Documents to hold out (0: none). Default: one in twenty, at most 64."},
    )
    eval_fraction: float | None = field(default=None, metadata={"help": "Share of the documents to hold out."})
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Import paths of reward functions, such as my_module.my_func; weigh them with reward_weights."
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print documents, boundaries, branches, tokens, memory and hours, and end."},
    )

    def __post_init__(self):
        if self.eval_documents is not None and self.eval_fraction is not None:
            raise ValueError("`eval_documents` and `eval_fraction` are both set; pass one of the two.")
        if self.eval_documents is not None and self.eval_documents < 0:
            raise ValueError(f"`eval_documents` is {self.eval_documents}; it must be at least 0.")
        if self.eval_fraction is not None and not 0 <= self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` is {self.eval_fraction}; it must be at least 0 and below 1.")


def make_parser(prog: str = "ra3 train") -> TrainParser:
    """The parser of script, config, model and mixture arguments."""
    types = (RA3ScriptArguments, RA3Config, ModelConfig, DatasetMixtureConfig)
    return TrainParser(
        types, prog=prog, allow_abbrev=False, description="Mid-trains a causal language model with RA3.",
        usage=f"{prog} --model_name_or_path MODEL [--dataset_name NAME | --code_dir FOLDER] [--output_dir DIR] "
        "[OPTION ...]",
    )  # fmt: skip


def load_data(script: RA3ScriptArguments, mixture: DatasetMixtureConfig, seed: int) -> tuple[Any, Any]:
    """Training and evaluation data; the latter may be `None`."""
    if mixture.datasets:
        for name in ("dataset_name", "code_dir"):
            if vars(script)[name]:
                raise ValueError(f"`datasets` and `{name}` {vars(script)[name]!r} are both set; pass one of the two.")
        splits = load_mixture(mixture, seed)
        train, test = splits["train"], splits.get("test")
    else:
        splits = load_splits(
            script.dataset_name,
            script.code_dir,
            script.dataset_train_split,
            script.dataset_config,
            script.dataset_streaming,
        )
        train, test = splits[script.dataset_train_split], splits.get(script.dataset_test_split)
    if test is None or script.eval_fraction is not None:
        return hold_out(train, script.eval_documents, script.eval_fraction, seed)
    return train, limit(test, script.eval_documents)


def source_name(script: RA3ScriptArguments, mixture: DatasetMixtureConfig) -> str:
    """What the model card calls the data: Hub ids, the name of a local folder or file (not its path)."""
    names = [script.dataset_name or script.code_dir or STANDARD_LIBRARY]
    if mixture.datasets:
        names = [name for source in mixture.datasets for name in _files(source.data_files) or [source.path]]
    return ", ".join(Path(name).resolve().name if Path(name).exists() else name for name in names)


def _files(data_files: str | list[str] | dict[str, str] | None) -> list[str]:
    """`data_files` of `load_dataset` as a list."""
    if isinstance(data_files, dict):
        return [name for value in data_files.values() for name in _files(value)]
    return [data_files] if isinstance(data_files, str) else list(data_files or [])


def quantization(model_args: ModelConfig):
    """The quantization that the flags ask for, or `None`.

    Raises:
        `ValueError`: if bitsandbytes is not installed.
    """
    flag = next((name for name in ("load_in_4bit", "load_in_8bit") if vars(model_args)[name]), None)
    if flag and not is_bitsandbytes_available():
        raise ValueError(
            f"`{flag}` is true, but bitsandbytes is not installed: `pip install bitsandbytes`, or leave it out."
        )
    return get_quantization_config(model_args)


def build_trainer(
    script: RA3ScriptArguments, args: RA3Config, model_args: ModelConfig, mixture: DatasetMixtureConfig
) -> RA3MidTrainer:
    """The trainer that the arguments describe."""
    reward_funcs = load_reward_funcs(script.reward_funcs)
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "quantization_config": quantization(model_args),
    }
    if options["quantization_config"] is not None:
        options["device_map"] = {"": PartialState().local_process_index}
    args.model_init_kwargs = {k: v for k, v in options.items() if v is not None} | (args.model_init_kwargs or {})
    for_tokenizer = ("revision", "trust_remote_code", "subfolder", "gguf_file")
    shared = {k: v for k, v in args.model_init_kwargs.items() if k in for_tokenizer}
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, **shared)
    train, evaluation = load_data(script, mixture, args.seed)
    return RA3MidTrainer(
        model_args.model_name_or_path,
        args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        reward_funcs=reward_funcs,
    )


def last_checkpoint(folder: str) -> str | None:
    """As `get_last_checkpoint`, for a folder that may not be there (another process makes it)."""
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def resume_point(args: TrainingArguments) -> bool | str | None:
    """What `Trainer.train` wants: the config's field is a string, on the command line `true` is meant as `True`."""
    value = args.resume_from_checkpoint
    if value is None or str(value).lower() in ("false", "none", "no", ""):
        return None
    if str(value).lower() in ("true", "yes"):
        if last_checkpoint(args.output_dir) is None:
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


def run(trainer: RA3MidTrainer, dataset_name: str, resume: bool | str | None) -> None:
    """Trains, evaluates, saves, writes the card, pushes."""
    args = trainer.args
    trained = trainer.train(resume_from_checkpoint=resume)
    trainer.save_metrics("train", trained.metrics)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    trainer.create_model_card(dataset_name=dataset_name)
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if args.push_to_hub:
        pushed = trainer.push_to_hub(dataset_name=dataset_name)
        if pushed is not None:  # None on other processes
            print(f"Pushed to {pushed.repo_url}.")
    trainer.end()


def resume_command(typed: str) -> str:
    """`typed`, the user's command, with `--resume_from_checkpoint true` in the place of any other, and no token."""
    words, kept = iter(shlex.split(typed)), []
    for word in words:
        if word in _NOT_REPEATED:
            next(words, None)
        elif word.partition("=")[0] not in _NOT_REPEATED:
            kept.append(word)
    return shlex.join([*kept, "--resume_from_checkpoint", "true"])


def run_until_stopped(trainer: Trainer, args: TrainingArguments, typed: str, work: Callable[[], None]) -> int:
    """The exit code of `work`, the run of a trainer; after Ctrl-C it says how to go on."""
    anew = resume_point(args) is None and last_checkpoint(args.output_dir) is not None
    if anew and trainer.is_world_process_zero():
        logging.warning("%s holds checkpoints of an earlier run; this one starts anew.", args.output_dir)
    try:
        work()
    except KeyboardInterrupt:
        if trainer.is_world_process_zero():
            print(_stopped(args, typed), file=sys.stderr)
        return 130
    return 0


def named(model_args: ModelConfig, args: TrainingArguments, suffix: str) -> str:
    """The model's name, by which `output_dir` is called unless the user says otherwise.

    Raises:
        `ValueError`: if there is none.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("`model_name_or_path` is missing; name a folder or a model on the Hub.")
    if args.output_dir == _UNNAMED:
        args.output_dir = f"{Path(name.rstrip('/')).name}-{suffix}"
    return name


def _stopped(args: TrainingArguments, typed: str) -> str:
    """What to say after Ctrl-C: which checkpoint there is, and the command that goes on from it."""
    last = last_checkpoint(args.output_dir)
    if last is None:
        return (
            f"Stopped before the first checkpoint (save_steps={args.save_steps:g}, save_strategy="
            f"{str(args.save_strategy)}): nothing to resume. With a smaller `--save_steps` there would be."
        )
    return f"Stopped; {last} is whole. Go on with:\n  {resume_command(typed)}"


def _dry_run(script, args: RA3Config, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> int:
    """Prints the estimate. The run's folder is not made and nothing leaves the machine."""
    args.push_to_hub, args.report_to = False, []
    with tempfile.TemporaryDirectory() as aside:
        args.output_dir = aside
        trainer = build_trainer(script, args, model_args, mixture)
        print("Timing an E-update and an M-update ...", file=sys.stderr)
        print(render(estimate(trainer)))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 train`; see `ra3 train --help`. Returns the exit code."""
    argv = normalise(list(sys.argv[1:] if argv is None else argv))
    dry = "--dry_run" in argv or "--dry-run" in argv or read_config(argv).get("dry_run") is True
    parts, typed, code = read_arguments(make_parser(), argv, here=dry)
    if code is not None:
        return code
    script, args, model_args, mixture = parts
    named(model_args, args, "RA3")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    if script.dry_run:
        return _dry_run(script, args, model_args, mixture)
    resume = resume_point(args)
    trainer = build_trainer(script, args, model_args, mixture)
    trainer.resume_hint = f"`{resume_command(typed)}`"  # for the message after a SIGTERM
    return run_until_stopped(trainer, args, typed, lambda: run(trainer, source_name(script, mixture), resume))


if __name__ == "__main__":
    from .main import guarded

    raise SystemExit(guarded(main, sys.argv[1:]))
