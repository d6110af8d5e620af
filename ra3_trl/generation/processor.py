"""Thinking as a knob: a `LogitsProcessor` that makes `generate` write latents as training wrote them.

At a boundary the think prefix is forced, banned, or left to the model; inside a latent the scores become the
distribution that latents are trained under; the closure is forced, and the line follows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol, runtime_checkable

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from ..kinds import checked
from ..segmentation import find_format
from .boundaries import LineReader
from .steering import ThinkSteering, check_knob
from .vocabulary import read_vocabulary


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
        self.gate = gate
        self.forced: list[tuple[bool, ...]] = []
        self._width = 0
        self._vocabulary = read_vocabulary(tokenizer, find_format(action_format), eos_token_ids)
        self._lines = LineReader(self._vocabulary, prompt_is_code)
        self._steering = ThinkSteering(self._vocabulary, think, threshold, max_latent_length, gated=gate is not None)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scores `[batch, V]` of the next token, `-inf` where it may not be."""
        rows, width = input_ids.tolist(), input_ids.shape[1]
        ask_gate = cache(partial(self._ask_gate, len(rows)))  # at most once a step
        lines = self._lines(rows)
        written = [tuple(row[line.end :]) for row, line in zip(rows, lines, strict=True)]
        out, forced = self._steering(lines, written, scores, lambda n: ask_gate()[n])
        if width != self._width + 1:  # another generation
            self.forced = []
        self.forced.append(forced)
        self._width = width
        return out

    def _ask_gate(self, count: int) -> list[float]:
        gate_B = self.gate()
        if gate_B.shape != (count,):
            raise ValueError(
                f"`gate` returned a tensor of shape {tuple(gate_B.shape)}; return P(think) of each of the {count} "
                "rows, beams counted."
            )
        return gate_B.tolist()


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
