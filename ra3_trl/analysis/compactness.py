"""How many different decisions there are (PAPER, the theorem on pruning: few good ones need few demonstrations)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean


def entropy(items: Sequence[Hashable]) -> float:
    """Estimates the entropy in nats of the distribution that the items were drawn from, by Miller and Madow: what is
    seen, plus (kinds - 1) / 2n for what is not. It is too small where most items were seen once.

    >>> round(entropy("abab"), 4)  # log 2 + 1 / 8
    0.8181
    """
    counts = Counter(items).values()
    n = len(items)
    seen = -sum(count / n * math.log(count / n) for count in counts)
    return seen + (len(counts) - 1) / (2 * n)


def effective_numbers(
    kinds: Mapping[str, Sequence[Hashable]], seed: int = 0, rounds: int = 100
) -> dict[str, dict[str, float]]:
    """Estimates entropy and effective number of each kind of item that was drawn, at equal numbers of draws: a larger
    sample has more kinds. The means are over `rounds` random subsets; kinds without any item are left out.

    Returns:
        `dict`: for each kind `entropy` (nats), `effective` (its exponential), `distinct` (kinds seen over draws) and
        `draws`. Where `distinct` is near 1 nothing was seen twice, and entropy tells the sample's size and no more.
    """
    samples = {name: list(items) for name, items in kinds.items() if len(items)}
    draws, rng = min(map(len, samples.values()), default=0), random.Random(seed)
    numbers = {}
    for name, items in samples.items():
        subsets = [rng.sample(items, draws) for _ in range(rounds if len(items) > draws else 1)]
        value = fmean(map(entropy, subsets))
        distinct = fmean(len(set(subset)) / draws for subset in subsets)
        numbers[name] = {"entropy": value, "effective": math.exp(value), "distinct": distinct, "draws": draws}
    return numbers


def shares(texts: Mapping[str, float]) -> tuple[float, str, float]:
    """Computes of latents, counted by what they say, the share of different ones, the most frequent, and its share.

    >>> shares({"# simple step": 3, "# 7*4=8": 1})
    (0.5, '# simple step', 0.75)
    """
    written = sum(texts.values())
    most_frequent = max(texts, key=lambda text: texts[text])
    return len(texts) / written, most_frequent, texts[most_frequent] / written
