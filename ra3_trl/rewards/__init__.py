"""Rewards for RL post-training on code, made of the sandbox's verdicts and of what latents cost."""

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


__all__ = [
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
