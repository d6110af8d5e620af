"""The seam of annotation: who proposes comments for a text, and what becomes of what was proposed.

The policy writes latents token by token, from its engine (`propose.py`). Everyone else is an [`Annotator`]: it sees
texts and says which comment it would write before which line. What it says is data. Here it becomes latents, or is
counted as dropped with the reason; which of them are placed the policy decides by what they are worth to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..records import AnnotatedExample, Document, Latent, TokenTable
from ..rollout import NoiseKey
from ..segmentation.tokens import encode_behind
from .annotate import annotate_proposed
from .tally import Tally


if TYPE_CHECKING:
    from .policy import Policy


# Why what was proposed is not placed.
NO_BOUNDARY, UNWRITABLE = "no latent may stand there", "not one line of plain text"
TOO_LONG, COPIES, TWICE = "longer than max_latent_length", "says the next line", "said twice"
NO_ROOM, NOT_WORTH = "no room in the row", "brings too little"


Text = tuple[str, Mapping[str, Any], Sequence[Document]]  # as it was cut, the row that it is from, its chunks


@dataclass(frozen=True)
class Source:
    """A text to be annotated.

    `text`: as it was cut. `lines`: numbers, from 1, of those before which a latent may stand. `row`: all columns of
    the row that it is from.
    """

    text: str
    lines: tuple[int, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comment:
    """What an annotator would write before a line: `text` without marker and newline."""

    line: int
    text: str


@dataclass(frozen=True)
class Proposed:
    """What an annotator says of a text: `comments`, several of a line if it likes; how often it had `none`, by the
    reason; and what it said that is no comment, `dropped` by the reason."""

    comments: tuple[Comment, ...] = ()
    none: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)


class Annotator(Protocol):
    """Proposes comments for texts. It need not see to where and how long they are."""

    name: str

    def propose(self, sources: Sequence[Source]) -> Iterable[Proposed]:
        """Proposes for each text, in their order; one by one where it works on later ones meanwhile."""


def boundary_lines(text: str, documents: Sequence[Document], data: Sequence[bytes | None]) -> list[dict[int, int]]:
    """Finds the line of `text`, from 1, of each boundary of its chunks; of several in a line it is the first.

    `data` holds the bytes of each token, as from `readable_bytes`. Tokens of a chunk's context stand in the chunk
    before or in what the text begins with.
    """
    whole = text.encode()
    said = b"".join(data[i] or b"" for d in documents for i in d.input_ids[d.context :])
    offset = len(whole) - len(said)
    if not whole.endswith(said[max(0, -offset) :]):  # special tokens stand in the text
        return [{} for _ in documents]
    lines: list[dict[int, int]] = []
    for document in documents:
        at: dict[int, int] = {}
        position = document.context
        for index, action in enumerate(document.actions):
            offset += sum(len(data[i] or b"") for i in document.input_ids[position : action.start])
            position = action.start
            if action.boundary is not None:
                start = max(offset, 0)
                start = len(whole) - len(whole[start:].lstrip())  # the first token may hold blank lines
                at.setdefault(whole.count(b"\n", 0, start) + 1, index)
        offset += sum(len(data[i] or b"") for i in document.input_ids[position:])
        lines.append(at)
    return lines


def source_of(policy: Policy, text: Text) -> Source:
    """What an annotator sees of a text."""
    whole, row, documents = text
    places = boundary_lines(whole, documents, policy.engine.table.token_bytes)
    return Source(whole, tuple(sorted(line for at in places for line in at)), row)


def as_latent(policy: Policy, text: str) -> Latent | str:
    """Makes the latent that says `text`, or gives the reason why there is none. A leading space goes where the
    tokenizer has it as a token by itself, which may not begin a latent."""
    marker, reason = policy.segmenter.format.think, UNWRITABLE
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a character, which tokenizers do not take
        return UNWRITABLE
    for said in (text, text.lstrip()):
        ids = encode_behind(policy.tokenizer, marker, said) if said.strip() else None
        if ids and _is_writable(ids, said, policy.engine.table):
            if len(ids) <= policy.args.max_latent_length:
                return Latent(tuple(ids), stopped=True)
            reason = TOO_LONG
    return reason


def _is_writable(ids: Sequence[int], text: str, table: TokenTable) -> bool:
    """Whether the sampler could have drawn these tokens, and they say the text."""
    said = [table.token_bytes[i] if i < len(table.token_bytes) else None for i in ids]
    if None in said or b"".join(filter(None, said)) != text.encode() or bool(table.blank_V[ids[0]]):
        return False
    state = 0
    for i in ids:
        state = int(table.next_state[state, i])
        if state < 0 or bool((table.stop_ids == i).any()):
            return False
    return True


@dataclass
class Annotation:
    """An annotator at work on texts: what it proposes is spliced in where the policy, its student, is helped by it.

    Args:
        annotator ([`Annotator`]):
            Who proposes.
        keep_all (`bool`, *optional*, defaults to `False`):
            Place all that can be placed, whatever it is worth.
        tally ([`Tally`], *optional*):
            Counts what becomes of the proposals.
    """

    annotator: Annotator
    keep_all: bool = False
    tally: Tally = field(default_factory=Tally)

    def __call__(self, policy: Policy, texts: Sequence[Text], noise: NoiseKey) -> Iterator[list[AnnotatedExample]]:
        """Annotates the chunks of each of some texts that are proposed for together, in their order.

        Raises:
            `ValueError`: if the annotator gives more or fewer proposals than it was asked for.
        """
        proposals = self.propose([source_of(policy, text) for text in texts])
        for text, proposed in zip(texts, proposals, strict=True):
            yield self.place(policy, text, proposed, noise)

    def propose(self, sources: Sequence[Source]) -> Iterator[Proposed]:
        """Asks the annotator, which may be ahead of what is taken.

        Raises:
            `ValueError`: if it gives more or fewer proposals than it was asked for.
        """
        answers, count = iter(self.annotator.propose(sources)), len(sources)
        for given in range(count):
            proposed = next(answers, None)
            if proposed is None:
                raise self._wrong_number(str(given), count)
            # Before the last is given, since who has it asks for no more.
            if given + 1 == count and next(answers, None) is not None:
                raise self._wrong_number(f"more than {count}", count)
            yield proposed

    def _wrong_number(self, gave: str, count: int) -> ValueError:
        return ValueError(
            f"the annotator {self.annotator.name!r} gave {gave} answers to {count} texts; give one for each."
        )

    def place(self, policy: Policy, text: Text, proposed: Proposed, noise: NoiseKey) -> list[AnnotatedExample]:
        """Splices what was proposed for a text into its chunks, where the student is helped by it, and counts."""
        whole, _, documents = text
        data = policy.engine.table.token_bytes
        where, rows = boundary_lines(whole, documents, data), whole.split("\n")
        latents = self._latents(policy, rows, documents, where, proposed)
        examples = annotate_proposed(policy, documents, latents, noise, self.keep_all)
        for example, chunk, at in zip(examples, latents, where, strict=True):
            next_line = {boundary: rows[line - 1] for line, boundary in at.items()}
            self._count(example, chunk, next_line, data)
        return examples

    def _latents(
        self,
        policy: Policy,
        rows: Sequence[str],
        documents: Sequence[Document],
        where: Sequence[Mapping[int, int]],
        proposed: Proposed,
    ) -> list[dict[int, list[Latent]]]:
        """The proposals for a text that can be placed, by chunk and boundary."""
        chunk_of = {line: (c, boundary) for c, at in enumerate(where) for line, boundary in at.items()}
        latents: list[dict[int, list[Latent]]] = [{} for _ in documents]
        self.tally.texts += 1
        self.tally.proposed += len(proposed.comments)
        self.tally.none.update(proposed.none)
        for reason, count in proposed.dropped.items():
            self.tally.proposed += count
            self.tally.drop(reason, count)
        for comment in proposed.comments:
            latent: Latent | str = NO_BOUNDARY
            if comment.line in chunk_of:
                c, boundary = chunk_of[comment.line]
                copies = rows[comment.line - 1].strip() in comment.text
                latent = COPIES if copies else as_latent(policy, comment.text)
            if not isinstance(latent, str) and latent in latents[c].get(boundary, ()):
                latent = TWICE
            if isinstance(latent, str):
                self.tally.drop(latent)
            else:
                latents[c].setdefault(boundary, []).append(latent)
        return latents

    def _count(
        self,
        example: AnnotatedExample,
        latents: Mapping[int, Sequence[Latent]],
        next_line: Mapping[int, str],
        data: Sequence[bytes | None],
    ) -> None:
        """Counts what became of the latents proposed for a chunk."""
        for boundary, row in sorted(latents.items()):
            kept, scored = boundary in example.placed, boundary in example.gains
            self.tally.kept += kept
            self.tally.drop(NOT_WORTH if scored else NO_ROOM, len(row) - kept)
            if scored:
                latent = example.placed.get(boundary, row[0])
                said = b"".join(data[i] or b"" for i in latent.token_ids).decode()
                self.tally.score(example.gains[boundary], said, next_line[boundary], kept)
