"""`ra3 diagnose`: each measure by hand, the model's part against plain forwards, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import furthest, weights

from ra3_trl import Policy
from ra3_trl.analysis import (
    Alternatives,
    durations,
    effective_horizon,
    effective_numbers,
    entropy,
    iteration_bound,
    measure_pruning,
)
from ra3_trl.cli.diagnose import _holds_code
from ra3_trl.cli.main import main
from ra3_trl.evaluation.diagnose import DiagnosisSettings, _alternatives, _Lines, diagnose
from ra3_trl.evaluation.thoughts import advice, compare_thoughts, kept_boundaries
from ra3_trl.losses import compute_returns, log1mexp
from ra3_trl.rollout import NoiseKey
from ra3_trl.segmentation import row_to_document


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i}:\n        return y\n    return x\n" for i in range(4)]


# ---- numbers by hand ----


def test_durations():
    """Seven lines, latents before lines 1 and 4: lines 1 to 3, and 4 to 6 where the text ends."""
    assert durations(7, [1, 4]) == [3, 3] and durations(7, []) == [] and durations(2, [0, 1]) == [1, 1]


def test_effective_horizon():
    """Of 7 lines one stands alone and two latents last 3: (0.5 + 2 * 0.125) / 3 = 0.25. A second text without latents
    has 3 decisions of 0.5: (0.75 + 1.5) / 6 = 0.375. R_max is 1 for a line and 0.75 / 0.5 = 1.5 at 0.25:
    log(1.5 / (0.1 * 0.75)) / 0.75 = 3.994 iterations, at 0.5 they are log(1 / 0.05) / 0.5 = 5.991."""
    found = effective_horizon([(7, [1, 4])], 0.5)
    assert (found.gbar, found.lines_per_latent, found.latents, found.cut) == (0.25, 3.0, 2, 0.5)
    assert [found.iterations, found.iterations_by_line] == pytest.approx([3.994, 5.991], abs=1e-3)
    assert effective_horizon([(7, [1, 4]), (3, [])], 0.5).gbar == 0.375
    without = effective_horizon([(3, [])], 0.5)
    assert (without.gbar, without.lines_per_latent, without.latents, without.cut) == (0.5, None, 0, 0.0)
    assert iteration_bound(0.0, eps=2.0) == 0.0  # within reach at once


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: iteration_bound(1.0), "`gbar` is 1.0"),
        (lambda: effective_horizon([(3, [])], 1.0), "`gamma` is 1.0"),
        (lambda: effective_horizon([(0, [])], 0.5), "no line"),
        (lambda: measure_pruning([], 1.0), "`factor` is 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_entropy():
    """Three quarters and a quarter: 0.5623 nats, and 1 / 8 for two kinds in four draws."""
    assert entropy("aaab") == pytest.approx(0.5623 + 0.125, abs=1e-4)
    assert entropy("aaaa") == 0


def test_effective_numbers_are_at_equal_numbers_of_draws():
    """A fair coin thrown 1,000 times has as many sides as one thrown 10 times; 10 draws tell 4 kinds from 2."""
    found = effective_numbers({"few": "ab" * 5, "coin": "ab" * 500, "four": "abcd" * 250, "none": ""})
    assert set(found) == {"few", "coin", "four"} and {one["draws"] for one in found.values()} == {10}
    assert found["few"]["effective"] == pytest.approx(2 * math.exp(0.05))  # log 2 and 1 / 20
    assert found["coin"]["effective"] == pytest.approx(2, abs=0.1)
    assert found["four"]["effective"] == pytest.approx(4, rel=0.15)
    assert found["few"]["distinct"] == 0.2 and effective_numbers({"a": ""}) == {}


def test_the_mass_that_is_removed_is_that_of_all_lines():
    """Lines of probability 0.5, 0.3, 0.15, 0.05. A latent divides the first by 20 and the third by 5: by a factor of
    10, 0.5 is removed. Another divides the last by 50: 0.05. 4,000 draws have a deviation of 0.008."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    under, other = torch.tensor([[0.025, 0.3, 0.03, 0.6], [0.5, 0.3, 0.15, 0.001]]).log()
    drawn = torch.distributions.Categorical(logits=probs).sample((4000,))
    one = Alternatives(probs[drawn], under[drawn][None], other[drawn][None], float(probs[1]), under[[1]])
    found = measure_pruning([one])
    assert found.removed == pytest.approx(0.5, abs=0.03)
    assert found.removed_by_others == pytest.approx(0.05, abs=0.015)
    assert (found.expert_kept, found.expert_helped, found.boundaries, found.lines) == (1.0, 0.0, 1, 4000)
    few = drawn[:3]
    lost = Alternatives(probs[few], under[few][None], other[few][None], float(probs[0]), under[[0]])
    found = measure_pruning([one, lost])  # a boundary counts once, however many lines were drawn there
    assert (found.expert_kept, found.lines, found.latents) == (0.5, 4003, 2)
    assert measure_pruning([]) is None


# ---- the model's part ----


@pytest.fixture
def trainer(make_trainer):
    return make_trainer(TEXTS, e_steps=1, m_steps=0, num_latents=2, discount=0.5)


def documents_of(trainer):
    return [row_to_document(row) for row in trainer.train_dataset]


def test_lines_in_the_experts_place_are_those_of_plain_forwards(trainer, slow_path):
    """Also the expert's own, drawn by chance, has the numbers of the expert's."""
    document = documents_of(trainer)[0]
    group = trainer.policy.engine.rollout(document, document.boundaries, 2, 1, NoiseKey(0, 2, 0))
    boundary = document.boundaries[2]
    own = document.actions[boundary]
    expert = tuple(document.input_ids[own.start : own.end])
    other = tuple(trainer.processing_class("        z = 1\n")["input_ids"])
    elsewhere = group.latents[0]
    found = _alternatives(trainer.policy, group, boundary, elsewhere, lambda *_: [expert, other])
    slow = slow_path(trainer.model, trainer.processing_class)
    assert float(found.act_K[0]) == pytest.approx(found.expert, abs=1e-4)
    torch.testing.assert_close(found.latent_GK[:, 0], found.expert_G, atol=1e-4, rtol=0)
    prefix = document.input_ids[: own.start]
    with torch.no_grad():
        rows = trainer.model(input_ids=torch.tensor([[*prefix, *other]])).logits[0].log_softmax(-1)
        plain = sum(float(rows[len(prefix) + j - 1, token]) for j, token in enumerate(other))
        gate = slow.gate(document, boundary)
        assert float(found.act_K[1]) == pytest.approx(plain - float(log1mexp(gate)), abs=1e-3)
        t = group.boundaries.index(boundary)
        for g, latent in enumerate(group.latents[t]):
            line, again = slow.branch(document, boundary, latent, 1)[0]
            assert float(found.expert_G[g]) == pytest.approx(float(line - log1mexp(again)), abs=1e-3)
        for g, latent in enumerate(elsewhere):
            line, again = slow.branch(document, boundary, latent, 1)[0]
            assert float(found.other_GK[g, 0]) == pytest.approx(float(line - log1mexp(again)), abs=1e-3)


def test_drawn_lines_end_with_their_newline_and_are_no_latents(trainer):
    """`()` for a latent, `None` for what does not end; blank lines before a line belong to it."""
    tokenizer = trainer.processing_class
    drawn = _Lines(trainer.policy, DiagnosisSettings(lines=1, line_tokens=8))
    think = tuple(tokenizer("<|end|>!")["input_ids"])

    def line(text):
        found = drawn._line(tokenizer(text)["input_ids"], think)
        return found and tokenizer.decode(found)

    assert line("    y = 1\n    z = 2\n").rstrip(" ") == "    y = 1\n"
    assert line("\n\n    y = 1\nz").rstrip(" ") == "\n\n    y = 1\n"
    assert line("    # so\n    y = 1\n") == () == line("<|end|>! y\n")
    assert line("    y = 1") is None and line("\n\n") is None


def test_a_drawn_id_that_the_tokenizer_has_not_is_no_text(tiny_model, tokenizers):
    """The model has eight more; the line goes on to its newline."""
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("llama", tokenizer, vocab_size=len(tokenizer) + 8)
    drawn = _Lines(Policy.open(model, tokenizer=tokenizer, use_cpu=True), DiagnosisSettings(lines=1, line_tokens=8))
    ids = (*tokenizer("y")["input_ids"], len(tokenizer) + 7, *tokenizer("\nx")["input_ids"])
    assert drawn._line(ids, (0,)) == ids[:-1]


def test_the_same_seed_gives_the_same_numbers_and_nothing_is_changed(trainer):
    before, state = weights(trainer.model), torch.random.get_rng_state()
    documents, done = documents_of(trainer), []
    settings = DiagnosisSettings(boundaries=3, lines=4, line_tokens=16)
    first = diagnose(trainer.policy, documents, settings, done.append)
    assert torch.equal(state, torch.random.get_rng_state()) and furthest(before, weights(trainer.model)) == 0
    assert sum(done) == 4 + 3
    torch.manual_seed(5)
    assert diagnose(trainer.policy, documents, settings) == first
    assert first["pruning"]["boundaries"] <= 3 and first["economics"]["latents"] == 2 * sum(
        len(document.boundaries) for document in documents
    )
    drawn = first["compactness"]["latents"]["draws"]
    assert drawn == first["compactness"]["lines"]["draws"] == first["compactness"]["tokens"]["draws"]


def test_economics_where_the_gate_is_certain(trainer, monkeypatch):
    """Where P(think) is 1 everywhere, what it thinks is what may be thought."""
    found = diagnose(trainer.policy, documents_of(trainer), DiagnosisSettings(boundaries=1, lines=1))["economics"]
    assert 0 < found["think_rate"] < 1
    monkeypatch.setattr(
        "ra3_trl.records.RolloutGroup.decision_logps_A", property(lambda group: torch.zeros_like(group.gate_logps_A))
    )
    found = diagnose(trainer.policy, documents_of(trainer), DiagnosisSettings(boundaries=1, lines=1))["economics"]
    assert found["think_rate"] == 1 and found["gain_where_it_thinks"] == pytest.approx(found["gain"])
    assert found["gain_per_token_where_it_thinks"] == pytest.approx(found["gain_per_token"])


def test_what_latents_say_of_their_document(trainer):
    """One latent a document, where the model thinks most; of a single document there is no other."""
    documents, settings = documents_of(trainer), DiagnosisSettings(boundaries=1, lines=1)
    found = diagnose(trainer.policy, documents, settings)["economics"]
    assert found["gain_over_other"] != 0
    assert round(found["distinct_rate"] * len(documents)) >= 1
    assert 1 / len(documents) <= found["most_frequent_rate"] <= 1 and isinstance(found["most_frequent"], str)
    alone = diagnose(trainer.policy, documents[:1], settings)["economics"]
    assert alone["gain_over_other"] is None and alone["distinct_rate"] == alone["most_frequent_rate"] == 1


# ---- thoughts ----


def test_where_thoughts_were_kept(make_trainer):
    """Means of P(think) and gain, there and elsewhere, by the group itself; a latent's line counts those before it."""
    trainer = make_trainer(TEXTS, num_latents=2, horizon=1)
    policy, documents = trainer.policy, documents_of(trainer)[:1]
    text = TEXTS[0].split("\n")
    annotated = [*text[:2], "    # a", text[2], "    # b", *text[3:]]
    row = {"text": TEXTS[0], "latents": [{"line": annotated.index("    # b") + 1}, {"line": 3}]}
    kept = kept_boundaries(policy, {0: row}, documents)
    assert kept == {(0, 0): {2, 3}}  # before the lines 3 and 4
    with policy.inference():
        group = policy.rollout(documents[0])
    found = compare_thoughts(policy, [group], kept)
    gains = compute_returns(group, 1, policy.args.discount).gain_TG.mean(1)
    there = [t for t, boundary in enumerate(group.boundaries) if boundary in (2, 3)]
    others = [t for t in range(len(gains)) if t not in there]
    think = group.decision_logps_A[list(group.boundaries)].exp()
    assert (found["kept"], found["others"]) == (2, len(group.boundaries) - 2)
    assert found["think_there"] == pytest.approx(float(think[there].mean()))
    assert found["gain_there"] == pytest.approx(float(gains[there].mean()), abs=1e-6)
    assert found["think_elsewhere"] == pytest.approx(float(think[others].mean()))
    assert found["gain_elsewhere"] == pytest.approx(float(gains[others].mean()), abs=1e-6)


@pytest.mark.parametrize(
    ("gain", "thoughts", "says"),
    [
        (-0.5, None, ["(-0.50 nats)"]),
        (0.5, None, []),
        (0.5, {"think_there": 0.6, "think_elsewhere": 0.5, "gain_elsewhere": -1.0}, ["P(think) is 0.50 where no"]),
        (0.5, {"think_there": 0.6, "think_elsewhere": 0.5, "gain_elsewhere": 1.0}, []),  # it helps there
        (0.5, {"think_there": 0.6, "think_elsewhere": 0.2, "gain_elsewhere": -1.0}, []),
        (0.5, {"think_there": 0.05, "think_elsewhere": 0.05, "gain_elsewhere": -1.0}, []),  # it hardly thinks
        (0.5, {"think_there": None, "think_elsewhere": 0.5, "gain_elsewhere": -1.0}, []),
        (-1.0, {"think_there": 0.6, "think_elsewhere": 0.5, "gain_elsewhere": 0.1}, ["cold start", "everywhere"]),
    ],
)
def test_advice(gain, thoughts, says):
    found = advice({"economics": {"gain_where_it_thinks": gain}, "thoughts": thoughts}, penalty=0.2)
    assert len(found) == len(says) and all(word in sentence for word, sentence in zip(says, found, strict=True))


# ---- the command ----


@pytest.fixture
def places(tmp_path, tiny_model, tokenizers, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model("llama", tokenizers["newline_indent"]).save_pretrained("model")
    tokenizers["newline_indent"].save_pretrained("model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return ["model", "texts.jsonl", "--boundaries", "2", "--lines", "3", "--line_tokens", "12"]


def test_the_command(places, tmp_path, capsys):
    assert main(["diagnose", *places, "--documents", "2", "--num_latents", "2", "--output", "out.json"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "nats more than another document's bring",
        "the most frequent of these",
        "E[gamma^tau] over decisions",
        "Pruning",
        "Economics",
        "effective number",
        "Wrote out.json.",
    ):
        assert words in printed
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["version"] == 1 and found["checkpoint"] == "model" and found["chunks"] == 2
    assert {"horizon", "compactness", "pruning", "economics", "settings"} <= set(found)
    assert found["thoughts"] is None and "Thoughts" not in printed
    assert all(sentence[:40] in printed for sentence in found["advice"])
    assert f"{found['horizon']['gbar']:.4f}" in printed and f"{found['economics']['gain']:+.3f}" in printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lines", "0"], "`lines` is 0"),
        (["--documents", "-1"], "`max_documents` is -1"),
        (["--factor", "1"], "`factor` is 1.0"),
        (["--gamma", "1"], "`gamma` is 1.0"),
        (["--output", "no/such/file"], "`output` is 'no/such/file'"),
        (["--action_format", "prose"], "no boundary"),
    ],
)
def test_bad_input_is_refused(places, capsys, words, says, tmp_path):
    if "prose" in words:
        (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "x"}) + "\n")
    assert main(["diagnose", *places, *words]) == 2
    assert says in capsys.readouterr().err


def test_folders_of_code(tmp_path):
    (tmp_path / "m.py").write_text("x = 1\n")
    assert _holds_code(tmp_path) and not _holds_code(tmp_path / "m.py") and not _holds_code(tmp_path / "none")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.parquet").touch()
    assert not _holds_code(tmp_path)


def test_an_annotated_corpus(places, tmp_path, capsys):
    """The table of thoughts, from the columns of `ra3 annotate`."""
    rows = [{"text": text, "latents": [{"line": 3, "text": " a", "gain": 0.5}]} for text in TEXTS]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["diagnose", *places, "--documents", "2", "--num_latents", "2", "--output", "out.json"]) == 0
    thoughts = json.loads((tmp_path / "out.json").read_text())["thoughts"]
    assert thoughts["kept"] == 2 and thoughts["others"] > 2
    assert f"{thoughts['think_elsewhere']:.4f}" in capsys.readouterr().out


def test_corpora(places, tmp_path, capsys):
    """A folder of code, and a format whose actions are no lines."""
    (tmp_path / "code").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "code" / f"m{i}.py").write_text(text)
    assert main(["diagnose", "model", "code", *places[2:], "--num_latents", "2"]) == 0
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "A cat sat. It saw a dog. It ran away. "}) + "\n")
    words = ["--num_latents", "2", "--action_format", "prose", "--output", "prose.json"]
    assert main(["diagnose", *places, *words]) == 0
    assert json.loads((tmp_path / "prose.json").read_text())["pruning"] is None


def test_no_such_checkpoint(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["diagnose", "empty"]) == 2 and "empty" in capsys.readouterr().err
