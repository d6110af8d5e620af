"""How often logits are moved on their way to a draw, a log-prob or a gradient, counted on a pretended device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ra3_trl.rollout import Backbone, SamplingParams
from ra3_trl.rollout.sampler import LatentDistribution, Symbols, draw_from_hidden, symbol_logps
from ra3_trl.segmentation import build_token_table

from .launches_device import Watch, to_device


_VOCABULARY, _ROWS = 49_152, 256


def bytes_per_logit(tokenizer: PreTrainedTokenizerFast, latent_tokens: int) -> dict[str, float]:
    """Counts the bytes that a logit is moved by: of draws, and of symbols' log-probs without and with gradients. The
    vocabulary is as large as SmolLM2's; a few hundred tokens need a mask, those of the benchmark's own tokenizer."""
    table, rows = build_token_table(tokenizer, len(tokenizer)), _ROWS
    more = _VOCABULARY - len(tokenizer)
    # Whole symbols: they may follow wherever no character waits for its rest, also behind the beginning of a text that
    # is forbidden, or no block of symbols would have one that may follow in all of these states.
    following = torch.where(table.pending_S == 0, 0, -1).to(torch.int8)
    states = torch.cat([table.next_state_SV, following[:, None].expand(-1, more)], 1)
    table = replace(table, blank_V=pad(table.blank_V, (0, more)), next_state_SV=states)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        vocab_size=_VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    to_device(model)
    watch, backbone, params = Watch(_VOCABULARY), Backbone(model), SamplingParams(latent_tokens)
    hidden = torch.randn(rows, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with watch.watching():
        distribution = LatentDistribution(table.to(backbone.device), params).prepare()
        hidden, zero_n = hidden.to(backbone.device), torch.zeros(rows, dtype=torch.long).to(backbone.device)
        with torch.no_grad():
            uniform = torch.rand(rows, dtype=torch.float64).to(backbone.device)
            with watch.phase("draw"):
                draw = draw_from_hidden(backbone, distribution, hidden, zero_n, 1, uniform)
            step = np.arange(rows) % 2  # at the first step the stop is forbidden
            token = np.where(step > 0, draw.tokens_n.cpu().numpy(), _VOCABULARY - 1)
            symbols = Symbols(token, np.zeros_like(token), step, np.arange(rows))
            with watch.phase("no_grad"):
                symbol_logps(backbone, distribution, hidden, symbols)
        with watch.phase("grad"):
            symbol_logps(backbone, distribution, hidden.requires_grad_(), symbols).sum().backward()
    return {
        kind: round(watch.by_phase[kind].vocabulary_bytes / (rows * _VOCABULARY), 1)
        for kind in ("draw", "no_grad", "grad")
    }
