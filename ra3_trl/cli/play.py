"""`ra3 play`: a local page to look at a checkpoint's thoughts, or the same as a Hugging Face Space."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from ..hub import SpacePush
from ..policy import open_settings
from ..segmentation import find_format
from .checkpoint import flag_settings, open_policy, saved_settings, shown_name
from .early import check_page
from .options import PLAY
from .options import play_parser as _parser


# Options that say how the page is served or pushed here, and nothing of a Space.
_HERE = ("checkpoint", "host", "port", "open", "use_cpu", "push_to_space", "private", "requirement")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return flag_settings(options, PLAY) | {"existing_comments": "keep", "use_cpu": options.use_cpu}


def _words(options: argparse.Namespace) -> list[str]:
    """The options that a Space's page is opened with."""
    words, defaults = [], vars(_parser().parse_args([options.checkpoint]))
    for name, value in vars(options).items():
        if name in _HERE or value == defaults[name]:
            continue
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 play`; see `ra3 play --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    check_page(options)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    settings = open_settings(saved_settings(options), _settings(options), options.checkpoint)
    find_format(settings.action_format)  # before the weights are loaded, or a Space is made
    if options.push_to_space is not None:
        push = SpacePush(options.push_to_space, options.private or None, options.requirement)
        print(f"Pushed to {push.upload(options.checkpoint, _words(options))}.")
        return 0
    from .playground import Playground  # gradio, which is an extra

    page = Playground(open_policy(options, _settings(options)), shown_name(options.checkpoint))
    page.launch(options.host, options.port, options.open)
    return 0
