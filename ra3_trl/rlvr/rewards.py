"""Rewards for RLVR with TRL's signature: pass them to any `GRPOTrainer` as `reward_funcs`.

What a completion must do stands in the data set's columns, which TRL passes on: `test` and `entry_point` (HumanEval),
`test_list` with `test_setup_code` or `test_imports` (MBPP), or `inputs` and `outputs`. A row without any gets `None`,
which TRL leaves out.

Metrics go through TRL's `log_metric`, one call for each completion (or latent): TRL takes the mean over all calls of
all processes, so it is right however completions are spread.
"""

from __future__ import annotations

import ast
import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..evaluation.answers import Text, extract_program, locate_answer, parse_program
from ..sandbox import Judge, Problem, Result
from ..segmentation import count_code_lines, own_line_comments


COLUMNS = ("test", "entry_point", "test_list", "test_setup_code", "test_imports", "inputs", "outputs", "inside")
TESTS = ("test", "test_list", "inputs")  # a row has tests where one of these is not empty
_judges: dict[int, Judge] = {}  # by process: a forked one must not share its parent's


def use_judge(judge: Judge | None) -> None:
    """Makes the rewards of this process use a [`~ra3_trl.sandbox.Judge`], for limits and slots of your own. `None` is
    one of the default limits, made when it is needed; a former one is not closed."""
    _judges.pop(os.getpid(), None)
    if judge is not None:
        _judges[os.getpid()] = judge


async def code_execution_reward(
    completions: Sequence[Text],
    prompts: Sequence[Text] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """Gives 1.0 to a program that passes all its tests, 0.0 to any other.

    Programs run side by side in the sandbox; one that another reward has run already is not run again.

    Args:
        completions (`Sequence[str]` or `Sequence[list[dict]]`):
            Completions, plain or conversational; see [`extract_program`].
        prompts (`Sequence[str]` or `Sequence[list[dict]]`, *optional*):
            Their prompts.
        log_metric (`Callable`, *optional*):
            TRL's; gets `pass_rate`, the share of programs that pass, of those that have tests.
        **kwargs:
            The data set's columns.

    Returns:
        `list[float | None]`: one reward for each completion, `None` for a row without tests.

    Raises:
        `ValueError`: for tests that can't be read, before any program runs.
    """
    results = await _judge(completions, prompts, kwargs)
    rewards = [None if result is None else float(result.verdict == "passed") for result in results]
    for reward in rewards:
        if reward is not None and log_metric is not None:
            log_metric("pass_rate", reward)
    return rewards


async def fraction_passed_reward(
    completions: Sequence[Text], prompts: Sequence[Text] | None = None, **kwargs
) -> list[float | None]:
    """Gives the share of a program's tests that hold: of its `assert`s as they stand in the source, or of its cases.

    Takes, returns and raises what [`code_execution_reward`] does.
    """
    results = await _judge(completions, prompts, kwargs)
    return [None if result is None else result.passed / result.total for result in results]


async def _judge(completions: Sequence[Text], prompts: Sequence[Text] | None, kwargs: dict) -> list[Result | None]:
    pairs = _pairs(prompts, completions)
    columns = {name: kwargs[name] for name in COLUMNS if name in kwargs}
    rows = [{name: column[i] for name, column in columns.items()} for i in range(len(completions))]
    problems = [
        Problem.from_row({**row, "prompt": prompt}) if any(row.get(name) is not None for name in TESTS) else None
        for row, (prompt, _) in zip(rows, pairs, strict=True)
    ]
    if not any(problems):
        raise ValueError(f"`code_execution_reward` finds no tests; the data set needs some of the columns {COLUMNS}.")
    judge = _judges.get(os.getpid())
    if judge is None:
        judge = _judges[os.getpid()] = Judge()
    # All are handed in before the first is waited for, so that the sandbox's slots are never idle.
    futures = [
        None if problem is None else asyncio.wrap_future(judge.submit(problem, extract_program(prompt, text)))
        for problem, (prompt, text) in zip(problems, pairs, strict=True)
    ]
    return [None if future is None else await future for future in futures]


def _pairs(prompts: Sequence[Text] | None, completions: Sequence[Text]) -> list[tuple[Text | None, Text]]:
    none: list[Text | None] = [None] * len(completions)
    return list(zip(prompts or none, completions, strict=True))


def format_reward(
    completions: Sequence[Text], prompts: Sequence[Text] | None = None, entry_point: Sequence | None = None, **kwargs
) -> list[float]:
    """Gives 1.0 to a program that parses as Python and defines its `entry_point`, where one is named; 0.0 to any
    other. Takes and returns what [`code_execution_reward`] does."""
    rows = zip(_pairs(prompts, completions), entry_point or [None] * len(completions), strict=True)
    return [float(_defines(extract_program(prompt, text), name)) for (prompt, text), name in rows]


def _defines(source: str, name: str | None) -> bool:
    if (tree := parse_program(source)) is None:
        return False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return name is None or any(isinstance(node, kinds) and node.name == name for node in ast.walk(tree))


def get_think_cost_reward(cost: float = 0.01) -> Callable[..., list[float]]:
    """Makes a reward by which latents cost something.

    Args:
        cost (`float`, *optional*, defaults to `0.01`):
            What one latent costs, in units of the other rewards.

    Returns:
        `Callable`: the reward function; minus `cost` for each latent of a completion, that is each own-line comment.
        It gives TRL's `log_metric` the `think_rate` (latents for each line of code, mean over completions) and, where
        a [`CompletionRollout`] passes `latent_lengths`, the mean `latent_length` in tokens.

    Raises:
        `ValueError`: for a negative cost.
    """
    if not cost >= 0:
        raise ValueError(f"`cost` is {cost}; a latent costs at least 0.")

    def think_cost_reward(
        completions: Sequence[Text],
        prompts: Sequence[Text] | None = None,
        latent_lengths: Sequence[Sequence[int]] = (),
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float]:
        answers = [locate_answer(prompt, text) for prompt, text in _pairs(prompts, completions)]
        counts = [len(own_line_comments(program, begin)) for program, begin in answers]
        if log_metric:
            for count, (program, begin) in zip(counts, answers, strict=True):
                log_metric("think_rate", count / max(1, count_code_lines(program, begin)))
            for length in (length for lengths in latent_lengths for length in lengths):
                log_metric("latent_length", length)
        # Not `-cost * count`, which is -0.0 where there is none.
        return [0.0 - cost * count for count in counts]

    return think_cost_reward


think_cost_reward = get_think_cost_reward()
EXECUTED = (code_execution_reward, fraction_passed_reward)  # those that run programs
REWARDS = {func.__name__.removesuffix("_reward"): func for func in (*EXECUTED, format_reward)}


def problem_columns(problem: Problem) -> dict[str, Any]:
    """Turns a [`~ra3_trl.sandbox.Problem`] into the columns of a row from which the rewards read it, `from_row`
    backwards: `inputs` and `outputs`, or `test_list`, `test_setup_code`, `entry_point` and `inside`."""
    if problem.cases:
        inputs, outputs = zip(*problem.cases, strict=True)
        return {"inputs": list(inputs), "outputs": list(outputs)}
    return {
        "test_list": list(problem.tests), "test_setup_code": problem.setup, "entry_point": problem.entry_point,
        "inside": problem.inside,
    }  # fmt: skip
