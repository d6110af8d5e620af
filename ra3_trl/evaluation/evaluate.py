"""pass@k of a checkpoint, or of samples that were drawn elsewhere: what `ra3 evaluate` does, as functions."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm.auto import tqdm

from ..files import fingerprint, public_name
from ..generation import AutoModelForCausalLMWithAbstractionHead, VLLMEngine
from ..models import load_tokenizer
from ..sandbox import Judge, Sandbox
from .draw import RUN, EvaluationSettings, draw_samples
from .results import RESULTS, Judged, check_k, read_results, submit, summarise, wait_for, write_results
from .samples import Sample, read_samples
from .tasks import Benchmark, load_benchmark


@dataclass(frozen=True)
class Checkpoint:
    """Names a checkpoint (a folder or Hub id), at which `revision`, in which `dtype` and whether with its own code."""

    name: str
    revision: str = "main"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def load(self) -> AutoModelForCausalLMWithAbstractionHead:
        """Loads it as [`load_checkpoint`] does."""
        return load_checkpoint(self.name, self.revision, self.dtype, self.trust_remote_code)


def evaluate_passk(
    model: str | Checkpoint | AutoModelForCausalLMWithAbstractionHead | VLLMEngine,
    task: str | Benchmark = "humaneval",
    settings: EvaluationSettings | None = None,
    k: Sequence[int] = (1,),
    output_dir: str | Path | None = None,
    judge: Judge | None = None,
    revision: str = "main",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Draws samples of a benchmark's tasks, judges them in the sandbox as they come, and estimates pass@k.

    Args:
        model (`str` or [`Checkpoint`] or [`AutoModelForCausalLMWithAbstractionHead`]):
            A checkpoint's folder or Hub id, with or without an abstraction head; or a model with its tokenizer. One
            whose code comes with its files is a `Checkpoint(name, trust_remote_code=True)`.
        task (`str` or [`Benchmark`], *optional*, defaults to `"humaneval"`):
            As for [`load_benchmark`], or what it returned.
        settings ([`EvaluationSettings`], *optional*):
            How samples are drawn. The default is one of each task, the likeliest.
        k (`Sequence[int]`, *optional*, defaults to `(1,)`):
            For which pass@k is estimated; none above the number of samples.
        output_dir (`str` or `Path`, *optional*):
            Gets `samples.jsonl` and `results.json`; with a part of the same samples, what is missing is drawn. `None`
            leaves nothing behind.
        judge ([`~ra3_trl.sandbox.Judge`], *optional*):
            Where programs run. The default has 3 seconds and 512 MiB for each, as many at a time as there are CPUs.
        revision (`str`, *optional*, defaults to `"main"`), dtype (`str`, *optional*, defaults to `"auto"`):
            Of a checkpoint that is named by a text.

    Returns:
        `dict[str, Any]`: what `results.json` holds: `pass@k` by k (a text), each with `value`, `low` and `high` (95 %
        interval by Wilson over problems), with EvalPlus's tests `plus_pass@k`; counts of verdicts; means over samples
        of tokens, latents and `think_rate` (latents for each line of code); `problems` with the numbers of each; `run`
        with what they depend on.

    Raises:
        `ValueError`: for settings that do not fit, a checkpoint whose latents are no comments of Python, and a folder
            with other samples.
        [`~ra3_trl.sandbox.SandboxError`]: without a sandbox.

    Example:

    ```python
    >>> settings = EvaluationSettings(num_samples=10, think="never")
    >>> evaluate_passk("qwen-ra3", "mbpp", settings, k=(1, 10))["pass@k"]["10"]["value"]
    ```
    """
    settings = EvaluationSettings() if settings is None else settings
    check_k(k, settings.num_samples)
    benchmark = load_benchmark(task) if isinstance(task, str) else task
    settings.completions(benchmark.kind)  # refuses a form that is not for such tasks before a model is loaded
    with ExitStack() as stack:
        folder = _folder(stack.enter_context(TemporaryDirectory()) if output_dir is None else output_dir)
        judge = stack.enter_context(Judge(Sandbox())) if judge is None else judge
        _check_folder(folder, None)
        if isinstance(model, str):
            model = Checkpoint(model, revision, dtype)
        if isinstance(model, Checkpoint) and settings.backend == "vllm":
            trust = {"trust_remote_code": model.trust_remote_code}
            model = VLLMEngine(model.name, model.revision, model.dtype, trust)
        if isinstance(model, VLLMEngine):
            settings, place = replace(settings, backend="vllm"), {"revision": model.revision}
            about: dict[str, Any] = {"checkpoint": public_name(model.name_or_path), **place, "dtype": model.dtype}
            about["weights"] = fingerprint(model.name_or_path, **place)
        elif isinstance(model, Checkpoint):
            place = {"revision": model.revision}
            about = {"checkpoint": public_name(model.name), **place, "dtype": model.dtype}
            name, model = model.name, model.load()
            about["weights"] = fingerprint(name, **place)
        else:
            about = {"checkpoint": public_name(model.name_or_path or "model"), "revision": None}
            about |= {"dtype": str(model.dtype).removeprefix("torch."), "weights": _weights(model.pretrained_model)}
        _check_format(model.settings)
        trained = model.settings is not None or model.abstraction_head.config.trained_on > 0
        completions = settings.completions(benchmark.kind, trained)
        tasks, start = {task.task_id: task for task in benchmark.tasks}, time.perf_counter()
        judged: list[Judged] = []
        bar = tqdm(total=len(tasks) * settings.num_samples, unit="sample", desc=benchmark.name)
        # Closed, so that it lets go of the folder even where judging fails and a notebook keeps the traceback.
        with bar, closing(draw_samples(model, benchmark, settings, completions, folder, about)) as batches:
            for rows in batches:
                # Not waited for: programs run in processes of their own while the next batch is drawn.
                for row in rows:
                    sample, facts = Sample.of_row(row), {"tokens": row["tokens"], "finished": row["finished"]}
                    assert sample is not None  # `draw_samples` has seen to it
                    judged.append(submit(judge, tasks[row["task_id"]], sample, **facts))
                bar.update(len(rows))
        run = {**about, "form": settings.prompt_form, "seed": settings.seed, "settings": vars(completions)}
        run["backend"] = settings.backend
        seconds = {"draw": time.perf_counter() - start}
        return _finish(judged, benchmark, k, folder, judge, run, seconds)


def evaluate_samples(
    path: str | Path,
    task: str | Benchmark = "humaneval",
    k: Sequence[int] = (1,),
    output_dir: str | Path | None = None,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Judges samples that were drawn elsewhere, as [`evaluate_passk`] does its own.

    Args:
        path (`str` or `Path`):
            As for [`read_samples`]; with as many samples of each task as the largest k.
        task, k, output_dir, judge:
            As for [`evaluate_passk`].

    Returns:
        `dict[str, Any]`: as of [`evaluate_passk`], without tokens.

    Raises:
        `ValueError`: for a file that does not fit, and a folder with results of other samples.
    """
    benchmark = load_benchmark(task) if isinstance(task, str) else task
    with ExitStack() as stack:
        folder = _folder(stack.enter_context(TemporaryDirectory()) if output_dir is None else output_dir)
        judge = stack.enter_context(Judge(Sandbox())) if judge is None else judge
        samples = read_samples(path, benchmark)
        check_k(k, min(map(len, samples.values())))
        # Before anything is judged: results of other samples stay.
        _check_folder(folder, path)
        judged = [submit(judge, task, sample) for task in benchmark.tasks for sample in samples[task.task_id]]
        run = {"samples": public_name(str(path)), "content": _content(path)}
        return _finish(judged, benchmark, k, folder, judge, run, {})


def _folder(output_dir: str | Path) -> Path:
    folder = Path(output_dir)
    if folder.is_file():
        raise ValueError(f"`output_dir` is {str(folder)!r}, a file; name a folder.")
    return folder


def _finish(
    judged: Sequence[Judged],
    benchmark: Benchmark,
    k: Sequence[int],
    folder: Path,
    judge: Judge,
    run: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Waits for the verdicts, and writes and returns the results."""
    start = time.perf_counter()
    rows = [wait_for(pending) for pending in tqdm(judged, unit="program", desc="verdicts")]
    seconds["judge"] = time.perf_counter() - start
    limits = {"seconds": judge.sandbox.limits.seconds, "memory_mb": judge.sandbox.limits.memory_mb}
    run |= {"tasks": benchmark.fingerprint, "limits": limits}
    folder.mkdir(parents=True, exist_ok=True)
    write_results({"task": benchmark.name, "run": run, "seconds": seconds, **summarise(rows, k)}, folder)
    return read_results(folder)  # with JSON's lists, as those of another day that they are compared with


def load_checkpoint(
    name: str, revision: str = "main", dtype: str = "auto", trust_remote_code: bool = False
) -> AutoModelForCausalLMWithAbstractionHead:
    """Loads a checkpoint with its head (a fresh one where it has none), tokenizer and the settings of its training."""
    place = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(name, place)  # first: it says best that there is no such checkpoint
    load = AutoModelForCausalLMWithAbstractionHead.from_pretrained
    model = load(name, tokenizer=tokenizer, dtype=dtype, **place)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _check_format(settings: Mapping[str, Any] | None) -> None:
    """Refuses latents that are not comments of Python: they would stand in the programs."""
    action_format = (settings or {}).get("action_format", "python")
    if action_format != "python":
        raise ValueError(
            f"the checkpoint was mid-trained with `action_format` {action_format!r}, whose latents are no comments of "
            "Python, so its programs could not be run; use one that was trained with 'python'."
        )


def _check_folder(folder: Path, samples: str | Path | None) -> None:
    """Refuses a folder with results of other samples, which would be written over."""
    if not (folder / RESULTS).is_file():
        return
    try:
        content = read_results(folder)["run"].get("content")
    except ValueError:  # damaged; what it was of is not known
        content = None
    if content != (samples and _content(samples)) or (samples is None) != (folder / RUN).is_file():
        raise ValueError(f"{str(folder)!r} holds results of other samples; give another `output_dir`, or delete it.")


def _content(path: str | Path) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()[:16]


def _weights(model: torch.nn.Module) -> str:
    """Tells the weights of a model in memory from others, by their bytes."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
