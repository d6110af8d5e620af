"""A checkpoint on this machine as annotator, run by `generate`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from functools import cached_property
from itertools import islice
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from ...models import context_length, end_ids, load_model, load_tokenizer
from ...segmentation.tokens import is_control
from .annotator import TOO_LONG, Answer
from .settings import AskingSettings


class LocalModel:
    """
    A causal language model on this machine. Its chat template is used where it has one. The tokenizer is loaded at
    once, the weights when they are first needed.

    Args:
        name (`str`):
            Folder or Hub id.
        settings ([`AskingSettings`], *optional*):
            How it is asked.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `from_pretrained`; the dtype is the checkpoint's unless said here.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where it runs.
        seed (`int`, *optional*, defaults to 42):
            Of the draws, at a temperature above 0.

    Raises:
        `ValueError`: if no tokenizer or no causal language model loads from `name`.
    """

    def __init__(
        self,
        name: str,
        settings: AskingSettings | None = None,
        model_init_kwargs: dict[str, Any] | None = None,
        device: torch.device | str = "cpu",
        seed: int = 42,
    ):
        self.name, self.device, self.seed = name, torch.device(device), seed
        self.settings = settings or AskingSettings()
        self.max_tokens = self.settings.max_tokens
        self._kwargs = {"dtype": "auto"} | (model_init_kwargs or {})
        self.tokenizer = load_tokenizer(name, self._kwargs)
        words = [token.content for token in self.tokenizer.added_tokens_decoder.values() if is_control(token)]
        self.special = re.compile("|".join(map(re.escape, words)) or r"(?!)")

    @cached_property
    def model(self) -> PreTrainedModel:
        """Its weights, on the device."""
        model = load_model(self.name, self._kwargs, None)
        if isinstance(model, PeftModel):
            model = model.merge_and_unload()
        return cast(PreTrainedModel, model.eval().to(self.device))

    @cached_property
    def _config(self) -> GenerationConfig:
        config = deepcopy(self.model.generation_config)
        sampling = {"do_sample": True, "temperature": self.settings.temperature}
        greedy = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p")) | {"do_sample": False}
        ends = list(end_ids(self.model))
        config.update(
            max_new_tokens=self.max_tokens, max_length=None, num_return_sequences=1, eos_token_id=ends or None,
            pad_token_id=next((i for i in (self.tokenizer.pad_token_id, *ends) if i is not None), 0),
            **(sampling if self.settings.temperature else greedy),
        )  # fmt: skip
        return config

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as the user's turn of a chat where the model has a template."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt).input_ids
        turns = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def count(self, prompt: str) -> int:
        return len(self.encode(prompt))

    def write(self, prompts: Iterable[str]) -> Iterator[Answer]:
        waiting = iter(prompts)
        while batch := list(islice(waiting, self.settings.batch_size)):
            yield from self._write(batch)

    @torch.inference_mode()
    def _write(self, prompts: Sequence[str]) -> list[Answer]:
        """Answers a batch of prompts; those that have no room for an answer are left out."""
        rows = [self.encode(prompt) for prompt in prompts]
        model: Any = self.model  # `generate` is a mixin's
        most = context_length(model)
        fit = [row for row in rows if most is None or len(row) + self.max_tokens <= most]
        if not fit:
            return [Answer(none=TOO_LONG) for _ in rows]
        width = max(map(len, fit))
        ids = torch.tensor([[self._config.pad_token_id] * (width - len(row)) + row for row in fit], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in fit], device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            # By what is asked: whatever was drawn before, and by whom, the answers are the same.
            digest = hashlib.sha256(f"{self.seed} {fit}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7]))
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=self._config)
        answers = iter(zip(fit, out[:, width:].tolist(), strict=True))
        return [self._answer(*next(answers)) if row in fit else Answer(none=TOO_LONG) for row in rows]

    def _answer(self, prompt: Sequence[int], ids: list[int]) -> Answer:
        ends = [i for i, token in enumerate(ids) if token in end_ids(self.model)]
        length = ends[0] if ends else len(ids)
        text = self.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return Answer(str(text), not ends, None, len(prompt), length + bool(ends))

    def close(self) -> None:
        vars(self).pop("model", None)
