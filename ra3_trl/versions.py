"""Differences between the versions of transformers and torch that this package runs on, in one place.

Each says since which version; it goes when the lower bound in `pyproject.toml` passes that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule


TORCH, TRANSFORMERS = (
    tuple(int(number) for number in module.__version__.split(".")[:2]) for module in (torch, transformers)
)

# ---- transformers 5.23: `gradient_checkpointing` became `activation_checkpointing` ----

if TRANSFORMERS >= (5, 23):
    CHECKPOINTING = "activation_checkpointing"  # its name in the configurations of transformers and TRL
    TrainingArguments = transformers.TrainingArguments
else:
    CHECKPOINTING = "gradient_checkpointing"

    @dataclass
    class TrainingArguments(transformers.TrainingArguments):  # type: ignore[no-redef]
        """Takes both names, as transformers 5.23 does."""

        activation_checkpointing: bool | None = field(
            default=None,
            metadata={"help": "Trade compute for memory in the backward pass.", "nargs": "?", "const": True},
        )
        activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
            default=None, metadata={"help": "Keyword arguments of `gradient_checkpointing_enable()`."}
        )
        _VALID_DICT_FIELDS = [*transformers.TrainingArguments._VALID_DICT_FIELDS, "activation_checkpointing_kwargs"]

        def __post_init__(self) -> None:
            for end in ("", "_kwargs"):
                new, former = f"activation_checkpointing{end}", f"gradient_checkpointing{end}"
                if getattr(self, new) is not None:
                    setattr(self, former, getattr(self, new))
            super().__post_init__()
            self.activation_checkpointing = bool(self.gradient_checkpointing)
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs


def enable_checkpointing(model: nn.Module, kwargs: dict[str, Any] | None = None) -> None:
    """Switches activation checkpointing on, as `Trainer` does with `activation_checkpointing_kwargs`."""
    getattr(model, f"{CHECKPOINTING}_enable")(kwargs)


# ---- transformers 5.17: GGUF files load as quantized weights unless told otherwise; before, always as plain ones ----


def plain_gguf(gguf_file: str) -> dict[str, Any]:
    """The arguments by which `from_pretrained` reads plain weights from a GGUF file."""
    if TRANSFORMERS < (5, 17):
        return {"gguf_file": gguf_file}
    return {"gguf_file": gguf_file, "quantization_config": transformers.GgufConfig(dequantize=True)}


# ---- torch 2.13 (2.11 lacks it): `FSDPModule.reset_iter_state` ----


def forget_forwards(model: FSDPModule) -> None:
    """Makes FSDP2 give whole weights back and forget the forwards behind which no backward pass comes."""
    if TORCH >= (2, 13):
        model.reset_iter_state()
        return
    assert isinstance(model, nn.Module)
    for shard in model.modules():
        if isinstance(shard, FSDPModule):
            shard.reshard()
            state = shard._get_fsdp_state()
            state._comm_ctx.post_forward_order.clear()
            if state._fsdp_param_group is not None:
                state._fsdp_param_group._post_forward_indices.clear()
