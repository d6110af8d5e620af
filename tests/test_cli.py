"""The commands and the examples, on a tiny model and a folder of code, offline."""

from __future__ import annotations

import ast
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DefaultFlowCallback

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.cli import launch, main, train
from ra3_trl.cli.data import hold_out, load_splits
from ra3_trl.cli.estimate import estimate
from ra3_trl.config_file import read_experimental
from ra3_trl.experimental.hindsight import proposals
from ra3_trl.segmentation import load_code_directory


ROOT = Path(__file__).parents[1]
SOURCE = '''\
def f{i}(x, limit=10):
    """Adds {i} until the limit."""
    total = x + {i}
    # the expert's own comment
    while total < limit:
        total += {i}
        if total % 3 == 0:
            return "dreißig"
    return total


def g{i}(items):
    kept = [
        item for item in items
    ]
    for item in items:
        if item > {i}:
            kept.append(item)
    return kept
'''
SMALL = [
    "--use_cpu", "--max_length", "256", "--max_latent_length", "5", "--num_latents", "2", "--e_steps", "1",
    "--m_steps", "2", "--report_to", "none", "--per_device_train_batch_size", "2", "--max_boundaries", "3",
    "--eval_documents", "1", "--eval_max_boundaries", "2", "--log_latents_steps", "0", "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models are slower on many threads, and much slower on a machine that does other things."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizers, tiny_model) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", tokenizers["newline_indent"], max_position_embeddings=512).save_pretrained(folder)
    tokenizers["newline_indent"].save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("code")
    for i in range(1, 5):
        (folder / f"part{i}.py").write_text(SOURCE.replace("{i}", str(i)), "utf-8")
    return str(folder)


def ra3(*argv: str) -> int:
    return main.main(list(argv))


# ---- help and refusals ----


@pytest.mark.parametrize("command", [(), ("train",), ("annotate",), ("demo",), ("env",)])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        ra3(*command, "--help")
    assert stop.value.code == 0
    assert "usage: ra3" in capsys.readouterr().out


def test_train_help_is_complete(capsys):
    with pytest.raises(SystemExit):
        ra3("train", "--help-all")
    text = capsys.readouterr().out
    options = set(re.findall(r"--(\w+)", text))
    assert train.make_parser().option_names() | {"config", "accelerate_config"} <= options
    assert text.index("--code_dir") < text.index("--e_steps") < text.index("--gradient_accumulation_steps")


def test_no_command_shows_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        ra3()
    assert stop.value.code == 0
    assert "annotate" in capsys.readouterr().out


BAD = [
    (["--num_latent", "3"], ["--num_latent`", "`--num_latents`"]),
    (["--penalty", "-1"], ["`penalty` is -1.0", "at least 0"]),
    (["--engine", "fast"], ["`engine` is 'fast'", "'branch'"]),
    (["--num_latents", "1"], ["`num_latents` is 1", "raise it to 2"]),
    (["--max_length", "4096"], ["`max_length` is 4096", "lower"]),
    (["--code_dir", "nowhere"], ["`code_dir` is 'nowhere'", "pass a folder"]),
    (["--dataset_name", "nowhere.jsonl"], ["`dataset_name` is 'nowhere.jsonl'", "no such file"]),
    (["--dataset_name", "code/a.py"], ["'code/a.py' is a single program", "give its folder"]),
    (["--kl_coef", "inf"], ["`kl_coef` is inf; it must be at least 0 and at most 1000000.0"]),
    (["--dataset_name", "x", "--code_dir", "y"], ["`dataset_name` is 'x'", "one of the two"]),
    (["--eval_documents", "1", "--eval_fraction", "0.1"], ["`eval_documents`", "one of the two"]),
    (["--eval_documents", "100000"], ["100000 documents", "lower `eval_documents`"]),
    (["--resume_from_checkpoint", "true"], ["`resume_from_checkpoint`", "no checkpoint", "leave it out"]),
    (["--accelerate_config", "nothing"], ["`accelerate_config` is 'nothing'", "multi_gpu"]),
    (["--config"], ["`--config`", "without a value"]),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda value: value[0].strip("-`"))
def test_bad_values_are_refused(options, words, model, code, tmp_path, capsys):
    output = tmp_path / "out"
    source = [] if {"--code_dir", "--dataset_name"} & set(options) else ["--code_dir", code]
    assert (
        ra3("train", "--model_name_or_path", model, *source, "--output_dir", str(output), "--use_cpu", *options) == 2
    )
    said = capsys.readouterr().err
    assert "error: " in said
    assert "Traceback" not in said
    assert [word for word in words if word not in said] == []
    assert not output.exists()


def test_bad_yaml_is_refused(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    for text, word in (
        ("a: [", "not YAML"),
        ("- 1", "not a mapping"),
        ("num_latent: 3", "did you mean `--num_latents`"),
    ):
        file.write_text(text)
        assert ra3("train", "--config", str(file)) == 2
        assert word in capsys.readouterr().err
    file.write_text("num_latents: 2.5")
    with pytest.raises(SystemExit) as stop:  # argparse's own way out
        ra3("train", f"--config={file}")
    assert stop.value.code == 2
    assert "invalid int value: '2.5'" in capsys.readouterr().err


def test_model_is_required(capsys):
    assert ra3("train", "--use_cpu") == 2
    assert "`model_name_or_path` is missing" in capsys.readouterr().err


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("RA3_TRACEBACK", "1")
    with pytest.raises(ValueError, match="model_name_or_path"):
        ra3("train", "--use_cpu")


# ---- train ----


def test_train_on_a_folder_of_code(model, code, tmp_path, monkeypatch):
    """A YAML file with an override; the checkpoint loads with plain transformers, every weight has moved."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(f"model_name_or_path: {model}\ncode_dir: {code}\nlearning_rate: 1e-3\nseed: 3\n")
    assert ra3("train", "--config", "config.yaml", *SMALL, "--seed", "5", "--save_strategy", "no") == 0
    output = Path(f"{Path(model).name}-RA3")
    trained, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert [name for name, value in trained.state_dict().items() if torch.equal(value, before[name])] == []
    args = RA3Config.from_pretrained(str(output))
    assert (args.seed, args.learning_rate, args.num_latents) == (5, 1e-3, 2)
    results = json.loads((output / "all_results.json").read_text())
    assert {"eval_ce", "eval_elbo", "train_loss"} <= set(results)
    card = (output / "README.md").read_text()
    assert Path(code).name in card
    assert str(code) not in card


def test_train_an_adapter_on_a_file(model, code, tmp_path):
    file, output = tmp_path / "rows.jsonl", tmp_path / "out"
    load_code_directory(code).to_json(file)
    argv = [
        "--dataset_name",
        str(file),
        "--use_peft",
        "--lora_r",
        "2",
        "--output_dir",
        str(output),
        "--eval_documents",
        "0",
    ]
    assert ra3("train", "--model_name_or_path", model, *SMALL, *argv, "--lora_target_modules", "q_proj", "v_proj") == 0
    assert (output / "adapter_model.safetensors").is_file()
    ann = tmp_path / "annotated"
    assert ra3("annotate", str(output), "--code_dir", code, "--output", str(ann), "--max_documents", "1",
               "--max_length", "256", "--num_latents", "1") == 0  # fmt: skip
    assert len(datasets.load_dataset(str(ann), split="train")) == 1


def test_proposals_in_hindsight_are_an_experiment(model, code, tmp_path, capsys):
    """The experimental trainer is used where they are asked for; `ra3 annotate` takes them from the checkpoint."""
    common = ["train", "--model_name_or_path", model, "--code_dir", code, *SMALL, "--save_strategy", "no"]
    template = ["--proposal", "template", "--proposal_template", "{prefix}{think}{suffix}"]
    hindsight, plain, output = (str(tmp_path / name) for name in ("hindsight", "plain", "annotated"))
    assert ra3(*common, *template, "--proposal_kl_coef", "0.2", "--output_dir", hindsight) == 0
    log = json.loads(Path(hindsight, "trainer_state.json").read_text())["log_history"]
    (gain,) = (entry["estep/hindsight/gain"] for entry in log if "estep/hindsight/gain" in entry)
    assert f"{gain:+.2f}" in capsys.readouterr().out  # of an update's row
    assert read_experimental(hindsight) == {
        "proposal": "template", "proposal_lines": 4, "proposal_template": "{prefix}{think}{suffix}",
        "proposal_kl_coef": 0.2,
    }  # fmt: skip
    assert ra3(*common, "--output_dir", plain, "--m_steps", "0") == 0
    assert "experimental" not in json.loads(Path(plain, "ra3_config.json").read_text())
    annotate = ["annotate", hindsight, "--code_dir", code, "--max_documents", "1", "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        seen = []
        make = proposals.make_proposals
        patch.setattr(
            proposals, "make_proposals", lambda args, *rest, **more: seen.append(args) or make(args, *rest, **more)
        )
        assert ra3(*annotate) == 0
    assert [args.proposal_kl_coef for args in seen] == [0.2]
    assert ra3(*annotate[:-1], f"{output}-2", "--proposal", "causal", "--proposal_kl_coef", "0.5") == 2
    assert "`proposal_kl_coef` is 0.5, but all latents are the policy's own" in capsys.readouterr().err
    assert ra3("train", "--model_name_or_path", model, "--proposal", "function", "--code_dir", code, *SMALL) == 2
    assert "no command takes one" in capsys.readouterr().err


def test_stopped_and_resumed(model, code, tmp_path, capsys, monkeypatch):
    """Ctrl-C names the command that goes on; that command ends with the weights of a run left alone."""
    common = ["train", "--model_name_or_path", model, "--code_dir", code, *SMALL, "--save_steps", "1"]
    left_alone, stopped = tmp_path / "alone", tmp_path / "stopped run"
    assert ra3(*common, "--output_dir", str(left_alone)) == 0

    def ctrl_c(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(DefaultFlowCallback, "on_step_begin", ctrl_c)
        assert ra3(*common, "--output_dir", str(stopped)) == 130
    typed = capsys.readouterr().err.strip().split("\n")[-1].strip()
    assert typed.endswith(f"--output_dir '{stopped}' --resume_from_checkpoint true")
    assert ra3(*shlex.split(typed)[1:]) == 0
    one, other = (load_file(folder / "model.safetensors") for folder in (left_alone, stopped))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_real_ctrl_c(model, code, tmp_path):
    command = [sys.executable, "-m", "ra3_trl.cli.main", "train", "--model_name_or_path", model, "--code_dir", code]
    command += [*SMALL, "--m_steps", "100000", "--output_dir", str(tmp_path / "out")]
    # A suite that was started in the background ignores Ctrl-C, and so would what it starts.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=heeding, **pipes) as process:
        for line in process.stdout:  # the first log line: training is under way
            if "loss" in line:
                break
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "Stopped before the first checkpoint" in said


SLOW_TO_END = """
import time
from ra3_trl.cli.main import guarded

def command(words):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("ending", flush=True)
        time.sleep(60)

raise SystemExit(guarded(command, []))
"""


def test_a_second_ctrl_c_ends_at_once():
    """The first one ends in order, which may take long; neither shows a traceback."""
    heeding = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SLOW_TO_END], preexec_fn=heeding, **pipes) as process:
        for said in ("begun\n", "ending\n"):
            assert process.stdout.readline() == said
            process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == 130


# ---- dry run ----


def test_dry_run_prints_and_leaves_nothing(model, code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        ra3("train", "--model_name_or_path", model, "--code_dir", code, *SMALL, "--output_dir", "out", "--dry_run")
        == 0
    )
    said = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    for word in ("Documents", "Boundaries", "Branches", "Tokens", "Memory", "Time"):
        assert f"\n{word} " in f"\n{said}"
    assert "7 to train on" in said  # 4 files with 2 functions each, one of them held out


def test_dry_run_leaves_the_weights_alone(model, code, tmp_path):
    args = RA3Config(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=256, e_steps=3,
                     num_latents=2, max_latent_length=4, per_device_train_batch_size=2, boundary_selection="random",
                     gradient_accumulation_steps=2)  # fmt: skip
    trainer = RA3MidTrainer(model, args, load_code_directory(code))
    head = trainer.loop.learner and {name: v.clone() for name, v in trainer.loop.learner.head.state_dict().items()}
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    found = estimate(trainer)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert head and all(
        torch.equal(value, head[name]) for name, value in trainer.loop.learner.head.state_dict().items()
    )
    assert args.max_boundaries == 0
    # 8 documents in 8 chunks, 3 epochs; 3 E-updates of 2 x 2 documents go through 12 of them. G = 2.
    counts, work = found.counts, found.workload
    assert (work.e_chunks, work.m_chunks) == (12, 24)
    assert work.e_branches == 12 * counts["boundaries"] / 8 * 2
    assert work.annotated_boundaries == 3 * counts["boundaries"]
    assert work.annotation_branches == 2 * work.annotated_boundaries
    assert work.m_tokens == 3 * counts["tokens"]
    size = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    assert found.memory["parameters"] == found.memory["gradients"] == found.memory["frozen snapshots"] == size
    assert found.memory["optimizer"] == 2 * size
    # 2 (keys, values) x 2 layers x 2 heads x 8 numbers of 4 bytes for each token kept; branches of up to 16 tokens (a
    # think token and a latent) count as one each.
    assert args.max_latent_length < 16
    kept = args.max_branch_tokens * (args.max_latent_length + 1)
    assert found.memory["branch cache"] == 2 * 2 * 2 * 8 * 4 * kept
    assert all(hours > 0 for hours in found.hours.values())


# ---- annotate ----


@pytest.mark.parametrize("comments", ["keep", "strip"])
def test_annotate_round_trip(model, code, tmp_path, comments):
    """The AST stays, latents stand where they are said to, and without them the text is the expert's."""
    output = tmp_path / "annotated"
    settings = [
        "--max_length",
        "96",
        "--num_latents",
        "2",
        "--max_latent_length",
        "5",
        "--prior_alpha",
        "0.5",
    ]
    settings += ["--existing_comments", comments]
    assert ra3("annotate", model, "--code_dir", code, "--output", str(output), *settings) == 0
    annotated = datasets.load_dataset("parquet", data_files=f"{output}/*.parquet", split="train")
    assert set(load_code_directory(code).column_names) | {"annotated_text", "latents", "num_boundaries"} == set(
        annotated.column_names
    )
    assert annotated["text"][:] == load_code_directory(code)["text"][:]
    assert sum(map(len, annotated["latents"])) > 5
    for row in annotated:
        assert ast.dump(ast.parse(row["annotated_text"])) == ast.dump(ast.parse(row["text"]))
        lines = row["annotated_text"].split("\n")
        for latent in row["latents"]:
            assert lines[latent["line"] - 1].lstrip(" ") == "#" + latent["text"]
        own = {latent["line"] - 1 for latent in row["latents"]}
        rest = "\n".join(line for i, line in enumerate(lines) if i not in own)
        stripped = row["text"].replace("    # the expert's own comment\n", "")
        assert rest == (stripped if comments == "strip" else row["text"])
        assert len(row["latents"]) <= row["num_boundaries"]


def test_annotate_by_policy_and_what_cannot_be(model, tmp_path, capsys):
    """Prompts, empty texts and texts that are no Python come through unchanged; a second run has nothing to do, and a
    folder of something else is refused."""
    file, output = tmp_path / "rows.json", tmp_path / "annotated"
    rows = [
        ("# add\r\n", "x = 1\r\ny = x\r\n"),
        ("", ""),
        ("", "no python (\n"),
        ("def f():\n", "\tx = 'é'\n\treturn x"),
    ]
    datasets.Dataset.from_list([{"prompt": p, "completion": c} for p, c in rows]).to_json(file)
    argv = ["annotate", model, "--dataset_name", str(file), "--output", str(output), "--annotation", "policy",
            "--max_length", "64", "--horizon", "1", "--temperature", "0.7"]  # fmt: skip
    assert ra3(*argv) == 0
    annotated = datasets.load_dataset("parquet", data_files=f"{output}/*.parquet", split="train")
    for (prompt, completion), row in zip(rows, annotated, strict=True):
        own = {latent["line"] - 1 for latent in row["latents"]}
        lines = row["annotated_text"].split("\n")
        assert "\n".join(line for i, line in enumerate(lines) if i not in own) == prompt + completion
    assert annotated["num_boundaries"][1:3] == [0, 0]
    before = [path.stat().st_mtime_ns for path in output.glob("*.parquet")]
    assert ra3(*argv) == 0 and [path.stat().st_mtime_ns for path in output.glob("*.parquet")] == before
    capsys.readouterr()
    assert ra3(*argv[:4], "--output", str(tmp_path), *argv[6:]) == 2
    assert "there already" in capsys.readouterr().err
    assert ra3("annotate", model) == 2
    assert "`push_to_hub`" in capsys.readouterr().err


# ---- data, launch, env ----


def test_splits(tmp_path, code):
    whole = load_code_directory(code)
    saved = tmp_path / "saved"
    datasets.DatasetDict({"a": whole, "b": whole.select([0])}).save_to_disk(str(saved))
    assert len(load_splits(str(saved), None, "b")["b"]) == 1
    with pytest.raises(ValueError, match="no split 'train'; it has 'a', 'b'"):
        load_splits(str(saved), None, "train")
    with pytest.raises(ValueError, match="pass it as `code_dir`"):
        load_splits(code, None, "train")


def test_held_out_files_stay_whole(code):
    whole = load_code_directory(code)  # 4 files with 2 functions each
    kept, held_out = hold_out(whole, 3, None, seed=0)
    assert (len(kept), len(held_out)) == (6, 2)  # one file; half of another would make 3
    assert not set(kept["path"]) & set(held_out["path"])
    assert len(hold_out(whole, 1, None, seed=0)[1]) == 1  # no file is that small
    assert len(hold_out(whole, None, 0.5, seed=0)[1]) == 4
    assert hold_out(whole, 0, None, seed=0)[1] is None


def test_launch_command(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("num_latents: 3\naccelerate_config: multi_gpu\nnum_machines: 1\n")
    parser = train.make_parser()
    command = launch.launch_command(parser, ["--config", str(config), "--num_processes", "2", "--e_steps", "2"])
    at = command.index("--config_file")
    assert command[at + 1].endswith("multi_gpu.yaml")
    assert command[at + 2 :] == [
        "--num_machines", "1", "--num_processes", "2", "-m", "ra3_trl.cli.train", "--config", str(config),
        "--e_steps", "2",
    ]  # fmt: skip
    assert launch.launch_command(parser, ["--e_steps", "2"]) is None


@pytest.mark.slow
def test_train_in_two_processes(model, code, tmp_path):
    output, file = tmp_path / "out", ROOT / "examples" / "accelerate_configs" / "multi_process.yaml"
    argv = ["train", "--model_name_or_path", model, "--code_dir", code, *SMALL, "--output_dir", str(output)]
    command = [sys.executable, "-m", "ra3_trl.cli.main", *argv, "--accelerate_config", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (output / "model.safetensors").is_file()
    # 7 documents at 2 for each of 2 processes are 2 updates, so 3 updates are 1.5 epochs (one process: 4, so 0.75).
    assert json.loads((output / "trainer_state.json").read_text())["epoch"] == 1.5


@pytest.mark.slow
def test_a_real_sigterm_in_two_processes(model, code, tmp_path):
    """`ra3 train` hands it on: the run is saved, says how to go on, and the code is that of the signal."""
    output, file = tmp_path / "out", ROOT / "examples" / "accelerate_configs" / "multi_process.yaml"
    argv = ["train", "--model_name_or_path", model, "--code_dir", code, *SMALL, "--output_dir", str(output)]
    argv += ["--m_steps", "100000", "--accelerate_config", str(file)]
    with subprocess.Popen(
        [sys.executable, "-m", "ra3_trl.cli.main", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        for line in process.stdout:  # the first log line: training is under way
            if "loss" in line:
                break
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert f"`ra3 {shlex.join(argv)} --resume_from_checkpoint true`" in said
    assert [path.name for path in output.glob("checkpoint-*")]


def test_env_names_versions_and_no_secrets(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert ra3("env") == 0
    said = capsys.readouterr().out
    for word in ("python: 3.", "ra3-trl: ", "torch: 2.", "trl: 1.", "evaluate: ", "CPU count: ", "accelerators: "):
        assert f"- {word}" in said
    assert "hf_secret" not in said


# ---- examples ----


@pytest.fixture
def run_example(monkeypatch, capsys):
    """`run_example(name, *words)`: runs a script of examples/ as Python does; what it printed."""

    def run(name: str, *words: str) -> str:
        file = str(ROOT / "examples" / name)
        monkeypatch.setattr(sys, "argv", [file, *words])
        capsys.readouterr()
        runpy.run_path(file, run_name="__main__")
        return capsys.readouterr().out

    return run


def test_one_file_example(run_example):
    """Its claims: the gate stands still while it is held, though latents get better; P(think) ends high where a latent
    can help and low where not, and expert lines get likelier with each phase."""
    assert (ROOT / "examples" / "one_file_ra3.py").read_text("utf-8").count("\n") <= 170
    base, ntp, *updates, e_phase, trained, claim = run_example("one_file_ra3.py").strip().split("\n")

    def numbers(line: str) -> list[float]:
        return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", line)]

    held, free = ([numbers(line) for line in updates if line.endswith(state)] for state in ("held", "free"))
    assert held and len(free) >= 2 and updates[0].endswith("held") and updates[-1].endswith("free")
    assert all(abs(think - held[0][1]) <= 0.02 for _, think in held)
    assert held[0][0] < -2 < 0 < free[-1][0]  # what latents bring where it thinks, their cost paid
    easy, hard, _ = numbers(trained)
    assert easy < 0.1 < 0.9 < hard
    nats = [numbers(line)[2] for line in (ntp, base, e_phase, trained)]
    assert nats == sorted(nats) and nats[-1] > -0.05
    assert numbers(claim)[0] == pytest.approx(nats[-1] - nats[0], abs=2e-3) and numbers(claim)[0] > 0.9


def test_other_formats_example(run_example):
    """Every format places latents that look as the page says."""
    said = dict(re.findall(r"--- (\w+): .*?\n(.*?)(?=\n--- |\Z)", run_example("other_formats.py"), re.DOTALL))
    assert re.search(r"^ *// ", said["slashes"], re.MULTILINE) and "[" in said["prose"] and "<think>" in said["tags"]


def test_midtrain_example(model, code, tmp_path, run_example):
    words = ["--model_name_or_path", model, "--code_dir", code, "--output_dir", str(tmp_path / "out"), *SMALL]
    run_example("midtrain.py", *words)
    assert (tmp_path / "out" / "README.md").is_file()


def test_names_are_listed_without_loading_anything():
    """For Tab completion."""
    names = "assert {'Policy', 'RA3Config', 'RA3MidTrainer'} <= set(dir(ra3_trl))"
    code = f"import sys, ra3_trl; {names}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--learning_rate", "-1"], "`learning_rate` is -1.0; it must be at least 0"),
        (["--report_to", "nothing"], "`report_to` is 'nothing'"),
        (["--annotation_think_prob", "0.3"], "set `prior_alpha` to 1 less it"),
        (["--entropy_coef", "0.1"], "raise `temperature`"),
    ],
)
def test_what_a_run_would_refuse_a_dry_run_does(model, code, capsys, words, says):
    assert ra3("train", "--model_name_or_path", model, "--code_dir", code, "--use_cpu", "--dry_run", *words) == 2
    assert says in capsys.readouterr().err
