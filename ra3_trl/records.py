"""The frozen records that pass between rooms.

Shape legend, used as suffixes everywhere: `B` documents, `A` actions (lines) of a document, `S` its boundaries (where
a latent may stand), `T` those where latents are tried, `G` latents per boundary, `M = T*G` branches, `H` lines of the
horizon, `K` latent tokens, `L` tokens, `N` document tokens, `D` hidden size, `V` vocabulary. A name such as
`line_logps_TGH` therefore holds one number for each boundary, latent and line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Boundary:
    """A legal place for a latent: `think` tokens open one, `close` tokens end it and give back the carry.

    On `if x:\\n    return x` with a tokenizer that merges `\\n` and three spaces into one token, the boundary before
    `return` has `think = (" #",)` and `close = ("\\n   ",)`; the expert's own `" return"` follows unchanged. Where it
    does not `decide`, whether to think is not asked: there is no gate, as in a prompt whose `think` tokens are given.
    """

    think: tuple[int, ...]
    close: tuple[int, ...]
    decides: bool = True


@dataclass(frozen=True)
class Action:
    """One primitive action: a logical line, tokens `start` to `end` (exclusive) of its document.

    `index` is the ordinal of the line in the whole document, the same in whichever chunk it lands; noise is keyed by
    it. `boundary` is `None` where no latent may stand. `comment` marks the expert's own comment line: context, never
    scored. Example: `Action(index=1, start=7, end=12, boundary=Boundary(...))`.
    """

    index: int
    start: int
    end: int
    boundary: Boundary | None = None
    comment: bool = False

    @property
    def decides(self) -> bool:
        """Whether there is a gate before this line."""
        return self.boundary is not None and self.boundary.decides


@dataclass(frozen=True)
class Document:
    """A chunk of expert text on its natural tokenization.

    The first `context` tokens are conditioned on and never trained (BOS, a prompt, the last token of the chunk
    before). `status` is `"actions"`, or the reason why the text gets plain next-token training (`"plain"` when it
    does not tokenize, `"lossy"` when the tokenizer does not give the text back).
    """

    doc_id: int
    chunk: int
    input_ids: tuple[int, ...]
    actions: tuple[Action, ...]
    context: int
    status: str = "actions"

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Positions in `actions` of the lines before which a latent may stand."""
        return tuple(i for i, action in enumerate(self.actions) if action.boundary is not None)

    def lines_from(self, boundary: int, lines: int) -> tuple[int, ...]:
        """Tokens of the next `lines` lines, or of as many as there are."""
        last = self.actions[min(boundary + lines, len(self.actions)) - 1]
        return self.input_ids[self.actions[boundary].start : last.end]


@dataclass(frozen=True)
class Latent:
    """A sampled rationale: its tokens without think prefix, stop and closure; `logps` as sampled (stop included).

    `len(logps) == len(token_ids) + 1` when the stop symbol was sampled (`stopped`), else `len(token_ids)`. `kept` is
    `None`, or under truncated sampling the ids of the kept set at each step.
    """

    token_ids: tuple[int, ...]
    stopped: bool
    logps: tuple[float, ...] = ()
    kept: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True)
class RolloutGroup:
    """What an engine returns for one document.

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
    states_SD: torch.Tensor | None = (
        None  # last hidden states at all boundaries of the document, for the abstraction head
    )
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
    """Differentiable log-probs of sampled latents at some boundaries.

    `gate_T`: log P(think | s_t). `token_n`: log-prob of each sampled symbol under the distribution it was drawn from,
    `branch_n` its branch `t * G + g` (counted from the first boundary), `entropy_n` the entropy there (zero unless
    asked for). `router`: the weighted router loss of the forward, of a mixture of experts.
    """

    gate_T: torch.Tensor
    token_n: torch.Tensor
    branch_n: torch.Tensor
    entropy_n: torch.Tensor
    router: torch.Tensor | None = None


@dataclass(frozen=True)
class AnnotatedExample:
    """A document with latents spliced in: what the M-step trains on.

    `labels` holds `-100` on the context, `is_latent` marks think prefix, latent and closure tokens. `placed` maps the
    position of an action to the latent that stands before it. `decisions` maps the token behind which a latent might
    begin to the position of its action; `gains` holds what thinking before an action would bring, in nats, where it
    was measured; `sizes` the effective sample size of the candidates there, <act> among them (1 to G + 1).
    """

    document: Document
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    is_latent: tuple[bool, ...]
    placed: dict[int, Latent] = field(default_factory=dict)
    decisions: dict[int, int] = field(default_factory=dict)
    gains: dict[int, float] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenTable:
    """What the sampler must know of a vocabulary of `V` ids.

    `next_state_SV` is the UTF-8 automaton over whole tokens: from state `S` (0 = between characters) a token leads to
    a state or to -1 (forbidden: invalid UTF-8, control character, special token, id outside the tokenizer).
    `pending_S` is how many bytes a state still waits for. `stop_ids` are all newline-bearing and end-of-text tokens:
    together they are ONE stop symbol, represented by `stop_ids[0]`.
    """

    stop_ids: torch.Tensor
    blank_V: torch.Tensor
    next_state_SV: torch.Tensor
    pending_S: torch.Tensor
    token_bytes: tuple[bytes | None, ...]
    eos_token_id: int

    @property
    def stop_id(self) -> int:
        return int(self.stop_ids[0])

    def to(self, device: torch.device | str) -> TokenTable:
        moved = {n: getattr(self, n).to(device) for n in ("stop_ids", "blank_V", "next_state_SV", "pending_S")}
        return replace(self, **moved)
