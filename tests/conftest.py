"""Small tokenizers of the four kinds that matter, tiny random models, and the slow path they are checked against.

Nothing here needs the network. Tokenizers are trained on `corpus.txt`, three of our files as they were one day: the
samples of random models must not change with the Python that runs the tests, nor with our code.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import subprocess
from pathlib import Path


# Before it is read: what is looked for in vain is not asked for five times.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from slow_path import SlowPath
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.experimental.hindsight import HindsightConfig, HindsightTrainer
from ra3_trl.segmentation import PYTHON, Segmenter


torch.set_num_threads(1)  # tiny models: a second thread only waits


# Few tests, each long; in the order of xdist (by the number of tests) one worker would wait for the other at the end.
_LONG = ("test_processes.py", "test_launch.py", "test_gpu_scripts.py", "test_replication.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)


def _bubblewrap_works() -> bool:
    """Whether it is there and may make namespaces; many containers forbid that."""
    trial = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
    return shutil.which("bwrap") is not None and subprocess.run(trial, capture_output=True).returncode == 0


needs_bwrap = pytest.mark.skipif(not _bubblewrap_works(), reason="bubblewrap is missing or may not make namespaces")

EOS, PAD, BOS = "<|end|>", "<|pad|>", "<s>"
TOKENIZERS = ("newline_alone", "newline_indent", "newline_punctuation", "sentencepiece")
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


CORPUS = Path(__file__).with_name("corpus.txt").read_text("utf-8")


def _byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def _newline_alone() -> Tokenizer:
    """As GPT-2's vocabulary does on code: `\\n` is a token of its own, white space before a word another."""
    split = pre_tokenizers.Split("\n", "isolated")
    return _byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def _newline_indent() -> Tokenizer:
    """As SmolLM2: GPT-2's regex trained on code, so that `\\n` and three spaces of the indent are one token."""
    return _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _newline_punctuation() -> Tokenizer:
    """As Llama-3 and Qwen: `):\\n` and `\\n\\n` are tokens."""
    split = pre_tokenizers.Split(Regex(_QWEN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return _byte_level(pre_tokenizers.Sequence([split, byte_level]))


def _sentencepiece() -> Tokenizer:
    """As Llama-2: spaces are `▁`, one is put in front, unknown characters (`\\n` too) fall back to bytes, BOS."""
    to_metaspace = normalizers.Replace(" ", "▁")
    learner = Tokenizer(models.BPE())
    learner.normalizer = to_metaspace
    learner.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"▁+(?=▁)|▁?[A-Za-z_]+|▁?[0-9]|▁?[^▁A-Za-z0-9_]+|▁+"), "isolated"
    )
    lines = [line for line in CORPUS.split("\n") if line.isascii()]
    learner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    learned = learner.get_vocab()
    base = [BOS, EOS, PAD, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: i for i, token in enumerate([*base, *sorted(learned, key=learned.get)])}
    # The merges are not exposed by the object; its JSON form has them.
    import json

    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), to_metaspace])
    strip = decoders.Strip(content=" ", left=1, right=0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (BOS, EOS, PAD)])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """The four kinds by name."""
    makers = dict(
        zip(TOKENIZERS, (_newline_alone, _newline_indent, _newline_punctuation, _sentencepiece), strict=True)
    )
    out = {}
    for name, make in makers.items():
        extra = {"bos_token": BOS} if name == "sentencepiece" else {}
        out[name] = PreTrainedTokenizerFast(tokenizer_object=make(), eos_token=EOS, pad_token=PAD, **extra)
    return out


MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.fixture
def chat(tokenizers):
    """`chat(template)`: a tokenizer with the tokens and the template of a chat."""

    def make(template: str, kind: str = "newline_indent") -> PreTrainedTokenizerFast:
        tokenizer = copy.deepcopy(tokenizers[kind])
        tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(autouse=True)
def tokenizers_are_left_alone(tokenizers):
    """They are shared: a test that adds a token to one would change what later tests see."""
    before = {name: len(tokenizer) for name, tokenizer in tokenizers.items()}
    yield
    assert {name: len(tokenizer) for name, tokenizer in tokenizers.items()} == before, "change a copy"


@pytest.fixture(autouse=True)
def loggers_are_left_alone():
    """A level that a test leaves behind would hide warnings from later tests."""
    before = {name: logging.getLogger(name).level for name in ("ra3_trl", "transformers", "trl")}
    yield
    assert {name: logging.getLogger(name).level for name in before} == before, "put the level back"


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request, tokenizers) -> PreTrainedTokenizerFast:
    """Each of the four kinds in turn."""
    return tokenizers[request.param]


@pytest.fixture(scope="session")
def segmenter():
    """Factory of segmenters: `segmenter(tokenizer, max_tokens=..., existing_comments=...)`."""

    def make(tokenizer, max_tokens: int = 100_000, existing_comments: str = "keep") -> Segmenter:
        return Segmenter(tokenizer, PYTHON, max_tokens, existing_comments)

    return make


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GQA = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 2048}
_SETTINGS = {
    "llama": _GQA,
    "qwen2": _GQA,
    "qwen3": {**_GQA, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {**_SMALL, "max_position_embeddings": 512, "use_parallel_residual": True},
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 512,
        "activation_function": "gelu",
    },
    "phi": {**_GQA, "num_key_value_heads": 4},
    "starcoder2": {**_GQA, "sliding_window": None},
    "mistral": {**_GQA, "sliding_window": 12},
    "gemma2": {
        **_GQA,
        "head_dim": 16,
        "sliding_window": 12,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 5.0,
    },
}
ARCHITECTURES = tuple(_SETTINGS)


_SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
_SCALED = {"logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 1.5, "residual_multiplier": 0.7}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_SETTINGS |= {  # tests/test_architectures.py
    "qwen2_moe": {**_GQA, **_MOE, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_GQA, **_MOE, "head_dim": 16},
    "mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 12},
    "ministral": {**_GQA, **_SLIDING, "head_dim": 8},
    "phi3": {**_GQA, "sliding_window": 12, "original_max_position_embeddings": 2048},
    "granite": {**_GQA, **_SCALED},
    "olmo2": _GQA,
    "olmo3": {**_GQA, **_SLIDING},
    "smollm3": {**_GQA, "no_rope_layers": [1, 0]},
    "gpt_bigcode": _GPT,
    "gemma": {**_GQA, "head_dim": 16},
    "gemma3_text": {**_GQA, **_SLIDING, "head_dim": 16, "query_pre_attn_scalar": 16},
    "cohere": {**_GQA, "logit_scale": 0.25},
    "cohere2": {**_GQA, **_SLIDING, "head_dim": 8, "logit_scale": 0.25},
    "deepseek_v3": {
        **_GQA, **_MLA, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1,
    },
    "hunyuan_v1_dense": {**_GQA, "head_dim": 8},
    "ernie4_5": {**_GQA, "head_dim": 8},
    "seed_oss": {**_GQA, "head_dim": 8},
    "glm4": {**_GQA, "head_dim": 8},
    "exaone4": {**_GQA, **_SLIDING},
    "gpt_oss": {**_GQA, **_SLIDING, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {**_GQA, "layer_types": ["conv", "full_attention"]},
    "stablelm": _GQA,
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model():
    """Factory of random models: `tiny_model("llama", tokenizer)`; weights so large that no distribution is flat.

    Attention is eager, the transparent one: PyTorch's fused attention ignores Gemma 2's soft-capping.
    """

    def make(model_type: str, tokenizer, seed: int = 0, **overrides):
        special = {
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        settings = {**_SETTINGS[model_type], **special, "vocab_size": len(tokenizer), **overrides}
        config = AutoConfig.for_model(model_type, **settings)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
                else:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    return make


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference between parameters of the same names."""
    assert set(a) == set(b)
    return max(float((a[name].detach() - b[name].detach()).abs().max()) for name in a)


@pytest.fixture
def make_trainer(tmp_path, tokenizers, tiny_model):
    """`make_trainer(data, e_steps=2, ...)`: a trainer with small settings, on a new copy of the same random model each
    time; `data` and `eval_data` are lists of texts or data sets, further arguments the config's. With `proposal` it is
    the one of the experiment."""

    def make(data, eval_data=None, model=None, callbacks=None, peft_config=None, reward_funcs=None,
             optimizers=(None, None), **settings):  # fmt: skip
        defaults = {
            "output_dir": str(tmp_path / "run"), "max_length": 256, "e_steps": 2, "m_steps": 2, "num_latents": 3,
            "max_latent_length": 4, "learning_rate": 1e-3, "e_learning_rate": 1e-3, "per_device_train_batch_size": 2,
            "save_strategy": "no", "report_to": "none", "log_latents_steps": 0, "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        tokenizer = copy.deepcopy(tokenizers["newline_indent"])  # a format with tags adds them
        data, eval_data = (Dataset.from_dict({"text": d}) if isinstance(d, list) else d for d in (data, eval_data))
        kinds = (HindsightTrainer, HindsightConfig) if "proposal" in settings else (RA3MidTrainer, RA3Config)
        trainer, config = kinds
        return trainer(
            model or tiny_model("llama", tokenizer), config(**defaults | settings), data, eval_data, tokenizer,
            callbacks, optimizers, peft_config=peft_config, reward_funcs=reward_funcs,
        )  # fmt: skip

    return make


@pytest.fixture
def quiet():
    """No progress bars of datasets, and as many threads afterwards as before."""
    threads = torch.get_num_threads()
    disable_progress_bars()
    yield
    enable_progress_bars()
    torch.set_num_threads(threads)


def killed_at(step: int):
    """An `on_step_begin` of `CallbackHandler` by which a run is killed before update number `step`, counted from 0."""

    def on_step_begin(self, args, state, control):
        if state.global_step == step:
            raise KeyboardInterrupt
        return control

    return on_step_begin


def need_vllm() -> None:
    """Skips a file of tests where vLLM is missing; else it runs small, on a CPU, without network."""
    pytest.importorskip("vllm", reason="vLLM is tested by `make test-vllm`")
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def slow_path():
    """Factory of [`SlowPath`]: `slow_path(model, tokenizer, max_length=..., temperature=...)`."""
    return SlowPath
