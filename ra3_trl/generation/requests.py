"""The think knob for vLLM's batches, in which requests come, go and change places: its v1 interface on plain tensors.

Each request says by its `extra_args` (`vllm_xargs` of a server) how it thinks. Nothing here imports vLLM;
`vllm_processor.py` makes a logits processor of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..models import AbstractionHead
from ..segmentation import find_format
from .boundaries import LineReader, LineStart
from .steering import ThinkSteering, check_knob
from .vocabulary import check_lines, read_vocabulary


PREFIX = "ra3_"
_STEERINGS = 32  # kept at the same time for requests to come
_LARGEST = 2**31 - 1  # number that a request can say


@dataclass(frozen=True)
class RequestThinking:
    """How a request thinks, as [`ThinkLogitsProcessor`] takes it. `gated`: P(think) is that of the head's gate.

    Example: `RequestThinking("always").extra_args()` is `{"ra3_think": "always", ...}`, for
    `vllm.SamplingParams(extra_args=...)`.

    Raises:
        `ValueError`: for an unknown `think` or format, one of which no boundary can be told while it is written, or a
            threshold where nothing is decided or out of its range.
    """

    think: str = "auto"
    threshold: float | None = None
    action_format: str = "python"
    max_latent_length: int | None = None
    prompt_is_code: bool = True
    gated: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_knob(self.think, self.threshold, self.max_latent_length)
        check_lines(find_format(self.action_format))

    def extra_args(self) -> dict[str, Any]:
        """The words of a request, of such types as a server takes: texts, numbers and lists of them."""
        values = vars(self) | {name: int(vars(self)[name]) for name in ("prompt_is_code", "gated")}
        values["eos_token_ids"] = list(self.eos_token_ids)
        return {PREFIX + name: value for name, value in values.items() if value not in (None, [])}

    @classmethod
    def of(cls, extra_args: Mapping[str, Any] | None) -> RequestThinking | None:
        """What a request says; `None` where it says nothing of thinking."""
        said = {k.removeprefix(PREFIX): v for k, v in (extra_args or {}).items() if k.startswith(PREFIX)}
        if not said:
            return None
        if unknown := said.keys() - cls.__dataclass_fields__.keys():
            raise ValueError(
                f"`{PREFIX}{min(unknown)}` is nothing that a request can say; "
                f"use some of {', '.join(PREFIX + name for name in cls.__dataclass_fields__)}."
            )
        return cls(**{name: _read(name, value) for name, value in said.items()})

    def steering(self, tokenizer: PreTrainedTokenizerBase) -> ThinkSteering:
        """The state machine of requests that think so."""
        vocabulary = read_vocabulary(tokenizer, find_format(self.action_format), self.eos_token_ids)
        return ThinkSteering(vocabulary, self.think, self.threshold, self.max_latent_length, gated=self.gated)


_KINDS = {
    "threshold": "a number from 0 to 1", "max_latent_length": f"a whole number of at most {_LARGEST:,}",
    "prompt_is_code": "0 or 1", "gated": "0 or 1", "eos_token_ids": "a list of token ids",
}  # fmt: skip


def _read(name: str, value: Any) -> Any:
    """A word of a request as [`RequestThinking`] takes it. It may come from anywhere, and what went wrong behind this
    point would end the engine for all."""
    number = value if isinstance(value, int | float) and not abs(value) > _LARGEST else None  # NaN is refused below
    whole = int(number) if isinstance(number, int | float) and number == number // 1 else None
    read: Any = value if isinstance(value, str) else None
    match name:
        case "threshold":
            read = None if number is None else float(number)
        case "max_latent_length":
            read = whole
        case "prompt_is_code" | "gated":
            read = bool(whole) if whole in (0, 1) else None
        case "eos_token_ids":
            ids = value if isinstance(value, list | tuple) else [None]
            read = tuple(ids) if all(isinstance(i, int) and 0 <= i <= _LARGEST for i in ids) else None
    if read is None:
        raise ValueError(f"`{PREFIX}{name}` is {value!r}; use {_KINDS.get(name, 'a text')}.")
    return read


@dataclass
class _Request:
    """A request at work. `written` is vLLM's own list, which grows."""

    steering: ThinkSteering
    prompt_is_code: bool
    prompt: list[int]
    written: list[int]
    reader: LineReader = field(init=False)

    def __post_init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.reader = LineReader(self.steering.vocabulary, self.prompt_is_code)

    def stand(self) -> tuple[LineStart, tuple[int, ...]]:
        """The last line, and the tokens since."""
        if not self.written:
            self.forget()  # the scores of before were of a part of the prompt
        row = [*self.prompt, *self.written]
        line = self.reader.last(row, len(self.prompt))
        return line, tuple(row[line.end :])


class BatchThinking:
    """Shapes the logits of a batch by what each of its requests says: [`ThinkSteering`] under vLLM's v1 interface.

    Temperature, top-k and top-p run behind it, as they do behind [`ThinkLogitsProcessor`]. A request that was
    preempted goes on from its tokens; of a think prefix of several tokens what stands then counts as certain.

    Args:
        load_tokenizer (`Callable[[], PreTrainedTokenizerBase]`):
            Gives the model's tokenizer, when the first request thinks.
        load_head (`Callable[[], AbstractionHead]`, *optional*):
            Gives the model's abstraction head, when the first request asks for its gate.
        states (`Callable[[], torch.Tensor]`, *optional*):
            Gives the hidden states `[batch, hidden_size]` that the logits of this step were made of.
    """

    def __init__(
        self,
        load_tokenizer: Callable[[], PreTrainedTokenizerBase],
        load_head: Callable[[], AbstractionHead] | None = None,
        states: Callable[[], torch.Tensor] | None = None,
    ):
        tokenizer = cache(load_tokenizer)
        # Each has masks as wide as the vocabulary, and clients may ask for ever other thresholds.
        self._steering = lru_cache(_STEERINGS)(lambda thinking: thinking.steering(tokenizer()))
        self._head, self._states = load_head and cache(load_head), states
        self._requests: dict[int, _Request] = {}  # by their place in the batch

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuses, by a `ValueError`, a request whose words on thinking can't be heeded."""
        RequestThinking.of(sampling_params.extra_args)

    def is_argmax_invariant(self) -> bool:
        """The likeliest token may be another one."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follows the batch: requests are removed, added and moved, in this order (`None`: all stay)."""
        if batch_update is None:
            return
        for place in batch_update.removed:
            self._requests.pop(place, None)
        for place, params, prompt, written in batch_update.added:
            self._requests.pop(place, None)
            thinking = RequestThinking.of(params.extra_args)
            if thinking is not None:
                steering = self._steering(thinking)
                self._requests[place] = _Request(steering, thinking.prompt_is_code, list(prompt or ()), written)
        for here, there, way in batch_update.moved:
            moved, replaced = self._requests.pop(here, None), self._requests.pop(there, None)
            if moved is not None:
                self._requests[there] = moved
            if replaced is not None and way.name == "SWAP":
                self._requests[here] = replaced

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[batch, V]`, those of requests that think shaped in place."""
        by_steering: dict[ThinkSteering, list[int]] = {}
        for place, request in sorted(self._requests.items()):
            by_steering.setdefault(request.steering, []).append(place)
        ask_gate = cache(self._ask_gate)  # at most once a step
        for steering, places in by_steering.items():
            lines, written = zip(*(self._requests[place].stand() for place in places), strict=True)
            logits[places] = steering(lines, written, logits[places], lambda n, places=places: ask_gate()[places[n]])[
                0
            ]
        return logits

    def _ask_gate(self) -> list[float]:
        if self._head is None or self._states is None:
            raise ValueError("`gated` is set, and there is no abstraction head; leave it out.")
        states = self._states()
        with torch.no_grad():
            return self._head().to(states.device)(states)[0].sigmoid().tolist()
