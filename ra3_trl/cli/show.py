"""`ra3 show`: a file with the gate's probability at each boundary and the latents a checkpoint would write there."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from ..policy import open_settings
from ..report.look import look
from ..report.page import write_page
from ..report.show import ShownFile, physical_lines, print_file
from ..segmentation import find_format
from .checkpoint import (
    flag_settings,
    open_policy,
    saved_settings,
    shown_name,
    stdout_console,
)
from .early import read_lines
from .options import SHOW
from .options import show_parser as _parser


def read_source(path: str) -> str:
    """Reads the text of a file, as it is; refuses what is empty, binary or not in UTF-8."""
    content = Path(path).read_bytes()
    if b"\0" in content:
        raise ValueError(f"`file` {path!r} is binary (it holds a NUL byte); give a text file.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`file` {path!r} is not in UTF-8 (byte {error.start} is 0x{content[error.start]:02x}); convert it first."
        ) from error
    if not text.strip():
        raise ValueError(f"`file` {path!r} is empty; give a file with some text.")
    return text


def _check_html(html: str, file: str) -> None:
    path = Path(html)
    if path.is_dir():
        raise ValueError(f"`html` is {html!r}, which is a folder; name a file in it, such as {path / 'page.html'}.")
    if not path.parent.is_dir():
        raise ValueError(f"`html` is {html!r}, whose folder is not there; make it first.")
    if path.exists() and path.samefile(file):
        raise ValueError(f"`html` is {html!r}, the very file to be shown; name another one.")


def show(options: argparse.Namespace, text: str, lines: range) -> ShownFile:
    """Loads the checkpoint and looks at the text with it."""
    changes = flag_settings(options, SHOW) | {"existing_comments": "keep"}
    # Asked before the weights are loaded, which may take minutes.
    action_format = open_settings(saved_settings(options), changes, options.checkpoint).action_format
    if find_format(action_format).segment(text) is None:
        raise ValueError(
            f"`file` {options.file!r} can't be read as {action_format!r} (a syntax error, or another language); mend "
            "it or set `--action_format`."
        )
    policy = open_policy(options, changes)
    with tqdm(desc="Drawing latents", unit="boundary", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        shown = look(policy, text, Path(options.file).name, shown_name(options.checkpoint), lines, progress)
    return replace(shown, settings=shown.settings | {"dtype": options.dtype})


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 show`; see `ra3 show --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    text = read_source(options.file)
    lines = read_lines(options.lines, len(physical_lines(text)))
    if options.html is not None:
        _check_html(options.html, options.file)
    shown = show(options, text, lines)
    if options.html is None:
        print_file(shown, stdout_console())
    else:
        write_page(shown, Path(options.html))
        print(f"Wrote {options.html}.")
    return 0
