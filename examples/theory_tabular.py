"""
What the paper's theory says of compact and long-lasting actions, checked where all can be computed: in small random
Markov decision processes with options.

```
python examples/theory_tabular.py --output theory.png
```

1. Convergence. Value iteration over options contracts by gbar = sup E[gamma^tau], so it is eps-optimal after
   N = log(R_max / (eps (1 - gbar))) / (1 - gbar) iterations. The longer options last, the smaller gbar.
2. Regret. Of RL within a pruned set of actions the regret is that of pruning plus that of RL in what is left. With so
   many trials and no more, a small set has little of the second, a large one little of the first.
3. Pruning. Any set of k actions that holds a good one for each of |D| expert tasks fails on at most a share sigma of
   new tasks, with probability 1 - delta, if |D| >= (k log|Z| + log(1/delta)) / sigma: a union bound over the at most
   |Z|^k sets. Few good actions need few demonstrations. (Here a greedy set is kept, which may be a little larger.)

The statements are those of Theorems on regret, pruning and convergence in https://huggingface.co/papers/2509.25810 as
far as they are public; the proofs of 1 and 3 in the lines above are ours. Numbers are printed, checked against the
bounds, and drawn.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np


GAMMA, EPS = 0.98, 0.1


@dataclass(frozen=True)
class Options:
    """Temporally extended actions of one process: `rewards` `[options, states]`, discounted until they end, and
    `kernels` `[options, states, states]`, whose rows sum to E[gamma^tau]."""

    rewards: np.ndarray
    kernels: np.ndarray

    @property
    def gbar(self) -> float:
        return float(self.kernels.sum(-1).max())

    def only(self, chosen: np.ndarray) -> Options:
        return Options(self.rewards[chosen], self.kernels[chosen])

    def values(self, state_values: np.ndarray) -> np.ndarray:
        """`[options, states]`: what an option is worth if the rest is worth `state_values`."""
        return self.rewards + self.kernels @ state_values

    def optimum(self) -> np.ndarray:
        """Values `[states]` of the best policy over these options, to 1e-9."""
        found = np.zeros(self.rewards.shape[1])
        while True:
            found, last = self.values(found).max(0), found
            if np.abs(found - last).max() < 1e-9 * (1 - self.gbar):
                return found

    def worth(self, choice: np.ndarray) -> np.ndarray:
        """Values `[states]` of the policy that takes option `choice[s]` in state `s`, exactly."""
        states = np.arange(len(choice))
        return np.linalg.solve(np.eye(len(choice)) - self.kernels[choice, states], self.rewards[choice, states])


def random_process(rng: np.random.Generator, states: int = 60, actions: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Transitions `[actions, states, states]` to three states each, and rare rewards `[actions, states]`."""
    transitions = np.zeros((actions, states, states))
    for row in transitions.reshape(-1, states):
        row[rng.choice(states, 3, replace=False)] = rng.dirichlet(np.ones(3))
    return transitions, rng.random((actions, states)) * (rng.random((actions, states)) < 0.1)


def make_options(transitions: np.ndarray, rewards: np.ndarray, policies: np.ndarray, duration: float) -> Options:
    """Options that follow a policy of `policies` `[options, states]` and end at each step with chance 1 / duration."""
    ends, states = 1 / duration, np.arange(transitions.shape[-1])
    made = []
    for policy in policies:
        steps = transitions[policy, states]
        rest = np.linalg.inv(np.eye(len(states)) - GAMMA * (1 - ends) * steps)
        made.append((rest @ rewards[policy, states], GAMMA * ends * rest @ steps))
    return Options(*(np.array(part) for part in zip(*made, strict=True)))


def skills(
    rng: np.random.Generator, transitions: np.ndarray, rewards: np.ndarray, count: int, share: float
) -> np.ndarray:
    """Policies `[count, states]`: each does the best thing in a `share` of the states and anything in others."""
    actions, states = rewards.shape
    primitive = Options(rewards, GAMMA * transitions)
    best = primitive.values(primitive.optimum()).argmax(0)
    able = rng.random((count, states)) < share
    return np.where(able, best, rng.integers(actions, size=(count, states)))


def convergence(seed: int) -> list[dict[str, float]]:
    """Iterations until value iteration is within EPS of its optimum, and the bound, by the options' duration."""
    rng = np.random.default_rng(seed)
    transitions, rewards = random_process(rng)
    policies = skills(rng, transitions, rewards, 16, 0.5)
    rows = []
    for duration in (1, 2, 4, 8, 16):
        options = make_options(transitions, rewards, policies, duration)
        optimum, found, iterations = options.optimum(), np.zeros(rewards.shape[1]), 0
        while np.abs(optimum - found).max() > EPS:
            found, iterations = options.values(found).max(0), iterations + 1
        left = 1 - options.gbar
        bound = np.log(options.rewards.max() / (EPS * left)) / left
        assert iterations <= np.ceil(bound), (iterations, bound)
        rows.append({"duration": duration, "gbar": options.gbar, "iterations": iterations, "bound": float(bound)})
    return rows


def regret(seed: int, trials: int = 128, options: int = 64, noise: float = 1.0) -> list[dict[str, float]]:
    """Regret of RL in pruned sets of options, and its two parts, by the size of the set; means over 20 runs.

    RL tries each option equally often in each state, `trials` tries a state in all, sees with noise what it earns, and
    takes the policy that is best for the means. Pruned sets keep the options that an expert uses most.
    """
    rng = np.random.default_rng(seed)
    transitions, rewards = random_process(rng)
    every = make_options(transitions, rewards, skills(rng, transitions, rewards, options, 0.3), 2)
    optimum = every.optimum()
    used = np.bincount(every.values(optimum).argmax(0), minlength=options)
    order = np.argsort(-used, kind="stable")
    rows = []
    for size in (1, 2, 4, 8, 16, 32, 64):
        left = every.only(order[:size])
        best = left.optimum()
        pruning, learning = (optimum - best).mean(), 0.0
        for _ in range(20):
            seen = left.rewards + rng.normal(0, noise / (trials / size) ** 0.5, left.rewards.shape)
            guess = Options(seen, left.kernels)
            reached = left.worth(guess.values(guess.optimum()).argmax(0))
            assert (reached <= best + 1e-6).all() and (best <= optimum + 1e-6).all()  # so both parts are regrets
            learning += (best - reached).mean() / 20
        rows.append({"size": size, "pruning": pruning, "learning": learning, "total": pruning + learning})
    return rows


def draw_tasks(rng: np.random.Generator, good: np.ndarray, options: int, count: int, luck: float) -> np.ndarray:
    """Which options `[count, options]` are near-optimal for each task: one of the `good` ones, others by luck."""
    solved = rng.random((count, options)) < luck
    solved[np.arange(count), rng.choice(good, count)] = True
    return solved


def prune(solved: np.ndarray) -> np.ndarray:
    """A small set of options that holds a near-optimal one for each task: the one that solves most of what is left."""
    chosen, left = [], solved
    while len(left):
        chosen.append(int(left.sum(0).argmax()))
        left = left[~left[:, chosen[-1]]]
    return np.array(chosen)


def pruning(
    seed: int, sigma: float = 0.1, delta: float = 0.05, runs: int = 60, counts=(64, 1024), sizes=(2, 4, 8, 16, 32)
) -> list[dict[str, float]]:
    """Demonstrations until pruned sets fail on at most a share sigma of new tasks in 1 - delta of the runs, and the
    bound, by the number of good options and of all."""
    rows = []
    for options in counts:
        for size in sizes:
            rng = np.random.default_rng([seed, options, size])
            bound = (size * np.log(options) + np.log(1 / delta)) / sigma
            count = 1
            while not _enough(rng, options, size, count, sigma, delta, runs):
                count = int(np.ceil(count * 1.25))
            assert count <= bound, (count, bound)
            rows.append({"options": options, "size": size, "demonstrations": count, "bound": float(bound)})
    return rows


def _enough(rng, options: int, size: int, count: int, sigma: float, delta: float, runs: int) -> bool:
    failed = 0
    for _ in range(runs):
        good = rng.choice(options, size, replace=False)
        kept = prune(draw_tasks(rng, good, options, count, luck=0.02))
        new = draw_tasks(rng, good, options, 1000, luck=0.02)
        failed += (~new[:, kept].any(1)).mean() > sigma
    return failed <= delta * runs


def show(name: str, rows: list[dict[str, float]]) -> None:
    print(f"\n{name}\n" + "".join(f"{key:>16}" for key in rows[0]))
    for row in rows:
        print("".join(f"{value:16.3f}" if isinstance(value, float) else f"{value:16}" for value in row.values()))


def draw(one: list[dict], two: list[dict], three: list[dict], path: str) -> None:
    """The three pictures, side by side."""
    import matplotlib.pyplot as plt  # not needed for the numbers

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    durations = [row["duration"] for row in one]
    left.plot(durations, [row["bound"] for row in one], "--", color="#888888", label="bound")
    left.plot(durations, [row["iterations"] for row in one], "o-", color="#1b6ca8", label="measured")
    left.set(xscale="log", yscale="log", xlabel="mean steps of an option", ylabel="iterations of value iteration",
             title="Long-lasting actions: RL converges sooner")  # fmt: skip
    left.set_xticks(durations, durations)
    left.set_yticks((20, 50, 100, 200), (20, 50, 100, 200))
    sizes = [row["size"] for row in two]
    middle.plot(sizes, [row["pruning"] for row in two], "s-", color="#d1812c", label="of pruning")
    middle.plot(sizes, [row["learning"] for row in two], "^-", color="#1b6ca8", label="of RL in what is left")
    middle.plot(sizes, [row["total"] for row in two], "o-", color="#222222", label="in all")
    middle.set(xscale="log", xlabel="options kept of 64", ylabel="regret",
               title="A compact set: little of both regrets")  # fmt: skip
    middle.set_xticks(sizes, sizes)
    for options, colour in ((64, "#1b6ca8"), (1024, "#d1812c")):
        rows = [row for row in three if row["options"] == options]
        needed = [row["size"] for row in rows]
        right.plot(needed, [row["bound"] for row in rows], "--", color=colour, label=f"bound, {options} options")
        right.plot(needed, [row["demonstrations"] for row in rows], "o-", color=colour, label="measured")
    right.set(xscale="log", yscale="log", xlabel="options that suffice", ylabel="expert demonstrations",
              title="Few good actions: pruned from little data")  # fmt: skip
    right.set_xticks(needed, needed)
    for axes in (left, middle, right):
        axes.minorticks_off()
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="PNG to draw")
    options = parser.parse_args()
    one, two, three = convergence(options.seed), regret(options.seed), pruning(options.seed)
    show("1. Convergence", one)
    show("2. Regret", two)
    show("3. Pruning", three)
    if options.output:
        draw(one, two, three, options.output)


if __name__ == "__main__":
    main()
