"""The parser of `ra3 train` and `ra3 rlvr`: TRL's, with short errors, help in sections and unknown options refused by
name. Lists, mappings and `None` are read alike from a flag and from YAML: `--model_init_kwargs '{"subfolder": "x"}'`,
`--lora_target_modules q_proj v_proj` (or `'["q_proj", "v_proj"]'`), `--eval_documents none`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import string_to_bool
from trl import TrlParser

from ..config import RA3Config
from ..files import DAMAGE, is_a, one_line
from ..kinds import shown
from ..refusals import SETTINGS, find, keep_ours, near
from ..versions import TrainingArguments


_FILES = """--config FILE is a YAML file of the options below (`max_steps: 8`), which options on the command line
override; its `env:` section sets environment variables. A mapping is written as JSON ('{"key": 1}'; in YAML as such),
a list as several words or JSON, and `none` is None. --accelerate_config FILE_OR_NAME runs the command through
`accelerate launch` with a YAML file of `accelerate config` (there are some in examples/accelerate_configs), or one
that trl brings along: single_gpu, multi_gpu, fsdp1, fsdp2, zero1, zero2, zero3; further options of `accelerate launch`
(--num_processes 2) go there."""
_FILE_OPTIONS = ("--config", "--accelerate_config")
_NONE = ("none", "null")
_FILE_OR_MAPPING = ("accelerator_config", "deepspeed", "fsdp_config")
_MOST_VALUES = 100_000  # in a YAML file
_NONE_IS_A_WORD = "report_to"  # `none` is no tracker there, and `None` all that are installed


class TrainParser(TrlParser):
    """[`~trl.TrlParser`] of types of which the first is the script's, the second the trainer's configuration."""

    in_file: tuple[str, Mapping[str, Any]] = ("", {})  # of `--config`: its path and the options in it

    def __init__(self, dataclass_types, **kwargs):
        super().__init__(dataclass_types, **kwargs)
        hints = {name: hint for dtype in self.dataclass_types for name, hint in get_type_hints(dtype).items()}
        self._hints = {name: hints[name] for name in self.option_names()}
        # TRL reads lists of words only, no mappings, and `none` for numbers only: the rest is let through as text.
        for action in self._actions:
            hint = self._hints.get(action.dest)
            if may_be(hint, list):
                action.type, action.nargs = str, "+"
            elif may_be(hint, dict):
                action.type = str
            elif may_be(hint, NoneType) and action.choices:
                action.choices = [*action.choices, "none"]
            elif hint == bool | None and action.type is not None:  # `--no_x` reads nothing
                action.type = _read_bool

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        for name, hint in self._hints.items():
            setattr(namespace, name, read_value(name, hint, vars(namespace)[name]))
        return namespace, unknown

    def error(self, message: str) -> None:
        self.exit(2, f"error: {one_line(self.with_file(message), 2000)} (see `{self.prog} --help`)\n")

    def with_file(self, message: str) -> str:
        """The message, with the name of the file that `--config` names where it is about an option of that file."""
        path, options = self.in_file
        about = any(re.search(rf"(?:`|--|argument ){re.escape(name)}(?!\w)", message) for name in options if name)
        return f"`--config` {path}: {message}" if about else message

    @contextmanager
    def naming_its_file(self) -> Iterator[None]:
        """Names the file of options, where what is parsed inside can't be used because of it.

        Raises:
            `ValueError`: in the place of whatever a value of another type makes the parser raise.
        """
        try:
            yield
        except DAMAGE as error:
            path, options = self.in_file
            if not options:
                raise
            if isinstance(error, ValueError):
                raise ValueError(self.with_file(str(error))) from error
            raise ValueError(f"`--config`: {path} has a value of another type ({one_line(error)}).") from error

    def option_names(self) -> set[str]:
        """Names of all options, as fields."""
        return {field.name for dtype in self.dataclass_types for field in fields(dtype) if field.init}

    @property
    def is_of_ra3(self) -> bool:
        """Whether the configuration is [`RA3Config`]; that of `ra3 rlvr` is TRL's."""
        return issubclass(self.dataclass_types[1], RA3Config)

    def is_theirs(self, name: str) -> bool:
        """Whether `name` is a setting that TRL has and RA3 has not, see `refusals.py`."""
        return self.is_of_ra3 and name not in self.option_names() and find(SETTINGS, name) is not None

    def set_defaults_with_config(self, **config) -> list[str]:
        """As in TRL, but numbers are read as on the command line, so that 2.5 latents are refused. YAML reads a bare
        `no` as false; where `no` is a choice, that is meant. What [`without_theirs`] lets pass needs no option."""
        config = {name: value for name, value in config.items() if not self.is_theirs(name)}
        choices = {action.dest: action.choices or () for action in self._actions}
        for name, value in config.items():
            if value is False and "no" in choices.get(name, ()):
                config[name] = "no"
            elif isinstance(value, (bool, int, float)):
                config[name] = str(value)
        return super().set_defaults_with_config(**config)

    def format_help(self) -> str:
        """The options of script and trainer before the many of `TrainingArguments`."""
        script, config, *others = ({field.name for field in fields(dtype)} for dtype in self.dataclass_types)
        looked_for = {"learning_rate", "logging_steps", "output_dir"}  # among the trainer's own
        inherited = {field.name for field in fields(TrainingArguments)} - looked_for
        sections = {
            "Script": script | {"help"},
            self.dataclass_types[1].__name__: config - inherited,
            "Model and data mixture": set().union(*others),
            "transformers.TrainingArguments": inherited,
        }
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        formatter.add_text(_FILES)
        for title, names in sections.items():
            formatter.start_section(title)
            formatter.add_arguments([action for action in self._actions if action.dest in names])
            formatter.end_section()
        return formatter.format_help()


def _union(hint: Any) -> tuple[Any, ...]:
    """Members of a type hint: `list[int] | None` -> `(list[int], NoneType)`; `list[int]` -> `(list[int],)`."""
    return (hint,) if get_origin(hint) in (list, dict) or not get_args(hint) else get_args(hint)


def may_be(hint: Any, kind: type) -> bool:
    """Whether a field of this type hint may hold a `list`, a `dict`, `NoneType`, ..."""
    return any(kind in (member, get_origin(member)) for member in _union(hint))


def read_value(name: str, hint: Any, value: Any) -> Any:
    """Converts what a flag or YAML gave for the field `name`; fields other than lists and mappings pass."""
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    if may_be(hint, NoneType) and name != _NONE_IS_A_WORD and isinstance(word, str) and word.lower() in _NONE:
        return None
    if may_be(hint, list):
        return _read_list(name, hint, value)
    if may_be(hint, dict):
        return _read_mapping(name, value)
    if Literal[False] in _union(hint) and str(value).lower() == "false":
        return False
    if isinstance(value, (list, dict)):
        raise ValueError(f"`{name}` is {value!r}; it takes a single value.")
    return value


def _read_mapping(name: str, value: Any) -> Any:
    if value is None or isinstance(value, dict):
        return value
    text = str(value)
    if name in _FILE_OR_MAPPING and not text.lstrip().startswith("{"):
        return text
    mapping = _read_json(name, text)
    if not isinstance(mapping, dict):
        raise ValueError(f"`{name}` is {text!r}; it takes a mapping, as JSON: '{{\"key\": value}}'.")
    return mapping


def _read_list(name: str, hint: Any, value: Any) -> Any:
    if value is None:
        return "none" if name == _NONE_IS_A_WORD else None
    words = value if isinstance(value, list) else [value]
    if len(words) == 1 and isinstance(words[0], str):
        if words[0].lstrip().startswith("["):
            words = _read_json(name, words[0])
        elif may_be(hint, str):
            return words[0]
    (kind,) = get_args(next(member for member in _union(hint) if get_origin(member) is list))
    return [_read_element(name, kind, word) for word in words]


def _read_element(name: str, kind: Any, element: Any) -> Any:
    if is_dataclass(kind):  # the configuration makes it of the mapping
        element = _read_json(name, element) if isinstance(element, str) else element
        keys = [field.name for field in fields(kind)]
        if not isinstance(element, dict) or not set(element) <= set(keys) or keys[0] not in element:
            raise ValueError(f"`{name}` holds {element!r}; each element is a mapping of {', '.join(keys)}.")
        return element
    try:
        return kind(element)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` holds {element!r}, which is no {kind.__name__}.") from error


def _read_json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` is {text!r}, which is not JSON: {error}.") from error


def _read_bool(text: str) -> bool | str:
    """As TRL reads it, but `none` and `null` pass, for `read_value`."""
    return text if text.lower() in _NONE else string_to_bool(text)


def normalise(argv: list[str]) -> list[str]:
    """Splits `--config=x` and `--accelerate_config=x` in two words, as TRL wants them; refuses them without `x`."""
    words: list[str] = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        words += [name, value] if equals and name in _FILE_OPTIONS else [argument]
    if words and words[-1] in _FILE_OPTIONS:
        raise ValueError(f"`{words[-1]}` stands without a value; name a YAML file.")
    return words


def read_config(argv: list[str]) -> dict[str, Any]:
    """Reads the mapping in the file that `--config` names, `{}` without one."""
    if "--config" not in argv:
        return {}
    words = argv[argv.index("--config") + 1 :]
    if not words:
        raise ValueError("`--config` has no value; give a YAML file.")
    path = Path(words[0])
    config = read_yaml(path, "--config")
    if not isinstance(config, dict):
        raise ValueError(f"`--config`: {path} holds {type(config).__name__} and not a mapping of options to values.")
    wrong = [key for key in config if not (isinstance(key, str) and re.fullmatch(r"[A-Za-z_][\w-]*", key))]
    if wrong:
        raise ValueError(f"`--config`: {path} has the option {wrong[0]!r}; options are names, such as `max_steps`.")
    env = config.get("env", {})
    names = all(re.fullmatch(r"[A-Za-z_]\w*", name) for name in env) if is_a(env, dict[str, Any]) else False
    if not names or not is_a(env, dict[str, str | int | float | bool]) or "\0" in str(env):
        raise ValueError(f"`--config`: `env` of {path} is {shown(env)}; give a mapping of names to texts.")
    return config


def read_yaml(path: Path, option: str) -> Any:
    """Reads the YAML file of an option.

    Raises:
        `ValueError`: for what is no YAML, or would be more than 100,000 values written out (an anchor of anchors).
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
        size = _size(content, {})
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"`{option}`: {path} is not YAML: {one_line(error)}; correct it.") from error
    if size > _MOST_VALUES:
        raise ValueError(f"`{option}`: {path} stands for {size:.0e} values; write fewer than {_MOST_VALUES}.")
    return content


def _size(content: Any, sizes: dict[int, float]) -> float:
    """How many values there are, written out; what an anchor stands for is counted as often as it is named."""
    if not isinstance(content, (dict, list)):
        return 1
    if id(content) not in sizes:
        sizes[id(content)] = float("inf")  # of what holds itself
        parts = content.values() if isinstance(content, dict) else content
        sizes[id(content)] = 1 + sum(_size(part, sizes) for part in parts)
    return sizes[id(content)]


def without_theirs(argv: list[str], parser: TrainParser) -> list[str]:
    """The words less those options of TRL's that RA3 has not, where their values say what it does anyway.

    Raises:
        `ValueError`: for another value, as in Python: with the reason and what to set instead.
    """
    if not parser.is_of_ra3:  # `ra3 rlvr` is TRL's own trainer
        if settings := read_config(argv):
            parser.in_file = argv[argv.index("--config") + 1], settings
        return argv
    settings, kept, name = read_config(argv), [], ""
    if settings:
        parser.in_file = argv[argv.index("--config") + 1], dict(settings)
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            settings[name] = value if equals else True
            settings |= {"packing": False} if name == "no_packing" else {}
        else:
            settings[name] = word
        kept += [] if parser.is_theirs(name) else [word]
    listed = {name: _plain(value) for name, value in settings.items() if name == "packing" or find(SETTINGS, name)}
    keep_ours(listed, parser.option_names(), parser.prog)
    return kept


def _plain(value: Any) -> Any:
    """What a word on the command line or in a YAML file stands for."""
    if not isinstance(value, str) or value[:1] in "{[%@`":
        return value
    return None if value.lower() in _NONE else yaml.safe_load(value)


def refuse_unknown(words: list[str], parser: TrainParser) -> None:
    """Names the first unknown option, if there is one, and what was perhaps meant."""
    if not words:
        return
    option = next((word for word in words if word.startswith("-")), words[0])
    name = option.lstrip("-").split("=")[0].replace("-", "_")
    hint = near(name, parser.option_names(), "`--{}`") or f"see `{parser.prog} --help`."
    raise ValueError(f"`{option}` is no option of `{parser.prog}`; {hint}")
