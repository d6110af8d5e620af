"""`ra3 diagnose`: a checkpoint on a corpus by the theory's own measures."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..evaluation.diagnose import DiagnosisSettings, diagnose
from ..evaluation.thoughts import kept_boundaries
from ..files import write_whole
from ..report.diagnosis import print_diagnosis
from ..segmentation import row_to_document, segment_dataset
from .checkpoint import (
    flag_settings,
    open_policy,
    saved_settings,
    shown_name,
    stdout_console,
)
from .data import limit, load_splits
from .options import DIAGNOSE, MEASURES
from .options import diagnose_parser as _parser


VERSION = 1


def _read_settings(options: argparse.Namespace) -> DiagnosisSettings:
    if options.documents < 1:
        raise ValueError(f"`max_documents` is {options.documents}; it must be at least 1.")
    sources = [name for name in ("corpus", "code_dir", "dataset_name") if vars(options)[name]]
    if len(sources) > 1:
        raise ValueError(f"`{sources[0]}` and `{sources[1]}` are both set; pass one of them.")
    if options.output and (Path(options.output).is_dir() or not Path(options.output).resolve().parent.is_dir()):
        raise ValueError(f"`output` is {options.output!r}; name a file in a folder that is there.")
    return DiagnosisSettings(**flag_settings(options, MEASURES))


def _holds_code(path: Path) -> bool:
    """Whether a folder is one of code, and not a data set that was saved, or written by `ra3 annotate`."""
    saved = any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))
    return path.is_dir() and not saved and not any(path.glob("**/*.parquet"))


def measure(options: argparse.Namespace, how: DiagnosisSettings) -> dict[str, Any]:
    """Loads checkpoint and corpus, and measures."""
    saved_settings(options)  # first, since it says best that there is no such checkpoint
    code = options.corpus is not None and _holds_code(Path(options.corpus))
    source = (options.dataset_name, options.code_dir)
    if options.corpus is not None:
        source = (None, options.corpus) if code else (options.corpus, None)
    splits = load_splits(*source, options.dataset_split, options.dataset_config)
    data = limit(splits[options.dataset_split], options.documents)
    policy = open_policy(options, flag_settings(options, DIAGNOSE))
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
    settings = {name: getattr(policy.args, name) for name in DIAGNOSE} | {"documents": options.documents}
    settings |= {name: value for name, value in asdict(how).items() if name not in ("factor", "gamma")}
    checkpoint = shown_name(options.checkpoint)
    return {"version": VERSION, "checkpoint": checkpoint, "settings": settings, "chunks": len(documents), **diagnosis}


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 diagnose`; see `ra3 diagnose --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    diagnosis = measure(options, _read_settings(options))
    print_diagnosis(diagnosis, stdout_console())
    if options.output_dir:
        Path(options.output_dir).mkdir(parents=True, exist_ok=True)
    files = [options.output, options.output_dir and str(Path(options.output_dir) / "diagnosis.json")]
    for file in filter(None, files):
        write_whole(file, (json.dumps(diagnosis, indent=1) + "\n").encode())
        print(f"Wrote {file}.")
    return 0
