"""Rollouts of TRL's `GRPOTrainer` by `draw_completions`: stops, latents, and which tokens were the model's choice."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from accelerate.utils import DistributedType
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..evaluation.answers import Text, locate_answer
from ..generation import AutoModelForCausalLMWithAbstractionHead, Completion, CompletionSettings, draw_completions
from ..generation.requests import RequestThinking
from ..generation.vllm_engine import require_vllm
from ..models import AbstractionConfig, AbstractionHead, end_ids, state_width
from ..segmentation import find_format, own_line_comments, prompt_ids
from .vllm_rollout import draw_by_vllm


if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer

# Fields of `GRPOConfig` that change what is sampled and that `draw_completions` does not know, as they must be.
_NOT_HEEDED = {
    "use_transformers_continuous_batching": False, "min_p": None, "repetition_penalty": 1.0,
    "generation_kwargs": None, "cache_implementation": None, "vllm_structured_outputs_regex": None,
}  # fmt: skip


class CompletionRollout:
    """A `rollout_func` for [`~trl.GRPOTrainer`] whose completions end at stops and think where they are told to.

    Tokens that the model did not choose (the marker before a latent, what ends it) are masked from the loss. A
    completion that a stop ended gets an end-of-text token, masked too, by which TRL tells it from one that ran out of
    room. Wrap reward functions in [`until_stop`], so that they do not read the stop.

    Args:
        stop (`Sequence[str]`, *optional*):
            Texts that end a completion.
        think (`str`, *optional*):
            `"always"` puts a latent at every boundary, `"never"` bans them all; `None` leaves it to the model, and
            what is sampled is what is trained.
        action_format (`str`, *optional*, defaults to `"python"`):
            The format that the model was mid-trained with; of use with `think`.
        max_latent_length (`int`, *optional*, defaults to `12`):
            Most tokens of a latent with `think="always"`.

    Raises:
        `ValueError`: for another `think` or an empty stop; when it is called, for settings of the trainer that it does
        not heed, and where the trainer's model is sharded.

    Example:

    ```python
    >>> rollout = CompletionRollout(stop=("\\ndef ",), think="always")
    >>> GRPOTrainer(model, [until_stop(code_execution_reward)], args, data, rollout_func=rollout)
    ```
    """

    def __init__(
        self,
        stop: Sequence[str] = (),
        think: str | None = None,
        action_format: str = "python",
        max_latent_length: int = 12,
    ):
        if think not in (None, "always", "never"):
            raise ValueError(f"`think` is {think!r}; use 'always', 'never', or `None` to leave it to the model.")
        self.stop, self.think = tuple(stop), think
        self.latents = {"action_format": action_format, "max_latent_length": max_latent_length}
        CompletionSettings(stop=self.stop)  # checks it, as the next does
        AbstractionConfig(1, **self.latents)

    @classmethod
    def for_checkpoint(
        cls, settings: dict[str, Any] | None, stop: Sequence[str] = (), think: str = "auto"
    ) -> CompletionRollout:
        """Makes the rollout of a checkpoint that was mid-trained with `settings`, `None` for none.

        Raises:
            `ValueError`: for latents that are not comments of Python: they would stand in the programs.
        """
        latents = {k: settings[k] for k in ("action_format", "max_latent_length") if settings and k in settings}
        name = latents.get("action_format", "python")
        if name != "python" and (think != "auto" or find_format(name).tags):
            raise ValueError(
                f"the checkpoint was mid-trained with `action_format` {name!r}, whose latents are no comments of "
                "Python, so its programs could not be run; use one that was trained with 'python'."
            )
        return cls(stop, None if think == "auto" else think, **latents)

    def __call__(self, prompts: list[Text], trainer: GRPOTrainer) -> dict[str, Any]:
        """One completion of each prompt; TRL repeats a prompt for each of its generations.

        Returns:
            `dict[str, Any]`: `prompt_ids`, `completion_ids`, `logprobs` (vLLM's; else `None`: TRL computes those that
            it needs) and `env_mask` (0 for tokens that are not trained); for the rewards `completion_text`, up to the
            stop, and `latent_lengths`, the tokens of each own-line comment in it.
        """
        _check_trainer(trainer)
        args, chat, tokenizer = trainer.args, is_conversational({"prompt": prompts[0]}), trainer.processing_class
        prompt_ids = _prompt_ids(prompts, trainer, chat)
        model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        settings = CompletionSettings(
            temperature=args.temperature, top_p=args.top_p, top_k=args.top_k or 0, stop=self.stop, think=self.think,
            max_new_tokens=args.max_completion_length, prompt_is_code=not chat,
        )  # fmt: skip
        ends = end_ids(model) or (tokenizer.eos_token_id,)
        logps: list[list[float | None]] | None = None
        if args.use_vllm:
            thinking = None
            if self.think is not None:
                thinking = RequestThinking(
                    self.think, prompt_is_code=not chat, eos_token_ids=end_ids(model), **self.latents
                )
            drawn, logps = draw_by_vllm(trainer, prompt_ids, settings, thinking, ends)
        else:
            # As `draw_completions` takes it; the head is a fresh one and decides nothing.
            head = AbstractionHead(AbstractionConfig(state_width(model), **self.latents))
            wrapped = AutoModelForCausalLMWithAbstractionHead(model, head)
            drawn = [completion for (completion,) in draw_completions(wrapped, prompt_ids, settings, tokenizer)]
        ids, mask = zip(*(_ended(completion, ends) for completion in drawn), strict=True)
        if logps is not None:  # of the end that a stop put there: 0, as of all that is not trained
            logps = [[*of_row, *[0.0] * (len(row) - len(of_row))] for of_row, row in zip(logps, ids, strict=True)]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": list(ids),
            "logprobs": logps,
            "env_mask": list(mask),
            "completion_text": [completion.text for completion in drawn],
            "latent_lengths": [
                _latent_lengths(prompt, completion.text, tokenizer)
                for prompt, completion in zip(prompts, drawn, strict=True)
            ],
        }


def until_stop(reward_func: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `reward_func`, async or not, read completions as a [`CompletionRollout`] gives them: up to the stop.

    TRL's own text has the stop, and lacks the first space that some tokenizers drop. Without such a rollout nothing
    changes. The function that is returned has the same name, which TRL's metrics have, and is of the same kind.
    """

    def read(completions: Sequence[Text], completion_text: Sequence[str] | None = None, **kwargs):
        if completion_text is not None:
            pairs = zip(completions, completion_text, strict=True)
            completions = [text if isinstance(old, str) else [{**old[0], "content": text}] for old, text in pairs]
        return reward_func(completions=completions, **kwargs)

    async def read_later(completions: Sequence[Text], completion_text: Sequence[str] | None = None, **kwargs):
        return await read(completions, completion_text, **kwargs)

    later = inspect.iscoroutinefunction(reward_func) or inspect.iscoroutinefunction(type(reward_func).__call__)
    reader = wraps(reward_func)(read_later if later else read)
    reader.__name__ = getattr(reward_func, "__name__", type(reward_func).__name__)  # an object may have one or not
    return reader


def check_heeded(args: GRPOConfig) -> None:
    """Refuses, by a `ValueError`, settings of how completions are drawn that GRPO can't learn from or a
    [`CompletionRollout`] does not know."""
    if not args.temperature > 0:
        raise ValueError(f"`temperature` is {args.temperature}, at which all completions are the same; raise it.")
    for name, neutral in _NOT_HEEDED.items():
        if (value := vars(args)[name]) not in (neutral, None, {}):
            raise ValueError(
                f"`{name}` is {value!r}, which rollouts with stops and latents do not heed; leave it out."
            )
    if args.use_vllm:
        require_vllm("`use_vllm` is True")


def _check_trainer(trainer: GRPOTrainer) -> None:
    check_heeded(trainer.args)
    if trainer.tools:
        raise ValueError("`tools` are set, which rollouts with stops and latents do not call; leave them out.")
    if trainer.args.use_vllm:
        return  # it holds whole weights of its own
    accelerator = trainer.accelerator
    deepspeed = accelerator.state.deepspeed_plugin
    zero_3 = deepspeed is not None and deepspeed.zero_stage == 3
    if accelerator.distributed_type == DistributedType.FSDP or zero_3:
        raise ValueError(
            f"the model is sharded by {'ZeRO-3' if zero_3 else 'FSDP'}, and rollouts with stops and latents need "
            "whole weights; use DDP or ZeRO-2, vLLM (`use_vllm`), or a plain `GRPOTrainer` without stops and `think`."
        )


def _prompt_ids(prompts: list[Text], trainer: GRPOTrainer, chat: bool) -> list[list[int]]:
    """As the trainer itself tokenizes prompts, but for an end of text that a tokenizer appends."""
    if not chat:
        return [prompt_ids(trainer.processing_class, prompt) for prompt in prompts]
    return trainer.processing_class.apply_chat_template(
        conversation=prompts, chat_template=trainer.chat_template, add_generation_prompt=True, tokenize=True,
        return_dict=True, **trainer.chat_template_kwargs,
    )["input_ids"]  # fmt: skip


def _ended(completion: Completion, ends: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Tokens of a completion, with an end where a stop ended it, and 1 for those that the model chose.

    At a boundary of `think="always"` the text may end instead, as likely as the model says: that is a choice.
    """
    ids = list(completion.token_ids)
    mask = [int(not forced or i in ends) for i, forced in zip(ids, completion.forced, strict=True)]
    if completion.finished and ids[-1] not in ends:
        return [*ids, ends[0]], [*mask, 0]
    return ids, mask


def _latent_lengths(prompt: Text, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    latents = own_line_comments(*locate_answer(prompt, text))
    return [len(tokenizer(latent.text, add_special_tokens=False).input_ids) for latent in latents]
