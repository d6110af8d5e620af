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
import io
import os
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..sandbox import Judge, Problem, Result


COLUMNS = ("test", "entry_point", "test_list", "test_setup_code", "test_imports", "inputs", "outputs", "inside")
Text = str | list[dict[str, Any]]
_CODE = (ast.Constant, ast.Call, ast.Await)  # expressions that are statements; `Fibonacci` and `top-k` are words
_judges: dict[int, Judge] = {}  # by process: a forked one must not share its parent's


def use_judge(judge: Judge | None) -> None:
    """Makes the rewards of this process use `judge`, for limits and slots of your own.

    Args:
        judge ([`Judge`], *optional*):
            The judge; `None` is one of the default limits, made when it is needed. A former one is not closed.
    """
    if judge is None:
        _judges.pop(os.getpid(), None)
    else:
        _judges[os.getpid()] = judge


async def code_execution_reward(
    completions: Sequence[Text],
    prompts: Sequence[Text] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float | None]:
    """1.0 for a program that passes all its tests, 0.0 for any other.

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
    results = await _results(completions, prompts, kwargs)
    rewards = [None if found is None else float(found.verdict == "passed") for found in results]
    for reward in rewards if log_metric else ():
        if reward is not None:
            log_metric("pass_rate", reward)
    return rewards


async def fraction_passed_reward(
    completions: Sequence[Text], prompts: Sequence[Text] | None = None, **kwargs
) -> list[float | None]:
    """Share of a program's tests that hold: of its `assert`s as they stand in the source, or of its cases.

    Takes, returns and raises what [`code_execution_reward`] does.
    """
    results = await _results(completions, prompts, kwargs)
    return [None if found is None else found.passed / found.total for found in results]


def format_reward(
    completions: Sequence[Text], prompts: Sequence[Text] | None = None, entry_point: Sequence | None = None, **kwargs
) -> list[float]:
    """1.0 for a program that parses as Python and defines its entry point, where one is named; 0.0 for any other.

    Args:
        completions (`Sequence[str]` or `Sequence[list[dict]]`):
            Completions, plain or conversational.
        prompts (`Sequence[str]` or `Sequence[list[dict]]`, *optional*):
            Their prompts.
        entry_point (`Sequence[str]`, *optional*):
            Names of the functions to be defined.
        **kwargs:
            Not used.

    Returns:
        `list[float]`: one reward for each completion.
    """
    count = len(completions)
    rows = zip(prompts or [None] * count, completions, entry_point or [None] * count, strict=True)
    return [float(_defines(extract_program(prompt, text), name)) for prompt, text, name in rows]


def get_think_cost_reward(cost: float = 0.01) -> Callable[..., list[float]]:
    """A reward that makes latents cost something.

    Args:
        cost (`float`, *optional*, defaults to `0.01`):
            What one latent costs, in units of the other rewards.

    Returns:
        `Callable`: the reward function; minus `cost` for each latent of a completion, that is each own-line comment.
        It gives TRL's `log_metric` the `think_rate` (latents for each line of code, mean over completions) and, where
        a [`~ra3_trl.generation.CompletionRollout`] passes `latent_lengths`, the mean `latent_length` in tokens.

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
        pairs = zip(prompts or [None] * len(completions), completions, strict=True)
        answers = [locate_answer(prompt, text) for prompt, text in pairs]
        counts = [len(find_latents(program, begin)) for program, begin in answers]
        if log_metric:
            for count, (program, begin) in zip(counts, answers, strict=True):
                log_metric("think_rate", count / max(1, count_code_lines(program[begin:])))
            for length in (length for lengths in latent_lengths for length in lengths):
                log_metric("latent_length", length)
        return [0.0 - cost * count for count in counts]

    return think_cost_reward


think_cost_reward = get_think_cost_reward()


def extract_program(prompt: Text | None, completion: Text) -> str:
    """The program in a completion.

    Args:
        prompt (`str` or `list[dict]`, *optional*):
            The prompt. Where it is the beginning of a program, the completion goes on with it, as it stands: what
            `ra3 evaluate` makes of its `complete` prompts.
        completion (`str` or `list[dict]`):
            The completion. Of an answer with fenced code (three backticks) the last block is the program.

    Returns:
        `str`: the program's source.

    Example:

    ```python
    >>> extract_program("def f(x):\\n", "    return x\\n")
    'def f(x):\\n    return x\\n'
    ```
    """
    return locate_answer(prompt, completion)[0]


def locate_answer(prompt: Text | None, completion: Text) -> tuple[str, int]:
    """What [`extract_program`] returns, and the character of it at which the completion begins."""
    text = _content(completion)
    if isinstance(prompt, str) and (_begins_program(prompt) or _parses(prompt + text)):
        return prompt + text, len(prompt)
    blocks = re.findall(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", text, re.DOTALL | re.MULTILINE)
    return (blocks[-1] if blocks else text), 0


def find_latents(program: str, begin: int = 0) -> list[str]:
    """Own-line comments of a program from a character on, what stands behind their `#`. It is read from its start,
    since only that tells a comment from a string's row; one that is cut or no Python is read as far as it goes."""
    return list(_own_line_comments(program, begin))


def count_code_lines(text: str) -> int:
    """Number of rows that are neither blank nor an own-line comment."""
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in text.splitlines())


def problem_columns(problem: Problem) -> dict[str, Any]:
    """The columns of a data set's row from which the rewards read `problem`: [`Problem.from_row`] backwards.

    Args:
        problem ([`Problem`]):
            What a program must do.

    Returns:
        `dict[str, Any]`: `inputs` and `outputs`, or `test_list`, `test_setup_code`, `entry_point` and `inside`.
    """
    if problem.cases:
        inputs, outputs = zip(*problem.cases, strict=True)
        return {"inputs": list(inputs), "outputs": list(outputs)}
    return {
        "test_list": list(problem.tests), "test_setup_code": problem.setup, "entry_point": problem.entry_point,
        "inside": problem.inside,
    }  # fmt: skip


def _own_line_comments(text: str, begin: int) -> Iterator[str]:
    before = text[:begin].split("\n")
    first = len(before), len(before[-1])  # row, from 1, and column
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            own_line = token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip()
            if own_line and token.start >= first:
                yield token.string[1:]
    except (tokenize.TokenError, SyntaxError):
        pass


async def _results(completions: Sequence[Text], prompts: Sequence[Text] | None, kwargs: dict) -> list[Result | None]:
    columns = {name: kwargs[name] for name in COLUMNS if name in kwargs}
    prompts = prompts or [None] * len(completions)
    rows = [{name: column[i] for name, column in columns.items()} for i in range(len(completions))]
    problems = [
        Problem.from_row({**row, "prompt": prompt}) if _has_tests(row) else None
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    if not any(problems):
        raise ValueError(f"`code_execution_reward` finds no tests; the data set needs some of the columns {COLUMNS}.")
    judge = _judges.get(os.getpid())
    if judge is None:
        judge = _judges[os.getpid()] = Judge()
    futures = [
        problem and asyncio.wrap_future(judge.submit(problem, extract_program(prompt, text)))
        for problem, prompt, text in zip(problems, prompts, completions, strict=True)
    ]
    return [future and await future for future in futures]


def _has_tests(row: dict[str, Any]) -> bool:
    return any(row.get(name) is not None for name in ("test", "test_list", "inputs"))


def _content(text: Text) -> str:
    return text if isinstance(text, str) else "".join(message["content"] or "" for message in text)


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _begins_program(prompt: str) -> bool:
    """Whether a prompt is code that waits for more: a docstring, a function's head, ..., but no single word, although
    that parses too."""
    for indent in ("", "    ", "        "):
        source = f"{prompt.rstrip()}\n{indent}pass\n"
        if _parses(source):
            return not all(
                isinstance(node, ast.Pass) or isinstance(node, ast.Expr) and not isinstance(node.value, _CODE)
                for node in ast.parse(source).body
            )
    return False


def _defines(source: str, name: str | None) -> bool:
    if not _parses(source):
        return False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}
    return name is None or name in names
