"""What the commands that look at a checkpoint share: its settings or those of flags, how it is opened."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from rich.console import Console

from ..config_file import read_settings
from ..policy import Policy


def flag_settings(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Collects the settings that flags were given for."""
    given = {name: vars(options)[name] for name in names if vars(options)[name] is not None}
    return {name: None if value == "none" else value for name, value in given.items()}


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
    place = {"dtype": options.dtype, **place_of_options(options)}
    return Policy.open(options.checkpoint, model_init_kwargs=place, **settings)


def place_of_options(options: argparse.Namespace) -> dict[str, Any]:
    """Says where a checkpoint's files are, and whether code among them runs."""
    return {"revision": options.model_revision, "trust_remote_code": options.trust_remote_code}


def shown_name(checkpoint: str) -> str:
    """Names a checkpoint in what is passed on, where a path says nothing or too much: of a folder its own name."""
    return Path(checkpoint).resolve().name if Path(checkpoint).is_dir() else checkpoint


def stdout_console() -> Console:
    """Makes a console of the standard output; what its encoding lacks does not end the print."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(file=sys.stdout, highlight=False)
