"""The replication's experiment on a real checkpoint: programs, measures, and all of it on a tiny random model."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import killed_at
from datasets import Dataset
from transformers import AutoModelForCausalLM

from benchmarks import common
from benchmarks.__main__ import main
from benchmarks.replication import real, real_measure
from benchmarks.replication.real import midtrain, on_base, prepare
from benchmarks.replication.real_gate import (
    ABLATIONS,
    E_STEPS,
    M_STEPS,
    REAL_EXPERIMENTS,
    RealExperiment,
    real_gate,
    summary,
)
from benchmarks.replication.real_measure import Solved, draw, gates, judged, solve, variety
from benchmarks.replication.records import PreparedRecipe, TraceCorpus, TraceMeasureRecipe, TraceMidRecipe, TraceTask
from benchmarks.replication.store import Store, recipe_hash
from benchmarks.replication.traces import ASSERTION, EXPERT, PREPARATION, USELESS, answer, programs, tasks
from ra3_trl.cli import smollm2
from ra3_trl.segmentation import PYTHON, Segmenter
from ra3_trl.testbed.corpus import content_hash


pytestmark = pytest.mark.usefixtures("quiet")
TASK = TraceTask("result = mix(7, 4)\n", "# x = 3, y = 7, x = 6", 6)
NUMBERS = {
    "right", "thinks", "comment_right", "told_to_think", "told_not_to", "distinct", "drawn_right", "think_there",
    "think_elsewhere",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tokenizers) -> Path:
    """A tiny random model in the place of SmolLM2, with a tokenizer of its kind and no padding token, as it has."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = copy.deepcopy(tokenizers["newline_indent"])
    tiny_model("llama", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(folder) -> PreparedRecipe:
    return PreparedRecipe(str(folder), steps=2, batch_size=2)


# ---- the programs ----


@pytest.mark.parametrize("corpus", [PREPARATION, EXPERT, TraceCorpus(traced=1.0, right=0.0)])
def test_every_program_runs_and_is_true(corpus):
    for text in programs(corpus, 3, 300)["text"]:
        exec(compile(text, "program", "exec"), {})


def _traced(prompt: str) -> tuple[str, int]:
    """The trace and the value, by Python alone: every assignment is followed by a print of what it assigned."""
    lines = []
    for line in prompt.splitlines():
        lines.append(line)
        if line.startswith("    ") and " = " in line:
            name = line.split()[0]
            lines.append(f"    print('{name} =', {name})")
    said, names = io.StringIO(), {}
    with contextlib.redirect_stdout(said):
        exec("\n".join(lines), names)
    return "# " + ", ".join(said.getvalue().splitlines()), names["result"]


def test_traces_and_values_are_what_python_computes():
    for one in tasks(4, 300):
        assert (one.trace, one.value) == _traced(one.prompt)
        assert len(one.prompt.splitlines()) == 7 and one.prompt.count(" = ") == 4  # three of them in the function
        assert answer(one) == f"assert result == {one.value}"


def test_comments_are_where_and_as_often_as_the_corpus_says():
    """2,000 programs: 1,200 traces of which 95 % are right, 300 useless comments; deviations 22, 0.006, 16."""
    counts: Counter[str] = Counter()
    for text in programs(PREPARATION, 7, 2000)["text"]:
        *lines, _ = text.splitlines()
        comments = [(i, line) for i, line in enumerate(lines) if line.lstrip().startswith("#")]
        for i, line in comments:
            if line.startswith("    "):
                assert i == 1 and line.removeprefix("    # ") in USELESS
                counts["useless"] += 1
            else:
                assert i == len(lines) - 1
                counts["traces"] += 1
                counts["right"] += line == _traced("\n".join(lines))[0]
    assert counts["traces"] == pytest.approx(1200, abs=80)
    assert counts["useless"] == pytest.approx(300, abs=60)
    assert counts["right"] / counts["traces"] == pytest.approx(0.95, abs=0.02)
    assert not any("#" in text for text in programs(EXPERT, 7, 200)["text"])


def test_data_are_frozen():
    """The same as those of the run that first found the fault (issue M)."""
    assert content_hash(programs(PREPARATION, 1, 50)) == "5e4a5545ccad7435"
    assert content_hash(programs(EXPERT, 2, 50)) == "5651a0083f348b17"
    assert content_hash(Dataset.from_list([asdict(one) for one in tasks(99, 200)])) == "74e66972932a7426"


# ---- the measures ----


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("# x = 3, y = 7, x = 6\nassert result == 6\n", Solved(True, True, True)),
        ("# x = 3, y = 7, x = 5\nassert result == 6", Solved(True, True, False)),
        ("# x = 3, y = 7, x = 6\nassert result == 61\n", Solved(False, True, True)),
        ("# do the work\nassert result == 5\nassert result == 6\n", Solved(False, True, False)),  # the first counts
        ("assert result == 6\n# x = 3, y = 7, x = 6\n", Solved(True, False, False)),
        ("assert result == -6\n", Solved(False, False, False)),
        ("print(result)\n", Solved(False, False, False)),
        ("", Solved(False, False, False)),
    ],
)
def test_what_was_written_is_judged(text, found):
    assert judged(text, TASK) == found


def test_variety_by_hand():
    """6 comments, 3 kinds: distinct 1/2; one of them three times; 2 right for their own program."""
    other = replace(TASK, trace="# n = 1")
    comments = [[TASK.trace, "# do the work", "# do the work"], ["# n = 1", TASK.trace, "# do the work"]]
    assert variety(comments, [TASK, other]) == {
        "distinct": 3 / 6,
        "drawn_right": 2 / 6,
        "most_frequent": {"text": "# do the work", "share": 3 / 6},
        "samples": [{"text": TASK.trace, "trace": TASK.trace}, {"text": "# n = 1", "trace": "# n = 1"}],
    }


class Writer:
    """In a model's place: writes the same behind every prompt, and remembers the prompts."""

    def __init__(self, tokenizer, text: str):
        self.tokenizer, self.text, self.prompts, self.options = tokenizer, text, [], []

    def generate(self, input_ids, attention_mask, **options):
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            self.prompts.append(self.tokenizer.decode(ids[mask.bool()]))
            assert mask[-1], "padding must be on the left"
        self.options.append(options)
        said = torch.tensor([self.tokenizer(self.text)["input_ids"]]).expand(len(input_ids), -1)
        return torch.cat([input_ids, said], 1)


def test_an_opening_is_the_models_own_text(tokenizers):
    tokenizer, asked = tokenizers["newline_indent"], tasks(1, 3)
    model = Writer(tokenizer, f"{asked[1].trace[1:]}\n{answer(asked[1])}\n")
    assert solve(model, tokenizer, asked, "#")[1] == Solved(True, True, True)
    assert model.prompts == [one.prompt + "#" for one in asked]
    assert not solve(model, tokenizer, asked)[1].thinks
    model = Writer(tokenizer, f" {asked[2].value}\n")
    assert [one.right for one in solve(model, tokenizer, asked, ASSERTION)] == [
        one.value == asked[2].value for one in asked
    ]
    assert all(options["do_sample"] is False for options in model.options)


def test_comments_are_drawn_whole_and_alone(tokenizers):
    tokenizer, asked = tokenizers["newline_indent"], tasks(1, 2)
    model = Writer(tokenizer, " do the work\nassert result == 1\n")
    assert draw(model, tokenizer, asked, 3) == [["# do the work"] * 3] * 2
    assert model.prompts == [f"{one.prompt}#" for one in asked for _ in range(3)]
    assert {(o["do_sample"], o["temperature"], o["top_k"]) for o in model.options} == {(True, 1.0, 0)}


def test_gates_are_probabilities_of_the_think_prefix(folder):
    """Against one forward of the code so far and the prefix: six a program, the last before its assertion."""
    model, tokenizer = real.load(str(folder))
    asked = tasks(3, 2)
    there, elsewhere = gates(model.eval(), tokenizer, asked)
    probs: dict[bool, list[float]] = {True: [], False: []}
    for one in asked:
        (document,) = Segmenter(tokenizer, PYTHON, 1000)(0, f"{one.prompt}{answer(one)}\n")
        for action in (document.actions[k] for k in document.boundaries):
            line = tokenizer.decode(document.input_ids[action.start : action.end])
            before = document.input_ids[: action.start]
            probs[line.startswith("assert")].append(_probability(model, before, action.boundary.think))
    assert (len(probs[True]), len(probs[False])) == (2, 10)
    assert there == pytest.approx(sum(probs[True]) / 2, rel=0.1)  # bfloat16
    assert elsewhere == pytest.approx(sum(probs[False]) / 10, rel=0.1)
    assert there > 2 * elsewhere or elsewhere > 2 * there  # or they could be mixed up


@torch.no_grad()
def _probability(model, before: list[int], think: tuple[int, ...]) -> float:
    """Of the tokens of `think` behind those `before`."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=torch.tensor([[*before, *think]])).logits[0, len(before) - 1 : -1]
    return float(logits.float().log_softmax(-1).gather(1, torch.tensor(think)[:, None]).sum().exp())


# ---- the recipes ----


def test_the_recipes_are_those_of_the_issue():
    arms = real_gate().arms
    assert list(arms) == ["base", "ntp", "ra3"] and arms["base"] is None
    assert (arms["ntp"].e_steps, arms["ntp"].m_steps, arms["ntp"].learning_rate) == (0, 100, 5e-5)
    assert (arms["ra3"].e_steps, arms["ra3"].m_steps, arms["ra3"].settings) == (E_STEPS, M_STEPS, ())
    assert recipe_hash(PreparedRecipe()) == "2a5e2cc3cc15"  # the base of benchmarks/LOG.md
    assert set(REAL_EXPERIMENTS["real_gate_ablations"]().arms) == {*arms, *ABLATIONS}


def test_of_the_method_nothing_is_set(tmp_path):
    """What a run's settings have that is not the package's default is the task's or the machine's."""
    ours = real.config(TraceMidRecipe(PreparedRecipe(), 0), tmp_path, max_latent_length=24)
    plain = real.RA3Config(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=True)
    names = real.own_fields(real.RA3Config)
    assert {name for name in names if getattr(ours, name) != getattr(plain, name)} == {
        "max_length", "max_latent_length",
    }  # fmt: skip
    assert ours.bf16 and ours.warmup_steps == 5 and ours.lr_scheduler_type == "cosine"


def test_other_defaults_are_another_run_but_for_next_token_prediction(monkeypatch):
    ntp = TraceMidRecipe(PreparedRecipe(), 0)
    before = [recipe_hash(on_base(replace(ntp, e_steps=e_steps), PreparedRecipe(), 1)) for e_steps in (0, 60)]
    assert dict(real.defaults())["num_latents"] == real.RA3Config(output_dir="x", report_to="none").num_latents
    monkeypatch.setattr(real, "defaults", lambda: (("num_latents", 99),))
    after = [recipe_hash(on_base(replace(ntp, e_steps=e_steps), PreparedRecipe(), 1)) for e_steps in (0, 60)]
    assert before[0] == after[0] and before[1] != after[1]
    assert recipe_hash(on_base(ntp, PreparedRecipe(), 2)) != after[0]


# ---- the runs ----


def test_the_models_conversion_says_nothing_where_the_json_goes(monkeypatch, capsys):
    def converting() -> Path:
        smollm2.console.print("Converting ...")
        return Path("there")

    monkeypatch.setattr(smollm2, "smollm2", converting)
    assert common.default_model() == "there"
    said = capsys.readouterr()
    assert not said.out and "Converting" in said.err


def test_a_base_that_was_put_there_is_taken(tmp_path, folder, base):
    store = Store(tmp_path)
    store.folder(base).mkdir(parents=True)
    (store.folder(base) / "model").symlink_to(folder)
    assert prepare(store, base)["seconds"] == 0
    assert real.checkpoint(store, base) == store.folder(base) / "model"
    assert not (store.folder(base) / "run").exists()


@pytest.mark.parametrize("e_steps", [0, 2])
def test_a_killed_run_ends_with_the_weights_of_one_left_alone(tmp_path, monkeypatch, base, e_steps):
    """Killed before update 4 of 4, of which 2 are saved: the preparation, and mid-training."""
    recipe = replace(base, steps=4)
    make = prepare
    if e_steps:
        small = (("num_latents", 2),)
        recipe = TraceMidRecipe(
            base, 0, e_steps=e_steps, m_steps=2, batch_size=2, programs=8, max_latent_length=3, settings=small
        )
        make = midtrain
    whole, halved = Store(tmp_path / "whole"), Store(tmp_path / "halved")
    found = make(whole, recipe, save_steps=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transformers.trainer.CallbackHandler.on_step_begin", killed_at(3))
        make(halved, recipe, save_steps=2)
    again = make(halved, recipe, save_steps=2)
    assert (found["resumed_at"], again["resumed_at"], again["updates"]) == (0, 2, 4)
    assert [entry["step"] for entry in again["log"]] == [entry["step"] for entry in found["log"]]
    weights = [
        AutoModelForCausalLM.from_pretrained(store.folder(recipe) / "model").state_dict() for store in (whole, halved)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    start = real.load(str(base.model))[0].state_dict()
    assert not any(torch.equal(start[name], weights[0][name]) for name in start)


def test_means_over_runs():
    """Shares of 0.2 and 0.6: 0.4; the comment that makes up more of its run stands for both."""
    rows = [
        {**dict.fromkeys(NUMBERS, share), "seconds": 10 * share, "most_frequent": {"text": text, "share": share}}
        for text, share in (("# a", 0.2), ("# b", 0.6))
    ]
    found = summary(rows)
    assert all(found[name] == pytest.approx(0.4) for name in NUMBERS) and found["seconds"] == pytest.approx(4)
    assert found["most_frequent"] == {"text": "# b", "share": 0.6} and found["runs"] is rows


def test_the_command_at_toy_size(tmp_path, monkeypatch, capsys, base):
    """Two seeds, then once more out of the cache alone."""
    small = (("num_latents", 2),)
    ntp = TraceMidRecipe(base, 0, m_steps=2, batch_size=2, programs=8, max_latent_length=3)
    arms = {"base": None, "ntp": ntp, "ra3": replace(ntp, e_steps=1, m_steps=1, settings=small)}
    experiment = RealExperiment(base, arms, TraceMeasureRecipe(base, tasks=3, drawn=2, draws=2, tokens=8))
    monkeypatch.setitem(REAL_EXPERIMENTS, "toy", lambda: experiment)
    drawn = set()

    def recorded(corpus, seed, count):
        drawn.add((corpus, seed, count))
        return programs(corpus, seed, count)

    monkeypatch.setattr(real, "programs", recorded)
    words = [
        "replication",
        "--experiment",
        "toy",
        "--json",
        "--seeds",
        "2",
        "--cache",
        str(tmp_path),
        "--threads",
        "1",
    ]
    main(words)
    found = json.loads(capsys.readouterr().out)  # nothing else is printed there
    assert drawn == {(PREPARATION, 1, 4), (EXPERT, 2, 8), (EXPERT, 3, 8)}  # two seeds after the preparation's
    assert set(found) == {"experiment", "seeds", "base", "ntp", "ra3"}
    for arm in arms:
        rows = found[arm]["runs"]
        assert set(found[arm]) == NUMBERS | {"seconds", "most_frequent", "runs"} and len(rows) == 2
        assert all(found[arm][name] == pytest.approx((rows[0][name] + rows[1][name]) / 2) for name in NUMBERS)
        assert all(len(row["samples"]) == 2 and row["most_frequent"]["share"] >= 0.25 for row in rows)
        assert [row["updates"] for row in rows] == [2, 2] and rows[0]["seconds"] > 0
    one, other = found["base"]["runs"]
    assert {name: one[name] for name in NUMBERS} == {name: other[name] for name in NUMBERS}
    told = {name for row in found["ra3"]["runs"] for entry in row["log"] for name in entry}
    assert {"estep/gain", "estep/gate_weighted_gain", "estep/think_rate", "estep/gate_held"} <= told
    assert not any(name.startswith("estep/") for row in found["ntp"]["runs"] for e in row["log"] for name in e)
    assert len({row["think_there"] for arm in arms for row in found[arm]["runs"]}) == 5  # trained, each otherwise

    def refuse(*args, **kwargs):
        raise AssertionError("done again")

    monkeypatch.setattr("transformers.Trainer.train", refuse)
    monkeypatch.setattr(real_measure, "solve", refuse)
    main(words)
    again = json.loads(capsys.readouterr().out)
    for arm in arms:
        assert {name: again[arm][name] for name in NUMBERS} == {name: found[arm][name] for name in NUMBERS}
