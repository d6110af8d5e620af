"""Tokens as text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def token_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of some tokens as it stands, spaces before punctuation included."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
