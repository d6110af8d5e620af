"""What is wrong with the words of a command, said before torch is imported: unknown options, values of another type,
what is missing or not there. Whatever is in doubt is left to the command."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ..kinds import check_bounds
from ..refusals import SETTINGS, find, near
from .devices import choose_device
from .option_groups import RA3_FIELDS
from .options import ANNOTATE, CROSS_ENTROPY, DIAGNOSE, HINDSIGHT_FIELDS, PARSERS, PLAY, PROPOSALS, SHOW
from .sources import PACKAGE, SourceField, path_of, read_fields
from .values import check_value, check_word, is_scalar, without_none


# Where the fields of a trainer's options stand: package, file, class. Ours are of this package.
_OWN_TRAINING = (
    ("", "cli/train.py", "RA3ScriptArguments"), ("", "config.py", "RA3Config"),
    ("", "versions.py", "TrainingArguments"), ("", "experimental/hindsight/config.py", "HindsightConfig"),
)  # fmt: skip
_THEIRS = (
    ("transformers", "training_args.py", "TrainingArguments"), ("trl", "scripts/utils.py", "ScriptArguments"),
    ("trl", "trainer/model_config.py", "ModelConfig"),
)  # fmt: skip
_TRAINERS = {
    "train": (*_OWN_TRAINING, *_THEIRS, ("trl", "scripts/utils.py", "DatasetMixtureConfig")),
    "rlvr": (
        ("", "cli/rlvr.py", "RLVRScriptArguments"), *_THEIRS, ("trl", "trainer/grpo_config.py", "GRPOConfig"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
    ),
}  # fmt: skip
# What a command has of the settings of `RA3Config` and of hindsight.
_SETTINGS = {
    "annotate": (*ANNOTATE, *PROPOSALS), "show": SHOW, "play": PLAY, "diagnose": DIAGNOSE, "compare": CROSS_ENTROPY,
}  # fmt: skip
_TASKS = ("humaneval", "mbpp")
_FILES = (".json", ".jsonl", ".jsonl.gz", ".csv", ".parquet")


def refuse_early(command: str, argv: list[str]) -> None:
    """Ends the process, as argparse does, or raises where the words of a command can't be meant.

    Raises:
        `ValueError`: as the command would, naming option, value and cure.
    """
    if command in PARSERS:
        options = PARSERS[command]().parse_args(argv)
        if command in CHECKS:
            CHECKS[command](options)
        for name in ("checkpoint", "model_name_or_path"):
            _check_checkpoint(getattr(options, name, None), name)
        _check_corpus(getattr(options, "dataset_name", None), getattr(options, "code_dir", None))
        for name in _SETTINGS.get(command, ()):
            field = {**RA3_FIELDS, **HINDSIGHT_FIELDS}.get(name)
            if field is not None and vars(options)[name] not in (None, "none"):
                check_value(field, vars(options)[name])
    elif command in _TRAINERS and "--accelerate_config" not in argv:
        _refuse_of_trainer(command, argv)


def check_shown(options: Namespace) -> None:
    """Refuses a file that is not there, and lines that are none."""
    if not Path(options.file).is_file():
        raise ValueError(f"`file` is {options.file!r}, which is not there; give a text file.")
    read_lines(options.lines)


def read_lines(value: str | None, count: int | None = None) -> range:
    """Reads `"A:B"`, of which either may be left out, as a range of the lines 1 to `count`, if that is known.

    Example: `read_lines("3:", 5) == range(3, 6)`.
    """
    match = re.fullmatch(r"(\d*):(\d*)|(\d+)", value or ":", re.ASCII)
    most = sys.maxsize if count is None else count
    first, last = (int(match[3] or match[1] or 1), min(int(match[3] or match[2] or most), most)) if match else (0, 0)
    if match is None or (count is None and not 1 <= first <= last):
        raise ValueError(f"`lines` is {value!r}; write it as A:B, such as 10:40.")
    if not 1 <= first <= last:
        raise ValueError(f"`lines` is {value!r}, but the file has the lines 1:{count}.")
    return range(first, last + 1)


def check_output(options: Namespace) -> None:
    """Refuses what `ra3 annotate` can't write."""
    choose_device(options.device, options.devices, options.price_per_hour, options.dry_run)
    if not (options.output_dir or options.push_to_hub or options.dry_run):
        raise ValueError("neither `output_dir` nor `push_to_hub` is set; say where the annotated dataset goes.")
    for name in ("max_documents", "shard_rows"):
        if vars(options)[name] is not None:
            check_bounds(name, vars(options)[name], 1)


def check_source(options: Namespace) -> None:
    """Refuses `ra3 evaluate` without, or with more than, one source of samples."""
    checkpoint, samples = options.checkpoint, options.samples
    if (checkpoint is None) == (samples is None):
        raise ValueError(
            f"`checkpoint` is {checkpoint!r} and `samples` {samples!r}; give one of the two, a checkpoint to "
            "draw from or a file of samples."
        )
    read_ks(options.k)
    _check_tasks(options)


def check_places(options: Namespace) -> None:
    """Refuses what `ra3 compare` can't set side by side."""
    places, names = options.places, options.names
    if len(places) < 2:
        raise ValueError(f"{places[0]!r} is all there is to compare; give two or more.")
    if names is not None and len(names) != len(places):
        raise ValueError(f"`names` has {len(names)} names for {len(places)} checkpoints; give each one.")
    twice = next((name for i, name in enumerate(names or []) if name in names[:i]), None)
    if twice is not None:
        raise ValueError(f"two are called {twice!r}; tell them apart by `--names`.")
    for place in places:
        _check_checkpoint(place)
    if options.k is not None:
        read_ks(options.k)
    _check_tasks(options)


def read_ks(text: str) -> list[int]:
    """`"5,1,5"` as `[1, 5]`."""
    try:
        return sorted({int(number) for number in text.split(",")})
    except ValueError as error:
        raise ValueError(f"`k` is {text!r}; give numbers with commas, such as 1,5.") from error


def check_runs(options: Namespace) -> None:
    """Refuses runs that are not there."""
    for run in options.runs:
        label, _, path = run.partition("=")
        place = run if not path or not label or Path(run).exists() else path
        if not Path(place).exists():
            raise ValueError(
                f"`run` {place!r} is not there; give the folder of a run of `ra3 train` or `ra3 rlvr`, or a corpus of "
                "`ra3 annotate`."
            )


def _check_tasks(options: Namespace) -> None:
    """Refuses a file of problems that is not there; other names are for the command."""
    task = options.task
    if task is not None and task.endswith(_FILES) and not Path(task).expanduser().exists():
        raise ValueError(f"`task` is {task!r}, a file that is not there; give {', '.join(_TASKS)} or a jsonl file.")


def _check_checkpoint(name: str | None, option: str = "checkpoint") -> None:
    """Refuses a path that is not there. `org/name` may be on the Hub."""
    if name is None or Path(name).expanduser().exists():
        return
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or name.endswith("/"):
        raise ValueError(f"`{option}` is {name!r}, a folder that is not there; give one with a model, or a Hub id.")


def check_page(options: Namespace) -> None:
    """Refuses, by a `ValueError`, what needs no checkpoint to be seen wrong."""
    if options.port is not None and not 1 <= options.port <= 65535:
        raise ValueError(f"`port` is {options.port}; use a number from 1 to 65,535, or leave it out.")
    if options.push_to_space is None:
        for name in ("private", "requirement"):
            if vars(options)[name]:
                raise ValueError(
                    f"`{name}` is {vars(options)[name]!r} without a Space; set `--push_to_space ORG/NAME`."
                )
        if find_spec("gradio") is None:
            raise ValueError(
                "`ra3 play` needs gradio, which is not installed; `pip install 'ra3-trl[play]'`, or look at a file by "
                "`ra3 show`."
            )


def check_config(command: str, argv: list[str]) -> None:
    """Refuses a file of options that is not there.

    Raises:
        `ValueError`: with its name.
    """
    names = [following for word, following in zip(argv, argv[1:], strict=False) if word == "--config"]
    names += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    if command in _TRAINERS and names and not Path(names[-1]).is_file():
        raise ValueError(f"`config` is {names[-1]!r}, which is not there; give a YAML file of options.")


def trainer_fields(command: str) -> dict[str, SourceField] | None:
    """Fields of a trainer's options by name, `None` where the installed libraries keep them elsewhere."""
    fields: dict[str, SourceField] = {}
    for package, file, cls in reversed(_TRAINERS[command]):
        path = path_of(package, file) if package else PACKAGE / file
        if path is None:
            return None
        fields |= read_fields(path, cls)
    return fields


def _refuse_of_trainer(command: str, argv: list[str]) -> None:
    """Looks at each option and the word behind it; lists and mappings are left to the command."""
    fields = trainer_fields(command)
    if fields is None or "learning_rate" not in fields:  # the libraries have changed: the command itself will tell
        return
    known = {*fields, "config", "accelerate_config", "help"} | {f"no_{name}" for name in fields}
    words: dict[str, str | None] = {}
    for word, following in zip(argv, [*argv[1:], None], strict=True):
        if not word.startswith("--"):
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        words[name] = value if equals else following
        if name not in known and find(SETTINGS, name) is None:
            hint = near(name, fields, "`--{}`") or f"see `ra3 {command} --help`."
            raise ValueError(f"`{word}` is no option of `ra3 {command}`; {hint}")
        if name in fields:
            check_word(command, fields[name], words[name])
    _refuse_strays(command, argv, fields)
    if command == "train":
        _check_device(words)
    if "config" in words:  # which may say the rest
        return
    if "model_name_or_path" not in words:
        raise ValueError("`model_name_or_path` is missing; name a folder or a model on the Hub.")
    _check_checkpoint(words["model_name_or_path"], "model_name_or_path")
    if command == "rlvr" and not {"task", "dataset_name"} & set(words):
        raise ValueError("`task` is None and `dataset_name` None; pass one of the two as the data.")
    if "datasets" not in words:
        _check_corpus(words.get("dataset_name"), words.get("code_dir"))


def _refuse_strays(command: str, argv: list[str], fields: dict[str, SourceField]) -> None:
    """Refuses a word that belongs to no option: the first one, or one behind an option and its only value."""
    for i, word in enumerate(argv):
        option = argv[i - 2].removeprefix("--").replace("-", "_") if i > 1 and argv[i - 2].startswith("--") else None
        behind_value = option in fields and is_scalar(fields[option]) and not argv[i - 1].startswith("-")
        if not word.startswith("-") and (i == 0 or behind_value):
            raise ValueError(f"unrecognized arguments: {word} (see `ra3 {command} --help`)")


def _check_device(words: dict[str, str | None]) -> None:
    """Checks what an estimate is asked for; `--config` may name the device, or say `dry_run`."""
    name, devices, price = (without_none(words.get(n)) for n in ("device", "devices", "price_per_hour"))
    dry = str(words.get("dry_run", "false")).lower() not in ("false", "no", "0")
    if "config" in words:
        name, dry = name or "h100", True
    choose_device(name, int(devices) if devices else None, float(price) if price else None, dry)


def _check_corpus(dataset_name: str | None, code_dir: str | None) -> None:
    """Refuses a file or folder that is not there; that both are set is worse, and left to the command."""
    if dataset_name is not None:
        if code_dir is None and dataset_name.endswith(_FILES) and not Path(dataset_name).expanduser().exists():
            raise ValueError(f"`dataset_name` is {dataset_name!r}, but there is no such file.")
    elif code_dir is not None and not Path(code_dir).is_dir():
        raise ValueError(f"`code_dir` is {code_dir!r}, which is not a folder; pass a folder of .py files.")


CHECKS: dict[str, Callable[[Namespace], None]] = {
    "annotate": check_output, "compare": check_places, "evaluate": check_source, "play": check_page,
    "report": check_runs, "show": check_shown,
}  # fmt: skip
