"""A finite automaton over bytes: UTF-8 in which some texts never occur, whatever tokens it is cut into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


# UTF-8: state -> [(low byte, high byte, next state)]. 0 is "between characters"; 1, 2, 3 wait for that many
# continuation bytes; 4-7 are the lead bytes E0, ED, F0 and F4, whose first continuation byte has a narrower range.
_UTF8: dict[int, list[tuple[int, int, int]]] = {
    0: [(0x00, 0x7F, 0), (0xC2, 0xDF, 1), (0xE0, 0xE0, 4), (0xE1, 0xEC, 2), (0xED, 0xED, 5), (0xEE, 0xEF, 2)]
    + [(0xF0, 0xF0, 6), (0xF1, 0xF3, 3), (0xF4, 0xF4, 7)],
    1: [(0x80, 0xBF, 0)],
    2: [(0x80, 0xBF, 1)],
    3: [(0x80, 0xBF, 2)],
    4: [(0xA0, 0xBF, 1)],
    5: [(0x80, 0x9F, 1)],
    6: [(0x90, 0xBF, 2)],
    7: [(0x80, 0x8F, 2)],
}
_PENDING = (0, 1, 2, 3, 2, 2, 3, 3)


@dataclass(frozen=True)
class Automaton:
    """Says what may follow what; state 0 is the start.

    `step` holds the state behind each state and byte, `pending` how many bytes a state waits for to be whole
    characters. The last state of `step` is the end of all that is no such text.
    """

    step: np.ndarray
    pending: tuple[int, ...]

    def run(self, texts: Sequence[bytes]) -> np.ndarray:
        """States `[S, len(texts)]` behind each state and text, all texts at once byte by byte; -1 where none may
        hold them."""
        length = np.array([len(text) for text in texts], dtype=np.int64)
        order = np.argsort(-length, kind="stable")  # the longest first, so that those that go on are the first
        begin, data = (np.cumsum(length) - length)[order], np.frombuffer(b"".join(texts), dtype=np.uint8)
        state = np.repeat(np.arange(len(self.pending), dtype=np.int16)[:, None], len(texts), axis=1)
        for at in range(int(length.max(initial=0))):
            on = int(np.searchsorted(-length[order], -at))
            state[:, :on] = self.step[state[:, :on], data[begin[:on] + at]]
        behind = np.empty_like(state)
        behind[:, order] = np.where(state < len(self.pending), state, -1)
        return behind


@lru_cache(maxsize=16)
def automaton_without(texts: tuple[bytes, ...]) -> Automaton:
    """Makes the automaton of UTF-8 in which none of `texts` occurs.

    A state is UTF-8's, and the longest end of what was read with which one of `texts` begins (Aho and Corasick). The
    first are those of UTF-8 alone.
    """
    begun = {text[:k] for text in texts for k in range(1, len(text))}
    states = [(utf8, b"") for utf8 in _UTF8]
    rows: list[list[tuple[int, bytes] | None]] = []
    for utf8, read in states:  # grows as states are reached
        rows.append([_behind(utf8, read + bytes([byte]), texts, begun) for byte in range(256)])
        states += dict.fromkeys(to for to in rows[-1] if to is not None and to not in states)
    number = {to: n for n, to in enumerate(states)} | {None: len(states)}
    rows.append([None] * 256)
    step = np.array([[number[to] for to in row] for row in rows], dtype=np.int16)
    return Automaton(step, tuple(_PENDING[utf8] for utf8, _ in states))


def _behind(utf8: int, read: bytes, texts: Sequence[bytes], begun: set[bytes]) -> tuple[int, bytes] | None:
    """The state behind a state of UTF-8 and the last byte of `read`; `None` where there is none."""
    state = next((to for low, high, to in _UTF8[utf8] if low <= read[-1] <= high), None)
    if state is None or read.endswith(tuple(texts)):
        return None
    return state, next((read[k:] for k in range(len(read)) if read[k:] in begun), b"")
