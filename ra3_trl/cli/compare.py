"""`ra3 compare`: checkpoints side by side, or what `ra3 evaluate` found for them."""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

from ..evaluation import evaluate_passk, load_benchmark
from ..evaluation.compare import (
    choose_ks,
    compare_runs,
    match_problems,
    read_entrants,
    sampling_notes,
    task_of,
)
from ..models import load_tokenizer
from ..policy import open_settings
from ..report.compare import comparison_markdown, comparison_table, plot_comparison
from ..sandbox import Limits
from .checkpoint import flag_settings, place_of_options, stdout_console
from .cross_entropy import FLAGS, held_out_texts, measure, shared_settings
from .early import read_ks
from .options import compare_parser as _parser
from .passk_options import checkpoint_of, open_judge, read_settings


VERSION = 1


def write_comparison(comparison: dict[str, Any], folder: Path) -> list[str]:
    """Writes compare.json, compare.md and, where there is matplotlib, compare.png; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    picture: str | None = "compare.png"
    try:
        plot_comparison(comparison, folder / "compare.png")
    except ImportError:
        comparison["notes"].append("There is no picture, since matplotlib is not installed (`ra3-trl[plots]`).")
        picture = None
    (folder / "compare.json").write_text(json.dumps({"version": VERSION, **comparison}, indent=1) + "\n", "utf-8")
    (folder / "compare.md").write_text(comparison_markdown(comparison, picture), "utf-8")
    return ["compare.md", "compare.json", *([picture] if picture else [])]


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 compare`; see `ra3 compare --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # What can be known to be wrong is refused before anything is drawn, which may take hours.
    entrants, settings = read_entrants(options.places, options.names), read_settings(options)
    if options.eval_documents is not None and options.eval_documents < 1:
        raise ValueError(f"`eval_documents` is {options.eval_documents}; use at least 1, or `no_ce`.")
    drawn = {entrant.name: entrant.place for entrant in entrants if entrant.results is None}
    measured = {entrant.name: entrant.weights for entrant in entrants if entrant.weights}
    runs = {entrant.name: entrant.results for entrant in entrants if entrant.results is not None}
    ks = None if options.k is None else read_ks(options.k)
    ks = choose_ks(runs, ks, settings.num_samples if drawn else None)
    solutions = measured and not (options.no_ce or options.dataset_name or options.code_dir)
    task, benchmark = task_of(entrants, options.task), None
    if task and (drawn or solutions):
        benchmark = load_benchmark(task, options.task_file, max_tasks=options.max_tasks)
    benchmark = match_problems(entrants, benchmark)
    task_name = next((run["task"] for run in runs.values()), benchmark and benchmark.name)
    for checkpoint in drawn.values():
        load_tokenizer(checkpoint, place_of_options(options))  # says best that there is no checkpoint
    texts, source = held_out_texts(options, benchmark) if measured and not options.no_ce else (None, "")
    shared, notes_of_texts = shared_settings(options, measured) if texts is not None else ({}, [])

    if texts is not None:
        open_settings(shared, flag_settings(options, FLAGS))
    folder = Path(options.output_dir or f"results/compare-{task_name}")
    if folder.is_file():
        raise ValueError(f"`output_dir` is {str(folder)!r}, a file; name a folder.")
    if drawn and benchmark is not None:
        with open_judge(Limits(seconds=options.timeout, memory_mb=options.memory_mb), options.slots) as judge:
            for name, checkpoint in drawn.items():
                print(f"{name}:", file=sys.stderr)
                place = checkpoint_of(checkpoint, options)
                runs[name] = evaluate_passk(place, benchmark, settings, ks, folder / name, judge)
                gc.collect()  # the weights, before others are loaded
    runs = {entrant.name: runs[entrant.name] for entrant in entrants}
    models, notes = compare_runs(runs, ks), sampling_notes(runs)
    if texts is not None:
        numbers, notes_of_tokens = measure(options, shared, measured, texts)
        for name, cross_entropy in numbers.items():
            models[name]["cross_entropy"] = cross_entropy
        notes.append(f"Cross-entropy is in nats per code token; documents: {len(texts)} ({source}).")
        notes += [*notes_of_texts, *notes_of_tokens]
    if not options.no_ce and (lacking := [name for name, model in models.items() if "cross_entropy" not in model]):
        notes.append(_why_not(lacking, any(name in measured for name in lacking)))
    num_tasks = len(runs[entrants[0].name]["problems"])
    comparison = {"task": task_name, "num_tasks": num_tasks, "models": models, "notes": notes}
    written = write_comparison(comparison, folder)
    stdout_console().print(comparison_table(comparison))
    print("\n".join([*notes, f"Written to {folder}: {', '.join(written)}"]))
    return 0


def _why_not(lacking: list[str], at_hand: bool) -> str:
    """A sentence on those whose cross-entropy is not measured, although the weights of one of them are `at_hand`."""
    if at_hand:
        cure = "the tasks have no solutions that are at hand; give `dataset_name`, `code_dir`, or the file as `task`"
    else:
        cure = "the weights that were evaluated are not in a folder of that name here; give the checkpoint instead"
    return f"Without cross-entropy: {', '.join(lacking)}; {cure}."
