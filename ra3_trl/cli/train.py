"""`ra3 train`: `RA3MidTrainer` from the command line, with TRL's script, config and model arguments."""

from __future__ import annotations

import logging
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..config import RA3Config
from ..config_fields import model_options, own_fields
from ..experimental.hindsight import HindsightConfig, HindsightTrainer
from ..models import load_tokenizer
from ..report.cost import DEVICES
from ..report.estimate import render
from ..trackers import check_trackers
from ..trainer import RA3MidTrainer
from .data import STANDARD_LIBRARY, hold_out, limit, load_mixture, load_splits
from .estimate import estimate, estimate_cost
from .launch import read_arguments
from .parser import TrainParser, normalise, read_config
from .rewards import load_reward_funcs
from .run import model_flags, named, resume_command, resume_point, run_until_stopped


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
    eval_documents: int | None = _option(
        "Documents to hold out of the training data, or to take from the test split where there is one (0: none). "
        "Default: one in twenty, at most 64."
    )
    eval_fraction: float | None = _option("Share of the documents to hold out.")
    reward_funcs: list[str] | None = _option(
        "Import paths of reward functions, such as my_module.my_func; weigh them with reward_weights."
    )
    dry_run: bool = _option("Print documents, boundaries, branches, tokens, memory and hours, and end.", False)
    device: Literal["a100", "l40s", "h100", "h200", "b200"] | None = _option(
        "With `dry_run`: what the run would take on such devices, FLOPs, hours and money, by arithmetic."
    )
    devices: int = _option("How many of them.", 1)
    price_per_hour: float | None = _option("Dollars for one of them and an hour. Default: what is usual, printed.")

    def __post_init__(self):
        if self.eval_documents is not None and self.eval_fraction is not None:
            raise ValueError("`eval_documents` and `eval_fraction` are both set; pass one of the two.")
        if self.device is None and (self.devices != 1 or self.price_per_hour is not None):
            raise ValueError("`devices` and `price_per_hour` are of use with `device`; name one, such as h100.")
        if self.device is not None and not self.dry_run:
            raise ValueError(f"`device` is {self.device!r}, for which a run is estimated; set `dry_run` too.")
        if self.devices < 1:
            raise ValueError(f"`devices` is {self.devices}; use at least 1.")
        if self.price_per_hour is not None and not self.price_per_hour >= 0:
            raise ValueError(f"`price_per_hour` is {self.price_per_hour}; use at least 0.")
        if self.eval_documents is not None and self.eval_documents < 0:
            raise ValueError(f"`eval_documents` is {self.eval_documents}; it must be at least 0.")
        if self.eval_fraction is not None and not 0 <= self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` is {self.eval_fraction}; it must be at least 0 and below 1.")


def make_parser(prog: str = "ra3 train") -> TrainParser:
    """Makes the parser of script, config, model and mixture arguments."""
    types = (RA3ScriptArguments, HindsightConfig, ModelConfig, DatasetMixtureConfig)
    return TrainParser(
        types, prog=prog, allow_abbrev=False, description="Mid-trains a causal language model with RA3.",
        usage=f"{prog} --model_name_or_path MODEL [--dataset_name NAME | --code_dir FOLDER] [--output_dir DIR] "
        "[OPTION ...]",
    )  # fmt: skip


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
    trainer.accelerator.end_training()


def _dry_run(script, args: HindsightConfig, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> int:
    """Prints the estimate. The run's folder is not made and nothing leaves the machine."""
    check_trackers(args.report_to)  # as the run would
    args.push_to_hub, args.report_to = False, []
    with tempfile.TemporaryDirectory() as aside:
        args.output_dir = aside
        trainer = build_trainer(script, args, model_args, mixture)
        print("Timing an E-update and an M-update ...", file=sys.stderr)
        estimated = estimate(trainer)
        print(render(estimated))
        if script.device is not None:
            device = DEVICES[script.device]
            if script.price_per_hour is not None:
                device = replace(device, price=script.price_per_hour)
            print(estimate_cost(trainer, estimated, device, script.devices).render())
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
