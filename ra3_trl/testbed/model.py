"""The testbed's model: a tiny Llama with random weights, and its pre-training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)


HEADS = 4


def fresh_model(
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    layers: int = 3,
    width: int = 96,
    rope_theta: float = 100.0,
    initializer_range: float = 0.08,
) -> LlamaForCausalLM:
    """Makes a Llama with random weights (0.335 M parameters in the default shape).

    Comments copy operands from some ten tokens before, for which rotary angles must tell near positions apart: with a
    `rope_theta` of 10,000 this is learned much later (benchmarks/LOG.md has the recipes that failed).
    """
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3,
            num_hidden_layers=layers, num_attention_heads=HEADS, max_position_embeddings=1024,
            initializer_range=initializer_range, tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def pretraining(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Dataset, folder: Path, **settings: Any
) -> Trainer:
    """Makes the trainer of a fresh model: next tokens of programs and of their ends, in their order, by AdamW with a
    cosine schedule. `settings` are those of `TrainingArguments`."""

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(rows["text"])["input_ids"]]}

    args = TrainingArguments(
        str(folder), lr_scheduler_type="cosine", train_sampling_strategy="sequential", **settings
    )  # fmt: skip
    rows = data.map(encode, batched=True, remove_columns=data.column_names)
    return Trainer(model, args, DataCollatorForLanguageModeling(tokenizer, mlm=False), rows)
