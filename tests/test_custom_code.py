"""Models whose code comes with their files: loaded with `trust_remote_code`, without a question at the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import needs_bwrap

from ra3_trl import AutoModelForCausalLMWithAbstractionHead
from ra3_trl.cli import train
from ra3_trl.cli.launch import read_arguments
from ra3_trl.cli.main import main


_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizers, tiny_model) -> str:
    """A checkpoint with code of its own; who asks at the terminal fails."""
    base, tokenizer = tmp_path / "base", tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (base / "modeling_mine.py").write_text(_CODE)
    config = json.loads((base / "config.json").read_text())
    of_code = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    config |= {"model_type": "mine", "architectures": ["MineForCausalLM"], "auto_map": of_code}
    (base / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail(f"asked at the terminal: {asked}"))
    return str(base)


def test_the_wrapper_asks_nothing(folder, tmp_path):
    load = AutoModelForCausalLMWithAbstractionHead.from_pretrained
    model = load(folder, trust_remote_code=True)
    assert type(model.pretrained_model).__name__ == "MineForCausalLM" and model.tokenizer is not None
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", trust_remote_code=True)
    assert type(again.pretrained_model).__name__ == "MineForCausalLM" and again.tokenizer is not None


@pytest.mark.parametrize("command", ["show", "annotate", "diagnose"])
def test_commands_that_open_a_checkpoint(folder, tmp_path, command):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("def f(x):\n    y = x + 1\n    y -= 2\n    return y\n")
    words = {
        "show": [folder, str(tmp_path / "code" / "a.py")],
        "annotate": [folder, "--code_dir", str(tmp_path / "code"), "--output", str(tmp_path / "annotated")],
        "diagnose": [folder, str(tmp_path / "code")],
    }[command]
    assert main([command, *words, "--trust_remote_code"]) == 0


@needs_bwrap
def test_commands_that_draw_samples(folder, tmp_path, monkeypatch):
    """`evaluate` draws, `compare` takes its results and draws and measures the checkpoint besides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("def f(x):\n    y = x + 1\n    y -= 2\n    return y\n")
    task = {"task_id": "T/0", "prompt": "def f(x):\n", "test_list": ["assert f(1) == 1"], "entry_point": "f"}
    Path("toy.jsonl").write_text(json.dumps(task) + "\n")
    drawn = ["--task", "toy.jsonl", "--max_new_tokens", "2", "--dtype", "float32", "--trust_remote_code"]
    assert main(["evaluate", folder, *drawn, "--output_dir", "results/ours"]) == 0
    assert main(["compare", folder, "results/ours", *drawn, "--code_dir", "code", "--dataset_split", "train"]) == 0
    assert "ce" in json.loads(Path("results/compare-toy/compare.json").read_text())["models"]["base"]["cross_entropy"]


def test_training(folder, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("def f(x):\n    y = x + 1\n    y -= 2\n    return y\n")
    words = ["--model_name_or_path", folder, "--use_cpu", "--trust_remote_code", "--report_to", "none"]
    words += ["--code_dir", str(tmp_path / "code"), "--eval_documents", "0"]
    trainer = train.build_trainer(*read_arguments(train.make_parser(), words)[0])
    assert type(trainer.model).__name__ == "MineForCausalLM"
