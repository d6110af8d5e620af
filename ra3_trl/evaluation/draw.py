"""Draws samples for a benchmark, batch by batch, into a file that a killed run goes on with.

The batches follow from the benchmark and the settings alone, and each has a seed of its own. So the file of a run that
was killed and went on is that of one left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import set_seed

from ..generation import AutoModelForCausalLMWithAbstractionHead, CompletionSettings, draw_completions
from ..models import context_length
from .prompts import render_prompt, sample_of
from .samples import Sample
from .tasks import Benchmark, Task


SAMPLES, RUN = "samples.jsonl", "run.json"
_FACTS = {"tokens", "finished"}


@dataclass(frozen=True)
class Batch:
    """Tasks whose completions number `first` to `first + count` are drawn at once."""

    tasks: tuple[Task, ...]
    first: int
    count: int


def plan_batches(benchmark: Benchmark, num_samples: int, batch_size: int) -> list[Batch]:
    """Batches of at most `batch_size` completions that cover `num_samples` of every task; tasks of like length stand
    together, the longest first, so that what does not fit into memory shows at once."""
    tasks = sorted(benchmark.tasks, key=lambda task: (-len(task.prompt), task.task_id))
    batches = []
    for first in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - first)
        step = batch_size // count
        batches += [Batch(tuple(tasks[i : i + step]), first, count) for i in range(0, len(tasks), step)]
    return batches


def draw_samples(
    model: AutoModelForCausalLMWithAbstractionHead,
    benchmark: Benchmark,
    form: str,
    settings: CompletionSettings,
    *,
    folder: Path,
    batch_size: int,
    seed: int,
    about: dict[str, Any],
    on_rows: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Draws what is missing of `folder/samples.jsonl`.

    Args:
        model ([`~ra3_trl.AutoModelForCausalLMWithAbstractionHead`]):
            The model, with its tokenizer.
        benchmark ([`Benchmark`]):
            The tasks.
        form (`str`):
            One of `PROMPT_FORMS`.
        settings ([`CompletionSettings`]):
            How completions are drawn.
        folder (`Path`):
            Gets the samples, and `run.json` with what they depend on.
        batch_size (`int`):
            Completions at a time.
        seed (`int`):
            Of the draws.
        about (`dict[str, Any]`):
            What else the samples depend on: the checkpoint, its type.
        on_rows (`Callable`):
            Called with the rows of each batch, those of a former run too: those of [`Sample`] with the number
            `sample`, `tokens` and `finished`.

    Raises:
        `ValueError`: if the folder holds samples of another run, or another process draws into it, or a prompt and
            its completion exceed the context.
    """
    tokens = _prompt_tokens(model, benchmark, form, settings)
    run = {**about, "settings": asdict(settings), "form": form, "batch_size": batch_size, "seed": seed}
    run |= {"num_tasks": len(benchmark.tasks), "prompts": _fingerprint(tokens)}
    batches = plan_batches(benchmark, settings.num_samples, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        done = _resume(folder, json.loads(json.dumps(run)), batches)
        for rows in done:
            on_rows(rows)
        with open(folder / SAMPLES, "a", encoding="utf-8") as file:
            for number, batch in enumerate(batches[len(done) :], len(done)):
                set_seed(int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4]))
                rows = list(_draw(model, benchmark, form, settings, batch, tokens))
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
                on_rows(rows)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes from drawing into a folder; a killed one lets go of it."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"another process draws samples into {str(folder)!r}; wait for it, or give another `output_dir`."
        ) from error


def _draw(model, benchmark, form, settings, batch, tokens) -> Iterator[dict[str, Any]]:
    settings = CompletionSettings(**{**vars(settings), "num_samples": batch.count})
    found = draw_completions(model, [tokens[task.task_id] for task in batch.tasks], settings)
    for task, completions in zip(batch.tasks, found, strict=True):
        for sample, completion in enumerate(completions, batch.first):
            yield {
                **sample_of(task, form, completion.text).row(task.task_id),
                "sample": sample,
                "tokens": len(completion.token_ids),
                "finished": completion.finished,
            }


def _prompt_tokens(model, benchmark: Benchmark, form: str, settings: CompletionSettings) -> dict[str, list[int]]:
    """Tokens of each task's prompt; all are made before anything is drawn."""
    tokenizer, most = model.tokenizer, context_length(model.pretrained_model)
    found = {}
    for task in benchmark.tasks:
        text = render_prompt(task, benchmark.kind, form, tokenizer, benchmark.shots)
        ids = tokenizer(text, add_special_tokens=form != "chat").input_ids
        if most is not None and len(ids) + settings.max_new_tokens > most:
            raise ValueError(
                f"`max_new_tokens` is {settings.max_new_tokens} and the prompt of {task.task_id!r} has {len(ids)} "
                f"tokens, more than the model's context of {most} together; lower `max_new_tokens`."
            )
        found[task.task_id] = ids
    return found


def _fingerprint(tokens: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()[:16]


def _resume(folder: Path, run: dict[str, Any], batches: Sequence[Batch]) -> list[list[dict[str, Any]]]:
    """Rows of the batches that the folder holds whole, after what stands behind them is cut off."""
    about, samples = folder / RUN, folder / SAMPLES
    if not about.exists():
        if samples.exists():
            raise ValueError(f"{samples} exists, but no {RUN} that says what it is of; give another `output_dir`.")
        about.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        return []
    _check_same(folder, _parsed(about.read_bytes(), about), run)
    lines = samples.read_bytes().splitlines(keepends=True) if samples.exists() else []
    done, end = [], 0
    for batch in batches:
        size = len(batch.tasks) * batch.count
        found = lines[end : end + size]
        if len(found) < size or not found[-1].endswith(b"\n"):
            break
        rows = [_parsed(line, samples) for line in found]
        planned = [(task.task_id, batch.first + i) for task in batch.tasks for i in range(batch.count)]
        whole = all(_FACTS.issubset(row) and Sample.of_row(row) for row in rows)
        if [(row.get("task_id"), row.get("sample")) for row in rows] != planned or not whole:
            raise ValueError(
                f"{samples} is damaged (line {end + 1} and on are not the samples of {planned[0][0]!r} that were to "
                "stand there); give another `output_dir`, or delete this one."
            )
        done.append(rows)
        end += size
    if lines[end:]:
        os.truncate(samples, sum(map(len, lines[:end])))
    return done


def _parsed(text: bytes, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if not isinstance(found, dict) or not isinstance(found.get("settings", {}), dict):
            raise ValueError("not the mapping that it was")
        return found
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); give another `output_dir`, or delete this one.") from error


def _check_same(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    flat = [{**run, **run.get("settings", {})} for run in (was, now)]
    for name in flat[1]:
        if name != "settings" and flat[0].get(name) != flat[1][name]:
            raise ValueError(
                f"{str(folder)!r} holds samples of another run, of which `{name}` was {flat[0].get(name)!r} and not "
                f"{flat[1][name]!r}; give another `output_dir`, or delete this one."
            )
