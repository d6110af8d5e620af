"""Peak memory of an update on SmolLM2's shape: the bytes of tensors that are alive, counted on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ra3_trl.records import Document
from ra3_trl.rollout import Backbone, BranchEngine, NoiseKey, SamplingParams
from ra3_trl.segmentation import build_token_table


class Living(TorchDispatchMode):
    """Adds up the bytes of the storages that operations inside make, as long as they live. What was there before does
    not count: weights, and the gradients that are added to."""

    def __init__(self, before: Sequence[torch.Tensor]):
        super().__init__()
        self.before = {x.untyped_storage()._cdata for x in before}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.before:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def peak_of_an_update(tokenizer: PreTrainedTokenizerFast, document: Document, layers: int = 2) -> dict[str, float]:
    """Peak of a packed forward and backward pass of 8 latents at every fourth boundary: as it is, and with log-probs
    by autograd, as heads have them that are more than a matrix (and all had before)."""
    config = AutoConfig.for_model(
        "llama", hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49_152, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    table = build_token_table(tokenizer, config.vocab_size)
    engine = BranchEngine(Backbone(model), table, SamplingParams(12, 1.0, 0, 1.0), 8192)
    group = engine.rollout(document, document.boundaries[::4], 8, 2, NoiseKey(0, 0, 0), score=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def peak(way: AbstractContextManager[Any]) -> float:
        living = Living([x for p in model.parameters() for x in (p, p.grad) if x is not None])
        with way, living, engine.gradients():
            logps = engine.log_probs(group, slice(0, len(group.boundaries)))
            (logps.gate_T.sum() + logps.token_n.sum()).backward()
        return round(living.peak / 1e6, 1)

    by_autograd = patch.object(Backbone, "matrix", None)
    return {"update_peak_mb": peak(nullcontext()), "update_peak_by_autograd_mb": peak(by_autograd)}
