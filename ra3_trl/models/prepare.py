"""A model made ready for training: tags, adapter, checks, no dropout."""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import RA3Config
from .frozen import BaseWeights
from .load import check_vocabulary, disable_dropout, load_model
from .special import set_chat_template, set_special_tokens, training_tokens
from .tags import add_tags


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
    changed = bool(tags or args.chat_template_path)
    model = load_model(model, kwargs, None if changed else peft_config)
    set_special_tokens(model, tokenizer, args.eos_token, args.pad_token)
    new = set_chat_template(model, tokenizer, args.chat_template_path) if args.chat_template_path else []
    add_tags(model, tokenizer, tags)
    if changed and peft_config is not None:  # the rows of new tokens must be there before the adapter is made
        model = load_model(model, None, training_tokens(peft_config, new))
        add_tags(model, tokenizer, tags)
    check_vocabulary(model, tokenizer)
    if args.reward_model == "base":
        BaseWeights(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.disable_dropout:
        disable_dropout(model)
    return model
