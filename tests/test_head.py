"""The abstraction head: what it reads, how it learns, what it decides; it leaves the language model as it is."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import furthest, weights
from transformers import TrainerCallback

from ra3_trl import RA3Config
from ra3_trl.em import EStep, pack, rollout_sums
from ra3_trl.em.learner import HeadLearner, Observations, observe
from ra3_trl.losses import Returns, advantages, code_bounds, compute_returns, explored, gate_slope, log_mean_gain
from ra3_trl.models import AbstractionConfig, AbstractionHead, load_head, save_head
from ra3_trl.policy import annotate, choose_by_promise, choose_to_try
from ra3_trl.records import Action, Boundary, Document, Latent, RolloutGroup
from ra3_trl.rollout import Backbone, BranchEngine, ExpandEngine, NoiseKey, SamplingParams
from ra3_trl.segmentation import build_token_table, row_to_document, splice


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return x\n" for i in range(8)]


def head_of(size: int = 8, **fields) -> AbstractionHead:
    return AbstractionHead(AbstractionConfig(size, **fields))


def stirred(head: AbstractionHead) -> AbstractionHead:
    """The head with weights that give a different answer for each state."""
    with torch.no_grad():
        head.outer.weight.normal_(generator=torch.Generator().manual_seed(1))
    return head


# ---- the module and its files ----


def test_a_fresh_head_says_the_same_everywhere_and_leaves_the_generators_alone():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    head = head_of(think_prob=0.2)
    assert torch.equal(torch.rand(4), wanted)
    think_logits, gain, spread = head(torch.randn(2, 5, 8))
    assert think_logits.shape == gain.shape == spread.shape == (2, 5)
    assert think_logits.detach().sigmoid().flatten().tolist() == pytest.approx([0.2] * 10)
    assert gain.abs().max() == 0 and spread.detach().flatten().tolist() == pytest.approx([math.log(2)] * 10)


def test_its_loss_does_not_reach_what_it_reads():
    states = torch.randn(3, 8, requires_grad=True)
    sum(x.sum() for x in stirred(head_of())(states)).backward()
    assert states.grad is None


def test_files_give_the_head_back(tmp_path):
    head = stirred(head_of(think_prob=0.1, action_format="slashes", max_latent_length=7))
    head.trained_on(5)
    save_head(head, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["abstraction_config.json", "abstraction_head.safetensors"]
    again = load_head(str(tmp_path), 8)
    assert again.config == head.config and again.config.trained_on == 5
    assert furthest(weights(again), weights(head)) == 0


def test_a_folder_without_a_head_has_none(tmp_path):
    assert load_head(str(tmp_path), 8) is None


def _cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def _newer(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("abstraction_head.safetensors", _cut, "abstraction_head.safetensors of .* is damaged"),
        ("abstraction_config.json", _cut, "abstraction_config.json of .* is damaged"),
        ("abstraction_config.json", lambda path: path.write_text("[]"), "abstraction_config.json of .* is damaged"),
        ("abstraction_config.json", _newer, "is of version 99, and this ra3-trl reads up to 1; upgrade"),
        ("abstraction_head.safetensors", lambda path: path.unlink(), "abstraction_head.safetensors of .* is missing"),
        ("abstraction_config.json", lambda path: path.unlink(), "abstraction_config.json of .* is missing"),
    ],
)
def test_bad_files_are_refused(tmp_path, file, damage, says):
    save_head(head_of(), tmp_path)
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=says):
        load_head(str(tmp_path), 8)


def test_a_head_of_another_size_is_refused(tmp_path, make_trainer):
    save_head(head_of(8), tmp_path)
    with pytest.raises(ValueError, match="`hidden_size` of the abstraction head of .* is 8, .* have 16 numbers"):
        load_head(str(tmp_path), 16)
    # In a checkpoint whose own states have 32 numbers: refused before training, nothing written.
    trainer = make_trainer(TEXTS)
    trainer.save_model()
    save_head(head_of(8), trainer.args.output_dir)
    with pytest.raises(ValueError, match="hidden states of 32 numbers and comes with an abstraction head for 8"):
        make_trainer(TEXTS, model=trainer.args.output_dir, output_dir=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


# ---- what it reads ----


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
def test_engines_give_the_states_at_the_boundaries(kind, tokenizers, tiny_model, segmenter):
    """The state behind the last token before each boundary, from one plain forward."""
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("llama", tokenizer)
    engine = kind(Backbone(model), build_token_table(tokenizer, len(tokenizer)), SamplingParams(4))
    document = segmenter(tokenizer)(0, TEXTS[0])[0]
    plain = model.model(torch.tensor([document.input_ids]))[0][0]
    wanted = torch.stack([plain[document.actions[s].start - 1] for s in document.boundaries])
    for group in (engine.trunk(document), engine.rollout(document, document.boundaries[:2], 2, 1, NoiseKey(0, 0, 0))):
        torch.testing.assert_close(group.states_SD, wanted.detach(), atol=1e-4, rtol=1e-4)


def test_a_packed_row_knows_its_decisions(segmenter, tokenizers):
    """Each boundary of two documents once, behind the token before the latent, or before the line without one."""
    documents = [segmenter(tokenizers["newline_indent"])(i, text)[0] for i, text in enumerate(TEXTS[:2])]
    first, second = documents[0].boundaries[:2]
    examples = [splice(documents[0], {second: Latent((5, 6), True)}), splice(documents[1], {})]
    examples[0] = replace(examples[0], gains={second: 0.5})
    rows = pack(examples, 1000, packing=True)
    assert rows.input_ids.shape[0] == 1
    boundaries = [len(d.boundaries) for d in documents]
    assert int((rows.decision >= 0).sum()) == sum(boundaries) and int((rows.decision == 1).sum()) == 1
    where = int((rows.decision[0] == 1).nonzero())
    begins = int(rows.is_latent[0].nonzero()[0])
    assert where == begins - 1 and float(rows.gain[0, where]) == 0.5
    assert int(rows.gain.isfinite().sum()) == 1
    assert rows.key[0, where].tolist() == [0, 0, documents[0].actions[second].index]
    # The boundary before the latent's stands where it stands in the plain document.
    before = int(((rows.key[0] == torch.tensor([0, 0, first])).all(-1) & (rows.decision[0] >= 0)).nonzero())
    assert before == documents[0].actions[first].start - 1


# ---- how it learns ----


def seen(states, slope, gain, spread=None, placed=None) -> Observations:
    n = len(states)
    none = torch.full((n,), math.nan)
    key = torch.stack([torch.zeros(n), torch.zeros(n), torch.arange(n)], 1).long()
    slope, gain = (none if x is None else torch.as_tensor(x, dtype=torch.float32) for x in (slope, gain))
    spread, placed = (none if x is None else torch.as_tensor(x, dtype=torch.float32) for x in (spread, placed))
    return Observations(key, states, slope, placed, gain, spread, torch.ones(n))


def learner_of(size: int = 8, **settings) -> HeadLearner:
    return HeadLearner(head_of(size), RA3Config(use_cpu=True, **settings), learning_rate=1e-2)


def test_log_mean_gain_by_hand():
    """Latents at log 3 and log 1 over -> log((3 + 1) / 2) = log 2; without a latent -1: log 2 + 1."""
    returns = Returns(torch.tensor([-1.0]), torch.tensor([[math.log(3), 0.0]]))
    assert log_mean_gain(returns.gain_TG).tolist() == pytest.approx([math.log(2) + 1])


def test_it_learns_gain_and_spread_from_states():
    """Two kinds of boundary: gain +2 and spread 1, gain -1 and spread 0.2."""
    torch.manual_seed(0)
    kind = torch.arange(64) % 2
    states = torch.randn(64, 8) * 0.3 + kind[:, None] * torch.linspace(-2, 2, 8)
    learner = learner_of()
    found = learner.learn([seen(states, kind * 2.0 - 1, kind * 3.0 - 1, 0.2 + 0.8 * kind)], NoiseKey(0, 0, 0))
    # Before the first step it predicts 0: |2| and |-1|, on average 1.5; the mean 0.5 is off by 1.5 each time.
    assert found["head/gain_error"] == pytest.approx((96.0, 64)) and found["head/gain_spread"] == pytest.approx(
        (96, 64)
    )
    for step in range(1, 8):
        last = learner.learn([seen(states, kind * 2.0 - 1, kind * 3.0 - 1, 0.2 + 0.8 * kind)], NoiseKey(0, 0, step))
    assert last["head/gain_error"][0] / 64 < 0.2
    log_think, gain, spread = learner.predict(states)
    assert gain[kind == 1].mean() == pytest.approx(2, abs=0.2) and gain[kind == 0].mean() == pytest.approx(-1, abs=0.2)
    assert spread[kind == 1].mean() > 0.7 and spread[kind == 0].mean() < 0.4
    assert log_think[kind == 1].exp().min() > 0.8 and log_think[kind == 0].exp().max() < 0.2
    assert learner.head.config.trained_on == 8 * 64


@pytest.mark.parametrize(("rare", "opens"), [(20.0, True), (5.0, False)])
def test_the_gate_decides_by_the_expected_slope(rare, opens):
    """Slope -1 in nine of ten cases, `rare` in one, on the same state: E = 1.1 or -0.4. A majority vote would close
    it both times, and J's own slope never."""
    slope = torch.full((100,), -1.0)
    slope[::10] = rare
    learner = learner_of(action_format="python")
    for step in range(20):
        learner.learn([seen(torch.ones(100, 8).cumsum(1), slope, None)], NoiseKey(0, 0, step))
    p = float(learner.predict(torch.ones(1, 8).cumsum(1))[0].exp())
    # The optimum is E[slope+] / (E[slope+] + E[slope-]) = 2 / 2.9 = 0.69, or 0.5 / 1.4 = 0.36.
    assert p == pytest.approx(2 / 2.9 if opens else 0.5 / 1.4, abs=0.05)


def test_a_shut_gate_opens_again():
    """Ten updates of slope -2 shut it (below 1 %); as many of +2 open it: the loss's slope does not vanish."""
    learner, states = learner_of(), torch.ones(64, 8).cumsum(1)
    for step in range(10):
        learner.learn([seen(states, [-2.0] * 64, None)], NoiseKey(0, 0, step))
    assert learner.predict(states[:1])[0].exp() < 0.01
    learner.kept = None
    for step in range(10):
        learner.learn([seen(states, [2.0] * 64, None)], NoiseKey(0, 0, step))
    assert learner.predict(states[:1])[0].exp() > 0.5


def test_in_the_m_phase_it_imitates_the_annotation():
    """A quarter of the boundaries of one kind got a latent, all of the other."""
    kind = torch.arange(80) % 2
    placed = torch.where(kind == 1, 1.0, (torch.arange(80) % 8 == 0).float())
    states = torch.ones(80, 8).cumsum(1) * (2.0 * kind - 1)[:, None]
    learner = learner_of()
    for step in range(20):
        learner.learn([seen(states, None, None, placed=placed)], NoiseKey(0, 0, step))
    p = learner.predict(states)[0].exp()
    assert p[kind == 0].mean() == pytest.approx(0.25, abs=0.05) and p[kind == 1].min() > 0.9


def test_the_order_of_what_was_seen_does_not_matter():
    """Batches and processes share out the boundaries otherwise; the steps are the same, bit for bit."""
    states = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    whole = seen(states, torch.linspace(-1, 1, 10), torch.linspace(2, 0, 10), torch.ones(10))
    a, b = learner_of(), learner_of()
    a.learn([whole], NoiseKey(0, 0, 0))
    b.learn([whole[torch.tensor([7, 2, 9])], whole[torch.tensor([1, 0, 8, 3, 6, 5, 4])]], NoiseKey(0, 0, 0))
    assert furthest(weights(a.head), weights(b.head)) == 0


# ---- where to roll out ----


def lines(count: int) -> Document:
    boundary = Boundary((1,), (2,))
    return Document(0, 0, tuple(range(count + 1)), tuple(Action(i, i + 1, i + 2, boundary) for i in range(count)), 1)


def test_the_most_promising_are_tried_and_a_few_others():
    """20 boundaries, budget 0.5: 10 tried, a fifth of them drawn: the 8 of the largest promise and 2 of the 12."""
    document, promise = lines(20), torch.arange(20.0)
    args = RA3Config(boundary_selection="head", use_cpu=True)
    found = [choose_by_promise(document, promise, 10, args, NoiseKey(0, 0, step)) for step in range(200)]
    assert all(len(boundaries) == 10 and set(range(12, 20)) <= set(boundaries) for boundaries, _ in found)
    assert {s for boundaries, _ in found for s in boundaries} == set(range(20))
    for boundaries, weight_T in found:
        # The best stand for themselves; of the others each stands for 12 / 2 = 6.
        assert weight_T.tolist() == [1.0 if s >= 12 else 6.0 for s in boundaries]


def test_weighted_averages_are_those_of_all_boundaries():
    """Values 0 to 19, average 9.5; of the tried ones unweighted (8 * 15.5 + 2 * 5.5) / 10 = 13.5."""
    document, promise, args = lines(20), torch.arange(20.0), RA3Config(boundary_selection="head", use_cpu=True)
    total, plain = [], []
    for step in range(2000):
        boundaries, weight_T = choose_by_promise(document, promise, 10, args, NoiseKey(1, 0, step))
        total.append(float((weight_T * torch.tensor(boundaries)).sum()) / 20)
        plain.append(sum(boundaries) / len(boundaries))
    # One draw of 2 of 0..11 without replacement: variance of its mean 143/12 / 2 * 10/11 = 5.4, times (6/10)^2: 1.95.
    # Of 2000 draws the standard error is 0.031.
    assert sum(total) / 2000 == pytest.approx(9.5, abs=0.13) and sum(plain) / 2000 == pytest.approx(13.5, abs=0.1)


def test_the_e_step_rolls_out_where_a_good_latent_would_gain_most(make_trainer):
    """A head that promises most where the spread is: gains -1 everywhere, spread 3 at one boundary, 0.1 at the others.
    With a budget for two of four, one of them drawn, it is always tried; its weight is 1, that of the drawn one 3."""
    settings = {"boundary_selection": "head", "boundary_exploration": 0.5, "boundary_budget": 0.5}
    trainer = make_trainer(TEXTS, gate_hold="never", **settings)
    document = row_to_document(trainer.train_dataset[0])
    assert len(document.boundaries) == 4
    learner, states = trainer.loop.learner, trainer.policy.engine.trunk(document).states_SD
    best, tried = 2, []

    def predict(states_SD):
        spread = torch.where((states_SD == states[best]).all(-1), 3.0, 0.1)
        return torch.full_like(spread, -1.0), torch.full_like(spread, -1.0), spread

    learner.predict = predict
    for step in range(8):
        (rollout,) = EStep(trainer.policy, trainer.args).roll_out([document], NoiseKey(0, 0, step))
        tried.append(rollout.group.boundaries)
        assert document.boundaries[best] in rollout.group.boundaries and len(rollout.group.boundaries) == 2
        where = rollout.group.boundaries.index(document.boundaries[best])
        assert float(rollout.weight_T[where]) == 1.0 and float(rollout.weight_T[1 - where]) == 3.0
        terms = EStep(trainer.policy, trainer.args).terms(rollout, slice(0, 2), False)
        log_think = rollout.group.gate_logps_A[list(rollout.group.boundaries)]
        slope = gate_slope(rollout.returns.gain_TG, log_think, trainer.args.penalty)
        torch.testing.assert_close(terms.gate_gain_T, slope * rollout.weight_T)
        think = explored(log_think, 0.05)
        torch.testing.assert_close(terms.weight_T, think * rollout.weight_T)
        worth = advantages(rollout.returns.gain_TG, think, trainer.args.penalty)
        torch.testing.assert_close(terms.advantage_TG, worth * rollout.weight_T[:, None])
        sums = rollout_sums([rollout], lambda ids: "")
        assert sums["gain"][0] == pytest.approx(float((rollout.returns.gain_TG.mean(1) * rollout.weight_T).sum()))
    assert {boundary for boundaries in tried for boundary in boundaries} == set(document.boundaries)


def test_the_weight_of_a_boundary_counts():
    """Two kinds of slope on one state, the second for nine others: the gate follows the nine."""
    learner, states = learner_of(), torch.ones(64, 8).cumsum(1)
    slope = torch.where(torch.arange(64) % 10 == 0, -1.0, 1.0)
    few = replace(seen(states, slope, None), weight_n=torch.where(slope < 0, 90.0, 1.0))
    for step in range(20):
        learner.learn([few], NoiseKey(0, 0, step))
    assert learner.predict(states[:1])[0].exp() < 0.5  # 7 * 90 against 57


def test_a_phase_forgets_the_one_before():
    learner = learner_of()
    learner.learn([seen(torch.randn(4, 8), [1.0] * 4, [1.0] * 4)], NoiseKey(0, 0, 0))
    assert len(learner.kept) == 4 and learner.annotator.head is learner.head
    learner.begin_phase()
    assert learner.kept is None and learner.annotator.head is not learner.head


def test_more_than_it_keeps_is_drawn_from_not_cut():
    """Of 3,000 boundaries in an update 1,024 are kept, of first and last documents alike."""
    learner = learner_of()
    learner.learn([seen(torch.randn(3000, 8), [1.0] * 3000, [1.0] * 3000)], NoiseKey(0, 0, 0))
    kept = learner.kept.key_n3[:, 2]
    assert len(kept) == 1024 and 350 < float((kept < 1500).sum()) < 680  # 512 expected, standard deviation 13


@pytest.mark.parametrize(
    "settings", [{"line_reduction": "mean"}, {"reward_funcs": lambda prompts, **kwargs: [-50.0] * len(prompts)}]
)
def test_gain_is_that_of_the_likelihood_whatever_the_reward(make_trainer, settings):
    """Annotation knows the likelihood only; a reward of -50 or one per token must not make it skip boundaries."""
    trainer = make_trainer(TEXTS, horizon=1, **settings)
    document = row_to_document(trainer.train_dataset[0])
    estep = EStep(trainer.policy, trainer.args, plug_ins=trainer.loop.plug_ins)
    (rollout,) = estep.roll_out([document], NoiseKey(0, 0, 0))
    found = observe(rollout.group, rollout.returns, rollout.weight_T, trainer.args)
    torch.testing.assert_close(found.gain_n, log_mean_gain(compute_returns(rollout.group, 1, 0.9).gain_TG))
    log_think = rollout.group.decision_logps_A[list(rollout.group.boundaries)]
    wanted = gate_slope(rollout.returns.gain_TG, log_think, trainer.args.penalty)
    torch.testing.assert_close(found.slope_n, wanted)


def test_latents_count_as_often_as_the_gate_in_use_thinks(make_trainer):
    trainer = make_trainer(TEXTS, gate="head", exploration=0.0, boundary_selection="random")
    with torch.no_grad():
        trainer.loop.learner.head.outer.bias[0] = 2.0
    document = row_to_document(trainer.train_dataset[0])
    estep = EStep(trainer.policy, trainer.args)
    (rollout,) = estep.roll_out([document], NoiseKey(0, 0, 0))
    terms = estep.terms(rollout, slice(1, 3), True)
    assert terms.weight_T.tolist() == pytest.approx([1 / (1 + math.exp(-2.0))] * 2)


@pytest.mark.parametrize(("settings", "tried"), [({"boundary_budget": 1.0}, 7), ({"max_boundaries": 1}, 1), ({}, 2)])
@pytest.mark.parametrize("selection", ["gate", "head"])
def test_budget_and_limit(settings, tried, selection):
    """ceil(0.25 * 7) = 2 boundaries, `max_boundaries` at most."""
    args = RA3Config(boundary_selection=selection, use_cpu=True, **settings)
    none = torch.zeros(0, 0, 0)
    trunk = RolloutGroup(lines(7), (), (), torch.zeros(7), torch.full((7,), -1.0), none, none, torch.zeros(7, 8))
    boundaries, weight_T = choose_to_try(learner_of(), trunk, args, NoiseKey(0, 0, 0))
    assert len(boundaries) == len(set(boundaries)) == len(weight_T) == tried
    assert float(weight_T.sum()) == pytest.approx(7) or selection == "gate" or tried == 7


def test_a_trainer_rolls_out_within_the_budget(make_trainer):
    trainer = make_trainer(
        TEXTS, boundary_selection="head", boundary_budget=0.5, e_steps=3, m_steps=1, logging_steps=1
    )
    boundaries = [len(row_to_document(row).boundaries) for row in trainer.train_dataset]
    trainer.train()
    rates = [entry["estep/tried_rate"] for entry in trainer.state.log_history if "estep/tried_rate" in entry]
    assert len(rates) == 3 and rates == pytest.approx([math.ceil(boundaries[0] / 2) / boundaries[0]] * 3)


def test_annotation_skips_what_is_hopeless(make_trainer):
    """With the head's gain at -5 the chance of a latent is sigmoid(log(0.3 / 0.7) - 5) = 0.3 %; at +5 98 %."""
    trainer = make_trainer(TEXTS, boundary_selection="head", horizon=1)
    document, noise = row_to_document(trainer.train_dataset[0]), NoiseKey(0, 1, 0)
    learner = trainer.loop.learner
    assert len(annotate(trainer.policy, document, noise).gains) == len(document.boundaries)
    learner.head.trained_on(1)
    for gain, tried in ((-5.0, 0), (5.0, len(document.boundaries))):
        with torch.no_grad():
            learner.head.outer.bias[1] = gain
        example = annotate(trainer.policy, document, noise)
        assert len(example.gains) == tried and set(example.placed) <= set(example.gains)


# ---- in the trainer ----


@pytest.mark.parametrize("settings", [{}, {"annotation": "policy", "gradient_accumulation_steps": 2}])
def test_the_language_model_is_trained_as_if_there_were_none(make_trainer, tmp_path, settings):
    trained = []
    for beside in (True, False):
        trainer = make_trainer(TEXTS, abstraction_head=beside, output_dir=str(tmp_path / str(beside)), **settings)
        trainer.train()
        trained.append(weights(trainer.model))
        assert (trainer.loop.learner is not None) == beside
    assert furthest(*trained) == 0


def test_accumulation_does_not_matter_to_the_head(make_trainer, tmp_path):
    heads = []
    for batch, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            TEXTS, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, optim="sgd",
            output_dir=str(tmp_path / str(batch)),
        )  # fmt: skip
        trainer.train()
        assert trainer.loop.learner.head.config.trained_on > 0
        heads.append(weights(trainer.loop.learner.head))
    assert furthest(*heads) < 1e-4


def test_the_heads_gate_decides(make_trainer):
    """At P(think) = 0 the ELBO is the code's renormalised likelihood, at 1 the latents' mean; the token gate stays
    what lines are renormalised by."""
    trainer = make_trainer(TEXTS, gate="head", horizon=1)
    document = row_to_document(trainer.train_dataset[0])
    plain = trainer.policy.engine.rollout(document, document.boundaries, 3, 1, NoiseKey(0, 0, 0))
    returns = compute_returns(plain, 1, 1.0)
    rest = code_bounds(plain).log_likelihood - float(plain.line_logps_A[list(document.boundaries)].double().sum())
    for bias, wanted in ((-30.0, returns.act_T), (30.0, returns.latent_TG.mean(1))):
        with torch.no_grad():
            trainer.loop.learner.head.outer.bias[0] = bias
        group = trainer.loop.learner.decide(plain)
        assert code_bounds(group).elbo == pytest.approx(rest + float(wanted.double().sum()), abs=1e-3)
        assert torch.equal(group.gate_logps_A, plain.gate_logps_A)
    example = annotate(trainer.policy, document, NoiseKey(0, 0, 0), "policy")
    assert set(example.placed) == set(document.boundaries)  # at P(think) = 1


def test_with_the_heads_gate_the_tokens_are_anchored(make_trainer, tmp_path):
    """The tokens' P(think) gets no slope of its own: the log has an anchor's loss and none of the gate's, although
    nothing is held (`gate_hold="never"`)."""
    logs = {}
    for gate in ("head", "token"):
        trainer = make_trainer(
            TEXTS, gate=gate, gate_hold="never", kl_coef=0.0, logging_steps=1, output_dir=str(tmp_path / gate)
        )
        trainer.train()
        logs[gate] = [e for e in trainer.state.log_history if "estep/loss_gate" in e]
    assert all("estep/loss_gate_anchor" in e and e["estep/loss_gate"] == 0 for e in logs["head"])
    assert not any("estep/loss_gate_anchor" in e for e in logs["token"])
    assert all(e["estep/loss_gate"] != 0 for e in logs["token"])


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_has_the_same_head(make_trainer, tmp_path, step):
    """Killed in the E-phase (2 updates) or the M-phase: bit for bit."""
    settings = {"save_strategy": "steps", "save_steps": 1, "m_steps": 3, "gate": "head", "boundary_selection": "head"}
    alone = make_trainer(TEXTS, **settings)
    alone.train()
    again = make_trainer(TEXTS, **settings | {"output_dir": str(tmp_path / "again")})
    again.train(resume_from_checkpoint=f"{alone.args.output_dir}/checkpoint-{step}")
    assert furthest(weights(alone.loop.learner.head), weights(again.loop.learner.head)) == 0
    assert furthest(weights(alone.model), weights(again.model)) == 0
    assert alone.loop.learner.head.config == again.loop.learner.head.config


def test_a_checkpoints_head_is_trained_on(make_trainer, tmp_path):
    trainer = make_trainer(TEXTS, max_latent_length=3)
    trainer.train()
    trainer.save_model()
    before = trainer.loop.learner.head.config
    assert before.trained_on > 0 and before.max_latent_length == 3
    again = make_trainer(TEXTS, model=trainer.args.output_dir, output_dir=str(tmp_path / "again"))
    assert again.loop.learner.head.config == replace(before, max_latent_length=4)
    assert furthest(weights(again.loop.learner.head), weights(trainer.loop.learner.head)) == 0


def test_the_best_checkpoints_head_comes_back(make_trainer):
    """With `greater_is_better` the worst counts as best: the first, since the model learns; the head is its, not the
    last one's."""
    trainer = make_trainer(
        TEXTS, TEXTS[:2], e_steps=1, m_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="elbo", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert not best.endswith("checkpoint-4")
    assert furthest(weights(load_head(best)), weights(trainer.loop.learner.head)) == 0


def test_a_run_without_latents_has_no_head(make_trainer, tmp_path):
    trainer = make_trainer(TEXTS, e_steps=0)
    trainer.train()
    trainer.save_model()
    assert trainer.loop.learner is None and not list((tmp_path / "run").glob("abstraction*"))


def test_nothing_is_held_where_the_head_is_the_gate(make_trainer):
    """Its gate opens again by itself, so there is nothing to warn of."""
    assert make_trainer(TEXTS, gate="head", gate_hold="auto").loop.state.gate_hold.holds is False
    assert make_trainer(TEXTS, gate="token", gate_hold="auto").loop.state.gate_hold.holds is True


@pytest.mark.parametrize("name", ["gate", "boundary_selection"])
def test_what_needs_a_head_is_refused_without_one(name):
    with pytest.raises(ValueError, match=f"`{name}` is 'head', but `abstraction_head` is False"):
        RA3Config(abstraction_head=False, use_cpu=True, **{name: "head"})


def test_the_head_learns_in_full_precision(make_trainer):
    """Whatever the run's: M-updates learn inside the trainer's autocast, and a rounded head would not be the same."""
    trainer, told = make_trainer(TEXTS, bf16=True), []
    learn = trainer.loop.learner.learn

    def noting(*args):
        told.append((trainer.loop.phase.kind, torch.is_autocast_enabled("cpu")))
        return learn(*args)

    trainer.loop.learner.learn = noting
    trainer.train()
    assert set(told) == {("E", False), ("M", False)}


def test_the_head_decides_in_full_precision(make_trainer):
    """Its gate in an E-phase in mixed precision, which failed; and what it says inside autocast is what it says."""
    trainer = make_trainer(TEXTS, bf16=True, gate="head", boundary_selection="head")
    trainer.train()
    head = trainer.policy.head.head
    states = torch.randn(3, head.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(states)
    assert all(torch.equal(a, b) for a, b in zip(inside, head(states), strict=True))


def test_callbacks_hear_of_the_end_with_the_best_head(make_trainer):
    """Trackers save the model then: its weights and its head must be of one checkpoint."""
    heads = []

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            heads.append(weights(trainer.loop.learner.head))

    trainer = make_trainer(
        TEXTS, TEXTS[:2], e_steps=1, m_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="elbo", greater_is_better=True,
    )  # fmt: skip
    trainer.add_callback(AtTheEnd())
    trainer.train()
    assert furthest(heads[0], weights(load_head(trainer.state.best_model_checkpoint))) == 0


def test_what_an_interrupted_update_saw_is_forgotten():
    learner = learner_of()
    learner.noted.append(seen(torch.randn(2, 8), [1.0] * 2, [1.0] * 2))
    learner.begin_phase()
    assert learner.noted == []
