"""`ra3 show`: a file with the gate's probability at each boundary and the latents a checkpoint would write there."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from rich.console import Console
from tqdm.auto import tqdm

from ..config_file import read_settings
from ..models import load_head, load_tokenizer, state_width
from ..report.page import write_page
from ..report.show import ShownFile, look, physical_lines, print_file
from ..segmentation import find_format, readable_bytes, require_tags
from ..trainer import RA3MidTrainer
from .checkpoint import add_model_options, add_settings, make_config


_OF_THE_CHECKPOINT = (
    "action_format", "horizon", "discount", "line_reduction", "max_latent_length", "temperature", "top_k", "top_p",
    "max_length",
)  # fmt: skip
_SETTINGS = ("num_latents", "seed", *_OF_THE_CHECKPOINT, "engine", "max_branch_tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ra3 show",
        description="Shows a file as a checkpoint sees it: P(think) at each boundary, the latents it would write "
        "there, and what each brings for the lines that follow. The file's own comments stay as they are.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a causal language model")
    parser.add_argument("file", metavar="FILE", help="text in UTF-8, of the action format")
    parser.add_argument("--html", metavar="OUT", help="write a page for a browser instead of printing")
    parser.add_argument("--lines", metavar="A:B", help="these lines only, counted from 1; the model still reads all")
    add_model_options(parser)
    add_settings(parser, "settings", _SETTINGS, _OF_THE_CHECKPOINT)
    return parser


def read_source(path: str) -> str:
    """The text of a file, as it is.

    Raises:
        `ValueError`: if it is empty, binary or not in UTF-8.
        `OSError`: if it can't be read.
    """
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


def read_lines(value: str | None, count: int) -> range:
    """`"A:B"` of a file of `count` lines as a range of line numbers; either may be left out.

    Example: `read_lines("3:", 5) == range(3, 6)`.

    Raises:
        `ValueError`: if it is not of this form, or no line of the file is in it.
    """
    match = re.fullmatch(r"(\d*):(\d*)|(\d+)", value or ":", re.ASCII)
    if match is None:
        raise ValueError(f"`lines` is {value!r}; write it as A:B, such as 10:40.")
    first, last = int(match[3] or match[1] or 1), min(int(match[3] or match[2] or count), count)
    if not 1 <= first <= last:
        raise ValueError(f"`lines` is {value!r}, but the file has the lines 1:{count}.")
    return range(first, last + 1)


def _check_html(html: str | None, file: str) -> None:
    if html is None:
        return
    path = Path(html)
    if path.is_dir():
        raise ValueError(f"`html` is {html!r}, which is a folder; name a file in it, such as {path / 'page.html'}.")
    if not path.parent.is_dir():
        raise ValueError(f"`html` is {html!r}, whose folder is not there; make it first.")
    if path.exists() and path.samefile(file):
        raise ValueError(f"`html` is {html!r}, the very file to be shown; name another one.")


def _saved_settings(name: str, place: dict[str, str]) -> dict[str, Any]:
    """The settings that a checkpoint was trained with, if it says so.

    Raises:
        `ValueError`: if there is no such checkpoint.
    """
    cure = "give the folder of a saved model or adapter, or a Hub id"
    if Path(name).is_dir() and not any(Path(name, f).is_file() for f in ("config.json", "adapter_config.json")):
        raise ValueError(f"`checkpoint` is {name!r}, a folder without config.json; {cure}.")
    try:
        return read_settings(name, **place) or {}
    except HFValidationError as error:
        raise ValueError(f"`checkpoint` is {name!r}, where there is no folder; {cure}.") from error


def show(options: argparse.Namespace, text: str, lines: range) -> ShownFile:
    """Loads the checkpoint and looks at the text with it.

    Raises:
        `ValueError`: for a text that is not of the action format, or that the tokenizer does not give back.
    """
    name, place = options.checkpoint, {"revision": options.model_revision}
    saved = _saved_settings(name, place)
    with tempfile.TemporaryDirectory() as aside:  # the trainer makes its output folder; nothing is written there
        args = make_config(options, saved, _SETTINGS, _OF_THE_CHECKPOINT, aside, abstraction_head=False)
        action_format = find_format(args.action_format)
        if action_format.segment(text) is None:
            raise ValueError(
                f"`file` {options.file!r} can't be read as {args.action_format!r} (a syntax error, or another "
                "language); mend it or set `--action_format`."
            )
        tokenizer = load_tokenizer(name, place)
        require_tags(tokenizer, action_format)  # the trainer would add them, untrained
        trainer = RA3MidTrainer(name, args, processing_class=tokenizer)
        head = load_head(name, state_width(trainer.backbone.causal_lm), **place)
    documents = trainer.segmenter(0, text)
    if not documents or documents[0].status == "lossy":
        raise ValueError(f"`file` {options.file!r}: the tokenizer of {name!r} does not give its text back.")
    if head is not None and (not head.config.trained_on or head.config.action_format != args.action_format):
        head = None  # one that knows nothing of such boundaries
    decides = "head" if head is not None and saved.get("gate") == "head" else "tokens"
    data = readable_bytes(tokenizer, action_format)
    trainer.model.eval()
    with tqdm(desc="Drawing latents", unit="boundary", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        boundaries = look(
            trainer.engine, documents, text, data, action_format, args, head, decides, lines, progress
        )  # fmt: skip
    settings = {field: getattr(args, field) for field in _SETTINGS[:-2]} | {"dtype": options.dtype}
    if Path(name).is_dir():
        name = Path(name).resolve().name  # a page is passed on, where a path says nothing or too much
    return ShownFile(Path(options.file).name, text, name, boundaries, lines[0], lines[-1], settings, decides)


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 show`; see `ra3 show --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    text = read_source(options.file)
    lines = read_lines(options.lines, len(physical_lines(text)))
    _check_html(options.html, options.file)
    shown = show(options, text, lines)
    if options.html is None:
        if isinstance(sys.stdout, TextIOWrapper):  # what its encoding lacks must not end the print
            sys.stdout.reconfigure(errors="backslashreplace")
        print_file(shown, Console(file=sys.stdout, highlight=False))
    else:
        write_page(shown, Path(options.html))
        print(f"Wrote {options.html}.")
    return 0
