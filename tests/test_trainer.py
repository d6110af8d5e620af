"""What must always hold of a run (docs/design.md, "What must always hold"), on tiny models, CPU, offline."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import furthest, weights
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, SFTConfig, SFTTrainer

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.versions import CHECKPOINTING


TEXTS = [
    f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n"
    "    for k in range(y):\n        y -= k\n    return y\n"
    for i in range(12)
]


@pytest.fixture
def tokenizer(tokenizers) -> PreTrainedTokenizerFast:
    return tokenizers["newline_indent"]


@pytest.fixture
def make(make_trainer):
    """`make(e_steps=2, ...)`: a trainer on TEXTS."""

    def make(texts=TEXTS, eval_texts=None, **settings) -> RA3MidTrainer:
        return make_trainer(texts, eval_texts, **settings)

    return make


@pytest.mark.parametrize(("packing", "architecture"), [(True, "llama"), (False, "llama"), (True, "qwen3_moe")])
def test_without_e_steps_it_is_sft(make, tokenizer, tiny_model, tmp_path, packing, architecture):
    """Invariant 2: losses and weights of TRL's SFTTrainer after 20 updates, float32, at most 1e-5 apart. A mixture of
    experts keeps its router loss, as there."""
    shared = {
        "max_length": 256, "learning_rate": 1e-3, "per_device_train_batch_size": 3, "max_steps": 20,
        "lr_scheduler_type": "linear", "logging_steps": 1, "report_to": "none", "save_strategy": "no", "seed": 3,
        "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    sft = SFTTrainer(
        tiny_model(architecture, tokenizer),
        SFTConfig(output_dir=str(tmp_path / "sft"), bf16=False, packing=False, **{CHECKPOINTING: False}, **shared),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    before = weights(sft.model)
    sft.train()
    ours = make(model=tiny_model(architecture, tokenizer), e_steps=0, m_steps=-1, packing=packing, **shared)
    ours.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (sft, ours)]
    assert len(losses[0]) == len(losses[1]) == 20
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    assert furthest(weights(sft.model), weights(ours.model)) < 1e-5
    assert furthest(before, weights(ours.model)) > 1e-3  # both did move


def test_the_router_loss_can_be_weighed_or_left_out(make, tokenizer, tiny_model):
    """Its own weight (0.001), a hundred times as much, none: in an E-phase and an M-phase the routers learn otherwise.
    In the log it stands apart; 0 is no router loss at all."""
    runs = {}
    for coef in (None, 0.1, 0.0):
        trainer = make(model=tiny_model("qwen3_moe", tokenizer), router_aux_loss_coef=coef, optim="sgd", e_steps=1,
                       m_steps=1, learning_rate=0.05, e_learning_rate=0.05)  # fmt: skip
        trainer.train()
        runs[coef] = weights(trainer.model), trainer.state.log_history[0].get("estep/loss_router")
    assert runs[0.0][1] is None and runs[0.1][1] == pytest.approx(100 * runs[None][1], rel=1e-3)
    assert furthest(runs[None][0], runs[0.0][0]) > 1e-7
    assert furthest(runs[0.1][0], runs[0.0][0]) > 10 * furthest(runs[None][0], runs[0.0][0])
    # A forward's loss counts for the boundaries that those tried in it stand for, all of them in the mean.
    every = make(model=tiny_model("qwen3_moe", tokenizer), e_steps=1, m_steps=0, boundary_selection="random")
    every.train()
    assert every.state.log_history[0]["estep/loss_router"] == pytest.approx(runs[None][1], rel=0.3)
    with pytest.raises(ValueError, match="`router_aux_loss_coef` is 0.1, but LlamaForCausalLM has no router loss"):
        make(router_aux_loss_coef=0.1)


def test_infinite_penalty_is_next_token_prediction(make):
    a, b = make(penalty=float("inf"), m_steps=3), make(e_steps=0, m_steps=3)
    a.train(), b.train()
    assert furthest(weights(a.model), weights(b.model)) == 0


@pytest.mark.parametrize("phase", ["E", "M"])
def test_every_parameter_learns(make, phase):
    trainer = make(e_steps=2, m_steps=0) if phase == "E" else make(e_steps=0, m_steps=2)
    before = weights(trainer.model)
    trainer.train()
    stuck = [name for name, p in weights(trainer.model).items() if torch.equal(p, before[name])]
    assert not stuck


def test_accumulation_equals_a_large_batch(make):
    """Invariant 5: 4 x 1 = 2 x 2 = 1 x 4 documents an update, in both phases. Plain SGD shows the gradients."""
    runs = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        trainer = make(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd",
            learning_rate=0.05, e_learning_rate=0.05,
        )  # fmt: skip
        trainer.train()
        runs.append(weights(trainer.model))
    assert furthest(runs[0], runs[1]) < 1e-5
    assert furthest(runs[0], runs[2]) < 1e-5


def test_any_bound_on_branches_gives_the_same_update(make):
    runs = []
    for bound in (16, 100_000):
        trainer = make(max_branch_tokens=bound, optim="sgd", learning_rate=0.05, e_learning_rate=0.05)
        trainer.train()
        runs.append(weights(trainer.model))
    assert furthest(*runs) < 1e-5


@pytest.mark.parametrize("reward_model", ["live", "frozen"])
def test_resumed_run_is_the_run_left_alone(make, tmp_path, reward_model):
    """Invariant 4: from a checkpoint in the E-phase (1, 2 = its end) and in the M-phase (4): bit for bit."""
    alone = make(e_steps=2, m_steps=4, save_strategy="steps", save_steps=1, reward_model=reward_model)
    alone.train()
    log = [{k: v for k, v in e.items() if not k.startswith(("seconds", "train_"))} for e in alone.state.log_history]
    for step in (1, 2, 4):
        folder = tmp_path / f"resumed{step}"
        shutil.copytree(tmp_path / "run" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        trainer = make(e_steps=2, m_steps=4, output_dir=str(folder), reward_model=reward_model)
        trainer.train(resume_from_checkpoint=True)
        assert furthest(weights(alone.model), weights(trainer.model)) == 0
        again = [
            {k: v for k, v in e.items() if not k.startswith(("seconds", "train_"))} for e in trainer.state.log_history
        ]
        assert again[:-1] == log[:-1]


KILLED = """
import os, signal, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from ra3_trl import RA3Config, RA3MidTrainer

folder, out, at = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == at:
            os.kill(os.getpid(), signal.SIGKILL)

args = RA3Config(output_dir=out, max_length=256, e_steps=4, m_steps=3, num_latents=2, max_latent_length=4,
                 save_steps=2, report_to="none", log_latents_steps=0, disable_tqdm=True, use_cpu=True,
                 e_learning_rate=1e-3)
texts = [f"def f{i}(x):\\n    y = x + {i}\\n    return y\\n" for i in range(8)]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
trainer = RA3MidTrainer(model, args, Dataset.from_dict({"text": texts}), None, tokenizer, callbacks=[Kill()])
trainer.train(resume_from_checkpoint=at == 99)
trainer.save_model(out + "/final")
"""


def test_a_run_killed_by_sigkill_goes_on(tmp_path, tokenizer, tiny_model, monkeypatch):
    """Killed in the E-phase (update 3) and in the M-phase (update 5), each one update after a checkpoint, in
    children of this process; itself it does the rest."""
    folder = tmp_path / "model"
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def run(out: str, at: int) -> None:
        monkeypatch.setattr(sys, "argv", ["killed.py", str(folder), str(tmp_path / out), str(at)])
        exec(KILLED, {})

    def start(out: str, at: int) -> int:
        child = os.fork()
        if child == 0:
            try:
                run(out, at)
            finally:
                os._exit(1)
        return child

    first = [start("in_e", 3), start("in_m", 5)]
    run("alone", 98)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in first] == [-signal.SIGKILL] * 2
    assert sorted(p.name for p in (tmp_path / "in_e").glob("checkpoint-*")) == ["checkpoint-2"]
    assert sorted(p.name for p in (tmp_path / "in_m").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    for out in ("in_e", "in_m"):
        run(out, 99)
    alone, *others = (AutoModelForCausalLM.from_pretrained(tmp_path / o / "final") for o in ("alone", "in_e", "in_m"))
    for other in others:
        assert furthest(weights(alone), weights(other)) == 0


def test_an_incomplete_checkpoint_is_skipped(make, tmp_path):
    make(save_strategy="steps", save_steps=2).train()
    run = tmp_path / "run"
    assert not (run / "_incomplete").exists()
    (run / "_incomplete" / "checkpoint-9").mkdir(parents=True)
    trainer = make(m_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    (run / "checkpoint-4" / "ra3_state.json").unlink()
    with pytest.raises(ValueError, match=r"ra3_state.json is missing"):
        make(m_steps=4).train(resume_from_checkpoint=True)


def test_saved_checkpoint_is_a_plain_one(make, tmp_path, tokenizer):
    """Invariant 6: plain transformers loads it, same logits, no key missing or left over."""
    trainer = make(eval_texts=TEXTS[:2])
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card(dataset_name="a test")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Trained on a test" in card and "datasets:" not in card  # no Hub id, so not in the metadata
    assert "first evaluation (update 0)" in card and "last evaluation (update 4)" in card


def test_lora_trains_the_adapter_alone(make):
    trainer = make(peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"]), reward_model="frozen")
    before = weights(trainer.model)
    trainer.train()
    moved = {n for n, p in weights(trainer.model).items() if not torch.equal(p, before[n])}
    assert moved and all("lora_" in name for name in moved)


HELD_OUT = [*TEXTS[:3], "# a comment\nx = 1\n", "y = 2\n", TEXTS[5]]


@pytest.mark.parametrize(("architecture", "columns"), [("llama", "text"), ("llama", "prompt"), ("bloom", "text")])
def test_eval_loss_is_that_of_sft(make, tokenizer, tiny_model, tmp_path, architecture, columns):
    """In three batches of two rows of other lengths: the mean of batches, each over its tokens, ends of texts among
    them. Before training and in its course."""
    shared = {
        "max_length": 256, "per_device_eval_batch_size": 2, "per_device_train_batch_size": 3, "max_steps": 2,
        "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 1e-2, "report_to": "none", "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "packing": False,
    }  # fmt: skip

    def data(texts):
        if columns == "text":
            return Dataset.from_dict({"text": texts})
        return Dataset.from_dict({"prompt": [t[:9] for t in texts], "completion": [t[9:] or "z = 1\n" for t in texts]})

    sft = SFTTrainer(
        tiny_model(architecture, tokenizer),
        SFTConfig(output_dir=str(tmp_path / "sft"), bf16=False, **{CHECKPOINTING: False}, **shared),
        train_dataset=data(TEXTS), eval_dataset=data(HELD_OUT), processing_class=tokenizer,
    )  # fmt: skip
    ours = make(
        data(TEXTS), data(HELD_OUT), model=tiny_model(architecture, tokenizer), e_steps=0, m_steps=-1, **shared
    )
    found = []
    for trainer in (sft, ours):
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        log = trainer.state.log_history
        found.append([before, *(e["eval_loss"] for e in log if "eval_loss" in e), log[-1]["train_loss"]])
    assert len(found[0]) == 4 and found[1] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.parametrize("logging_steps", [1, 2, 3])
def test_losses_of_the_phases_are_never_averaged_with_each_other(make, logging_steps):
    """`loss` and `train_loss` are cross-entropy; an E-phase's surrogate has names of its own, also in a line of both:
    E E M M M by twos are E E, M M and M, by threes E E M and M M."""
    settings = {"e_steps": 2, "m_steps": 3, "seed": 5}
    single = make(**settings, logging_steps=1)
    each = single.train()
    lines = [e for e in single.state.log_history if "phase" in e]
    assert ["loss" in e for e in lines] == [False] * 2 + [True] * 3 == ["estep/loss" not in e for e in lines]
    e, m = [x["estep/loss"] for x in lines[:2]], [x["loss"] for x in lines[2:]]
    assert each.training_loss == each.metrics["train_loss"] == pytest.approx(sum(m) / 3)
    assert each.metrics["train_estep_loss"] == pytest.approx(sum(e) / 2)
    assert single.state.log_history[-1]["train_loss"] == each.metrics["train_loss"]

    several = make(**settings, logging_steps=logging_steps, logging_strategy="steps")
    several.train()
    found = [(x.get("estep/loss"), x.get("loss")) for x in several.state.log_history if "phase" in x]
    mean = lambda values: pytest.approx(sum(values) / len(values)) if values else None  # noqa: E731
    updates = [("E", value) for value in e] + [("M", value) for value in m]
    windows = [updates[i : i + logging_steps] for i in range(0, 5, logging_steps)]
    whole = [w for w in windows if len(w) == logging_steps]
    wanted = [tuple(mean([v for kind, v in w if kind == k]) for k in "EM") for w in whole]
    assert found[: len(wanted)] == wanted


class Doubled(RA3MidTrainer):
    compute_loss_in = "M"
    calls = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.calls += 1
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        labels, logits = inputs["labels"][:, 1:], outputs.logits[:, :-1]
        total = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
        assert (inputs["labels"] != -100).sum() == (labels != -100).sum()  # who counts labels counts what is predicted
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        torch.testing.assert_close(loss, total / count, atol=1e-4, rtol=1e-4)
        return (2 * loss, outputs) if return_outputs else loss + total / count


@pytest.mark.parametrize("settings", [{}, {"e_steps": 0, "packing": False}, {"gradient_accumulation_steps": 2}])
def test_a_loss_of_ones_own_is_that_of_m_phases(tokenizer, tiny_model, make, tmp_path, settings):
    """Twice the loss, written as TRL's users write it: by the trainer's own and by the model's outputs."""
    settings = {"e_steps": 1, "m_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 1e-3} | settings
    plain = make(**{**settings, "learning_rate": 2e-3})
    plain.train()
    args = RA3Config(**{"output_dir": str(tmp_path / "mine"), "max_length": 256, "num_latents": 3, "use_cpu": True,
                        "max_latent_length": 4, "e_learning_rate": 1e-3, "per_device_train_batch_size": 2,
                        "save_strategy": "no", "report_to": "none", "log_latents_steps": 0, "disable_tqdm": True,
                        **settings})  # fmt: skip
    data = Dataset.from_dict({"text": TEXTS})
    mine = Doubled(tiny_model("llama", tokenizer), args, data, data.select(range(2)), tokenizer)
    mine.train()
    assert mine.calls == 2 * settings.get("gradient_accumulation_steps", 1)
    assert furthest(weights(plain.model), weights(mine.model)) < 1e-5
    assert mine.evaluate()["eval_loss"] == pytest.approx(2 * RA3MidTrainer.evaluate(mine)["eval_ce"], rel=0.2)


def test_a_loss_of_ones_own_has_no_part_in_an_e_phase(make, tokenizer, tiny_model, tmp_path):
    class Mine(Doubled):
        compute_loss_in = None

    with pytest.raises(ValueError, match="`compute_loss` is overridden in Mine.*compute_loss_in = 'M'"):
        args = RA3Config(str(tmp_path), use_cpu=True, report_to="none")
        Mine(tiny_model("llama", tokenizer), args, processing_class=tokenizer)


def test_low_precision_evaluation_is_that_of_sft_and_leaves_the_weights(make, tokenizer, tiny_model, tmp_path):
    shared = {"max_length": 256, "bf16_full_eval": True, "report_to": "none", "use_cpu": True, "packing": False}
    sft = SFTTrainer(
        tiny_model("llama", tokenizer), SFTConfig(str(tmp_path / "sft"), bf16=False, **shared),
        train_dataset=Dataset.from_dict({"text": TEXTS}), eval_dataset=Dataset.from_dict({"text": HELD_OUT}),
        processing_class=tokenizer,
    )  # fmt: skip
    ours, full = make(eval_texts=HELD_OUT, e_steps=0, **shared), make(eval_texts=HELD_OUT, e_steps=0)
    before = weights(ours.model)
    found, wanted = ours.evaluate()["eval_loss"], sft.evaluate()["eval_loss"]
    assert found == pytest.approx(wanted, abs=2e-2) and found != full.evaluate()["eval_loss"]
    assert furthest(before, weights(ours.model)) == 0 and ours.model.dtype == torch.float32


def test_evaluate_alone(make):
    trainer = make(eval_texts=TEXTS[:3])
    metrics = trainer.evaluate()
    # Jensen: the ELBO is the looser bound, so its negative is the larger number.
    assert metrics["eval_elbo"] >= metrics["eval_bound_multi"]
    assert 0 < metrics["eval_think_rate"] < 1
    again = trainer.evaluate()
    assert {k: v for k, v in again.items() if "second" not in k and "runtime" not in k} == {
        k: v for k, v in metrics.items() if "second" not in k and "runtime" not in k
    }


def test_evaluate_takes_other_data(make):
    """As `Trainer.evaluate` does: a data set, or a dict of them, in place of the trainer's."""
    other = Dataset.from_dict({"text": TEXTS[3:5]})
    trainer, wanted = make(eval_texts=TEXTS[:3]), make(eval_texts=TEXTS[3:5]).evaluate()["eval_elbo"]
    assert trainer.evaluate(other)["eval_elbo"] == pytest.approx(wanted)
    assert trainer.evaluate({"a": other})["eval_a_elbo"] == pytest.approx(wanted)
    assert trainer.evaluate()["eval_elbo"] != pytest.approx(wanted)


def test_logs_have_the_promised_names(make):
    trainer = make()
    trainer.train()
    names = {name for entry in trainer.state.log_history for name in entry}
    promised = ("reward", "gain", "think_rate", "latent_length", "duration", "entropy", "elbo")
    assert {f"estep/{name}" for name in promised} <= names
    assert {
        "mstep/loss",
        "mstep/code_loss",
        "mstep/latent_loss",
        "tokens",
        "seconds/rollout",
        "seconds/score",
        "seconds/annotate",
        "seconds/update",
    } <= names


def test_a_damaged_likelihood_stops_the_run(make, caplog):
    trainer = make(e_steps=12, e_learning_rate=0.3, max_grad_norm=0, kl_coef=0, code_loss_tolerance=0.05)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step < 12
    assert "code_loss_tolerance" in caplog.text


def test_latents_are_written_as_parquet(make, tmp_path):
    make(log_latents_steps=1).train()
    table = Dataset.from_parquet(str(tmp_path / "run" / "_latents" / "step_000001.parquet"))
    assert {"latent", "line", "gain", "think_prob"} <= set(table.column_names)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_latents": 1}, "num_latents"),
        ({"penalty": -0.1}, "penalty"),
        ({"penalty": float("nan")}, "penalty"),
        ({"horizon": 0}, "horizon"),
        ({"discount": 1.5}, "discount"),
        ({"temperature": 0.0}, "temperature"),
        ({"annotation": "best"}, "annotation"),
        ({"prior_alpha": 2.0}, "prior_alpha"),
        ({"max_length": 100_000}, "max_length"),
        ({"max_length": 20, "max_latent_length": 10}, "max_length"),
        ({"m_steps": -1, "max_steps": 1}, "max_steps"),
        ({"m_steps": 3, "max_steps": 100}, "max_steps"),
        ({"em_iterations": 2, "m_steps": -1, "max_steps": 7}, "max_steps"),
        ({"num_latents": 2.5}, "num_latents"),
        ({"e_steps": True}, "e_steps"),
        ({"max_length": "big"}, "max_length"),
        ({"horizon": None}, "horizon"),
        ({"reward_weights": 0.5}, "reward_weights"),
        ({"reward_weights": [float("nan")]}, "reward_weights"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef"),
        ({"e_lr_scheduler_type": "nonsense"}, "e_lr_scheduler_type"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"likelihood_weight": 0.0}, "likelihood_weight"),
        ({"torch_compile": True}, "torch_compile"),
        ({"torch_compile_backend": "inductor"}, "torch_compile_backend"),
        ({"torch_compile_mode": "default"}, "torch_compile_mode"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"reward_model": "base"}, "reward_model"),
    ],
)
def test_bad_settings_are_refused_by_name(make, settings, says, tmp_path):
    with pytest.raises(ValueError, match=f"`{says}`"):
        make(**settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("texts", "says"),
    [([], "empty"), (["", ""], "empty texts"), (["x = 1\n"], "no place where a latent may stand")],
)
def test_bad_data_is_refused(make, texts, says):
    with pytest.raises(ValueError, match=says):
        make(texts=texts)


def test_each_phase_has_its_own_rate_and_floor(make):
    """Cosine to `min_lr`, which is of the rate it is given for: E from 1e-3, M from 4e-3, both towards 5e-4."""
    kind = "cosine_with_min_lr"
    trainer = make(e_steps=4, m_steps=4, e_learning_rate=1e-3, learning_rate=4e-3, e_lr_scheduler_type=kind,
                   lr_scheduler_type=kind, lr_scheduler_kwargs={"min_lr": 5e-4})  # fmt: skip
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]

    def cosine(rate: float, step: int) -> float:  # transformers' own form: a cosine from `rate` to `min_lr`
        return 5e-4 + (rate - 5e-4) * (1 + math.cos(math.pi * step / 4)) / 2

    assert rates == pytest.approx([cosine(1e-3, i) for i in range(4)] + [cosine(4e-3, i) for i in range(4)])


@pytest.mark.parametrize(
    ("epochs", "settings"),
    [(0.1, {}), (0.5, {}), (1.5, {}), (2.9, {}), (1, {"dataloader_drop_last": True}),
     (1.5, {"gradient_accumulation_steps": 2, "dataloader_drop_last": True})],
)  # fmt: skip
def test_fractions_of_a_pass_are_those_of_sft(make, tokenizer, tiny_model, tmp_path, epochs, settings):
    """11 texts in batches of 4 are 3 batches (2 whole ones): 0.5 passes are 2 updates, 1.5 are 5, 2.9 are 9."""
    shared = {"per_device_train_batch_size": 4, "num_train_epochs": epochs, "learning_rate": 1e-3, "report_to": "none",
              "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_length": 256} | settings  # fmt: skip
    args = SFTConfig(str(tmp_path / "sft"), bf16=False, **{CHECKPOINTING: False}, **shared)
    data = Dataset.from_dict({"text": TEXTS[:11]})
    sft = SFTTrainer(tiny_model("llama", tokenizer), args, train_dataset=data, processing_class=tokenizer)
    sft.train()
    ours = make(TEXTS[:11], e_steps=0, m_steps=-1, **shared)
    ours.train()
    assert ours.state.global_step == sft.state.global_step == ours.schedule.total


def test_fewer_rows_than_a_batch_are_refused_where_such_are_dropped(make):
    with pytest.raises(ValueError, match="`dataloader_drop_last` is True.*3 rows are fewer than the 4 of per_device"):
        make(TEXTS[:3], dataloader_drop_last=True, per_device_train_batch_size=4)
    make(TEXTS[:3], per_device_train_batch_size=4).train()


def test_an_e_phase_has_its_rate_whatever_the_optimizer(make, tokenizer, tiny_model):
    """Handed over: the M-phase's rates are the optimizer's own, as in `Trainer`, and the E-phase's what was set."""
    model = tiny_model("llama", tokenizer)
    first, *rest = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 1e-2}, {"params": rest}], lr=1e-3)
    trainer = make(model=model, optimizers=(optimizer, None), e_steps=2, m_steps=2, learning_rate=2e-5,
                   e_learning_rate=1e-5, lr_scheduler_type="constant")  # fmt: skip
    rates = []

    class Note(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups])

    trainer.add_callback(Note())
    trainer.train()
    assert rates == [pytest.approx(r) for r in ([1e-5, 1e-5], [1e-5, 1e-5], [1e-2, 1e-3], [1e-2, 1e-3])]


def test_each_schedule_takes_its_own_keyword_arguments(make):
    """`min_lr` is the M-phase's alone, whose rate falls to it: 1e-3, and half of the way to 1e-4."""
    trainer = make(e_steps=1, m_steps=2, e_learning_rate=3e-3, learning_rate=1e-3, e_lr_scheduler_type="linear",
                   lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-4})  # fmt: skip
    trainer.train()
    rates = [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e]
    assert rates == pytest.approx([3e-3, 1e-3, 5.5e-4])


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"lr_scheduler_kwargs": {"num_cycles": 2}}, "`lr_scheduler_kwargs` has 'num_cycles'.*linear.*constant"),
     ({"lr_scheduler_kwargs": '{"nonsense": 2}'}, "`lr_scheduler_kwargs` has 'nonsense'"),
     ({"lr_scheduler_kwargs": 3}, "`lr_scheduler_kwargs` is 3"),
     ({"e_lr_scheduler_type": "cosine_with_min_lr"}, "`e_lr_scheduler_type` is 'cosine_with_min_lr'.*min_lr"),
     ({"auto_find_batch_size": True}, "`auto_find_batch_size` is True.*gradient_accumulation_steps")],
)  # fmt: skip
def test_settings_that_no_phase_would_heed_are_refused(settings, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        RA3Config(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_checkpoint_caches_as_its_base_does(make, tokenizer, tiny_model, tmp_path, use_cache):
    trainer = make(model=tiny_model("llama", tokenizer, use_cache=use_cache), m_steps=1, e_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.use_cache is use_cache


@pytest.mark.parametrize("reward_model", ["live", "frozen"])
def test_logged_gates_are_the_policys(make, reward_model):
    """Slow path: P(think) on the documents of each update, read from the live weights before it."""
    trainer = make(e_steps=3, m_steps=0, reward_model=reward_model, e_learning_rate=1e-2, gate_hold="never")
    roll_out, wanted = trainer.loop.roll_out, []

    def noting(documents):
        gates = [
            trainer.policy.engine.trunk(d).gate_logps_A[list(d.boundaries)].exp() for batch in documents for d in batch
        ]
        wanted.append(float(torch.cat(gates).mean()))
        return roll_out(documents)

    trainer.loop.roll_out = noting
    trainer.train()
    found = [e["estep/think_rate"] for e in trainer.state.log_history if "estep/think_rate" in e]
    assert found == pytest.approx(wanted, rel=1e-4) and found[0] != pytest.approx(found[2], rel=0.05)
    assert ("estep/elbo" in trainer.state.log_history[0]) == (reward_model == "live")


def test_weights_that_have_diverged_are_named(make):
    trainer = make()
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="weights have diverged.*lower `e_learning_rate`"):
        trainer.train()


def test_an_e_phase_without_boundaries_ends(make):
    """One text has a boundary, the batches of the E-phase hold others."""
    trainer = make(texts=["x = 1\n"] * 5 + [TEXTS[0]], e_steps=1, m_steps=1, per_device_train_batch_size=1,
                   train_sampling_strategy="sequential")  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 2


def test_settings_given_are_left_as_they_are(make, tokenizer, tiny_model, tmp_path):
    args = RA3Config(str(tmp_path / "run"), e_steps=1, max_length=256, use_cpu=True, report_to="none")
    for count in (4, 12):  # batches of 8: 1 update, then 2
        data = Dataset.from_dict({"text": TEXTS[:count]})
        trainer = RA3MidTrainer(tiny_model("llama", tokenizer), args, data, processing_class=tokenizer)
        assert trainer.schedule.m_steps == 3 * -(-count // 8)  # three passes by default
    assert args.max_steps == -1


def test_odd_documents_are_counted_and_trained(make):
    odd = [*TEXTS[:2], "", "x = 1\n", "def f(:\n  '''", "s = 'é漢字😀'\r\nt = s\r\n", "\ta = (\n1)", "x = 1\n" * 120]
    trainer = make(texts=odd, m_steps=-1, e_steps=1, num_train_epochs=1)
    counts = trainer.cut.counts["train"]
    assert (
        counts["documents"] == 8 == sum(counts[k] for k in ("with_actions", "no_boundary", "plain", "lossy", "empty"))
    )
    assert counts["empty"] == 1 and counts["plain"] >= 1 and counts["chunks"] > 8
    trainer.train()


def test_eval_set_without_actions(make):
    metrics = make(eval_texts=["x = 1\n"]).evaluate()
    assert metrics["eval_elbo"] == metrics["eval_ce"]


def test_expand_engine_trains_to_the_same_weights(make):
    runs = []
    for engine in ("branch", "expand"):
        trainer = make(engine=engine, optim="sgd", learning_rate=0.05, e_learning_rate=0.05)
        trainer.train()
        runs.append(weights(trainer.model))
    assert furthest(*runs) < 1e-4


def test_checkpoint_folder_is_whole(make, tmp_path):
    make(save_strategy="steps", save_steps=1, save_total_limit=2, reward_model="frozen").train()
    kept = sorted(p.name for p in Path(tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-3", "checkpoint-4"]
    assert {"ra3_state.json", "ra3_frozen.safetensors", "trainer_state.json"} <= {
        p.name for p in Path(tmp_path / "run" / "checkpoint-3").iterdir()
    }


def test_all_runs_of_a_length_are_evaluated_on_the_same_documents(tmp_path, tokenizers, tiny_model):
    """Next-token prediction with `max_length` at the context's end, which learned positions do not forgive, trains on
    all of it. Its evaluation draws latents too and leaves RA3's room, a fifth: cut otherwise, the numbers of the two
    could not be compared."""
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("gpt2", tokenizer)
    context = model.config.max_position_embeddings
    data = Dataset.from_dict({"text": ["".join(f"a{i} = {i}\n" for i in range(context // 4))]})

    def make(e_steps):
        args = RA3Config(
            str(tmp_path), max_length=context, e_steps=e_steps, m_steps=1, horizon=1, eval_num_latents=1,
            report_to="none", use_cpu=True,
        )  # fmt: skip
        return RA3MidTrainer(model, args, data, data, tokenizer)

    def longest(rows):
        return max(len(row["input_ids"]) for row in rows)

    ntp, ra3 = make(0), make(1)
    assert context - 8 < longest(ntp.train_dataset) <= context
    assert longest(ra3.train_dataset) <= context - context // 5
    assert ntp.eval_dataset.to_list() == ra3.eval_dataset.to_list() == ra3.train_dataset.to_list()
    assert ntp.evaluate()["eval_ce"] == ra3.evaluate()["eval_ce"] == ntp.evaluate(data)["eval_ce"] > 0


def test_a_split_that_was_forgotten_is_asked_for(tiny_model, tokenizers):
    tokenizer = tokenizers["newline_indent"]
    data = DatasetDict(train=Dataset.from_dict({"text": ["x = 1\n"]}), test=Dataset.from_dict({"text": ["y = 1\n"]}))
    args = RA3Config(output_dir="unused", m_steps=1, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match=r"`train_dataset` has the splits \['train', 'test'\]; pass one of them"):
        RA3MidTrainer(tiny_model("llama", tokenizer), args, data, None, tokenizer)


def test_settings_of_another_kind_are_refused(tiny_model, tokenizers):
    tokenizer = tokenizers["newline_indent"]
    args = GRPOConfig("x", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="`args` is a GRPOConfig; make an `RA3Config`"):
        RA3MidTrainer(tiny_model("llama", tokenizer), args, processing_class=tokenizer)
