"""`ra3 demo` on the testbed, at toy size; what it shows at full size is in benchmarks/LOG.md."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from datasets import enable_progress_bars
from PIL import Image
from rich.console import Console

from ra3_trl.cli import demo_testbed
from ra3_trl.cli.demo_testbed import LIMIT, SIZES, fitting, in_words, result_table, shown, written_table
from ra3_trl.cli.main import main
from ra3_trl.testbed import Behaviour, Example


CASES = [Example("c=(7*4+9-2)%10\n", "assert c==5", "#7*4=8+9=7-2=5")]


@pytest.fixture(autouse=True)
def as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    enable_progress_bars()


def behaviour(right: float, think: float = 0.5, comments: float = 0.5, said: str = "assert c==5\n") -> Behaviour:
    knobs = ("never", "auto", "always")
    return Behaviour(think, 0.1, comments, dict.fromkeys(knobs, right), dict.fromkeys(knobs, [said]), CASES)


def printed(thing) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(thing)
    return out.getvalue()


def test_the_whole_at_toy_size(tmp_path, capsys):
    """All that the last lines name is there, and what was measured is in `results.json` for each model."""
    assert main(["demo", "--smoke", "--output_dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"base", "ntp", "ra3", "size", "seed", "seconds"} == set(results)
    for name in ("base", "ntp", "ra3"):
        assert set(results[name]["right"]) == {"never", "auto", "always"}
        assert (tmp_path / name / "config.json").is_file()
    assert (tmp_path / "ra3" / "ra3_config.json").is_file() and (tmp_path / "ra3" / "README.md").is_file()
    width, height = Image.open(tmp_path / "demo.png").size
    assert width == pytest.approx(3 * 4.6 * 130, abs=4) and height == pytest.approx(3.1 * 130, abs=4)
    assert "<html" in (tmp_path / "thoughts.html").read_text()
    assert "thoughts.html" in capsys.readouterr().out and not (tmp_path / "smollm2.html").exists()


def test_the_size_follows_from_the_machine(monkeypatch, tmp_path):
    """An update of pre-training of 0.2 s makes 1.5 * 1200 * 0.2 = 360 s of the whole, within the limit; one of
    0.3 s 540 s, which is not, so 1.5 * 600 * 0.3 = 270 s of easier programs; a slower machine gets these too."""
    assert LIMIT == 480

    def at(seconds):
        monkeypatch.setattr(demo_testbed, "pretrain", lambda *args, **kwargs: (None, seconds))
        return fitting(None, tmp_path)

    assert at(0.2) is SIZES[0] and at(0.3) is SIZES[1] and at(3.0) is SIZES[1]
    assert SIZES[0].seconds(0.2) == pytest.approx(360)


def test_what_a_model_wrote_is_marked():
    assert shown("#7*4=8+9=7-2=5\nassert c==5\nd=3\n", "assert c==5") == "#7*4=8+9=7-2=5\nassert c==5 [green]✓[/]"
    assert shown("assert c==4\n", "assert c==5") == "assert c==4 [red]✗[/]"
    assert shown("#7*4", "assert c==5") == "#7*4\n... [red]✗[/]"  # cut off before a line of code
    table = printed(
        written_table({"base": behaviour(0, said="assert c==4\n"), "ntp": behaviour(0), "ra3": behaviour(1)})
    )
    assert table.count("assert c==4 ✗") == 3 and table.count("assert c==5 ✓") == 6 and "c=(7*4+9-2)%10" in table


def test_the_words_follow_the_numbers():
    ahead = in_words(behaviour(0.33, 0.4, 0.76), behaviour(0.12, 0.0), behaviour(0.95, 0.99, 0.96))
    assert "33%" in ahead and "12%" in ahead and "95%" in ahead and "(P(think) 0.40 -> 0.00)" in ahead
    assert "not ahead" not in ahead and "(76% -> 96%)" in ahead
    for right in ((0.3, 0.1, 0.2), (0.1, 0.3, 0.3)):
        assert "RA3 is not ahead" in in_words(*map(behaviour, right))
    seen = {"base": behaviour(0.25), "ntp": behaviour(0.0), "ra3": behaviour(1.0)}
    table = printed(result_table({name: replace(it, cases=4 * CASES) for name, it in seen.items()}))
    # Wilson's interval of 0 of 4 ends at z^2 / (4 + z^2) = 3.841 / 7.841.
    assert table.count("0.00 [0.00, 0.49]") == table.count("1.00 [0.51, 1.00]") == 3 and table.count("0.25 [") == 3
    assert "0.50 [" in table and table.count("[") == 4 * 3  # P(think) has none


def test_own_code_takes_the_other_way(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("ra3_trl.cli.demo.run_own", lambda options: seen.append("own") or 0)
    monkeypatch.setattr("ra3_trl.cli.demo.run_testbed", lambda options: seen.append("testbed") or 0)
    code = str(tmp_path)
    for words in ([], ["--code_dir", code], ["--model_name_or_path", "a/b"], ["--dataset_name", "a/b"], ["--smoke"]):
        assert main(["demo", *words]) == 0
    assert seen == ["testbed", "own", "own", "own", "testbed"]
