"""Batches of completions, for pass@k and for RLVR: cut where a benchmark says, with latents where the knob says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..models import end_ids
from ..rollout import evaluating
from .processor import ThinkLogitsProcessor, check_knob
from .wrapper import AutoModelForCausalLMWithAbstractionHead


@dataclass(frozen=True)
class CompletionSettings:
    """How completions are drawn.

    Args:
        num_samples (`int`, *optional*, defaults to `1`):
            Completions of each prompt.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 takes the likeliest token each time.
        top_p (`float`, *optional*, defaults to `1.0`), top_k (`int`, *optional*, defaults to `0`):
            Of the tokens to draw from; 1 and 0 leave all.
        max_new_tokens (`int`, *optional*, defaults to `512`):
            Most tokens of a completion, latents counted.
        stop (`tuple[str]`, *optional*):
            Texts that end a completion, of which they are no part.
        think (`str`, *optional*), threshold (`float`, *optional*):
            As in [`AutoModelForCausalLMWithAbstractionHead.generate`]; `None` lets the language model write what it
            likes.
        prompt_is_code (`bool`, *optional*, defaults to `True`):
            Whether prompt and completion are one program; `False` for chats.

    Raises:
        `ValueError`: for a number out of its range, or several samples at temperature 0, which would all be the same.
    """

    num_samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    think: str | None = None
    threshold: float | None = None
    prompt_is_code: bool = True

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("temperature", 0), ("top_k", 0), ("max_new_tokens", 1)):
            if not vars(self)[name] >= least:  # so, since a NaN is neither below nor above
                raise ValueError(f"`{name}` is {vars(self)[name]!r}; use at least {least}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p!r}; use a number above 0 and up to 1.")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"`num_samples` is {self.num_samples} and `temperature` 0, at which all samples are the same; raise "
                "the temperature or draw 1."
            )
        if "" in self.stop:
            raise ValueError("`stop` holds an empty text, which would end every completion; leave it out.")
        if self.think is None and self.threshold is not None:
            raise ValueError(f"`threshold` is {self.threshold} and `think` is None; use `think='auto'`.")
        if self.think is not None:
            check_knob(self.think, self.threshold)


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt.

    `text` ends before the first stop. `token_ids` are all tokens drawn, the end of the text or the stop's included;
    `forced` says of each whether the knob put it there. `finished` is false where `max_new_tokens` cut it.
    """

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    forced: tuple[bool, ...] = field(repr=False)
    finished: bool


@torch.no_grad()
def draw_completions(
    model: AutoModelForCausalLMWithAbstractionHead,
    prompt_ids: Sequence[Sequence[int]],
    settings: CompletionSettings,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[list[Completion]]:
    """Draws completions of several prompts, in one batch.

    Args:
        model ([`AutoModelForCausalLMWithAbstractionHead`]):
            The model; the fresh head of one without leaves decisions to the tokens.
        prompt_ids (`Sequence[Sequence[int]]`):
            Tokens of each prompt.
        settings ([`CompletionSettings`]):
            How they are drawn; the checkpoint's generation config gives the end-of-text ids and nothing else.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            The model's; `None` is the one it was made with.

    Returns:
        `list[list[Completion]]`: `num_samples` completions of each prompt.

    Raises:
        `ValueError`: for an empty prompt, a bad `think` or `threshold`, or when no tokenizer is found.
    """
    tokenizer, language_model = tokenizer or model.tokenizer, model.pretrained_model
    if tokenizer is None:
        raise ValueError("`tokenizer` is missing; pass the model's, which reads the completions.")
    if not all(prompt_ids):
        raise ValueError("a prompt has no tokens; give at least one, such as the beginning-of-text token.")
    steering: AbstractContextManager[ThinkLogitsProcessor | None] = nullcontext()
    if settings.think is not None:
        steering = model.thinking(settings.think, settings.threshold, tokenizer, settings.prompt_is_code)
    ends = end_ids(language_model) or (tokenizer.eos_token_id,)
    padding = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompt_ids))
    input_ids = torch.tensor([[padding] * (width - len(ids)) + list(ids) for ids in prompt_ids])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids])
    stops = [_Stops(tokenizer, settings.stop, width)] if settings.stop else []
    device = language_model.device
    # No dropout, and no activation checkpointing, which drops the cache.
    with steering as processor, evaluating(language_model):
        rows = _without_generation_config(language_model).generate(
            input_ids=input_ids.to(device), attention_mask=mask.to(device), tokenizer=tokenizer,
            generation_config=_generation_config(settings, ends, padding),
            logits_processor=[] if processor is None else [processor], stopping_criteria=StoppingCriteriaList(stops),
        )[:, width:].tolist()  # fmt: skip
    # The processor says it step by step, for all rows: [steps, rows] becomes [rows, steps].
    forced = processor.forced if processor is not None else ()
    forced = [*zip(*forced, strict=True)] if forced else [(False,) * len(rows[0])] * len(rows)
    drawn = [
        read_completion(tokenizer, prompt_ids[n // settings.num_samples], row, forced[n], ends, settings.stop)
        for n, row in enumerate(rows)
    ]
    return [drawn[i : i + settings.num_samples] for i in range(0, len(drawn), settings.num_samples)]


def _generation_config(settings: CompletionSettings, ends: tuple[int, ...], padding: int) -> GenerationConfig:
    """Everything is said, since transformers fills what is not from the checkpoint's."""
    drawn = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k, "min_p": 0.0}
    drawn |= {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens, min_new_tokens=0, num_return_sequences=settings.num_samples,
        do_sample=settings.temperature > 0, **(drawn if settings.temperature > 0 else {}),
        eos_token_id=list(ends), pad_token_id=padding, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
        renormalize_logits=False, use_cache=True,
    )  # fmt: skip


def read_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    row: list[int],
    forced: tuple[bool, ...],
    ends: tuple[int, ...],
    stop: tuple[str, ...],
) -> Completion:
    """Reads the completion in a row of a batch, in which padding follows what ended it; `forced` is of its tokens."""
    end = next((i for i, token in enumerate(row) if token in ends), None)
    ids = row if end is None else row[: end + 1]
    text = _text_after(tokenizer, prompt, ids)
    cut = cut_at_stop(text, stop)
    if len(cut) < len(text):
        # What follows the token in which the stop ended is padding: the fewest first tokens whose text holds a stop.
        few, enough = 0, len(ids)
        while few + 1 < enough:
            middle = (few + enough) // 2
            if any(one in _text_after(tokenizer, prompt, ids[:middle]) for one in stop):
                enough = middle
            else:
                few = middle
        ids = ids[:enough]
    return Completion(cut, tuple(ids), forced[: len(ids)], end is not None or len(cut) < len(text))


def _text_after(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], ids: Sequence[int]) -> str:
    """Text of tokens behind a prompt; by themselves some tokenizers would drop its first space."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole, alone = tokenizer.batch_decode([list(prompt), [*prompt, *ids], list(ids)], **options)
    return whole[len(before) :] if whole.startswith(before) else alone


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Cuts `text` before the first of the texts `stop`."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def _without_generation_config(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The same modules without the checkpoint's generation config, from which transformers would take what ours leaves
    out; the model itself stays as it is, since other threads may generate with it."""
    base = copy.copy(model.get_base_model() if isinstance(model, PeftModel) else model)
    base.generation_config = GenerationConfig()
    return cast(PreTrainedModel, base)


class _Stops(StoppingCriteria):
    """Ends a row once its completion holds a stop; transformers' own would see one that the prompt begins."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], width: int):
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.window = max((len(text.encode()) for text in stop), default=0) + 4  # a token is at least a byte

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.window) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        done = [any(stop in text for stop in self.stop) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)
