"""Prompts in which a latent is proposed by who has seen the lines that it explains.

The temporal ELBO holds for any q(z | s, a), so a latent may be drawn where the next lines are known: as the middle
between them and the code so far (fill in the middle), or as a chat's answer. A prompt becomes a *view*: a document as
any other, whose boundary has everything between the code so far and the latent for its think prefix. So the rollout
engines sample from it, and score under it, as they do without hindsight, sharing the document's prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..records import Action, Boundary, Document
from .tokens import FIM_TOKENS, encode_behind


CHAT_INSTRUCTION = (
    "Here is the beginning of a program:\n\n{prefix}\n\nIt goes on with these lines:\n\n{suffix}\n\nWrite the short "
    "comment, a few words, that belongs right before these lines and makes it clear what they do. Reply with the "
    "comment only."
)
_PLACEHOLDERS = ("prefix", "think", "suffix")
_MARKER = re.compile(r"\u2581?<[|\uff5c]?[A-Za-z][\w\u2581 -]*[|\uff5c]?>")  # what looks like a special token
View = tuple[Document, tuple[int, ...]]  # a document, and where its boundaries of the wanted boundaries are


class Prompt(Protocol):
    """How latents are proposed in hindsight."""

    shares_prefix: bool
    settings: Any  # what a resumed run must share, as JSON

    def views(self, document: Document, boundaries: Sequence[int], lines: int) -> list[View]:
        """Documents with the prompts of `boundaries`, in order; the next `lines` lines are known."""


def next_lines(document: Document, boundary: int, lines: int) -> tuple[int, ...]:
    """Tokens that follow a latent at `boundary`: what closes it, and `lines` lines of the document."""
    return (*document.actions[boundary].boundary.close, *document.lines_from(boundary, lines))


def _view(document: Document, lead: Sequence[int], cues: dict[int, Sequence[int]], bos: bool) -> View:
    """`lead` before the document (behind its BOS), `cues` for think prefixes at boundaries, none elsewhere."""
    begin, shift = int(bos), len(lead)

    def moved(i: int, action: Action) -> Action:
        boundary = Boundary(tuple(cues[i]), action.boundary.close, decides=False) if i in cues else None
        return replace(action, start=action.start + shift, end=action.end + shift, boundary=boundary)

    ids = (*document.input_ids[:begin], *lead, *document.input_ids[begin:])
    actions = tuple(moved(i, action) for i, action in enumerate(document.actions))
    return replace(document, input_ids=ids, actions=actions, context=document.context + shift), tuple(cues)


def _alone(document: Document, boundary: int, before: Sequence[int], cue: Sequence[int]) -> View:
    """The line of one boundary behind a prompt of its own: `before` and, for a think prefix, `cue`."""
    action, begin = document.actions[boundary], len(before)
    line = document.input_ids[action.start : action.end]
    cued = Boundary(tuple(cue), action.boundary.close, decides=False)
    moved = replace(action, start=begin, end=begin + len(line), boundary=cued)
    return replace(document, input_ids=(*before, *line), actions=(moved,), context=1), (0,)


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt of tokens and placeholders.

    `pieces` are ids of literal text, or one of `"prefix"` (the document up to the boundary), `"think"` (its think
    prefix) and `"suffix"` (what closes a latent, and the next lines). Example, fill in the middle:
    `((151659,), "prefix", "think", (151661,), "suffix", (151660,))`.
    """

    pieces: tuple[tuple[int, ...] | str, ...]
    bos_token_id: int | None = None
    opens_with_bos: bool = False  # as chat templates do; the document may have one already, and one is enough

    @property
    def shares_prefix(self) -> bool:
        """Whether what stands before the code so far is the same at all boundaries."""
        return all(not isinstance(piece, str) for piece in self.pieces[: self.pieces.index("prefix")])

    @property
    def length(self) -> int:
        """Tokens besides the document's own."""
        return sum(len(piece) for piece in self.pieces if not isinstance(piece, str))

    @property
    def settings(self) -> list[list[int] | str]:
        return [piece if isinstance(piece, str) else list(piece) for piece in self.pieces]

    def views(self, document: Document, boundaries: Sequence[int], lines: int) -> list[View]:
        """One view of all boundaries where they share their prefix, else one of each."""
        at = self.pieces.index("prefix")
        starts_with_bos = bool(document.input_ids) and document.input_ids[0] == self.bos_token_id
        bos = (self.bos_token_id,) if self.opens_with_bos and not starts_with_bos else ()
        cues = {boundary: self._fill(self.pieces[at + 1 :], document, boundary, lines) for boundary in boundaries}
        if self.shares_prefix:
            lead = (*bos, *self._fill(self.pieces[:at], document, 0, lines))
            return [_view(document, lead, cues, starts_with_bos)] if boundaries else []
        first, ids = int(starts_with_bos), document.input_ids
        leads = {
            boundary: (*ids[:first], *bos, *self._fill(self.pieces[:at], document, boundary, lines))
            for boundary in boundaries
        }
        return [
            _alone(document, boundary, (*lead, *ids[first : document.actions[boundary].start]), cues[boundary])
            for boundary, lead in leads.items()
        ]

    def _fill(self, pieces: Sequence[tuple[int, ...] | str], document: Document, boundary: int, lines: int):
        found: list[int] = []
        for piece in pieces:
            if piece == "think":
                found += document.actions[boundary].boundary.think
            else:
                found += next_lines(document, boundary, lines) if piece == "suffix" else piece
        return tuple(found)


@dataclass(frozen=True)
class PromptFunction:
    """Prompts that a user's function writes.

    Args:
        function (`Callable[[str, str], str]`):
            From the code so far and the next lines to the text behind which the latent begins.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            For both ways.
        longest (`int`):
            Most tokens of a prompt and a line.
    """

    function: Callable[[str, str], str]
    tokenizer: PreTrainedTokenizerBase
    longest: int
    shares_prefix = False

    @property
    def settings(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)

    def views(self, document: Document, boundaries: Sequence[int], lines: int) -> list[View]:
        """One view a boundary: the prompt in the place of the code so far."""
        return [self._view_of(document, boundary, lines) for boundary in boundaries]

    def _view_of(self, document: Document, boundary: int, lines: int) -> View:
        ids, action = document.input_ids, document.actions[boundary]
        bos = ids[:1] if ids[0] == self.tokenizer.bos_token_id else ()
        text = self.function(
            self._text(ids[len(bos) : action.start]), self._text(next_lines(document, boundary, lines))
        )
        if not isinstance(text, str) or not text:
            raise ValueError(f"`proposal_func` returned {text!r}; return the prompt, a text that is not empty.")
        prompt = (*bos, *self.tokenizer(text, add_special_tokens=False)["input_ids"])
        room = self.longest - (action.end - action.start) - len(action.boundary.close)
        if len(prompt) > room:
            raise ValueError(
                f"`proposal_func` returned a prompt of {len(prompt)} tokens, but the model's context leaves room for "
                f"{room}; return a shorter one, or lower `proposal_lines`."
            )
        return _alone(document, boundary, prompt[:-1], prompt[-1:])

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _special_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    index = tokenizer.get_vocab().get(text)
    return None if index is None or index == tokenizer.unk_token_id else index


def fim_template(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """Fill in the middle, by the tokens that the tokenizer has for it.

    Raises:
        `ValueError`: if it has none, or only some of them.
    """
    missing: list[str] = []
    for markers in FIM_TOKENS:
        ids = [_special_id(tokenizer, marker) for marker in markers]
        if None not in ids:
            prefix, suffix, middle = ((i,) for i in ids)
            return PromptTemplate((prefix, "prefix", "think", suffix, "suffix", middle), tokenizer.bos_token_id)
        if any(i is not None for i in ids):
            missing += [marker for marker, i in zip(markers, ids, strict=True) if i is None]
    if missing:
        raise ValueError(f"`proposal` has 'fim', but the tokenizer lacks {missing} as tokens of their own; add them.")
    looked_for = ", ".join(markers[0] for markers in FIM_TOKENS)
    raise ValueError(
        f"`proposal` has 'fim', but the tokenizer has no tokens for filling in the middle (looked for {looked_for}); "
        "use 'chat', a `proposal_template`, or 'causal'."
    )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """An instruction to a chat model, whose answer begins with the think prefix.

    Raises:
        `ValueError`: if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "`proposal` has 'chat', but the tokenizer has no chat template; use an instruction-tuned model, 'fim', a "
            "`proposal_template`, or 'causal'."
        )
    turns = [{"role": "user", "content": CHAT_INSTRUCTION}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"`proposal` has 'chat', but the tokenizer's chat template refuses a user's instruction: {error}. Use "
            "a `proposal_template`, or 'causal'."
        ) from error
    if any(text.count(f"{{{name}}}") != 1 for name in ("prefix", "suffix")):
        raise ValueError(
            "`proposal` has 'chat', but the tokenizer's chat template does not leave the instruction as it is; use a "
            "`proposal_template`, or 'causal'."
        )
    return parse_template(text.replace("{", "{{").replace("}", "}}").replace("{{prefix}}", "{prefix}").replace(
        "{{suffix}}", "{suffix}") + "{think}", tokenizer, "chat")  # fmt: skip


def parse_template(text: str, tokenizer: PreTrainedTokenizerBase, name: str = "proposal_template") -> PromptTemplate:
    """A template of text with `{prefix}`, `{suffix}` and, if wanted, `{think}`; braces are doubled.

    Raises:
        `ValueError`: for placeholders that are missing, unknown or there twice, nothing behind `{prefix}`, or what
            looks like a special token and is not one of the tokenizer's.
    """
    parts = re.split(r"(\{\{|\}\}|\{\w*\}|[{}])", text)
    pieces, literal = [], ""
    for part in parts:
        if part in ("{{", "}}"):
            literal += part[0]
        elif part.startswith("{") and part[1:-1] in _PLACEHOLDERS:
            pieces += [literal, part[1:-1]]
            literal = ""
        elif part in ("{", "}") or part.startswith("{"):
            raise ValueError(
                f"`{name}` has {part!r}; its placeholders are {{prefix}}, {{think}} and {{suffix}}, other braces are "
                "doubled."
            )
        else:
            literal += part
    pieces.append(literal)
    for wanted, least in (("prefix", 1), ("suffix", 1), ("think", 0)):
        if not least <= pieces[1::2].count(wanted) <= 1:
            times = "at most once" if not least else "once"
            raise ValueError(
                f"`{name}` has {{{wanted}}} {pieces[1::2].count(wanted)} times; it must be there {times}."
            )
    split = name != "chat" and [m for m in _MARKER.findall("".join(pieces[::2])) if len(_encode(tokenizer, m)) != 1]
    if split:
        raise ValueError(
            f"`{name}` has {split[0]!r}, which the tokenizer splits into {len(_encode(tokenizer, split[0]))} tokens; "
            "use its own special tokens, or write it otherwise if it is meant as text."
        )
    found = [piece if i % 2 else _encode(tokenizer, piece, inside=i > 0) for i, piece in enumerate(pieces)]
    opens_with_bos = bool(found[0]) and found[0][0] == tokenizer.bos_token_id
    found[0] = found[0][opens_with_bos:]
    found = tuple(piece for piece in found if piece)
    if found[-1] == "prefix":
        raise ValueError(f"`{name}` ends with {{prefix}}; put {{think}} or other text behind it.")
    return PromptTemplate(found, tokenizer.bos_token_id, opens_with_bos)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, inside: bool = False) -> tuple[int, ...]:
    """Tokens of `text`; `inside` another one behind an anchor, so that no dummy space gets before it."""
    found = (encode_behind(tokenizer, anchor, text) for anchor in (("\n", "a", "") if inside else ("",)))
    return tuple(next(ids for ids in found if ids is not None))
