"""Text -> `Document`s: boundaries found by offsets on the natural tokenization, long texts cut between actions.

Tokenizing each line by itself would be simpler and wrong: the model never saw such tokens, and the line without a
comment would be scored in them (docs/design.md, "Text to actions").
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..records import Action, AnnotatedExample, Boundary, Document, Latent
from .format import ActionFormat
from .lines import Line
from .tokens import FragmentEncoder, require_tags, token_bytes, without_bos


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Counts the leading tokens that two texts have in common: as in TRL, a completion begins behind them, and not
    behind the prompt's own, whose last may merge with it."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


class Encoding(NamedTuple):
    """Holds the token ids of a text with their character spans."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    bos: int  # tokens at the start that stand for no text


class Tokens(NamedTuple):
    """Holds a text whose tokens are given: a conversation's, or a row's `input_ids`. No EOS is added to them."""

    text: str
    encoding: Encoding
    trained: tuple[bool, ...]  # of each token
    regions: tuple[tuple[int, int], ...]  # characters among which the format looks for lines, in each by itself


class Segmenter:
    """Cuts texts into documents of at most `max_tokens` tokens.

    BOS is there iff the tokenizer, a fast one, adds one by default, once, and one EOS ends each text, whether or not
    the text says so itself. Special tokens elsewhere in a text are opaque: there is no boundary next to them. The
    tokenizer must have the format's tags, if it has any. The expert's own comments are observed latents (`"keep"`) or
    go (`"strip"`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        action_format: ActionFormat,
        max_tokens: int,
        existing_comments: str = "keep",
        trains_merged: bool = False,
    ):
        self.tokenizer = tokenizer
        self.format = action_format
        self.max_tokens = max_tokens
        self.existing_comments = existing_comments
        self.trains_merged = trains_merged
        self.fragment = FragmentEncoder(tokenizer)
        self._bytes = token_bytes(tokenizer)
        self._tags = set(require_tags(tokenizer, action_format).values())

    def __call__(self, doc_id: int, text: str, prompt_chars: int = 0) -> list[Document]:
        """Cuts `text`, whose first `prompt_chars` characters are a prompt; an empty one into none."""
        bare = without_bos(self.tokenizer, text)
        prompt_chars = max(0, prompt_chars - (len(text) - len(bare)))
        text = bare[:prompt_chars] + bare[prompt_chars:].removesuffix(self.tokenizer.eos_token)
        if self.existing_comments == "strip":
            text = self.format.strip(text, prompt_chars)
        if not text[prompt_chars:] and len(text) == len(bare):  # of an end of text alone that end is trained
            return []
        enc = self._tokenize(text)
        if not enc.ids[enc.bos :]:  # a normalizer may leave nothing of white space
            return []
        prompt_tokens = bisect_right(enc.starts, prompt_chars - 1) if prompt_chars else 0
        if self.trains_merged and prompt_chars:
            prompt_tokens = common_prefix(self.tokenizer(text[:prompt_chars], verbose=False)["input_ids"], enc.ids)
        context = max(enc.bos, prompt_tokens)
        lines, status = self._lines(text, prompt_chars, enc), "actions"
        if lines is None:
            status = self._refused(text)
        elif not self._gives_back(text, enc):
            lines, status = None, "lossy"
        actions = self._actions(text, lines or (), enc, context)
        ids = (*enc.ids, self.tokenizer.eos_token_id)
        return _chunk(Document(doc_id, 0, ids, actions, context, status), self.max_tokens)

    def cut_tokens(self, doc_id: int, tokens: Tokens) -> list[Document]:
        """Cuts a text whose tokens are given; one without a trained token into none."""
        text, enc, trained, regions = tokens
        if not any(trained[1:]):
            return []
        context = max(enc.bos, trained.index(True))
        ends = enc.ids[-1] == self.tokenizer.eos_token_id and trained[-1]  # with an EOS, which is no line's
        count = len(enc.ids) - ends
        inner = Encoding(enc.ids[:count], enc.starts[:count], enc.ends[:count], enc.bos)
        lines, statuses, edges = list[Line](), set[str](), set[int]()
        parts = [part for region in regions for part in self._between_special(enc, *region)]
        while parts:
            start, end = parts.pop(0)
            read, within = self.format.segment(text[start:end]), _within(enc, start, end)
            if read is None:
                learned = [(a, b) for a, b, flag in zip(*enc[1:3], trained, strict=True) if flag and start <= a < end]
                begin = learned[0][0] if learned else start
                if begin > start:  # what stands before it may be no code
                    parts.insert(0, (begin, end))
                statuses.add(self._refused(text[start:end]))
            elif not self._gives_back(text[start:end], within):
                statuses.add("lossy")
            else:
                # A latent begins behind a newline, unless the format needs none.
                free = self.format.end != "\n" or start == 0 or text[start - 1] == "\n"
                lines += [replace(x.moved(start), latent=x.latent and (x.start > 0 or free)) for x in read]
                edges.add(bisect_left(enc.starts, end))
                statuses.add("actions")
        status = next((name for name in ("actions", "lossy", "untokenized", "plain") if name in statuses), "actions")
        actions = self._actions(text, tuple(lines), inner, context, trained[:count], edges)
        return _chunk(Document(doc_id, 0, enc.ids, actions, context, status), self.max_tokens)

    def _refused(self, text: str) -> str:
        """The status of a text that is not cut into lines."""
        return "untokenized" if self.format.parses(text) else "plain"

    def _between_special(self, enc: Encoding, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of a region between its special tokens."""
        special = [i for i in range(len(enc.ids)) if start <= enc.starts[i] < end and self._bytes[enc.ids[i]] is None]
        bounds = [start, *(at for i in special for at in (enc.starts[i], enc.ends[i])), end]
        return [(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b]

    def _tokenize(self, text: str) -> Encoding:
        enc = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
        ids, offsets = enc["input_ids"], enc["offset_mapping"]
        added = [bool(s) and a == b for s, (a, b) in zip(enc["special_tokens_mask"], offsets, strict=True)]
        bos = next((i for i, special in enumerate(added) if not special), len(ids))
        stop = next((i for i in range(bos, len(ids)) if added[i]), len(ids))
        spans = [(0, 0)] * bos + offsets[bos:stop]
        return Encoding(tuple(ids[:stop]), tuple(a for a, _ in spans), tuple(b for _, b in spans), bos)

    def _opaque(self, text: str, enc: Encoding) -> list[int]:
        """Finds the special tokens that stand in the text; the white space around them may be theirs."""
        return [
            i
            for i in range(enc.bos, len(enc.ids))
            if self._bytes[enc.ids[i]] is None
            and text[enc.starts[i] : enc.ends[i]].strip() == self.tokenizer.convert_ids_to_tokens(enc.ids[i])
        ]

    def _parts(self, text: str, enc: Encoding) -> list[tuple[bytes, bytes]]:
        """Pairs what the tokens between special ones say with what the text says there."""
        parts, first, start = [], enc.bos, 0
        for i in [*self._opaque(text, enc), len(enc.ids)]:
            end = enc.starts[i] if i < len(enc.ids) else len(text)
            said = b"".join(self._bytes[token] or b"\xff" for token in enc.ids[first:i])
            parts.append((said, text[start:end].encode()))
            first, start = i + 1, enc.ends[i] if i < len(enc.ids) else end
        return parts

    def _gives_back(self, text: str, enc: Encoding) -> bool:
        if any(enc.ids[i] in self._tags for i in self._opaque(text, enc)):
            return False  # who takes the latents out would take these with them
        return all(said in (part, b" " + part) for said, part in self._parts(text, enc))

    def _lines(self, text: str, prompt_chars: int, enc: Encoding) -> tuple[Line, ...] | None:
        """Cuts the text into lines, special tokens read as commas, which change nothing in any format.

        A prompt with special tokens may be a chat, which need not be of the format: then what stands behind the last
        of them is read, or the completion by itself.
        """
        begins, read = [0], text
        for i in self._opaque(text, enc):
            start, end = enc.starts[i], enc.ends[i]
            token = text[start:end].strip()
            read = read[:start] + read[start:end].replace(token, "," * len(token)) + read[end:]
            if end <= prompt_chars:
                begins = [0, end, prompt_chars]
        for begin in begins:
            lines = self.format.segment(read[begin:])
            if lines is not None:
                lines = tuple(x.moved(begin) for x in lines)
                return lines if begin == 0 or read[begin - 1] == "\n" else lines[1:]  # a row's rest begins no line
        return None

    def _actions(
        self,
        text: str,
        lines: tuple[Line, ...],
        enc: Encoding,
        context: int,
        trained: Sequence[bool] = (),
        ends: Iterable[int] = (),
    ) -> tuple[Action, ...]:
        """Lists actions that tile the tokens from `context` on; a line that starts inside a token joins the one
        before. What is not `trained` (all is, if left out) is an action by itself; at `ends` lines end too."""
        cuts: dict[int, tuple[Boundary | None, bool]] = {}
        after_comment = False
        for line in lines:
            start = self._start(line, enc)
            if start is not None and context <= start < len(enc.ids):
                without = line.comment or after_comment or not line.latent or self._is_beside_special(start, enc)
                cuts[start] = (None if without else self._boundary(text, line, start, enc), line.comment)
            after_comment = line.comment
        masked = [i for i, flag in enumerate(trained) if not flag and i >= context]
        for i in masked:
            cuts.pop(i, None)
        edges = (
            {context, *cuts, len(enc.ids)}
            | {i for i in ends if context < i < len(enc.ids)}
            | {i for i in masked if trained[i - 1]}
        )
        edges |= {i + 1 for i in masked if i + 1 < len(enc.ids) and trained[i + 1]}
        ordered, hidden = sorted(edges), set(masked)
        return tuple(
            Action(i, start, end, None, True, False)
            if start in hidden
            else Action(i, start, end, *cuts.get(start, (None, False)))
            for i, (start, end) in enumerate(zip(ordered, ordered[1:], strict=False))
        )

    def _is_beside_special(self, start: int, enc: Encoding) -> bool:
        return any(self._bytes[enc.ids[i]] is None for i in (start - 1, start) if i >= enc.bos)

    def _start(self, line: Line, enc: Encoding) -> int | None:
        """Finds the first token of `line` after the carry; `None` when a token straddles the line's start."""
        if line.start == 0:
            return enc.bos
        last = bisect_right(enc.ends, line.start - 1)  # the first token that holds the last character before
        last = bisect_right(enc.ends, enc.ends[last]) - 1  # a character of several bytes may be of several tokens
        return last + 1 if enc.ends[last] <= line.text_start else None

    def _boundary(self, text: str, line: Line, start: int, enc: Encoding) -> Boundary | None:
        if line.start > 0:
            carry = text[line.start : enc.ends[start - 1]]
        elif enc.bos and not text.startswith("\ufeff") and len(set(self._parts(text, enc)[0])) == 1:  # both are equal
            carry = ""
        else:  # nothing predicts the first token, or it holds a dummy space that may not follow a comment
            return None
        think = self.fragment(self.format.think_text(line.indent, carry, line.think))
        close = self.fragment(self.format.close_text(carry))
        return None if think is None or close is None else Boundary(think, close)


def _within(enc: Encoding, start: int, end: int) -> Encoding:
    """The tokens that stand for characters of a part of the text and no others."""
    inside = [i for i in range(enc.bos, len(enc.ids)) if start <= enc.starts[i] and enc.ends[i] <= end]
    ids, starts, ends = ([column[i] for i in inside] for column in (enc.ids, enc.starts, enc.ends))
    return Encoding(tuple(ids), tuple(starts), tuple(ends), bos=0)


def _chunk(document: Document, max_tokens: int) -> list[Document]:
    """Cuts a document between actions; each later chunk starts with the last token of the one before as context.

    No token is lost or trained twice: the trained parts of the chunks, joined, are those of the document. An action
    longer than a chunk is cut inside, its later pieces without a boundary.
    """
    if len(document.input_ids) <= max_tokens:
        return [document]
    room = max_tokens - 1
    ids, tail = document.input_ids, len(document.input_ids)
    first = max(0, document.context - room // 2)  # a prompt longer than half a chunk keeps its end only
    pieces: list[Action] = []
    for action in document.actions:
        for start in range(action.start, action.end, room // 2):
            end = min(action.end, start + room // 2)
            pieces.append(
                replace(action, start=start, end=end, boundary=None if start > action.start else action.boundary)
            )
    chunks: list[Document] = []
    begin, taken = first, list[Action]()

    def close(end: int) -> None:
        shift = begin
        actions = tuple(replace(a, start=a.start - shift, end=a.end - shift) for a in taken)
        context = (document.context - shift) if not chunks else 1
        chunks.append(Document(document.doc_id, len(chunks), ids[begin:end], actions, context, document.status))

    for piece in pieces:
        if taken and piece.end - begin > room:
            close(piece.start)
            begin, taken = piece.start - 1, []
        taken.append(piece)
    close(tail)
    return chunks


def splice(document: Document, placed: dict[int, Latent]) -> AnnotatedExample:
    """Splices `placed[i]` into the document before action `i`.

    The expert's tokens stay as they are; each latent becomes think prefix + its tokens + closure. The document of the
    result has its actions shifted and its boundaries kept: before an annotated line stands the decision not to think
    again.
    """
    ids: list[int] = list(document.input_ids[: document.context])
    is_latent = [False] * len(ids)
    actions: list[Action] = []
    decisions: dict[int, int] = {}
    for i, action in enumerate(document.actions):
        if action.boundary is not None:
            decisions[len(ids) - 1] = i
        if i in placed:
            latent = [*action.think, *placed[i].token_ids, *action.close]
            ids += latent
            is_latent += [True] * len(latent)
        start = len(ids)
        ids += document.input_ids[action.start : action.end]
        is_latent += [False] * (len(ids) - start)
        actions.append(replace(action, start=start, end=len(ids)))
    end = document.actions[-1].end if document.actions else document.context
    ids += document.input_ids[end:]
    is_latent += [False] * (len(ids) - len(is_latent))
    # The first token of a row is never predicted, so without BOS it is context too.
    context = max(document.context, 1)
    labels = [-100] * context + ids[context:]
    for action in actions:
        if not action.trained:
            labels[action.start : action.end] = [-100] * (action.end - action.start)
    spliced = replace(document, input_ids=tuple(ids), actions=tuple(actions))
    return AnnotatedExample(spliced, tuple(ids), tuple(labels), tuple(is_latent), dict(placed), decisions)
