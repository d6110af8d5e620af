"""What settings say about a tokenizer's special tokens and chat template, in the model's configs too, as in TRL."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Any, cast

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import clone_chat_template


def set_special_tokens(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    eos_token: str | None = None,
    pad_token: str | None = None,
) -> None:
    """Makes tokens of the vocabulary the end of the text and the padding.

    Raises:
        `ValueError`: for one that the tokenizer does not have.
    """
    vocabulary = tokenizer.get_vocab()
    for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is not None and token not in vocabulary:
            raise ValueError(
                f"`{name}` is {token!r}, which `processing_class` ({type(tokenizer).__name__}) does not have; use one "
                "of its tokens, or add it first and resize the model's embeddings."
            )
    config: Any = model.config.get_text_config()
    generation: Any = model.generation_config
    if eos_token is not None:
        tokenizer.eos_token = eos_token
        config.eos_token_id = tokenizer.eos_token_id
        before = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        others = [i for i in before if i not in (None, tokenizer.eos_token_id)]
        generation.eos_token_id = [tokenizer.eos_token_id, *others]  # each of them ends a generation
    if pad_token is not None:
        tokenizer.pad_token = pad_token
        config.pad_token_id = generation.pad_token_id = tokenizer.pad_token_id


def set_chat_template(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, path: str) -> list[int]:
    """Takes the chat template of a Jinja file, or that of another tokenizer with the tokens that it needs; the ids of
    those that are new."""
    if Path(path).is_file() and path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = Path(path).read_text("utf-8")
        return []
    try:
        return clone_chat_template(cast(PreTrainedModel, model), tokenizer, path)[2]
    except OSError as error:
        raise ValueError(
            f"`chat_template_path` is {path!r}, which is neither a file (.jinja, .j2) nor a tokenizer's folder or Hub "
            f"id ({error})."
        ) from error


def training_tokens(peft_config: PeftConfig, ids: list[int]) -> PeftConfig:
    """The adapter's settings, such that it trains the embeddings of new tokens and the head, as TRL's."""
    if not ids:
        return peft_config
    changed: Any = copy(peft_config)
    rows: Any = changed.trainable_token_indices or {}
    rows = rows if isinstance(rows, dict) else {"embed_tokens": rows}
    changed.trainable_token_indices = rows | {"embed_tokens": [*rows.get("embed_tokens", ()), *ids]}
    changed.modules_to_save = sorted({*(changed.modules_to_save or ()), "lm_head"})
    return cast(PeftConfig, changed)
