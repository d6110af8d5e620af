"""The experiment `cold_start`: tasks from MBPP's rows, arms of equal updates, a toy run of all of it."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
from conftest import needs_bwrap

from benchmarks import traces
from benchmarks.replication.cold_data import ColdTask, cold_tasks, with_traces
from benchmarks.replication.cold_measure import ColdMeasureRecipe, held_out, is_right
from benchmarks.replication.cold_start import (
    CHANGES,
    ColdRecipe,
    annotate_texts,
    annotator_of,
    cold_start,
    run_cold,
    with_seed,
)
from benchmarks.replication.store import Store
from benchmarks.traces import stated
from ra3_trl import Policy
from ra3_trl.losses import compute_returns
from ra3_trl.policy.annotators import as_latent
from ra3_trl.policy.prompted.answers import MALFORMED


ROOT = Path(__file__).resolve().parents[1]
CODE = "def f{i}(n):\r\n    a = n + {i}\r\n    b = a * 2\r\n    return b - 1"


@pytest.fixture
def mbpp(tmp_path):
    """A function of the test split and two of the training split."""
    rows = [
        {
            "task_id": task_id, "code": CODE.replace("{i}", str(i)), "test_setup_code": "",
            "test_list": [f"assert f{i}(1) == {2 * i + 1}", f"assert {2 * i + 3} == f{i}(2)", f"assert f{i}(3)"],
        }
        for i, task_id in enumerate((11, 601, 974))
    ]  # fmt: skip
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ("assert f(3) == (7, 'a')", ("f(3)", "(7, 'a')")),
        ("assert 7 == f(x=[1])", ("f(x=[1])", "7")),
        ("assert f(3)", None),
        ("assert f(3) == g(2)", None),
        ("assert f(3) == x", None),
        ("assert f(", None),
        ("x = 1\nassert f(x) == 1", None),
    ],
)
def test_what_an_assertion_states(test, found):
    assert stated(test) == found


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("assert result == [1, 2]\n", True),
        ("# a = 3\nassert result == [1,2]\nassert result == 3", True),
        ("assert result == [1, 2] or True\n", False),
        ("assert result == (1, 2)\n", False),
        ("x = 3\n", False),
        ("assert result == [1, 2", False),
    ],
)
def test_what_counts_as_right(written, right):
    assert is_right(written, "[1, 2]") is right
    assert not is_right("assert result == True", "1")


def test_tasks_of_the_splits(mbpp):
    """Two of each function's three assertions state a value."""
    tasks = cold_tasks("train", mbpp)
    assert len(tasks) == 4 and cold_tasks("validation", mbpp) == []
    assert tasks[0].text == (
        "def f1(n):\n    a = n + 1\n    b = a * 2\n    return b - 1\n\nresult = f1(1)\nassert result == 3\n"
    )


@needs_bwrap
def test_tasks_have_the_trace_of_their_call(mbpp):
    tasks = cold_tasks("train", mbpp, traced=True)
    assert [task.trace for task in tasks] == ["# a = 2, b = 4", "# a = 3, b = 6", "# a = 3, b = 6", "# a = 4, b = 8"]
    assert with_traces([ColdTask("x = 1\n", "1")])[0].trace == ""
    (task,) = held_out(ColdMeasureRecipe(mbpp=mbpp))  # the first of each function
    assert (task.trace, task.answer) == ("# a = 1, b = 2", "1")


def test_all_arms_have_the_same_updates():
    def updates(recipe):
        return 0 if recipe is None else recipe.e_steps + recipe.m_steps + updates(recipe.start)

    for experiment in (cold_start(), cold_start(ColdRecipe(m_steps=4))):
        arms = experiment.arms
        assert arms["base"] is None
        assert len({updates(arms[name]) for name in ("ntp", "cold", "cold_ntp", "cold_ra3", "ra3")}) == 1
        assert arms["cold_ntp"].start == arms["cold_ra3"].start and arms["cold_ra3"].e_steps
        seeded = with_seed(arms["cold_ra3"], 3)
        assert seeded.seed == seeded.start.seed == 3 and seeded.defaults and not seeded.start.defaults
    named = cold_start(others="annotators", asked="org/model").arms
    assert list(named) == ["base", "ntp", "trace", "policy", "hindsight", "asked"]
    assert named["asked"] == replace(named["ntp"], annotator="org/model") and named["ntp"].functions == 48 * 8
    assert {updates(recipe) for recipe in named.values()} == {0, 48}
    assert "asked" not in cold_start(others="annotators").arms
    varied = cold_start(others="variants").arms
    assert varied["cold"] == cold_start().arms["cold"]
    assert cold_start(ColdRecipe(m_steps=4), others="variants").arms["longer"].m_steps == 32
    for name, changes in CHANGES.items():  # each is another cold start, by one thing
        assert len(changes) == 1 and varied[name] == replace(varied["cold"], **changes) != varied["cold"]


@needs_bwrap
def test_a_variant_writes_other_texts(mbpp, tiny_model, tokenizers, tmp_path):
    """By form and length of the traces; `a = 1, b = 2` is longer than a latent of one token may be."""
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe = ColdRecipe(mbpp=mbpp, annotator="trace", keep_all=True)
    texts = [task.text for task in cold_tasks("train", mbpp)]
    found = {}
    for name, changes in {"all": {}, "lines": {"form": "lines"}, "none": {"max_latent_length": 1}}.items():
        found[name] = annotate_texts(replace(recipe, **changes), str(tmp_path), texts)
    assert found["all"]["report"]["kept"] == found["lines"]["report"]["kept"] == found["all"]["report"]["proposed"] > 0
    assert found["all"]["texts"] != found["lines"]["texts"]
    assert found["none"]["report"]["kept"] == 0 and found["none"]["texts"] == texts


def test_another_model_is_asked(mbpp, tiny_model, tokenizers, tmp_path):
    """Random weights write lines that are no comments: each text is asked about, and stays as it is."""
    tokenizer = tokenizers["newline_indent"]
    for seed, name in enumerate(("student", "asked")):
        tiny_model("llama", tokenizer, seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    recipe = cold_start(ColdRecipe(mbpp=mbpp), others="annotators", asked=str(tmp_path / "asked")).arms["asked"]
    assert annotator_of(recipe).name == str(tmp_path / "asked")
    texts = [task.text for task in cold_tasks("train", mbpp)]
    found = annotate_texts(recipe, str(tmp_path / "student"), texts)
    assert found["texts"] == texts and found["report"]["texts"] == 4
    assert found["report"]["kept"] == 0 and MALFORMED in found["report"]["dropped"]


@needs_bwrap
@pytest.mark.slow
def test_a_toy_run(mbpp, tmp_path, tiny_model, tokenizers):
    """All arms once; what is in the store is not done again."""
    folder = tmp_path / "model"
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = (("num_latents", 2),)
    base = ColdRecipe(model=str(folder), mbpp=mbpp, m_steps=4, batch_size=2, max_latent_length=24, settings=settings)
    small = ColdMeasureRecipe(tasks=2, draws=2, bounds=2, max_latent_length=24, model=str(folder), mbpp=mbpp)
    experiment = cold_start(base, measures=small)
    store = Store(tmp_path / "store")
    found = run_cold(store, experiment, 1)
    assert set(found) == {"seeds", *experiment.arms}
    for arm in experiment.arms:
        assert found[arm]["gain"]["n"] == 1 and 0 <= found[arm]["think_there"]["mean"] <= 1
    cold = found["cold"]["runs"][0]
    assert cold["report"]["proposed"] == 4 and cold["updates"] == 8
    again = run_cold(store, replace(experiment), 1)
    assert again["cold_ra3"]["gain"] == found["cold_ra3"]["gain"]


def test_the_examples_programs(mbpp, tmp_path):
    """Of the training split's two functions; of three assertions one is a call and its value."""
    example = runpy.run_path(str(ROOT / "examples" / "cold_start.py"))
    rows = [json.loads(row) for row in Path(example["mbpp_programs"](tmp_path, mbpp)).read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["text"] == (
        "def f1(n):\n    a = n + 1\n    b = a * 2\n    return b - 1\n\nresult = f1(1)\nassert result == 3\n"
    )


@needs_bwrap
@pytest.mark.slow
def test_the_example(mbpp, tmp_path, tiny_model, tokenizers, monkeypatch, capfd):
    """Annotation, cold start, RA3 and diagnosis, as commands; finished ones are not run again."""
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": task.text} for task in cold_tasks("train", mbpp)]
    (tmp_path / "programs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "cold_start.py", "--model_name_or_path", str(tmp_path / "model"), "--dataset_name",
        str(tmp_path / "programs.jsonl"), "--output_dir", str(tmp_path / "out"), "--max_length", "160",
        "--max_latent_length", "24", "--cold_steps", "11", "--e_steps", "1", "--m_steps", "1", "--use_cpu", "True",
        "--report_to", "none", "--num_latents", "2",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "examples" / "cold_start.py"), run_name="__main__")
    out = capfd.readouterr().out
    assert "4 texts, 4 proposals" in out and "Thoughts" in out
    assert all((tmp_path / "out" / name / "done").exists() for name in ("annotated", "cold", "ra3"))
    assert [path.name for path in (tmp_path / "out" / "cold").glob("checkpoint-*")] == [
        "checkpoint-11"
    ]  # of 10 and 11


@needs_bwrap
def test_the_benchmark_of_traces(mbpp, tmp_path, tiny_model, tokenizers):
    """Three functions with three assertions each, all of which have a short trace; one gain by another way."""
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = SimpleNamespace(mbpp=mbpp, model=str(tmp_path / "model"), functions=60, programs=None, threads=1)
    found = traces.run(args)
    assert (found["programs"], found["asserts"], found["traced"], found["short"]) == (3, 9, 9, 9)
    assert (found["copies"], found["comments"], found["functions"]) == (0, 9, 3) and found["programs_per_s"] > 0
    assert set(found["by_form"]) == {"changes", "last", "lines"}
    code = CODE.replace("{i}", "0").replace("\r\n", "\n")
    policy = Policy.open(args.model, use_cpu=True, horizon=1, max_length=768, max_latent_length=160)
    (document,) = policy.segment(f"{code}\n\nresult = f0(1)\nassert result == 1\n")
    latents = [[as_latent(policy, f" {text}") for text in ("a = 1, b = 2", "a = 2, b = 4")]]
    gains = compute_returns(policy.score(document, document.boundaries[-1:], latents), 1, 1.0).gain_TG[0].tolist()
    assert found["intervals"]["changes"]["values"][0] == pytest.approx(gains[0], abs=1e-3)
    assert found["intervals"]["other"]["values"][0] == pytest.approx(gains[1], abs=1e-3)
    assert found["student_gain_true"] == pytest.approx(fmean(found["intervals"]["changes"]["values"]))
    assert found["student_gain_other_call"] == pytest.approx(fmean(found["intervals"]["other"]["values"]))
    assert "student_gain_true" not in traces.run(SimpleNamespace(**vars(args) | {"functions": 0, "programs": 1}))
