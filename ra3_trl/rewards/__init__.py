"""Safe execution of code that models write, verdicts that can't be forged, and rewards made of them."""

from .functions import (
    code_execution_reward,
    count_code_lines,
    extract_program,
    find_latents,
    format_reward,
    fraction_passed_reward,
    get_think_cost_reward,
    locate_answer,
    problem_columns,
    think_cost_reward,
    use_judge,
)
from .judge import VERDICTS, Judge, Problem, Result
from .sandbox import Limits, Sandbox, SandboxError


__all__ = [
    "VERDICTS",
    "Judge",
    "Limits",
    "Problem",
    "Result",
    "Sandbox",
    "SandboxError",
    "code_execution_reward",
    "count_code_lines",
    "extract_program",
    "find_latents",
    "format_reward",
    "fraction_passed_reward",
    "get_think_cost_reward",
    "locate_answer",
    "problem_columns",
    "think_cost_reward",
    "use_judge",
]
