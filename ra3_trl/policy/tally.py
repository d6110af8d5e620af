"""What became of proposed latents: how many, why not, what they brought, and the ends of the list to be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


EDGES = (-8.0, -4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # nats
EXAMPLES = 10


@dataclass
class Tally:
    """Counts over texts.

    `proposed = kept + what was dropped`; `none` are places for which there was no proposal to begin with. `gains` are
    nats that a latent brings over the horizon's lines, the penalty not yet paid: counts below the first of `EDGES`,
    between them, and from the last on.
    """

    texts: int = 0
    proposed: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    none: Counter[str] = field(default_factory=Counter)
    gains: list[int] = field(default_factory=lambda: [0] * (len(EDGES) + 1))
    total: float = 0.0
    examples: list[dict[str, Any]] = field(default_factory=list)  # by gain, at most 2 * EXAMPLES

    def drop(self, reason: str, count: int = 1) -> None:
        """Counts proposals that were not placed."""
        if count:
            self.dropped[reason] += count

    def score(self, gain: float, comment: str, line: str, kept: bool) -> None:
        """Counts what a proposal brought, and keeps it as an example if it is at one of the ends."""
        self.gains[sum(gain >= edge for edge in EDGES)] += 1
        self.total += gain
        example = {"gain": gain, "comment": comment, "line": line, "kept": kept}
        ordered = sorted([*self.examples, example], key=lambda one: one["gain"])
        self.examples = ordered if len(ordered) <= 2 * EXAMPLES else ordered[:EXAMPLES] + ordered[-EXAMPLES:]

    def report(self) -> dict[str, Any]:
        """Plain values: `texts`, `proposed`, `kept`, `dropped` and `none` by reason, `mean_gain`, `gains` (`edges` and
        `counts`), and the `best` and `worst` examples."""
        scored = sum(self.gains)
        best = self.examples[::-1][:EXAMPLES]
        return {
            "texts": self.texts,
            "proposed": self.proposed,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "none": dict(self.none.most_common()),
            "mean_gain": self.total / scored if scored else None,
            "gains": {"edges": list(EDGES), "counts": list(self.gains)},
            "best": best,
            "worst": self.examples[: min(EXAMPLES, len(self.examples) - len(best))],
        }
