"""`ra3 rlvr`: TRL's `GRPOTrainer` on programs that run in the sandbox, from any checkpoint."""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, IterableDataset, load_dataset
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, get_peft_config

from ..config_file import read_settings, write_settings
from ..evaluation import Task, load_benchmark, render_prompt, stop_strings
from ..evaluation.tasks import HUB
from ..generation import CompletionRollout, until_stop
from ..generation.grpo import check_heeded
from ..hub.card import public_name
from ..models import context_length, load_tokenizer
from ..rewards import (
    code_execution_reward,
    format_reward,
    fraction_passed_reward,
    get_think_cost_reward,
    problem_columns,
    use_judge,
)
from ..sandbox import Limits, Problem
from ..segmentation import find_format
from .data import load_splits
from .evaluate import open_judge
from .launch import read_arguments
from .parser import TrainParser, normalise
from .rewards import load_reward_funcs
from .run import model_options, named, resume_point, run_until_stopped


_EXECUTED = {"code_execution": code_execution_reward, "fraction_passed": fraction_passed_reward}
_REWARDS = {**_EXECUTED, "format": format_reward}
_MBPP_TRAIN, _MBPP_VALIDATION, _MBPP_TEST = range(601, 975), range(511, 601), range(11, 511)  # as published
Data = Dataset | IterableDataset


@dataclass
class RLVRScriptArguments(ScriptArguments):
    """
    [`~trl.ScriptArguments`] with tasks of a benchmark as a source, rewards, and how completions are drawn.

    Args:
        task (`str`, *optional*), task_file (`str`, *optional*):
            As for `ra3 evaluate`, of MBPP its training split.
        allow_test_tasks (`bool`, *optional*, defaults to `False`):
            Train on tasks of HumanEval and of MBPP's test split all the same.
        reward_funcs (`list[str]`, *optional*, defaults to `["code_execution"]`):
            `code_execution`, `fraction_passed`, `format` and import paths of functions.
        think_cost (`float`, *optional*, defaults to `0.0`):
            What a latent costs, subtracted from the rewards.
        think (`str`, *optional*, defaults to `"auto"`):
            Latents where the model wants them, at every boundary, or nowhere.
        stop (`list[str]`, *optional*):
            Texts that end a completion. The default is the benchmark's; for other data there are none.
        timeout (`float`, *optional*, defaults to `3.0`), memory_mb (`int`, *optional*, defaults to `512`):
            Seconds and MiB of a program.
        slots (`int`, *optional*):
            Programs at a time in each process. The default is one for each CPU.

    Raises:
        `ValueError`: for a bad value, or without data.
    """

    task: str | None = field(
        default=None,
        metadata={"help": "mbpp (its training split), or a jsonl file of problems, in place of `dataset_name`."},
    )
    task_file: str | None = field(default=None, metadata={"help": "File with the rows of `task`, not the Hub's."})
    allow_test_tasks: bool = field(
        default=False, metadata={"help": "Train on tasks of HumanEval and of MBPP's test split too."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["code_execution"],
        metadata={
            "help": "code_execution, fraction_passed, format, and import paths such as my_module.my_func; weigh them "
            "with reward_weights."
        },
    )
    think_cost: float = field(default=0.0, metadata={"help": "What a latent costs; latents are logged at 0 too."})
    think: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={
            "help": "Latents where the model wants them, at every boundary, or nowhere, which bans own-line comments."
        },
    )
    stop: list[str] | None = field(
        default=None,
        metadata={
            "help": 'Texts that end a completion, best as JSON: \'["\\ndef", "\\nclass"]\'. Default: the task\'s.'
        },
    )
    timeout: float = field(default=3.0, metadata={"help": "Seconds of a program."})
    memory_mb: int = field(default=512, metadata={"help": "MiB of a program."})
    slots: int | None = field(
        default=None, metadata={"help": "Programs at a time in each process. Default: one for each CPU."}
    )

    def __post_init__(self):
        if (self.task is None) == (self.dataset_name is None):
            raise ValueError(
                f"`task` is {self.task!r} and `dataset_name` {self.dataset_name!r}; pass one of the two as the data."
            )
        if self.task_file is not None and self.task is None:
            raise ValueError(f"`task_file` is {self.task_file!r} and there is no `task`; pass it as `task`.")
        if self.task == "humaneval" and not self.allow_test_tasks:
            raise ValueError(
                "`task` is 'humaneval', all of which is for testing; train on 'mbpp' (its training split) or on "
                "problems of your own, or set `allow_test_tasks`."
            )
        for name in self.reward_funcs:
            if name not in _REWARDS and "." not in name:
                raise ValueError(
                    f"`reward_funcs` holds {name!r}; use {', '.join(_REWARDS)} or an import path such as "
                    "my_module.my_func. Latents cost `think_cost`."
                )
        Limits(self.timeout, self.memory_mb)  # checks them
        get_think_cost_reward(self.think_cost)

    @property
    def executed(self) -> list[str]:
        """Those of `reward_funcs` that run programs."""
        return [name for name in self.reward_funcs if name in _EXECUTED]


def make_parser() -> TrainParser:
    """The parser of script, trainer and model arguments."""
    return TrainParser(
        (RLVRScriptArguments, GRPOConfig, ModelConfig), prog="ra3 rlvr", allow_abbrev=False,
        description="Trains a checkpoint on programs and their tests, with TRL's GRPOTrainer.",
        usage="ra3 rlvr --model_name_or_path MODEL (--task mbpp|FILE | --dataset_name NAME) [OPTION ...]",
    )  # fmt: skip


# ---- data ----


def load_data(script: RLVRScriptArguments, evaluates: bool) -> tuple[Data, Data | None, tuple[str, ...]]:
    """Training data, evaluation data where the trainer `evaluates`, and the texts that end a completion.

    Raises:
        `ValueError`: for tasks that are for testing, and data that the rewards can't use.
        `OSError`: if the Hub is needed and can't be reached.
    """
    if script.task is None:
        splits = load_splits(
            script.dataset_name, None, script.dataset_train_split, script.dataset_config, script.dataset_streaming
        )
        train, held_out = splits[script.dataset_train_split], splits.get(script.dataset_test_split)
        stop: tuple[str, ...] = ()
    else:
        tasks, validation, kind = _load_tasks(script)
        train, held_out = _as_data(tasks), _as_data(validation) if validation else None
        stop = stop_strings(kind, "complete")
    if evaluates and held_out is None:
        raise ValueError(
            "`eval_strategy` is set and there is no evaluation data; leave it out, or pass a `dataset_name` that has "
            f"the split {script.dataset_test_split!r}."
        )
    _check_data(train, script, script.allow_test_tasks)
    train = _watched(train, script, script.allow_test_tasks)
    if evaluates:
        _check_data(held_out, script, True)
        held_out = _watched(held_out, script, True)
    return train, held_out if evaluates else None, stop if script.stop is None else tuple(script.stop)


def _load_tasks(script: RLVRScriptArguments) -> tuple[list[Task], list[Task], str]:
    """Tasks to train on, tasks to evaluate on, and their kind."""
    if script.task != "mbpp":
        benchmark = load_benchmark(script.task, script.task_file)
        return list(benchmark.tasks), [], benchmark.kind
    with tempfile.TemporaryDirectory() as folder:
        benchmark = load_benchmark(script.task_file or _published_mbpp(folder))  # a file's rows are all taken
    by_id = {task.task_id: task for task in benchmark.tasks}
    wanted = [*_MBPP_TRAIN, *(_MBPP_TEST if script.allow_test_tasks else ())]
    train, validation = (
        [by_id[name] for n in numbers if (name := f"Mbpp/{n}") in by_id] for numbers in (wanted, _MBPP_VALIDATION)
    )
    if not train:
        raise ValueError(
            f"`task_file` {script.task_file!r} has none of MBPP's training tasks, 601 to 974; pass a file that has "
            "them, or pass it as `task` to train on all that it has."
        )
    return train, validation, benchmark.kind


def _published_mbpp(folder: str) -> str:
    """A file with MBPP's rows to train and to validate on."""
    path = str(Path(folder, "mbpp.jsonl"))
    try:
        load_dataset(HUB["mbpp"], "full", split="train+validation").to_json(path)
    except OSError as error:
        raise OSError(f"{HUB['mbpp']} can't be had from the Hub; pass a file by `--task_file`. ({error})") from error
    return path


def _as_data(tasks: list[Task]) -> Dataset:
    """A row for each task, prompted as `ra3 evaluate` does; EvalPlus's tests where there are any."""
    prompts = [{"task_id": task.task_id, "prompt": render_prompt(task, task.kind, "complete")} for task in tasks]
    return Dataset.from_list(
        [row | problem_columns(task.plus or task.problem) for row, task in zip(prompts, tasks, strict=True)]
    )


def _check_data(data: Data, script: RLVRScriptArguments, may_be_tests: bool) -> None:
    """Refuses data without prompts or tests, tests that can't be read, and tasks that are for testing unless they may
    be; of a stream nothing but its columns is known yet, see [`_watched`]."""
    columns = data.column_names or ()
    if columns and "prompt" not in columns:
        raise ValueError(f"the data has the columns {sorted(columns)}; GRPO needs a `prompt`.")
    if columns and script.executed and not {"test", "test_list", "inputs"} & set(columns):
        raise ValueError(
            f"the data has the columns {sorted(columns)}; {script.executed[0]!r} needs `test` and `entry_point`, "
            "`test_list`, or `inputs` and `outputs`."
        )
    if isinstance(data, Dataset) and not len(data):
        raise ValueError("the data has no rows; give it at least one.")
    for i, row in enumerate(data if isinstance(data, Dataset) else ()):
        _check_row(row, i, bool(script.executed), may_be_tests)


def _check_row(row: dict[str, Any], i: int, executed: bool, may_be_tests: bool) -> dict[str, Any]:
    """`row`, as it is."""
    if not may_be_tests and _is_test_task(row):
        raise ValueError(
            f"row {i} of the data is the task {row['task_id']!r}, which by its id is one of HumanEval or of MBPP's "
            "test split; leave it out, give tasks of your own other ids, or set `allow_test_tasks`."
        )
    if not row.get("prompt"):
        raise ValueError(f"row {i} of the data has no `prompt`; give it one, or leave the row out.")
    if executed:
        try:
            Problem.from_row(row)
        except ValueError as error:
            raise ValueError(f"row {i} of the data: {error}") from error
    return row


def _watched(data: Data, script: RLVRScriptArguments, may_be_tests: bool) -> Data:
    """`data`; a stream's rows are checked as they come."""
    if isinstance(data, Dataset):
        return data
    known = {"executed": bool(script.executed), "may_be_tests": may_be_tests}
    return data.map(_check_row, with_indices=True, fn_kwargs=known, features=data.features)


def _is_test_task(row: dict[str, Any]) -> bool:
    kind, _, number = str(row.get("task_id")).rpartition("/")
    mbpp = kind == "Mbpp" or (not kind and row.get("test_list") is not None)
    return kind == "HumanEval" or (mbpp and number.isdecimal() and int(number) in _MBPP_TEST)


# ---- trainer ----


def load_rewards(script: RLVRScriptArguments, args: GRPOConfig) -> list[Callable[..., Any]]:
    """The reward functions that the arguments name, and last what latents cost, which logs them; its weight is 1.

    Raises:
        `ValueError`: if there is no such function, or weights do not fit.
    """
    found = [_REWARDS[n] if n in _REWARDS else load_reward_funcs([n])[0] for n in script.reward_funcs]
    if args.reward_weights is not None:
        if len(args.reward_weights) != len(found):
            raise ValueError(
                f"`reward_weights` are {args.reward_weights} and `reward_funcs` {script.reward_funcs}; give one "
                "weight for each. What latents cost is `think_cost`."
            )
        args.reward_weights = [*args.reward_weights, 1.0]
    return [until_stop(func) for func in (*found, get_think_cost_reward(script.think_cost))]


def make_rollout(
    script: RLVRScriptArguments, settings: dict[str, Any] | None, stop: tuple[str, ...]
) -> CompletionRollout:
    """How completions are drawn, from a checkpoint that was mid-trained with `settings`.

    Raises:
        `ValueError`: for latents that are not comments of Python.
    """
    known = {name: settings[name] for name in ("action_format", "max_latent_length") if settings and name in settings}
    action_format = known.get("action_format", "python")
    if action_format != "python" and (script.think != "auto" or find_format(action_format).tags):
        raise ValueError(
            f"the checkpoint was mid-trained with `action_format` {action_format!r}, whose latents are no comments of "
            "Python, so its programs could not be run; use one that was trained with 'python'."
        )
    return CompletionRollout(stop, None if script.think == "auto" else script.think, **known)


def load_policy(name: str, options: dict[str, Any]) -> str | PeftModel:
    """`name`, for TRL to load; an adapter's folder is loaded with its base, to be trained further."""
    place = {"revision": options["revision"]} if "revision" in options else {}
    if find_adapter_config_file(name, **place) is None:
        return name
    return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)


def build_trainer(
    script: RLVRScriptArguments,
    args: GRPOConfig,
    model_args: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any] | None,
) -> GRPOTrainer:
    """The trainer that the arguments describe; what can be known to fail fails before a model loads."""
    check_heeded(args)
    name, rewards = model_args.model_name_or_path, load_rewards(script, args)
    train, held_out, stop = load_data(script, args.eval_strategy != "no")
    rollout = make_rollout(script, settings, stop)
    options = model_options(model_args) | (args.model_init_kwargs or {})
    model = load_policy(name, options)
    args.model_init_kwargs = options if isinstance(model, str) else None
    with warnings.catch_warnings():
        # It says that trl may change this; which versions of trl work is for this package to say and to test.
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")
        trainer = GRPOTrainer(
            model, rewards, args, train, held_out, tokenizer, peft_config=get_peft_config(model_args),
            rollout_func=rollout,
        )  # fmt: skip
    _check_lengths(trainer)
    return trainer


def _check_lengths(trainer: GRPOTrainer) -> None:
    """Refuses prompts that leave no room for a completion; of chats and streams nothing is known yet."""
    most, room = context_length(trainer.accelerator.unwrap_model(trainer.model)), trainer.args.max_completion_length
    for data in (trainer.train_dataset, trainer.eval_dataset):
        if most is None or not isinstance(data, Dataset) or not isinstance(data[0]["prompt"], str):
            continue
        lengths = [len(ids) for ids in trainer.processing_class(data["prompt"][:])["input_ids"]]
        if max(lengths) + room > most:
            raise ValueError(
                f"`max_completion_length` is {room} and the prompt of row {lengths.index(max(lengths))} has "
                f"{max(lengths)} tokens, more than the model's context of {most} together; lower it or leave the row "
                "out."
            )


def run(trainer: GRPOTrainer, source: str, settings: dict[str, Any] | None, resume: bool | str | None) -> None:
    """Trains, saves, writes the card, pushes."""
    args = trainer.args
    trained = trainer.train(resume_from_checkpoint=resume)
    trainer.save_metrics("train", trained.metrics)
    trainer.save_model(args.output_dir)
    trainer.save_state()
    if settings is not None and trainer.is_world_process_zero():
        write_settings(settings, args.output_dir)  # what its latents look like has not changed
    trainer.create_model_card(dataset_name=source)
    trainer.accelerator.print(f"Saved to {args.output_dir}.")
    if settings and settings.get("abstraction_head"):
        trainer.accelerator.print(
            "The abstraction head is not taken along: it reads states of the weights as they were before."
        )
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=source)
    trainer.end()


def source_name(script: RLVRScriptArguments) -> str:
    """What the model card calls the data: a Hub id, or a file's name (not its path)."""
    published = HUB.get(script.task) if script.task_file is None else None
    return published or public_name(script.task_file or script.task or script.dataset_name)


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 rlvr`; see `ra3 rlvr --help`. Returns the exit code."""
    argv = normalise(list(sys.argv[1:] if argv is None else argv))
    parts, typed, code = read_arguments(make_parser(), argv)
    if code is not None:
        return code
    script, args, model_args = parts
    name = named(model_args, args, "RLVR")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    resume = resume_point(args)
    # First, since it says best that there is no such checkpoint.
    tokenizer = load_tokenizer(name, {**(args.model_init_kwargs or {}), "revision": model_args.model_revision})
    settings = read_settings(name, revision=model_args.model_revision)
    with ExitStack() as stack:
        if script.executed:
            use_judge(stack.enter_context(open_judge(Limits(script.timeout, script.memory_mb), script.slots)))
            stack.callback(use_judge, None)
        trainer = build_trainer(script, args, model_args, tokenizer, settings)
        return run_until_stopped(trainer, args, typed, lambda: run(trainer, source_name(script), settings, resume))


if __name__ == "__main__":
    from .main import guarded

    raise SystemExit(guarded(main, sys.argv[1:]))
