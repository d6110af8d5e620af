"""Data as TRL's users bring it: conversations, tokens, formats and containers. Tokens and labels are `SFTTrainer`'s."""

from __future__ import annotations

import copy
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import furthest, weights
from datasets import Dataset, DatasetDict
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import trl
from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.segmentation import PYTHON, RowForms, Segmenter, row_to_document, segment_dataset, splice


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
QWEN = (TEMPLATES / "qwen2_5.jinja").read_text("utf-8")  # TRL has a version for training
LLAMA = (TEMPLATES / "llama3_training.jinja").read_text("utf-8")  # marks the assistant's turns itself
PLAIN = (  # neither: turns are told by rendering
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
CODE = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return x\n" for i in range(8)]


@pytest.fixture
def chat(tokenizers):
    """`chat(template)`: a tokenizer with the tokens and the template of a chat."""

    def make(template: str, kind: str = "newline_indent") -> PreTrainedTokenizerFast:
        tokenizer = copy.deepcopy(tokenizers[kind])
        tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True)
        tokenizer.chat_template = template
        return tokenizer

    return make


def turns(i: int, more: bool = True) -> list[dict]:
    """Two questions and two answers that are code; or one each."""
    first = [{"role": "user", "content": f"Write f{i}."}, {"role": "assistant", "content": CODE[i]}]
    second = [
        {"role": "user", "content": "Shorter."},
        {"role": "assistant", "content": f"def f{i}(x):\n    return x\n"},
    ]
    return first + second if more else first


MESSAGES = [{"messages": turns(i, i % 2 == 0)} for i in range(8)]
HALVES = [{"prompt": turns(i)[:3], "completion": turns(i)[3:]} for i in range(8)]
TOOLS = [{"type": "function", "function": {"name": "run", "description": "d", "parameters": {"type": "object"}}}]


def given(rows: list[dict], tokenizer) -> list[dict]:
    """Rows as tokens; every third token is masked."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for text in rows]
    return [{"input_ids": row, "labels": [-100 if k % 3 == 0 else i for k, i in enumerate(row)]} for row in ids]


CASES = {
    "messages": (QWEN, MESSAGES, {"assistant_only_loss": True}, {}),
    "messages, marked template": (LLAMA, MESSAGES, {"assistant_only_loss": True}, {}),
    "all of messages": (PLAIN, MESSAGES, {}, {"assistant_only_loss": False}),
    "prompt and completion": (QWEN, HALVES, {}, {}),
    "its assistant only": (QWEN, HALVES, {"assistant_only_loss": True}, {"assistant_only_loss": True}),
    "all of prompt and completion": (LLAMA, HALVES, {"completion_only_loss": False}, {"completion_only_loss": False}),
    "from and value": (QWEN, [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in turns(i)]} for i in range(8)
    ], {}, {"assistant_only_loss": False}),
    "tools": (QWEN, [row | {"tools": TOOLS} for row in MESSAGES], {"assistant_only_loss": True}, {}),
    "text halves": (QWEN, [{"prompt": code[:20], "completion": code[20:]} for code in CODE], {}, {}),
    "text halves, all": (QWEN, [{"prompt": code[:20], "completion": code[20:]} for code in CODE],
                         {"completion_only_loss": False}, {"completion_only_loss": False}),
    "tokens and labels": (QWEN, None, {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_is_what_sft_trains_on(name, chat, tiny_model, make_sft, make_ours):
    """Losses and weights after 20 updates, float32, at most 1e-5 apart."""
    template, rows, of_sft, of_ours = CASES[name]
    tokenizer = chat(template)
    data = Dataset.from_list(given(CODE, tokenizer) if rows is None else rows)
    sft = make_sft(tiny_model("llama", tokenizer), copy.deepcopy(tokenizer), data, **of_sft)
    ours = make_ours(tiny_model("llama", tokenizer), copy.deepcopy(tokenizer), data, **of_ours)
    wanted = [
        [(i, label != -100) for i, label in zip(r["input_ids"], r["labels"], strict=True)] for r in sft.train_dataset
    ]
    examples = [splice(row_to_document(row), {}) for row in ours.train_dataset]
    trained = [[(i, b != -100) for i, b in zip(e.input_ids, e.labels, strict=True)] for e in examples]
    assert [row[1:] for row in trained] == [row[1:] for row in wanted]  # nothing predicts the first
    before = weights(ours.model)
    sft.train(), ours.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (sft, ours)]
    assert len(losses[0]) == len(losses[1]) == 20
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    assert furthest(weights(sft.model), weights(ours.model)) < 1e-5 < 1e-3 < furthest(before, weights(ours.model))


_SHARED = {
    "max_length": 512, "learning_rate": 1e-3, "per_device_train_batch_size": 3, "max_steps": 20, "seed": 3,
    "lr_scheduler_type": "linear", "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True,
    "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture
def make_sft(tmp_path):
    def make(model, tokenizer, data, **settings) -> SFTTrainer:
        args = SFTConfig(str(tmp_path / "sft"), bf16=False, activation_checkpointing=False, **_SHARED | settings)
        return SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)

    return make


@pytest.fixture
def make_ours(tmp_path):
    def make(model, tokenizer, data, evaluation=None, formatting_func=None, **settings) -> RA3MidTrainer:
        defaults = {"e_steps": 0, "m_steps": -1, "log_latents_steps": 0, "num_latents": 2, "max_latent_length": 3}
        args = RA3Config(str(tmp_path / "ours"), **_SHARED | defaults | settings)
        return RA3MidTrainer(model, args, data, evaluation, tokenizer, formatting_func=formatting_func)

    return make
