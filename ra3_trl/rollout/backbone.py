"""Hidden states and the language-model head, apart, so that logits exist only where they are wanted.

`log pi` of one token needs one row of logits reduced to two numbers; a full log-softmax over the vocabulary at every
position took two thirds of the time in the prototype.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


class Backbone:
    """The two halves of a causal language model.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, not wrapped for several processes.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        self.model = model
        causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
        self.causal_lm = causal_lm
        self.decoder: nn.Module = causal_lm.base_model
        forward = inspect.signature(causal_lm.forward).parameters
        self._one_logit = {"logits_to_keep": 1} if "logits_to_keep" in forward else {}
        config = causal_lm.config.get_text_config().to_dict()
        self._divide = config.get("logits_scaling") or 1.0  # Granite
        self._multiply = config.get("logit_scale") or 1.0  # Cohere
        self._softcap = config.get("final_logit_softcapping")  # Gemma 2

    @property
    def device(self) -> torch.device:
        return self.causal_lm.device

    @property
    def vocab_size(self) -> int:
        return self.causal_lm.get_output_embeddings().weight.shape[0]

    def hidden(self, through: nn.Module | None = None, **inputs) -> torch.Tensor:
        """Last hidden states `[rows, L, hidden_size]`.

        `through` is the wrapped model whose forward must be the one that runs (DDP arms its gradient reduction there);
        the hidden states are then caught on their way to the head.
        """
        if through is None:
            return self.decoder(use_cache=False, **inputs)[0]
        caught: list[torch.Tensor] = []
        handle = self.decoder.register_forward_hook(lambda module, args, output: caught.append(output[0]))
        try:
            through(use_cache=False, **self._one_logit, **inputs)
        finally:
            handle.remove()
        return caught[0]

    def logits(self, hidden_nD: torch.Tensor) -> torch.Tensor:
        """Logits `[n, V]` in float32 of hidden states `[n, hidden_size]`."""
        logits = self.causal_lm.get_output_embeddings()(hidden_nD).float()
        if self._divide != 1.0 or self._multiply != 1.0:
            logits = logits * (self._multiply / self._divide)
        return torch.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def chunked(self, hidden_nD: torch.Tensor, reduce: Callable, *per_row: torch.Tensor) -> list[torch.Tensor]:
        """`reduce(logits_chunk, *per_row_chunk) -> tuple of [rows] tensors` over bounded chunks of rows, joined.

        With gradients each chunk is recomputed in the backward pass, so that never more than one chunk of logits is
        alive.
        """
        rows = max(1, (1 << (22 if hidden_nD.device.type == "cpu" else 27)) // self.vocab_size)

        def run(hidden: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return reduce(self.logits(hidden), *rest)

        parts = []
        for i in range(0, max(1, len(hidden_nD)), rows):
            chunk = (hidden_nD[i : i + rows], *(p[i : i + rows] for p in per_row))
            grad = torch.is_grad_enabled()
            parts.append(checkpoint(run, *chunk, use_reentrant=False) if grad else run(*chunk))
        return [torch.cat(column) for column in zip(*parts, strict=True)]

    def token_logps(self, hidden_nD: torch.Tensor, targets_n: torch.Tensor) -> torch.Tensor:
        """`log pi(target)` `[n]` under the model's own distribution (temperature 1, nothing forbidden)."""
        return self.chunked(hidden_nD, _gather_logps, targets_n)[0]


def _gather_logps(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> tuple[torch.Tensor]:
    return (logits_nV.gather(-1, targets_n[:, None])[:, 0] - torch.logsumexp(logits_nV, -1),)
