"""pass@k without bias (Chen et al. 2021, https://huggingface.co/papers/2107.03374), and intervals for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimates the chance that of `k` samples, drawn without replacement from `n`, at least one is correct.

    This is `1 - C(n - c, k) / C(n, k)` (equation 1), as a product that can't overflow.

    Args:
        n (`int`):
            Samples of a problem.
        c (`int`):
            Those that passed.
        k (`int`):
            Samples drawn.

    Raises:
        `ValueError`: unless `0 <= c <= n` and `1 <= k <= n`.

    Example:

    ```python
    >>> pass_at_k(4, 1, 2)  # 3 of the 6 pairs hold the one that passed
    0.5
    ```
    """
    if not 0 <= c <= n:
        raise ValueError(f"`c` is {c} of `n` = {n} samples; between none and all of them can pass.")
    if not 1 <= k <= n:
        raise ValueError(f"`k` is {k} with `n` = {n} samples; draw at least 1 and at most {n}, or take more samples.")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def estimate(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Averages [`pass_at_k`] over problems, of each of which `counts` has the samples and those that passed.

    Raises:
        `ValueError`: for no problems, or one with fewer than `k` samples.
    """
    if not counts:
        raise ValueError("`counts` is empty; there is no mean over no problems.")
    return float(np.mean([pass_at_k(n, c, k) for n, c in counts]))


def share_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Computes Wilson's interval of a mean of shares, such as a model's pass@k over problems.

    It stays within 0 and 1, and says something where no problem or each is solved, of which a bootstrap makes an
    interval without width. It is meant for one sample a problem; where values lie between 0 and 1 it is too wide, if
    anything, since none spread more than zeros and ones of the same mean do.

    Args:
        values (`np.ndarray`):
            A share for each problem, shape `[problems]`.
        level (`float`, *optional*, defaults to `0.95`):
            How often the interval holds the mean over all such problems.

    Raises:
        `ValueError`: for no values, values outside 0 to 1 or not in one row, or a `level` out of range.

    Example:

    ```python
    >>> [round(end, 3) for end in share_interval(np.zeros(10))]  # up to z^2 / (10 + z^2) with z = 1.96
    [0.0, 0.278]
    ```
    """
    values = _checked(values, level)
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"`values` go from {values.min()} to {values.max()}; give shares between 0 and 1.")
    mean, weight = float(values.mean()), NormalDist().inv_cdf((1 + level) / 2) ** 2 / values.size
    middle = (mean + weight / 2) / (1 + weight)
    half = math.sqrt(weight * mean * (1 - mean) + weight**2 / 4) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def _checked(values: np.ndarray, level: float) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"`values` has the shape {values.shape}; give one finite number for each problem.")
    if not 0 < level < 1:
        raise ValueError(f"`level` is {level}; give a share between 0 and 1.")
    return values


def bootstrap_interval(
    values: np.ndarray, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Computes the percentile bootstrap interval of the mean: how far it might be from that over other problems.

    Noise of the samples is in it, since each problem's value carries its own.

    Args:
        values (`np.ndarray`):
            A value for each problem, shape `[problems]`.
        seed (`int`, *optional*, defaults to `0`):
            Of the resampling.
        resamples (`int`, *optional*, defaults to `10000`):
            Draws, with replacement, of as many problems as there are.
        level (`float`, *optional*, defaults to `0.95`):
            Share of the draws inside.

    Raises:
        `ValueError`: for no values, values that are not finite or not in one row, or a setting out of range.
    """
    values = _checked(values, level)
    if resamples < 1:
        raise ValueError(f"`resamples` is {resamples}; draw at least once.")
    draws = np.random.default_rng(seed)
    # One draw at a time: all at once would be [resamples, problems], 40 MB for MBPP.
    means = [values[draws.integers(values.size, size=values.size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(
    a: np.ndarray, b: np.ndarray, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Computes the interval of `mean(b) - mean(a)` as [`bootstrap_interval`], both over the same drawn problems.

    What makes a problem hard for both cancels, so this is narrower than two intervals side by side. `a` and `b` have
    a share for each problem, in the same order. Where they differ by the same everywhere, a bootstrap would be sure:
    other problems may differ otherwise, but in no larger share of them than Wilson's bound for none of so many
    ([`share_interval`]), and by no more than 1.

    Raises:
        `ValueError`: if the numbers of problems differ, and what [`bootstrap_interval`] raises.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"`a` has the shape {a.shape} and `b` {b.shape}; compare values of the same problems.")
    differences = b - a
    if differences.size and np.ptp(differences) < 1e-12:
        most = share_interval(np.zeros(differences.size), level)[1]
        return max(differences[0] - most, -1.0), min(differences[0] + most, 1.0)
    return bootstrap_interval(differences, seed, resamples, level)
