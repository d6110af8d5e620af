"""Whole updates of both phases: against TRL's trainers, in two processes, and after resuming.

Every figure comes from `Trainer.train()` runs on the CPU in float32, without gradient checkpointing on either side;
what is timed is an update from the end of the one before, data, rollout, gradients, optimizer step and log included.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

import torch

from .common import CLOCKS, default_model, say


PARTS = ("mstep", "estep", "processes", "resume")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id (default: the demo's SmolLM2-135M, converted once)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--module", default="shutil.py", help="file of the standard library that documents come from")
    parser.add_argument("--num_latents", type=int, default=4, help="latents per boundary (G), GRPO's generations")
    parser.add_argument("--latent_tokens", type=int, default=12, help="longest latent (K), GRPO's longest completion")
    parser.add_argument(
        "--row_tokens", type=int, default=512, help="M-step: tokens of a packed row, one row an update"
    )
    parser.add_argument("--row_documents", type=int, default=4, help="M-step: documents in a row")
    parser.add_argument("--mstep_updates", type=int, default=2, help="M-step: timed updates a round, after a warm-up")
    parser.add_argument(
        "--repeats", type=int, default=3, help="M-step: interleaved rounds after a warm-up; the best counts"
    )
    parser.add_argument("--document_tokens", type=int, default=512, help="E-step: tokens of the document")
    parser.add_argument("--sampled_boundaries", type=int, default=4, help="E-step: boundaries that GRPO is timed on")
    parser.add_argument("--estep_repeats", type=int, default=1, help="E-step: interleaved rounds; the best counts")
    parser.add_argument("--process_tokens", type=int, default=96, help="processes: tokens of a document")
    parser.add_argument(
        "--process_batch", type=int, default=2, help="processes: documents an update, over all of them"
    )
    parser.add_argument("--process_rounds", type=int, default=5, help="processes: interleaved rounds; the best counts")
    parser.add_argument("--resume_tokens", type=int, default=128, help="resume: tokens of a document")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's choice); processes have one each")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="`cpu` with `--threads 1` on a shared machine")
    parser.add_argument("--seed", type=int, default=0, help="seed of all trainers")


def run(args: argparse.Namespace) -> dict:
    begin = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    folder = args.model or default_model()
    say(f"{folder}, {torch.get_num_threads()} threads: {', '.join(args.parts)}")
    with redirect_stdout(sys.stderr):  # what trainers print
        result = _measure(folder, args)
    result |= {name: version(name) for name in ("torch", "transformers", "trl")}
    result |= {"model": Path(folder).name, "threads": torch.get_num_threads(), "clock": args.clock, "seed": args.seed}
    return result | {"commit": _commit(), "benchmark_seconds": round(time.perf_counter() - begin, 1)}


def _measure(folder: str, args: argparse.Namespace) -> dict:
    from .estep import measure_estep
    from .mstep import measure_mstep
    from .processes import measure_processes
    from .resume import measure_resume

    result = {}
    if "mstep" in args.parts:
        result |= measure_mstep(folder, args) | measure_mstep(folder, args, annotated=True)
    if "estep" in args.parts:
        result |= measure_estep(folder, args)
    if "processes" in args.parts:
        result |= measure_processes(folder, args)
    if "resume" in args.parts:
        result |= measure_resume(folder, args)
    return result


def _commit() -> str | None:
    """The checkout's commit, with a `+` if files differ from it; `None` outside of git."""
    root = Path(__file__).parent
    outputs = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            found = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        if found.returncode:
            return None
        outputs.append(found.stdout.strip())
    return outputs[0] + ("+" if outputs[1] else "")
