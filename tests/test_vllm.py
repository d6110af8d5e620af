"""vLLM itself: completions of `generate`, token for token, and RLVR with TRL's engine in the trainer's process.

`make test-vllm` runs it, in an environment of its own: vLLM on a CPU, SmolLM2-135M, HumanEval's prompts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch


pytest.importorskip("vllm", reason="vLLM is tested by `make test-vllm`")
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
TOKENS = int(os.environ.get("RA3_TEST_TOKENS", "64"))
PROMPTS = 20


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    from ra3_trl.cli.smollm2 import smollm2
    from ra3_trl.evaluation import load_benchmark, render_prompt
    from ra3_trl.models import load_tokenizer

    tokenizer = load_tokenizer(str(smollm2()), {})
    tasks = load_benchmark("humaneval", max_tasks=PROMPTS).tasks
    return [tokenizer(render_prompt(task, task.kind, "complete")).input_ids for task in tasks]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, prompts) -> Path:
    """SmolLM2-135M with a head that has learned nothing of use: behind every second prompt it says yes."""
    from transformers import AutoModel

    from ra3_trl.cli.smollm2 import smollm2
    from ra3_trl.models import AbstractionConfig, AbstractionHead, save_head

    folder = tmp_path_factory.mktemp("vllm") / "smol"
    folder.mkdir()
    for path in smollm2().iterdir():
        (folder / path.name).symlink_to(path)
    torch.manual_seed(0)
    head = AbstractionHead(AbstractionConfig(576, trained_on=1))
    head.outer.weight.data.normal_(std=3.0)
    with torch.no_grad():
        body = AutoModel.from_pretrained(folder, dtype=torch.float32)
        states = torch.stack([body(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts])
        head.outer.bias[0] -= head(states)[0].median()
    save_head(head, folder)
    return folder


@pytest.fixture(scope="module")
def engine(checkpoint):
    from ra3_trl.generation import VLLMEngine

    engine = VLLMEngine(str(checkpoint), dtype="float32", options={"max_model_len": 1024, "max_num_seqs": PROMPTS})
    yield engine
    vars(engine).pop("llm", None)


@pytest.fixture(scope="module")
def model(checkpoint):
    from ra3_trl.evaluation.evaluate import load_checkpoint

    return load_checkpoint(str(checkpoint), dtype="float32")


KNOBS = {
    "nothing": {},
    "stop": {"stop": ("\n\n", " return")},
    "always": {"think": "always"},
    "never": {"think": "never"},
    "gate": {"think": "auto"},
    "threshold": {"think": "auto", "threshold": 0.01},
}


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("knob", KNOBS)
def test_greedy_completions_are_those_of_generate(engine, model, prompts, knob, monkeypatch):
    """Of each of the 20 prompts all tokens, which of them were forced, the text, and whether it ended."""
    from ra3_trl.generation import CompletionSettings, draw_completions
    from ra3_trl.models import AbstractionConfig, AbstractionHead

    if knob == "threshold":  # without a gate: P(think) is that of the tokens
        for holder in (engine, model):
            monkeypatch.setattr(holder, "abstraction_head", AbstractionHead(AbstractionConfig(576)))
    settings = CompletionSettings(max_new_tokens=TOKENS, **KNOBS[knob])
    expected = [completion for (completion,) in draw_completions(model, prompts, settings)]
    drawn = [completion for (completion,) in engine.draw(prompts, settings)]
    same = [a.token_ids == b.token_ids for a, b in zip(drawn, expected, strict=True)]
    tokens, forced = sum(len(b.token_ids) for b in expected), sum(sum(b.forced) for b in expected)
    print(f"{knob}: {sum(same)} of {len(same)} prompts, {tokens} tokens, {forced} forced")
    assert drawn == expected
    assert any(any(completion.forced) for completion in expected) == (knob in ("always", "gate", "threshold"))


@pytest.mark.timeout(3000)
def test_samples_have_seeds(engine, prompts):
    from ra3_trl.generation import CompletionSettings

    settings = CompletionSettings(num_samples=3, temperature=0.8, max_new_tokens=8, think="always")
    first, again = (engine.draw(prompts[:2], settings, seed=7) for _ in range(2))
    other = engine.draw(prompts[:2], settings, seed=8)
    assert first == again != other
    assert all(len({completion.token_ids for completion in of_prompt}) > 1 for of_prompt in first)


# ---- RLVR ----


def spaces(completions, **kwargs) -> list[float]:
    """The share of a completion's characters that are spaces: a reward that a few updates can raise."""
    return [text.count(" ") / max(1, len(text)) for text in completions]


def rewards(checkpoint: Path, output: Path, use_vllm: bool, think: str, seed: int, updates: int) -> list[float]:
    from datasets import Dataset
    from trl import GRPOConfig

    from ra3_trl.rlvr import RLVRData, build_grpo_trainer

    data = Dataset.from_list([{"prompt": f"def f{i}(x, y):\n"} for i in range(8)])
    args = GRPOConfig(
        str(output), use_cpu=False, bf16=False, max_steps=updates, num_generations=8, per_device_train_batch_size=8,
        max_completion_length=12, learning_rate=1e-5, logging_steps=1, report_to="none", save_strategy="no", seed=seed,
        use_vllm=use_vllm, vllm_mode="colocate", vllm_max_model_length=128, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    trainer = build_grpo_trainer(
        str(checkpoint), args, RLVRData(data, stop=("\n\n\n",)), [spaces], think=think, think_cost=0.0
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    if use_vllm:  # the importance weight is near 1: both have the same weights and the same distribution
        ratios = [row["sampling/importance_sampling_ratio/mean"] for row in rows]
        print("importance weights", ratios)
        differences = [row["sampling/sampling_logp_difference/max"] for row in rows]
        print("differences", differences)
        assert think != "auto" or max(differences) < 1e-2
    return [row["reward"] for row in rows]


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="TRL can't bring the weights of vLLM's CPU build up to date: it packs them when they are loaded",
)
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("think", ["auto", "always"])
def test_rewards_of_ten_updates_are_those_of_the_present_path(checkpoint, tmp_path, think):
    """The mean difference over the updates is within three standard errors, from the spread of the rewards."""
    by_vllm = np.array(rewards(checkpoint, tmp_path / "vllm", True, think, 0, 10))
    plain = np.array(rewards(checkpoint, tmp_path / "plain", False, think, 0, 10))
    error = np.sqrt((by_vllm.var(ddof=1) + plain.var(ddof=1)) / 10)
    print(json.dumps({"think": think, "vllm": by_vllm.round(4).tolist(), "plain": plain.round(4).tolist()}))
    assert abs(by_vllm.mean() - plain.mean()) < 3 * error
