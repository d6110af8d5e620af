"""`python -m benchmarks.gpu FOLDER --preset PRESET`: does what fits into the time, and says what is left."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from ..common import default_model
from .drive import collect, drive
from .evidence import BENCHMARKS, SUITES
from .plan import PRESETS, check_proposals, fitted


SECONDS = 510.0  # so that a call ends within nine minutes, its start and what it prints among them


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when all is done, 3 when the command must be called again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=sys.modules[__package__].__doc__)
    parser.add_argument("folder", type=Path, help="of everything; a later call goes on there")
    parser.add_argument("--preset", choices=[*PRESETS, *SUITES], default="h100")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit of this call (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the preset's")
    parser.add_argument("--model", help="folder or Hub id (default: the demo's SmolLM2-135M)")
    parser.add_argument("--code_dir", help="folder of .py files (default: the standard library)")
    parser.add_argument("--mbpp", help="mbpp.jsonl, in place of the Hub's")
    parser.add_argument("--humaneval", help="of the preset evidence: HumanEval's problems as a file, not the Hub's")
    parser.add_argument("--grpo", action="store_true", help="of the preset evidence: go on with GRPO")
    parser.add_argument("--proposal", help="of the arm `hindsight`, as in HindsightConfig (default: the preset's)")
    parser.add_argument("--json", action="store_true", help="print what is there as one JSON object")
    args = parser.parse_args(argv)
    if args.preset in SUITES:
        return _suite(args)
    preset = fitted(PRESETS[args.preset], args.model or default_model(), args.code_dir, args.mbpp, args.proposal)
    preset = replace(preset, seeds=tuple(args.seeds)) if args.seeds else preset
    try:
        check_proposals(preset)
    except ValueError as error:
        parser.error(str(error))
    done = drive(args.folder, preset, args.seconds)
    if args.json:
        json.dump(collect(args.folder, preset), sys.stdout)
        print()
    return 0 if done else 3


def _suite(args: argparse.Namespace) -> int:
    """Each corpus of a suite in a folder of its own, one after the other in the time that there is."""
    begin, done, found = time.monotonic(), True, {}
    files = {name: path for name in BENCHMARKS if (path := vars(args)[name])}
    for corpus, preset in SUITES[args.preset].items():
        preset = replace(preset, model=args.model or default_model(), grpo=args.grpo, files=files)
        done = done and drive(args.folder / corpus, preset, args.seconds - (time.monotonic() - begin))
        found[corpus] = collect(args.folder / corpus, preset)
    if args.json:
        json.dump(found, sys.stdout)
        print()
    return 0 if done else 3


if __name__ == "__main__":
    raise SystemExit(main())
