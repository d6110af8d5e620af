"""What may follow rows that are being written: the think knob's state machine, for `generate` and for vLLM alike.

It knows rows, their last lines and the scores of what comes next, and no engine. What an engine elsewhere forced is
told from the tokens alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import pad

from ..rollout import SamplingParams
from ..rollout.sampler import LatentDistribution
from .boundaries import LineReader, LineStart
from .vocabulary import BLANK, Vocabulary


THINK = ("auto", "always", "never")
_UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class _InLatent:
    """Token number `step` of a latent is next, in UTF-8 state `state`; `close` is the token that would end it."""

    state: int
    step: int
    close: int


@dataclass(frozen=True)
class _Forced:
    """`token` is next, or with `may_end` the end of the text, as likely as the model says: no line, no boundary."""

    token: int
    may_end: bool = False


class ThinkSteering:
    """Shapes the scores of what comes next by where rows stand.

    Args:
        vocabulary ([`Vocabulary`]):
            Of the tokenizer that the rows are of, and the format of their text.
        think, threshold, max_latent_length:
            As for [`ThinkLogitsProcessor`], checked by [`check_knob`].
        gated (`bool`, *optional*, defaults to `False`):
            Whether P(think) is asked for, or else that of the think prefix's tokens.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        think: str,
        threshold: float | None = None,
        max_latent_length: int | None = None,
        gated: bool = False,
    ):
        self.vocabulary = vocabulary
        self.think = think
        self.threshold = 0.5 if threshold is None and gated else threshold
        self.max_latent_length = max_latent_length
        self.gated = gated
        self._fitted: _Fitted | None = None

    @property
    def decides(self) -> bool:
        """Whether latents come by a decision made here; else the model opens them as it likes."""
        return self.think != "auto" or self.threshold is not None

    def __call__(
        self,
        lines: Sequence[LineStart],
        written: Sequence[tuple[int, ...]],
        scores: torch.Tensor,
        ask_gate: Callable[[int], float],
    ) -> tuple[torch.Tensor, tuple[bool, ...]]:
        """Shapes the scores of a step.

        Args:
            lines (`Sequence[LineStart]`), written (`Sequence[tuple[int, ...]]`):
                Each row's last line, and its tokens since.
            scores (`torch.Tensor`):
                Of the next token, `[rows, V]`; they stay as they are.
            ask_gate (`Callable[[int], float]`):
                P(think) of a row, asked only where a gate decides.

        Returns:
            `tuple[torch.Tensor, tuple[bool, ...]]`: scores, `-inf` where a token may not be (rows that are changed are
            log-probs), and whether each row's token is forced.
        """
        fitted, out = self._fit(scores), scores
        changed, latents, forced = {}, {}, [False] * len(lines)
        # Where latents are decided on, tokens that would begin one past every decision may stand nowhere.
        if self.decides and fitted.anywhere is not None:
            out = scores.masked_fill(fitted.anywhere, -math.inf).log_softmax(-1)
        for n, (line, since) in enumerate(zip(lines, written, strict=True)):
            thinks = partial(self._thinks, line, since, scores[n], partial(ask_gate, n))
            following = self._following(line, since, thinks)
            if isinstance(following, _InLatent):
                latents[n] = following
            elif isinstance(following, bytes):
                changed[n] = out[n].masked_fill(fitted.completing[following], -math.inf).log_softmax(-1)
            elif following is not None:
                changed[n] = fitted.force(scores[n], following)
                forced[n] = True
        if latents:
            shaped = fitted.shape(scores[list(latents)], list(latents.values()))
            changed |= dict(zip(latents, shaped, strict=True))
        if changed:
            out = out.clone() if out is scores else out  # the caller's scores stay as they are
            out[list(changed)] = torch.stack(list(changed.values()))
        return out, tuple(forced)

    def forced(self, reader: LineReader, prompt: Sequence[int], ids: Sequence[int]) -> tuple[bool, ...] | None:
        """Tells which of the tokens `ids` behind `prompt` were forced, where another process has drawn them; `None` if
        one of them may not stand there: who drew them was not steered.

        The tokens say it all: a think prefix is completed only where the decision was to think.
        """
        forced = []
        for n, token in enumerate(ids):
            row = [*prompt, *ids[:n]]
            line = reader.last(row, len(prompt))
            since = tuple(row[line.end :])
            following = self._following(line, since, partial(self._thought, line, since, tuple(ids[n:])))
            if not self._may_be(token, following):
                return None
            forced.append(isinstance(following, _Forced))
        return tuple(forced)

    def _thought(self, line: LineStart, since: tuple[int, ...], ahead: tuple[int, ...]) -> bool:
        """Whether the tokens `ahead` say that `_thinks` said yes."""
        rest = line.boundary.think[len(since) :]
        return (self.gated or len(rest) == 1) and ahead[: len(rest)] == rest[: len(ahead)]

    def _may_be(self, token: int, following: _Forced | bytes | _InLatent | None) -> bool:
        vocabulary = self.vocabulary
        if isinstance(following, _Forced):
            return token == following.token or (following.may_end and token in vocabulary.end_ids)
        if token >= len(vocabulary.anywhere):  # the model's, of which the tokenizer knows nothing
            return True
        if self.decides and vocabulary.anywhere[token]:
            return False
        return not isinstance(following, bytes) or not vocabulary.completing[following][token]

    def _following(
        self, line: LineStart, since: tuple[int, ...], thinks: Callable[[], bool]
    ) -> _Forced | bytes | _InLatent | None:
        """What may follow `since`, the tokens of a row since its `line` began.

        One token; the next symbol of a latent; all but what completes the marker, of which the bytes returned stand
        there already; `None` is anything. `thinks` is asked where the model's wish decides.
        """
        done = len(since)
        if self.think == "never":
            return self._begun(line, since) if line.opens else None
        if done < len(line.closure) and since == line.closure[:done]:
            return _Forced(line.closure[done])
        if line.boundary is None:
            return None
        think = line.boundary.think
        if since[: len(think)] == think:
            return self._in_latent(since[len(think) :], line.boundary.close[0])
        if since == think[:done] and (self.think == "always" or (self.threshold is not None and thinks())):
            return _Forced(think[done], may_end=done == 0)
        return self._begun(line, since) if self.decides else None

    def _begun(self, line: LineStart, since: tuple[int, ...]) -> bytes | None:
        """What stands of the marker while the line is blank but for it; `None` once the line is something else."""
        body = (line.carry + self.vocabulary.text_of(since)).lstrip(BLANK)
        return body if body in self.vocabulary.completing else None

    def _in_latent(self, tokens: tuple[int, ...], close: int) -> _Forced | _InLatent | None:
        state, next_state = 0, self.vocabulary.table.next_state
        for token in tokens:
            # Ids behind the tokenizer's are no text; the model has them, and never draws them in a latent.
            state = int(next_state[state, token]) if token < next_state.shape[1] else -1
            if token == close or state < 0:  # closed already (tags), or a comment of the prompt that is no latent
                return None
        if len(tokens) >= (self.max_latent_length or _UNBOUNDED):
            return _Forced(close)
        # Without a bound all steps but the first are alike, and masks are kept for each.
        return _InLatent(state, len(tokens) if self.max_latent_length else min(len(tokens), 1), close)

    def _thinks(
        self, line: LineStart, since: tuple[int, ...], scores_V: torch.Tensor, ask_gate: Callable[[], float]
    ) -> bool:
        """Whether the think prefix of `line`, of which `since` stands, goes on by force."""
        done = len(since)
        if self.gated:
            if done == 0 or line.thinks is None:  # asked at the first token, and kept for the rest
                line.thinks = ask_gate() >= self.threshold
            return line.thinks
        think = line.boundary.think
        line.logps[done] = float(scores_V.log_softmax(-1)[think[done]])
        total = sum(line.logps.get(k, 0.0) for k in range(done + 1))  # what the prompt wrote was certain
        return done == len(think) - 1 and math.exp(total) >= self.threshold

    def _fit(self, scores: torch.Tensor) -> _Fitted:
        """The vocabulary as wide as the model's, on its device."""
        width, device = scores.shape[-1], scores.device
        if self._fitted is None or (self._fitted.width, self._fitted.device) != (width, device):
            params = SamplingParams(self.max_latent_length or _UNBOUNDED)
            self._fitted = _Fitted.of(self.vocabulary, params, width, device)
        return self._fitted


@dataclass(frozen=True)
class _Fitted:
    """A vocabulary of `width` tokens on `device`."""

    width: int
    device: torch.device
    distribution: LatentDistribution
    end_ids: torch.Tensor
    anywhere: torch.Tensor | None
    completing: dict[bytes, torch.Tensor]

    @classmethod
    def of(cls, vocabulary: Vocabulary, params: SamplingParams, width: int, device: torch.device) -> _Fitted:
        table, tags = vocabulary.table, vocabulary.tags
        if max(tags.values(), default=0) >= width:
            raise ValueError(
                f"the model has logits for {width} tokens, too few for the tags {list(tags)} of the tokenizer; "
                "load the model that was trained with them, or call `ra3_trl.models.add_tags`."
            )
        more = width - len(table.token_bytes)  # below 0 it is the tokenizer that has more
        table = replace(
            table, stop_ids=table.stop_ids[table.stop_ids < width], blank_V=pad(table.blank_V, (0, more)),
            next_state_SV=pad(table.next_state_SV, (0, more), value=-1),
        )  # fmt: skip
        anywhere = pad(vocabulary.anywhere, (0, more)).to(device) if vocabulary.anywhere.any() else None
        completing = {begun: pad(mask, (0, more)).to(device) for begun, mask in vocabulary.completing.items()}
        end_ids = torch.tensor([i for i in vocabulary.end_ids if i < width], device=device)
        distribution = LatentDistribution(table.to(device), params)
        return cls(width, device, distribution, end_ids, anywhere, completing)

    def force(self, scores_V: torch.Tensor, forced: _Forced) -> torch.Tensor:
        """Log-probs `[V]` of one token and, where it may, the end of the text."""
        out = torch.full_like(scores_V, -math.inf)
        out[forced.token] = 0.0
        if forced.may_end:
            end = scores_V.log_softmax(-1)[self.end_ids]
            out[forced.token] = torch.log1p(-end.exp().sum().clamp(max=1.0))
            out[self.end_ids] = end
        return out

    def shape(self, scores_nV: torch.Tensor, latents: Sequence[_InLatent]) -> torch.Tensor:
        """Log-probs `[n, V]` of the next symbol of latents, the stop standing at the closure's first token."""
        state_n = torch.tensor([latent.state for latent in latents], device=self.device)
        step_n = torch.tensor([latent.step for latent in latents], device=self.device)
        close_n = torch.tensor([latent.close for latent in latents], device=self.device)
        logps = self.distribution(scores_nV, state_n, step_n).log_softmax(-1)
        stop_n = logps[:, self.distribution.table.stop_id].clone()
        logps[:, self.distribution.table.stop_id] = -math.inf
        return logps.scatter(-1, close_n[:, None], stop_n[:, None])


def check_knob(
    think: str, threshold: float | None = None, max_latent_length: int | None = None, gate: Callable | None = None
) -> None:
    """Refuses, by a `ValueError`, what [`ThinkLogitsProcessor`] does not take."""
    if think not in THINK:
        raise ValueError(f"`think` is {think!r}; choose one of {', '.join(map(repr, THINK))}.")
    if think != "auto" and (threshold is not None or gate is not None):
        name, value = ("threshold", threshold) if threshold is not None else ("gate", gate)
        raise ValueError(
            f"`{name}` is {value!r} and `think` is {think!r}, which leaves nothing to decide; use 'auto'."
        )
    if threshold is not None and not 0.0 <= threshold <= 1.0:
        raise ValueError(f"`threshold` is {threshold!r}; it is compared with a probability, use a number from 0 to 1.")
    if max_latent_length is not None and max_latent_length < 1:
        raise ValueError(f"`max_latent_length` is {max_latent_length!r}; use at least 1, or `None` for no bound.")
