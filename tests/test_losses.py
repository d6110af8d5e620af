"""The objective by hand: returns, advantages, gate, policy gradient, KL, bounds, resampling."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from ra3_trl.losses import (
    EStepTerms,
    Returns,
    advantages,
    code_bounds,
    compute_returns,
    estep_loss,
    explored,
    gate_slope,
    joint_gain,
    log1mexp,
    next_token_loss,
    renormalise,
    resampling_logits,
)
from ra3_trl.losses.estep import gate_anchor
from ra3_trl.policy.decisions import inclusion_probs
from ra3_trl.records import Action, Boundary, Document, Latent, PolicyLogProbs, RolloutGroup


BOUNDARY = Boundary((1,), (2,))
LOG2 = math.log(2)


def document_of(*kinds: str, tokens: int = 2) -> Document:
    """Lines of two tokens after one of context: `"."` without a boundary, `"|"` with one, `"#"` a comment."""
    actions = tuple(
        Action(i, 1 + i * tokens, 1 + (i + 1) * tokens, BOUNDARY if kind == "|" else None, kind == "#")
        for i, kind in enumerate(kinds)
    )
    return Document(0, 0, tuple(range(2 + tokens * len(kinds))), actions, 1)


def group_of(document, lines, gates, latent_lines, latent_gates, boundaries=None) -> RolloutGroup:
    """`gates` are probabilities of thinking, 0 for no decision."""
    to = torch.tensor
    boundaries = document.boundaries if boundaries is None else boundaries
    latents = tuple(tuple(Latent((0,), True) for _ in row) for row in latent_lines)
    gates, latent_gates = to(gates).log(), to(latent_gates).log()
    return RolloutGroup(document, boundaries, latents, to(lines), gates, to(latent_lines), latent_gates)


# ---- log1mexp, renormalise ----


def test_log1mexp_by_hand():
    x = torch.tensor([-LOG2, math.log(0.75), -torch.inf, -1e-4, -30.0])
    # 1 - 1/2, 1 - 3/4, 1 - 0; -expm1(-1e-4) = 9.9995e-5; 1 - e^-30 = 1 - 9.4e-14, whose log is -9.4e-14
    wanted = torch.tensor([-LOG2, math.log(0.25), 0.0, math.log(9.9995e-5), -9.3576e-14])
    torch.testing.assert_close(log1mexp(x), wanted, rtol=1e-5, atol=0)
    assert torch.isfinite(log1mexp(torch.tensor([0.0, 1e-9]))).all()  # a gate at 1 by rounding


def test_log1mexp_has_the_right_gradient():
    """d/dx log(1 - e^x) = -e^x / (1 - e^x): at log 1/2 it is -1, at log 3/4 it is -3."""
    x = torch.tensor([-LOG2, math.log(0.75), -20.0], requires_grad=True)
    log1mexp(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-1.0, -3.0, -math.exp(-20)]), rtol=1e-5, atol=0)


def test_log1mexp_has_a_finite_gradient_where_a_gate_is_one_by_rounding():
    x = torch.tensor([0.0, -1e-9, -1e-8], requires_grad=True)
    log1mexp(x).sum().backward()
    assert not torch.isnan(x.grad).any()


def test_renormalise_takes_out_the_mass_of_not_thinking():
    """A line of raw probability 1/4 where P(think) = 1/2: given that one acts it is 1/2."""
    line, gate = torch.tensor([math.log(0.25), -3.0]), torch.tensor([math.log(0.5), -torch.inf])
    torch.testing.assert_close(renormalise(line, gate), torch.tensor([math.log(0.5), -3.0]))


# ---- returns ----


def test_returns_by_hand():
    """Lines a | b | c of -1, -2, -4 nats without gates; under the latents -0.5, -3 (b) and -1 (c, second line).

    H = 2, discount 1/2. Site b: act -2 + -4/2 = -4; latent 0: -0.5 + -1/2 = -1; latent 1: -3 + -2/2 = -4.
    Site c has one line left: act -4; latent 0: -3; latent 1: -5.
    """
    group = group_of(
        document_of(".", "|", "|"),
        [-1.0, -2.0, -4.0],
        [0.0, 0.0, 0.0],
        [[[-0.5, -1.0], [-3.0, -2.0]], [[-3.0, 99.0], [-5.0, 99.0]]],
        [[[0.0, 0.0]] * 2] * 2,
    )
    found = compute_returns(group, horizon=2, discount=0.5)
    assert found.act_T.tolist() == [-4.0, -4.0]
    assert found.latent_TG.tolist() == [[-1.0, -4.0], [-3.0, -5.0]]
    assert found.gain_TG.tolist() == [[3.0, 0.0], [1.0, -1.0]]
    # H = 1 counts the first line alone.
    one = compute_returns(group, horizon=1, discount=0.5)
    assert one.act_T.tolist() == [-2.0, -4.0] and one.latent_TG.tolist() == [[-0.5, -3.0], [-3.0, -5.0]]


def test_returns_are_renormalised_on_both_sides():
    """P(think) = 1/2 before the line, 3/4 under the latent: -2 + log 2 against -2 + log 4. Not renormalised, the
    latent would seem useless; here it gains log 2."""
    group = group_of(document_of(".", "|"), [0.0, -2.0], [0.0, 0.5], [[[-2.0]]], [[[0.75]]])
    found = compute_returns(group, 1, 1.0)
    assert float(found.act_T) == pytest.approx(-2 + LOG2) and float(found.latent_TG) == pytest.approx(-2 + 2 * LOG2)
    assert float(found.gain_TG) == pytest.approx(LOG2)


def test_a_useless_latent_gains_nothing():
    """It changes nothing but the gate (nobody thinks twice): raw line -1 + log(1 - p) without it, -1 with it."""
    p = 0.3
    group = group_of(document_of(".", "|"), [0.0, -1 + math.log(1 - p)], [0.0, p], [[[-1.0]]], [[[0.0]]])
    assert float(compute_returns(group, 1, 1.0).gain_TG) == pytest.approx(0, abs=1e-6)


def test_returns_end_at_a_kept_comment():
    """a | b # | d: the latent before b is credited with b only, whatever H."""
    group = group_of(
        document_of(".", "|", "#", ".", "|"),
        [-1.0, -2.0, -50.0, -50.0, -3.0],
        [0.0] * 5,
        [[[-1.0, -7.0, -7.0]], [[-2.0, -7.0, -7.0]]],
        [[[0.0] * 3]] * 2,
    )
    found = compute_returns(group, 3, 1.0)
    assert found.act_T.tolist() == [-2.0, -3.0] and found.latent_TG.tolist() == [[-1.0], [-2.0]]


def test_mean_return_is_per_token_and_line():
    """Lines of 2 tokens: (-2/2) + 0.5 * (-4/2) = -2; with the latent (-1/2) + 0.5 * (-2/2) = -1."""
    group = group_of(
        document_of(".", "|", "|"), [0.0, -2.0, -4.0], [0.0] * 3, [[[-1.0, -2.0]], [[0.0, 0.0]]], [[[0.0, 0.0]]] * 2
    )
    found = compute_returns(group, 2, 0.5, "mean")
    assert found.act_T.tolist() == [-2.0, -2.0] and float(found.latent_TG[0, 0]) == -1.0


# ---- advantages, gate ----


def test_advantages_of_the_elbo_by_hand():
    """Returns 1, 2 and 6 against the means of the others 4, 3.5 and 1.5; thinking half of the time halves them. The
    penalty cancels."""
    gain, always = torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(1)
    assert advantages(gain, always, 0.5, "elbo").tolist() == [[-3.0, -1.5, 4.5]]
    assert advantages(gain, always / 2, 7.0, "elbo").tolist() == [[-1.5, -0.75, 2.25]]
    assert joint_gain(gain, "elbo").tolist() == [3.0]
    assert gate_slope(gain, torch.tensor([-1.0]), 0.5, "elbo").tolist() == [2.5]


def test_gate_slope_by_hand():
    """Gains log 4 and minus infinity, no cost: e^m = (4 + 0) / 2 = 2, so at p = 1/2 the slope is (2 - 1) / (1/2 + 1) =
    2/3; in the log-odds 1/6, which is the posterior 2/3 less the prior 1/2. A cost of log 2 makes e^m = 1: nothing to
    gain. Where P(think) is 0 and thinking pays without bound, the slope is finite."""
    gain, half = torch.tensor([[math.log(4), -math.inf]]), torch.tensor([0.5]).log()
    assert gate_slope(gain, half, 0.0).tolist() == pytest.approx([2 / 3])
    assert gate_slope(gain, half, LOG2).tolist() == pytest.approx([0.0], abs=1e-6)
    assert math.isfinite(float(gate_slope(torch.tensor([[900.0, 900.0]]), torch.tensor([-math.inf]), 0.0)))


def test_how_often_an_e_step_thinks():
    """(1 - 0.1) 0.5 + 0.1 = 0.55, and 0.1 where the gate says never."""
    found = explored(torch.tensor([math.log(0.5), -math.inf]), 0.1)
    assert found.tolist() == pytest.approx([0.55, 0.1])


def test_the_anchor_of_a_held_gate_by_hand():
    """KL(1/2 || 1/4) = 1/2 log 2 + 1/2 log(2/3), 0 at the start's own gate; its slope in the log-odds w is
    p - p_start: sigmoid(w) = 1/4 against 1/2 gives -1/4, and 1e-6 against 1/2 still -1/2."""
    p = torch.tensor([0.25, 0.5, 1e-6])
    w = torch.logit(p).requires_grad_()
    anchor = gate_anchor(torch.nn.functional.logsigmoid(w), torch.full((3,), math.log(0.5)))
    assert anchor[:2].tolist() == pytest.approx([0.5 * LOG2 + 0.5 * math.log(2 / 3), 0.0], abs=1e-6)
    (slope,) = torch.autograd.grad(anchor.sum(), w)
    torch.testing.assert_close(slope, p - 0.5, atol=1e-5, rtol=0)


def logps_of(gate_T, token_n, branch_n) -> PolicyLogProbs:
    return PolicyLogProbs(gate_T, token_n, branch_n)


def test_the_gates_gradient_is_that_of_the_multi_sample_bound():
    """log[(1-p) exp(G_act) + p mean_g exp(G_g - c)], differentiated by autograd through p = sigmoid(w); in the
    log-odds it is the posterior of thinking, with which annotation resamples, less p."""
    torch.manual_seed(0)
    w = torch.randn(5, requires_grad=True, dtype=torch.double)
    returns, c = Returns(torch.randn(5).double(), torch.randn(5, 3).double()), 0.2
    log_p, log_q = torch.nn.functional.logsigmoid(w), torch.nn.functional.logsigmoid(-w)
    mean = torch.logsumexp(returns.latent_TG - c, 1) - math.log(3)
    (wanted,) = torch.autograd.grad(torch.logaddexp(log_q + returns.act_T, log_p + mean).sum(), w, retain_graph=True)
    slope = gate_slope(returns.gain_TG, log_p.detach(), c)
    none = torch.zeros(0, dtype=torch.double)
    terms = EStepTerms(slope, torch.zeros(5, 3).double(), torch.ones(5).double(), torch.zeros(5))
    loss, _ = estep_loss(terms, logps_of(log_p, none, none.long()))
    (found,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(-found, wanted)
    posterior = resampling_logits(returns.act_T, returns.latent_TG - c, log_p.detach()).softmax(1)[:, 1:].sum(1)
    torch.testing.assert_close(-found, posterior - log_p.detach().exp())


def test_an_even_chance_keeps_the_gate_open_where_the_mean_gain_closes_it():
    """Single latents that bring +3 and -3.3 nats, half and half: the mean gain is -0.15, whose gate ends at 0. With
    e^3 - 1 = 19.09 and e^-3.3 - 1 = -0.963 the bound's slopes balance where 19.09 / (1 + 19.09 p) = 0.963 /
    (1 - 0.963 p), that is 19.09 - 18.38 p = 0.963 + 18.38 p, p = 0.493."""
    gain = torch.tensor([[3.0], [-3.3]])

    def slope(p: float) -> float:
        return float(gate_slope(gain, torch.full((2,), math.log(p)), 0.0).sum())

    assert slope(0.47) > 0 > slope(0.51) and float(gain.mean()) < 0


def test_estep_loss_by_hand():
    """One boundary, p = 1/2, slope 2; two latents of 2 and 1 symbols, advantages 3 and -1, weight 1.

    gate: -0.5 * 2 = -1. policy: -(3 * (-1 - 2) + -1 * -4) / 2 = 2.5. Sum over boundaries, mean over latents.
    """
    terms = EStepTerms(torch.tensor([2.0]), torch.tensor([[3.0, -1.0]]), torch.ones(1), torch.zeros(1))
    logps, branch = torch.tensor([-1.0, -2.0, -4.0]), torch.tensor([0, 0, 1])
    live = logps_of(torch.tensor([-LOG2]), logps, branch)
    loss, parts = estep_loss(terms, live)
    assert float(parts["gate"]) == pytest.approx(-1) and float(parts["policy"]) == pytest.approx(2.5)
    assert float(loss) == pytest.approx(1.5)
    # KL: k3 of equal log-probs is 0.
    same, _ = estep_loss(terms, live, 1.0, live)
    assert float(same) == pytest.approx(1.5)
    # Reference one symbol at half its probability: r = 1/2, k3 = 1/2 - 1 + log 2, over 2 latents.
    far = replace(live, token_n=logps - torch.tensor([LOG2, 0, 0]))
    other, parts = estep_loss(terms, live, 0.1, far)
    assert float(parts["kl"]) == pytest.approx((LOG2 - 0.5) / 2)
    assert float(other) == pytest.approx(1.5 + 0.05 * (LOG2 - 0.5))
    # Latents that are written half as often have half the KL.
    halved = replace(terms, weight_T=torch.tensor([0.5]))
    assert float(estep_loss(halved, live, 0.1, far)[1]["kl"]) == pytest.approx((LOG2 - 0.5) / 4)


def latent_gradient(logits, draw, advantage_TG):
    """What the loss adds to the logits of latents of one symbol."""
    none = torch.zeros(1, dtype=torch.double)
    terms = EStepTerms(none, advantage_TG, none, none)
    loss, _ = estep_loss(terms, logps_of(none - 1, logits.log_softmax(-1)[draw], torch.arange(len(draw))))
    return -torch.autograd.grad(loss, logits)[0]


REWARD = torch.tensor([1.0, -2.0, 0.5], dtype=torch.double)


def test_with_the_elbo_latents_ascend_the_expected_reward():
    """A bandit with 3 latents of one symbol and G = 2: averaging the loss over all 9 draws with their probabilities
    gives exactly d/dlogits of p sum_a pi(a) R(a), since the baseline does not depend on the draw it is taken off."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.double, requires_grad=True)
    pi, p = logits.softmax(-1), torch.tensor([0.3], dtype=torch.double)
    (wanted,) = torch.autograd.grad(p * (pi * REWARD).sum(), logits, retain_graph=True)
    total = torch.zeros(3, dtype=torch.double)
    for draw in map(torch.tensor, itertools.product(range(3), repeat=2)):
        advantage = advantages(REWARD[draw][None] - 0.7, p, 0.2, "elbo")
        total += float(pi.detach()[draw].prod()) * latent_gradient(logits, draw, advantage)
    torch.testing.assert_close(total, wanted)


@pytest.mark.parametrize("think", [0.3, 0.999, 1e-6])
def test_with_the_multi_sample_bound_latents_ascend_its_importance_weighted_form(think):
    """Over all 9 draws the gradient is that of E_q[log((1-p) + p mean_g pi(z_g) / q(z_g) exp(gain_g - c))] in pi where
    q = pi is what has drawn them: that of the likelihood of the lines, as G grows; the baselines add up to nothing."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.double, requires_grad=True)
    pi, p, c = logits.softmax(-1), torch.tensor([think], dtype=torch.double), 0.2
    total, bound = torch.zeros(3, dtype=torch.double), torch.zeros((), dtype=torch.double)
    for draw in map(torch.tensor, itertools.product(range(3), repeat=2)):
        chance = float(pi.detach()[draw].prod())
        ratio = (pi / pi.detach())[draw]
        bound = bound + chance * torch.log(1 - p[0] + p[0] * (ratio * (REWARD[draw] - c).exp()).mean())
        total += chance * latent_gradient(logits, draw, advantages(REWARD[draw][None], p, c))
    (wanted,) = torch.autograd.grad(bound, logits)
    torch.testing.assert_close(total, wanted)


def test_where_all_latents_harm_the_least_harmful_wins_hardly_anything():
    """P(think) = 0.07; gains -0.05 of a bland phrase and -3 of three others: the ELBO gives it 0.07 * 2.95 = 0.2065,
    the bound 4 r - R with 4 r = 0.07 * 0.951 / (0.93 + 0.07 * 0.275) = 0.0701 and R = 0.07 * 0.0498 / (0.93 + 0.07 *
    0.0498) = 0.0037. Where one of four is right by 3.6 nats and it thinks more often than not, 4 r = 0.57 * 36.6 /
    (0.43 + 0.57 * 9.18) = 3.68."""
    harm, think = torch.tensor([[-0.05, -3.0, -3.0, -3.0]]), torch.tensor([0.07])
    assert float(advantages(harm, think, 0.0, "elbo")[0, 0]) == pytest.approx(0.2065, abs=1e-4)
    assert float(advantages(harm, think, 0.0)[0, 0]) == pytest.approx(0.0701 - 0.0037, abs=2e-4)
    help_, often = torch.tensor([[3.6, -3.3, -3.3, -3.3]]), torch.tensor([0.57])
    assert float(advantages(help_, often, 0.0)[0, 0]) == pytest.approx(3.68 - 0.047, abs=2e-2)


@pytest.mark.parametrize("objective", ["elbo", "multi_sample"])
@pytest.mark.parametrize("exploration", [0.0, 0.1])
def test_drawn_boundaries_give_the_gradient_of_all(exploration, objective):
    """Two boundaries of which one is tried, in proportion to how often the E-step thinks there: over both draws gates
    and latents get the gradient of trying both."""
    torch.manual_seed(0)
    w = torch.tensor([0.2, -1.5], dtype=torch.double, requires_grad=True)
    logits = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    gain = torch.randn(2, 3, dtype=torch.double)
    log_p = torch.nn.functional.logsigmoid(w).detach()
    think = explored(log_p, exploration)
    probs = torch.tensor(inclusion_probs(think.numpy(), 1))
    assert probs.tolist() == pytest.approx((think / think.sum()).tolist())

    def gradient(where: list[int], weight_T: torch.Tensor):
        slope = weight_T * gate_slope(gain[where], log_p[where], 0.1, objective)
        advantage = weight_T[:, None] * advantages(gain[where], think[where], 0.1, objective)
        symbols = logits.log_softmax(-1)[where].flatten()
        live = logps_of(torch.nn.functional.logsigmoid(w)[where], symbols, torch.arange(len(symbols)))
        loss, _ = estep_loss(EStepTerms(slope, advantage, weight_T, torch.zeros(len(where))), live)
        return torch.autograd.grad(loss, (w, logits))

    wanted = gradient([0, 1], torch.ones(2, dtype=torch.double))
    drawn = [gradient([t], 1 / probs[t : t + 1]) for t in range(2)]
    for part, pieces in zip(wanted, zip(*drawn, strict=True), strict=True):
        torch.testing.assert_close(sum(probs[t] * piece for t, piece in enumerate(pieces)), part)


# ---- KL ----


def test_the_kl_estimator_is_never_negative_and_unbiased():
    """k3 = r - 1 - log r with r = ref / pi; its mean under pi is sum pi log(pi / ref), by enumeration of 3 symbols."""
    pi, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    terms = EStepTerms(torch.zeros(1), torch.zeros(1, 1), torch.ones(1), torch.zeros(1))
    mean = 0.0
    for symbol in range(3):
        logps, ref_logps = pi[symbol : symbol + 1].log(), ref[symbol : symbol + 1].log()
        live = logps_of(torch.tensor([-1.0]), logps, torch.tensor([0]))
        _, parts = estep_loss(terms, live, 1.0, replace(live, token_n=ref_logps))
        assert float(parts["kl"]) > 0
        mean += float(pi[symbol]) * float(parts["kl"])
    assert mean == pytest.approx(float((pi * (pi / ref).log()).sum()), abs=1e-6)


# ---- next tokens ----


def test_next_token_loss_by_hand():
    """Code tokens cost 1 and 3, a latent token 5; the window has 6 tokens in all, so the loss is 9 / 6."""
    loss, parts = next_token_loss(torch.tensor([-1.0, -5.0, -3.0]), torch.tensor([False, True, False]), 6)
    assert float(loss) == 1.5
    assert {k: float(v) for k, v in parts.items()} == {
        "code_sum": 4,
        "code_count": 2,
        "latent_sum": 5,
        "latent_count": 1,
    }


# ---- bounds, resampling: a world of one line and two latents, all of it enumerable ----

P_THINK = 0.4
P_LATENT = (0.7, 0.3)
P_LINE_ACT = 0.2  # P(line | act)
P_LINE = (0.1, 0.8)  # P(line | z)
P_AGAIN = 0.25  # P(think again | z): the raw line under z has 3/4 of P(line | z)


def world(latents: tuple[int, ...], first_line: float = -1.5) -> RolloutGroup:
    lines = [[[math.log(P_LINE[z] * (1 - P_AGAIN))] for z in latents]]
    raw = math.log(P_LINE_ACT * (1 - P_THINK))
    return group_of(document_of(".", "|"), [first_line, raw], [0.0, P_THINK], lines, [[[P_AGAIN]] * len(latents)])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_bounds_are_ordered_and_below_the_exact_log_likelihood(count):
    """Exact: log[(1-p) P(a|act) + p sum_z P(z) P(a|z)] = log[0.6 * 0.2 + 0.4 * (0.07 + 0.24)] = log 0.244."""
    exact = -1.5 + math.log(
        (1 - P_THINK) * P_LINE_ACT + P_THINK * sum(p * q for p, q in zip(P_LATENT, P_LINE, strict=True))
    )
    assert exact == pytest.approx(-1.5 + math.log(0.244))
    elbo = multi = 0.0
    for draw in itertools.product(range(2), repeat=count):
        bounds = code_bounds(world(draw))
        probability = math.prod(P_LATENT[z] for z in draw)
        elbo += probability * bounds.elbo
        multi += probability * bounds.multi_sample
        # Jensen, draw by draw
        assert bounds.elbo <= bounds.multi_sample + 1e-6
        # log likelihood without latents: -1.5 + log 0.12, raw; four tokens of code
        assert bounds.log_likelihood == pytest.approx(-1.5 + math.log(0.12)) and bounds.tokens == 4
    # ELBO = -1.5 + 0.6 log 0.2 + 0.4 (0.7 log 0.1 + 0.3 log 0.8), whatever the count
    assert elbo == pytest.approx(
        -1.5 + 0.6 * math.log(0.2) + 0.4 * (0.7 * math.log(0.1) + 0.3 * math.log(0.8)), abs=1e-5
    )
    assert elbo < multi < exact


def test_the_multi_sample_bound_grows_with_samples():
    expected = []
    for count in (1, 2, 4, 6):
        draws = itertools.product(range(2), repeat=count)
        expected.append(sum(math.prod(P_LATENT[z] for z in d) * code_bounds(world(d)).multi_sample for d in draws))
    assert expected == sorted(expected) and expected[-1] - expected[0] > 0.05


def test_bounds_count_code_once_and_neither_comments_nor_untried_lines_twice():
    """Lines a(-1) # (-9) c(-2) |d(-3, tried) |e(-4, not tried): without latents 1 + 2 + 3 + 4 = 10 nats, 8 tokens.

    At d: p = 1/2, raw -3 = log(1/2) + act, so act = -3 + log 2; the latent gives -1: ELBO there
    0.5 (-3 + log 2) + 0.5 * -1.
    """
    group = group_of(
        document_of(".", "#", ".", "|", "|"),
        [-1.0, -9.0, -2.0, -3.0, -4.0],
        [0, 0, 0, 0.5, 0.9],
        [[[-1.0]]],
        [[[0.0]]],
        boundaries=(3,),
    )
    bounds = code_bounds(group)
    assert bounds.log_likelihood == pytest.approx(-10) and bounds.tokens == 8
    assert bounds.elbo == pytest.approx(-7 + 0.5 * (-3 + LOG2) - 0.5)
    assert bounds.multi_sample == pytest.approx(-7 + math.log(math.exp(-3) + 0.5 * math.exp(-1)))
    # Only the line itself counts, also when more lines were scored.
    longer = group_of(
        group.document,
        [-1.0, -9.0, -2.0, -3.0, -4.0],
        [0, 0, 0, 0.5, 0.9],
        [[[-1.0, -77.0]]],
        [[[0.0, 0.0]]],
        boundaries=(3,),
    )
    assert code_bounds(longer) == bounds
    # Tried once in two times it stands for two: the change from the -10 counts twice.
    twice = code_bounds(group, torch.tensor([2.0]))
    assert twice.elbo == pytest.approx(-10 + 2 * (bounds.elbo + 10)) and twice.log_likelihood == pytest.approx(-10)
    nothing = RolloutGroup(
        group.document, (), (), group.line_logps_A, group.gate_logps_A, torch.zeros(0, 0, 0), torch.zeros(0, 0, 0)
    )
    assert code_bounds(nothing).elbo == code_bounds(nothing).multi_sample == pytest.approx(-10)


def test_resampling_weights_are_the_posterior():
    """Prior rho = 0.4 on thinking, the two latents drawn once each count half: the posterior of {act, z0, z1} is
    proportional to 0.6 * 0.2 = 0.12, 0.2 * 0.1 = 0.02 and 0.2 * 0.8 = 0.16; of 0.30 that is 0.4, 1/15, 8/15."""
    returns = compute_returns(world((0, 1)), 1, 1.0)
    logits = resampling_logits(returns.act_T, returns.latent_TG, torch.tensor([math.log(P_THINK)]))
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[0.4, 1 / 15, 8 / 15]]), atol=1e-6, rtol=0)


def test_resampling_from_many_draws_finds_the_true_posterior():
    """Latents drawn from P(z) = (0.7, 0.3), here exactly 7 and 3 of 10: P(act), P(z0), P(z1) given the line are
    0.12, 0.4 * 0.07 = 0.028 and 0.4 * 0.24 = 0.096 over 0.244."""
    draw = (0,) * 7 + (1,) * 3
    returns = compute_returns(world(draw), 1, 1.0)
    weights = resampling_logits(returns.act_T, returns.latent_TG, torch.tensor([math.log(P_THINK)])).softmax(-1)[0]
    found = [float(weights[0]), float(weights[1:8].sum()), float(weights[8:].sum())]
    assert found == pytest.approx([0.12 / 0.244, 0.028 / 0.244, 0.096 / 0.244], abs=1e-5)
