"""Prompts in which a latent is proposed by who has seen the lines that it explains.

The temporal ELBO holds for any q(z | s, a), so a latent may be drawn where the next lines are known: as the middle
between them and the code so far (fill in the middle), or as a chat's answer. A prompt becomes a *view*: a document as
any other, whose boundary has everything between the code so far and the latent for its think prefix. So the rollout
engines sample from it, and score under it, as they do without hindsight, sharing the document's prefix.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ...policy import token_text
from ...records import Boundary, Document
from ...segmentation.tokens import FIM_TOKENS, encode_behind


CHAT_INSTRUCTION = (
    "Here is the beginning of a program:\n\n{prefix}\n\nIt goes on with these lines:\n\n{suffix}\n\nWrite the short "
    "comment, a few words, that belongs right before these lines and makes it clear what they do. Reply with the "
    "comment only."
)
_PLACEHOLDERS = {"prefix": 1, "suffix": 1, "think": 0}  # how often at least; at most once
_MARKER = re.compile(r"\u2581?<[|\uff5c]?[A-Za-z][\w\u2581 -]*[|\uff5c]?>")  # what looks like a special token
ProposalFunc = Callable[[str, str], str]  # from the code so far and the next lines to a prompt
View = tuple[Document, tuple[int, ...]]  # a document, and where in it the wanted boundaries are


def _boundary(document: Document, at: int) -> Boundary:
    boundary = document.actions[at].boundary
    assert boundary is not None
    return boundary


def _next_lines(document: Document, at: int, lines: int) -> tuple[int, ...]:
    """Tokens that follow a latent at a boundary: what closes it, and `lines` lines of the document."""
    return (*_boundary(document, at).close, *document.lines_from(at, lines))


def _view(
    document: Document, lead: Sequence[int], rest: slice, which: Sequence[int], cues: dict[int, tuple[int, ...]]
) -> View:
    """The lines `which`, with `lead` before the `rest` of the document's tokens and `cues` for think prefixes; no
    boundary where there is no cue."""
    shift, actions = len(lead) - rest.start, []
    for i in which:
        action = document.actions[i]
        boundary = Boundary(cues[i], _boundary(document, i).close, decides=False) if i in cues else None
        actions.append(replace(action, start=action.start + shift, end=action.end + shift, boundary=boundary))
    ids = (*lead, *document.input_ids[rest])
    places = tuple(which.index(i) for i in cues)
    return replace(document, input_ids=ids, actions=tuple(actions), context=len(lead)), places


def _alone(document: Document, boundary: int, before: Sequence[int], cue: tuple[int, ...]) -> View:
    """The line of one boundary behind a prompt of its own."""
    action = document.actions[boundary]
    return _view(document, before, slice(action.start, action.end), (boundary,), {boundary: cue})


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt of tokens and placeholders.

    `pieces` are ids of literal text, or one of `"prefix"` (the document up to the boundary), `"think"` (its think
    prefix) and `"suffix"` (what closes a latent, and the next lines). Example, fill in the middle:
    `((151659,), "prefix", "think", (151661,), "suffix", (151660,))`.
    """

    pieces: tuple[tuple[int, ...] | str, ...]
    bos_token_id: int | None = None

    @property
    def shares_prefix(self) -> bool:
        """Whether what stands before the code so far is the same at all boundaries."""
        return all(not isinstance(piece, str) for piece in self.pieces[: self.pieces.index("prefix")])

    @property
    def length(self) -> int:
        """Tokens besides the document's own."""
        return sum(len(piece) for piece in self.pieces if not isinstance(piece, str))

    @property
    def settings(self) -> Any:
        """What a resumed run must share."""
        return self.pieces

    def views(self, document: Document, boundaries: Sequence[int], lines: int) -> list[View]:
        """Documents with the prompts of `boundaries`, in order: one for all where they share their prefix, else one
        each. The next `lines` lines are known."""
        at, ids = self.pieces.index("prefix"), document.input_ids
        bos = ids[: int(ids[:1] == (self.bos_token_id,))]

        def fill(pieces: Sequence[tuple[int, ...] | str], boundary: int) -> tuple[int, ...]:
            filled: list[int] = []
            for piece in pieces:
                if piece == "think":
                    filled += _boundary(document, boundary).think
                else:
                    filled += _next_lines(document, boundary, lines) if isinstance(piece, str) else piece
            return tuple(filled)

        def lead(boundary: int) -> tuple[int, ...]:
            filled = fill(self.pieces[:at], boundary)
            return filled if filled[:1] == bos else (*bos, *filled)  # chat templates begin with one; one is enough

        cues = {boundary: fill(self.pieces[at + 1 :], boundary) for boundary in boundaries}
        if self.shares_prefix:
            every_line = range(len(document.actions))
            return [_view(document, lead(0), slice(len(bos), None), every_line, cues)] if boundaries else []
        return [
            _alone(document, boundary, (*lead(boundary), *ids[len(bos) : document.actions[boundary].start]), cue)
            for boundary, cue in cues.items()
        ]


@dataclass(frozen=True)
class PromptFunction:
    """Prompts that a user's `function` writes: the text behind which the latent begins. `longest`: most tokens of a
    prompt and a line."""

    function: ProposalFunc
    tokenizer: PreTrainedTokenizerBase
    longest: int
    shares_prefix = False

    def __post_init__(self):
        cure = "give a function of two texts, the code so far and the next lines"
        if not callable(self.function):
            raise ValueError(f"`proposal_func` is {self.function!r}; {cure}.")
        try:
            inspect.signature(self.function).bind("", "")
        except TypeError as error:
            raise ValueError(f"`proposal_func` does not take what it is given ({error}); {cure}.") from error
        except ValueError:
            pass  # some that are built in have no signature

    @property
    def settings(self) -> str:
        """What a resumed run must share: the function's name, since more of it can't be compared."""
        named = inspect.isroutine(self.function) or inspect.isclass(self.function)
        return (self.function if named else type(self.function)).__qualname__

    def views(self, document: Document, boundaries: Sequence[int], lines: int) -> list[View]:
        """One view a boundary: the prompt in the place of the code so far."""
        views, ids = [], document.input_ids
        bos = ids[: int(ids[:1] == (self.tokenizer.bos_token_id,))]
        for boundary in boundaries:
            action = document.actions[boundary]
            known = _next_lines(document, boundary, lines)
            text = self.function(*(token_text(self.tokenizer, t) for t in (ids[len(bos) : action.start], known)))
            if not isinstance(text, str) or not text:
                raise ValueError(f"`proposal_func` returned {text!r}; return the prompt, a text that is not empty.")
            prompt = (*bos, *self.tokenizer(text, add_special_tokens=False)["input_ids"])
            room = self.longest - (action.end - action.start) - len(_boundary(document, boundary).close)
            if len(prompt) > room:
                raise ValueError(
                    f"`proposal_func` returned a prompt of {len(prompt)} tokens, but the model's context leaves room "
                    f"for {room}; return a shorter one, or lower `proposal_lines`."
                )
            views.append(_alone(document, boundary, prompt[:-1], prompt[-1:]))
        return views


Prompt = PromptTemplate | PromptFunction


def fim_template(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """Fill in the middle, by the tokens that the tokenizer has for it; a `ValueError` if it lacks some."""
    vocabulary, missing = tokenizer.get_vocab(), []
    for markers in FIM_TOKENS:
        absent = [marker for marker in markers if vocabulary.get(marker) in (None, tokenizer.unk_token_id)]
        if not absent:
            prefix, suffix, middle = ((vocabulary[marker],) for marker in markers)
            return PromptTemplate((prefix, "prefix", "think", suffix, "suffix", middle), tokenizer.bos_token_id)
        missing += absent if len(absent) < len(markers) else []
    if missing:
        raise ValueError(f"`proposal` has 'fim', but the tokenizer lacks {missing} as tokens of their own; add them.")
    looked_for = ", ".join(markers[0] for markers in FIM_TOKENS)
    raise ValueError(
        f"`proposal` has 'fim', but the tokenizer has no tokens for filling in the middle (looked for {looked_for}); "
        "use 'chat', a `proposal_template`, or 'causal'."
    )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """An instruction to a chat model, whose answer begins with the think prefix; a `ValueError` if there is no chat
    template, or none that leaves an instruction as it is."""
    if not tokenizer.chat_template:
        raise ValueError(
            "`proposal` has 'chat', but the tokenizer has no chat template; use an instruction-tuned model, 'fim', a "
            "`proposal_template`, or 'causal'."
        )
    turns = [{"role": "user", "content": CHAT_INSTRUCTION}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise ValueError(
            f"`proposal` has 'chat', but the tokenizer's chat template refuses a user's instruction: {error}. Use "
            "a `proposal_template`, or 'causal'."
        ) from error
    if any(text.count(placeholder) != 1 for placeholder in ("{prefix}", "{suffix}")):
        raise ValueError(
            "`proposal` has 'chat', but the tokenizer's chat template does not leave the instruction as it is; use a "
            "`proposal_template`, or 'causal'."
        )
    before, _, rest = text.partition("{prefix}")
    between, _, behind = rest.partition("{suffix}")
    return _template([before, "prefix", between, "suffix", behind, "think"], tokenizer)


def parse_template(text: str, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """A `proposal_template`: text with `{prefix}`, `{suffix}` and, if wanted, `{think}`; other braces are doubled.

    Raises:
        `ValueError`: for placeholders that are missing, unknown or there twice, nothing behind `{prefix}`, or what
            looks like a special token and is not one of the tokenizer's.
    """
    words = [""]  # literal text and placeholders in turn
    for word in re.split(r"(\{\{|\}\}|\{\w*\}|[{}])", text):
        if word in ("{{", "}}"):
            words[-1] += word[0]
        elif word.startswith("{") and word[1:-1] in _PLACEHOLDERS:
            words += [word[1:-1], ""]
        elif word.startswith(("{", "}")):
            raise ValueError(
                f"`proposal_template` has {word!r}; its placeholders are {{prefix}}, {{think}} and {{suffix}}, other "
                "braces are doubled."
            )
        else:
            words[-1] += word
    for placeholder, least in _PLACEHOLDERS.items():
        count = words[1::2].count(placeholder)
        if not least <= count <= 1:
            times = "once" if least else "at most once"
            raise ValueError(f"`proposal_template` has {{{placeholder}}} {count} times; it must be there {times}.")
    for marker in _MARKER.findall("".join(words[::2])):
        if len(split := _encode(tokenizer, marker)) != 1:
            raise ValueError(
                f"`proposal_template` has {marker!r}, which the tokenizer splits into {len(split)} tokens; use its "
                "own special tokens, or write it otherwise if it is meant as text."
            )
    template = _template(words, tokenizer)
    if template.pieces[-1] == "prefix":
        raise ValueError("`proposal_template` ends with {prefix}; put {think} or other text behind it.")
    return template


def _template(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """A template of literal text and placeholders in turn."""
    encoded = (word if i % 2 else _encode(tokenizer, word, inside=i > 0) for i, word in enumerate(words))
    return PromptTemplate(tuple(piece for piece in encoded if piece), tokenizer.bos_token_id)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, inside: bool = False) -> tuple[int, ...]:
    """Tokens of `text`; `inside` another one behind an anchor, so that no dummy space gets before it."""
    encoded = (encode_behind(tokenizer, anchor, text) for anchor in (("\n", "a", "") if inside else ("",)))
    return tuple(next(ids for ids in encoded if ids is not None))
