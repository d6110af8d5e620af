"""What the commands that look at a checkpoint share: its options, its settings or those of flags, how it is opened."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from io import TextIOWrapper
from pathlib import Path
from typing import Any, get_type_hints

from huggingface_hub.errors import HFValidationError
from rich.console import Console

from ..config import RA3Config
from ..config_file import read_settings
from ..policy import THINKING, Policy


def add_model_options(parser: argparse.ArgumentParser, dtype: str = "float32") -> None:
    """Adds `--model_revision` and `--dtype`, the latter with a default."""
    model = parser.add_argument_group("model")
    model.add_argument("--model_revision", default="main", help="branch, tag or commit (default: %(default)s)")
    model.add_argument(
        "--dtype", default=dtype, choices=("auto", "bfloat16", "float16", "float32"),
        help="of weights (default: %(default)s)",
    )  # fmt: skip


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust_remote_code`, which [`open_policy`] reads."""
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with the model's files or its tokenizer's",
    )


def add_settings(
    parser: argparse.ArgumentParser,
    title: str,
    names: Sequence[str],
    of_the_checkpoint: Collection[str] = THINKING,
    config: type = RA3Config,
) -> None:
    """Adds a flag for each field of `config` in `names`; left out, those `of_the_checkpoint` are the checkpoint's."""
    group = parser.add_argument_group(title)
    hints, by_name = get_type_hints(config), {field.name: field for field in fields(config)}
    for name in names:
        kind = _OR_NONE.get(hints[name], hints[name] if hints[name] in (int, float) else str)
        own = "the checkpoint's, else " if name in of_the_checkpoint else ""
        meaning = "Seed of the draws." if name == "seed" else by_name[name].metadata["help"]
        text = f"{meaning} (default: {own}{by_name[name].default})"
        group.add_argument(f"--{name}", type=kind, help=text.replace("%", "%%"))


def flag_settings(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Collects the settings that flags were given for."""
    given = {name: vars(options)[name] for name in names if vars(options)[name] is not None}
    return {name: None if value == "none" else value for name, value in given.items()}


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads `none` too."""

    def read(text: str) -> Any:
        return "none" if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse's messages name the type
    return read


_OR_NONE: dict[Any, Callable[[str], Any]] = {kind | None: _or_none(kind) for kind in (int, float)}


def saved_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Reads the settings that `options.checkpoint` was trained with, none for a base model.

    Raises:
        `ValueError`: if there is no such checkpoint.
    """
    name, cure = options.checkpoint, "give the folder of a saved model or adapter, or a Hub id"
    if Path(name).is_dir() and not any(Path(name, f).is_file() for f in ("config.json", "adapter_config.json")):
        raise ValueError(f"`checkpoint` is {name!r}, a folder without config.json; {cure}.")
    try:
        return read_settings(name, revision=options.model_revision) or {}
    except HFValidationError as error:
        raise ValueError(f"`checkpoint` is {name!r}, where there is no folder; {cure}.") from error


def open_policy(options: argparse.Namespace, settings: dict[str, Any]) -> Policy:
    """Opens `options.checkpoint` with `settings` in the place of its own."""
    place = {"dtype": options.dtype, "revision": options.model_revision}
    place |= {"trust_remote_code": options.trust_remote_code}
    return Policy.open(options.checkpoint, model_init_kwargs=place, **settings)


def shown_name(checkpoint: str) -> str:
    """Names a checkpoint in what is passed on, where a path says nothing or too much: of a folder its own name."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint


def stdout_console() -> Console:
    """Makes a console of the standard output; what its encoding lacks does not end the print."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(file=sys.stdout, highlight=False)
