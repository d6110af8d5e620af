"""Means over seeds with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


# 97.5 % quantiles of Student's t for 1 to 19 degrees of freedom; beyond, 1.96 + 2.4 / df is within 0.003.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093)  # fmt: skip


def t_quantile(df: int) -> float:
    """Gives the 97.5 % quantile of Student's t with `df` degrees of freedom, at least 1, within 0.003."""
    return _T[df - 1] if df <= len(_T) else 1.96 + 2.4 / df


@dataclass(frozen=True)
class Estimate:
    """Holds a mean over seeds with its 95 % interval by Student's t, and what was seen."""

    mean: float | None  # of the values that are not `None`; `None` if there are none
    low: float | None  # the interval; `None` for fewer than two values
    high: float | None
    n: int  # values in the mean
    values: tuple[float | None, ...]  # one a seed; `None` stands for "never reached" or "not measured"

    @classmethod
    def of(cls, values: Sequence[float | None], share: bool = False) -> Estimate:
        """Estimates from one value a seed; `None` is in no mean and is counted by `len(values) - n`.

        The interval of a `share` ends at 0 and 1: what lies beyond holds no share, so that it is as sure as before.

        >>> estimate = Estimate.of([1.0, None, 3.0])  # half of it is 12.706 * sqrt(2) / sqrt(2)
        >>> estimate.mean, round(estimate.low, 3), round(estimate.high, 3), estimate.n
        (2.0, -10.706, 14.706, 2)
        """
        seen = [value for value in values if value is not None]
        n = len(seen)
        mean = sum(seen) / n if seen else None
        if mean is None or n == 1:
            return cls(mean, None, None, n, tuple(values))
        deviation = math.sqrt(sum((value - mean) ** 2 for value in seen) / (n - 1))
        half = t_quantile(n - 1) * deviation / math.sqrt(n)
        low, high = mean - half, mean + half
        if share:
            low, high = max(low, 0.0), min(high, 1.0)
        return cls(mean, low, high, n, tuple(values))
