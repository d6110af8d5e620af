"""The parser of `ra3 train` and `ra3 rlvr`: TRL's, with short errors, help in sections, and unknown options refused by
name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import TrlParser

from .values import is_list, is_mapping, read_value, takes_none


_FILES = """--config FILE is a YAML file of the options below (`max_steps: 8`), which options on the command line
override; its `env:` section sets environment variables. A mapping is written as JSON ('{"key": 1}'; in YAML as such),
a list as several words or JSON, and `none` is None. --accelerate_config FILE_OR_NAME runs the command through
`accelerate launch` with a YAML file of `accelerate config` (there are some in examples/accelerate_configs), or one
that trl brings along: single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2, zero3; further options of `accelerate launch`
(--num_processes 2) go there."""


class TrainParser(TrlParser):
    """[`~trl.TrlParser`] whose errors do not repeat two hundred options, and which reads lists and mappings as JSON
    or YAML, see `values.py`. Of the types the first is the script's, the second the trainer's configuration."""

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, **kwargs)
        hints = {name: hint for dtype in self.dataclass_types for name, hint in get_type_hints(dtype).items()}
        self._hints = {name: hints[name] for name in self.option_names()}
        for action in self._actions:
            hint = self._hints.get(action.dest)
            if is_list(hint):
                action.type, action.nargs = str, "+"
            elif is_mapping(hint):
                action.type = str
            elif takes_none(hint) and action.type is not None:
                action.type = _or_none(action.type)
                action.choices = [*action.choices, "none"] if action.choices else None

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        for name, hint in self._hints.items():
            setattr(namespace, name, read_value(name, hint, vars(namespace)[name]))
        return namespace, unknown

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")

    def option_names(self) -> set[str]:
        """Names of all options, as fields."""
        return {field.name for dtype in self.dataclass_types for field in fields(dtype) if field.init}

    def set_defaults_with_config(self, **config) -> list[str]:
        """As in TRL, but numbers are read as on the command line, so that 2.5 latents are refused. YAML reads a bare
        `no` as false; where `no` is a choice, that is meant."""
        choices = {action.dest: action.choices or () for action in self._actions}
        for name, value in config.items():
            if value is False and "no" in choices.get(name, ()):
                config[name] = "no"
            elif isinstance(value, (bool, int, float)):
                config[name] = str(value)
        return super().set_defaults_with_config(**config)

    def format_help(self) -> str:
        """The options of script and trainer before the many of `TrainingArguments`."""
        inherited = {field.name for field in fields(TrainingArguments)} - {
            "learning_rate",
            "logging_steps",
            "output_dir",
        }
        config = self.dataclass_types[1]
        own = {field.name for field in fields(config)} - inherited
        script = {field.name for field in fields(self.dataclass_types[0])}
        sections: dict[str, list] = {
            "Script": [], config.__name__: [], "Model and data mixture": [], "transformers.TrainingArguments": [],
        }  # fmt: skip
        for action in self._actions:
            if action.dest in script or action.dest == "help":
                sections["Script"].append(action)
            elif action.dest in own:
                sections[config.__name__].append(action)
            elif action.dest in inherited:
                sections["transformers.TrainingArguments"].append(action)
            else:
                sections["Model and data mixture"].append(action)
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        formatter.add_text(_FILES)
        for title, actions in sections.items():
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        return formatter.format_help()


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """`convert`, but `none` and `null` pass, to be read by `read_value`."""

    def read(text: str) -> Any:
        return text if text.lower() in ("none", "null") else convert(text)

    read.__name__ = convert.__name__  # argparse's messages name the type
    return read


def normalise(argv: list[str]) -> list[str]:
    """`--config=x` and `--accelerate_config=x` as two arguments each, the form that TRL looks for.

    Raises:
        `ValueError`: if one of the two stands without a value.
    """
    out: list[str] = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        two = equals and name in ("--config", "--accelerate_config")
        out += [name, value] if two else [argument]
    for name in ("--config", "--accelerate_config"):
        if name in out and out.index(name) + 1 == len(out):
            raise ValueError(f"`{name}` stands without a value; name a YAML file.")
    return out


def read_config(argv: list[str]) -> dict[str, Any]:
    """The mapping in the file that `--config` names, `{}` without one.

    Raises:
        `ValueError`: if the file is no YAML mapping.
    """
    if "--config" not in argv:
        return {}
    path = Path(argv[argv.index("--config") + 1])
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`--config`: {path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"`--config`: {path} holds {type(config).__name__} and not a mapping of options to values.")
    return config


def refuse_unknown(unknown: list[str], parser: TrainParser) -> None:
    """Raises a `ValueError` that names the first unknown option and the one that was perhaps meant."""
    if not unknown:
        return
    option = next((word for word in unknown if word.startswith("-")), unknown[0])
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, parser.option_names(), 1)
    hint = f"did you mean `--{near[0]}`?" if near else f"see `{parser.prog} --help`."
    raise ValueError(f"`{option}` is no option of `{parser.prog}`; {hint}")
