"""examples/theory_tabular.py: its processes against plain simulation, and what its pictures claim."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("theory_tabular", ROOT / "examples" / "theory_tabular.py")
theory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theory)


def test_an_option_is_worth_what_following_it_earns():
    """Rewards and kernels in closed form against 20,000 walks from one state: each walk earns at most 1 a step over
    some 4 steps, so its mean has a standard error below 4 / sqrt(20,000) = 0.03."""
    rng = np.random.default_rng(0)
    transitions, rewards = theory.random_process(rng, states=6, actions=2)
    policy = np.array([[0, 1, 0, 1, 1, 0]])
    option = theory.make_options(transitions, rewards, policy, duration=4)
    earned, ended = np.zeros(20_000), np.zeros(6)
    for walk in range(20_000):
        state, discount = 2, 1.0
        while True:
            earned[walk] += discount * rewards[policy[0, state], state]
            state = rng.choice(6, p=transitions[policy[0, state], state])
            discount *= theory.GAMMA
            if rng.random() < 1 / 4:
                ended[state] += discount / 20_000
                break
    assert earned.mean() == pytest.approx(option.rewards[0, 2], abs=0.03)
    assert ended == pytest.approx(option.kernels[0, 2], abs=0.02)


def test_an_option_of_one_step_is_an_action():
    """E[gamma^tau] = gamma / d / (1 - gamma (1 - 1/d)) for a mean of d steps, which is gamma for d = 1."""
    transitions, rewards = theory.random_process(np.random.default_rng(1), states=5, actions=3)
    options = theory.make_options(transitions, rewards, np.full((1, 5), 2), duration=1)
    assert options.rewards[0] == pytest.approx(rewards[2]) and options.gbar == pytest.approx(theory.GAMMA)
    longer = theory.make_options(transitions, rewards, np.full((1, 5), 2), duration=8)
    assert longer.gbar == pytest.approx(theory.GAMMA / 8 / (1 - theory.GAMMA * 7 / 8))


@pytest.mark.parametrize("seed", [1, 2])
def test_longer_options_converge_sooner_within_the_bound(seed):
    rows = theory.convergence(seed)
    iterations = [row["iterations"] for row in rows]
    assert all(row["iterations"] <= np.ceil(row["bound"]) for row in rows)
    assert all(2 * later < 1.3 * sooner for sooner, later in zip(iterations, iterations[1:], strict=False))


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_regret_is_least_in_between(seed):
    """Pruning's falls and learning's rises with the size, so that the sum is least at neither end."""
    rows = theory.regret(seed)
    pruning, learning, total = ([row[name] for row in rows] for name in ("pruning", "learning", "total"))
    assert pruning == sorted(pruning, reverse=True) and learning == sorted(learning)
    assert pruning[-1] == pytest.approx(0, abs=1e-6) and learning[0] == pytest.approx(0, abs=1e-6)
    assert min(total) < 0.7 * min(total[0], total[-1])


def test_demonstrations_stay_below_the_bound():
    rows = theory.pruning(1, runs=20, counts=(64,), sizes=(2, 8))
    few, many = (row["demonstrations"] for row in rows)
    assert few < many and all(row["demonstrations"] <= row["bound"] for row in rows)


def test_a_pruned_set_solves_every_task():
    rng = np.random.default_rng(0)
    solved = theory.draw_tasks(rng, np.array([3, 7]), 20, 50, luck=0.05)
    assert solved[:, theory.prune(solved)].any(1).all()


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = theory.pruning(1, runs=4, counts=(64, 1024), sizes=(2, 4))
    regrets = [{"size": n, "pruning": 8 / n, "learning": n / 8, "total": 8 / n + n / 8} for n in (1, 8, 64)]
    theory.draw(theory.convergence(1), regrets, rows, str(tmp_path / "theory.png"))
    assert (tmp_path / "theory.png").stat().st_size > 20_000
