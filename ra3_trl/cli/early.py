"""What is wrong with the words of a command, said before torch is imported: unknown options, values of another type,
what is missing or not there. Whatever is in doubt is left to the command."""

from __future__ import annotations

from pathlib import Path

from ..refusals import SETTINGS, find, near
from .devices import choose_device
from .options import PARSERS
from .sources import PACKAGE, SourceField, path_of, read_fields


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
_KINDS = {"int": int, "float": float, "int | None": int, "float | None": float}


def refuse_early(command: str, argv: list[str]) -> None:
    """Ends the process, as argparse does, or raises where the words of a command can't be meant.

    Raises:
        `ValueError`: as the command would, naming option, value and cure.
    """
    if command in PARSERS:
        options = PARSERS[command]().parse_args(argv)
        if getattr(options, "file", None) is not None and not Path(options.file).is_file():
            raise ValueError(f"`file` is {options.file!r}, which is not there; give a text file.")
        if not getattr(options, "dataset_name", None):  # that both are set is worse
            _check_folder(getattr(options, "code_dir", None))
        if command == "annotate":
            choose_device(options.device, options.devices, options.price_per_hour, options.dry_run)
    elif command in _TRAINERS and "--accelerate_config" not in argv:
        _refuse_of_trainer(command, argv)


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
        kind = _KINDS.get(fields[name].hint) if name in fields else None
        if kind is not None and words[name] is not None:
            _check_number(command, name, str(words[name]), kind)
    if command == "train":
        _check_device(words)
    if "config" in words:  # which may say the rest
        return
    if "model_name_or_path" not in words:
        raise ValueError("`model_name_or_path` is missing; name a folder or a model on the Hub.")
    if not {"dataset_name", "datasets"} & set(words):  # that both are set is worse
        _check_folder(words.get("code_dir"))


def _check_device(words: dict[str, str | None]) -> None:
    """Checks what an estimate is asked for; `--config` may name the device, or say `dry_run`."""
    name, devices, price = (_unless_none(words.get(n)) for n in ("device", "devices", "price_per_hour"))
    dry = str(words.get("dry_run", "false")).lower() not in ("false", "no", "0")
    if "config" in words:
        name, dry = name or "h100", True
    choose_device(name, int(devices) if devices else None, float(price) if price else None, dry)


def _unless_none(word: str | None) -> str | None:
    return None if word is None or word.lower() in ("none", "null") else word


def _check_number(command: str, name: str, word: str, kind: type) -> None:
    if _unless_none(word) is None:
        return
    try:
        kind(word)
    except ValueError:
        raise ValueError(
            f"argument --{name}: invalid {kind.__name__} value: {word!r} (see `ra3 {command} --help`)"
        ) from None


def _check_folder(code_dir: str | None) -> None:
    if code_dir is not None and not Path(code_dir).is_dir():
        raise ValueError(f"`code_dir` is {code_dir!r}, which is not a folder; pass a folder of .py files.")
