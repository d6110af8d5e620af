"""How many different decisions there are (PAPER, the theorem on pruning: few good ones need few demonstrations)."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean


def entropy(items: Sequence[Hashable]) -> float:
    """Entropy in nats of the distribution that the items were drawn from, by Miller and Madow: what is seen, plus
    (kinds - 1) / 2n for what is not. It is too small where most items were seen once."""
    counts = Counter(items).values()
    n = len(items)
    seen = -sum(count / n * math.log(count / n) for count in counts)
    return seen + (len(counts) - 1) / (2 * n)


def effective_numbers(
    kinds: Mapping[str, Sequence[Hashable]], seed: int = 0, rounds: int = 100
) -> dict[str, dict[str, float]]:
    """Entropy and effective number of each kind of item, at equal numbers of draws: a larger sample has more kinds.

    Args:
        kinds (`Mapping[str, Sequence[Hashable]]`):
            What was drawn; kinds without any are left out.
        seed (`int`, *optional*, defaults to `0`), rounds (`int`, *optional*, defaults to `100`):
            Of the subsets that the means are over.

    Returns:
        `dict`: for each kind `entropy` (nats), `effective` (its exponential), `distinct` (kinds seen over draws) and
        `draws`. Where `distinct` is near 1 nothing was seen twice, and entropy tells the sample's size and no more.
    """
    kinds = {name: list(items) for name, items in kinds.items() if len(items)}
    if not kinds:
        return {}
    draws, rng = min(map(len, kinds.values())), random.Random(seed)
    found = {}
    for name, items in kinds.items():
        parts = [rng.sample(items, draws) for _ in range(rounds if len(items) > draws else 1)]
        value = fmean(map(entropy, parts))
        distinct = fmean(len(set(part)) / draws for part in parts)
        found[name] = {"entropy": value, "effective": math.exp(value), "distinct": distinct, "draws": draws}
    return found
