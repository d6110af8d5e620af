"""Rows that are tokens already -> their text, with the characters that each token stands for."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from .documents import Encoding, Tokens
from .tokens import token_bytes


class TokenReader:
    """Reads token ids back as text, by the bytes of each token.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that they are of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._bos = tokenizer.bos_token_id
        self._bytes = token_bytes(tokenizer)
        self._special = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
        self._dummy_space = any(
            (self._bytes[i] or b"")[:1] == b" " for i in tokenizer("x", add_special_tokens=False)["input_ids"][:1]
        )

    def __call__(self, ids: Sequence[int], trained: Sequence[bool]) -> Tokens:
        """The text of a row's tokens, of which some are trained.

        Raises:
            `ValueError`: for an id that the tokenizer does not have.
        """
        wrong = next((i for i in ids if not 0 <= i < len(self._bytes)), None)
        if wrong is not None:
            raise ValueError(f"has the id {wrong}, and the tokenizer has {len(self._bytes)}; tokenize with its own.")
        bos = 1 if ids and ids[0] == self._bos else 0
        pieces = [self._special.get(i, b"") if (b := self._bytes[i]) is None else b for i in ids]
        pieces[:bos] = [b""] * bos
        if self._dummy_space and len(pieces) > bos and pieces[bos][:1] == b" ":
            pieces[bos] = pieces[bos][1:]
        whole = b"".join(pieces)
        text = whole.decode("utf-8", "replace")
        readable = text.encode() == whole  # else no latent stands in it
        # A character of several bytes may be of several tokens, each of which stands for the whole of it.
        of_byte, character = [], -1
        for byte in whole:
            character += byte & 0xC0 != 0x80
            of_byte.append(max(character, 0))
        starts, ends, at = [], [], 0
        for piece in pieces:
            until = at + len(piece)
            here = of_byte[at] if at < len(of_byte) else len(text)
            starts.append(here)
            ends.append(of_byte[until - 1] + 1 if piece else here)
            at = until
        regions = ((0, len(text)),) if readable and text else ()
        return Tokens(text, Encoding(tuple(ids), tuple(starts), tuple(ends), bos), tuple(trained), regions)
