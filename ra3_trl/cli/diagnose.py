"""`ra3 diagnose`: a checkpoint on a corpus by the theory's own measures."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..evaluation.diagnose import DiagnosisSettings, diagnose
from ..evaluation.thoughts import kept_boundaries
from ..files import write_whole
from ..report.diagnosis import print_diagnosis
from ..segmentation import row_to_document, segment_dataset
from .checkpoint import (
    add_model_options,
    add_settings,
    add_trust,
    flag_settings,
    open_policy,
    saved_settings,
    shown_name,
    stdout_console,
)
from .data import limit, load_splits


VERSION = 1
_MEASURES = tuple(field.name for field in fields(DiagnosisSettings))
_SETTINGS = (
    "num_latents", "seed", "action_format", "existing_comments", "max_length", "max_latent_length", "horizon",
    "discount", "line_reduction", "temperature", "top_k", "top_p", "dataset_text_field", "engine", "max_branch_tokens",
)  # fmt: skip


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
    parser.add_argument("--output", metavar="FILE", help="write all numbers there as JSON")
    add_model_options(parser)
    add_trust(parser)
    add_settings(parser, "measures", _MEASURES, config=DiagnosisSettings)
    add_settings(parser, "settings", _SETTINGS)
    return parser


def _read_settings(options: argparse.Namespace) -> DiagnosisSettings:
    if options.documents < 1:
        raise ValueError(f"`documents` is {options.documents}; it must be at least 1.")
    if options.output and (Path(options.output).is_dir() or not Path(options.output).resolve().parent.is_dir()):
        raise ValueError(f"`output` is {options.output!r}; name a file in a folder that is there.")
    return DiagnosisSettings(**flag_settings(options, _MEASURES))


def _holds_code(path: Path) -> bool:
    """Whether a folder is one of code, and not a data set that was saved."""
    return path.is_dir() and not any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def measure(options: argparse.Namespace, how: DiagnosisSettings) -> dict[str, Any]:
    """Loads checkpoint and corpus, and measures."""
    saved_settings(options)  # first, since it says best that there is no such checkpoint
    code = options.corpus is not None and _holds_code(Path(options.corpus))
    source = (None, options.corpus) if code else (options.corpus, None)
    splits = load_splits(*source, options.dataset_split, options.dataset_config)
    data = limit(splits[options.dataset_split], options.documents)
    policy = open_policy(options, flag_settings(options, _SETTINGS))
    rows = segment_dataset(data, policy.segmenter, policy.args.dataset_text_field)
    cut = list(map(row_to_document, rows))
    documents = [document for document in cut if document.boundaries]
    columns = (policy.args.dataset_text_field, "latents")
    # What `ra3 annotate` has written; with comments stripped, lines would be others.
    annotated = set(columns) <= set(data.column_names) and policy.args.existing_comments == "keep"
    kept = kept_boundaries(policy, dict(enumerate(data.select_columns(list(columns)))), cut) if annotated else None
    total = len(documents) + min(how.boundaries, sum(len(document.boundaries) for document in documents))
    with tqdm(total=total, desc="Measuring", disable=None) as bar:
        diagnosis = diagnose(policy, documents, how, bar.update, kept)
    settings = {name: getattr(policy.args, name) for name in _SETTINGS} | {"documents": options.documents}
    settings |= {name: value for name, value in asdict(how).items() if name not in ("factor", "gamma")}
    checkpoint = shown_name(options.checkpoint)
    return {"version": VERSION, "checkpoint": checkpoint, "settings": settings, "chunks": len(documents), **diagnosis}


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 diagnose`; see `ra3 diagnose --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    diagnosis = measure(options, _read_settings(options))
    print_diagnosis(diagnosis, stdout_console())
    if options.output:
        write_whole(options.output, (json.dumps(diagnosis, indent=1) + "\n").encode())
        print(f"Wrote {options.output}.")
    return 0
