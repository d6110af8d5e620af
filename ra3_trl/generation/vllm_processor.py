"""The think knob as vLLM's logits processor. vLLM imports it by name, in its own processes; nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor as HeadLayer
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from ..models import AbstractionHead, load_head, load_tokenizer
from .requests import BatchThinking, RequestThinking


class ThinkRequestProcessor(BatchThinking, LogitsProcessor):
    """[`BatchThinking`] on the tokenizer and the abstraction head of the model that vLLM serves."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
        model = vllm_config.model_config
        options = {"revision": model.tokenizer_revision, "trust_remote_code": model.trust_remote_code}
        super().__init__(
            partial(load_tokenizer, model.tokenizer, options),
            partial(_load_head, model.model, model.revision),
            _caught_states(),
        )

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses, by a `ValueError`, a request whose words on thinking can't be heeded, or not beside what else it
        asks for: where the knob decides, no token might be left, or one that a grammar does not take."""
        super().validate_params(sampling_params)
        if RequestThinking.of(sampling_params.extra_args) is None:
            return
        others = {
            "allowed_token_ids": sampling_params.allowed_token_ids,
            "structured_outputs": sampling_params.structured_outputs,
        }
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"`{name}` is {value!r}, which does not go with `ra3_think`; leave one of them out.")


def _load_head(name: str, revision: str | None) -> AbstractionHead:
    head = load_head(name, revision=revision)
    if head is None:
        raise ValueError(f"`gated` is set, and {name!r} has no abstraction head; leave it out.")
    return head


@cache
def _caught_states() -> Callable[[], torch.Tensor]:
    """Catches what the language-model head reads, in each forward of this process, and returns what gives the latest:
    logits processors are handed logits alone, and the gate reads hidden states."""
    caught: list[torch.Tensor] = []
    forward = HeadLayer.forward

    def catch(self, lm_head, hidden_states, *args, **kwargs):
        caught[:] = [hidden_states]
        return forward(self, lm_head, hidden_states, *args, **kwargs)

    HeadLayer.forward = catch
    return lambda: caught[0]
