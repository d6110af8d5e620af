"""The annotator that runs programs."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ..annotators import Comment, Proposed, Source
from .calls import answers_of, calls_of, parse
from .forms import FORM, FORMS, LONGEST, Trace, only_says, write_trace
from .run import NO_PYTHON, Traced, Tracer


NO_CHANGE, COPIES_ANSWER = "no variable changes", "only says the answer"
TOO_LONG = f"longer than {LONGEST} characters"


class TraceAnnotator:
    """
    Runs each text with its calls and says before an assertion which values the functions' variables took: `x = 0,
    total = 2`. Of calls that stand elsewhere, doctests and the tests of a row, it says so before the line at which the
    function returned, arguments first; of several that return there it is the first.

    Args:
        form (`str`, *optional*, defaults to `"changes"`):
            How a trace is written, see [`write_trace`].
        tracer ([`Tracer`], *optional*):
            What runs programs; `None` makes one.

    Raises:
        `ValueError`: for a form that there is none of.
        `SandboxError`: if there is no sandbox here and `HF_ALLOW_CODE_EVAL` is not `1`.
    """

    name = "trace"

    def __init__(self, form: str = FORM, tracer: Tracer | None = None):
        if form not in FORMS:
            raise ValueError(f"`form` is {form!r}; use one of {', '.join(map(repr, FORMS))}.")
        self.form = form
        self.tracer = tracer or Tracer()

    def propose(self, sources: Sequence[Source]) -> list[Proposed]:
        return [self.say(source, traced) for source, traced in zip(sources, self.trace(sources), strict=True)]

    def trace(self, sources: Sequence[Source]) -> list[Traced]:
        """Runs the programs, as many at a time as the sandbox has slots."""
        with ThreadPoolExecutor(self.tracer.sandbox.slots) as workers:
            return list(workers.map(self._trace, sources))

    def _trace(self, source: Source) -> Traced:
        # With carriage returns alone Python would count other lines than those between newlines.
        text = _without_mark(source.text)
        if parse(text) is None or re.search(r"\r(?!\n)", text):
            return Traced(none=Counter([NO_PYTHON]))
        return self.tracer(text, calls_of(text, source.row))

    def say(self, source: Source, traced: Traced) -> Proposed:
        """Puts a program's traces into words."""
        none, rows = Counter(traced.none), source.text.split("\n")
        answers = answers_of(parse(_without_mark(source.text)) or ast.Module([], []))
        traces = list(traced.asserts.items())
        traces += [(line, calls[0]) for line, calls in traced.calls.items() if line not in traced.asserts]
        comments = []
        for line, trace in sorted(traces, key=lambda pair: pair[0]):
            text = self._say(trace, rows, answers.get(line))
            if text in _REASONS:
                none[text] += 1
            else:
                comments.append(Comment(line, f" {text}"))
        return Proposed(tuple(comments), none)

    def _say(self, trace: Trace, rows: Sequence[str], answer: str | None) -> str:
        """The trace in words, or the reason why it is not told."""
        if not trace.count:
            return NO_CHANGE
        if only_says(trace, answer):
            return COPIES_ANSWER
        return write_trace(trace, rows, self.form) or TOO_LONG

    def close(self) -> None:
        """Ends the sandbox."""
        self.tracer.close()


def _without_mark(text: str) -> str:
    """The text without a mark of byte order, which Python takes at the beginning of files and not of strings."""
    return text.removeprefix("\ufeff")


_REASONS = (NO_CHANGE, COPIES_ANSWER, TOO_LONG)
