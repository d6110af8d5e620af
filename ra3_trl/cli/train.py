"""`ra3 train`: `RA3MidTrainer` from the command line, with TRL's script, config and model arguments."""

from __future__ import annotations

import logging
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..config import RA3Config
from ..config_fields import model_options, own_fields
from ..experimental.hindsight import HindsightConfig, HindsightTrainer
from ..models import load_tokenizer
from ..report.estimate import render
from ..report.runs import MIDTRAINING, PEAK_MEMORY
from ..report.summary import evaluation_after, measured_after, peak_memory
from ..trackers import check_trackers
from ..trainer import RA3MidTrainer
from .data import STANDARD_LIBRARY, hold_out, limit, load_mixture, load_splits
from .devices import DEVICES, OPTIONS, choose_device
from .estimate import estimate, estimate_cost
from .launch import asked_processes, read_arguments
from .main import called
from .parser import TrainParser, normalise, read_config, without_theirs
from .rewards import load_reward_funcs
from .run import (
    end_in_words,
    model_flags,
    named,
    quiet_others,
    resume_command,
    resume_point,
    run_until_stopped,
)


def _option(text: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RA3ScriptArguments(ScriptArguments):
    """
    [`~trl.ScriptArguments`] with a folder of code as a source, documents held out, reward functions and a dry run.

    Raises:
        `ValueError`: for a bad value.
    """

    code_dir: str | None = _option(
        "Folder of .py files whose functions and classes are the documents. With neither `code_dir` nor "
        "`dataset_name` it is the standard library of the running Python."
    )
    max_documents: int | None = _option("The first so many documents only, held-out ones among them.")
    eval_documents: int | None = _option(
        "Documents to hold out of the training data, or to take from the test split where there is one (0: none). "
        "Default: one in twenty, at most 64."
    )
    eval_fraction: float | None = _option("Share of the documents to hold out.")
    reward_funcs: list[str] | None = _option(
        "Import paths of reward functions, such as my_module.my_func; weigh them with reward_weights."
    )
    dry_run: bool = _option("Print documents, boundaries, branches, tokens, memory and hours, and end.", False)
    device: str | None = _option(f"{OPTIONS['device']}. One of {', '.join(DEVICES)}.")
    devices: int | None = _option(OPTIONS["devices"])
    price_per_hour: float | None = _option(OPTIONS["price_per_hour"])

    def __post_init__(self):
        choose_device(self.device, self.devices, self.price_per_hour, self.dry_run)
        if self.eval_documents is not None and self.eval_fraction is not None:
            raise ValueError("`eval_documents` and `eval_fraction` are both set; pass one of the two.")
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"`max_documents` is {self.max_documents}; it must be at least 1.")
        if self.eval_documents is not None and self.eval_documents < 0:
            raise ValueError(f"`eval_documents` is {self.eval_documents}; it must be at least 0.")
        if self.eval_fraction is not None and not 0 <= self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` is {self.eval_fraction}; it must be at least 0 and below 1.")


def make_parser(prog: str = "ra3 train") -> TrainParser:
    """Makes the parser of script, config, model and mixture arguments."""
    types = (RA3ScriptArguments, HindsightConfig, ModelConfig, DatasetMixtureConfig)
    parser = TrainParser(
        types, prog=prog, allow_abbrev=False, description="Mid-trains a causal language model with RA3.",
        usage=f"{prog} --model_name_or_path MODEL [--dataset_name NAME | --code_dir FOLDER] [--output_dir DIR] "
        "[OPTION ...]",
    )  # fmt: skip
    parser.set_defaults(eval_on_start=True)  # the base, where documents are held out: what else says what has changed?
    return parser


def load_data(script: RA3ScriptArguments, mixture: DatasetMixtureConfig, seed: int) -> tuple[Any, Any]:
    """Loads training and evaluation data; the latter may be `None`."""
    if mixture.datasets:
        for name in ("dataset_name", "code_dir"):
            if vars(script)[name]:
                raise ValueError(f"`datasets` and `{name}` {vars(script)[name]!r} are both set; pass one of the two.")
        splits = load_mixture(mixture, seed)
        train, test = splits["train"], splits.get("test")
    else:
        source, split = (script.dataset_name, script.code_dir), script.dataset_train_split
        splits = load_splits(*source, split, script.dataset_config, script.dataset_streaming)
        train, test = splits[split], splits.get(script.dataset_test_split)
    if script.max_documents is not None:
        train = limit(train, script.max_documents)
    if test is None or script.eval_fraction is not None:
        return hold_out(train, script.eval_documents, script.eval_fraction, seed)
    return train, limit(test, script.eval_documents)


def source_name(script: RA3ScriptArguments, mixture: DatasetMixtureConfig) -> str:
    """Names the data for the model card: Hub ids, the name of a local folder or file (not its path)."""
    names = [script.dataset_name or script.code_dir or STANDARD_LIBRARY]
    if mixture.datasets:
        names = [name for source in mixture.datasets for name in _files(source.data_files) or [source.path]]
    return ", ".join(Path(name).resolve().name if Path(name).exists() else name for name in names)


def _files(data_files: str | list[str] | dict[str, str] | None) -> list[str]:
    """`data_files` of `load_dataset` as a list."""
    if isinstance(data_files, dict):
        return [name for value in data_files.values() for name in _files(value)]
    return [data_files] if isinstance(data_files, str) else list(data_files or [])


def build_trainer(
    script: RA3ScriptArguments, args: HindsightConfig, model_args: ModelConfig, mixture: DatasetMixtureConfig
) -> RA3MidTrainer:
    """Builds the trainer that the arguments describe: the experimental one only for proposals in hindsight."""
    reward_funcs = load_reward_funcs(script.reward_funcs)
    args.model_init_kwargs = model_flags(model_args) | model_options(args.model_init_kwargs)
    if args.trust_remote_code:
        args.model_init_kwargs = {"trust_remote_code": True} | args.model_init_kwargs
    tokenizer = load_tokenizer(model_args.model_name_or_path, args.model_init_kwargs)  # before the data
    train, evaluation = load_data(script, mixture, args.seed)
    plain = set(args.proposal_shares) == {"causal"}
    return (RA3MidTrainer if plain else HindsightTrainer)(
        model_args.model_name_or_path,
        _plain(args) if plain else args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        reward_funcs=reward_funcs,
    )


def _plain(args: HindsightConfig) -> RA3Config:
    """The settings without the experimental ones."""
    # Not by the constructor, which would derive a second time what `TrainingArguments` has derived.
    plain, experimental = RA3Config.__new__(RA3Config), set(own_fields(HindsightConfig)) - set(own_fields(RA3Config))
    vars(plain).update({name: value for name, value in vars(args).items() if name not in experimental})
    return plain


def run(trainer: RA3MidTrainer, dataset_name: str, resume: bool | str | None, file: str = "FILE.py") -> None:
    """Trains, evaluates what was not evaluated yet, saves, writes the card, says what changed, pushes.

    Args:
        file (`str`, *optional*, defaults to `"FILE.py"`):
            A program that the command to go on with shows.
    """
    args, begin = trainer.args, time.monotonic()
    trainer.table.following = None  # the words of the end are said here, of all processes and with what was saved
    args.eval_on_start &= trainer.eval_dataset is not None and not resume  # the base is no checkpoint to resume from
    trained = trainer.train(resume_from_checkpoint=resume)
    if trainer.eval_dataset is not None:
        ended = measured_after(trainer.state, args.load_best_model_at_end)
        metrics = evaluation_after(trainer.state, ended) or trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    trainer.save_metrics("train", trained.metrics | {PEAK_MEMORY: peak_memory()})
    trainer.save_model(args.output_dir)
    trainer.save_state()
    trainer.create_model_card(dataset_name=dataset_name)
    output = shlex.quote(args.output_dir)
    following = f"{called()} show {output} {shlex.quote(file)} --html page.html  # its thoughts on a file, as a page"
    end_in_words(trainer, MIDTRAINING, time.monotonic() - begin, following)
    if args.push_to_hub:
        pushed = trainer.push_to_hub(dataset_name=dataset_name)
        if pushed is not None:  # None on other processes
            print(f"Pushed to {pushed.repo_url}.")
    trainer.accelerator.end_training()


def _dry_run(parts: list[Any], processes: int) -> int:
    """Prints the estimate of a run in so many processes. Its folder is not made and nothing leaves the machine."""
    script, args, model_args, mixture = parts
    check_trackers(args.report_to)  # as the run would
    args.push_to_hub, args.report_to = False, []
    with tempfile.TemporaryDirectory() as aside:
        args.output_dir = aside
        trainer = build_trainer(script, args, model_args, mixture)
        print("Timing an update of each phase and an evaluation on a few documents ...", file=sys.stderr)
        estimated = estimate(trainer, processes)
        print(render(estimated))
        asked = choose_device(script.device, script.devices, script.price_per_hour, True)
        if asked is not None:
            print(estimate_cost(trainer, estimated, *asked).render())
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
    quiet_others()
    if script.dry_run:
        return _dry_run(parts, asked_processes(make_parser(), without_theirs(argv, make_parser())))
    resume = resume_point(args)
    trainer = build_trainer(script, args, model_args, mixture)
    trainer.resume_hint = f"`{resume_command(typed)}`"  # for the message after a SIGTERM
    source, file = source_name(script, mixture), _some_program(script.code_dir)
    return run_until_stopped(trainer, args, typed, lambda: run(trainer, source, resume, file))


def _some_program(code_dir: str | None) -> str:
    """A file to look at after the run: the first of the user's, if they are files."""
    return str(next(iter(sorted(Path(code_dir).rglob("*.py"))), "FILE.py")) if code_dir else "FILE.py"


if __name__ == "__main__":
    from .main import guarded

    raise SystemExit(guarded(main, sys.argv[1:]))
