"""`python -m benchmarks picture`: which numbers of the replication's tables are drawn, and the page."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.picture import ResultTable, read_table, table_charts, table_section
from ra3_trl.report.report import write_report
from ra3_trl.report.runs import TrainingRun, read_runs


def estimate(*values):
    """By hand, for two seeds: t(1) = 12.706 times the standard deviation |a - b| / sqrt(2), over sqrt(2)."""
    seen = [value for value in values if value is not None]
    mean = sum(seen) / len(seen) if seen else None
    half = 12.706 * abs(seen[0] - seen[1]) / 2 if len(seen) > 1 else None
    band = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": band[0], "high": band[1], "n": len(seen), "values": values}


def replication():
    measures = ("think_hard", "think_easy", "comment_right", "ce", "elbo", "bound_multi")
    measures += ("accuracy", "accuracy_forced", "accuracy_never", "rlvr_last")
    table = {name: {"base": estimate(0.25, 0.35), "ra3": estimate(0.90, 0.92)} for name in measures}
    table["rlvr_steps_to_80"] = {"base": estimate(None, None), "ra3": estimate(None, 2)}
    log = [{"estep/gate_weighted_gain": 0.5, "estep/think_rate": 0.2},
           {"estep/gate_weighted_gain": 1.5, "estep/think_rate": 0.3}]  # fmt: skip
    arms = {"base": {"curve": [0.2, 0.4], "log": []}, "ra3": {"curve": [0.9, 0.95], "log": log}}
    bases = [{"seed": 0, "passed": False, "comment_right": 0.1}, {"seed": 1, "passed": True, "comment_right": 0.7}]
    return {"seeds": 2, "bases": bases, "form": {}, **table, "runs": [arms, arms]}


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def test_a_table_is_known_by_what_it_holds(tmp_path):
    """What is no table is read as `ra3 report` does."""
    (found,) = read_runs([write(tmp_path / "a.b.json", replication())], read_table)
    assert found == ResultTable("a.b", json.loads(json.dumps(replication())))
    state = {"log_history": [{"step": 1, "reward": 0.5}]}
    write(tmp_path / "trainer_state.json", state)
    assert read_table(str(tmp_path), "grpo") == TrainingRun("grpo", "RLVR", state["log_history"])
    for text, says in (("{}", "nothing to report"), ("no json", "can't be read")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            read_table(str(tmp_path / "x.json"), "x")


def test_the_table_of_the_replication():
    """Base 0.25 and 0.35: 0.3 with 12.706 * 0.05 = 0.635 either way; ra3 0.91 with 0.127; shares from 0 to 1."""
    section = table_section(ResultTable("x", replication()))
    rows = dict(section.rows)
    assert list(section.columns) == ["base", "ra3"]
    assert rows["hard lines right"] == [("0.300", "[0.000, 0.935]"), ("0.910", "[0.783, 1.000]")]
    assert rows["GRPO updates to 80 %"] == [("\u2013", "(2 never)"), ("2.0", "(1 never)")]
    assert (
        "GRPO updates to 50 %" not in rows and "Bases tried: 2;" in section.about and "right: 0.70." in section.about
    )
    titles = {chart.title: chart for chart in section.charts}
    assert set(titles) == {
        "E-phase: gain where it thinks", "E-phase: P(think)", "Thinks where it pays", "Held-out expert code",
        "Hard lines right", "RLVR: tasks solved",
    }  # fmt: skip
    (gain,) = titles["E-phase: gain where it thinks"].series
    assert (gain.label, gain.x, gain.y) == ("ra3", [1, 2], [0.5, 1.5])
    ours = titles["RLVR: tasks solved"].series[1]
    assert (ours.label, ours.x, ours.y, ours.band) == ("ra3", [0, 1], [0.9, 0.95], [(0.9, 0.9), (0.95, 0.95)])
    assert (
        titles["Hard lines right"].cells(titles["Hard lines right"].series[0]) == ["0.300 [0.000, 0.935]"] * 3
    )  # a share: not below 0


def experiment():
    arms = ("base", "c=0", "c=inf")
    measures = ("think_hard", "think_easy", "comment_right", "ce", "elbo", "bound_multi", "accuracy")
    table = {name: {arm: estimate(0.25 + i / 10, 0.35 + i / 10) for i, arm in enumerate(arms)} for name in measures}
    table["gain"] = {"base": estimate(None, None), "c=0": estimate(1.0, 1.0), "c=inf": estimate(None, None)}
    bases = [{"seed": 0, "passed": True, "comment_right": 0.7}]
    return {"experiment": "penalty", "seeds": 2, "bases": bases, **table, "runs": [{}, {}]}


def test_an_experiment_is_drawn_over_its_arms(tmp_path):
    """Means 0.3, 0.4 and 0.5, 0.635 either way, of shares from 0 to 1; arms without an E-phase have no gain."""
    section = table_section(read_table(write(tmp_path / "sweep.json", experiment()), "sweep"))
    assert section.title == "Experiment penalty: sweep"
    assert dict(section.rows)["nats that a latent brings"] == [
        ("\u2013", ""), ("1.000", "[1.000, 1.000]"), ("\u2013", ""),
    ]  # fmt: skip
    think, code, gain = section.charts
    assert think.name == "sweep_thinks_and_is_right" and think.ticks == ("base", "c=0", "c=inf")
    assert [one.label for one in think.series][::3] == ["P(think), hard lines", "hard lines right"]
    assert think.series[0].y == pytest.approx([0.3, 0.4, 0.5])
    assert think.series[0].band[0] == pytest.approx((0.0, 0.3 + 0.6353)) and think.series[0].band[1] == (0.0, 1.0)
    assert code.series[0].band[1] == pytest.approx((0.4 - 0.6353, 0.4 + 0.6353))
    assert len(code.series) == 3 and gain.series[0].y == [None, 1.0, None]
    assert [path.name for path in write_report([section], tmp_path / "out", "t")] == [
        "report.html", "tables.md", "sweep_thinks_and_is_right.png", "sweep_held_out_expert_code.png",
        "sweep_gain_of_a_latent_at_the_e_phase_s_end.png", "overview.png",
    ]  # fmt: skip


def test_charts_of_one_replication_have_names_of_their_own():
    names = [chart.name for label in ("a", "b c") for chart in table_charts(ResultTable(label, replication()))]
    assert len(set(names)) == len(names) == 12 and "b_c_rlvr_tasks_solved" in names


def test_the_page_of_a_table(tmp_path, capsys):
    """With a training run beside it, which has a table of its own."""
    path = write(tmp_path / "table.json", replication())
    write(tmp_path / "trainer_state.json", {"log_history": [{"step": 1, "reward": 0.5}]})
    main(["picture", path, f"grpo={tmp_path}", "--output_dir", str(tmp_path / "out"), "--json"])
    assert json.loads(capsys.readouterr().out) == {"page": str(tmp_path / "out" / "report.html"), "pictures": 8}
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<img ") == 7 and "Replication: table" in html and "<small>[0.783, 1.000]</small>" in html
    table = (tmp_path / "out" / "tables.md").read_text()
    assert (
        "## Replication: table" in table
        and "| | base | ra3 |\n|---|---|---|\n| P(think) before hard lines | " in table
    )
    assert "| hard lines right | 0.300 [0.000, 0.935] | 0.910 [0.783, 1.000] |" in table


def checkpoints():
    """By hand, t(1) = 12.706: right .76 and .78 are .77 and .127 either way; .11 and .12 are .115 and .064."""

    def arm(*right):
        runs = [{"seed": i, "right": value, "think_there": 0.5, "text": "#"} for i, value in enumerate(right)]
        return {"right": sum(right) / 2, "most_frequent": {"text": "#", "share": 0.1}, "runs": runs}

    return {"experiment": "real_gate", "seeds": 2, "base": arm(0.77, 0.77), "ntp": arm(0.11, 0.12),
            "ra3": arm(0.76, 0.78)}  # fmt: skip


def test_an_experiment_on_a_real_checkpoint(tmp_path):
    """Its numbers are by arm; what a checkpoint was not asked, as the nats of `cold_start`, has no picture."""
    table = read_table(write(tmp_path / "real.json", checkpoints()), "real")
    one = {name: value for name, value in checkpoints().items() if name not in ("base", "ntp")}
    assert read_table(write(tmp_path / "one.json", one), "one").arms == ("ra3",)  # of `--arms ra3`
    section = table_section(table)
    assert list(section.columns) == ["base", "ntp", "ra3"] and "Bases tried" not in section.about
    rows = dict(section.rows)
    assert rows["assertions right"] == [("0.770", "[0.770, 0.770]"), ("0.115", "[0.051, 0.179]"),
                                        ("0.770", "[0.643, 0.897]")]  # fmt: skip
    assert list(rows) == ["assertions right", "P(think) before assertions"]
    assert [chart.title for chart in table_charts(table)] == ["Assertions right", "Thinks where it pays"]
    chart = table_charts(table)[0]
    assert chart.ticks == ("left to itself",)
    assert {one.label: list(one.y) for one in chart.series} == {
        "base": [0.77], "ntp": pytest.approx([0.115]), "ra3": pytest.approx([0.77]),
    }  # fmt: skip


def test_two_tables_say_in_the_picture_of_all_which_is_which(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks.picture.write_report", lambda sections, *_: seen.extend(sections) or [tmp_path])
    tables = {"real": checkpoints(), "toy": replication()}
    main(["picture", *(f"{name}={write(tmp_path / name, table)}" for name, table in tables.items()), "--json"])
    assert [section.charts[0].title for section in seen] == [
        "real: Assertions right",
        "toy: E-phase: gain where it thinks",
    ]
