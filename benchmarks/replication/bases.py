"""Which bases count: those that can do what is asked of them, in the order of their seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..common import say
from .base import GATE
from .measure import fills, measure
from .records import BaseRecipe, FillRecipe, Fills, MeasureRecipe, Measures
from .store import Store


TRIES = 3  # bases for each one wanted


@dataclass(frozen=True)
class TriedBase:
    """A base and whether it counts; `fills` where it was asked to fill in."""

    recipe: BaseRecipe
    measures: Measures
    passed: bool
    fills: Fills | None = None

    def told(self) -> dict[str, Any]:
        """What it was judged by, and how."""
        row = {"seed": self.recipe.seed, "passed": self.passed, "comment_right": self.measures.comment_right}
        return row | (asdict(self.fills) if self.fills else {})


def seeded(base: BaseRecipe, seed: int) -> BaseRecipe:
    """The base of this seed, which starts from a base of this seed if it starts from one."""
    return replace(base, seed=seed, start=base.start and seeded(base.start, seed))


def find_bases(
    store: Store,
    base: BaseRecipe,
    measured: MeasureRecipe,
    wanted: int,
    gate: tuple[float, float],
    fill: FillRecipe | None = None,
) -> list[TriedBase]:
    """Bases of seeds 0, 1, ... until so many have passed, with those that have not.

    Args:
        gate (`tuple[float, float]`):
            Range of `comment_right` within which a base counts.
        fill ([`FillRecipe`], *optional*):
            Where it must also be right in at least `GATE` of the comments that it fills in.

    Raises:
        `ValueError`: if too few do of `TRIES` for each.
    """
    tried: list[TriedBase] = []
    for seed in range(TRIES * wanted):
        recipe = seeded(base, seed)
        say(f"base {seed}")
        found = measure(store, replace(measured, start=recipe))
        filled = None if fill is None else fills(store, replace(fill, start=recipe))
        passed = gate[0] <= found.comment_right <= gate[1] and (filled is None or filled.filled_right >= GATE)
        tried.append(TriedBase(recipe, found, passed, filled))
        if sum(one.passed for one in tried) == wanted:
            return tried
    passed = sum(one.passed for one in tried)
    filled = "" if fill is None else f" and of at least {GATE:.0%} that they fill in"
    raise ValueError(
        f"{passed} of {len(tried)} bases are right in {gate[0]:.0%} to {gate[1]:.0%} of their comments{filled}; "
        f"{wanted} are wanted: pre-train longer. {[one.told() for one in tried]}"
    )
