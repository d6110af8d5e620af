"""`ra3 demo`: what RA3 is for, in minutes, with no model hub; with one's own model or code, how it runs there."""

from __future__ import annotations

import logging

from .demo_own import run_own
from .demo_testbed import run_testbed
from .options import demo_parser as _parser


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; see `ra3 demo --help`."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    own = options.model_name_or_path or options.dataset_name or options.code_dir
    return run_own(options) if own else run_testbed(options)
