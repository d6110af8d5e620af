"""The held gate: a model whose comments start almost always wrong must not forget how to think before they improve.

See `gate_testbed`. All numbers were measured on CPU, one thread.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch

from benchmarks.gate_testbed import Probe, expert, make_tokenizer, pretrain, probe
from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.em import GateHold
from ra3_trl.losses import EStepTerms, estep_loss
from ra3_trl.records import PolicyLogProbs


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases():
    """Pre-trained models by seed, made once."""
    tokenizer, made = make_tokenizer(), {}

    def get(seed: int):
        if seed not in made:
            made[seed] = pretrain(tokenizer, seed)
        return tokenizer, copy.deepcopy(made[seed])

    return get


def run_e_phase(
    base, seed: int, gate_hold: str, e_steps: int, folder, **settings
) -> tuple[Probe, Probe, RA3MidTrainer]:
    """An E-phase and what it did on held-out programs."""
    tokenizer, model = base(seed)
    args = RA3Config(
        output_dir=str(folder), seed=seed, gate_hold=gate_hold, e_steps=e_steps, m_steps=0, e_learning_rate=5e-4,
        horizon=1, max_latent_length=2, max_length=128, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        save_strategy="no", log_latents_steps=0, logging_steps=1000, disable_tqdm=True,
        # Rates this high cost a model this small 0.1 nats per token of code; the gate is what is looked at here.
        code_loss_tolerance=1.0, **settings,
    )  # fmt: skip
    trainer = RA3MidTrainer(model, args, expert(seed + 100, 200), expert(seed + 900, 8), tokenizer)
    before = probe(trainer)
    trainer.train()
    return before, probe(trainer), trainer


def test_anchor_by_hand():
    """p_start = 0.25, p = 0.5: KL = 0.25 log(0.25 / 0.5) + 0.75 log(0.75 / 0.5) = 0.1308; its slope in the log-odds
    is p - p_start = 0.25, the gain's slope is gone."""
    odds = torch.zeros(1, requires_grad=True)
    terms = EStepTerms(torch.zeros(1), torch.zeros(1, 2), torch.ones(1), torch.ones(1))
    start = torch.tensor([0.25]).log()
    none = torch.zeros(0)
    live = PolicyLogProbs(torch.nn.functional.logsigmoid(odds), none, none.long())
    loss, parts = estep_loss(terms, live, reference=replace(live, gate_T=start))
    loss.backward()
    assert float(parts["gate_anchor"]) == pytest.approx(0.1308, abs=1e-4)
    assert odds.grad.tolist() == pytest.approx([0.25])
    # A boundary that is tried once in four stands for four.
    drawn = replace(terms, anchor_T=torch.tensor([4.0]))
    other = replace(live, gate_T=start)
    assert float(estep_loss(drawn, live, reference=other)[1]["gate_anchor"]) == pytest.approx(0.5232, abs=1e-3)
    assert "gate_anchor" not in estep_loss(replace(terms, anchor_T=torch.zeros(1)), live, reference=other)[1]


def test_the_hold_opens_on_evidence_and_not_on_one_batch():
    """Five updates at least. Gains 1, 1, 1, 1, -1: mean 0.6, standard deviation sqrt(4 * 0.16 + 2.56) / 2 = 0.894,
    standard error 0.4: 0.6 - 0.8 is below the penalty. One more of 1: mean 0.667, deviation 0.816, error 1/3: 0.0;
    then 0.714 - 2 * 0.286 = 0.143, and 0.75 - 2 * 0.25 = 0.25 is above 0.2."""
    hold = GateHold("auto", penalty=0.2)
    held = []
    for gain in (1.0, 1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0):
        hold.update(gain)
        held.append(hold.holds)
    assert held == [True] * 7 + [False]
    one = GateHold("auto", penalty=0.2)
    one.update(50.0)
    assert one.holds
    assert GateHold("always", 0.2, released=True).holds and not GateHold("never", 0.2).holds


def test_the_hold_comes_back_where_thinking_paid_and_was_lost():
    """P(think) at a tenth of the start's, where latents pay: held again after five updates, not where it is at half
    with noise (0.3, 0.7, ...: 0.46 + 2 * 0.098 is above 1/2), nor where latents pay nowhere."""
    lost, noisy, silent = (GateHold("auto", 0.2, released=True) for _ in range(3))
    for i in range(5):
        lost.update(-5.0, 0.1)
        noisy.update(-5.0, 0.3 if i % 2 == 0 else 0.7)
        silent.update(-5.0, None)
    assert lost.holds and not noisy.holds and not silent.holds
    for _ in range(5):
        lost.update(1.0, 0.1)  # what latents bring decides now
    assert not lost.holds


@pytest.mark.slow  # what the remedy is for, not the remedy
def test_without_hold_the_gate_collapses(bases, tmp_path):
    """The trap, with the ELBO: P(think) before assertions 0.39 -> 0.00 in 48 updates, though the comments come to be
    right in 33 %. The bound alone does not keep the gate either: 0.09, and on the way up, since 87 % are right."""
    before, after, _ = run_e_phase(bases, 1, "never", 48, tmp_path, objective="elbo")
    assert before.hard > 0.3 and before.right < 0.2 and before.gain < -0.5
    assert after.hard < 0.05


def held_warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "gate_hold='auto'" in r.message]


def test_held_gate_survives_until_comments_pay(bases, tmp_path, caplog):
    """The remedy, measured on seed 1: held for some 26 updates, released when comments pay, then taught up. After 48
    updates P(think) before assertions 0.387 -> 0.995, before other lines 0.038 -> 0.007, gain -0.95 -> +2.06 nats,
    right comments 12 % -> 93 % (with the ELBO 0.900, 0.011, +1.42, 79 %)."""
    with caplog.at_level(logging.WARNING):
        before, after, trainer = run_e_phase(bases, 1, "auto", 48, tmp_path)
    assert before.hard > 0.3 and before.right < 0.2 and before.gain < -0.5
    assert after.hard >= before.hard
    assert after.easy < 0.2  # no ratchet: it does not learn to think everywhere
    assert after.gain > 0.2 and after.right > 0.5
    assert trainer.loop.state.gate_hold.released
    assert len(held_warnings(caplog)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_held_gate_survives_on_other_seeds(bases, seed, tmp_path, caplog):
    """48 updates. Seed 0 is still held at the end: P(think) 0.386 -> 0.393, gain -1.44 -> -0.58, right 73 %. Seed 2 is
    released: 0.367 -> 0.995, gain -1.11 -> +1.00, right 76 %."""
    with caplog.at_level(logging.WARNING):
        before, after, trainer = run_e_phase(bases, seed, "auto", 48, tmp_path)
    slack = 0.0 if trainer.loop.state.gate_hold.released else 0.05
    assert after.hard >= before.hard - slack and after.easy < 0.2
    assert after.gain > before.gain + 0.5 and after.right > 0.3
    assert len(held_warnings(caplog)) == 1
