"""Models as TRL's trainers take them: a name, a model, an adapter."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    model: str | PreTrainedModel | PeftModel, model_init_kwargs: dict[str, Any] | None, peft_config: PeftConfig | None
) -> PreTrainedModel | PeftModel:
    """The model itself, loaded in float32 unless `model_init_kwargs` has a `dtype`, wrapped in an adapter if asked.

    Raises:
        `ValueError`: for `model_init_kwargs` without a name to load, or an adapter on an adapter.
    """
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "float32"} | (model_init_kwargs or {}))
    elif model_init_kwargs:
        raise ValueError("`model_init_kwargs` is set, but `model` is not a string; pass them to `from_pretrained`.")
    if isinstance(model, PeftModel):
        configs = list(model.peft_config.values())
    else:
        configs = [] if peft_config is None else [peft_config]
    for config in configs:
        if config.is_prompt_learning:
            raise ValueError(
                f"`peft_config` is {type(config).__name__}: virtual tokens have no place in a prefix cache; "
                "use an adapter that changes layers, such as `LoraConfig`."
            )
    if peft_config is None:
        return model
    if isinstance(model, PeftModel):
        raise ValueError("`peft_config` is set, but `model` is a PeftModel already; pass one of the two.")
    return get_peft_model(model, peft_config)


def load_tokenizer(name: str, model_init_kwargs: dict[str, Any] | None) -> PreTrainedTokenizerBase:
    """The tokenizer of the very files that `model_init_kwargs` name (revision, subfolder, GGUF file)."""
    shared = ("revision", "subfolder", "gguf_file", "trust_remote_code", "token")
    options = model_init_kwargs or {}
    return AutoTokenizer.from_pretrained(name, **{key: options[key] for key in shared if key in options})


def disable_dropout(model: nn.Module) -> None:
    """Sets all dropout to 0, so that the policy that is trained is the one that sampled."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens that the model's context holds, `None` if its config does not say."""
    config = model.config.get_text_config().to_dict()
    return config.get("max_position_embeddings") or config.get("n_positions")
