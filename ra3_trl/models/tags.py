"""Special tokens that enclose a latent: into the tokenizer, and into the embeddings as the mean of words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from peft import PeftModel
from peft.utils.other import TrainableTokensWrapper
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def add_tags(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, tags: Mapping[str, tuple[str, ...]]
) -> tuple[int, ...]:
    """Makes each tag a special token with an embedding; a model and a tokenizer that have them stay as they are.

    A new tag's row of the input embeddings, and of the output embeddings where they are not tied, is the mean of the
    rows of all tokens of its words. The matrix grows only where it has no room left. A tag that the tokenizer knows as
    an ordinary token keeps its id and its embedding and becomes special.
    Both are changed in place, and `save_pretrained` keeps the tags. An adapter must train the tags' rows, and tags
    can't be added below it. `tags` holds words by tag, as in `ActionFormat.tags`. Returns the ids of the tags.
    """
    if not tags:
        return ()
    before = tokenizer.get_vocab()
    words = {tag: _word_ids(tokenizer, texts) for tag, texts in tags.items()}
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in tags], special_tokens=True)
    ids = {tag: tokenizer.get_vocab()[tag] for tag in tags}
    rows = len(cast(nn.Parameter, model.get_input_embeddings().weight))
    # A tokenizer that was saved with the tags may meet a model that was not resized, and the other way round.
    new = [tag for tag in tags if tag not in before or ids[tag] >= rows]
    if isinstance(model, PeftModel):
        _check_adapter(model, ids, new)
    if not new:
        return tuple(ids.values())
    if max(ids.values()) >= rows:
        model.resize_token_embeddings(max(ids.values()) + 1, mean_resizing=False)
    with torch.no_grad():
        for table in _tables(model):
            for tag in new:
                table[ids[tag]] = table[words[tag]].float().mean(0).to(table.dtype)
    return tuple(ids.values())


def _word_ids(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> list[int]:
    """Lists the tokens of all words, without the space that SentencePiece puts before each."""
    tokens: list[int] = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        tokens += [i for i in ids if str(tokenizer.decode([i])).strip(" ")] or ids
    return tokens


def _tables(model: PreTrainedModel | PeftModel) -> list[nn.Parameter]:
    """Lists what holds a row for each token: input embeddings, output embeddings (once if tied), output bias."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tables = [embeddings.weight]
    if head is not None:
        tables += [table for table in (head.weight, head.bias) if table is not None and table is not tables[0]]
    return cast(list[nn.Parameter], tables)


def _check_adapter(model: PeftModel, ids: Mapping[str, int], new: list[str]) -> None:
    """Refuses an adapter that has no embeddings for the tags, or leaves them as they are."""
    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is t for t in tables)]
    rows = list(ids.values())
    indices = rows if model.config.get_text_config().tie_word_embeddings else dict.fromkeys(names, rows)
    cure = f"`LoraConfig(trainable_token_indices={indices})` or `LoraConfig(modules_to_save={names})`"
    if new:
        raise ValueError(
            f"`model` is a PeftModel without embeddings for the tags {new}; call `add_tags` on the model below before "
            f"`get_peft_model`, with an adapter that trains them: {cure}."
        )
    if not all(_trains(table, rows) for table in tables):
        raise ValueError(
            f"`peft_config` leaves the embeddings of the tags {list(ids)} as they are, so that the model can't learn "
            f"to think; use {cure}."
        )


def _trains(table: nn.Module, rows: list[int]) -> bool:
    if isinstance(table, TrainableTokensWrapper):
        return set(rows) <= {i for indices in table.token_adapter.token_indices.values() for i in indices}
    return any(parameter.requires_grad for parameter in table.parameters())
