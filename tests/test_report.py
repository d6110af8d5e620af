"""`ra3 report`: what it reads, which numbers it shows, and the page."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from datasets import Dataset
from PIL import Image

from ra3_trl.cli.main import main
from ra3_trl.report import charts
from ra3_trl.report.charts import Chart, Series, choose_styles, curve_over, draw, plot_run, training_charts
from ra3_trl.report.report import make_sections, write_report
from ra3_trl.report.runs import AnnotatedCorpus, TrainingRun, read_run, read_runs
from ra3_trl.report.summary import summary_text


TEXTS = ["def f(x):\n    y = x\n    return y\n"] * 4
ANNOTATED = [
    {
        "annotated_text": "def f(x):\n    # <b>twice</b>\n    y = 2 * x\n    # so\n    return y\n",
        "latents": [{"line": 2, "text": " <b>twice</b>", "gain": 1.5}, {"line": 4, "text": " so", "gain": -0.5}],
    },
    {"annotated_text": "x = 1\n", "latents": []},
    {"annotated_text": "# a\nz = 3\n", "latents": [{"line": 1, "text": " a", "gain": None}]},
]


@pytest.fixture
def training(make_trainer, tmp_path):
    """A folder of a run with both phases, and its log."""
    trainer = make_trainer(TEXTS, eval_data=TEXTS[:2], e_steps=2, m_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.save_state()
    return tmp_path / "run", trainer.state.log_history


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


class Read(HTMLParser):
    """Pictures, all text, and elements."""

    def __init__(self, html):
        super().__init__()
        self.pictures, self.text, self.tags = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.pictures.append(base64.b64decode(dict(attrs)["src"].removeprefix("data:image/png;base64,")))

    def handle_data(self, data):
        self.text.append(data)


# ---- reading ----


def test_a_run_is_known_by_what_it_holds(training, tmp_path):
    run = read_run(str(training[0]))
    assert (run.label, run.kind) == ("run", "mid-training")
    assert run.points("estep/reward") == {e["step"]: e["estep/reward"] for e in training[1] if "estep/reward" in e}
    rlvr = tmp_path / "grpo" / "checkpoint-2"
    rlvr.mkdir(parents=True)
    write(rlvr / "trainer_state.json", {"log_history": [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 1.0}]})
    found = read_run(str(rlvr.parent), "mine")
    assert (found.label, found.kind, found.points("reward")) == ("mine", "RLVR", {1: 0.5, 2: 1.0})
    assert read_run(write(tmp_path / "a.b.json", ANNOTATED)) == AnnotatedCorpus("a.b", ANNOTATED)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANNOTATED))
    assert read_run(str(tmp_path / "rows.jsonl")) == AnnotatedCorpus("rows", ANNOTATED)
    Dataset.from_list(ANNOTATED).save_to_disk(str(tmp_path / "saved"))
    assert list(read_run(str(tmp_path / "saved")).rows) == ANNOTATED


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "'x.json' is not there; give the folder"),
        ("no json", "can't be read"),
        ("[1, 2]", "can't be read"),
        ("{}", "nothing to report"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, monkeypatch, capsys, content, says):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    assert main(["report", "x.json", "--output_dir", "out"]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_folders_that_hold_no_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"without trainer_state.json or checkpoints"):
        read_run(str(tmp_path))
    write(tmp_path / "trainer_state.json", {"log_history": [{"step": 1, "loss": 2.0}]})
    with pytest.raises(ValueError, match=r"neither phases of RA3MidTrainer nor rewards"):
        read_run(str(tmp_path))
    write(tmp_path / "trainer_state.json", {"global_step": 1})
    with pytest.raises(ValueError, match=r"damaged .*log_history"):
        read_run(str(tmp_path))
    Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "plain"))
    with pytest.raises(ValueError, match="without the columns of `ra3 annotate`"):
        read_run(str(tmp_path / "plain"))


def test_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "r.json", ANNOTATED)
    write(tmp_path / "x=y.json", ANNOTATED)  # a file of that name is no label
    found = read_runs(["a/r.json", "two=b/r.json", "two=a/r.json", "x=y.json"])
    assert [run.label for run in found] == ["r", "two", "two", "x=y"]
    with pytest.raises(ValueError, match="are both called 'r'; write LABEL=RUN"):
        read_runs(["a/r.json", "b/r.json"])


# ---- numbers ----


def test_a_band_is_over_seeds_where_all_have_a_value():
    """0.2 and 0.4: mean 0.3, standard deviation 0.1414, t(1) = 12.706: 12.706 * 0.1414 / sqrt(2) = 1.2706."""
    found = curve_over("a", [{1: 0.2, 2: 0.5, 3: 9.0}, {1: 0.4, 2: 0.5}])
    assert (found.x, found.y) == ([1, 2], pytest.approx([0.3, 0.5]))
    assert found.band[0] == pytest.approx((0.3 - 1.2706, 0.3 + 1.2706)) and found.band[1] == (0.5, 0.5)
    assert curve_over("a", [{1: 0.2}]).band == [None]


def test_charts_of_a_run_are_what_it_logged(training):
    charts = {chart.title: chart for chart in training_charts([read_run(str(training[0]))])}
    for title, key in (("E-phase: reward", "estep/reward"), ("Held-out negative ELBO", "eval_elbo")):
        logged = [(entry["step"], entry[key]) for entry in training[1] if key in entry]
        (curve,) = charts[title].series
        assert list(zip(curve.x, curve.y, strict=True)) == logged and logged
    assert "M-phase: loss of code tokens" in charts


def test_runs_without_a_number_are_not_in_its_chart():
    runs = [TrainingRun(label, "RLVR", [{"step": 1, "reward": 1.0} | more]) for label, more in (
        ("a", {"think_rate": 0.5}), ("b", {}), ("b", {}),
    )]  # fmt: skip
    charts = training_charts(runs)
    assert [chart.title for chart in charts] == ["RLVR: reward", "RLVR: latents for each line of code"]
    assert [[one.label for one in chart.series] for chart in charts] == [["a", "b"], ["a"]]
    assert charts[0].note.endswith("over 2 seeds.")


def test_the_length_of_a_latent_is_in_tokens():
    """As `think_cost_reward` logs it: tests/test_code_rewards.py."""
    (_, length) = training_charts([TrainingRun("a", "RLVR", [{"step": 1, "reward": 1.0, "latent_length": 3.0}])])
    assert (length.title, length.y_label, length.series[0].y) == ("RLVR: length of a latent", "tokens", [3.0])


# ---- pictures and page ----


def test_labels_keep_their_color():
    """`ra3` is blue (0072b2) and `ntp` red (d55e00), alone or together; another takes neither."""

    def colors(*labels):
        curves = [Series(label, [0, 1], [i, 1 + i], [None, None]) for i, label in enumerate(labels)]
        image = Image.open(io.BytesIO(draw([Chart("a", "a", "", "", curves)]))).convert("RGB")
        return {color for _, color in image.getcolors(maxcolors=1 << 24)}

    blue, red = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
    found = [{blue, red} & colors(*labels) for labels in (["ra3"], ["ntp"], ["ntp", "ra3"], ["mine", "ra3"])]
    assert found == [{blue}, {red}, {blue, red}, {blue}]


def test_the_picture_of_a_demo(tmp_path):
    """Two runs, of which one has no E-phase, and three models: five charts in a row."""
    logs = {
        "ra3": [
            {"step": 1, "estep/gain": -0.5, "estep/gain_over_other": 0.1, "estep/think_rate": 0.1},
            {"step": 2, "mstep/code_loss": 2.0},
        ]
    }
    logs["ntp"] = [{"step": 1, "mstep/code_loss": 2.5}, {"step": 2, "mstep/code_loss": 2.0}]
    held_out = {"cross-entropy": {"base": 3.0, "ntp": 2.0, "ra3": 2.5}}
    plot_run(logs, held_out, tmp_path / "curves.png")
    width, height = Image.open(tmp_path / "curves.png").size
    assert width == pytest.approx(5 * 4.6 * 130, abs=4) and height == pytest.approx(3.1 * 130, abs=4)


def test_page_and_pictures(tmp_path, training, monkeypatch, capsys):
    """Everything in one page that loads nothing; what comes from files is escaped."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ANNOTATED))
    words = [str(training[0]), "a<script>=rows.jsonl", "--output_dir", "out", "--title", "<i>$x$"]
    assert main(["report", *words]) == 0
    html = (tmp_path / "out" / "report.html").read_text()
    page = Read(html)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    overview = files.pop("overview.png")
    assert len(page.pictures) == len(files) and set(page.pictures) == set(files.values())
    assert len(set(files.values())) == len(files)
    sizes = {name: Image.open(io.BytesIO(content)).size for name, content in files.items()}
    assert len(set(sizes.values())) == 1 and Image.open(io.BytesIO(overview)).size > max(sizes.values())
    assert f"{1 + len(files)} pictures" in capsys.readouterr().out
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "b", "i"} and "url(" not in html
    assert not [
        a for _, attrs in page.tags for n, a in attrs.items() if n in ("src", "href") and "//" in (a or "")[:9]
    ]
    shown = "".join(page.text)
    assert "<i>$x$" in shown and "Annotated: a<script>" in shown and "# <b>twice</b>" in shown
    assert "3 programs with 3 latents; where gains were measured, +0.50 nats a latent, above 0 for 50%." in shown
    assert "Program 1" in shown and "Program 2" not in shown and "Program 3" in shown
    rows = [attrs.get("class", "") for tag, attrs in page.tags if tag == "tr"]
    assert [row for row in rows if row.startswith("latent")] == ["latent up", "latent down", "latent "]
    assert all(re.search(r"\w", attrs["alt"]) for tag, attrs in page.tags if tag == "img")


def test_many_labels_with_odd_names_are_drawn(tmp_path):
    runs = [TrainingRun(f"$run_{i}^", "RLVR", [{"step": s, "reward": i / 9} for s in range(40)]) for i in range(9)]
    written = write_report(make_sections(runs), tmp_path / "new" / "folder", "many")
    assert [path.name for path in written] == ["report.html", "tables.md", "rlvr_reward.png", "overview.png"]


def test_bad_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.json", ANNOTATED)
    (tmp_path / "file").write_text("mine")
    for words, says in ((["--output_dir", "file"], "a file; name a folder"), (["--programs", "-1"], "use 0 or more")):
        assert main(["report", "t.json", *words]) == 2 and says in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install \"ra3-trl\[plots\]\""):
        write_report(make_sections([TrainingRun("x", "RLVR", [{"step": 1, "reward": 1.0}])]), tmp_path / "out", "t")
    assert not (tmp_path / "out").exists()


# ---- what a reader must not have to guess ----


def _held_out(label, *points, **more):
    log = [{"step": step, "eval_ce": ce, "eval_gain": -1.0, "estep/reward": 0.1} for step, ce in points]
    return TrainingRun(label, "mid-training", [*log, *more.get("rest", [])], more.get("facts", {}))


def _colors(png):
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return {color for _, color in image.getcolors(maxcolors=1 << 24)}


def test_a_run_keeps_its_color_in_charts_of_one_page(tmp_path):
    """Where no arm has them, `a` and `b` take the first two colors; `b` keeps the second where it stands alone."""
    first, second = "#666666", "#d55e00"
    runs = [_held_out("a", (1, 2.0)), _held_out("b", (1, 2.0), rest=[{"step": 1, "mstep/code_loss": 2.0}])]
    charts = training_charts(runs)
    styles = choose_styles(charts)
    assert (styles["a"][0], styles["b"][0]) == (first, second)
    alone = next(chart for chart in charts if chart.title == "M-phase: loss of code tokens")
    assert [one.label for one in alone.series] == ["b"]
    write_report(make_sections(runs), tmp_path, "t")
    drawn = (tmp_path / "m_phase_loss_of_code_tokens.png").read_bytes()
    assert drawn == draw([alone], size=(6.4, 4.0), styles=styles) != draw([alone], size=(6.4, 4.0))
    assert alone.note == "Not shown: a (no M-phase in the log)."


def test_a_run_without_an_evaluation_is_named(tmp_path):
    silent = TrainingRun("ntp", "mid-training", [{"step": 1, "mstep/code_loss": 2.0}])
    sections = make_sections([_held_out("ra3", (0, 2.5), (4, 2.0)), silent])
    chart = next(chart for section in sections for chart in section.charts if chart.title == "Held-out cross-entropy")
    assert chart.note == "Not shown: ntp (no held-out evaluation in the log)."
    assert "Without an evaluation in the log: ntp" in sections[0].about
    write_report(sections, tmp_path, "t")
    assert "Not shown: ntp" in (tmp_path / "report.html").read_text()


def test_the_summary_has_base_and_now():
    facts = {"base": "org/small", "peak": 2_100_000_000, "settings": {"e_steps": 2, "penalty": 0.2}}
    run = _held_out("ra3", (0, 2.5), (4, 2.25), rest=[{"step": 4, "train_runtime": 264.0}], facts=facts)
    late = _held_out("late", (2, 2.5), (4, 2.0), facts={"settings": {"e_steps": 2, "penalty": 0.3}})
    summary, charts, settings = make_sections([run, late])
    assert summary.columns == ["ra3", "late"] and charts.charts
    rows = {name: [value for value, _ in cells] for name, cells in summary.rows}
    assert [rows[name] for name in ("base", "updates", "time", "memory at most")] == [
        ["org/small", "–"], ["4", "4"], ["4.4 min", "–"], ["2.1 GB", "–"],
    ]  # fmt: skip
    assert rows["Held-out cross-entropy (nats a code token, lower is better)"] == ["2.500 → 2.250", "– → 2.000"]
    assert "not evaluated: late" in summary.about
    assert [(name, [value for value, _ in cells]) for name, cells in settings.rows] == [
        ("penalty", ["0.2", "0.3"]), ("e_steps", ["2", "2"]),
    ]  # fmt: skip
    assert "| | ra3 | late |" in summary.markdown() and "| time | 4.4 min | – |" in summary.markdown()


def test_the_end_of_a_run_in_words():
    run = _held_out("ra3", (0, 2.5), (4, 2.25))
    assert summary_text(run, 264.0, 2.1e9).splitlines() == [
        "Held out, base -> now:",
        "  cross-entropy: 2.500 -> 2.250 (nats a code token, lower is better)",
        "  gain of a latent: -1.000 -> -1.000 (nats, higher is better)",
        "Took 4.4 min, 2.1 GB of memory at most.",
    ]
    said = summary_text(_held_out("x", (4, 2.25)), 1.0, None)
    assert "the base was not evaluated -> 2.250" in said and said.count("eval_on_start") == 1
    best = summary_text(_held_out("x", (0, 2.5), (2, 2.0), (4, 2.25)), 1.0, None, now=2)
    assert "2.500 -> 2.000" in best  # the weights are those of the best checkpoint, not of the last update
    assert "Nothing was held out" in summary_text(TrainingRun("x", "mid-training", []), 1.0, None)


def test_sets_of_a_dict_have_charts_of_their_own():
    run = TrainingRun("x", "mid-training", [{"step": 1, "eval_a_ce": 2.0, "eval_b_ce": 3.0, "eval_a_ce_policy": 1.0}])
    assert [chart.title for chart in training_charts([run])] == [
        "Held-out cross-entropy: a",
        "Held-out cross-entropy: b",
    ]
    assert "Without" not in make_sections([run])[0].about


def test_points_that_are_shares_stand_between_0_and_1():
    """Matplotlib by itself draws room beyond: of 0, 0.5 and 1 ticks of -0.2 and 1.2."""
    import matplotlib.pyplot as plt

    points = Chart("a", "a", "", "share", [Series("ra3", [0, 1], [0.0, 1.0], [None, None])], ("x", "y"), share=True)
    for values, most in ((False, 1.03), (True, 1.09)):
        figure, axis = plt.subplots()
        charts._draw_chart(axis, replace(points, values=values), choose_styles([points]))
        figure.canvas.draw()
        assert axis.get_ylim() == (-0.03, most) and list(axis.get_yticks()) == [0, 0.2, 0.4, 0.6, 0.8, 1]
        texts = {text.get_text() for text in axis.texts}
        assert texts == ({"0.00", "1.00"} if values else set())
        plt.close(figure)


def test_curves_of_shares_do_not_leave_0_and_1():
    """By itself matplotlib leaves a twentieth on each side: of 0 to 0.4 it is -0.02 to 0.42, whose 3 % are 0.0132."""
    import matplotlib.pyplot as plt

    for values, limits in (([0.0, 0.4], (-0.0132, 0.42)), ([0.0, 0.0], (-0.03, 1.03)), ([0.2, 0.3], (0.195, 0.305))):
        log = [{"step": i, "mstep/annotated_rate": value} for i, value in enumerate(values)]
        (chart,) = training_charts([TrainingRun("x", "mid-training", log)])
        figure, axis = plt.subplots()
        charts._draw_chart(axis, chart, choose_styles([chart]))
        assert axis.get_ylim() == pytest.approx(limits)
        plt.close(figure)


def test_ticks_are_whole_updates_and_axes_say_what_is_better():
    import matplotlib.pyplot as plt

    (chart,) = training_charts([TrainingRun("x", "RLVR", [{"step": 1, "reward": 0.0}, {"step": 2, "reward": 1.0}])])
    figure, axis = plt.subplots()
    charts._draw_chart(axis, chart, choose_styles([chart]))
    figure.canvas.draw()
    assert all(float(tick).is_integer() for tick in axis.get_xticks()) and "higher is better" in axis.get_ylabel()
    plt.close(figure)


def test_programs_have_paths_and_long_docstrings_are_folded(tmp_path, monkeypatch):
    """Of 30 lines before the latent all but 4 on either side are left out: 22; of 10 = 2 * 4 + 2 none."""
    monkeypatch.chdir(tmp_path)
    text = "".join(f"a{i} = 1\n" for i in range(30)) + "# so\n" + "".join(f"b{i} = 1\n" for i in range(10))
    row = {
        "annotated_text": text,
        "latents": [{"line": 31, "text": " so", "gain": 1.0}],
        "path": "x/<y>.py",
        "line": 7,
    }
    run = read_run(write(tmp_path / "rows.json", [row]))
    (section,) = make_sections([run])
    (program,) = section.programs
    assert program.title == "x/<y>.py, line 7"
    assert [(line.number, line.skipped) for line in program.lines if line.skipped] == [(5, 22)]
    assert [line.number for line in program.lines] == [*range(1, 6), *range(27, 42)]
    assert main(["report", "rows.json"]) == 0
    html = (tmp_path / "report" / "report.html").read_text()
    assert "22 lines without a latent" in html and "x/&lt;y&gt;.py, line 7" in html
    assert "| rows | 1 | 1 | +1.00 | 100% |" in (tmp_path / "report" / "tables.md").read_text()


def test_what_the_help_promises_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "trainer_state.json", {"log_history": [{"step": 1, "reward": 0.5}]})
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    promised = set(re.findall(r"\b(?:report\.html|tables\.md|overview\.png)\b", capsys.readouterr().out))
    assert main(["report", "."]) == 0
    assert promised == {"report.html", "tables.md", "overview.png"} <= {path.name for path in Path("report").iterdir()}
