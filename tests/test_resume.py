"""Going on: what is refused, what is not done twice, SIGTERM, streams, the best checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import furthest, weights
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from ra3_trl import RA3MidTrainer


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return x\n" for i in range(12)]


@pytest.fixture
def make(make_trainer):
    """`make(e_steps=2, ...)`: a trainer on TEXTS."""

    def make(data=TEXTS, eval_data=None, **settings) -> RA3MidTrainer:
        return make_trainer(data, eval_data, **{"m_steps": 3, "num_latents": 2} | settings)

    return make


def folders(path: Path) -> dict[str, float]:
    """Every file with its time of change."""
    return {str(p): p.stat().st_mtime_ns for p in path.rglob("*")}


def test_a_finished_run_does_no_update_more(make, tmp_path):
    """Killed behind its last checkpoint: `Trainer` would do one more update, with the optimizer where it was."""
    alone = make(save_strategy="steps", save_steps=5)
    alone.train()
    again = make(output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=f"{alone.args.output_dir}/checkpoint-5")
    assert again.state.global_step == 5
    assert furthest(weights(alone.model), weights(again.model)) == 0


def test_a_finished_run_saves_and_evaluates_nothing_again(make, tmp_path):
    """Strategies by epoch act at a pass's end, and there is no pass any more."""
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "m_steps": -1, "num_train_epochs": 1}
    alone = make(eval_data=TEXTS[:2], **settings)
    alone.train()
    before, lines = folders(tmp_path / "run"), len(alone.state.log_history)
    again = make(eval_data=TEXTS[:2], **settings)
    again.train(resume_from_checkpoint=True)
    assert folders(tmp_path / "run") == before and again.state.global_step == alone.state.global_step
    assert len(again.state.log_history) <= lines + 1  # the summary of this call


# ---- what is refused, with nothing overwritten ----


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"horizon": 3}, r"`horizon` is 3, but .*checkpoint-4 was written with 2"),
        ({"penalty": 1.0}, "`penalty` is 1.0"),
        ({"reward_model": "frozen"}, "`reward_model` is 'frozen'"),
        ({"seed": 7}, "`seed` is 7"),
        ({"per_device_train_batch_size": 4}, "`per_device_train_batch_size` is 4"),
        ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` is 2"),
        ({"e_steps": 3}, "`e_steps` is 3"),
        ({"learning_rate": 2e-3}, "`learning_rate` is 0.002"),
        ({"optim": "sgd"}, "`optim` is 'sgd'"),
        ({"reward_funcs": lambda **kwargs: []}, r"`reward_funcs` is \['<lambda>'\]"),
        ({"data": TEXTS[:11]}, "`train_dataset` is"),
        ({"m_steps": 1}, "`m_steps` or `em_iterations`: update 4 of .* was number 2 of M-phase 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(make, tmp_path, settings, says):
    make(save_strategy="steps", save_steps=4).train()
    before = folders(tmp_path / "run")
    trainer = make(**settings)
    with pytest.raises(ValueError, match=says):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert folders(tmp_path / "run") == before


def test_what_may_change_may_change(make, tmp_path):
    """A longer last M-phase, other logs and memory bounds."""
    make(save_strategy="steps", save_steps=4).train()
    trainer = make(m_steps=5, max_branch_tokens=64, logging_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7


def test_a_checkpoint_of_an_older_version_is_refused(make, tmp_path):
    trainer = make(save_strategy="steps", save_steps=2)
    trainer.train()
    file = Path(trainer.args.output_dir, "checkpoint-2", "ra3_state.json")
    state = json.loads(file.read_text())
    state["settings"]["max_sites"] = 0
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="has the setting `max_sites`, which this run does not know"):
        make(save_strategy="steps", save_steps=2).train(resume_from_checkpoint=str(file.parent))


def test_missing_frozen_weights_and_other_numbers_of_processes_are_refused(make, tmp_path):
    make(save_strategy="steps", save_steps=1, reward_model="frozen").train()
    folder = tmp_path / "run" / "checkpoint-1"
    frozen = (folder / "ra3_frozen.safetensors").read_bytes()
    (folder / "ra3_frozen.safetensors").unlink()
    with pytest.raises(ValueError, match=r"ra3_frozen.safetensors is missing; take an earlier checkpoint"):
        make(reward_model="frozen").train(resume_from_checkpoint=str(folder))
    (folder / "ra3_frozen.safetensors").write_bytes(frozen)
    (folder / "optimizer.pt").rename(folder / "elsewhere")
    with pytest.raises(ValueError, match=r"optimizer.pt is missing; take an earlier checkpoint"):
        make(reward_model="frozen").train(resume_from_checkpoint=str(folder))
    (folder / "elsewhere").rename(folder / "optimizer.pt")
    text = (folder / "ra3_state.json").read_text()
    (folder / "ra3_state.json").write_text(text[:-20])
    with pytest.raises(ValueError, match=r"ra3_state.json is damaged .*; take an earlier checkpoint"):
        make(reward_model="frozen").train(resume_from_checkpoint=str(folder))
    (folder / "ra3_state.json").write_text(text)
    state = json.loads((folder / "ra3_state.json").read_text())
    assert state["settings"]["world_size"] == 1
    state["settings"]["world_size"] = 2
    (folder / "ra3_state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="was written by 2 processes and this run has 1"):
        make(reward_model="frozen").train(resume_from_checkpoint=str(folder))


# ---- what is not done twice ----


def test_batches_already_consumed_are_not_rolled_out_again(make, tmp_path, monkeypatch):
    make(e_steps=4, m_steps=2, save_strategy="steps", save_steps=3).train()
    trainer = make(e_steps=4, m_steps=2)
    seen = []
    rollouts = trainer.policy.engine.rollouts

    def watched(documents, boundaries, num_latents, horizon, noise, score=True):
        seen.extend([(noise.phase, noise.step)] * len(documents))
        return rollouts(documents, boundaries, num_latents, horizon, noise, score)

    monkeypatch.setattr(trainer.policy.engine, "rollouts", watched)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    # One E-update (number 3) of two documents is left; annotation of the two M-updates follows (phase 1, 4 and 5).
    assert [key for key in seen if key[0] == 0] == [(0, 3)] * 2
    assert {key[1] for key in seen if key[0] == 1} == {4, 5}


# ---- streams ----


def stream(count: int = 12) -> IterableDataset:
    """`count` texts, a shard for each."""

    def rows(part: list[int]):
        for i in part:
            yield {"text": TEXTS[i]}

    return IterableDataset.from_generator(rows, gen_kwargs={"part": list(range(count))})


def test_a_stream_trains_as_the_same_data_does(make):
    """The stream is read in order; with the shuffling of a map-style data set off the batches are the same. Noise is
    keyed by content in a stream, so next-token prediction is compared."""
    streamed = make(stream(), e_steps=0, m_steps=4)
    listed = make(e_steps=0, m_steps=4, train_sampling_strategy="sequential")
    streamed.train(), listed.train()
    assert furthest(weights(streamed.model), weights(listed.model)) == 0


def test_nothing_of_a_stream_is_materialised(make):
    """A stream without end trains, and little more is read than is used."""
    read = []

    def rows():
        i = 0
        while True:
            read.append(i)
            yield {"text": TEXTS[i % 12].replace("def f", f"def g{i}_")}
            i += 1

    trainer = make(IterableDataset.from_generator(rows), e_steps=1, m_steps=2)
    trainer.train()
    # First look: 1 row. Probe: 8 documents and training: 3 updates of 2, each read in maps of 8 rows.
    assert trainer.state.global_step == 3 and len(read) <= 1 + 2 * 16


def test_a_stream_needs_a_length(make):
    with pytest.raises(ValueError, match="set `max_steps` or `m_steps`"):
        make(stream(), m_steps=-1)
    assert make(stream(), m_steps=-1, max_steps=5).schedule.m_steps == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_see_every_document_once(make, workers):
    trainer = make(stream(), dataloader_num_workers=workers)
    seen = [d.doc_id for batch in trainer.get_train_dataloader() for d in batch["documents"]]
    assert len(seen) == len(set(seen)) == 12


def test_a_short_window_at_the_end_of_a_stream_is_an_update(make, monkeypatch):
    """6 documents, 2 a batch, 2 batches an update: a pass has an update of 4 documents and one of 2, as with the same
    texts in a list. (`Trainer` steps after a whole window only; gradients of a short one stayed for the next.)"""
    norms = {}
    for name, data in (("stream", stream(6)), ("list", TEXTS[:6])):
        trainer = make(data, e_steps=0, m_steps=4, gradient_accumulation_steps=2, learning_rate=1e-9,
                       max_grad_norm=1e9, train_sampling_strategy="sequential")  # fmt: skip
        trainer.train()
        norms[name] = [e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e]
    # In the second pass `datasets` reads the shards in another order, so the texts meet otherwise: 7 % at most.
    assert norms["stream"][:2] == pytest.approx(norms["list"][:2], rel=1e-4)
    assert norms["stream"][2:] == pytest.approx(norms["list"][2:], rel=0.07)
    assert norms["list"][0] != pytest.approx(norms["list"][1], rel=1e-2)


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stream_is_resumed_exactly(make, tmp_path, accumulation):
    """Also in its second pass (6 documents, 2 a batch: a pass is 3 updates, or 2 with accumulation), with shards in
    another order there, and in the second E-phase; the log too, the probe's numbers among it."""
    settings = {"em_iterations": 2, "e_steps": 2, "m_steps": 2, "gradient_accumulation_steps": accumulation}

    def data():
        return stream(6).shuffle(seed=0, buffer_size=1)

    def log(trainer):
        shown = [e for e in trainer.state.log_history if "phase" in e]
        return [{k: v for k, v in e.items() if not k.startswith("seconds")} for e in shown]

    alone = make(data(), save_strategy="steps", save_steps=1, **settings)
    alone.train()
    assert any("estep/code_loss_rise" in e for e in log(alone))
    for step in (1, 3, 4, 5, 6):
        trainer = make(data(), output_dir=str(tmp_path / f"resumed{step}"), **settings)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        assert furthest(weights(alone.model), weights(trainer.model)) == 0, step
        assert log(trainer) == log(alone), step


def test_the_probe_of_a_resumed_stream_is_that_of_its_baseline(make, tmp_path):
    """12 documents, 6 updates a pass; the second E-phase is in the second pass, where shards come in another order,
    and other documents would be the first eight."""
    settings = {"em_iterations": 2, "e_steps": 6, "m_steps": 1}

    def rises(trainer) -> list[float]:
        return [e["estep/code_loss_rise"] for e in trainer.state.log_history if "estep/code_loss_rise" in e]

    alone = make(stream(12).shuffle(seed=0, buffer_size=1), save_strategy="steps", save_steps=9, **settings)
    alone.train()
    trainer = make(stream(12).shuffle(seed=0, buffer_size=1), output_dir=str(tmp_path / "resumed"), **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-9"))
    assert len(rises(alone)) == 10 and rises(trainer) == rises(alone)


def test_a_stream_evaluates(make):
    found, wanted = make(eval_data=stream(4)).evaluate(), make(eval_data=TEXTS[:4]).evaluate()
    assert found["eval_ce"] == pytest.approx(wanted["eval_ce"], abs=1e-6)
    assert found["eval_code_tokens"] == wanted["eval_code_tokens"]


# ---- the best checkpoint, stopping early, several evaluation sets ----


def test_the_best_checkpoint_by_elbo_is_loaded(make, tmp_path):
    trainer = make(
        eval_data=TEXTS[:2], load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, save_total_limit=2, m_steps=4, learning_rate=0.05,
    )  # fmt: skip
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("elbo", False)
    trainer.train()
    scores = {e["step"]: e["eval_elbo"] for e in trainer.evaluations}
    best = min(scores, key=scores.get)
    assert trainer.state.best_global_step == best
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "run" / f"checkpoint-{best}"
    loaded = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint)
    assert furthest(weights(trainer.model), dict(loaded.named_parameters())) == 0


def test_the_best_checkpoint_of_a_finished_run_that_was_moved(make, tmp_path):
    """Paths in its state are those of before; the last weights are others than the best."""
    settings = {
        "e_steps": 0, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1,
        "save_strategy": "steps", "learning_rate": 4.0, "lr_scheduler_type": "constant", "optim": "sgd",
        "max_grad_norm": 0.0,
    }  # fmt: skip
    alone = make(eval_data=TEXTS[:2], output_dir=str(tmp_path / "a"), **settings)
    alone.train()
    best = f"checkpoint-{alone.state.best_global_step}"
    assert best != "checkpoint-3"
    (tmp_path / "a").rename(tmp_path / "b")
    again = make(eval_data=TEXTS[:2], output_dir=str(tmp_path / "b"), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "b" / best)
    assert furthest(weights(alone.model), weights(again.model)) == 0


def test_early_stopping_by_elbo(make):
    """A learning rate of 0 never gets better: the evaluation after update 1 is the best, patience 2 ends after 3."""
    trainer = make(
        eval_data=TEXTS[:2], callbacks=[EarlyStoppingCallback(2)], learning_rate=0.0, e_learning_rate=0.0,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, m_steps=8,
        load_best_model_at_end=True, metric_for_best_model="eval_elbo",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3


def test_several_evaluation_sets(make):
    sets = {name: Dataset.from_dict({"text": texts}) for name, texts in (("a", TEXTS[:2]), ("b", TEXTS[2:5]))}
    trainer = make(eval_data=sets, metric_for_best_model="eval_b_elbo")
    metrics = trainer.evaluate()
    assert {"eval_a_elbo", "eval_b_elbo", "eval_a_ce", "eval_b_bound_multi"} <= set(metrics)
    assert trainer.args.greater_is_better is False
    assert metrics["eval_a_elbo"] == pytest.approx(make(eval_data=TEXTS[:2]).evaluate()["eval_elbo"], abs=1e-6)


# ---- SIGTERM ----


class Terminate(TrainerCallback):
    """Sends this process SIGTERMs in update `at`."""

    def __init__(self, at: int, signals: int = 1):
        self.at, self.signals = at, signals

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for _ in range(self.signals if state.global_step + 1 == self.at else 0):
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("at, signals", [(1, 1), (4, 3)])
def test_sigterm_saves_and_names_the_way_on(make, tmp_path, caplog, at, signals):
    """In an E-phase and in an M-phase, where a launcher passes on what came to all; the resumed run ends as one left
    alone."""
    alone = make(output_dir=str(tmp_path / "alone"))
    alone.train()
    before = signal.getsignal(signal.SIGTERM)
    trainer = make(callbacks=[Terminate(at, signals)])
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 143  # 128 + SIGTERM, as a shell reports it
    assert signal.getsignal(signal.SIGTERM) is before
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{at}"]
    assert f"after update {at}" in caplog.text and "trainer.train(resume_from_checkpoint=True)" in caplog.text
    again = make()
    again.train(resume_from_checkpoint=True)
    assert furthest(weights(alone.model), weights(again.model)) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"save_total_limit": 1, "load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1,
         "eval_strategy": "steps", "eval_steps": 1, "learning_rate": 0.5},  # worse and worse: the last is not the best
        {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "elbo",
         "learning_rate": 0.0, "e_learning_rate": 0.0},  # nothing gets better
        {"save_only_model": True, "save_strategy": "steps", "save_steps": 1},
    ],
)  # fmt: skip
def test_sigterm_saves_whatever_else_is_asked_for(make, tmp_path, settings):
    settings = settings | {"eval_data": TEXTS[:2], "e_steps": 1}
    trainer = make(callbacks=[Terminate(3)], **settings)
    with pytest.raises(SystemExit):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-3" / "ra3_state.json").is_file()
    for name, value in settings.items():  # as they were
        assert name == "eval_data" or getattr(trainer.args, name) == value
    again = make(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert again.state.global_step == 4


def test_a_second_train_begins_anew(make):
    """Gate hold, metrics and snapshots are not those of the run before; weights go on."""
    trainer = make(m_steps=1)
    trainer.train()
    assert trainer.loop.state.gate_hold.updates == 2
    first = weights(trainer.model)
    trainer.train()
    assert trainer.loop.state.gate_hold.updates == 2 and furthest(first, weights(trainer.model)) > 0


SLEEPER = """
import sys, time
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from ra3_trl import RA3Config, RA3MidTrainer

class Slow(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        print("update", state.global_step, flush=True)
        time.sleep(0.3)

folder, out = sys.argv[1:]
args = RA3Config(output_dir=out, max_length=256, e_steps=50, m_steps=50, num_latents=2, max_latent_length=4,
                 save_strategy="no", report_to="none", log_latents_steps=0, disable_tqdm=True, use_cpu=True)
data = Dataset.from_dict({"text": [f"def f{i}(x):\\n    y = x + {i}\\n    return y\\n" for i in range(8)]})
model, tokenizer = (c.from_pretrained(folder) for c in (AutoModelForCausalLM, AutoTokenizer))
RA3MidTrainer(model, args, data, None, tokenizer, callbacks=[Slow()]).train()
print("came to the end")
"""


def test_a_real_sigterm_from_outside(tmp_path, tokenizers, tiny_model):
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    command = [sys.executable, "-c", SLEEPER, str(tmp_path / "model"), str(tmp_path / "run")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        while "update 1" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "came to the end" not in out
    assert "Stopped by SIGTERM after update" in err
    assert len(list((tmp_path / "run").glob("checkpoint-*/ra3_state.json"))) == 1
    assert time.monotonic() - begin < 30  # at the next step, not after the 98 that were left
