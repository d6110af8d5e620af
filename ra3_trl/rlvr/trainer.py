"""TRL's `GRPOTrainer` on programs and their tests, from any checkpoint of a causal language model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import TrainerCallback
from transformers.utils import find_adapter_config_file
from trl import GRPOConfig, GRPOTrainer

from ..config_fields import model_options
from ..config_file import read_settings, write_settings
from ..generation.vllm_engine import thinking_engines
from ..hub import PushMixin
from ..markdown import cell
from ..models import context_length, load_tokenizer, place_of
from ..segmentation import prompt_ids
from .data import RLVRData, check_rows
from .rewards import EXECUTED, code_execution_reward, get_think_cost_reward
from .rollout import CompletionRollout, check_heeded, until_stop
from .vllm_rollout import watch_server


def build_grpo_trainer(
    model: str,
    args: GRPOConfig,
    data: RLVRData,
    reward_funcs: Sequence[Callable[..., Any]] = (code_execution_reward,),
    *,
    think: str = "auto",
    think_cost: float = 0.0,
    allow_test_tasks: bool = False,
    peft_config: PeftConfig | None = None,
) -> GRPOTrainer:
    """Builds a [`~trl.GRPOTrainer`] whose completions end at stops, think where they are told to and run in the
    sandbox. What can be known to fail fails before the model loads.

    `ra3_config.json` of a checkpoint that has one is copied to the output when training ends: what a latent looks like
    has not changed. An abstraction head is not: it reads hidden states of the weights as they were.

    Args:
        model (`str`):
            Folder or Hub id. An adapter's is loaded with its base, to be trained further.
        args ([`~trl.GRPOConfig`]):
            TRL's settings, not changed here; `model_init_kwargs` go to `from_pretrained`.
        data ([`RLVRData`]):
            Rows and stops; the evaluation rows are of use with `eval_strategy`.
        reward_funcs (`Sequence[Callable]`, *optional*, defaults to `(code_execution_reward,)`):
            Reward functions, weighed by `args.reward_weights`.
        think (`str`, *optional*, defaults to `"auto"`):
            `"auto"` leaves latents to the model, `"always"` puts one at every boundary, `"never"` bans them.
        think_cost (`float`, *optional*, defaults to `0.0`):
            What a latent costs, a further reward with weight 1; at 0 they are logged all the same.
        allow_test_tasks (`bool`, *optional*, defaults to `False`):
            Train on rows that by their ids are of HumanEval or of MBPP's test split.
        peft_config ([`~peft.PeftConfig`], *optional*):
            A new adapter.

    Raises:
        `ValueError`: for settings that the rollouts do not heed, weights that do not fit, rows that can't be trained
        on or leave no room for a completion, and checkpoints whose latents are no comments of Python.
        `OSError`: where vLLM does not start, or its server can't be used.

    Example:

    ```python
    >>> trainer = build_grpo_trainer("qwen-ra3", GRPOConfig("qwen-ra3-rlvr"), load_tasks("mbpp"), think="always")
    ```
    """
    check_heeded(args)
    args = copy(args)
    options: dict[str, Any] = model_options(args.model_init_kwargs)
    if getattr(args, "trust_remote_code", False):  # of newer versions of TRL
        options = {"trust_remote_code": True} | options
    tokenizer = load_tokenizer(model, options)  # first, since it says best that there is no such checkpoint
    settings = read_settings(model, **place_of(options))
    rollout = CompletionRollout.for_checkpoint(settings, data.stop, think)
    if args.reward_weights is not None:
        if len(args.reward_weights) != len(reward_funcs):
            raise ValueError(
                f"`reward_weights` are {args.reward_weights} and there are {len(reward_funcs)} `reward_funcs`; give "
                "one weight for each. What latents cost is `think_cost`."
            )
        args.reward_weights = [*args.reward_weights, 1.0]
    rewards = [until_stop(func) for func in (*reward_funcs, get_think_cost_reward(think_cost))]
    executed_by = next((func.__name__ for func in reward_funcs if func in EXECUTED), None)
    evaluation = None
    if args.eval_strategy != "no":
        if data.evaluation is None:
            raise ValueError(
                "`eval_strategy` is set and there is no evaluation data; leave it out, or pass data that has a split "
                "to evaluate on (`dataset_test_split`)."
            )
        evaluation = check_rows(data.evaluation, executed_by, allow_test_tasks=True)
    train = check_rows(data.train, executed_by, allow_test_tasks)
    policy = _load_policy(model, options)
    # TRL takes them for a name only.
    args.model_init_kwargs = options if isinstance(policy, str) else None
    # Of a server who starts it says which logits processors it has; see docs/scale.md.
    makes_engine = args.use_vllm and args.vllm_mode == "colocate"
    with warnings.catch_warnings(), thinking_engines() if makes_engine else nullcontext():
        # It says that trl may change this; which versions of trl work is for this package to say and to test.
        warnings.filterwarnings("ignore", "You are using 'rollout_func'")
        try:
            trainer = _CarefulGRPOTrainer(
                policy, rewards, args, train, evaluation, tokenizer, peft_config=peft_config, rollout_func=rollout,
                callbacks=[] if settings is None else [_CarrySettings(settings)],
            )  # fmt: skip
        except RuntimeError as error:  # an engine that does not start, a server that TRL can't send weights to
            if not args.use_vllm:
                raise
            raise OSError(f"`use_vllm` is True and the trainer does not start: {error}") from error
    if args.use_vllm and not makes_engine:
        watch_server(trainer)
    _check_lengths(trainer)
    return trainer


def _load_policy(name: str, options: dict[str, Any]) -> str | PeftModel:
    """`name`, for TRL to load; an adapter, which would come frozen that way, is loaded here with its base."""
    if find_adapter_config_file(name, **place_of(options)) is None:
        return name
    return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options)


def _check_lengths(trainer: GRPOTrainer) -> None:
    """Refuses prompts that leave no room for a completion; of chats and streams nothing is known yet."""
    most, room = context_length(trainer.accelerator.unwrap_model(trainer.model)), trainer.args.max_completion_length
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        if most is None or not isinstance(rows, Dataset) or not isinstance(rows[0]["prompt"], str):
            continue
        lengths = [len(prompt_ids(trainer.processing_class, prompt)) for prompt in rows["prompt"]]
        if max(lengths) + room > most:
            raise ValueError(
                f"`max_completion_length` is {room} and the prompt of row {lengths.index(max(lengths))} has "
                f"{max(lengths)} tokens, more than the model's context of {most} together; lower it or leave the row "
                "out."
            )


class _CarefulGRPOTrainer(PushMixin, GRPOTrainer):
    """TRL's trainer, whose `training_args.bin`, a pickle of the settings, holds no token; it pushes as
    [`RA3MidTrainer`] does, and names on its card are no markup."""

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        shown = cell(model_name or Path(self.args.output_dir).name, 200)
        super().create_model_card(shown, dataset_name and cell(dataset_name, 200), tags)

    # Private, since the pickle is written here.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        args = self.args
        self.args = copy(args)
        self.args.hub_token = None
        self.args.model_init_kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k != "token"} or None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args


class _CarrySettings(TrainerCallback):
    """Writes the settings of the checkpoint that was trained further to the output."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings

    def on_train_end(self, args, state, control, **kwargs) -> None:
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_settings(self.settings, args.output_dir)
