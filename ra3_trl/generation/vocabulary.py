"""What generation must know of a tokenizer under an action format: computed once, shared by processors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerBase

from ..segmentation import ActionFormat, FragmentEncoder, build_token_table, find_format, require_tags


BLANK = b" \t\f\v\r"
PROBE = "x"  # a line of code in each language; at column 0, where a block may always end


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, action_format: ActionFormat, eos_token_ids: Sequence[int] = ()
) -> Vocabulary:
    """Reads the [`Vocabulary`] of a tokenizer as it is now; the last few are kept, since a large one takes seconds."""
    now = (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tuple(eos_token_ids))
    try:
        return _read(tokenizer, action_format.name, id(action_format), now)
    except ValueError as error:  # the trainer's name for the same thing
        raise ValueError(str(error).replace("`processing_class`", "`tokenizer`")) from None


def check_lines(action_format: ActionFormat) -> None:
    """Refuses, by a `ValueError`, a format whose texts do not say where latents may stand while they are written."""
    lines = action_format.segment("x\n" + PROBE) or ()
    if not (action_format.tags or action_format.end == "\n") or [line.start for line in lines[-1:]] != [2]:
        raise ValueError(
            f"`action_format` is {action_format.name!r}, whose latents do not begin behind a newline: whether one "
            "may stand at a place depends on the text behind it, which is still to be written. Use a format of "
            "lines, such as 'python', 'slashes', 'tags' or 'python_tags', or generate without this processor."
        )


@lru_cache(maxsize=4)
def _read(tokenizer: PreTrainedTokenizerBase, name: str, identity: int, now: tuple) -> Vocabulary:
    return Vocabulary(tokenizer, find_format(name), now[-1])


class Vocabulary:
    """Facts about tokens.

    Attributes:
        table ([`TokenTable`]):
            As latents are trained with.
        fragment ([`FragmentEncoder`]):
            Tokens of think prefixes and closures.
        tags (`dict[str, int]`), end_ids (`tuple[int, ...]`), bos_id (`int` or `None`):
            Ids of the format's tags, of the ends of text, of its beginning.
        inside (`set[int]`):
            Tokens that end no line and no text; `textless` are those that end a text: special ones, but the tags.
        dummy_space (`bool`):
            Whether the tokenizer puts a space before a text.
        anywhere (`torch.Tensor`):
            Mask `[V]` of tokens that would begin a latent past every decision: tags, or a newline and the marker in
            one token.
        completing (`dict[bytes, torch.Tensor]`):
            Masks `[V]` of tokens that complete the marker, by what stands of it already; none for tags.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, action_format: ActionFormat, eos_token_ids: tuple[int, ...]
    ):
        check_lines(action_format)
        self.format = action_format
        self.fragment = FragmentEncoder(tokenizer)
        self.tags = require_tags(tokenizer, action_format)
        self.table = build_token_table(tokenizer, len(tokenizer), eos_token_ids, action_format)
        self.bos_id = tokenizer.bos_token_id
        self.end_ids = tuple(sorted({tokenizer.eos_token_id, *eos_token_ids}))
        tags, data = set(self.tags.values()), self.table.token_bytes
        self.inside = tags | {i for i, b in enumerate(data) if b is not None and b"\n" not in b}
        self.textless = {i for i, b in enumerate(data) if b is None} - tags
        self.dummy_space = self.text_of(tokenizer(PROBE, add_special_tokens=False)["input_ids"])[:1] == b" "
        self.anywhere, self.completing = self._bans()

    def text_of(self, ids: Sequence[int]) -> bytes:
        """Bytes of tokens; special tokens and ids outside the tokenizer have none."""
        data = self.table.token_bytes
        return b"".join(data[i] or b"" for i in ids if i < len(data))

    def _bans(self) -> tuple[torch.Tensor, dict[bytes, torch.Tensor]]:
        data, marker = self.table.token_bytes, self.format.think.encode()
        if self.tags:
            return torch.tensor([i in self.tags.values() for i in range(len(data))]), {}
        line = re.compile(rb"\n[ \t\f\v\r]*" + re.escape(marker))
        completing = {b"": [bool(b and b.lstrip(BLANK).startswith(marker)) for b in data]}
        for k in range(1, len(marker)):
            completing[marker[:k]] = [bool(b and b.startswith(marker[k:])) for b in data]
        anywhere = torch.tensor([bool(b and line.search(b)) for b in data])
        return anywhere, {begun: torch.tensor(mask) for begun, mask in completing.items()}
