"""Facts about a tokenizer: the bytes of each token, the stop symbol, what a latent must not hold, fragments.

Tokenizers differ at line ends (GPT-2 keeps "\\n" alone, SmolLM2 merges it with indentation, Qwen with punctuation),
so nothing here asks for a newline *token*: every token whose bytes hold a newline is newline-bearing. Likewise for the
end marker of any other format of plain text; that of a tagged one is a special token.
"""

from __future__ import annotations

import json
import re

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from ..records import TokenTable
from .automaton import automaton_without
from .format import PYTHON, ActionFormat


FIM_TOKENS = (  # what opens the prefix, the suffix and the middle
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, StarCoder2
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # CodeLlama
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek-Coder
)
# What the same models write behind a middle; with the end of the text it ends a latent.
_FIM_ENDS = ("<|fim_pad|>", "<|file_sep|>", "<|repo_name|>", "<|file_separator|>", "<file_sep>",
             "\u2581<EOT>", "<|EOT|>")  # fmt: skip
_Bytes = tuple[bytes | None, ...]  # of each token id
_MARKER = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>")
_CONTROL = re.compile(rb"[\0-\x08\x0a-\x1f]")  # newline, carriage return, NUL, ... but the tab


def _byte_level_alphabet() -> dict[str, int]:
    """Maps characters of byte-level BPE to bytes: printable Latin-1 stands for itself, U+0100 on for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def is_control(token: AddedToken) -> bool:
    """Whether an added token is no text: a special token, or one of a form that only such tokens have (Qwen2.5-Coder
    lists those for filling in the middle as not special)."""
    text = token.content
    return token.special or bool(_MARKER.fullmatch(text)) or text in _FIM_ENDS or any(text in t for t in FIM_TOKENS)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> _Bytes:
    """Lists the bytes of each token id, of a byte-level or SentencePiece-style tokenizer; `None` for special tokens
    ([`is_control`]) and unused ids.

    Raises:
        `ValueError`: for a tokenizer that is slow.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"`processing_class` is {type(tokenizer).__name__}, which has no character offsets; pass a fast tokenizer "
            "(`AutoTokenizer.from_pretrained(...)` with a `tokenizer.json`)."
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    layout = json.dumps([spec["pre_tokenizer"], spec["decoder"]])
    alphabet = _byte_level_alphabet() if "ByteLevel" in layout else None
    added = tokenizer.added_tokens_decoder
    out: list[bytes | None] = [None] * (max(tokenizer.get_vocab().values()) + 1)
    for token, index in tokenizer.get_vocab().items():
        if index in added:
            out[index] = None if is_control(added[index]) else token.encode()
        elif alphabet is not None:
            out[index] = bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
        elif re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            out[index] = bytes([int(token[3:5], 16)])
        else:
            out[index] = token.replace("\u2581", " ").encode()
    for index in tokenizer.all_special_ids:
        out[index] = None
    return tuple(out)


def readable_bytes(tokenizer: PreTrainedTokenizerBase, action_format: ActionFormat) -> list[bytes | None]:
    """Lists [`token_bytes`], and those of the format's tags: special tokens and yet part of an annotated text."""
    data = list(token_bytes(tokenizer))
    for tag, index in require_tags(tokenizer, action_format).items():
        data[index] = tag.encode()
    return data


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Maps special tokens, each of which is one id wherever it stands, to their ids."""
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def _end_ids(data: _Bytes, tokenizer: PreTrainedTokenizerBase, action_format: ActionFormat) -> list[int]:
    """Lists the tokens that end a latent: the end tag, or all that hold the end marker."""
    if action_format.tags:
        return [require_tags(tokenizer, action_format)[action_format.end]]
    end = action_format.end.encode()
    ids = [i for i, b in enumerate(data) if b is not None and end in b]
    if not ids:
        marker = "a newline" if end == b"\n" else repr(action_format.end)
        raise ValueError(
            f"`processing_class` ({type(tokenizer).__name__}) has no token that holds {marker}, so a latent of the "
            f"format {action_format.name!r} can neither be ended nor be told from text; use a tokenizer that keeps it."
        )
    return ids


def require_tags(tokenizer: PreTrainedTokenizerBase, action_format: ActionFormat) -> dict[str, int]:
    """Maps the tags of a format to their ids.

    Raises:
        `ValueError`: for a tokenizer that lacks one as special token.
    """
    special = special_ids(tokenizer)
    missing = [tag for tag in action_format.tags if tag not in special]
    if missing:
        raise ValueError(
            f"`processing_class` lacks the special tokens {missing} of the action format {action_format.name!r}; add "
            "them with `ra3_trl.models.add_tags(model, tokenizer, action_format.tags)`."
        )
    return {tag: special[tag] for tag in action_format.tags}


def build_token_table(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    eos_token_ids: tuple[int, ...] = (),
    action_format: ActionFormat = PYTHON,
) -> TokenTable:
    """Collects what the sampler must know of the vocabulary.

    `vocab_size` is the width of the model's logits; ids beyond the tokenizer are forbidden. `eos_token_ids` are other
    end-of-text ids (the generation config's): part of the stop symbol, as is what ends a middle. The format says what
    ends a latent and what it must not hold.

    Raises:
        `ValueError`: if the tokenizer has no EOS token, no token that holds the end marker (or not the tags), or none
        that may begin a latent.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("`processing_class` has no EOS token; set `tokenizer.eos_token`: each document ends with it.")
    data = token_bytes(tokenizer)
    data = (data + (None,) * vocab_size)[:vocab_size]
    ends = _end_ids(data, tokenizer, action_format)
    automaton = automaton_without(action_format.forbidden_bytes)
    first = tuple(c.encode() for c in action_format.first)
    usable = [i for i, b in enumerate(data) if b and not _CONTROL.search(b)]
    next_state = torch.full((len(automaton.pending), vocab_size), -1, dtype=torch.int16)
    next_state[:, usable] = torch.from_numpy(automaton.run([data[i] or b"" for i in usable]))
    blank = torch.zeros(vocab_size, dtype=torch.bool)
    for i in usable:
        b = data[i] or b""
        # A character begun and not ended counts as blank: its last bytes could make it one (U+00A0, U+3000).
        blank[i] = not b.decode("utf-8", "ignore").strip() or bool(first and not b.startswith(first))
    fim_ends = {i for i, token in tokenizer.added_tokens_decoder.items() if token.content in _FIM_ENDS}
    eos = {tokenizer.eos_token_id, *eos_token_ids, *fim_ends} - set(ends)
    stop_ids = torch.tensor(ends + sorted(i for i in eos if i < vocab_size))
    pending = torch.tensor(automaton.pending)
    next_state[(pending == 0).nonzero(), stop_ids] = 0
    opening = (next_state[0] >= 0) & ~blank
    opening[stop_ids] = False
    if not opening.any():
        raise ValueError(
            f"`processing_class` ({type(tokenizer).__name__}) has no token that may begin a latent of the format "
            f"{action_format.name!r} (a word behind one of {action_format.first!r}); use a larger vocabulary."
        )
    return TokenTable(stop_ids, blank, next_state, pending, data, tokenizer.eos_token_id)


def without_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Takes the beginning of text off that a text says itself, where the tokenizer adds it in any case."""
    bos = tokenizer.bos_token
    if bos is None or not text.startswith(bos):
        return text
    return text.removeprefix(bos) if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else text


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, add_special_tokens: bool = True) -> list[int]:
    """Encodes a text that is to be continued: without the end of text that some tokenizers append, and with one
    beginning of text where the prompt says its own."""
    prompt = without_bos(tokenizer, prompt) if add_special_tokens else prompt
    options = {"add_special_tokens": add_special_tokens, "return_special_tokens_mask": True, "verbose": False}
    encoded = tokenizer(prompt, **options)
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    while len(ids) > 1 and added[len(ids) - 1] and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids


def encode_behind(tokenizer: PreTrainedTokenizerBase, anchor: str, text: str) -> list[int] | None:
    """Encodes `text` as it comes out behind `anchor`; `None` where the tokenizer merges the two."""

    def ids(of: str) -> list[int]:
        return tokenizer(of, add_special_tokens=False)["input_ids"] if of else []

    head, whole = ids(anchor), ids(anchor + text)
    return whole[len(head) :] if whole[: len(head)] == head else None


class FragmentEncoder:
    """Encodes short texts as they come out in the middle of a document.

    A SentencePiece tokenizer puts a dummy space before a text, a BPE one may merge it with what stands before; so the
    fragment is encoded behind an anchor that it does not merge with, and the bytes of the result are checked. A
    special token is its one id, wherever it stands.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._bytes = token_bytes(tokenizer)
        self._cache: dict[str, tuple[int, ...] | None] = {text: (i,) for text, i in special_ids(tokenizer).items()}

    def __call__(self, text: str) -> tuple[int, ...] | None:
        """Token ids of `text`, or `None` when the tokenizer has no exact tokens for it."""
        if text not in self._cache:
            self._cache[text] = self._find(text)
        return self._cache[text]

    def _find(self, text: str) -> tuple[int, ...] | None:
        for anchor in ("\n", "a", ""):
            ids = encode_behind(self.tokenizer, anchor, text)
            data = [self._bytes[i] for i in ids or ()]
            if ids is not None and None not in data and b"".join(filter(None, data)) == text.encode():
                return tuple(ids)
        return None
