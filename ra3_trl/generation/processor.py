"""Thinking as a knob: a `LogitsProcessor` that makes `generate` write latents as training wrote them.

At a boundary the think prefix is forced, banned, or left to the model; inside a latent the scores become the
distribution that latents are trained under; the closure is forced, and the line follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from ..kinds import checked
from ..rollout import SamplingParams
from ..rollout.sampler import LatentDistribution
from ..segmentation import find_format
from .boundaries import LineReader, LineStart
from .vocabulary import BLANK, Vocabulary, read_vocabulary


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


@runtime_checkable
class OtherTokenizer(Protocol):
    """One that is not transformers', or slow: refused with what to do about it."""

    is_fast: bool


@checked
class ThinkLogitsProcessor(LogitsProcessor):
    """Decides where `generate` thinks, and shapes what it thinks.

    Works with greedy search, sampling, beams, batches padded on the left, streamers and pipelines. Rows that it
    changes come back as log-probs, so that a ban costs a beam nothing. Repetition penalties and the like run before
    it: what is forced stays forced, but probabilities are seen after them. Temperature, top-k and top-p run behind it.
    `forced` tells of each step of the latest generation which rows' tokens were not the model's choice.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer, a fast one.
        think (`str`, *optional*, defaults to `"auto"`):
            `"auto"` leaves the decision to the model, to `threshold` or to `gate`; `"always"` puts a latent at every
            boundary (the text may end there instead); `"never"` bans every token that begins an own-line comment
            there. **`"never"` suppresses ordinary comments too**: a latent is a comment, and nothing tells one from
            the other.
        threshold (`float`, *optional*):
            With `"auto"`: think where P(think) is at least this, else do not. P(think) is the gate's, or the product
            of the think prefix's token probabilities; spaces in front of the marker are the model's choice, so that
            the decision falls at the marker. `None` is 0.5 with a gate; without one the model decides as it was
            trained.
        action_format (`str`, *optional*, defaults to `"python"`):
            Name of the action format that the model was trained with. Its lines must begin behind newlines.
        max_latent_length (`int`, *optional*):
            Most tokens of a latent, without think prefix and closure. `None` is no bound.
        prompt_is_code (`bool`, *optional*, defaults to `True`):
            Whether prompt and completion are one program; what stands before the last special token never counts.
            `False`, for chats and instructions: the completion alone is read. Where the text does not tokenize as the
            format, there is no boundary.
        gate (`Callable[[], torch.Tensor]`, *optional*):
            P(think) `[batch]` at the current step, such as an abstraction head's. Called at most once a step, and only
            when a row stands at a decision of `"auto"`.
        eos_token_ids (`tuple[int, ...]`, *optional*):
            Further end-of-text ids of the model, part of the stop symbol in training (the generation config's).

    Raises:
        `ValueError`: for an unknown `think` or format, a number out of its range, a threshold or gate where nothing is
        decided, a format whose boundaries depend on the text behind them, or a tokenizer that is slow, lacks an EOS
        token or lacks the format's tags.

    Example:

    ```python
    >>> processor = ThinkLogitsProcessor(tokenizer, think="always", max_latent_length=24)
    >>> model.generate(**tokenizer("def f(x):\\n", return_tensors="pt"), logits_processor=[processor])
    ```
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | OtherTokenizer,
        think: str = "auto",
        *,
        threshold: float | None = None,
        action_format: str = "python",
        max_latent_length: int | None = None,
        prompt_is_code: bool = True,
        gate: Callable[[], torch.Tensor] | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ):
        check_knob(think, threshold, max_latent_length, gate)
        self.think = think
        self.threshold = 0.5 if threshold is None and gate is not None else threshold
        self.max_latent_length = max_latent_length
        self.gate = gate
        self.forced: list[tuple[bool, ...]] = []
        self._width = 0
        self._vocabulary = read_vocabulary(tokenizer, find_format(action_format), eos_token_ids)
        self._lines = LineReader(self._vocabulary, prompt_is_code)
        self._fitted: _Fitted | None = None

    @property
    def _decides(self) -> bool:
        """Whether latents come by a decision made here; else the model opens them as it likes."""
        return self.think != "auto" or self.threshold is not None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores `[batch, V]` of the next token, `-inf` where it may not be."""
        fitted = self._fit(scores)
        rows, width = input_ids.tolist(), input_ids.shape[1]
        out, changed, latents = scores, {}, {}
        ask_gate = cache(partial(self._ask_gate, len(rows)))  # at most once a step
        # Where latents are decided on, tokens that would begin one past every decision may stand nowhere.
        if self._decides and fitted.anywhere is not None:
            out = scores.masked_fill(fitted.anywhere, -math.inf).log_softmax(-1)
        forced = [False] * len(rows)
        for n, (row, line) in enumerate(zip(rows, self._lines(rows), strict=True)):
            following = self._following(line, tuple(row[line.end :]), scores[n], lambda n=n: ask_gate()[n])
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
        if width != self._width + 1:  # another generation
            self.forced = []
        self.forced.append(tuple(forced))
        self._width = width
        if changed:
            out = out.clone() if out is scores else out  # the caller's scores stay as they are
            out[list(changed)] = torch.stack(list(changed.values()))
        return out

    def _following(
        self, line: LineStart, since: tuple[int, ...], scores_V: torch.Tensor, ask_gate: Callable[[], float]
    ) -> _Forced | bytes | _InLatent | None:
        """What may follow `since`, the tokens of a row since its `line` began.

        One token; the next symbol of a latent; all but what completes the marker, of which the bytes returned stand
        there already; `None` is anything.
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
        if since == think[:done] and self._thinks(line, done, scores_V, ask_gate):
            return _Forced(think[done], may_end=done == 0)
        return self._begun(line, since) if self._decides else None

    def _begun(self, line: LineStart, since: tuple[int, ...]) -> bytes | None:
        """What stands of the marker while the line is blank but for it; `None` once the line is something else."""
        body = (line.carry + self._vocabulary.text_of(since)).lstrip(BLANK)
        return body if body in self._vocabulary.completing else None

    def _in_latent(self, tokens: tuple[int, ...], close: int) -> _Forced | _InLatent | None:
        state = 0
        for token in tokens:
            state = int(self._fitted.next_state[state, token])
            if token == close or state < 0:  # closed already (tags), or a comment of the prompt that is no latent
                return None
        if len(tokens) >= (self.max_latent_length or _UNBOUNDED):
            return _Forced(close)
        # Without a bound all steps but the first are alike, and masks are kept for each.
        return _InLatent(state, len(tokens) if self.max_latent_length else min(len(tokens), 1), close)

    def _thinks(self, line: LineStart, done: int, scores_V: torch.Tensor, ask_gate: Callable[[], float]) -> bool:
        """Whether the think prefix of `line`, of which `done` tokens stand, goes on by force."""
        if self.think == "always":
            return True
        if self.threshold is None:
            return False
        if self.gate is not None:
            if done == 0 or line.thinks is None:  # asked at the first token, and kept for the rest
                line.thinks = ask_gate() >= self.threshold
            return line.thinks
        think = line.boundary.think
        line.logps[done] = float(scores_V.log_softmax(-1)[think[done]])
        total = sum(line.logps.get(k, 0.0) for k in range(done + 1))  # what the prompt wrote was certain
        return done == len(think) - 1 and math.exp(total) >= self.threshold

    def _ask_gate(self, count: int) -> list[float]:
        gate_B = self.gate()
        if gate_B.shape != (count,):
            raise ValueError(
                f"`gate` returned a tensor of shape {tuple(gate_B.shape)}; return P(think) of each of the {count} "
                "rows, beams counted."
            )
        return gate_B.tolist()

    def _fit(self, scores: torch.Tensor) -> _Fitted:
        """The vocabulary as wide as the model's, on its device."""
        width, device = scores.shape[-1], scores.device
        if self._fitted is None or (self._fitted.width, self._fitted.device) != (width, device):
            params = SamplingParams(self.max_latent_length or _UNBOUNDED)
            self._fitted = _Fitted.of(self._vocabulary, params, width, device)
        return self._fitted


@dataclass(frozen=True)
class _Fitted:
    """A vocabulary of `width` tokens on `device`."""

    width: int
    device: torch.device
    distribution: LatentDistribution
    next_state: np.ndarray
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
        return cls(width, device, distribution, table.next_state_SV.numpy(), end_ids, anywhere, completing)

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


def refuse_several_tokens(options: dict[str, Any]) -> None:
    """Refuses decoding in which the last hidden state is not that of the text: several tokens at once, two texts."""
    config = options.get("generation_config")
    settings = {} if config is None else config.to_dict()
    for name in ("assistant_model", "prompt_lookup_num_tokens", "guidance_scale"):
        value = options.get(name, settings.get(name))
        if value is not None and value != 1:
            raise ValueError(
                f"`{name}` runs more than the text's last token, for which there is no gate; leave it out."
            )
