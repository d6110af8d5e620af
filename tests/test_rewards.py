"""Reward plug-ins: what they are given, that they add to or replace the likelihood, that each is logged."""

from __future__ import annotations

import asyncio

import pytest
import torch
from conftest import furthest, weights
from datasets import Dataset, IterableDataset
from pyarrow import parquet

from ra3_trl import RA3MidTrainer


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return x\n" for i in range(6)]


def shortness(completion_ids, **kwargs):
    return [-float(len(ids)) for ids in completion_ids]


@pytest.fixture
def make(make_trainer):
    """`make(reward_funcs, e_steps=2, ...)`: a trainer on TEXTS, its E-phase alone."""

    def make(reward_funcs=None, texts=TEXTS, **settings) -> RA3MidTrainer:
        every = {"m_steps": 0, "boundary_selection": "random"}
        return make_trainer(texts, reward_funcs=reward_funcs, **every | settings)

    return make


def test_what_a_function_is_given(make, tokenizers):
    calls = []

    def spy(**given):
        calls.append(given)
        return [0.0] * len(given["completions"])

    trainer = make(spy, e_steps=1, horizon=2)
    trainer.train()
    assert len(calls) == 2  # one for each document of the update
    given = calls[0]
    assert given.pop("trainer_state") is trainer.state
    assert callable(given.pop("log_metric")) and callable(given.pop("log_extra"))
    assert set(given) == {"prompts", "completions", "completion_ids", "expert_lines", "log_likelihood",
                          "log_likelihood_no_think", "text"}  # fmt: skip
    assert set(given.pop("text")) <= set(TEXTS)
    # Five lines after the first (the tokenizer adds no BOS): 4 boundaries, 3 latents each.
    assert {len(column) for column in given.values()} == {4 * 3}
    text = next(t for t in TEXTS if t.startswith(given["prompts"][0].split("\n")[0]))
    for prompt, completion, ids, lines in zip(
        given["prompts"], given["completions"], given["completion_ids"], given["expert_lines"], strict=True
    ):
        before = prompt.rstrip(" #")
        assert prompt.endswith("#") and text.startswith(before.rstrip())
        assert lines.strip() and lines.strip("\n") in text and lines.count("\n") <= 2
        assert tokenizers["newline_indent"].decode(ids) == completion
    assert len(set(given["log_likelihood_no_think"][:3])) == 1  # of one boundary
    assert all(value < 0 for value in given["log_likelihood"])


def test_terms_are_logged_each_on_its_own(make):
    trainer = make([shortness, lambda completions, **kwargs: [None] * len(completions)], reward_weights=[2.0, 1.0],
                   e_steps=1)  # fmt: skip
    trainer.train()
    log = next(e for e in trainer.state.log_history if "estep/reward" in e)
    assert log["estep/rewards/shortness/mean"] == pytest.approx(-log["estep/latent_length"])
    assert log["estep/rewards/<lambda>/mean"] == 0 == log["estep/rewards/<lambda>/std"]
    # The reward is the weighted sum: likelihood + 2 * shortness.
    wanted = log["estep/rewards/log_likelihood/mean"] + 2 * log["estep/rewards/shortness/mean"]
    assert log["estep/reward"] == pytest.approx(wanted, abs=1e-4)


def test_a_term_that_replaces_the_likelihood_is_what_is_learned(make):
    """With the likelihood's weight at 0 and a reward for short latents, latents get shorter."""
    trainer = make(shortness, likelihood_weight=0.0, e_steps=20, e_learning_rate=6e-3, kl_coef=0.0, num_latents=6,
                   gate_hold="always", code_loss_tolerance=100.0, objective="elbo", exploration=0.5)  # fmt: skip
    trainer.train()
    lengths = [e["estep/latent_length"] for e in trainer.state.log_history if "estep/latent_length" in e]
    assert sum(lengths[-5:]) / 5 < sum(lengths[:5]) / 5 - 0.7  # of at most 4 tokens, 3.8 at the start


def test_a_constant_term_changes_no_gradient(make):
    """Of the ELBO: leave-one-out advantages do not see a constant, and a held gate does not either."""
    runs = []
    for func in (None, lambda completions, **kwargs: [5.0] * len(completions)):
        trainer = make(func, gate_hold="always", optim="sgd", e_learning_rate=0.05, objective="elbo")
        trainer.train()
        runs.append(weights(trainer.model))
    assert furthest(*runs) < 1e-5


def test_functions_get_what_trl_gives_them(make, tmp_path):
    """The data's columns, both loggers and the state; coroutines run side by side, and what comes back is the same."""
    seen, at_once = {}, []

    def plain(completions, difficulty, text, log_metric, log_extra, trainer_state, **kwargs):
        assert len(difficulty) == len(text) == len(completions) and set(difficulty) <= {1.5, 2.5}
        assert {"prompt", "completion", "doc_id"}.isdisjoint(kwargs)
        seen[trainer_state.global_step] = list(zip(text, kwargs["prompts"], strict=True))
        log_metric("mine/difficulty", difficulty[0])
        log_extra("difficulty", difficulty)
        return difficulty

    async def waits(difficulty, **kwargs):
        at_once.append("begins")
        await asyncio.sleep(0.01)
        at_once.append("ends")
        return difficulty

    class Waits:
        async def __call__(self, **kwargs):
            return await waits(**kwargs)

    rows = Dataset.from_dict({"text": TEXTS[:2], "difficulty": [1.5, 2.5]})
    trainer = make([plain, waits, Waits()], texts=rows, e_steps=1, log_latents_steps=1)
    trainer.train()
    assert at_once == ["begins", "begins", "ends", "ends"] * 2  # of each document
    assert all(text.startswith(prompt.rsplit("#", 1)[0].rstrip()) for text, prompt in seen[0])
    log = next(e for e in trainer.state.log_history if "estep/reward" in e)
    assert log["mine/difficulty"] == 2.0  # a mean of calls, one a document
    for name in ("plain", "waits", "Waits"):
        assert 1.5 < log[f"estep/rewards/{name}/mean"] < 2.5
    table = parquet.read_table(tmp_path / "run" / "_latents" / "step_000000.parquet").to_pylist()
    assert {(row["doc_id"], row["difficulty"]) for row in table} == {(0, 1.5), (1, 2.5)}


ROWS = [{"text": text, "status": i, "of": {"tests": [i]}} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize(
    "stream",
    [Dataset.from_list(ROWS).to_iterable_dataset, lambda: IterableDataset.from_generator(lambda: iter(ROWS))],
    ids=["columns with types", "columns without"],
)
def test_columns_of_a_stream(make, stream):
    """As a data set's, one of a name that chunks use too; `chunk` says that both chunks of a text have its row."""
    seen = []

    def spy(completions, text, status, of, **given):
        assert len(text) == len(status) == len(of) == len(completions) and not {"row", "chunk"} & set(given)
        seen.append((TEXTS.index(text[0]), status[0], of[0]))
        return [float(n) for n in status]

    make(spy, texts=stream(), e_steps=3, max_length=32).train()  # of the first documents' chunks, two an update
    assert len(seen) == 6 > len({text for text, *_ in seen}) > 1
    assert all((text, {"tests": [text]}) == (status, of) for text, status, of in seen)


@pytest.mark.parametrize(
    ("funcs", "settings", "says"),
    [
        ([shortness, shortness], {}, "a name of its own"),
        (shortness, {"reward_weights": [1.0, 2.0]}, "`reward_weights` has 2 numbers for 1"),
        ("short", {}, "'short', which is no function"),
        (lambda completions: [], {}, r"takes no `\*\*kwargs`"),
        (None, {"likelihood_weight": -1.0}, "`likelihood_weight` is -1.0"),
    ],
)
def test_bad_plug_ins_are_refused_at_once(make, funcs, settings, says):
    with pytest.raises(ValueError, match=says):
        make(funcs, **settings)


@pytest.mark.parametrize("found", [[1.0], [float("nan")] * 12, None, ["good"] * 12])
def test_bad_answers_are_named(make, found):
    def broken(**kwargs):
        return found

    with pytest.raises(ValueError, match=r"`reward_funcs`: broken returned"):
        make(broken).train()


def test_a_column_that_is_not_there_is_named(make):
    with pytest.raises(ValueError, match=r"wants_tests can't be called .*'tests'.*may ask for .*'prompts', 'text'"):

        def wants_tests(tests, **kwargs):
            return [0.0]

        make(wants_tests).train()


def test_mean_of_terms_is_over_latents(make):
    """Slow path: the logged mean is that of all numbers the function returned."""
    returned = []

    def letters(completions, **kwargs):
        values = [float(sum(c.isalpha() for c in text)) for text in completions]
        returned.extend(values)
        return values

    trainer = make(letters, e_steps=1)
    trainer.train()
    log = next(e for e in trainer.state.log_history if "estep/rewards/letters/mean" in e)
    assert log["estep/rewards/letters/mean"] == pytest.approx(float(torch.tensor(returned).mean()), abs=1e-5)
