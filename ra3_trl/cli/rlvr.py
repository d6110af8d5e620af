"""`ra3 rlvr`: TRL's `GRPOTrainer` on programs that run in the sandbox, from any checkpoint."""

from __future__ import annotations

import logging
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, get_peft_config

from ..config_fields import model_options
from ..config_file import read_settings
from ..evaluation.tasks import HUB
from ..files import public_name
from ..report.runs import PEAK_MEMORY, RLVR
from ..report.summary import peak_memory
from ..rlvr import REWARDS, RLVRData, build_grpo_trainer, get_think_cost_reward, load_tasks, use_judge
from ..rlvr.rewards import EXECUTED
from ..sandbox import Limits
from .data import load_splits
from .launch import read_arguments
from .main import called
from .parser import TrainParser, normalise
from .passk_options import open_judge
from .rewards import load_reward_funcs
from .run import end_in_words, model_flags, named, quiet_others, resume_point, run_until_stopped


def _option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RLVRScriptArguments(ScriptArguments):
    """[`~trl.ScriptArguments`] with tasks of a benchmark as a source, rewards, and how completions are drawn."""

    task: str | None = _option("mbpp (its training split), or a jsonl file of problems, in place of `dataset_name`.")
    task_file: str | None = _option("File with the rows of `task`, not the Hub's.")
    allow_test_tasks: bool = _option("Train on tasks of HumanEval and of MBPP's test split too.", False)
    reward_funcs: list[str] = field(
        default_factory=lambda: ["code_execution"],
        metadata={"help": f"{', '.join(REWARDS)}, and import paths of functions; weigh them with reward_weights."},
    )
    think_cost: float = _option("What a latent costs; latents are logged at 0 too.", 0.0)
    think: Literal["auto", "always", "never"] = _option(
        "Latents where the model wants them, at every boundary, or nowhere, which bans own-line comments.", "auto"
    )
    stop: list[str] | None = _option(
        'Texts that end a completion, best as JSON: \'["\\ndef", "\\nclass"]\'. Default: the task\'s.'
    )
    timeout: float = _option("Seconds of a program.", 3.0)
    memory_mb: int = _option("MiB of a program.", 512)
    slots: int | None = _option("Programs at a time in each process. Default: one for each CPU.")

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
            if name not in REWARDS and "." not in name:
                raise ValueError(
                    f"`reward_funcs` holds {name!r}; use {', '.join(REWARDS)} or an import path such as "
                    "my_module.my_func. Latents cost `think_cost`."
                )
        Limits(self.timeout, self.memory_mb)  # checks them, as the next does
        get_think_cost_reward(self.think_cost)


def make_parser() -> TrainParser:
    """Makes the parser of script, trainer and model arguments."""
    return TrainParser(
        (RLVRScriptArguments, GRPOConfig, ModelConfig), prog="ra3 rlvr", allow_abbrev=False,
        description="Trains a checkpoint on programs and their tests, with TRL's GRPOTrainer.",
        usage="ra3 rlvr --model_name_or_path MODEL (--task mbpp|FILE | --dataset_name NAME) [OPTION ...]",
    )  # fmt: skip


def load_data(script: RLVRScriptArguments) -> RLVRData:
    """Loads the rows and stops that the arguments name."""
    if script.task is not None:
        data = load_tasks(script.task, script.task_file, script.allow_test_tasks)
    else:
        train, test = script.dataset_train_split, script.dataset_test_split
        splits = load_splits(script.dataset_name, None, train, script.dataset_config, script.dataset_streaming)
        data = RLVRData(splits[train], splits.get(test))
    return data if script.stop is None else replace(data, stop=tuple(script.stop))


def source_name(script: RLVRScriptArguments) -> str:
    """What the model card calls the data: a Hub id, or a file's name (not its path)."""
    published = HUB.get(script.task) if script.task_file is None else None
    return published or public_name(script.task_file or script.task or script.dataset_name)


def build_trainer(script: RLVRScriptArguments, args: GRPOConfig, model_args: ModelConfig) -> GRPOTrainer:
    """Builds the trainer that the arguments describe."""
    args.model_init_kwargs = model_flags(model_args) | model_options(args.model_init_kwargs)
    reward_funcs = [REWARDS.get(name) or load_reward_funcs([name])[0] for name in script.reward_funcs]
    return build_grpo_trainer(
        model_args.model_name_or_path, args, load_data(script), reward_funcs, peft_config=get_peft_config(model_args),
        think=script.think, think_cost=script.think_cost, allow_test_tasks=script.allow_test_tasks,
    )  # fmt: skip


def run(trainer: GRPOTrainer, source: str, resume: bool | str | None) -> None:
    """Trains, saves, writes the card, pushes."""
    args, print_once, begin = trainer.args, trainer.accelerator.print, time.monotonic()
    trained = trainer.train(resume_from_checkpoint=resume)
    trainer.save_metrics("train", trained.metrics | {PEAK_MEMORY: peak_memory()})
    trainer.save_model(args.output_dir)
    trainer.save_state()
    trainer.create_model_card(dataset_name=source)
    following = f"{called()} evaluate {shlex.quote(args.output_dir)} --task humaneval  # pass@k of what was trained"
    end_in_words(trainer, RLVR, time.monotonic() - begin, following)
    if trainer.is_world_process_zero() and (read_settings(args.output_dir) or {}).get("abstraction_head"):
        print_once("The abstraction head is not taken along: it reads states of the weights as they were before.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=source)
    trainer.accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 rlvr`; see `ra3 rlvr --help`. Returns the exit code."""
    argv = normalise(list(sys.argv[1:] if argv is None else argv))
    parts, typed, code = read_arguments(make_parser(), argv)
    if code is not None:
        return code
    script, args, model_args = parts
    named(model_args, args, "RLVR")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    quiet_others()
    resume = resume_point(args)
    with ExitStack() as stack:
        if any(REWARDS.get(name) in EXECUTED for name in script.reward_funcs):
            use_judge(stack.enter_context(open_judge(Limits(script.timeout, script.memory_mb), script.slots)))
            stack.callback(use_judge, None)
        trainer = build_trainer(script, args, model_args)
        return run_until_stopped(trainer, args, typed, lambda: run(trainer, source_name(script), resume))


if __name__ == "__main__":
    from .main import guarded

    raise SystemExit(guarded(main, sys.argv[1:]))
