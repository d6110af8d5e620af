"""Text -> `Document`s: boundaries found by offsets on the natural tokenization, long texts cut between actions.

Tokenizing each line by itself would be simpler and wrong: the model never saw such tokens, and the line without a
comment would be scored in them (docs/design.md, "Text to actions").
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..records import Action, AnnotatedExample, Boundary, Document, Latent
from .format import ActionFormat
from .lines import Line
from .tokens import FragmentEncoder, require_tags, token_bytes, without_bos


class Encoding(NamedTuple):
    """Holds the token ids of a text with their character spans."""

    ids: tuple[int, ...]
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    bos: int  # tokens at the start that stand for no text


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
    ):
        self.tokenizer = tokenizer
        self.format = action_format
        self.max_tokens = max_tokens
        self.existing_comments = existing_comments
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
        context = max(enc.bos, self._prompt_tokens(text[:prompt_chars], enc))
        lines, status = self._lines(text, prompt_chars, enc), "actions"
        if lines is None:
            status = "plain"
        elif not self._gives_back(text, enc):
            lines, status = None, "lossy"
        actions = self._actions(text, lines or (), enc, context)
        ids = (*enc.ids, self.tokenizer.eos_token_id)
        return _chunk(Document(doc_id, 0, ids, actions, context, status), self.max_tokens)

    def _tokenize(self, text: str) -> Encoding:
        enc = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
        ids, offsets = enc["input_ids"], enc["offset_mapping"]
        added = [bool(s) and a == b for s, (a, b) in zip(enc["special_tokens_mask"], offsets, strict=True)]
        bos = next((i for i, special in enumerate(added) if not special), len(ids))
        stop = next((i for i in range(bos, len(ids)) if added[i]), len(ids))
        spans = [(0, 0)] * bos + offsets[bos:stop]
        return Encoding(tuple(ids[:stop]), tuple(a for a, _ in spans), tuple(b for _, b in spans), bos)

    def _prompt_tokens(self, prompt: str, enc: Encoding) -> int:
        """Counts the tokens that a prompt has by itself and in its text: a token that the completion makes another one
        is trained, as in `SFTTrainer`."""
        alone = self._tokenize(prompt).ids if prompt else ()
        pairs = enumerate(zip(alone, enc.ids, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(alone), len(enc.ids)))

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
                lines = tuple(replace(x, start=x.start + begin, text_start=x.text_start + begin) for x in lines)
                return lines if begin == 0 or read[begin - 1] == "\n" else lines[1:]  # a row's rest begins no line
        return None

    def _actions(self, text: str, lines: tuple[Line, ...], enc: Encoding, context: int) -> tuple[Action, ...]:
        """Lists actions that tile the tokens from `context` on; a line that starts inside a token joins the one
        before."""
        cuts: dict[int, tuple[Boundary | None, bool]] = {}
        after_comment = False
        for line in lines:
            start = self._start(line, enc)
            if start is not None and context <= start < len(enc.ids):
                without = line.comment or after_comment or self._is_beside_special(start, enc)
                cuts[start] = (None if without else self._boundary(text, line, start, enc), line.comment)
            after_comment = line.comment
        edges = sorted({context, *cuts, len(enc.ids)})
        spans = enumerate(zip(edges, edges[1:], strict=False))
        return tuple(Action(i, start, end, *cuts.get(start, (None, False))) for i, (start, end) in spans)

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
        think = self.fragment(self.format.think_text(line.indent, carry))
        close = self.fragment(self.format.close_text(carry))
        return None if think is None or close is None else Boundary(think, close)


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
    spliced = replace(document, input_ids=tuple(ids), actions=tuple(actions))
    return AnnotatedExample(spliced, tuple(ids), tuple(labels), tuple(is_latent), dict(placed), decisions)
