"""What a run shows while it goes and when it ends: the table, bars, latents in trackers, base and now."""

from __future__ import annotations

import json
import os
import signal
import sys
import types

import pytest
from transformers import TrainerCallback

from ra3_trl.em import Schedule
from ra3_trl.report.latents import send_latents
from ra3_trl.report.table import COLUMNS, TablePrinterCallback, TableProgressCallback, UpdateTable


TEXTS = ["def f(x):\n    y = x\n    return y\n", "def g(x):\n    if x:\n        x += 1\n    return x\n"] * 2


class Interrupt(TrainerCallback):
    """As Ctrl-C behind an update."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# ---- the table ----


def test_a_row_has_what_its_phase_logged(monkeypatch):
    """2 E-updates of 3 s, of 2 M-updates one of 1 s: 1 s is left, and nothing is unknown then."""
    now = iter([0.0, 3.0, 3.0, 3.0, 6.0, 6.0, 6.0, 7.0, 7.0])
    monkeypatch.setattr("ra3_trl.report.table.time.monotonic", lambda: next(now))
    table = UpdateTable(Schedule(1, 2, 2))
    logs = {"phase": 0.0, "estep/gain": -1.25, "estep/think_rate": 0.5, "estep/code_loss": 2.5, "estep/reward": 9.0}
    table.begin()
    table.end(1)
    assert table.row(logs, 1) == {
        "update": "1/4", "phase": "E 1/2", "gain": "-1.25", "think": "0.500", "code loss": "2.500", "seconds": "3.0",
        "left": "> 3.0 s",
    }  # fmt: skip
    table.begin()
    table.end(2)
    table.begin()
    table.end(3)
    row = table.row({"phase": 1.0, "mstep/placed_gain": 1.0, "mstep/annotated_rate": 0.25, "mstep/code_loss": 2.0}, 3)
    assert list(row.values()) == ["3/4", "M 1/2", "+1.00", "0.250", "2.000", "1.0", "1.0 s"]
    held_out = table.row({"eval_b_ce": 2.25, "eval_b_gain": -1.0, "eval_b_runtime": 8.0}, 3, evaluations_left=1)
    assert list(held_out.values()) == ["3/4", "held out", "-1.00", "", "2.250", "8.0", "9.0 s"]
    assert table.row({"train_runtime": 3.0}, 3) is None


@pytest.mark.parametrize(("hidden", "kind"), [(False, TableProgressCallback), (True, TablePrinterCallback)])
def test_a_run_shows_a_row_an_update_and_no_more(make_trainer, capsys, hidden, kind):
    trainer = make_trainer(TEXTS, eval_data=TEXTS[:2], disable_tqdm=hidden, eval_strategy="steps", eval_steps=2)
    assert sum(type(callback) is kind for callback in trainer.callback_handler.callbacks) == 1
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] and "/" in line.split()[0]]
    assert [row[:2] for row in rows] == [
        ["1/4", "E"], ["2/4", "E"], ["2/4", "held"], ["3/4", "M"], ["4/4", "M"], ["4/4", "held"],
    ]  # fmt: skip
    assert lines[0].split() == " ".join(COLUMNS).split() and not any("{" in line for line in lines)
    assert lines[7] == "Held out, base -> now:" and lines[-1].startswith("Next: ")  # the table has 7 lines
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"estep/reward", "estep/loss", "seconds/rollout"} <= logged


def test_a_phase_that_was_not_timed_is_no_zero():
    """Both E-updates are done, and no M-update was timed: nothing says how long the two take."""
    table = UpdateTable(Schedule(1, 2, 2))
    table.begin()
    table.end(1)
    table.end(2)
    assert table.left(2) == "unknown" and table.left(1).startswith("> ") and table.left(4) == "0.0 s"


def test_a_run_in_python_ends_in_words(make_trainer, capsys):
    """Where something is held out, behind the evaluation that follows the run; once."""
    trainer = make_trainer(TEXTS, eval_data=TEXTS[:2], eval_on_start=True)
    trainer.train()
    assert "Held out" not in capsys.readouterr().out
    now = trainer.evaluate()["eval_ce"]
    said, base = capsys.readouterr().out, trainer.state.log_history[0]["eval_ce"]
    assert f"cross-entropy: {base:.3f} -> {now:.3f}" in said and "of memory at most" in said and "Took" in said
    assert f"ra3 show {trainer.args.output_dir} FILE.py" in said
    trainer.evaluate()
    assert "Held out" not in capsys.readouterr().out
    trainer = make_trainer(TEXTS)
    trainer.train()
    said = capsys.readouterr().out
    assert "Nothing was held out" in said and said.count("Took") == 1

    class Terminated(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = make_trainer(TEXTS, callbacks=[Terminated()])
    with pytest.raises(SystemExit):
        trainer.train()
    assert "Took" not in capsys.readouterr().out  # it goes on


def test_a_callback_of_the_user_stays(make_trainer):
    from transformers import PrinterCallback

    class Mine(PrinterCallback):
        pass

    trainer = make_trainer(TEXTS, callbacks=[Mine()])
    assert [type(c) for c in trainer.callback_handler.callbacks if isinstance(c, PrinterCallback)] == [
        Mine, TablePrinterCallback,
    ]  # fmt: skip


def test_a_notebook_has_the_same_rows(make_trainer, monkeypatch):
    """With a stand-in for IPython: the last page shown is a table of a row an update, evaluations apart."""
    shown = []

    class Output:
        def update(self, html):
            shown.append(html)

    display = types.ModuleType("IPython.display")
    display.HTML, display.display = str, lambda html, display_id=False: (shown.append(html), Output())[1]
    ipython = types.ModuleType("IPython")
    ipython.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    for name in ("transformers.utils.notebook", "ra3_trl.report.notebook"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from transformers.utils.notebook import NotebookProgressCallback

    monkeypatch.setattr("transformers.trainer.DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    trainer = make_trainer(TEXTS, eval_data=TEXTS[:2], disable_tqdm=False, eval_strategy="steps", eval_steps=4)
    trainer.train()
    for text in (*COLUMNS, "1/4", "E 2/2", "M 2/2", "4/4, held out"):
        assert f">{text}<" in shown[-1]
    assert "Training Loss" not in shown[-1]


def test_evaluation_has_a_bar_of_documents(make_trainer, capsys):
    """4 documents, which one batch of the loader holds."""
    trainer = make_trainer(TEXTS, eval_data=TEXTS, disable_tqdm=False, per_device_eval_batch_size=8)
    trainer.evaluate()
    drawn = capsys.readouterr().err
    assert "Evaluating" in drawn and "4/4" in drawn and "document" in drawn
    trainer.args.disable_tqdm = True
    trainer.evaluate()
    assert "Evaluating" not in capsys.readouterr().err


def test_the_bar_says_what_is_done(make_trainer, capsys):
    make_trainer(TEXTS, disable_tqdm=False, e_steps=1, m_steps=1).train()
    drawn = capsys.readouterr().err
    for text in ("E-phase 1/1: drawing latents", "E-phase 1/1: learning", "M-phase 1/1: annotating"):
        assert text in drawn


# ---- latents in trackers ----


ROWS = [
    {"step": 3, "doc_id": 1, "line_number": 2, "think_prob": 0.5, "line": "x = 1\n", "latent": " a|b", "gain": gain}
    for gain in (0.5, 1.5)
]


def test_latents_go_to_tensorboard_as_text(make_trainer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(TEXTS, report_to="tensorboard", log_latents_steps=1)
    trainer.train()
    (folder,) = {file.parent for file in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    (tag,) = (tag for tag in events.Tags()["tensors"] if tag.startswith("estep/latents"))
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)]
    assert len(texts) == 2 and all("| gain (nats) | P(think) | latent | next line |" in text for text in texts)


def test_latents_go_to_trackio_as_a_table(monkeypatch):
    from transformers.integrations import TrackioCallback
    from transformers.trainer_callback import CallbackHandler

    logged = []
    trackio = types.ModuleType("trackio")
    trackio.log, trackio.Table = logged.append, lambda dataframe: dataframe.to_dict("records")
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    send_latents(CallbackHandler([TrackioCallback.__new__(TrackioCallback)], None, None, None, None), 3, ROWS)
    (entry,) = logged
    assert entry["train/global_step"] == 3
    assert [(row["latent"], row["gain"]) for row in entry["estep/latents"]] == [("# a|b", 1.5), ("# a|b", 0.5)]


# ---- interrupts ----


def test_an_interrupt_in_a_notebook_says_how_to_go_on(make_trainer, caplog):
    trainer = make_trainer(TEXTS, callbacks=[Interrupt(3)], save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (said,) = (record.message for record in caplog.records if "Stopped" in record.message)
    assert "Stopped after update 3" in said and "checkpoint-2 is whole" in said
    assert "trainer.train(resume_from_checkpoint=True)" in said
    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(TEXTS, callbacks=[Interrupt(1)], output_dir=str(trainer.args.output_dir) + "2").train()
    assert "before the first checkpoint" in caplog.text and "smaller `save_steps`" in caplog.text


# ---- the counts of texts ----


def test_the_first_line_of_training_has_the_counts_behind_an_evaluation(make_trainer):
    trainer = make_trainer(TEXTS, eval_data=TEXTS[:1], eval_on_start=True)
    trainer.train()
    lines = [entry for entry in trainer.state.log_history if "phase" in entry]
    assert [any(key.startswith("data/") for key in line) for line in lines] == [True, False, False, False]
    assert trainer.state.log_history[0]["step"] == 0 and "eval_ce" in trainer.state.log_history[0]
    json.dumps(trainer.state.log_history)
