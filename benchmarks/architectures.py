"""Which engine is exact on which of transformers' causal architectures, and whether their documents may be packed.

Every type of `MODEL_FOR_CAUSAL_LM_MAPPING` that can be made small is opened with random weights, as a user's model is:
`engine="auto"` and `packing=True`. A row says `branch`, `expand` or `refused`, and why not `branch`.
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ra3_trl.em import check_packing
from ra3_trl.records import TokenTable
from ra3_trl.rollout import FORWARD_ERRORS, Backbone, SamplingParams, build_engine, in_a_line
from ra3_trl.segmentation import build_token_table
from ra3_trl.testbed import make_tokenizer

from .common import say


TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_MOST = 20_000_000  # parameters of a model that is small
# What makes a model small, by the names that configurations have for it.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "dff", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("intermediate_size_mlp", "expert_ffn_hidden_size", "dense_intermediate_size", "dim_ff"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "attention_head_dim", "dim_head", "v_head_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "model_max_length"), 512),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), 12),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "n_mamba_heads", "mamba_num_heads", "mamba_n_groups", "n_groups"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16), "mamba_d_ssm": 64, "attention_chunk_size": 12,
    "lru_width": 32, "word_embed_proj_dim": 32, "rotary_dim": 4, "first_k_dense_replace": 1,
    "query_pre_attn_scalar": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
# Tried one after the other: some want fewer key heads, derive what was set, or have attention in some layers only.
_OTHERWISE: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 2, "swa_num_key_value_heads": 2},
    {"head_dim": None},
    {"attn_layer_indices": [1], "attn_layer_period": 2, "attn_layer_offset": 1, "layer_types": ["mamba", "attention"]},
    {"num_hidden_layers": 8, "n_layer": 8},
    {"layer_types": ["conv", "full_attention"], "attention_types": [[["global", "local"], 1]]},
    {"layer_types": ["linear_attention", "full_attention"], "num_experts_per_tok": 1},
    {"num_heads": 4, "head_dim": 16, "n_groups": 1},
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--types", nargs="+", choices=TYPES, metavar="TYPE", default=list(TYPES), help="default: all")
    parser.add_argument("--max_length", type=int, default=64, help="longest packed row (default: %(default)s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer, rows = make_tokenizer(), {}
    begin = time.process_time()
    for model_type in args.types:
        with _warnings() as said:
            rows[model_type] = row = try_type(model_type, tokenizer, args.max_length)
            row |= {"why": row["why"] or _why(said), "seconds": round(row["seconds"], 2)}
        say(f"{model_type}: {row['engine']}, packing {row['packing']} {row['why']}")
        gc.collect()
    counts = Counter(row["engine"] for row in rows.values())
    by_kind = {f"{kind}_types": [t for t, row in rows.items() if row["engine"] == kind] for kind in KINDS}
    by_kind["packed_types"] = [t for t, row in rows.items() if row["packing"]]
    return {
        "transformers": transformers.__version__, "types": len(rows), **{k: counts[k] for k in KINDS},
        "packing": len(by_kind["packed_types"]), **by_kind, "architectures": rows,
        "cpu_seconds": round(time.process_time() - begin, 1),
    }  # fmt: skip


KINDS = ("branch", "expand", "refused", "not_made")


def try_type(model_type: str, tokenizer: Any, max_length: int) -> dict[str, Any]:
    """Opens a small model of a type: which engine it gets, whether documents are packed, and CPU seconds of both
    checks. `not_made` is said of what this page could not make small."""
    row: dict[str, Any] = {"engine": "not_made", "packing": None, "why": "", "seconds": 0.0}
    try:
        model = make_small(model_type, tokenizer)
    except ValueError as error:
        return row | {"why": str(error)}
    begin = time.process_time()
    try:
        backbone = Backbone(model)
        table: TokenTable = build_token_table(tokenizer, backbone.vocab_size)
        engine = build_engine("auto", backbone, table, SamplingParams(4))
    except ValueError as error:
        return row | {"engine": "refused", "why": " ".join(str(error).split())}
    check_packing(backbone, max_length, packing=True)
    return row | {"engine": engine.name, "packing": backbone.packs, "seconds": time.process_time() - begin}


def make_small(model_type: str, tokenizer: Any) -> PreTrainedModel:
    """Makes a small model with weights so large that no distribution is flat.

    Raises:
        `ValueError`: if the type is no model of text alone, or none of the ways to make it small works.
    """
    errors = []
    for otherwise in _OTHERWISE:
        try:
            torch.manual_seed(0)
            config = _config(model_type, tokenizer, otherwise)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
            if size > _MOST:
                raise ValueError(f"{size:,} parameters")
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            _randomize(model)
            model(input_ids=torch.arange(3, 20)[None])
        except (*FORWARD_ERRORS, OSError, *_strict_errors()) as error:
            errors.append(in_a_line(error))
        else:
            return model
    raise ValueError(errors[0])


def _strict_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import StrictDataclassError

    return (StrictDataclassError,)


def _config(model_type: str, tokenizer: Any, otherwise: dict[str, Any]) -> Any:
    kind: Callable[..., Any] = CONFIG_MAPPING[model_type]
    default = kind()
    if default.is_encoder_decoder and model_type not in ("bart", "mbart"):
        raise ValueError("an encoder-decoder")
    values = default.to_dict()
    if any(name.endswith("_config") and isinstance(value, dict) for name, value in values.items()):
        raise ValueError("not of text alone")
    settings = {name: value for name, value in (_SMALL | otherwise).items() if name in values and value is not None}
    for name in ("sliding_window", "sliding_window_size"):
        if values.get(name) is None:
            settings.pop(name, None)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    special |= {"vocab_size": len(tokenizer)}
    further = {"is_decoder": True} if "is_decoder" in values else {}
    return kind(**settings, **special, **further)


def _randomize(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if parameter.dim() > 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.add_(0.1 * noise)


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects what ra3_trl warns of, and keeps it and transformers from the screen."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger, before = logging.getLogger("ra3_trl"), transformers.logging.get_verbosity()
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    transformers.logging.set_verbosity_error()
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
        transformers.logging.set_verbosity(before)


def _why(said: list[str]) -> str:
    """The reasons in warnings, without what all of them begin with."""
    return "; ".join(text.partition(": ")[2].rstrip(".") for text in said)
