"""`ra3 report`: what runs did, as one page and pictures."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from ..report.report import make_sections, write_report
from ..report.runs import read_runs


_EPILOG = """Each RUN is the folder of a run of `ra3 train` or `ra3 rlvr`, or a corpus of `ra3 annotate`. LABEL=RUN
calls it LABEL; runs of the same label are seeds of one another and become one curve with a band. OUTPUT_DIR gets
report.html, which holds everything and loads nothing, tables.md with its tables, a PNG for each chart, and
overview.png with all of them."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ra3 report", description=__doc__, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="RUN or LABEL=RUN")
    parser.add_argument("--output_dir", default="report", help="folder of page and pictures (default: %(default)s)")
    parser.add_argument("--title", default="RA3", help="of the page (default: %(default)s)")
    parser.add_argument(
        "--programs", type=int, default=6, help="programs shown of each annotated corpus (default: %(default)s)"
    )
    return parser


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
