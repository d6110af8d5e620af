"""How a language model is asked for comments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


def _option(default: Any, text: str) -> Any:
    """A field whose help is written once, here; `ra3 annotate` has a flag for each, with `annotator_` before it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class AskingSettings:
    """How a language model is asked.

    Raises:
        `ValueError`: for a number out of its range.
    """

    max_tokens: int = _option(512, "longest answer about a text")
    temperature: float = _option(0.0, "0 takes the likeliest token")
    batch_size: int = _option(8, "texts at a time: rows of a batch, or requests that a server has at once")
    timeout: float = _option(120.0, "seconds that a server may take for an answer")
    max_retries: int = _option(5, "further tries of a request that a server did not answer, with pauses that grow")

    def __post_init__(self) -> None:
        least = {"max_tokens": 1, "temperature": 0, "batch_size": 1, "timeout": 0, "max_retries": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not (bound <= value < math.inf) or (name == "timeout" and not value):  # NaN fails too
                lower = "above" if name == "timeout" else "at least"
                raise ValueError(f"`{name}` is {value}; it must be finite and {lower} {bound}.")

    @property
    def shaping(self) -> dict[str, Any]:
        """Those that answers depend on."""
        return {"max_tokens": self.max_tokens, "temperature": self.temperature}
