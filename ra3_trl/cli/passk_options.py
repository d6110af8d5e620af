"""Options of `ra3 evaluate` and `ra3 compare`: tasks, how samples are drawn, how programs run, the model."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import get_type_hints

from ..evaluation import EvaluationSettings
from ..generation import VLLMEngine
from ..sandbox import Judge, Limits, Sandbox, SandboxError
from .checkpoint import add_model_options


_VLLM = {  # flags, as TRL calls them, and what they are for `vllm.LLM`
    "vllm_tensor_parallel_size": "tensor_parallel_size",
    "vllm_gpu_memory_utilization": "gpu_memory_utilization",
    "vllm_max_model_length": "max_model_len",
}


def add_passk_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that both commands have."""
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--task_file", help="file that has the problems of --task, in place of the Hub's")
    tasks.add_argument("--max_tasks", type=int, help="the first tasks only")
    drawn = parser.add_argument_group("samples")
    hints = get_type_hints(EvaluationSettings)
    for field in fields(EvaluationSettings):
        kind = next(kind for kind in (int, float, str) if hints[field.name] in (kind, kind | None))
        default = "" if field.default is None else " (default: %(default)s)"
        choices, text = field.metadata["choices"], field.metadata["help"] + default
        drawn.add_argument(f"--{field.name}", type=kind, default=field.default, choices=choices, help=text)
    vllm = parser.add_argument_group("vLLM", "of use with --backend vllm")
    vllm.add_argument(
        "--vllm_tensor_parallel_size", type=int, help="GPUs that share a copy of the weights (default: 1)"
    )
    vllm.add_argument("--vllm_gpu_memory_utilization", type=float, help="share of a GPU that it takes (default: 0.9)")
    vllm.add_argument(
        "--vllm_max_model_length", type=int, help="tokens of prompt and completion (default: the model's)"
    )
    judged = parser.add_argument_group("programs")
    judged.add_argument("--timeout", type=float, default=3.0, help="seconds of a program (default: %(default)s)")
    judged.add_argument("--memory_mb", type=int, default=512, help="MiB of a program (default: %(default)s)")
    judged.add_argument("--slots", type=int, help="programs at a time (default: one for each CPU)")
    add_model_options(parser, dtype="auto")


def read_settings(options: argparse.Namespace) -> EvaluationSettings:
    """The settings of samples that the options make."""
    return EvaluationSettings(**{field.name: vars(options)[field.name] for field in fields(EvaluationSettings)})


def model_of(checkpoint: str, options: argparse.Namespace) -> str | VLLMEngine:
    """What draws the samples of a checkpoint: its name, or with `--backend vllm` its engine.

    Raises:
        `ValueError`: for vLLM's options without vLLM.
    """
    words = {flag: value for flag in _VLLM if (value := vars(options)[flag]) is not None}
    if options.backend == "vllm":
        engine_options = {_VLLM[flag]: value for flag, value in words.items()}
        return VLLMEngine(checkpoint, options.model_revision, options.dtype, engine_options)
    for flag, value in words.items():
        raise ValueError(f"`{flag}` is {value!r} and `backend` is {options.backend!r}; use 'vllm', or leave it out.")
    return checkpoint


def read_ks(text: str) -> list[int]:
    """`"5,1,5"` as `[1, 5]`."""
    try:
        return sorted({int(number) for number in text.split(",")})
    except ValueError as error:
        raise ValueError(f"`k` is {text!r}; give numbers with commas, such as 1,5.") from error


@contextmanager
def open_judge(limits: Limits, slots: int | None) -> Iterator[Judge]:
    """Opens a judge; a sandbox that does not work is an `OSError`, which the command line shows without traceback."""
    try:
        with Judge(Sandbox(slots, limits)) as judge:
            yield judge
    except SandboxError as error:
        raise OSError(str(error)) from error
