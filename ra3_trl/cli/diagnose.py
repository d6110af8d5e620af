"""`ra3 diagnose`: a checkpoint on a corpus by the theory's own measures."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm

from ..config_file import read_settings
from ..evaluation.diagnose import diagnose
from ..models import load_tokenizer
from ..report.page import write_whole
from ..segmentation import find_format, require_tags, row_to_document, segment_dataset
from ..trainer import RA3MidTrainer
from .checkpoint import add_model_options, add_settings, make_config
from .data import limit, load_splits


VERSION = 1
_OF_THE_CHECKPOINT = (
    "action_format", "existing_comments", "max_length", "max_latent_length", "horizon", "discount", "line_reduction",
    "temperature", "top_k", "top_p", "dataset_text_field",
)  # fmt: skip
_SETTINGS = ("num_latents", "seed", *_OF_THE_CHECKPOINT, "engine", "max_branch_tokens")
_COUNTS = ("documents", "boundaries", "lines", "line_tokens")
# Of each number: what it is called, and how it is written.
_ROWS = {
    "horizon": {
        "latents": ("latents that the policy places", "d"),
        "lines_per_latent": ("lines that one lasts", ".2f"),
        "cut": ("of these ended by the text's end", ".0%"),
        "gbar": ("E[gamma^tau] over decisions", ".4f"),
        "iterations": ("iterations that the bound asks for", ".0f"),
        "iterations_by_line": ("the same, line by line", ".0f"),
    },
    "pruning": {
        "removed": ("mass on lines that a latent rules out", ".3f"),
        "removed_by_others": ("the same, latents of other boundaries", ".3f"),
        "expert_kept": ("latents that keep the expert's line", ".0%"),
        "expert_helped": ("latents that make it likelier", ".0%"),
        "boundaries": ("boundaries", "d"),
        "lines": ("lines drawn there", "d"),
        "left_out": ("too long to be used", "d"),
    },
    "economics": {
        "think_rate": ("P(think), mean over boundaries", ".4f"),
        "gain": ("nats that a latent brings", "+.3f"),
        "gain_per_token": ("for each of its tokens", "+.3f"),
        "helps": ("latents that bring something", ".0%"),
        "gain_where_it_thinks": ("nats, weighed by P(think)", "+.3f"),
        "gain_per_token_where_it_thinks": ("for each token, weighed", "+.3f"),
        "price": ("nats to write one, -log pi(z | s)", ".2f"),
        "latent_tokens": ("tokens of a latent", ".1f"),
    },
}
_DISTINCT = 0.9  # share of draws seen once above which entropy can't be told
_COMPACT = (("entropy", ".2f"), ("effective", ".1f"), ("distinct", ".0%"), ("given_state", ".2f"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ra3 diagnose",
        description="What the theory asks of a checkpoint, measured on a corpus: how long its latents last, how many "
        "different ones there are, what they rule out, and what they earn. See docs/diagnose.md.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a causal language model")
    parser.add_argument(
        "corpus", metavar="CORPUS", nargs="?", help="folder of .py files, Hub id, folder of save_to_disk, or json(l), "
        "parquet, csv file (default: the standard library of this Python)",
    )  # fmt: skip
    corpus = parser.add_argument_group("corpus")
    corpus.add_argument("--dataset_config", help="configuration of the dataset")
    corpus.add_argument("--dataset_split", default="train", help="its split (default: %(default)s)")
    corpus.add_argument("--documents", type=int, default=32, help="the first so many (default: %(default)s)")
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument("--boundaries", type=int, default=32, help="where it is measured (default: %(default)s)")
    pruning.add_argument("--lines", type=int, default=16, help="next lines drawn at each (default: %(default)s)")
    pruning.add_argument("--line_tokens", type=int, default=48, help="longest of these (default: %(default)s)")
    pruning.add_argument(
        "--factor", type=float, default=10.0, help="how much less likely is ruled out (default: %(default)s)"
    )
    parser.add_argument(
        "--gamma", type=float, default=0.98, help="discount of a line in the RL to come (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="write all numbers there as JSON")
    add_model_options(parser)
    add_settings(parser, "settings", _SETTINGS, _OF_THE_CHECKPOINT)
    return parser


def _check(options: argparse.Namespace) -> None:
    for name in _COUNTS:
        if vars(options)[name] < 1:
            raise ValueError(f"`{name}` is {vars(options)[name]}; it must be at least 1.")
    if not 0 < options.gamma < 1:
        raise ValueError(f"`gamma` is {options.gamma}; it must be above 0 and below 1.")
    if not options.factor > 1:
        raise ValueError(f"`factor` is {options.factor}; it must be above 1.")
    if options.output and (Path(options.output).is_dir() or not Path(options.output).resolve().parent.is_dir()):
        raise ValueError(f"`output` is {options.output!r}; name a file in a folder that is there.")


def _holds_code(path: Path) -> bool:
    """Whether a folder is one of code, and not a data set that was saved."""
    return path.is_dir() and not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Loads checkpoint and corpus, and measures."""
    name, place = options.checkpoint, {"revision": options.model_revision}
    tokenizer = load_tokenizer(name, place)  # first, since it says best that there is no such checkpoint
    saved = read_settings(name, **place) or {}
    with tempfile.TemporaryDirectory() as aside:  # the trainer makes its output folder; nothing is written there
        args = make_config(options, saved, _SETTINGS, _OF_THE_CHECKPOINT, aside, abstraction_head=False)
        code = options.corpus is not None and _holds_code(Path(options.corpus))
        source = (None, options.corpus) if code else (options.corpus, None)
        splits = load_splits(*source, options.dataset_split, options.dataset_config)
        data = limit(splits[options.dataset_split], options.documents)
        require_tags(tokenizer, find_format(args.action_format))  # the trainer would add them, untrained
        trainer = RA3MidTrainer(name, args, processing_class=tokenizer)
        rows = segment_dataset(data, trainer.segmenter, args.dataset_text_field, None)
        documents = [row_to_document(row) for row in rows]
        able = [document for document in documents if document.boundaries]
        total = len(able) + min(options.boundaries, sum(len(document.boundaries) for document in able))
        with tqdm(total=total, desc="Measuring", disable=None) as bar:
            found = diagnose(
                trainer, documents, options.boundaries, options.lines, options.line_tokens, options.factor,
                options.gamma, bar.update,
            )  # fmt: skip
    settings = {field: getattr(args, field) for field in _SETTINGS} | {n: vars(options)[n] for n in _COUNTS}
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    return {"version": VERSION, "checkpoint": shown, "settings": settings, "chunks": len(able), **found}


def print_tables(found: dict[str, Any], console: Console) -> None:
    """The numbers for a terminal."""
    for part, rows in _ROWS.items():
        table = Table(title=part.capitalize(), title_justify="left", show_header=False)
        numbers = found[part] or {}
        for key, (label, form) in rows.items():
            if numbers.get(key) is not None:
                table.add_row(Text(label), format(numbers[key], form))
        console.print(table)
    table = Table(title="Compactness", title_justify="left")
    for name in ("", "entropy (nats)", "effective number", "distinct", "given the state (nats)"):
        table.add_column(name, justify="right")
    for kind, numbers in found["compactness"].items():
        hidden = ("entropy", "effective") if numbers["distinct"] > _DISTINCT else ()
        cells = (format(numbers[k], form) if k in numbers and k not in hidden else "-" for k, form in _COMPACT)
        table.add_row(kind, *cells)
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 diagnose`; see `ra3 diagnose --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    _check(options)
    found = measure(options)
    if isinstance(sys.stdout, TextIOWrapper):  # what its encoding lacks must not end the print
        sys.stdout.reconfigure(errors="backslashreplace")
    print_tables(found, Console(file=sys.stdout, highlight=False))
    if options.output:
        write_whole(Path(options.output), (json.dumps(found, indent=1) + "\n").encode())
        print(f"Wrote {options.output}.")
    return 0
