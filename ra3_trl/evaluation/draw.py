"""Draws samples for a benchmark, batch by batch, into a file that a killed run goes on with.

The batches follow from the benchmark and the settings alone, and each has a seed of its own. So the file of a run that
was killed and went on is that of one left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock, Timeout
from transformers import set_seed

from ..generation import (
    AutoModelForCausalLMWithAbstractionHead,
    Completion,
    CompletionSettings,
    VLLMEngine,
    draw_completions,
)
from ..models import context_length
from ..segmentation import prompt_ids
from .prompts import PROMPT_FORMS, render_prompt, sample_of, stop_strings
from .samples import Sample
from .tasks import Benchmark, Task


SAMPLES, RUN = "samples.jsonl", "run.json"
Sampler: TypeAlias = AutoModelForCausalLMWithAbstractionHead | VLLMEngine


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field whose help is written once, here; `ra3 evaluate` and `ra3 compare` have a flag for each."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class EvaluationSettings:
    """How samples of a benchmark are drawn; docs/evaluation.md says more of prompts and thinking.

    Raises:
        `ValueError`: for a number out of its range, or an unknown `think` or `prompt_form`.
    """

    num_samples: int = _option(1, "samples of each task")
    temperature: float | None = _option(None, "0 takes the likeliest token (default: 0 for one sample, else 0.8)")
    top_p: float = _option(0.95, "at a temperature above 0")
    max_new_tokens: int = _option(512, "of a completion, latents counted")
    think: str = _option(
        "auto", "latents where the checkpoint wants them (one that RA3 did not train writes what it likes), at every "
        "boundary, or nowhere, which bans all own-line comments", ("auto", "always", "never"),
    )  # fmt: skip
    threshold: float | None = _option(None, "with `auto`: think where P(think) is at least this")
    prompt_form: str = _option("complete", "how tasks are put", PROMPT_FORMS)
    batch_size: int = _option(32, "completions at a time")
    seed: int = _option(42, "of the draws")
    backend: str = _option(
        "transformers", "what draws them; vLLM is the extra ra3-trl[vllm]", ("transformers", "vllm")
    )

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` is {self.batch_size}; use at least 1.")
        if self.backend not in ("transformers", "vllm"):
            raise ValueError(f"`backend` is {self.backend!r}; use 'transformers' or 'vllm'.")
        self.completions("mbpp")  # checks the others; all forms are for MBPP

    def completions(self, kind: str, trained: bool = True) -> CompletionSettings:
        """The settings of completions for tasks of a kind, by a model that RA3 `trained` or not.

        Raises:
            `ValueError`: for a `prompt_form` that is not for tasks of this kind.
        """
        temperature = self.temperature
        if temperature is None:
            temperature = 0.0 if self.num_samples == 1 else 0.8
        return CompletionSettings(
            self.num_samples, temperature, top_p=self.top_p if temperature else 1.0,
            max_new_tokens=self.max_new_tokens, stop=stop_strings(kind, self.prompt_form),
            think=self.think if trained or self.think != "auto" or self.threshold is not None else None,
            threshold=self.threshold, prompt_is_code=self.prompt_form == "complete",
        )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Tasks whose completions number `first` to `first + count` are drawn at once."""

    tasks: tuple[Task, ...]
    first: int
    count: int


def plan_batches(benchmark: Benchmark, num_samples: int, batch_size: int) -> list[Batch]:
    """Cuts `num_samples` of every task into batches of at most `batch_size` completions; tasks of like length stand
    together, the longest first, so that what does not fit into memory shows at once."""
    tasks = sorted(benchmark.tasks, key=lambda task: (-len(task.prompt), task.task_id))
    batches = []
    for first in range(0, num_samples, batch_size):
        count = min(batch_size, num_samples - first)
        step = batch_size // count
        batches += [Batch(tuple(tasks[i : i + step]), first, count) for i in range(0, len(tasks), step)]
    return batches


def draw_samples(
    model: Sampler,
    benchmark: Benchmark,
    settings: EvaluationSettings,
    completions: CompletionSettings,
    folder: Path,
    about: Mapping[str, Any],
) -> Generator[list[dict[str, Any]], None, None]:
    """Draws what is missing of `folder/samples.jsonl`, and yields the rows of each batch, those of a former run first.

    A row is that of [`Sample`] with the number `sample`, `tokens` and `finished`. `completions` are those of
    `settings` for this model; `about` is what else samples depend on, and `run.json` gets all of it.

    Raises:
        `ValueError`: if the folder holds samples of another run, or another process draws into it, or a prompt and
            its completion exceed the context.
    """
    tokens = _prompt_tokens(model, benchmark, settings.prompt_form, completions)
    run = {**about, "settings": asdict(completions), "form": settings.prompt_form}
    run |= {"batch_size": settings.batch_size, "seed": settings.seed, "num_tasks": len(benchmark.tasks)}
    run["backend"] = settings.backend
    run["prompts"] = hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()[:16]
    batches = plan_batches(benchmark, settings.num_samples, settings.batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)  # a killed process lets go of it
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another process draws samples into {str(folder)!r}; wait for it, or give another `output_dir`."
        ) from error
    try:
        done = _resume(folder, json.loads(json.dumps(run)), batches)
        yield from done
        with open(folder / SAMPLES, "a", encoding="utf-8") as file:
            for number, batch in enumerate(batches[len(done) :], len(done)):
                # By the batch's number, not by what was drawn before it: a resumed run has not drawn that.
                seed = int.from_bytes(hashlib.sha256(f"{settings.seed} {number}".encode()).digest()[:4])
                drawn = replace(completions, num_samples=batch.count)
                texts = _draw(model, [tokens[task.task_id] for task in batch.tasks], drawn, seed)
                rows = [
                    {**sample_of(task, settings.prompt_form, completion.text).row(task.task_id), "sample": sample,
                     "tokens": len(completion.token_ids), "finished": completion.finished}
                    for task, of_task in zip(batch.tasks, texts, strict=True)
                    for sample, completion in enumerate(of_task, batch.first)
                ]  # fmt: skip
                file.write("".join(json.dumps(row) + "\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
                yield rows
    finally:
        lock.release()


def _draw(
    model: Sampler, prompts: list[list[int]], completions: CompletionSettings, seed: int
) -> list[list[Completion]]:
    if isinstance(model, VLLMEngine):
        return model.draw(prompts, completions, seed)
    set_seed(seed)
    return draw_completions(model, prompts, completions)


def _prompt_tokens(
    model: Sampler, benchmark: Benchmark, form: str, settings: CompletionSettings
) -> dict[str, list[int]]:
    """Tokens of each task's prompt; all are made before anything is drawn."""
    tokenizer = model.tokenizer
    most = model.context_length if isinstance(model, VLLMEngine) else context_length(model.pretrained_model)
    if tokenizer is None:
        raise ValueError("`model` has no tokenizer, by which prompts are read; make it with `tokenizer`.")
    tokens = {}
    for task in benchmark.tasks:
        text = render_prompt(task, benchmark.kind, form, tokenizer, benchmark.shots)
        ids = tokens[task.task_id] = prompt_ids(tokenizer, text, form != "chat")
        if most is not None and len(ids) + settings.max_new_tokens > most:
            raise ValueError(
                f"`max_new_tokens` is {settings.max_new_tokens} and the prompt of {task.task_id!r} has {len(ids)} "
                f"tokens, more than the model's context of {most} together; lower `max_new_tokens`."
            )
    return tokens


def _resume(folder: Path, run: dict[str, Any], batches: Sequence[Batch]) -> list[list[dict[str, Any]]]:
    """Rows of the batches that the folder holds whole, after what stands behind them is cut off."""
    about, samples = folder / RUN, folder / SAMPLES
    if not about.exists():
        if samples.exists():
            raise ValueError(f"{samples} exists, but no {RUN} that says what it is of; give another `output_dir`.")
        about.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
        return []
    _check_same(folder, _parse(about.read_bytes(), about), run)
    lines = samples.read_bytes().splitlines(keepends=True) if samples.exists() else []
    done, end = [], 0
    for batch in batches:
        planned = [(task.task_id, batch.first + i) for task in batch.tasks for i in range(batch.count)]
        of_batch = lines[end : end + len(planned)]
        # A kill may leave a part of a batch, or of a line; the batch is drawn anew, by its own seed.
        if len(of_batch) < len(planned) or not of_batch[-1].endswith(b"\n"):
            break
        rows = [_parse(line, samples) for line in of_batch]
        whole = all({"tokens", "finished"} <= set(row) and Sample.of_row(row) for row in rows)
        if [(row.get("task_id"), row.get("sample")) for row in rows] != planned or not whole:
            raise ValueError(
                f"{samples} is damaged (line {end + 1} and on are not the samples of {planned[0][0]!r} that were to "
                "stand there); give another `output_dir`, or delete this one."
            )
        done.append(rows)
        end += len(planned)
    if lines[end:]:
        os.truncate(samples, sum(map(len, lines[:end])))
    return done


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or not isinstance(content.get("settings", {}), dict):
            raise ValueError("not the mapping that it was")
        return content
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); give another `output_dir`, or delete this one.") from error


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    was = {"backend": "transformers", **before, **before.get("settings", {})}  # there was no other
    for name, value in {**now, **now["settings"]}.items():
        if name != "settings" and was.get(name) != value:
            raise ValueError(
                f"{str(folder)!r} holds samples of another run, of which `{name}` was {was.get(name)!r} and not "
                f"{value!r}; give another `output_dir`, or delete this one."
            )
