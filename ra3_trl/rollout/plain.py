"""What engines are checked against: plain forwards of a made-up text, each row by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..records import Action, Boundary, Document, Latent, RolloutGroup, TokenTable
from .backbone import Backbone
from .noise import keyed_uniform
from .sampler import LatentDistribution, SamplingParams, kept_sets, sampled_symbols


HORIZON = 2
_LINE, _THINK = 5, (1, 3)  # tokens of a made-up line; lengths of the made-up think prefixes
_LONGEST_WINDOW = 1024  # of sliding attention: a document beyond it would make the check itself slow
Numbers = dict[str, torch.Tensor]  # all that an engine is asked for, by what an error calls it


def usable_tokens(table: TokenTable) -> list[int]:
    """Lists the tokens of printable ASCII that a latent may hold anywhere."""
    plain = [i for i, b in enumerate(table.token_bytes) if b is not None and b.isascii() and b.strip()]
    usable = [i for i in plain if table.next_state_SV[0, i] == 0 and i not in set(table.stop_ids.tolist())]
    if not usable:
        raise ValueError("the vocabulary has no printable ASCII token besides the stop symbol; use another tokenizer.")
    return usable


def make_up(backbone: Backbone, table: TokenTable, params: SamplingParams) -> list[RolloutGroup]:
    """Makes up two documents of four boundaries each, and two latents at two of these; no scores.

    The last boundaries of the first stand behind the model's sliding window, so that a window that is not honoured
    shows; the second is short, so that rows differ in length.
    """
    config = backbone.causal_lm.config.get_text_config().to_dict()
    window = config.get("sliding_window") or 0
    room = (config.get("max_position_embeddings") or 4096) - 4 * _LINE - params.max_length
    lines = max(8, min(window if window <= _LONGEST_WINDOW else 0, room) // _LINE + 4)
    usable = usable_tokens(table)
    return [_made_up(i, count, usable, backbone, table, params) for i, count in enumerate((lines, 6))]


def _made_up(
    number: int, lines: int, usable: list[int], backbone: Backbone, table: TokenTable, params: SamplingParams
) -> RolloutGroup:
    """A document of so many lines; its tokens are followed by those of latents and think prefixes."""
    ids = [usable[int(u * len(usable))] for u in keyed_uniform(number, np.arange(1 + lines * _LINE + 32))]
    boundaries = (1, 2, lines - 3, lines - 2)
    actions = []
    for i in range(lines):
        think = _THINK[i % 2]
        boundary = Boundary(tuple(ids[-think:]), (table.stop_id, *ids[-8 : -7 + i % 2])) if i in boundaries else None
        actions.append(Action(i, 1 + i * _LINE, 1 + (i + 1) * _LINE, boundary))
    document = Document(number, 0, tuple(ids[: 1 + lines * _LINE]), tuple(actions), context=1)
    latents = []  # of several lengths, the longest cut
    for begin, length in ((-30, 3), (-24, 2), (-20, 1), (-16, params.max_length)):
        tokens = tuple(ids[begin : begin + min(length, params.max_length)])
        stopped = len(tokens) < params.max_length
        kept = (torch.arange(backbone.vocab_size),) * (len(tokens) + stopped) if params.truncated else None
        latents.append(Latent(tokens, stopped, (0.0,) * (len(tokens) + stopped), kept))
    groups, none = (tuple(latents[:2]), tuple(latents[2:])), torch.empty(0)
    return RolloutGroup(document, (boundaries[0], boundaries[-2]), groups, none, none, none, none)


@dataclass
class PlainForwards:
    """Runs rows one at a time, without padding, mask or cache. The hidden states of a row hold those of any row that
    it begins with, so these are not run again: the model is causal, which is checked first."""

    backbone: Backbone
    table: TokenTable
    params: SamplingParams

    def __post_init__(self) -> None:
        self.distribution = LatentDistribution(self.table.to(self.backbone.device), self.params)
        self._rows: list[tuple[tuple[int, ...], torch.Tensor]] = []

    def anew(self) -> PlainForwards:
        """The same without what has been run."""
        return replace(self)

    def hidden(self, row: Sequence[int]) -> torch.Tensor:
        """Hidden states `[L, hidden_size]` of a row."""
        row = tuple(row)
        for other, hidden in self._rows:
            if other[: len(row)] == row:
                return hidden[: len(row)]
        ids = torch.tensor([row], device=self.backbone.device)
        self._rows.append((row, self.backbone.hidden(input_ids=ids)[0]))
        return self._rows[-1][1]

    def logp(self, prefix: Sequence[int], tokens: Sequence[int]) -> float:
        """log pi(tokens | prefix)."""
        hidden = self.hidden((*prefix, *tokens[:-1]))[len(prefix) - 1 :]
        logps = self.backbone.logits(hidden).log_softmax(-1)
        return float(logps.gather(1, torch.tensor(tokens, device=logps.device)[:, None]).sum())

    def symbols(self, group: RolloutGroup) -> list[float]:
        """Log-prob of each symbol of the group's latents, under the distribution that they are drawn from."""
        flat, hidden = [], []
        for boundary, row in zip(group.boundaries, group.latents, strict=True):
            action = group.document.actions[boundary]
            head = (*group.document.input_ids[: action.start], *action.think)
            for latent in row:
                behind = len(head) - 1 + len(latent.logps)
                hidden.append(self.hidden((*head, *latent.token_ids)[:behind])[len(head) - 1 :])
                flat.append(latent)
        symbols = sampled_symbols(flat, self.table)
        token, state, step = (
            torch.as_tensor(column, device=self.backbone.device)
            for column in (symbols.token, symbols.state, symbols.step)
        )
        scaled = self.distribution(self.backbone.logits(torch.cat(hidden)), state, step)
        if self.params.truncated:
            for row, kept in zip(scaled, kept_sets(flat), strict=True):
                assert kept is not None  # made up or just drawn
                gone = torch.ones(len(row), dtype=torch.bool).index_fill(0, kept, False)
                row[gone.to(row.device)] = -torch.inf
        return scaled.log_softmax(-1).gather(1, token[:, None])[:, 0].tolist()

    def numbers(self, groups: Sequence[RolloutGroup]) -> Numbers:
        """All that an engine says of documents and given latents."""
        lines, gates, under, again, symbols, tried = [], [], [], [], [], []
        for group in groups:
            document, ids = group.document, group.document.input_ids
            self.hidden(ids)
            lines += [self.logp(ids[: a.start], ids[a.start : a.end]) for a in document.actions]
            gates += [self.logp(ids[: a.start], a.think) if a.boundary else -np.inf for a in document.actions]
            tried += [self.logp(ids[: a.start], a.think) for a in (document.actions[b] for b in group.boundaries)]
            for boundary, row in zip(group.boundaries, group.latents, strict=True):
                for latent in row:
                    of_lines, of_gates = self._under(document, boundary, latent)
                    under += of_lines
                    again += of_gates
            symbols += self.symbols(group)
        columns = (lines, gates, under, again, tried, symbols)
        return {kind: torch.tensor(c) for kind, c in zip(KINDS, columns, strict=True)}

    def _under(self, document: Document, boundary: int, latent: Latent) -> tuple[list[float], list[float]]:
        """Log-probs of the next lines under a latent, and of thinking again before each."""
        actions, ids = document.actions[boundary : boundary + HORIZON], document.input_ids
        head = (*ids[: actions[0].start], *actions[0].think, *latent.token_ids, *actions[0].close)
        first, lines, gates = actions[0].start, [], []
        self.hidden((*head, *ids[first : actions[-1].end]))  # the longest first
        for action in actions:
            row = (*head, *ids[first : action.start])
            lines.append(self.logp(row, ids[action.start : action.end]))
            gates.append(self.logp(row, action.think) if action.boundary else -np.inf)
        return lines, gates


KINDS = (
    "line log-probs", "gate log-probs", "line log-probs under latents", "gate log-probs under latents",
    "gradient pass's gate log-probs", "gradient pass's latent log-probs",
)  # fmt: skip
