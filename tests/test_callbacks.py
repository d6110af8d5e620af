"""Callbacks, trackers and evaluation sets: what `Trainer` promises holds for the EM loop too."""

from __future__ import annotations

import io
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    GenerationConfig,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_callback import CallbackHandler
from trl import LogCompletionsCallback, RichProgressCallback

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.em import Schedule
from ra3_trl.report import PhaseProgressCallback, evaluated_batch
from ra3_trl.trackers import check_trackers


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return x\n" for i in range(6)]
GROUPED = ("train/estep/gain", "train/estep/think_rate", "train/mstep/loss", "train/mstep/code_loss", "train/tokens",
           "train/phase", "train/seconds/rollout", "eval/elbo", "eval/ce", "eval/think_rate", "eval/gain")  # fmt: skip


@pytest.fixture
def make(tmp_path, tokenizers, tiny_model):
    """`make(e_steps=2, ...)`: a trainer on TEXTS, a new copy of the same random model each time."""
    tokenizer = tokenizers["newline_indent"]

    def trainer(texts=TEXTS, eval_texts=TEXTS[:2], callbacks=None, **settings) -> RA3MidTrainer:
        defaults = {
            "output_dir": str(tmp_path / "run"), "max_length": 128, "e_steps": 1, "m_steps": 2, "num_latents": 2,
            "max_latent_length": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "eval_num_latents": 2,
            "save_strategy": "no", "report_to": "none", "log_latents_steps": 0, "disable_tqdm": True, "use_cpu": True,
        }  # fmt: skip
        args = RA3Config(**defaults | settings)
        rows = {name: _rows(of_set) for name, of_set in _sets(eval_texts).items()}
        evaluation = rows if isinstance(eval_texts, dict) else rows.get("")
        train = None if texts is None else _rows(texts)
        return RA3MidTrainer(
            tiny_model("llama", tokenizer), args, train, evaluation, tokenizer, callbacks=callbacks or []
        )

    return trainer


def _rows(data):
    return Dataset.from_dict({"text": data}) if isinstance(data, list) else data


def _sets(eval_texts) -> dict[str, list[str]]:
    return eval_texts if isinstance(eval_texts, dict) else {} if eval_texts is None else {"": eval_texts}


# ---- evaluation ----


def test_evaluate_before_without_and_after_training(make):
    """The same model and set give the same numbers, whether there is data to train on or not."""
    alone = make(texts=None).evaluate()
    trainer = make()
    before = trainer.evaluate()
    assert before["eval_elbo"] == alone["eval_elbo"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_ce"] < before["eval_ce"]  # 2 M-updates on the same texts, at 1e-3
    other = trainer.evaluate(trainer.eval_dataset.select([0]), metric_key_prefix="test")
    assert {"test_elbo", "test_ce"} <= set(other)


def test_a_dict_of_evaluation_sets(make, tmp_path):
    """Each set has its own metrics, log entries and rows on the card."""
    trainer = make(eval_texts={"a": TEXTS[:2], "b": TEXTS[2:3]}, eval_strategy="steps", eval_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    assert {f"eval_{name}_{metric}" for name in "ab" for metric in ("elbo", "ce", "bound_multi")} <= set(metrics)
    assert metrics["eval_a_elbo"] != metrics["eval_b_elbo"]
    logged = [entry["step"] for entry in trainer.state.log_history if "eval_b_elbo" in entry]
    assert logged == [1, 2, 3, 3]
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    for name in "ab":
        assert f"| first evaluation of {name} (update 1) |" in card
        assert f"| last evaluation of {name} (update 3) | {metrics[f'eval_{name}_ce']:.4f} |" in card
    assert "| eval_a | 2 |" in card  # documents of the set


def test_the_best_of_one_set_is_kept(make):
    """The metric of one set is watched; it is a negative bound, so that less is better without being told."""
    trainer = make(
        eval_texts={"a": TEXTS[:2], "b": TEXTS[2:3]}, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_a_elbo",
    )  # fmt: skip
    assert trainer.args.greater_is_better is False
    trainer.train()
    seen = [entry["eval_a_elbo"] for entry in trainer.state.log_history if "eval_a_elbo" in entry]
    assert trainer.state.best_metric == min(seen)


# ---- stopping and choosing ----


def test_early_stopping_on_the_bound(make):
    """A learning rate that harms: the ELBO is worse at each evaluation, so the second stops the run."""
    trainer = make(
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)], e_steps=0, m_steps=8, learning_rate=4.0,
        lr_scheduler_type="constant", max_grad_norm=0, optim="sgd", eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, metric_for_best_model="eval_elbo", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    seen = [entry["eval_elbo"] for entry in trainer.state.log_history if "eval_elbo" in entry]
    worse = next(i for i in range(1, len(seen)) if seen[i] > min(seen[:i]))
    assert trainer.state.global_step == len(seen) == worse + 1 < 8


def test_the_best_model_is_loaded_at_the_end(make):
    trainer = make(
        e_steps=0, m_steps=4, learning_rate=4.0, lr_scheduler_type="constant", max_grad_norm=0, optim="sgd",
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, save_total_limit=1,
        metric_for_best_model="eval_elbo", load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    seen = [entry["eval_elbo"] for entry in trainer.state.log_history if "eval_elbo" in entry]
    assert trainer.state.best_metric == min(seen) < seen[-1]  # the last is not the best
    best = AutoModelForCausalLM.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.evaluate()["eval_elbo"] == pytest.approx(min(seen), abs=1e-5)


class Recorder(TrainerCallback):
    """Names of the metrics that `on_evaluate` gets, and of the logs."""

    def __init__(self):
        self.evaluated, self.logged = [], set()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.evaluated.append(set(metrics))

    def on_log(self, args, state, control, logs, **kwargs):
        self.logged |= set(logs)


def test_callbacks_get_the_metrics(make):
    recorder = Recorder()
    make(callbacks=[recorder], eval_strategy="steps", eval_steps=3).train()
    (metrics,) = recorder.evaluated
    names = ("loss", "ce", "ce_policy", "ce_never", "elbo", "bound_multi", "think_rate", "gain", "runtime")
    assert {f"eval_{name}" for name in names} <= metrics
    assert {"estep/gain", "mstep/loss", "phase", "tokens", "data/documents"} <= recorder.logged


class Raises(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise RuntimeError("the callback's own mistake")


def test_a_callback_that_raises_leaves_whole_checkpoints(make, tmp_path):
    trainer = make(callbacks=[Raises()], save_strategy="steps", save_steps=1)
    with pytest.raises(RuntimeError, match="own mistake"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["README.md", "checkpoint-1"]
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


# ---- trackers ----


def test_tensorboard_gets_the_grouped_metrics(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make(report_to=["tensorboard"], eval_strategy="steps", eval_steps=3)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert set(GROUPED) <= set(events.Tags()["scalars"])
    logged = {entry["step"]: entry["mstep/loss"] for entry in trainer.state.log_history if "mstep/loss" in entry}
    written = {event.step: event.value for event in events.Scalars("train/mstep/loss")}
    assert written == pytest.approx(logged)
    assert set(written) == {2, 3}  # one E-update comes first


def stub_tracker(name: str, monkeypatch) -> list[dict]:
    """A module in the place of wandb or trackio; the metrics that it is given."""
    got: list[dict] = []
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__version__ = "99.0"
    config = type("Config", (dict,), {"update": lambda self, values, **_: dict.update(self, values)})()
    run = type("Run", (), {"config": config, "summary": {}, "id": "x", "_label": lambda self, **_: None,
                           "watch": lambda self, *a, **k: None})()  # fmt: skip
    module.run, module.config = run, config
    module.context_vars = type("Vars", (), {"current_space_id": type("Var", (), {"get": lambda self: None})()})()
    module.init = lambda **_: run
    module.log = lambda metrics, **_: got.append(dict(metrics))
    module.finish = module.define_metric = module.watch = lambda *_, **__: None
    monkeypatch.setitem(sys.modules, name, module)
    errors = ModuleType("wandb.sdk.lib.config_util")
    errors.ConfigError = type("ConfigError", (Exception,), {})
    for part in ("wandb.sdk", "wandb.sdk.lib"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, errors.__name__, errors)
    return got


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_the_grouped_metrics(make, monkeypatch, name):
    """With a stub in its place: what matters is what reaches `log`."""
    from transformers.integrations import integration_utils

    got = stub_tracker(name, monkeypatch)
    monkeypatch.setattr(integration_utils, f"is_{name}_available", lambda: True)
    trainer = make(report_to=[name], eval_strategy="steps", eval_steps=3, trackio_static_space_id=False)
    trainer.train()
    assert set(GROUPED) <= {metric for metrics in got for metric in metrics}


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    from ra3_trl import trackers

    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["tensorboard"])
    for fine in (None, "none", "all", [], ["none"], "tensorboard", ["tensorboard"]):
        check_trackers(fine)
    with pytest.raises(ValueError, match=r"`report_to` is 'wandb', which is not installed: `pip install wandb`"):
        check_trackers(["tensorboard", "wandb"])
    with pytest.raises(ValueError, match=r"`report_to` is 'comet_ml'.*`pip install comet-ml`"):
        check_trackers("comet_ml")
    with pytest.raises(ValueError, match=r"`report_to` is 'wandbb'; use 'none', 'all' or some of .*'wandb'"):
        check_trackers("wandbb")


def test_a_missing_tracker_is_refused_before_anything_is_written(make, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[check_trackers.__module__], "get_available_reporting_integrations", list)
    with pytest.raises(ValueError, match="`report_to` is 'swanlab'.*`pip install swanlab`"):
        make(report_to=["swanlab"])
    assert not (tmp_path / "run").exists()


# ---- progress bars ----


def test_a_run_shows_its_phases_and_evaluations(make, capsys):
    """The bars of a real run: 1 E-update, 2 M-updates, an evaluation after the last."""
    make(disable_tqdm=False, eval_strategy="steps", eval_steps=3).train()
    drawn = capsys.readouterr().err
    for text in ("E-phase 1/1:", "M-phase 1/2:", "M-phase 2/2:", "Evaluating:", "3/3 ["):
        assert text in drawn


@pytest.mark.parametrize("of", ["elbo", "eval_c_elbo"])
def test_the_metric_must_be_of_one_set(make, tmp_path, of):
    with pytest.raises(ValueError, match=f"`metric_for_best_model` is '{of}'.*'eval_a_elbo'"):
        make(eval_texts={"a": TEXTS[:1], "b": TEXTS[1:2]}, metric_for_best_model=of)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("of", ["accuracy", "eval_los", "elbo_hindsight"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_metric_must_be_measured(make, tmp_path, of, stream):
    """A name that no evaluation gives would be a `KeyError` of transformers at the first one."""
    data = Dataset.from_dict({"text": TEXTS[:1]})
    data = data.to_iterable_dataset() if stream else data
    with pytest.raises(
        ValueError, match=f"`metric_for_best_model` is '{of}', which is not measured; use one of 'ce', "
    ):
        make(eval_texts=data, metric_for_best_model=of)
    assert not (tmp_path / "run").exists()
    make(eval_texts=data, metric_for_best_model=of, callbacks=[Measures()])
    with pytest.raises(ValueError, match="such as 'eval_loss'"):
        make(eval_texts=data, metric_for_best_model="eval_los", callbacks=[EarlyStoppingCallback()])


class Measures(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics |= {"eval_accuracy": 0.5, "eval_los": 0.5, "eval_elbo_hindsight": 0.5}


def test_all_that_an_evaluation_gives_can_be_the_metric(make):
    of_trainer = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch"}
    found = {name.removeprefix("eval_") for name in make().evaluate()} - of_trainer
    assert found == set(RA3MidTrainer.measured) - {"aux_loss"}  # of a mixture of experts


def test_completions_are_logged_by_trls_callback(make, tmp_path):
    """Its table has what the model goes on with behind each prompt of the evaluation set, in E-phases too."""
    pairs = Dataset.from_dict({"prompt": [t[:9] for t in TEXTS[:3]], "completion": [t[9:] for t in TEXTS[:3]]})
    trainer = make(texts=pairs, eval_texts=pairs, e_steps=1, m_steps=1)
    callback = LogCompletionsCallback(trainer, GenerationConfig(max_new_tokens=2), num_prompts=2, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    trainer.processing_class.padding_side = "right"  # the callback has changed it
    assert [(step, prompt) for step, prompt, _ in callback.table] == [
        (step, prompt) for step in "12" for prompt in pairs["prompt"][:2]
    ]
    for data, words in ((None, "has no column `prompt`"), ({"a": pairs}, "is a dict")):
        trainer = make(eval_texts=data or TEXTS[:2])
        with pytest.raises(ValueError, match=f"`callback` is a LogCompletionsCallback, .* {words}"):
            trainer.add_callback(LogCompletionsCallback(trainer, freq=1))


def test_a_card_goes_with_each_save(make, tmp_path):
    """In `output_dir`, of the run as it is then; on a push it is not made twice."""
    cards = []

    class Reads(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            cards.append((tmp_path / "run" / "README.md").read_text())

    make(save_strategy="steps", save_steps=1, callbacks=[Reads()]).train()
    assert len(cards) == 3 and cards[0] != cards[1] and all("run" in card for card in cards)


def test_a_rich_bar_and_an_evaluation_alone(make):
    assert make(callbacks=[RichProgressCallback()]).evaluate()["eval_elbo"] > 0


def test_text_of_the_phase():
    callback = PhaseProgressCallback(Schedule(1, 2, 3), CallbackHandler([], None, None, None, None))
    assert [callback.text(step) for step in (0, 1, 2, 4)] == [
        "E-phase 1/2", "E-phase 2/2", "M-phase 1/3", "M-phase 3/3",
    ]  # fmt: skip
    # Two iterations of 2 + 3 updates: update 6 is the second iteration's second E-update.
    callback = PhaseProgressCallback(Schedule(2, 2, 3), CallbackHandler([], None, None, None, None))
    assert callback.text(6) == "E-phase 2/2, iteration 2/2"


def play(schedule: Schedule, callbacks: list, primary: bool = True) -> None:
    """The events of a run, without a model."""
    handler = CallbackHandler(callbacks, None, None, None, None)
    phases = PhaseProgressCallback(schedule, handler)
    handler.add_callback(phases)
    state, control = TrainerState(max_steps=schedule.total, is_world_process_zero=primary), TrainerControl()
    handler.on_train_begin(None, state, control)
    for _ in range(schedule.total):
        handler.on_step_begin(None, state, control)
        state.global_step += 1
        handler.on_step_end(None, state, control)
        handler.on_log(None, state, control, {"loss": 1.0, "estep/gain": 0.5, "phase": 0.0})
    handler.on_train_end(None, state, control)


def test_the_bar_names_the_phase(capsys):
    play(Schedule(1, 2, 1), [ProgressCallback()])
    drawn = capsys.readouterr().err
    for text in ("E-phase 1/2:", "E-phase 2/2:", "M-phase 1/1:"):
        assert text in drawn
    play(Schedule(1, 2, 1), [ProgressCallback()], primary=False)
    assert capsys.readouterr().err == ""
    play(Schedule(1, 2, 1), [])  # no bar, nothing to write


def test_the_rich_bar_names_the_phase(monkeypatch):
    callbacks = sys.modules[RichProgressCallback.__module__]
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=60)
    monkeypatch.setattr(callbacks, "Console", lambda: console)
    live = callbacks.Live
    monkeypatch.setattr(callbacks, "Live", lambda panel: live(panel, console=console, auto_refresh=False))
    drawn = []

    class Frames(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            with console.capture() as frame:
                console.print(bars.rich_group.renderable)
            drawn.append(frame.get())

    bars, schedule = RichProgressCallback(), Schedule(1, 2, 1)
    handler = CallbackHandler([bars], None, None, None, None)
    for callback in (PhaseProgressCallback(schedule, handler), Frames()):
        handler.add_callback(callback)
    state, control = TrainerState(max_steps=3, is_world_process_zero=True), TrainerControl()
    handler.on_train_begin(None, state, control)
    for _ in range(3):
        handler.on_step_begin(None, state, control)
        state.global_step += 1
        handler.on_step_end(None, state, control)
    handler.on_train_end(None, state, control)
    for text, frame in zip(("E-phase 1/2", "E-phase 2/2", "M-phase 1/1"), drawn, strict=True):
        assert text in frame


def test_batches_of_an_evaluation_are_reported():
    """To every callback; not where trl's rich bar is not drawn, since it fails there."""
    counted = []

    class Counts(TrainerCallback):
        def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
            counted.append(eval_dataloader)

    bars = RichProgressCallback()
    handler = CallbackHandler([Counts(), ProgressCallback()], None, None, None, None)
    handler.eval_dataloader = [0, 1, 2]
    state, control = TrainerState(is_world_process_zero=True), TrainerControl()
    assert evaluated_batch(handler, None, state, control) is control
    assert counted == [[0, 1, 2]]
    handler.add_callback(bars)
    evaluated_batch(handler, None, state, control)  # outside of training
    assert len(counted) == 1
    handler.on_train_begin(None, state, control)
    evaluated_batch(handler, None, state, control)
    assert bars.evaluation_bar.tasks[0].completed == 1
    assert len(counted) == 2
    handler.on_train_end(None, state, control)
