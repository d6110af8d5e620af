"""Models as TRL's trainers take them: a name, a model, an adapter; what can't be trained is refused with its cure."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import find_adapter_config_file

from ..config_fields import model_options
from ..files import one_line


_CURE = "take another checkpoint or revision"
_SUMMED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # not float8, of which there is no norm
_PLACE = ("revision", "subfolder", "token", "cache_dir", "local_files_only")  # where the files are
_SHARED = (*_PLACE, "gguf_file", "trust_remote_code")  # config's, tokenizer's and model's


def load_model(
    model: str | PreTrainedModel | PeftModel,
    model_init_kwargs: dict[str, Any] | None,
    peft_config: PeftConfig | None,
    dtype: str = "float32",
) -> PreTrainedModel | PeftModel:
    """Loads a folder or a Hub id by `from_pretrained(**model_init_kwargs)`, in `dtype` unless these have one; or takes
    a model as it is. Wraps it in the adapter of `peft_config`.

    Of a `PeftModel` with several adapters the active one is trained. On a quantized model an adapter's weights are
    bfloat16 but for DoRA's magnitudes, as in TRL.

    Raises:
        `ValueError`: for `model_init_kwargs` without a name to load, an adapter on an adapter or one of virtual
        tokens, a compiled model, one that is no causal language model of text alone, a quantization whose library is
        missing, or quantized weights without an adapter.
    """
    if isinstance(model, str):
        model = _from_name(model, {"dtype": dtype} | model_options(model_init_kwargs))
    elif model_init_kwargs:
        raise ValueError("`model_init_kwargs` is set, but `model` is not a string; pass them to `from_pretrained`.")
    base = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    if isinstance(base, OptimizedModule) or base._compiled_call_impl is not None:
        raise ValueError(
            "`model` is compiled: the forwards of an E-step change their length at every update and carry Python "
            "state, so it would be compiled anew each time; pass the model as it was before `torch.compile`."
        )
    _check_kind(base.config, type(base).__name__)
    _check_adapter(model, peft_config)
    quantized = getattr(base, "is_quantized", False)  # transformers sets it on quantized models only
    if quantized and peft_config is None and not isinstance(model, PeftModel):
        raise ValueError(
            f"`model` has weights quantized by {base.config.quantization_config.quant_method}, which full fine-tuning "
            "can't change; pass a `peft_config` such as `LoraConfig()`, or load plain weights (of a GGUF file with "
            "`quantization_config=GgufConfig(dequantize=True)`)."
        )
    if peft_config is None:
        return model
    model = get_peft_model(model, peft_config)
    if quantized:
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_magnitude_vector" not in name:  # its updates are too small for bfloat16
                p.data = p.data.to(torch.bfloat16)
    return model


def place_of(options: dict[str, Any] | None) -> dict[str, Any]:
    """Picks those of `from_pretrained`'s keyword arguments that say where the files are."""
    return {key: value for key, value in (options or {}).items() if key in _PLACE}


def _config(name: str, shared: dict[str, Any]) -> PretrainedConfig:
    """Loads the configuration; of an adapter that of its base model."""
    place = place_of(shared)
    if find_adapter_config_file(name, **place) is None:
        return AutoConfig.from_pretrained(name, **shared)
    rest = {key: value for key, value in shared.items() if key not in ("revision", "subfolder")}
    return AutoConfig.from_pretrained(PeftConfig.from_pretrained(name, **place).base_model_name_or_path, **rest)


def _from_name(name: str, options: dict[str, Any]) -> PreTrainedModel:
    """Loads by name; what can be known to fail fails before any weights are fetched."""
    shared = {key: options[key] for key in _SHARED if key in options}
    config = options.get("config") or _config(name, shared)
    _check_kind(config, name)
    values = config.to_dict()
    of_hub = "AutoModelForCausalLM" in (values.get("auto_map") or {})  # code in the repository
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not of_hub:
        raise ValueError(
            f"`model` {name!r} is a {type(config).__name__}, which is no causal language model; use one that "
            "`AutoModelForCausalLM` loads."
        )
    of_checkpoint, quantization = values.get("quantization_config"), options.get("quantization_config")
    where = "`model_init_kwargs['quantization_config']`"
    if quantization is None and of_checkpoint is not None:
        quantization, where = of_checkpoint, f"the `quantization_config` of {name!r}"
    if quantization is not None and "gguf_file" not in options:
        try:
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=of_checkpoint is not None)
            quantizer.validate_environment(device_map=options.get("device_map"))
        except (ImportError, RuntimeError) as error:
            kind = quantization["quant_method"] if isinstance(quantization, dict) else type(quantization).__name__
            raise ValueError(f"{where} is {kind}, which can't run here: {error}") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except (SafetensorError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"the weights of {name!r} are damaged ({one_line(error)}); {_CURE}.") from error
    _check_finite(model, name)
    return model


def _check_finite(model: nn.Module, name: str) -> None:
    """Refuses weights with NaN or infinity, which would make numbers out of nothing: one pass over them."""
    for field, tensor in model.named_parameters():
        known = tensor.dtype in _SUMMED and tensor.device.type != "meta" and tensor.numel() > 0
        if known and not bool(torch.isfinite(torch.linalg.vector_norm(tensor.detach(), torch.inf))):
            raise ValueError(
                f"`{field}` in the weights of {name!r} is not finite: they are damaged, or training diverged; {_CURE}."
            )


def _check_kind(config: PretrainedConfig, name: str) -> None:
    """Refuses what is no causal language model of text alone."""
    if config.is_encoder_decoder:
        raise ValueError(
            f"`model` {name!r} is an encoder-decoder ({type(config).__name__}); latents stand between lines of one "
            "text, so use a decoder-only causal language model."
        )
    if config.get_text_config() is not config:
        raise ValueError(
            f"`model` {name!r} is multimodal ({type(config).__name__}); pass its language model alone: "
            "`AutoModelForCausalLM.from_config(model.config.get_text_config())` with the weights of "
            "`model.get_decoder()` and `model.lm_head`."
        )


def _check_adapter(model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None) -> None:
    """Refuses an adapter on an adapter, and one of virtual tokens."""
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"`peft_config` is a {type(peft_config).__name__}; pass a `peft.PeftConfig` such as `LoraConfig(r=16)`."
        )
    if isinstance(model, PeftModel) and peft_config is not None:
        raise ValueError("`peft_config` is set, but `model` is a PeftModel already; pass one of the two.")
    for config in model.peft_config.values() if isinstance(model, PeftModel) else filter(None, [peft_config]):
        if config.is_prompt_learning:
            raise ValueError(
                f"`peft_config` is {type(config).__name__}: virtual tokens have no place in a prefix cache; "
                "use an adapter that changes layers, such as `LoraConfig`."
            )


def check_trainable(model: nn.Module) -> None:
    """
    Raises:
        `ValueError`: for weights that no update could change: none trainable, or a trainable one in float16.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            "`model` has no trainable parameter; load an adapter with "
            "`PeftModel.from_pretrained(model, folder, is_trainable=True)`."
        )
    if any(p.dtype == torch.float16 for p in trained):
        raise ValueError(
            "`model` has trainable weights in float16, whose gradients and optimizer state underflow (6e-8 is the "
            "smallest number); load it with `dtype='float32'` and set `fp16=True` or `bf16=True`, or with "
            "`dtype='bfloat16'`."
        )


def load_tokenizer(name: str, model_init_kwargs: dict[str, Any] | None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of the very files that `model_init_kwargs` name (revision, subfolder, GGUF file).

    Raises:
        `ValueError`: if there is none, or no `name`.
    """
    options = model_init_kwargs or {}
    if not name:
        raise ValueError("`processing_class` is missing, and `model` has no name to load a tokenizer by; pass one.")
    try:
        return AutoTokenizer.from_pretrained(name, **{key: options[key] for key in _SHARED if key in options})
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer loads from {name!r}: it is neither a folder with one nor a repository that can be reached; "
            f"give the folder of a saved model or a Hub id (in Python also `processing_class`). ({error})"
        ) from error


def check_vocabulary(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Raises:
        `ValueError`: for a tokenizer with ids that the model has no embedding for (more rows than ids are usual).
    """
    rows, largest = _whole_shape(model.get_input_embeddings())[0], max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"`processing_class` has ids up to {largest}, but the model embeds {rows} tokens; pass the model's own "
            f"tokenizer, or call `model.resize_token_embeddings({largest + 1})` first."
        )


class Dropout:
    """Holds all dropout rates of a model as they are now, an adapter's too, to switch them off and on again."""

    def __init__(self, model: nn.Module):
        # Some models (OPT, Bloom, Llama's attention) keep the rate as a number and call the function. Falcon reads its
        # own from the config, where it is 0 in all released checkpoints.
        self._rates = [
            (module, name, value)
            for module in model.modules()
            for name, value in vars(module).items()
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, nn.Dropout)))
        ]

    def switch(self, on: bool) -> None:
        """Gives every place its rate, or 0."""
        for module, name, rate in self._rates:
            setattr(module, name, rate if on else 0.0)


def disable_dropout(model: nn.Module) -> None:
    """Sets all dropout to 0."""
    Dropout(model).switch(on=False)


@contextmanager
def cast_to(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Gives a model weights and buffers of `dtype` inside, as `model.to(dtype)` does, and its own again outside.
    `None` changes nothing."""
    changed = [t for t in (*model.parameters(), *model.buffers()) if dtype is not None and t.is_floating_point()]
    own = [tensor.data for tensor in changed]
    try:
        for tensor in changed:
            tensor.data = tensor.data.to(dtype)
        yield
    finally:
        for tensor, data in zip(changed, own, strict=True):
            tensor.data = data


def end_ids(model: PreTrainedModel | PeftModel) -> tuple[int, ...]:
    """Lists the end-of-text ids of the generation config: none, one or several."""
    ids = model.generation_config.eos_token_id
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _whole_shape(embeddings: nn.Module) -> torch.Size:
    weight = cast(torch.Tensor, embeddings.weight)
    return getattr(weight, "ds_shape", weight.shape)  # of ZeRO-3 a process has a part of the matrix only


def state_width(model: PreTrainedModel | PeftModel) -> int:
    """Reads the width of the hidden states that the language-model head of `model` reads."""
    return _whole_shape(model.get_output_embeddings())[1]


def context_length(model: PreTrainedModel) -> int | None:
    """Counts the tokens that the model's context holds; `None` if its config does not say.

    With LongRoPE (Phi-3 and Phi-4 of 128k) the angles of *all* positions change once a text is longer than the
    original context, so a cached prefix would be another one than the plain forward's: the original context counts.
    """
    config = model.config.get_text_config().to_dict()
    lengths = [config.get("max_position_embeddings") or config.get("n_positions")]
    rope = config.get("rope_parameters") or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # some have one for each layer type
    lengths += [k.get("original_max_position_embeddings") for k in kinds if k.get("rope_type") == "longrope"]
    return min((length for length in lengths if length), default=None)
