"""The replication's testbed, cache and table at toy sizes; what it measures at full size is in benchmarks/LOG.md."""

from __future__ import annotations

import argparse
import ast
import json
import math
import random
import re
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import killed_at

from benchmarks.replication import bases, rlvr, run
from benchmarks.replication.base import last_checkpoint, pretrain
from benchmarks.replication.bases import find_bases, seeded
from benchmarks.replication.cold_start import cold_start
from benchmarks.replication.experiments import (
    EXPERIMENTS,
    Experiment,
    last_gain,
    of_arms,
    on_base,
    run_experiment,
)
from benchmarks.replication.mid import load, midtrain
from benchmarks.replication.real_gate import real_gate
from benchmarks.replication.records import (
    BaseRecipe,
    Curve,
    FillRecipe,
    MeasureRecipe,
    Measures,
    MidRecipe,
    RlvrRecipe,
    UseRecipe,
)
from benchmarks.replication.rlvr import reinforce
from benchmarks.replication.store import Store, recipe_hash
from benchmarks.replication.table import ArmResult, Form, rows, samples, starts
from ra3_trl.analysis import Estimate, t_quantile
from ra3_trl.experimental.hindsight.prompts import fim_template
from ra3_trl.segmentation import PYTHON, Segmenter, build_token_table
from ra3_trl.testbed import Corpus, gates
from ra3_trl.testbed import corpus as testbed


pytestmark = pytest.mark.usefixtures("quiet")
ARMS = {"base", "ntp", "ntp_forced", "ra3"}
COMMENTED, EXPERT = BaseRecipe(0).corpus, Corpus()
SHARED = Corpus(stanzas=4, predicates=True)
TINY = BaseRecipe(
    0, careful_steps=1, steps=4, batch_size=2, layers=1, width=16, warmup_steps=1, corpus=replace(COMMENTED, stanzas=2)
)
MID = MidRecipe(TINY, 0, m_steps=2, batch_size=2, num_latents=2, programs=8, corpus=Corpus(stanzas=1))
TOY = Form(
    base=TINY,
    mid=MID,
    rlvr=RlvrRecipe(TINY, 0, steps=2, prompts=2, generations=2, completion_tokens=4, corpus=Corpus(stanzas=1)),
    measure=MeasureRecipe(TINY, programs=2, tasks=4, num_latents=2, corpus=Corpus(stanzas=2)),
    e_steps=2,
    gate=0.0,
)


@dataclass(frozen=True)
class Sum:
    """A recipe that costs nothing."""

    a: int
    b: float = 1.0
    version: int = 1


# ---- the testbed ----


@pytest.mark.parametrize("corpus", [COMMENTED, EXPERT, SHARED, Corpus(operations=5, hard_rate=1.0, right=0.0)])
def test_every_program_runs_and_is_true(corpus):
    for text in testbed.programs(corpus, 3, 200)["text"]:
        exec(compile(text, "program", "exec"), {})


def test_comments_are_where_and_as_often_as_the_corpus_says():
    """600 programs of 6 stanzas: 3,600 hard and 7,200 easy lines; a share of 0.4 has a standard deviation of 0.008."""
    counts = dict.fromkeys(("hard", "easy", "hard#", "easy#", "right"), 0)
    for text in testbed.programs(COMMENTED, 5, 600)["text"]:
        lines = ["", *text.splitlines()]
        for before, line in zip(lines, lines[1:], strict=False):
            if not line.startswith("#"):
                kind = "hard" if testbed.is_hard(line) else "easy"
                counts[kind] += 1
                counts[kind + "#"] += before.startswith("#")
                if kind == "hard" and before.startswith("#"):
                    counts["right"] += _steps_hold(before)
    assert (counts["hard"], counts["easy"]) == (3600, 7200)
    assert counts["hard#"] / 3600 == pytest.approx(0.4, abs=0.03)
    assert counts["easy#"] / 7200 == pytest.approx(0.1, abs=0.015)
    assert counts["right"] / counts["hard#"] == pytest.approx(0.75, abs=0.04)
    assert not any("#" in text for text in testbed.programs(EXPERT, 5, 50)["text"])


def _steps_hold(comment: str) -> bool:
    """`#7*4=8+9=7` by Python alone: 7*4 and 8+9 modulo 10."""
    claims = re.findall(r"(?=(?:^#|=)(\d[*+-]\d)=(\d))", comment)
    assert len(claims) == 3
    return all(eval(claim) % 10 == int(value) for claim, value in claims)


def test_comments_by_hand():
    """7*4 = 28, 8+9 = 17, 7-2 = 5; with 28+3 instead, 1+9 = 10, 0-2 = -2."""
    parts = list("7*4+9-2")
    assert testbed.steps(parts, testbed.values_of(parts)) == "#7*4=8+9=7-2=5"
    assert testbed.steps(parts, testbed.values_of(parts, 0, 3)) == "#7*4=1+9=0-2=8"
    assert eval("(7*4+9-2)%10") == 5


def test_predicates_tell_the_value_together_and_no_two_do():
    """5 is above 4, odd and 2 modulo 3; 10 values, 10 triples. By halves: 0 to 4 have 3 even and 2 odd values."""
    assert testbed.hard_lines("c", 5, SHARED) == ["assert c>4", "assert c%2==1", "assert c%3==2"]
    assert testbed.hard_lines("c", 4, SHARED) == ["assert c<5", "assert c%2==0", "assert c%3==1"]
    said = [testbed.hard_lines("c", value, SHARED) for value in range(10)]
    assert len(set(map(tuple, said))) == 10
    counts = [len({tuple(lines[i] for i in pair) for lines in said}) for pair in ((0, 1), (0, 2), (1, 2))]
    assert counts == [4, 6, 6]


def test_comments_stand_before_the_first_of_lines_that_share_them():
    """400 programs of 4 stanzas with a share of 0.4: 640 of 1,600, standard deviation 20."""
    corpus, first = replace(SHARED, hard_rate=0.4, easy_rate=0.1), 0
    for text in testbed.programs(corpus, 5, 400)["text"]:
        for before, line in zip(lines := text.splitlines(), lines[1:], strict=False):
            if testbed.is_hard(line) and before.startswith("#"):
                assert _steps_hold(before) and line[-2] in "<>"
                first += 1
    assert first == pytest.approx(640, abs=60)


def test_values_are_uniform():
    """2,000 values: each digit 200 times, standard deviation 13."""
    rng = random.Random(1)
    values = [testbed.expression(rng, 3)[1][-1] for _ in range(2000)]
    assert all(abs(values.count(digit) - 200) < 55 for digit in range(10))


def test_data_are_frozen():
    assert testbed.content_hash(testbed.programs(COMMENTED, 0, 50)) == "82d759a36b7a432f"
    assert testbed.content_hash(testbed.programs(EXPERT, 0, 50)) == "a3e954dfd22a31f4"
    assert testbed.content_hash(testbed.tasks(EXPERT, 0, 50)) == "ccb9ab3f041a1fe9"
    assert recipe_hash(BaseRecipe(0)) == "67f70c29970d"  # of the bases in benchmarks/LOG.md
    assert testbed.content_hash(testbed.programs(SHARED, 0, 50)) == "4a8aa5e930e94ff2"


def test_texts_for_filling_in_the_middle():
    """The comment is right, and stands where the proposal `fim` asks for it: as its view has it, token by token."""
    corpus = replace(COMMENTED, useless=0.98, filled=1.0)
    tokenizer = testbed.make_tokenizer(corpus)
    table = build_token_table(tokenizer, len(tokenizer))
    assert not {i for i in tokenizer.convert_tokens_to_ids(list(testbed.FILL)) if table.next_state_SV[0, i] >= 0}
    template, hard = fim_template(tokenizer), 0
    for text in testbed.programs(corpus, 0, 60)["text"]:
        before, rest = text.removeprefix(testbed.FILL[0]).split(f"#{testbed.FILL[1]}")
        after, comment = rest.split(testbed.FILL[2])
        line = after.splitlines()[1]
        if testbed.is_hard(line):
            hard += 1
            definition = before.splitlines()[-1]
            parts = list(definition[len("c=(") : -len(")%10")])
            assert "#" + comment.strip() == testbed.steps(parts, testbed.values_of(parts))
            assert line == f"assert {definition[0]}=={testbed.values_of(parts)[-1]}"
        else:
            assert comment.strip().isdigit() and len(comment) == 2
        (document,) = Segmenter(tokenizer, PYTHON, 1000)(0, before + after[1:])
        boundary = before.count("\n")
        ((view, places),) = template.views(document, (boundary,), testbed.KNOWN_LINES)
        action = view.actions[places[0]]
        prompt = [*view.input_ids[: action.start], *action.boundary.think]
        assert prompt == tokenizer(text)["input_ids"][: len(prompt)]
        assert tokenizer.decode(tokenizer(text)["input_ids"][len(prompt) :]) == comment
    assert 0.45 < hard / 60 < 0.9  # in each stanza one hard line and a third of two others: 0.6


def test_useless_comments_before_hard_lines():
    corpus = replace(COMMENTED, hard_rate=1.0, useless=0.9, right=1.0)
    lines = "".join(testbed.programs(corpus, 0, 100)["text"]).splitlines()
    comments = [a for a, b in zip(lines, lines[1:], strict=False) if testbed.is_hard(b)]
    digits = [c for c in comments if len(c) == 2]
    assert all(c.startswith("#") for c in comments) and 0.85 < len(digits) / len(comments) < 0.95


def test_tokenizer_has_one_token_a_word_and_loses_nothing():
    tokenizer = testbed.make_tokenizer()
    text = "c=(7*4+9-2)%10\n#7*4=8+9=7-2=5\nassert c==5\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids[1:]) == text
    # BOS; c =( 7 * 4 + 9 - 2 )%10 newline; # and 13 and newline; assert c == 5 newline
    assert len(ids) == 1 + 11 + 15 + 5
    for text in testbed.programs(COMMENTED, 1, 50)["text"]:
        assert tokenizer.pad_token_id not in tokenizer(text)["input_ids"]


def test_predicates_have_three_more_tokens_and_the_others_none():
    plain, more = testbed.make_tokenizer(COMMENTED), testbed.make_tokenizer(SHARED)
    assert plain.get_vocab() == testbed.make_tokenizer().get_vocab()
    assert more.get_vocab() == plain.get_vocab() | {"%": len(plain), ">": len(plain) + 1, "<": len(plain) + 2}
    text = "assert c>4\nassert c%2==1\n"
    assert more.tokenize(text) == ["assert ", "c", ">", "4", "\n", "assert ", "c", "%", "2", "==", "1", "\n"]
    # BOS; of a stanza 11 for c=(7*4+9-2)%10, 5 + 7 + 7 for the hard lines and 4 for d=3, each with its newline
    assert len(more(testbed.programs(SHARED, 1, 1)["text"][0])["input_ids"]) == 1 + 4 * 34


def test_tasks_ask_for_the_last_hard_line():
    for prompt, answer in zip(*(testbed.tasks(EXPERT, 2, 20)[name] for name in ("prompt", "answer")), strict=True):
        exec(prompt + answer, {})
        assert prompt.count("assert") == 5
        wrong = f"{answer[:-1]}{(int(answer[-1]) + 1) % 10}"
        with pytest.raises(AssertionError):
            exec(prompt + wrong, {})


def test_right_line():
    said = [
        "#7\nassert c==5\nd=1",
        "assert c==5\n",
        "assert c==4\n#5\nassert c==5\n",
        "assert c==5",
        "d=5\n",
        "",
    ]
    assert testbed.right_line(said, ["assert c==5"] * 6, [""] * 6) == [1, 1, 0, 0, 0, 0]
    # with the think prefix at the prompt's end the completion goes on with the comment
    assert testbed.right_line(["7\nassert c==5\n", "assert c==5\n"], ["assert c==5"] * 2, ["#"] * 2) == [1, 0]


def test_right_lines_and_comments_before_them():
    answer = "assert c>4\nassert c%2==1\nassert c%3==2"
    assert testbed.is_right(f"#7\n{answer}\nd=1", answer)
    assert testbed.is_right("assert c>4\n#7\nassert c%2==1\nassert c%3==2\n", answer)
    assert not testbed.is_right(answer, answer)  # its last line has no end
    assert not testbed.is_right("assert c>4\nassert c%2==0\nassert c%3==2\n", answer)
    said = "#1\nassert c>4\n#2\n#3\nassert c%2==1\nd=1\n#4\nd=2\n#5"
    assert [testbed.comments_before(said, count) for count in (1, 2, 3, 9)] == [
        ["#1"], ["#1", "#2", "#3"], ["#1", "#2", "#3"], ["#1", "#2", "#3", "#4"],
    ]  # fmt: skip
    example = next(testbed.examples(SHARED, 4, 1))
    exec(example.prompt + example.comment + "\n" + example.answer, {})
    assert example.answer.count("\n") == 2 and example.prompt.count("assert") == 9


def test_comment_of_an_example_is_right_and_python():
    for example in testbed.examples(EXPERT, 4, 20):
        assert _steps_hold(example.comment) and example.comment[-1] == example.answer[-1]
        ast.parse(example.prompt + example.comment + "\n" + example.answer)


def test_floor_by_hand():
    """One operation: name, other name, 2 operands, 1 of 3 operations, the easy line's digit: 6*5*10*10*3*10 =
    90,000 programs of a stanza; 7 + 5 + 4 tokens and the end of the text; with predicates 7 + 19 + 4."""
    assert testbed.floor(Corpus(stanzas=1, operations=1)) == pytest.approx(math.log(90_000) / 17)
    shared = Corpus(stanzas=1, operations=1, predicates=True)
    assert testbed.floor(shared) == pytest.approx(math.log(90_000) / 31)


# ---- the cache ----


def test_a_result_is_made_once(tmp_path):
    store, calls = Store(tmp_path), []

    def work(folder: Path):
        calls.append(folder)
        return {"sum": 3.0}

    assert store.get(Sum(1), work) == store.get(Sum(1), work) == {"sum": 3.0}
    assert len(calls) == 1
    store.get(Sum(2), work)
    store.get(Sum(1, version=2), work)  # the code changed: done anew
    assert len(set(calls)) == 3
    assert json.loads((store.folder(Sum(1)) / "recipe.json").read_text()) == {
        "kind": "Sum", "a": 1, "b": 1.0, "version": 1,
    }  # fmt: skip


def test_unfinished_work_is_gone_on_with(tmp_path):
    store = Store(tmp_path)

    def killed(folder: Path):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.get(Sum(1), killed)
    assert store.find(Sum(1)) is None
    assert store.get(Sum(1), lambda folder: {"half": (folder / "half").exists()}) == {"half": True}


def test_a_result_that_is_not_finite_is_not_kept(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="loss"):
        store.get(Sum(1), lambda folder: {"loss": math.nan})
    assert store.find(Sum(1)) is None


def test_hash_knows_every_field():
    assert recipe_hash(MID) == recipe_hash(replace(MID))
    others = [replace(MID, seed=1), replace(MID, penalty=math.inf), replace(MID, base=replace(TINY, seed=1))]
    others += [replace(MID, corpus=Corpus(stanzas=2)), replace(MID, version=9)]
    assert len({recipe_hash(recipe) for recipe in [MID, *others]}) == 6
    # A field at its default is not part of it: with `b` left out, this is the hash of a record that has no such field.
    alike = make_dataclass("Sum", [("a", int), ("version", int, 1)], frozen=True)
    assert recipe_hash(Sum(1)) == recipe_hash(alike(1)) != recipe_hash(Sum(1, 2.0))


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (5, 10, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize("start", ["base", "mid", "rlvr"])
def test_a_killed_run_ends_with_the_weights_of_one_left_alone(start, tmp_path, monkeypatch):
    """Killed before update 4 of 4, of which 2 are saved: pre-training, mid-training (2 E- and 2 M-updates), GRPO."""
    make, recipe = {
        "base": (pretrain, TINY),
        "mid": (midtrain, replace(MID, e_steps=2)),
        "rlvr": (reinforce, replace(TOY.rlvr, steps=4)),
    }[start]
    # Random weights never state a line right, and rewards that are all 0 teach nothing.
    monkeypatch.setattr(rlvr, "right_line", lambda completions, **kwargs: [float(len(c)) for c in completions])
    whole, halved = Store(tmp_path / "whole"), Store(tmp_path / "halved")
    found = make(whole, recipe, save_steps=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("transformers.trainer.CallbackHandler.on_step_begin", killed_at(3))
        make(halved, recipe, save_steps=2)
    assert halved.find(recipe) is None
    again = make(halved, recipe, save_steps=2)
    assert again["seconds"] != found["seconds"]
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    weights = [load(store.folder(recipe) / "run/checkpoint-4")[0].state_dict() for store in (whole, halved)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    if start != "base":  # and the run did change them
        base = load(whole.folder(TINY) / "model")[0].state_dict()
        assert not any(torch.equal(base[name], weights[0][name]) for name in base)


# ---- the rows ----


def test_intervals_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, t(2) = 4.303: 4.303 / sqrt(3) = 2.484 either way."""
    found = Estimate.of((1.0, 2.0, None, 3.0))
    assert (found.mean, found.n) == (2.0, 3)
    assert (found.low, found.high) == pytest.approx((2 - 2.484, 2 + 2.484), abs=1e-3)
    assert Estimate.of((0.5,)) == Estimate(0.5, None, None, 1, (0.5,))
    assert Estimate.of((None, None)) == Estimate(None, None, None, 0, (None, None))
    assert t_quantile(19) == 2.093 and t_quantile(30) == pytest.approx(2.042, abs=0.003)


def test_steps_to_a_level():
    """Averages of neighbours: 0.25, 0.6, 0.75, 0.85, 0.95."""
    curve = Curve((0.1, 0.4, 0.8, 0.7, 1.0, 0.9), samples=128)
    assert [curve.steps_to(level) for level in (0.2, 0.5, 0.8, 0.9, 0.99)] == [0, 1, 3, 4, None]
    assert curve.last == 0.9


def test_next_token_prediction_has_as_many_updates():
    found = starts(TOY, TINY, 7)
    assert (found["ra3"].e_steps, found["ra3"].m_steps, found["ntp"].e_steps, found["ntp"].m_steps) == (2, 2, 0, 4)
    assert found["ntp"] is found["ntp_forced"] and found["ra3"].seed == 7 and found["base"] is TINY
    more = starts(replace(TOY, full=True, token_updates=3, compute_updates=9), TINY, 7)
    assert set(more) == ARMS | {"ntp_tokens", "ntp_compute", "resample"}
    assert more["ntp_tokens"].m_steps == 3 and more["ntp"].annotation_think_prob is None
    assert (more["resample"].e_steps, more["resample"].m_steps, more["resample"].annotation_think_prob) == (0, 4, -1)
    # 9 updates of 2 programs want 18, of which each is seen once
    assert (more["ntp_compute"].m_steps, more["ntp_compute"].programs) == (9, 18)


def test_samples_by_hand():
    """2 programs of 3 boundaries with 2 latents each an update, 2 E- and 2 M-updates; GRPO: 2 prompts, 2 each."""
    assert samples(TOY) == {"rlvr_update": 4, "ra3_e_phase": 24, "ra3_m_phase": 24, "resample_m_phase": 48}
    document = Segmenter(testbed.make_tokenizer(), PYTHON, 384)(0, testbed.programs(EXPERT, 0, 1)["text"][0])[0]
    assert len(document.boundaries) == testbed.boundaries(EXPERT) == 18
    assert testbed.boundaries(SHARED) == 20  # 4 stanzas of 5 lines


def test_bases_that_fail_are_told_of(monkeypatch, tmp_path):
    shares = iter((0.1, 0.5, 0.2, 0.3, 0.3))

    def measured(store, recipe):
        return argparse.Namespace(comment_right=next(shares))

    monkeypatch.setattr(bases, "measure", measured)
    tried = find_bases(Store(tmp_path), TOY.base, TOY.measure, 1, (0.4, 1.0))
    assert [(base.recipe.seed, base.passed) for base in tried] == [(0, False), (1, True)]
    with pytest.raises(ValueError, match="0 of 3 bases are right in 40% to 100% of their comments; 1 are wanted"):
        find_bases(Store(tmp_path), TOY.base, TOY.measure, 1, (0.4, 1.0))


def test_a_base_that_goes_on_from_another_has_its_seed():
    base = replace(TOY.base, start=TOY.base)
    assert (seeded(base, 3).seed, seeded(base, 3).start.seed) == (3, 3)


def test_gates_are_probabilities_of_the_think_prefix(tmp_path):
    """Against each line's prompt by itself."""
    pretrain(store := Store(tmp_path), TINY)
    model, tokenizer = load(store.folder(TINY) / "model")
    text = testbed.programs(EXPERT, 1, 1)["text"][0]
    hard, easy = gates(model, tokenizer, [text])
    lines, expected = text.splitlines(keepends=True), {True: [], False: []}
    for k in range(1, len(lines)):
        ids = tokenizer("".join(lines[:k]), return_tensors="pt")["input_ids"]
        probs = model(input_ids=ids).logits[0, -1].detach().softmax(-1)
        expected[testbed.is_hard(lines[k])].append(float(probs[tokenizer.convert_tokens_to_ids("#")]))
    assert (hard, easy) == pytest.approx([sum(expected[k]) / len(expected[k]) for k in (True, False)], abs=1e-6)


def test_samples_to_a_level_count_mid_trainings_own():
    """GRPO draws 4 an update; 80 % are reached after two, so 8, and RA3 drew 24 + 24 before."""
    measures = Measures(*[0.5] * 9)
    fast, never = Curve((0.1, 0.5, 0.8, 0.8), 4), Curve((0.1, 0.1, 0.1, 0.1), 4)
    arms = {
        name: ArmResult(measures, curve, [], 0.0) for name, curve in (("base", fast), ("ra3", fast), ("ntp", never))
    }
    found = rows([arms], TOY)
    assert {arm: row["mean"] for arm, row in found["rlvr_steps_to_80"].items()} == {"base": 2, "ra3": 2, "ntp": None}
    assert {arm: row["mean"] for arm, row in found["rlvr_samples_to_80"].items()} == {
        "base": 8,
        "ra3": 56,
        "ntp": None,
    }


def test_the_command_at_toy_size(tmp_path, monkeypatch):
    """One seed of all arms, then once more out of the cache alone."""
    args = argparse.Namespace(seeds=1, bases=None, cache=str(tmp_path), threads=1, full=False, experiment=None)
    found = run(args, TOY)
    keys = {"think_hard", "think_easy", "comment_right", "ce", "elbo", "bound_multi", "accuracy", "rlvr_last"}
    keys |= {"rlvr_steps_to_50", "rlvr_steps_to_80", "rlvr_steps_to_90"}
    assert keys <= set(found)
    for key in keys:
        assert set(found[key]) == ARMS
        assert all({"mean", "low", "high", "n"} <= set(row) for row in found[key].values())
    assert found["ce"]["ntp"] == found["ce"]["ntp_forced"] != found["ce"]["ra3"]
    assert found["think_hard"]["ntp_forced"]["mean"] == 1
    assert found["rlvr_steps_to_80"]["base"]["mean"] is None and found["rlvr_steps_to_80"]["base"]["n"] == 0
    assert found["bases"] == [{"seed": 0, "passed": True, "comment_right": found["comment_right"]["base"]["mean"]}]
    json.dumps(found)

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("transformers.Trainer.train", refuse)
    again = run(args, TOY)
    for key in keys:
        assert again[key] == found[key]


# ---- the experiments ----


def test_the_experiments_are_what_they_say():
    found = EXPERIMENTS["shared"]()
    assert {arm for arm, recipe in found.arms.items() if recipe and recipe.e_steps} == {
        f"h{horizon}_c{penalty}" for horizon in (1, 2, 3) for penalty in (0.2, 1.0)
    }
    assert dict(found.arms["h3_c1.0"].settings)["discount"] == 1.0
    sweep = [recipe.penalty for arm, recipe in EXPERIMENTS["penalty"]().arms.items() if arm.startswith("c=")]
    assert len(set(sweep)) >= 6 and sweep == sorted(sweep) and (sweep[0], sweep[-1]) == (0, math.inf)
    variants = EXPERIMENTS["variants"]().arms
    ra3 = asdict(variants["ra3"])
    for arm, recipe in variants.items():  # one thing at a time
        differs = {name for name, value in asdict(recipe or variants["ra3"]).items() if value != ra3[name]}
        also = {"mean": {"penalty"}, "rule": {"annotation_think_prob"}}.get(arm, set())  # per token; of no use there
        assert len(differs - {"e_steps", "m_steps"} - also) <= 1, arm
    for make in EXPERIMENTS.values():
        experiment = make()
        trained = [recipe for recipe in experiment.arms.values() if recipe]
        assert experiment.arms["base"] is None
        updates = [(r.e_steps + r.m_steps) * dict(r.settings).get("em_iterations", 1) for r in trained]
        assert len(set(updates)) == 1  # equal updates
        assert {recipe.corpus.predicates for recipe in trained} == {experiment.measure.corpus.predicates}
        rows = zip(trained, updates, strict=True)
        assert all(recipe.programs >= recipe.m_steps / (recipe.e_steps + recipe.m_steps) * n for recipe, n in rows)
    arms = EXPERIMENTS["hindsight"]().arms
    known = {arm: dict(recipe.settings) if recipe else {} for arm, recipe in arms.items()}
    assert {arm for arm, settings in known.items() if "proposal" in settings} == {"fim", "fim_kl", "fim_kl0"}
    assert arms["fim_kl_ra3"].base == arms["fim_kl"] and arms["resample_ra3"].base == arms["resample"]
    chained = on_base(arms["fim_kl_ra3"], BaseRecipe(7), 3)
    assert (chained.seed, chained.base.seed, chained.base.base) == (3, 3, BaseRecipe(7))


def test_some_arms_of_an_experiment():
    """`--arms`, of each of the three kinds of experiment, in the order that is asked for."""
    for make, some in ((EXPERIMENTS["shared"], "h1_c0.2"), (real_gate, "ntp"), (cold_start, "cold")):
        whole = make()
        assert of_arms(whole, None) is whole
        assert of_arms(whole, [some, "base"]) == replace(whole, arms={some: whole.arms[some], "base": None})
        with pytest.raises(ValueError, match=f"`--arms` is 'x'; choose of base, .*{some}"):
            of_arms(whole, ["base", "x"])
    args = argparse.Namespace(cache="x", threads=1, full=False, experiment=None, arms=["base"])
    with pytest.raises(ValueError, match="`--arms` is of `--experiment` and `--domain traces`; name one"):
        run(args)
    for other in ({"experiment": "cold_start"}, {"experiment": None, "domain": "traces"}):
        args = argparse.Namespace(cache="x", threads=1, full=False, arms=None, annotator="x", **other)
        with pytest.raises(ValueError, match="`--annotator` is of `--experiment cold_start_annotators`; leave it out"):
            run(args)


def test_an_experiment_at_toy_size(tmp_path, monkeypatch):
    """Two seeds on one base, then once more out of the cache alone."""
    expert = Corpus(stanzas=1, predicates=True)
    base = replace(TINY, corpus=replace(expert, hard_rate=0.4))
    ra3 = replace(MID, e_steps=1, m_steps=1, horizon=3, corpus=expert)
    experiment = Experiment(
        base,
        {"base": None, "ra3": ra3},
        MeasureRecipe(base, programs=2, tasks=4, num_latents=2, corpus=expert),
        UseRecipe(base, programs=2, tasks=4, corpus=expert),
        gate=(0.0, 1.0),
    )
    monkeypatch.setitem(EXPERIMENTS, "toy", lambda: experiment)
    args = argparse.Namespace(seeds=2, bases=None, cache=str(tmp_path), threads=1, full=False, experiment="toy")
    found = run(args)
    json.dumps(found)
    for name in ("think_hard", "elbo", "bound_multi", "accuracy", "think_third", "ce_policy", "program_latents"):
        assert set(found[name]) == {"base", "ra3"} and found[name]["ra3"]["n"] == 2
        assert len(set(found[name]["base"]["values"])) == 1  # the same base for both seeds
    parts = [found[f"think_{which}"]["base"]["mean"] for which in ("first", "second", "third")]
    assert sum(parts) / 3 == pytest.approx(found["think_hard"]["base"]["mean"])
    assert 0 <= found["program_latents"]["ra3"]["mean"] <= testbed.boundaries(expert)
    assert found["bases"] == [{"seed": 0, "passed": True, "comment_right": found["comment_right"]["base"]["mean"]}]
    assert [set(run) for run in found["runs"]] == [{"ra3"}] * 2
    assert found["gain"]["base"]["n"] == 0
    assert found["gain"]["ra3"]["values"] == tuple(last_gain(run["ra3"]) for run in found["runs"])

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("transformers.Trainer.train", refuse)
    assert run(args) == found
    monkeypatch.setattr(bases, "TRIES", 1)  # or further ones would be trained
    with pytest.raises(ValueError, match="0 of 1 bases are right in 50% to 60%"):
        run_experiment(Store(tmp_path), replace(experiment, gate=(0.5, 0.6)), 1)


def test_a_base_must_fill_in_right_comments_where_that_is_what_is_tried(tmp_path, monkeypatch):
    """256 comments, every fourth right on the first base, every second on the other: GATE is 0.4."""
    base = replace(TINY, corpus=replace(TINY.corpus, filled=0.5))
    fill = FillRecipe(base)
    right = [comment for _, comment in testbed.fillings(fill.corpus, fill.seed, fill.tasks)]
    every = iter((4, 2))

    def complete(model, tokenizer, prompts, think, seed):
        assert think is None and all(prompt.endswith(testbed.FILL[2]) for prompt in prompts)
        step = next(every)
        return [f"{comment}\nassert" if i % step == 0 else f"{comment}0\n" for i, comment in enumerate(right)]

    measures = Measures(**dict.fromkeys((field.name for field in fields(Measures)), 0.125))
    monkeypatch.setattr("benchmarks.replication.measure.complete", complete)
    monkeypatch.setattr(bases, "measure", lambda store, recipe: measures)
    store = Store(tmp_path)
    found = find_bases(store, base, MeasureRecipe(base), 1, (0.0, 1.0), fill)
    assert [(one.passed, one.fills.filled_right) for one in found] == [(False, 0.25), (True, 0.5)]
    assert found[0].told() == {"seed": 0, "passed": False, "comment_right": 0.125, **asdict(found[0].fills)}
    # What the policy makes of the right comments, token by token.
    model, tokenizer = load(store.folder(base) / "model")
    totals = [0.0, 0.0]
    for case in testbed.examples(fill.corpus, fill.seed + 1, fill.tasks):
        ids = {text: tokenizer(text)["input_ids"] for text in (case.prompt, f"{case.prompt}{case.comment}\n")}
        after = tokenizer(f"{case.answer}\n")["input_ids"][1:]  # without BOS
        said = ids[f"{case.prompt}{case.comment}\n"][len(ids[case.prompt]) + 1 :]
        for index, weight, context, text in (
            (0, 1, [*ids[case.prompt], tokenizer.convert_tokens_to_ids("#")], said),
            (1, 1, ids[f"{case.prompt}{case.comment}\n"], after),
            (1, -1, ids[case.prompt], after),
        ):
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([[*context, *text]])).logits[0].log_softmax(-1)
            totals[index] += weight * sum(float(logps[len(context) - 1 + k, token]) for k, token in enumerate(text))
    assert totals[0] / fill.tasks == pytest.approx(found[0].fills.right_logp, abs=1e-3)
    assert totals[1] / fill.tasks == pytest.approx(found[0].fills.right_gain, abs=1e-3)


def test_the_last_gain_is_of_five_updates():
    """Gains 1 to 7: the mean of 3 to 7 is 5."""
    log = [{"estep/gate_weighted_gain": float(i)} for i in range(1, 8)] + [{"mstep/code_loss": 1.0}]
    assert last_gain({"log": log}) == 5.0 and last_gain({"log": log[7:]}) is None and last_gain(None) is None
