"""`ra3 evaluate`: pass@k of a checkpoint, or of samples that were drawn elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..evaluation import add_to_card, check_k, evaluate_passk, evaluate_samples, load_benchmark, push_results
from ..sandbox import Limits
from .early import check_source, read_ks
from .options import evaluate_parser as _parser
from .passk_options import checkpoint_of, open_judge, read_settings


def report(results: dict[str, Any]) -> str:
    """The numbers in words, a line each."""
    tasks, few = results["num_tasks"], results["num_samples"]
    most = max(len(problem["verdict"]) for problem in results["problems"].values())
    samples = f"{few} sample{'s' * (few > 1)} each" if few == most else f"{few} to {most} samples each"
    lines = [f"{results['task']}: {tasks} task{'s' * (tasks > 1)}, {samples}"]
    for name, plus in (("pass@k", ""), ("plus_pass@k", " (EvalPlus)")):
        for k, number in results.get(name, {}).items():
            lines.append(f"pass@{k}{plus}: {number['value']:.3f} [{number['low']:.3f}, {number['high']:.3f}]")
    lines.append("verdicts: " + ", ".join(f"{count} {name}" for name, count in results["verdicts"].items()))
    if results["forgeable"]:
        lines.append(f"{results['forgeable']} verdicts are forgeable: tests ran in the program's own process")
    lines.append(f"latents: {results['think_rate']:.3f} for each line of code")
    if "tokens_per_sample" in results:
        lines.append(
            f"tokens: {results['tokens_per_sample']:.1f} a sample, {results['finished']:.0%} ended by themselves"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 evaluate`; returns the exit code."""
    options = _parser().parse_args(argv)
    checkpoint, samples = options.checkpoint, options.samples
    # What can be known to be wrong is refused before anything is loaded, tasks before the sandbox and the model.
    check_source(options)
    settings, ks = read_settings(options), read_ks(options.k)
    if checkpoint is not None:
        check_k(ks, settings.num_samples)
    if options.push_to_hub and (checkpoint is None or Path(checkpoint).exists()):
        raise ValueError("`push_to_hub` adds to the card of a Hub id; give one as the checkpoint.")
    benchmark = load_benchmark(options.task, options.task_file, max_tasks=options.max_tasks)
    source = Path(checkpoint or samples).name.removesuffix(".gz").removesuffix(".jsonl")
    folder = Path(options.output_dir or f"results/{source}-{benchmark.name}")
    with open_judge(Limits(seconds=options.timeout, memory_mb=options.memory_mb), options.slots) as judge:
        if checkpoint is None:
            results = evaluate_samples(samples, benchmark, ks, folder, judge)
        else:
            results = evaluate_passk(checkpoint_of(checkpoint, options), benchmark, settings, ks, folder, judge)
    print(report(results))
    print(f"Results are in {folder / 'results.json'}.")
    if options.push_to_hub:
        print(f"The card has them: {push_results(results, checkpoint)}")
    elif checkpoint and not options.no_card and add_to_card(results, checkpoint):
        print(f"So does the metadata of {Path(checkpoint, 'README.md')}.")
    return 0
