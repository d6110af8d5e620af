"""`ra3 report`: what runs did, as one page and pictures."""

from __future__ import annotations

import logging
from pathlib import Path

from ..report.report import make_sections, write_report
from ..report.runs import read_runs
from .options import report_parser as _parser


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 report`; see `ra3 report --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    folder = Path(options.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` is {options.output_dir!r}, a file; name a folder.")
    if options.programs < 0:
        raise ValueError(f"`programs` is {options.programs}; use 0 or more.")
    written = write_report(make_sections(read_runs(options.runs), options.programs), folder, options.title)
    pictures = sum(path.suffix == ".png" for path in written)
    print(f"Wrote {written[0]} and {pictures} pictures.")
    return 0
