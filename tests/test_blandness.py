"""An E-phase that ends bland says so and does not go on to the M-phase; what of it is logged, kept and loaded."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import pytest
import torch

from ra3_trl.em import EStep, GateHold, rollout_sums
from ra3_trl.em.estep import Chunk
from ra3_trl.em.monitor import Sameness
from ra3_trl.em.state import STATE, EMState
from ra3_trl.losses import gate_slope
from ra3_trl.policy import Policy, most_thinking
from ra3_trl.records import PolicyLogProbs
from ra3_trl.rollout import NoiseKey
from ra3_trl.segmentation import row_to_document


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return x\n" for i in range(8)]


def test_sameness_by_hand():
    """Of 20 latents 12 are the same: 9 different ones of 20, 0.45, and a share of 0.6. Bland above a tolerance of 0.5
    where another document's does as well but for less than the penalty; the last 64 count."""
    said = Sameness()
    said.update([" same"] * 12 + [f" {i}" for i in range(8)], 0.05)
    assert said.shares == (9 / 20, " same", 0.6)
    assert "60% of the last 20 are 'same'" in said.message(0.5, penalty=0.2)
    assert said.message(0.6, penalty=0.2) is None  # not more than that
    assert said.message(0.5, penalty=0.04) is None  # tells 0.05 nats about its document
    said.update([], 3.0)  # (0.05 + 3) / 2
    assert said.message(0.5, penalty=0.2) is None
    said.update([f" new {i}" for i in range(64)], None)
    assert said.shares[2] == 1 / 64
    assert Sameness([" same"] * 15, [0.0]).message(0.5, 0.2) is None  # too few to tell
    assert Sameness([" same"] * 16, []).message(0.5, 0.2) is None  # of one document there is no other


def bland(trainer, at: int) -> None:
    """Makes the latents bland from update `at` on."""
    observe = trainer.loop.observe

    def observing(rollouts, shares):
        if trainer.loop.step >= at:
            shares = [
                replace(
                    s, texts=[" simple step"] * 64, sums=s.sums | {"gain_over_other": [0.02 * trainer.loop.step, 1.0]}
                )
                for s in shares
            ]
            trainer.loop.state.sameness.over_other = []
        return observe(rollouts, shares)

    trainer.loop.observe = observing


@pytest.mark.parametrize(
    ("settings", "at", "updates"),
    [
        ({"m_steps": 2}, 0, 3),  # no M-phase behind it
        ({"m_steps": 2}, 9, 5),  # not bland
        ({"m_steps": 2, "same_latent_tolerance": 1.0}, 0, 5),
        ({"m_steps": 0}, 0, 3),
        ({"m_steps": 2, "em_iterations": 2}, 4, 8),  # at the end of the second E-phase
    ],
)
def test_training_stops_before_the_m_phase(make_trainer, caplog, settings, at, updates):
    trainer = make_trainer(TEXTS, e_steps=3, **settings)
    bland(trainer, at)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == updates
    said = [r.getMessage() for r in caplog.records if "latents are bland" in r.getMessage()]
    stops = [text for text in said if "stops before the M-phase" in text]
    stopped = updates < settings.get("em_iterations", 1) * (3 + settings["m_steps"])
    assert len(stops) == stopped and ("same_latent_tolerance=0.5" in "".join(stops)) == stopped
    tolerant = settings.get("same_latent_tolerance") == 1.0
    assert len(said) - len(stops) == (0 if at == 9 or tolerant else 1)  # the alarm, once


def test_a_run_holds_again_what_it_loses(make_trainer, caplog):
    """Five updates in which a tenth of P(think) is left where latents pay; the log says from when on it is held."""
    trainer = make_trainer(TEXTS, e_steps=6, m_steps=0, logging_steps=1)
    trainer.loop.state.gate_hold.released = True
    observe = trainer.loop.observe

    def losing(rollouts, shares):
        trainer.loop.state.gate_hold.released |= trainer.loop.step == 0  # training begins anew with a state of its own
        return observe(rollouts, [replace(s, sums=s.sums | {"gate_kept": [0.1, 1.0]}) for s in shares])

    trainer.loop.observe = losing
    trainer.train()
    held = [entry["estep/gate_held"] for entry in trainer.state.log_history if "estep/gate_held" in entry]
    assert held == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]


def test_an_e_phase_judges_by_what_it_has_seen_itself(make_trainer):
    """Two documents an update, three updates: 2, 4 and 6 latents are known, in the second E-phase again."""
    trainer = make_trainer(TEXTS, e_steps=3, m_steps=1, em_iterations=2)
    observe, known = trainer.loop.observe, []

    def counting(rollouts, shares):
        stop = observe(rollouts, shares)
        known.append((len(trainer.loop.state.sameness.texts), len(trainer.loop.state.gate_hold.kept)))
        trainer.loop.state.gate_hold.kept = [0.1] * 4
        return stop

    trainer.loop.observe = counting
    trainer.train()
    texts, kept = zip(*known, strict=True)
    assert texts == (2, 4, 6) * 2 and kept[0] == kept[3] == 0


def test_the_loss_is_divided_by_all_boundaries(make_trainer):
    """Two documents of four boundaries, of which a quarter, one each, is tried."""
    trainer = make_trainer(TEXTS)
    documents = [row_to_document(row) for row in trainer.train_dataset][:2]
    window = trainer.loop.collect([documents], 1, 0)
    assert [len(d.boundaries) for d in documents] == [4, 4] and window.denominator == 8.0
    assert [len(r.group.boundaries) for r in window.batches[0].rollouts] == [1, 1]


def test_a_run_logs_what_its_latents_say(make_trainer):
    """The logged difference is that of the rollouts, scored under the reward model; one document has no other."""
    trainer = make_trainer(TEXTS, e_steps=1, m_steps=0, reward_model="frozen", logging_steps=1)
    kept = []
    trainer.loop.on_rollouts = lambda step, rollouts: kept.extend(rollouts)
    trainer.train()
    log = trainer.state.log_history[0]
    texts = [trainer.processing_class.decode(r.group.latents[most_thinking(r.group)][0].token_ids) for r in kept]
    assert len(kept) > 1 and log["estep/distinct_rate"] == len(set(texts)) / len(texts)
    estep = EStep(trainer.policy, trainer.args, trainer.loop.state.frozen["reward"])
    wanted = estep.over_other(kept)
    assert log["estep/gain_over_other"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)
    assert estep.over_other(kept[:1]) == []


def test_what_is_left_of_thinking_where_latents_pay(make_trainer):
    """Two boundaries, of which the first pays: P(think) now over P(think) at the start, there alone, 0.1 / 0.4."""
    trainer = make_trainer(TEXTS)
    document = row_to_document(trainer.train_dataset[0])
    (rollout,) = EStep(trainer.policy, trainer.args).roll_out([document], NoiseKey(0, 0, 0))
    two = (document.boundaries[0], document.boundaries[-1])
    gates = rollout.group.gate_logps_A.clone()
    gates[list(two)] = torch.tensor([0.1, 0.9]).log()
    group = replace(rollout.group, boundaries=two, gate_logps_A=gates, latents=rollout.group.latents[:1] * 2,
                    latent_line_logps_TGH=rollout.group.latent_line_logps_TGH[[0, 0]],
                    latent_gate_logps_TGH=rollout.group.latent_gate_logps_TGH[[0, 0]])  # fmt: skip
    act, latents = torch.zeros(2), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    start = PolicyLogProbs(torch.tensor([0.4, 0.3]).log(), torch.zeros(0), torch.zeros(0).long())
    changed = replace(rollout, group=group, returns=replace(rollout.returns, act_T=act, latent_TG=latents),
                      weight_T=torch.ones(2), chunks=(Chunk(slice(0, 2), start),))  # fmt: skip
    total, weight = rollout_sums([changed], lambda ids: "", 1, "multi_sample", 0.2)["gate_kept"]
    assert total / weight == pytest.approx(0.25)
    none = replace(changed, chunks=(Chunk(slice(0, 2)),))
    assert "gate_kept" not in rollout_sums([none], lambda ids: "")


def test_state_of_before_loads(make_trainer, tmp_path):
    """A checkpoint of before has an average in its hold and no sameness."""
    trainer = make_trainer(TEXTS, e_steps=2, m_steps=0, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-1"
    state = json.loads((folder / STATE).read_text())
    assert state["sameness"]["texts"] and len(state["gate_hold"]["gains"]) == 1
    fresh = EMState(GateHold("auto", 0.2))
    fresh.load(folder, 0, trainer.model)
    assert fresh.sameness.texts == state["sameness"]["texts"]
    del state["sameness"]
    state["gate_hold"] = {"mode": "auto", "penalty": 0.2, "average": -1.0, "released": True, "updates": 7}
    (folder / STATE).write_text(json.dumps(state))
    fresh.load(folder, 0, trainer.model)
    assert fresh.gate_hold == GateHold("auto", 0.2, True, 7) and fresh.sameness == Sameness()


def test_an_overflow_says_nothing_and_a_lost_gate_is_named():
    hold = GateHold("auto", 0.2)
    for gain in (math.nan, math.inf, -math.inf):
        hold.update(gain)
    assert hold.updates == 0 and hold.gains == []
    hold = GateHold("auto", 0.2, released=True)
    for _ in range(5):
        hold.update(0.0, 0.1)
    assert hold.holds and "was lost where latents pay" in hold.message and "nan" not in hold.message


def test_comments_that_harm_call_for_a_cold_start():
    """Twelve gains about -1 are below 0 by more than two standard errors; about 0 they are not."""
    for mean, cold in ((-1.0, True), (0.0, False)):
        hold = GateHold("auto", 0.2)
        for i in range(12):
            hold.update(mean + 0.1 * (-1) ** i)
        assert ("cold start (docs/cold_start.md)" in hold.message) is cold
        assert ("larger `num_latents`" in hold.message) is not cold


@pytest.mark.parametrize(("logit", "m"), [(18.0, -25.0), (20.0, -60.0), (25.0, -120.0), (200.0, -120.0)])
def test_a_gate_shut_open_against_harm_has_a_bounded_slope(logit, m):
    """P(think) rounds to 1 and every latent harms: in the log-odds the slope is the posterior, 0, less 1; where even
    the log of P(think) has rounded to 0, so has its slope."""
    odds = torch.tensor([logit], requires_grad=True)
    log_p = torch.nn.functional.logsigmoid(odds)
    slope = gate_slope(torch.tensor([[m, m]]), log_p.detach(), 0.0)
    (log_p.exp() * slope).sum().backward()
    assert -1.01 < float(odds.grad) < (0 if logit < 100 else 1e-9)


def test_the_penalty_of_a_run_without_latents_is_none_of_the_policys(make_trainer, tmp_path):
    trainer = make_trainer(TEXTS, penalty=math.inf)
    trainer.save_model(str(tmp_path / "ntp"))
    assert Policy.open(str(tmp_path / "ntp"), use_cpu=True).args.penalty == 0.2
    assert Policy.open(str(tmp_path / "ntp"), use_cpu=True, penalty=1.0).args.penalty == 1.0
