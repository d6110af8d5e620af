"""`ra3 rlvr`, its rollouts in TRL's `GRPOTrainer`, and the example: few steps on a tiny model."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EOS, furthest, needs_bwrap, weights
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from ra3_trl.cli import rlvr
from ra3_trl.cli.main import guarded
from ra3_trl.config_file import write_settings
from ra3_trl.evaluation import load_benchmark, render_prompt
from ra3_trl.rlvr import CompletionRollout, RLVRData, build_grpo_trainer, load_tasks, until_stop
from ra3_trl.rlvr.data import is_test_task
from ra3_trl.sandbox import Problem


takes_streams = pytest.mark.skipif(version("trl").startswith("1.8."), reason="TRL's trainer of 1.8 takes no streams")
ROOT = Path(__file__).parents[1]
HEAD = "def f(x):\n"
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n"
SMALL = [
    "--max_steps", "3", "--num_generations", "4", "--per_device_train_batch_size", "4", "--use_cpu",
    "--max_completion_length", "12", "--logging_steps", "1", "--report_to", "none", "--learning_rate", "1e-3",
    "--slots", "1",
]  # fmt: skip


def mbpp(*numbers: int) -> list[dict]:
    test = ["assert f(2) == 4"]
    return [{"task_id": n, "text": "Square.", "test_list": test, "test_setup_code": ""} for n in numbers]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizers, tiny_model) -> Path:
    """A checkpoint `model`, and problems `own.jsonl`."""
    folder = tmp_path_factory.mktemp("rlvr")
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained(folder / "model")
    tokenizers["newline_indent"].save_pretrained(folder / "model")
    rows = [{"task_id": f"own/{i}", "prompt": HEAD, "test": CHECK, "entry_point": "f"} for i in range(4)]
    write(folder / "own.jsonl", rows)
    return folder


def cli(folder: Path, output: Path, *options: str) -> int:
    argv = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(output), *SMALL, *options]
    if "--task" not in argv and "--dataset_name" not in argv:
        argv += ["--dataset_name", str(folder / "own.jsonl")]
    return guarded(rlvr.main, argv)


def history(output: Path) -> list[dict]:
    rows = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row for row in rows if "reward" in row]


@pytest.fixture
def make_grpo(tmp_path, tokenizers, tiny_model):
    """`make_grpo(rollout, rewards, prompts, ...)`: a trainer in float32; further arguments are the config's."""

    def make(rollout, rewards, prompts=(HEAD,), model=None, trainer_class=GRPOTrainer, **settings):
        tokenizer = tokenizers["newline_indent"]
        defaults = {
            "output_dir": str(tmp_path / "run"), "max_steps": 1, "num_generations": 4, "report_to": "none",
            "per_device_train_batch_size": 4, "max_completion_length": 16, "use_cpu": True, "bf16": False,
            "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1,
        }  # fmt: skip
        return trainer_class(
            model or tiny_model("llama", tokenizer), rewards, args=GRPOConfig(**defaults | settings),
            train_dataset=Dataset.from_dict({"prompt": list(prompts), "level": range(len(prompts))}),
            processing_class=tokenizer,
            rollout_func=rollout,
        )  # fmt: skip

    return make


# ---- rollouts ----


def odd_reward(completion_ids, **kwargs):
    """Differs from completion to completion."""
    return [float(sum(ids) % 7) for ids in completion_ids]


class Watched(GRPOTrainer):
    """Keeps what the loss is computed from."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.inputs = inputs
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_each_prompt_gets_a_completion_and_the_rewards_see_it_up_to_the_stop(make_grpo, tokenizers):
    """Prompts come repeated, in order. TRL's text has the stop; `until_stop` reads what stands before it, and passes
    on what TRL gives: columns, loggers, state; to coroutines too."""
    seen = {}

    def plain(prompts, completions, completion_ids, **kwargs):
        seen["prompts"], seen["whole"], seen["ids"] = prompts, completions, completion_ids
        return [0.0] * len(prompts)

    async def cut(completions, level, log_metric, log_extra, trainer_state, **kwargs):
        seen["cut"], seen["level"], seen["state"] = completions, level, trainer_state
        log_metric("mine/level", 2.0)
        log_extra("level", level)
        return [0.0] * len(completions)

    prompts = (HEAD, "def g(x):\n    y = 1\n")
    rollout = CompletionRollout(stop=("e", "\n"))
    trainer = make_grpo(
        rollout, [plain, until_stop(cut)], prompts, per_device_train_batch_size=8, shuffle_dataset=False,
        trainer_class=Watched,
    )  # fmt: skip
    trainer.train()
    assert seen["prompts"] == [prompts[0]] * 4 + [prompts[1]] * 4
    assert seen["level"] == [0] * 4 + [1] * 4 and seen["state"] is trainer.state
    assert trainer.state.log_history[0]["mine/level"] == 2.0
    assert len({tuple(ids) for ids in seen["ids"]}) > 4  # drawn, not repeated
    tokenizer, stopped = tokenizers["newline_indent"], 0
    end = tokenizer.convert_tokens_to_ids(EOS)
    for whole, text, ids in zip(seen["whole"], seen["cut"], seen["ids"], strict=True):
        assert "e" not in text and "\n" not in text and whole.startswith(text)
        stopped += whole != text
        assert (ids[-1] == end) == (whole != text or len(ids) < 16)
    assert stopped > 4
    logged = trainer.state.log_history[0]
    assert logged["completions/clipped_ratio"] == pytest.approx(sum(ids[-1] != end for ids in seen["ids"]) / 8)
    # The end that was put behind a stop is not trained.
    inputs = trainer.inputs
    ends = (inputs["completion_ids"] == end) & (inputs["completion_mask"] == 1)
    assert int(ends.sum()) >= stopped and not inputs["tool_mask"][ends].any()


def test_a_reward_keeps_its_name_and_other_rollouts_change_nothing():
    def mine(completions, **kwargs):
        return completions

    read = until_stop(mine)
    assert read.__name__ == "mine"
    assert read(completions=["a\ndef"]) == ["a\ndef"]
    assert read(completions=["a\ndef"], completion_text=["a"]) == ["a"]

    class Callable:
        async def __call__(self, completions, **kwargs):
            return completions

    read_later = until_stop(Callable())
    assert read_later.__name__ == "Callable"
    assert asyncio.run(read_later(completions=["a\ndef"], completion_text=["a"])) == ["a"]
    chat = [[{"role": "assistant", "content": "a\ndef"}]]
    assert read(completions=chat, completion_text=["a"]) == [[{"role": "assistant", "content": "a"}]]


def test_forced_tokens_are_masked_and_get_no_gradient(make_grpo, tokenizers, tiny_model):
    """One step of SGD at rate 1 is minus the gradient of a loss by hand, in which the model's own tokens count."""
    tokenizer = tokenizers["newline_indent"]
    before = tiny_model("llama", tokenizer)
    trainer = make_grpo(
        CompletionRollout(think="always", max_latent_length=3), [odd_reward], model=tiny_model("llama", tokenizer),
        trainer_class=Watched, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
        loss_type="grpo", weight_decay=0.0,
    )  # fmt: skip
    trainer.train()
    inputs = trainer.inputs
    ids, mask = inputs["completion_ids"], inputs["completion_mask"] * inputs["tool_mask"]
    forced = [tokenizer.decode([i]) for i in ids[(inputs["completion_mask"] == 1) & (mask == 0)].tolist()]
    assert "#" in "".join(forced) and set("".join(forced)) <= set("# \n")
    assert 0 < len(forced) < ids.numel() / 2

    def gradient(mask):
        """Advantages times log-probs, mean over the trained tokens of each completion, then over completions."""
        before.zero_grad()
        whole = torch.cat([inputs["prompt_ids"], ids], 1)
        logps = before(whole).logits[:, -ids.shape[1] - 1 : -1].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        loss = -(inputs["advantages"][:, None] * logps * mask).sum(1) / mask.sum(1)
        loss.mean().backward()
        return {name: p.detach() - p.grad for name, p in before.named_parameters()}

    after = dict(trainer.model.named_parameters())
    assert furthest(gradient(mask), after) < 1e-4
    assert furthest(gradient(inputs["completion_mask"]), after) > 1e-2


def test_the_end_of_a_text_is_the_models_choice(make_grpo, tokenizers, tiny_model):
    """At a boundary of `always` it may end the text instead of thinking; that token is trained."""
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("llama", tokenizer)
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] += 3.0
    trainer = make_grpo(
        CompletionRollout(think="always"), [odd_reward], model=model, trainer_class=Watched, num_generations=8,
        per_device_train_batch_size=8,
    )  # fmt: skip
    trainer.train()
    ends = trainer.inputs["completion_ids"] == tokenizer.eos_token_id
    ends &= trainer.inputs["completion_mask"] == 1
    assert ends.any() and bool(trainer.inputs["tool_mask"][ends].all())


def test_never_writes_no_latent(make_grpo):
    counts = []

    def count(completions, latent_lengths, **kwargs):
        counts.extend(len(lengths) for lengths in latent_lengths)
        return [0.0] * len(completions)

    make_grpo(CompletionRollout(think="never"), [count], max_completion_length=32).train()
    assert counts == [0] * 4
    make_grpo(CompletionRollout(think="always"), [count], max_completion_length=32).train()
    assert all(n > 0 for n in counts[4:])


def test_the_model_is_left_as_it_was(make_grpo, tokenizers, tiny_model):
    """Draws of the likeliest token agree, since there is no dropout; then training and checkpointing go on."""
    model = tiny_model("gpt2", tokenizers["newline_indent"], resid_pdrop=0.9, embd_pdrop=0.9, attn_pdrop=0.9)
    trainer = make_grpo(CompletionRollout(), [odd_reward], model=model, top_k=1)
    model.train()
    model.gradient_checkpointing_enable()
    found = trainer.rollout_func([HEAD] * 3, trainer)
    assert len({tuple(ids) for ids in found["completion_ids"]}) == 1
    assert model.training and all(module.training for module in model.modules())
    assert model.transformer.gradient_checkpointing
    model.eval()
    trainer.rollout_func([HEAD], trainer)
    assert not model.training
    assert found["logprobs"] is None


def test_evaluation_draws_as_many_as_it_is_told(make_grpo):
    trainer = make_grpo(CompletionRollout(), [odd_reward], num_generations_eval=2, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(Dataset.from_dict({"prompt": [HEAD, "x"]}))
    assert metrics["eval_completions/max_length"] <= 16


def test_chats_are_rendered_by_the_template(make_grpo, tokenizers):
    tokenizer = tokenizers["newline_indent"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:\n"
    try:
        trainer = make_grpo(
            CompletionRollout(stop=("e",)), [until_stop(odd_reward)], [[{"role": "user", "content": "Hi"}]]
        )
        trainer.train()
        (ids,) = trainer.rollout_func([[{"role": "user", "content": "Hi"}]], trainer)["prompt_ids"]
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(ids) == "user: Hi\nassistant:"


def test_rewards_raise_what_they_reward(make_grpo, tokenizers, tiny_model):
    """A first token that is drawn once in ten times at the start is nearly always drawn after 20 steps."""
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("llama", tokenizer)
    ids = torch.tensor([tokenizer(HEAD).input_ids])
    chances = model(ids).logits[0, -1].softmax(-1).detach()
    token = int((chances - 0.1).abs().argmin())
    assert 0.02 < chances[token] < 0.3

    def first(completion_ids, **kwargs):
        return [float(ids[0] == token) for ids in completion_ids]

    trainer = make_grpo(
        CompletionRollout(), [first], model=model, max_steps=20, num_generations=16, per_device_train_batch_size=16,
        max_completion_length=2, learning_rate=1e-2, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert rewards[0] < 0.5 < 0.9 < sum(rewards[-3:]) / 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"think": "auto"}, "`think` is 'auto'"),
        ({"stop": ("",)}, "`stop` holds an empty text"),
        ({"max_latent_length": 0}, "`max_latent_length`"),
    ],
)
def test_bad_rollouts_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        CompletionRollout(**settings)


def test_what_is_not_heeded_is_refused(make_grpo):
    for setting in ({"repetition_penalty": 1.1}, {"min_p": 0.1}, {"generation_kwargs": {"num_beams": 2}}):
        with pytest.raises(ValueError, match=f"`{next(iter(setting))}` is .*; leave it out"):
            make_grpo(CompletionRollout(), [odd_reward], **setting).train()
    with pytest.raises(ValueError, match="`temperature` is 0.0, at which all completions are the same"):
        make_grpo(CompletionRollout(), [odd_reward], temperature=0.0).train()


def test_no_top_k_is_all(make_grpo):
    make_grpo(CompletionRollout(), [odd_reward], top_k=None).train()


@pytest.mark.parametrize(("kind", "stage", "name"), [("FSDP", None, "FSDP"), ("DEEPSPEED", 3, "ZeRO-3")])
def test_sharded_weights_are_refused(make_grpo, kind, stage, name):
    trainer = make_grpo(CompletionRollout(), [odd_reward])
    plugin = stage and SimpleNamespace(zero_stage=stage)
    trainer.accelerator = SimpleNamespace(distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(ValueError, match=f"sharded by {name}.*use DDP or ZeRO-2"):
        trainer.rollout_func([HEAD], trainer)


# ---- the command ----


@needs_bwrap
@pytest.mark.parametrize("think", ["auto", "always"])
def test_run(folder, tmp_path, think, capsys):
    options = ["--think", think, "--reward_funcs", "code_execution", "fraction_passed", "format"]
    options += ["--task", str(folder / "own.jsonl")] if think == "auto" else []
    assert cli(folder, tmp_path / "out", *options, "--think_cost", "0.5", "--reward_weights", "1", "0", "2") == 0
    rows = history(tmp_path / "out")
    assert len(rows) == 3
    for row in rows:
        names = ("code_execution", "fraction_passed", "format", "think_cost")
        passed, _, parsed, cost = (row[f"rewards/{name}_reward/mean"] for name in names)
        assert row["pass_rate"] == passed
        assert row["reward"] == pytest.approx(passed + 2 * parsed + cost)
        assert row["think_rate"] >= 0
        if think == "always":
            assert row["think_rate"] > 0 and 0 < row["latent_length"] < 13
            assert cost <= -0.5
    start, end = (AutoModelForCausalLM.from_pretrained(p) for p in (folder / "model", tmp_path / "out"))
    if any(row["reward_std"] for row in rows):
        assert furthest(weights(start), weights(end)) > 0
    assert not (tmp_path / "out" / "ra3_config.json").exists()
    assert "own" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture
def rewards_here(tmp_path, monkeypatch) -> Path:
    """`here.length`: a reward of one's own in the current folder, so that nothing needs the sandbox."""
    (tmp_path / "here.py").write_text("def length(completions, **kwargs):\n    return [len(c) for c in completions]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "here", raising=False)
    return tmp_path


OWN = ["--reward_funcs", "here.length"]


def test_resumed_is_as_left_alone(folder, rewards_here):
    one, two = rewards_here / "one", rewards_here / "two"
    options = [*OWN, "--lr_scheduler_type", "constant", "--bf16", "false"]
    assert cli(folder, one, *options) == 0
    assert cli(folder, two, *options, "--max_steps", "2", "--save_steps", "2") == 0
    assert cli(folder, two, *options, "--resume_from_checkpoint", "true") == 0
    assert [row["reward"] for row in history(two)] == [row["reward"] for row in history(one)]
    found = [weights(AutoModelForCausalLM.from_pretrained(path)) for path in (one, two)]
    assert furthest(*found) == 0
    assert furthest(found[0], weights(AutoModelForCausalLM.from_pretrained(folder / "model"))) > 0


def test_adapters(folder, rewards_here, monkeypatch):
    """A new one of a plain checkpoint; then that one, as a checkpoint, is trained further."""
    first = rewards_here / "first"
    lora = ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    assert cli(folder, first, *OWN, *lora, "--think", "always") == 0
    assert (first / "adapter_model.safetensors").is_file() and not (first / "model.safetensors").exists()
    second = rewards_here / "second"
    assert cli(folder, second, *OWN, "--model_name_or_path", str(first)) == 0
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    one, two = (weights(PeftModel.from_pretrained(base, path)) for path in (first, second))
    assert len(two) == len(one)
    assert (second / "adapter_model.safetensors").read_bytes() != (first / "adapter_model.safetensors").read_bytes()


def test_an_ra3_checkpoints_settings_are_kept_and_its_head_is_not(folder, rewards_here, capsys):
    start = rewards_here / "start"
    shutil.copytree(folder / "model", start)
    settings = {"action_format": "python", "max_latent_length": 2, "abstraction_head": True}
    write_settings(settings, start)
    (start / "abstraction_head.safetensors").write_bytes(b"")
    out = rewards_here / "out"
    options = ["--model_name_or_path", str(start), "--think", "always", "--logging_steps", "1"]
    assert cli(folder, out, *OWN, *options) == 0
    assert json.loads((out / "ra3_config.json").read_text())["settings"]["max_latent_length"] == 2
    assert not (out / "abstraction_head.safetensors").exists()
    assert "head is not taken along" in capsys.readouterr().out
    assert all(row["latent_length"] <= 4 for row in history(out))  # 2 tokens, a few bytes more by themselves


def test_mbpp_is_its_training_split(tmp_path, monkeypatch):
    """Of tasks 11 (test), 511 (validation) and 601, 974 (training) the last two are trained on."""
    path = write(tmp_path / "mbpp.jsonl", mbpp(11, 511, 601, 974))

    def load(*options: str):
        script, *_ = rlvr.make_parser().parse_args_and_config(["--use_cpu", "--task", "mbpp", *options])
        found = rlvr.load_data(script)
        assert "\nassert" in found.stop
        return found.train["task_id"][:], found.evaluation and found.evaluation["task_id"][:]

    assert load("--task_file", path) == (["Mbpp/601", "Mbpp/974"], ["Mbpp/511"])
    assert load("--task_file", path, "--allow_test_tasks")[0] == ["Mbpp/601", "Mbpp/974", "Mbpp/11"]
    assert load("--task_file", write(tmp_path / "train.jsonl", mbpp(601))) == (["Mbpp/601"], None)
    with pytest.raises(ValueError, match="none of MBPP's training tasks"):
        load("--task_file", write(tmp_path / "test.jsonl", mbpp(11)))
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((*args, kwargs))
        return Dataset.from_list(mbpp(511, 601))

    monkeypatch.setattr("ra3_trl.rlvr.data.load_dataset", load_dataset)
    assert load() == (["Mbpp/601"], ["Mbpp/511"])
    assert asked == [("google-research-datasets/mbpp", "full", {"split": "train+validation"})]


def test_a_trainer_by_plain_arguments(folder, tmp_path):
    """It evaluates where `eval_strategy` says so, and on the rows that are for it; the arguments stay as they were."""
    rows = [Dataset.from_list([{"prompt": HEAD, "task_id": name}] * 4) for name in ("own/0", "HumanEval/0")]
    args = GRPOConfig(
        str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_completion_length=8,
        per_device_train_batch_size=4, num_generations=4, reward_weights=[2.0],
    )  # fmt: skip
    built = build_grpo_trainer(str(folder / "model"), args, RLVRData(*rows, stop=("\n",)), [odd_reward], think="never")
    assert built.train_dataset["task_id"][:] == ["own/0"] * 4 and built.eval_dataset is None
    assert built.reward_func_names == ["odd_reward", "think_cost_reward"]
    assert built.reward_weights.tolist() == [2.0, 1.0] and args.reward_weights == [2.0]
    assert (built.rollout_func.stop, built.rollout_func.think) == (("\n",), "never")
    args.eval_strategy, args.eval_steps = "steps", 1
    built = build_grpo_trainer(str(folder / "model"), args, RLVRData(*rows), [odd_reward])
    assert built.eval_dataset["task_id"][:] == ["HumanEval/0"] * 4
    with pytest.raises(ValueError, match="row 0 of the data is the task 'HumanEval/0'"):
        build_grpo_trainer(str(folder / "model"), args, RLVRData(rows[1], rows[0]), [odd_reward])


def test_the_rows_of_tasks_have_their_problems(tmp_path):
    """What the rewards read of a row is what `ra3 evaluate` judges by."""
    helper = "def g(x):\n    return x\n\n\ndef f(x):\n"
    files = {
        "humaneval": [{"task_id": "a", "prompt": helper, "test": CHECK, "entry_point": "f"}],
        "mbpp": mbpp(600),
        "stdio": [{"task_id": "a", "prompt": "import sys\n", "inputs": ["1\n"], "outputs": ["2\n"]}],
    }
    for name, rows in files.items():
        path = write(tmp_path / f"{name}.jsonl", rows)
        (row,) = load_tasks(path).train
        (task,) = load_benchmark(path).tasks
        assert Problem.from_row(row) == task.problem
        assert row["prompt"] == render_prompt(task, task.kind, "complete")


BAD = [
    (["--task", "humaneval"], ["`task` is 'humaneval'", "allow_test_tasks"]),
    (["--task", "mbpp", "--dataset_name", "x"], ["`task` is 'mbpp'", "one of the two"]),
    (["--dataset_name", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
    (["--dataset_name", "x", "--task_file", "y"], ["`task_file` is 'y'", "no `task`"]),
    (["--reward_funcs", "execution"], ["`reward_funcs` holds 'execution'", "code_execution"]),
    (["--reward_funcs", "nowhere.func"], ["`reward_funcs` holds 'nowhere.func'", "import nowhere"]),
    (["--reward_weights", "1", "2"], ["`reward_weights` are [1.0, 2.0]", "one weight"]),
    (["--think_cost", "-1"], ["`cost` is -1.0"]),
    (["--timeout", "0"], ["`seconds` is 0.0"]),
    (["--think", "sometimes"], ["invalid choice: 'sometimes'"]),
    (["--repetition_penalty", "1.1"], ["`repetition_penalty` is 1.1", "leave it out"]),
    (["--thinks", "auto"], ["`--thinks` is no option of `ra3 rlvr`", "`--think`"]),
    (["--task", "nowhere.jsonl"], ["nowhere.jsonl is no file"]),
    (["--eval_strategy", "steps", "--eval_steps", "1"], ["`eval_strategy` is set", "no evaluation data"]),
    (["--resume_from_checkpoint", "true"], ["no checkpoint", "leave it out"]),
    (["--model_name_or_path", "/nowhere/at/all"], ["no tokenizer loads from '/nowhere/at/all'"]),
]


@pytest.fixture
def no_model(monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("ra3_trl.rlvr.trainer.GRPOTrainer", loaded)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@needs_bwrap
@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda value: value[0].strip("-`"))
def test_bad_options_end_before_the_model_loads(folder, tmp_path, no_model, capsys, options, words):
    try:
        assert cli(folder, tmp_path / "out", *options) == 2
    except SystemExit as stop:
        assert stop.code == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


ROW = {"prompt": HEAD, "test": CHECK, "entry_point": "f"}
DATA = [
    ([{"text": "x"}], "needs a `prompt`"),
    ([{"prompt": "x"}], "needs `test` and `entry_point`"),
    ([{"prompt": HEAD, "test_list": ["assert f("]}], "row 0 of the data.*are no Python"),
    ([ROW, ROW | {"entry_point": None}], "row 1 .*no `entry_point`"),
    ([ROW, ROW | {"test": None}], "row 1 of the data"),
    ([ROW, ROW | {"prompt": None}], "row 1 of the data has no `prompt`"),
    ([ROW, ROW | {"prompt": ""}], "row 1 of the data has no `prompt`"),
    ([ROW | {"entry_point": 3}], "row 0 of the data: `entry_point` holds 3"),
    ([ROW | {"test": 3}], "row 0 of the data: `tests` holds 3"),
    ([{"prompt": HEAD, "test_list": 3}], "row 0 of the data: `test_list` is 3"),
    ([{"prompt": HEAD, "inputs": "1", "outputs": "1"}], "row 0 of the data: `inputs` is '1'"),
    ([], "an empty file"),
    ([ROW | {"task_id": "HumanEval/3"}], "'HumanEval/3', which by its id"),
    ([{"task_id": 11, "prompt": HEAD, "test_list": ["assert f(1)"]}], "row 0 .* task 11, .*MBPP's test split"),
]


@needs_bwrap
@pytest.mark.parametrize(("rows", "words"), DATA, ids=range(len(DATA)))
def test_bad_data_ends_before_the_model_loads(folder, tmp_path, no_model, capsys, rows, words):
    path = write(tmp_path / "data.jsonl", rows)
    assert cli(folder, tmp_path / "out", "--dataset_name", path) == 2
    assert re.search(words, capsys.readouterr().err)


def test_ids_alone_do_not_make_a_test_task():
    assert not is_test_task({"task_id": 11})  # no MBPP
    assert not is_test_task({"task_id": "Mbpp/601"})
    assert not is_test_task({"task_id": "own/11", "test_list": []})
    assert not is_test_task({"prompt": "x"})
    assert is_test_task({"task_id": "Mbpp/510"})


def test_latents_that_are_no_comments_are_refused():
    def make(think, **settings):
        return CompletionRollout.for_checkpoint(settings or None, think=think)

    assert make("auto").think is None
    assert make("always", action_format="python", max_latent_length=5).latents["max_latent_length"] == 5
    assert make("auto", action_format="slashes").think is None
    for think, name in (("always", "slashes"), ("auto", "python_tags")):
        with pytest.raises(ValueError, match=f"'{name}', whose latents are no comments"):
            make(think, action_format=name)


def test_without_a_sandbox_it_says_so(folder, tmp_path, no_model, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    assert cli(folder, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "bubblewrap" in said


def test_a_prompt_without_room_is_refused(folder, rewards_here, capsys):
    path = write(rewards_here / "data.jsonl", [{"prompt": "x"}, {"prompt": "x = 1\n" * 1000}])
    assert cli(folder, rewards_here / "out", *OWN, "--dataset_name", path) == 2
    said = capsys.readouterr().err
    assert "prompt of row 1" in said and "context of 2048" in said


@takes_streams
def test_a_stream_and_stops_of_ones_own(folder, rewards_here, capsys):
    path = write(rewards_here / "data.jsonl", [{"prompt": HEAD}] * 8)
    options = ["--dataset_name", path, "--dataset_streaming", "true", "--stop", '["\\n", "e"]', "--log_completions"]
    assert cli(folder, rewards_here / "out", *OWN, *options) == 0
    drawn = Dataset.from_parquet(str(rewards_here / "out" / "completions" / "completions_00001.parquet"))
    assert all(text.count("\n") <= 1 and text.count("e") <= 2 for text in drawn["completion"])  # in the last token


@takes_streams
def test_a_streams_rows_are_checked_as_they_come(folder, rewards_here, capsys):
    path = write(rewards_here / "data.jsonl", [{"prompt": HEAD}, {"prompt": HEAD, "task_id": "HumanEval/3"}] * 4)
    options = ["--dataset_name", path, "--dataset_streaming", "true"]
    assert cli(folder, rewards_here / "out", *OWN, *options) == 2
    assert "row 1 of the data is the task 'HumanEval/3'" in capsys.readouterr().err


def test_what_the_card_calls_the_data(tmp_path):
    def name(**options):
        return rlvr.source_name(rlvr.RLVRScriptArguments(**options))

    assert name(task="mbpp") == "google-research-datasets/mbpp"
    assert name(task="mbpp", task_file=write(tmp_path / "x.jsonl", [])) == "x.jsonl"
    assert name(dataset_name="org/data") == "org/data"


def test_help(capsys):
    with pytest.raises(SystemExit):
        rlvr.main(["--help"])
    said = capsys.readouterr().out
    assert said.index("--think_cost") < said.index("GRPOConfig:") < said.index("--num_generations")
    assert "ra3 rlvr --model_name_or_path MODEL" in said


@pytest.mark.slow
@needs_bwrap
def test_two_processes(folder, tmp_path):
    """Each draws samples of its own; metrics are of all."""
    output, file = tmp_path / "out", ROOT / "examples" / "accelerate_configs" / "multi_process.yaml"
    argv = ["--model_name_or_path", str(folder / "model"), "--task", str(folder / "own.jsonl"), *SMALL]
    argv += ["--output_dir", str(output), "--log_completions", "--accelerate_config", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "ra3_trl.cli.rlvr", *argv], capture_output=True, text=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(history(output)) == 3
    drawn = Dataset.from_parquet(str(output / "completions" / "completions_00001.parquet"))
    assert len(drawn) == 8
    texts = drawn["completion"][:]
    assert texts[:4] != texts[4:]


# ---- the example and the docs ----


@needs_bwrap
def test_example(folder, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("rlvr_grpo", ROOT / "examples" / "rlvr_grpo.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    argv = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(tmp_path / "out"), *SMALL[:-2]]
    argv += ["--data_file", write(tmp_path / "mbpp.jsonl", mbpp(11, 510, 601, 602)), "--think", "always"]
    parser = example.TrlParser((example.Arguments, example.GRPOConfig, example.ModelConfig))
    trained = []
    monkeypatch.setattr(
        example.GRPOTrainer, "train",
        lambda self, train=example.GRPOTrainer.train, **kwargs: trained.extend(self.train_dataset["task_id"])
        or train(self, **kwargs),
    )  # fmt: skip
    example.main(*parser.parse_args_and_config(argv))
    assert trained == [601, 602]  # not the test split
    state = json.loads(next((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    assert {"reward", "pass_rate", "think_rate", "latent_length"} <= set(state["log_history"][0])
    assert (tmp_path / "out" / "model.safetensors").is_file()


@needs_bwrap
def test_the_block_of_the_docs_runs(folder, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rlvr.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    block = block.replace('"MODEL"', repr(str(folder / "model")))
    block = block.replace("max_steps=1", "max_steps=1, use_cpu=True, max_completion_length=8")
    exec(compile(block, "docs/rlvr.md", "exec"), {"__name__": "docs"})


def test_the_commands_of_the_docs_are_read():
    """Their options exist and their values fit."""
    text = (ROOT / "docs" / "rlvr.md").read_text("utf-8")
    commands = re.findall(r"^ra3 rlvr (.*)$", text, re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command.partition(" --accelerate_config")[0])
        script, *_ = rlvr.make_parser().parse_args_and_config(["--use_cpu", *words])
        assert script.stop in (None, ["\ndef", "\nclass"])


def test_no_token_in_the_pickled_settings(folder, tmp_path):
    """`training_args.bin` is pushed with the model."""
    token = "hf_" + "NotForOthers12345"
    args = GRPOConfig(
        str(tmp_path / "out"), hub_token=token, model_init_kwargs={"token": token}, use_cpu=True, bf16=False,
        report_to="none", per_device_train_batch_size=4, num_generations=4,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": HEAD, "test": CHECK}])
    trainer = build_grpo_trainer(str(folder / "model"), args, RLVRData(rows), [lambda completions, **_: [0.0]])
    trainer.save_model()
    assert trainer.args.hub_token == token
    assert token.encode() not in (tmp_path / "out" / "training_args.bin").read_bytes()


def test_pushes_go_through_the_trainers_door(folder, tmp_path, monkeypatch):
    """Tokens that this process knows are looked for, `.env` stays, and names are no markup on TRL's card."""
    token, uploads = "hf_" + "NotForOthers12345", []
    monkeypatch.setattr("ra3_trl.hub.push.upload_folder", lambda **options: uploads.append(options))
    args = GRPOConfig(
        str(tmp_path / "out"), hub_token=token, use_cpu=True, bf16=False, report_to="none",
        per_device_train_batch_size=4, num_generations=4,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": HEAD, "test": CHECK}])
    trainer = build_grpo_trainer(str(folder / "model"), args, RLVRData(rows), [lambda completions, **_: [0.0]])
    trainer.hub_model_id, trainer.push_in_progress = "lab/one", None
    trainer.push_to_hub(dataset_name="<img src=x>", model_name="<b>one</b>")
    assert {".env", "_*", "checkpoint-*"} <= set(uploads[0]["ignore_patterns"]) and uploads[0]["token"] == token
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "<img" not in card and "<b>" not in card and "one" in card
    (tmp_path / "out" / "notes.txt").write_text(token)
    with pytest.raises(ValueError, match=r"notes.txt holds `hub_token`"):
        trainer.push_to_hub(dataset_name="x")
    assert len(uploads) == 1
