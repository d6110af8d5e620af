"""RL from verifiable rewards on code by TRL's `GRPOTrainer`: its rewards, rollouts and data, and what joins them."""

from ..evaluation.answers import extract_program
from .data import RLVRData, load_tasks
from .rewards import (
    REWARDS,
    code_execution_reward,
    format_reward,
    fraction_passed_reward,
    get_think_cost_reward,
    problem_columns,
    think_cost_reward,
    use_judge,
)
from .rollout import CompletionRollout, until_stop
from .trainer import build_grpo_trainer


__all__ = [
    "REWARDS",
    "CompletionRollout",
    "RLVRData",
    "build_grpo_trainer",
    "code_execution_reward",
    "extract_program",
    "format_reward",
    "fraction_passed_reward",
    "get_think_cost_reward",
    "load_tasks",
    "problem_columns",
    "think_cost_reward",
    "until_stop",
    "use_judge",
]
