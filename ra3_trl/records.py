"""The frozen records that pass between rooms.

Shape legend, used as suffixes everywhere: `B` documents, `A` actions (lines) of a document, `S` its boundaries (where
a latent may stand), `T` those where latents are tried, `G` latents per boundary, `M = T*G` branches, `H` lines of the
horizon, `K` latent tokens, `L` tokens, `N` document tokens, `D` hidden size, `V` vocabulary. A name such as
`line_logps_TGH` therefore holds one number for each boundary, latent and line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .kinds import checked


@dataclass(frozen=True)
class Boundary:
    """Opens and closes a latent at a place where one may stand.

    On `if x:\\n    return x` with a tokenizer that merges `\\n` and three spaces into one token, the boundary before
    `return` has `think = (" #",)` and `close = ("\\n   ",)`; the expert's own `" return"` follows unchanged.
    """

    think: tuple[int, ...]  # tokens of the think prefix
    close: tuple[int, ...]  # tokens of the closure: the latent's end, and the carry given back
    decides: bool = True  # whether there is a gate; none in a prompt whose `think` tokens are given


@dataclass(frozen=True)
class Action:
    """Marks one primitive action, a logical line: tokens `start` to `end` (exclusive) of its document.

    >>> Action(index=1, start=7, end=12, boundary=Boundary(think=(3,), close=(4,))).think
    (3,)
    """

    index: int  # ordinal of the line in the whole text, in whichever chunk it lands; noise is keyed by it
    start: int
    end: int
    boundary: Boundary | None = None  # `None` where no latent may stand
    comment: bool = False  # the expert's own comment: context, never scored
    trained: bool = True  # whether the M-step trains on it; of a user's turn it does not, and that is a `comment` too

    @property
    def decides(self) -> bool:
        """Whether there is a gate before this line."""
        return self.boundary is not None and self.boundary.decides

    @property
    def think(self) -> tuple[int, ...]:
        """Think prefix before this line; asked for only where there is a boundary."""
        assert self.boundary is not None
        return self.boundary.think

    @property
    def close(self) -> tuple[int, ...]:
        """Closure of a latent before this line; asked for only where there is a boundary."""
        assert self.boundary is not None
        return self.boundary.close


@checked
@dataclass(frozen=True)
class Document:
    """Holds a chunk of expert text on its natural tokenization.

    >>> actions = (Action(0, 1, 3), Action(1, 3, 4, Boundary(think=(8,), close=(9,))))
    >>> document = Document(doc_id=0, chunk=0, input_ids=(1, 5, 6, 7, 2), actions=actions, context=1)
    >>> document.boundaries, document.lines_from(0, lines=2)
    ((1,), (5, 6, 7))
    """

    doc_id: int
    chunk: int
    input_ids: tuple[int, ...]
    actions: tuple[Action, ...]
    context: int  # first tokens that are conditioned on and never trained: BOS, a prompt, the chunk before's last one
    # "actions", or why the text gets plain next-token training: "plain" is not of this format, "untokenized" parses
    # and does not tokenize, "lossy" is not given back by the tokenizer.
    status: str = "actions"
    # The columns of the data set's row that it was cut from, where they are asked for: reward functions get them.
    row: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def num_trained(self) -> int:
        """Tokens that next-token prediction trains on: but for the context, the first, and what is masked."""
        masked = sum(action.end - action.start for action in self.actions if not action.trained)
        return len(self.input_ids) - max(self.context, 1) - masked

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Positions in `actions` of the lines before which a latent may stand."""
        return tuple(i for i, action in enumerate(self.actions) if action.boundary is not None)

    def lines_from(self, boundary: int, lines: int) -> tuple[int, ...]:
        """Tokens of the next `lines` lines, or of as many as there are."""
        last = self.actions[min(boundary + lines, len(self.actions)) - 1]
        return self.input_ids[self.actions[boundary].start : last.end]


@checked
@dataclass(frozen=True)
class Latent:
    """Holds a sampled rationale, without think prefix, stop and closure."""

    token_ids: tuple[int, ...]
    stopped: bool  # whether the stop symbol was sampled; else it was cut at the maximum length
    logps: tuple[float, ...] = ()  # of each token as sampled, and of the stop symbol if there was one
    kept: tuple[torch.Tensor, ...] | None = None  # ids of the kept set at each step, under truncated sampling


@checked
@dataclass(frozen=True)
class RolloutGroup:
    """Holds what an engine finds out about one document.

    Example: two boundaries, one latent each, horizon 1 gives `latent_line_logps_TGH` of shape `[2, 1, 1]`; `-inf` in a
    gate log-probability means that no decision is taken there, so nothing is renormalised.
    """

    document: Document
    boundaries: tuple[int, ...]
    latents: tuple[tuple[Latent, ...], ...]
    line_logps_A: torch.Tensor  # log pi(a_t | s_t), sum over the line's tokens, no latent anywhere
    gate_logps_A: torch.Tensor  # log P(think | s_t); -inf where there is no boundary
    latent_line_logps_TGH: torch.Tensor  # the H lines from the boundary on, under the latent
    latent_gate_logps_TGH: torch.Tensor  # log P(think again) before each of these lines
    states_SD: torch.Tensor | None = None  # last hidden states at all boundaries, for the abstraction head
    head_logps_A: torch.Tensor | None = None  # log P(think) of the abstraction head, where it is the gate
    log_ratio_TG: torch.Tensor | None = None  # log pi(z | s) - log q(z | s, a), where a latent is not the policy's own
    view: Document | None = None  # what the latents were drawn from, where it is not the document

    @property
    def drawn(self) -> RolloutGroup:
        """The group on the document that its latents were drawn from."""
        return self if self.view is None else replace(self, document=self.view)

    @property
    def decision_logps_A(self) -> torch.Tensor:
        """log P(think) of whatever decides: the abstraction head, or the think prefix's tokens. What a line is
        renormalised by is always `gate_logps_A`, the mass that its tokens lack."""
        return self.gate_logps_A if self.head_logps_A is None else self.head_logps_A

    def states_at(self, boundaries: Sequence[int]) -> torch.Tensor:
        """Last hidden states `[len(boundaries), D]` at some boundaries of the document."""
        assert self.states_SD is not None
        row = {boundary: i for i, boundary in enumerate(self.document.boundaries)}
        return self.states_SD[[row[boundary] for boundary in boundaries]]

    def with_ratio(self, weight: float) -> RolloutGroup:
        """The group with `log_ratio_TG` weighted."""
        return self if self.log_ratio_TG is None else replace(self, log_ratio_TG=weight * self.log_ratio_TG)

    @property
    def num_latents(self) -> int:
        return len(self.latents[0]) if self.latents else 0


@dataclass(frozen=True)
class PolicyLogProbs:
    """Holds differentiable log-probs of sampled latents at some boundaries."""

    gate_T: torch.Tensor  # log P(think | s_t)
    token_n: torch.Tensor  # log-prob of each sampled symbol under the distribution it was drawn from
    branch_n: torch.Tensor  # branch `t * G + g` of each symbol, counted from the first boundary
    router: torch.Tensor | None = None  # weighted router loss of the forward, of a mixture of experts


@checked
@dataclass(frozen=True)
class AnnotatedExample:
    """Holds a document with latents spliced in: what the M-step trains on."""

    document: Document
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]  # `-100` on the context and on actions that are not trained
    is_latent: tuple[bool, ...]  # think prefix, latent and closure tokens
    placed: dict[int, Latent] = field(default_factory=dict)  # latents by the position of the action they stand before
    decisions: dict[int, int] = field(default_factory=dict)  # token behind which a latent might begin -> that position
    worth: dict[int, float] = field(default_factory=dict)  # nats that each placed latent brings, where measured
    gains: dict[int, float] = field(default_factory=dict)  # nats that thinking there would bring, where measured
    sizes: dict[int, float] = field(default_factory=dict)  # effective number of <act> and the candidates, 1 to G + 1


@dataclass(frozen=True)
class TokenTable:
    """Holds what the sampler must know of a vocabulary of `V` ids."""

    stop_ids: torch.Tensor  # newline-bearing and end-of-text tokens: together ONE stop symbol, the first of them
    blank_V: torch.Tensor  # tokens that may not begin a latent: it would, or could, be blank
    # Automaton over whole tokens, state 0 at the start; -1 forbids: invalid UTF-8, a text that the format forbids, a
    # control character, a special token, an id outside the tokenizer.
    next_state_SV: torch.Tensor
    pending_S: torch.Tensor  # bytes that a state of it still waits for; 0 is between characters
    token_bytes: tuple[bytes | None, ...]
    eos_token_id: int

    # Read once, since a read waits for the device that the table is on.
    @cached_property
    def stop_id(self) -> int:
        return int(self.stop_ids[0])

    @cached_property
    def next_state(self) -> np.ndarray:
        """`next_state_SV` on the host."""
        return self.next_state_SV.cpu().numpy()

    def to(self, device: torch.device | str) -> TokenTable:
        return TokenTable(
            self.stop_ids.to(device), self.blank_V.to(device), self.next_state_SV.to(device),
            self.pending_S.to(device), self.token_bytes, self.eos_token_id,
        )  # fmt: skip
