"""Two processes: the weights of one with twice the batch, no waiting for ever, streams, resuming, FSDP2.

One launch runs all scenarios of worker.py and worker_fsdp.py: starting two Pythons with PyTorch takes longer than the
scenarios. Both assert their world size.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker
import yaml
from conftest import furthest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ra3_trl import RA3Config
from ra3_trl.generation import AutoModelForCausalLMWithAbstractionHead as Wrapper
from ra3_trl.versions import TRANSFORMERS


HERE = Path(__file__).parent
CONFIGS = HERE.parent / "examples" / "accelerate_configs"
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "multi_process.yaml")]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return -y\n" for i in range(16)]
SHARDS = TRANSFORMERS >= (5, 22)
needs_shards = pytest.mark.skipif(not SHARDS, reason="`Trainer` of transformers to 5.18 wraps a sharded model in DDP")
ENV = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=ENV | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    try:
        out, _ = process.communicate(timeout=240)  # a hang fails here
    finally:
        process.kill()
    assert process.returncode == 0, out[-5000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizers, tiny_model) -> Path:
    """Where every scenario left its file, from two processes and from one."""
    path = tmp_path_factory.mktemp("processes")
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained(path / "model")
    tokenizers["newline_indent"].save_pretrained(path / "model")
    two = start(*LAUNCH, str(HERE / ("worker_fsdp.py" if SHARDS else "worker.py")), str(path))
    try:
        worker.main(path)  # of one process: this one
    finally:
        finish(two)
    return path


def load(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_launchers_on_the_loopback_are_one_process_with_twice_the_batch(tmp_path, tokenizers, tiny_model):
    """`multi_node.yaml` on two nodes of one process without a GPU, by the command of its comment: float tolerance."""
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained(tmp_path / "model")
    tokenizers["newline_indent"].save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    settings = yaml.safe_load((CONFIGS / "multi_node.yaml").read_text()) | {"use_cpu": True, "mixed_precision": "no"}
    (tmp_path / "nodes.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def train(name: str, batch: int, *words: str) -> subprocess.Popen:
        return start(
            "-m", "ra3_trl.cli.train", "--model_name_or_path", str(tmp_path / "model"), "--use_cpu", "--optim", "sgd",
            "--dataset_name", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / name), "--e_steps", "2",
            "--m_steps", "2", "--num_latents", "2", "--max_latent_length", "4", "--learning_rate", "0.05",
            "--e_learning_rate", "0.05", "--per_device_train_batch_size", str(batch), "--report_to", "none",
            "--save_strategy", "no", "--max_length", "256", "--eval_documents", "0", *words,
        )  # fmt: skip

    launch = ["--accelerate_config", str(tmp_path / "nodes.yaml"), "--num_processes", "2", "--main_process_port", port]
    launch += ["--main_process_ip", "127.0.0.1", "--machine_rank"]
    nodes = [train("two", 2, *launch, rank) for rank in ("0", "1")]
    for process in (*nodes, train("one", 4)):
        finish(process)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert furthest(one, two) < 1e-6 < 1e-4 < furthest(one, before)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("scenario", ["same", "uneven", "adapter", "hindsight"])
def test_two_processes_are_one_with_twice_the_batch(folder, scenario):
    """Invariant 5, float tolerance. "uneven": texts of different length, every second one without a boundary, several
    chunks of branches for a batch on one rank and none on the other, and accumulation. "adapter": LoRA rewarded by the
    model without it, with activation checkpointing, on the expand engine. "hindsight": proposals that see the next
    lines, in both phases."""
    one, first, second = (load(folder, f"{scenario}-{rank}") for rank in ("1-0", "2-0", "2-1"))
    assert (one["world"], first["world"], second["world"]) == (1, 2, 2)
    assert furthest(first["weights"], second["weights"]) == 0
    assert furthest(one["weights"], first["weights"]) < 1e-6
    assert one["held"] == pytest.approx(first["held"], rel=1e-5, abs=1e-5) and first["held"] == second["held"]
    # The head's Adam follows the sign of tiny slopes; a step is 1e-3.
    assert furthest(first["head"], second["head"]) == 0 and furthest(one["head"], first["head"]) < 1e-3


@pytest.mark.parametrize("scenario", ["same", "uneven", "hindsight"])
def test_the_log_is_that_of_all_processes(folder, scenario):
    one, first = (load(folder, f"{scenario}-{rank}")["log"] for rank in ("1-0", "2-0"))
    assert len(one) == len(first) > 4
    for wanted, found in zip(one, first, strict=True):
        for name, value in wanted.items():
            if name == "estep/gain_over_other":  # the other document is one of the same process
                assert name in found
            else:  # the head's steps carry on what rounding does to the states
                tolerance = 1e-3 if name.startswith("head/") else 1e-4
                assert found[name] == pytest.approx(value, rel=tolerance, abs=1e-5), name


def test_no_document_is_evaluated_twice(folder):
    """5 documents, 2 a batch, on two processes."""
    one, first, second = (load(folder, f"eval-{rank}") for rank in ("1-0", "2-0", "2-1"))
    assert one["eval_code_tokens"] == first["eval_code_tokens"]
    assert 0 < one["eval_distinct_rate"] <= 1  # what both processes wrote is one text
    for name, value in one.items():
        # Means over batches, as SFTTrainer has them, are of other batches with other processes.
        if name in (
            "eval_gain_over_other",
            "eval_entropy",
            "eval_mean_token_accuracy",
        ):  # each process has its own documents before
            assert first[name] == second[name]
        elif not name.endswith(("runtime", "per_second")):
            assert first[name] == second[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.skipif(
    TRANSFORMERS < (5, 18), reason="transformers to 5.17 loads optimizers to `cpu:0`, which torch refuses"
)
@pytest.mark.parametrize("step", [1, 3])
def test_two_processes_resume_exactly(folder, step):
    for rank in (0, 1):
        alone, again = load(folder, f"left-2-{rank}"), load(folder, f"resumed{step}-2-{rank}")
        assert furthest(alone["weights"], again["weights"]) == furthest(alone["head"], again["head"]) == 0
        assert alone["log"][:-1] == again["log"][:-1]


@pytest.mark.parametrize("how", ["2", pytest.param("fsdp", marks=needs_shards)])
def test_the_wrapper_trains_as_in_one_process(folder, how):
    """DDP and `fully_shard`: one SGD step on two texts each is one on four; all texts are of the same length here, so
    that averages of averages are averages."""
    one, first, second = (load(folder, f"wrapper-{rank}") for rank in ("1-0", f"{how}-0", f"{how}-1"))
    before = Wrapper.from_pretrained(str(folder / "model")).state_dict()
    assert furthest(first, second) == 0 and furthest(one, first) < 1e-5
    moved = [name for name in one if (one[name] - before[name]).abs().max() > 1e-5]
    assert "abstraction_head.outer.weight" in moved and "lm_head.weight" in moved


@pytest.mark.parametrize("workers", [0, 2])
def test_a_process_whose_stream_is_dry_does_not_stop_the_other(folder, workers):
    """Of 11 documents in 2 shards one process has 10 and the other 1: 4 updates of one document on each. The second
    process has empty batches after the first update."""
    seen = [load(folder, f"seen{workers}-2-{rank}") for rank in (0, 1)]
    assert [len(ids) for ids in seen] == [10, 1]
    assert len({*seen[0], *seen[1]}) == 11
    assert {*seen[0], *seen[1]} == set(load(folder, f"seen{workers}-1-0"))  # ids are those of the content
    first, second = (load(folder, f"stream{workers}-2-{rank}") for rank in (0, 1))
    assert furthest(first["weights"], second["weights"]) == 0
    assert [e["step"] for e in first["log"]][:4] == [1, 2, 3, 4]


@needs_shards
@pytest.mark.parametrize(("sharded", "whole"), [("sharded", "same"), ("sharded_uneven", "uneven")])
def test_fsdp2_gives_the_weights_of_one_process(folder, sharded, whole):
    """Rollouts, frozen rewards, the KL's start, updates and the full checkpoint under native `fully_shard` on gloo."""
    assert load(folder, f"{sharded}-0")["world"] == 2
    model, info = AutoModelForCausalLM.from_pretrained(folder / sharded, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert furthest(dict(model.named_parameters()), load(folder, f"{whole}-1-0")["weights"]) < 1e-6


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_weights_of_one_process(folder, stage):
    """ZeRO-2 and ZeRO-3 on the CPU, where DeepSpeed is installed (`DS_BUILD_OPS=0 pip install deepspeed`)."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: DS_BUILD_OPS=0 pip install deepspeed")
    finish(start(*TORCHRUN, str(HERE / "worker_deepspeed.py"), str(folder), str(stage), DS_ACCELERATOR="cpu"))

    def saved(name: str) -> dict[str, torch.Tensor]:
        model, info = AutoModelForCausalLM.from_pretrained(folder / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        return dict(model.named_parameters())

    for scenario in ("same", "uneven"):
        one = load(folder, f"{scenario}-1-0")["weights"]
        assert furthest(saved(f"zero{stage}_{scenario}"), one) < 1e-6
    for step in (1, 3):
        assert furthest(saved(f"zero{stage}_left"), saved(f"zero{stage}_resumed{step}")) == 0


def test_a_checkpoint_of_two_processes_is_refused_by_one(folder, tokenizers):
    """Exactness asks for the same number of processes; nothing is overwritten."""
    checkpoint = folder / "left-2" / "checkpoint-3"
    before = {p: p.stat().st_mtime_ns for p in checkpoint.iterdir()}
    trainer = worker.make(folder, worker.TEXTS, "left", batch=2, optim="adamw_torch", e_learning_rate=1e-3, m_steps=3)
    assert isinstance(trainer.args, RA3Config)
    with pytest.raises(ValueError, match="was written by 2 processes and this run has 1"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert {p: p.stat().st_mtime_ns for p in checkpoint.iterdir()} == before
