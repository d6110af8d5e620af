"""What a trainer's arguments stand for: names that are loaded, settings of TRL's made ours, kinds that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.quantization_config import QuantizationConfigMixin
from trl import SFTConfig

from .config import RA3Config, check_args
from .config_fields import beside_trainers
from .generation import AutoModelForCausalLMWithAbstractionHead
from .kinds import check_kind, shown
from .models import AbstractionHead, load_head, load_tokenizer, place_of


@dataclass(frozen=True)
class Start:
    """What a run starts from; `model` may be a name still, and `head` is that of its checkpoint."""

    model: str | PreTrainedModel | PeftModel
    args: RA3Config
    tokenizer: PreTrainedTokenizerBase
    head: AbstractionHead | None


def read_arguments(kind: type, model: Any, args: Any, tokenizer: Any, quantization_config: Any) -> Start:
    """Makes of a trainer's arguments what they stand for; `args` are a copy.

    Args:
        kind (`type`):
            The trainer.
        model, args, tokenizer, quantization_config:
            As of [`RA3MidTrainer`].

    Raises:
        `ValueError`: for an argument of another kind, naming what it may be.
    """
    head = None
    if isinstance(model, AutoModelForCausalLMWithAbstractionHead):
        tokenizer = tokenizer or model.tokenizer
        model, head = model.pretrained_model, model.abstraction_head
    if isinstance(model, Path):
        model = str(model)
    if not isinstance(model, (str, nn.Module)) or (isinstance(model, nn.Module) and not hasattr(model, "config")):
        raise ValueError(f"`model` is {shown(model)}; give a folder, a Hub id or a causal language model.")
    name = model if isinstance(model, str) else model.config._name_or_path
    args = as_config(args, f"{name.rstrip('/').split('/')[-1] or 'model'}-RA3")
    check_args(args, kind)
    options = dict(args.model_init_kwargs or {})
    if args.trust_remote_code:
        options = {"trust_remote_code": True} | options
    if quantization_config is not None:
        options = _quantized(options, quantization_config, model)
    if isinstance(model, str):
        args.model_init_kwargs = options or None
    tokenizer = _tokenizer(tokenizer, name, options)
    if isinstance(model, str) and args.abstraction_head:
        head = load_head(name, **place_of(options))
    return Start(model, args, tokenizer, head)


def as_config(args: Any, output_dir: str) -> RA3Config:
    """The settings as a copy; of `TrainingArguments` and `SFTConfig` an [`RA3Config`] that says the same, of `None`
    the default one.

    Raises:
        `ValueError`: for something else, or a setting of TRL's that RA3 does not take.
    """
    if args is None:
        return RA3Config(output_dir=output_dir)
    if isinstance(args, RA3Config):
        return copy(args)
    if type(args) is not TrainingArguments and not isinstance(args, SFTConfig):
        cure = "make an `RA3Config(**args)` of it" if isinstance(args, dict) else "make an `RA3Config`"
        raise ValueError(f"`args` is {shown(args)}; {cure}.")
    values = {entry.name: getattr(args, entry.name) for entry in fields(args) if entry.init}
    # TRL to 1.8 has a coefficient by default, for models without a router too.
    if any(entry.name == "router_aux_loss_coef" and entry.default == values[entry.name] for entry in fields(args)):
        del values["router_aux_loss_coef"]
    with beside_trainers():
        return RA3Config(**values)


def _quantized(options: dict[str, Any], quantization_config: Any, model: Any) -> dict[str, Any]:
    if not isinstance(quantization_config, QuantizationConfigMixin):
        raise ValueError(
            f"`quantization_config` is {shown(quantization_config)}; give one of transformers' such as "
            "`BitsAndBytesConfig(load_in_4bit=True)`."
        )
    if not isinstance(model, str):
        raise ValueError("`quantization_config` is set, but `model` is loaded; pass it to `from_pretrained`.")
    if options.get("quantization_config") is not None:
        raise ValueError("`quantization_config` is set, and in `model_init_kwargs` too; leave one of the two out.")
    return options | {"quantization_config": quantization_config}


def _tokenizer(tokenizer: Any, name: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        return load_tokenizer(name, options)
    if isinstance(tokenizer, (str, Path)):
        return load_tokenizer(str(tokenizer), {k: v for k, v in options.items() if k == "trust_remote_code"})
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"`processing_class` is {shown(tokenizer)}; give a fast tokenizer (of a processor its `tokenizer`) or the "
            "name of one."
        )
    return tokenizer


def check_training(
    callbacks: Any, optimizers: Any, optimizer_cls_and_kwargs: Any, formatting_func: Any, peft_config: Any
) -> None:
    """Refuses what `Trainer` would fail on only later, with an error that does not name it."""
    several = isinstance(callbacks or [], Sequence) and not isinstance(callbacks, str)
    kinds = (TrainerCallback, type)
    if not several or not all(isinstance(callback, kinds) for callback in callbacks or []):
        raise ValueError(f"`callbacks` is {shown(callbacks)}; give a list of `TrainerCallback`.")
    wanted = "give an optimizer and a scheduler, of which each may be `None`"
    if not isinstance(optimizers, (tuple, list)) or len(optimizers) != 2:
        raise ValueError(f"`optimizers` is {shown(optimizers)}; {wanted}.")
    for value, kind in zip(optimizers, (Optimizer, LRScheduler), strict=True):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"`optimizers` holds {shown(value)}; {wanted}.")
    if optimizer_cls_and_kwargs is not None:
        pair = optimizer_cls_and_kwargs
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], dict)) or not (
            isinstance(pair[0], type) and issubclass(pair[0], Optimizer)
        ):
            raise ValueError(
                f"`optimizer_cls_and_kwargs` is {shown(pair)}; give a class of `torch.optim.Optimizer` and a dict, "
                "such as `(torch.optim.SGD, {'lr': 1e-3})`."
            )
        if any(value is not None for value in optimizers):
            raise ValueError("`optimizer_cls_and_kwargs` and `optimizers` are both set; leave one of the two out.")
    if formatting_func is not None and not callable(formatting_func):
        raise ValueError(f"`formatting_func` is {shown(formatting_func)}; give a function of a row.")
    check_kind("peft_config", peft_config, PeftConfig | None)


def check_callback(callback: Any) -> None:
    """Refuses TRL's callbacks that write completions where their trainer's `eval_dataset` has no prompts."""
    check_kind("callback", callback, TrainerCallback | type[TrainerCallback])
    # By name, since to import them is to import the trackers that they write to.
    if not {"LogCompletionsCallback", "WeaveCallback"} & {kind.__name__ for kind in type(callback).__mro__}:
        return
    data = callback.eval_dataset
    columns = data.column_names if isinstance(data, Dataset) else None
    if columns is None or "prompt" not in columns:
        form = "has no column `prompt`" if columns is not None else f"is {shown(data)}"
        raise ValueError(
            f"`callback` is a {type(callback).__name__}, which completes the prompts of `eval_dataset`, and that "
            f"{form}; give one data set with `prompt` and `completion`, or see `log_latents_steps`."
        )


def measures_more(kind: type, callbacks: Sequence[Any] | None) -> bool:
    """Whether an evaluation may give more than the trainer's own numbers: by methods that a subclass overrides, or by
    callbacks that hear of it."""
    overridden = any(
        name in vars(cls)
        for cls in kind.__mro__
        if not cls.__module__.startswith(("ra3_trl.", "transformers.", "trl."))
        for name in ("evaluate", "evaluation_loop")
    )
    listens = any(
        kind.on_evaluate is not TrainerCallback.on_evaluate and not issubclass(kind, EarlyStoppingCallback)
        for kind in (callback if isinstance(callback, type) else type(callback) for callback in callbacks or ())
    )
    return overridden or listens
