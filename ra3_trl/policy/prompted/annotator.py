"""The annotator that asks a language model, and what that costs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from ..annotators import Proposed, Source
from .answers import examples_in, read_answer
from .prompt import Prompt


# Why a text has no answer.
NO_PLACE, SPECIAL = "no place for a comment in the text", "the text has special tokens of language models"
TOO_LONG = "longer than the annotator's context"


@dataclass(frozen=True)
class Answer:
    """What a model said: `text`, `cut` where it ended by its length; or why it said nothing, `none`. Its tokens as
    the model counts them."""

    text: str = ""
    cut: bool = False
    none: str | None = None
    prompt_tokens: int = 0
    answer_tokens: int = 0


class LanguageModel(Protocol):
    """Answers prompts.

    `name`: what it is called. `max_tokens`: of an answer. `special`: what no text that it is shown may hold, since it
    would end the user's turn.
    """

    name: str
    max_tokens: int
    special: re.Pattern[str]

    def count(self, prompt: str) -> int:
        """Counts the tokens of a prompt."""

    def write(self, prompts: Iterable[str]) -> Iterator[Answer]:
        """Answers in the prompts' order."""

    def close(self) -> None:
        """Lets go of what it holds."""


@dataclass(frozen=True)
class Cost:
    """What it takes to annotate: texts, places for latents in them, requests, tokens of all prompts and, at most, of
    all answers."""

    documents: int = 0
    boundaries: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    max_answer_tokens: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def price(self, prices: Sequence[float]) -> float:
        """What that costs at most, at prices per million tokens of prompts and of answers.

        >>> Cost(requests=1, prompt_tokens=2_000_000, max_answer_tokens=500_000).price((0.5, 2.0))
        2.0
        """
        return (self.prompt_tokens * prices[0] + self.max_answer_tokens * prices[1]) / 1e6

    def report(self, prices: Sequence[float] | None) -> dict[str, Any]:
        """Its numbers, with the `price` where there are prices."""
        return asdict(self) | {"price": None if prices is None else self.price(prices)}


class ModelAnnotator:
    """
    Asks a language model what it would note before which line. It sees the whole text; one request a text.

    Args:
        model ([`LanguageModel`]):
            What answers: [`LocalModel`] or [`ChatServer`].
        prompt ([`Prompt`], *optional*):
            What is asked; `None` is the prompt of this package.
    """

    def __init__(self, model: LanguageModel, prompt: Prompt | None = None):
        self.model, self.prompt = model, prompt or Prompt.read()
        self.name = model.name
        self.spent: Counter[str] = Counter()  # requests answered, tokens of their prompts and answers

    def propose(self, sources: Sequence[Source]) -> Iterator[Proposed]:
        reasons = [self._not_asked(source) for source in sources]
        asked = [self.prompt(source.text) for source, reason in zip(sources, reasons, strict=True) if not reason]
        answers, examples = self.model.write(asked), examples_in(self.prompt.template)
        for source, reason in zip(sources, reasons, strict=True):
            if reason:
                yield Proposed(none={reason: 1})
                continue
            answer = next(answers)
            self.spent.update(
                requests=answer.none is None, prompt_tokens=answer.prompt_tokens, answer_tokens=answer.answer_tokens
            )
            if answer.none is None:
                yield read_answer(answer.text, source.text, answer.cut, examples)
            else:
                yield Proposed(none={answer.none: 1})

    def _not_asked(self, source: Source) -> str | None:
        """Why the model is not asked about a text."""
        if not source.lines:
            return NO_PLACE
        return SPECIAL if self.model.special.search(source.text) else None

    def cost(self, source: Source) -> Cost:
        """What asking about a text takes."""
        boundaries = len(source.lines)
        if self._not_asked(source):
            return Cost(1, boundaries)
        return Cost(1, boundaries, 1, self.model.count(self.prompt(source.text)), self.model.max_tokens)

    def close(self) -> None:
        """Lets go of the model."""
        self.model.close()
