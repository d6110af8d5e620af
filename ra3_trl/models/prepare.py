"""A model made ready for training: tags, adapter, checks, no dropout."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import RA3Config
from .frozen import BaseWeights
from .load import check_vocabulary, disable_dropout, end_ids, load_model
from .tags import add_tags


def with_special_tokens(tokenizer: PreTrainedTokenizerBase, args: RA3Config) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy with `args.eos_token` and `args.pad_token`.

    Raises:
        `ValueError`: for a token that it does not have.
    """
    tokens = {name: getattr(args, name) for name in ("eos_token", "pad_token") if getattr(args, name) is not None}
    for name, token in tokens.items():
        if token not in tokenizer.get_vocab():
            raise ValueError(f"`{name}` is {token!r}, which the tokenizer does not have; name one of its tokens.")
    if not tokens:
        return tokenizer
    tokenizer = deepcopy(tokenizer)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


def prepare_model(
    model: str | PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    args: RA3Config,
    peft_config: PeftConfig | None,
    tags: Mapping[str, tuple[str, ...]],
) -> PreTrainedModel | PeftModel:
    """The model with a format's `tags`, wrapped in its adapter and checked; the tokenizer gets the tags too.

    Raises:
        `ValueError`: for what [`load_model`] and [`check_vocabulary`] refuse, an adapter that does not train the tags,
        and `reward_model="base"` without an adapter.
    """
    kwargs = args.model_init_kwargs
    assert not isinstance(kwargs, str)  # `TrainingArguments` has read the JSON
    model = load_model(model, kwargs, None if tags else peft_config)
    if tags:
        add_tags(model, tokenizer, tags)
        if peft_config is not None:  # the rows of the tags must be there before the adapter is made
            model = load_model(model, None, peft_config)
            add_tags(model, tokenizer, tags)
    check_vocabulary(model, tokenizer)
    if args.eos_token is not None:  # which ends a generated text too, beside what did before
        model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
        model.generation_config.eos_token_id = list(dict.fromkeys([tokenizer.eos_token_id, *end_ids(model)]))
    if args.reward_model == "base":
        BaseWeights(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.disable_dropout:
        disable_dropout(model)
    return model
