"""The slow path: one plain forward per question, full log-softmax, no cache, no batching, no shared code.

Everything an engine computes is written here once more in the plainest way, so that the two can be compared.
"""

from __future__ import annotations

import codecs
from functools import cache

import torch

from ra3_trl.segmentation import PYTHON, build_token_table


def plain_forward(model, ids) -> torch.Tensor:
    """Log-softmax `[L, V]` of one row; row `i` is the distribution of token `i + 1`."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].float().log_softmax(-1)


def plain_logits(model, ids) -> torch.Tensor:
    """Logits `[V]` after the last token."""
    return model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].float()


def continuation_logp(model, prefix, tokens) -> torch.Tensor:
    """`log pi(tokens | prefix)`, a sum over tokens."""
    rows = plain_forward(model, [*prefix, *tokens])
    return sum(rows[len(prefix) + j - 1, token] for j, token in enumerate(tokens))


@cache
def pending_bytes(data: bytes) -> int | None:
    """How many bytes `data` still waits for to be UTF-8; `None` if nothing can complete it.

    By Python's own decoder: 80, 90 and A0 hold a legal first continuation byte for every lead byte.
    """
    tails = [b""]
    for length in range(4):
        for tail in tails:
            try:
                (data + tail).decode("utf-8", "strict")
                return length
            except UnicodeDecodeError:
                pass
        tails = [tail + bytes([b]) for tail in tails for b in (0x80, 0x90, 0xA0)]
    return None


def bytes_of(tokenizer) -> list[bytes | None]:
    """Bytes of each token by the tokenizer's own decoder, `None` for special ones (compare `token_bytes`)."""
    alphabet = codecs_alphabet()
    out = []
    for i in range(len(tokenizer)):
        token = tokenizer.convert_ids_to_tokens(i)
        if i in tokenizer.all_special_ids:
            out.append(None)
        elif tokenizer.bos_token is None:  # byte-level here
            out.append(bytes(alphabet[c] for c in token))
        elif token.startswith("<0x") and len(token) == 6:
            out.append(bytes.fromhex(token[3:5]))
        else:
            out.append(token.replace("▁", " ").encode())
    return out


def codecs_alphabet() -> dict[str, int]:
    """Byte-level BPE's characters: a byte that prints in Latin-1 is itself, the others are U+0100, U+0101, ..."""
    out, extra = {}, 0x100
    for byte in range(256):
        char = codecs.decode(bytes([byte]), "latin-1")
        if char.isprintable() and char not in " \xa0\xad":
            out[char] = byte
        else:
            out[chr(extra)] = byte
            extra += 1
    return out


CONTROLS = [c for c in range(0x20) if c != 0x09]  # newline, carriage return, NUL, ...


class SlowPath:
    """Scores and latent distributions of one model, each number from its own forward."""

    def __init__(self, model, tokenizer, max_length=4, temperature=1.0, top_k=0, top_p=1.0):
        self.model, self.max_length, self.temperature = model, max_length, temperature
        self.top_k, self.top_p = top_k, top_p
        self.data = bytes_of(tokenizer)
        newline = [i for i, b in enumerate(self.data) if b is not None and b"\n" in b]
        self.stop_ids = [*newline, tokenizer.eos_token_id]
        self.forbidden = PYTHON.forbidden_bytes
        self.blank = build_token_table(tokenizer, len(tokenizer)).blank_V.tolist()  # judged in test_tokens.py

    def symbols(self, prefix, latent) -> torch.Tensor:
        """Log-probs `[V]` of the next symbol after `prefix + latent`; the stop symbol stands at `stop_ids[0]`."""
        scaled = plain_logits(self.model, [*prefix, *latent]) / self.temperature
        whole = b"".join(self.data[i] for i in latent)
        so_far = b"" if pending_bytes(whole) == 0 else whole
        left = self.max_length - len(latent) - 1
        out = torch.full_like(scaled, float("-inf"))
        for i, b in enumerate(self.data):
            if b is None or any(c in b for c in CONTROLS):
                continue
            waits = pending_bytes(so_far + b)
            if waits is None or waits > left or (not latent and self.blank[i]):
                continue
            if any(text in whole + b for text in self.forbidden):
                continue
            out[i] = scaled[i]
        if latent and pending_bytes(so_far) == 0:
            out[self.stop_ids[0]] = torch.logsumexp(scaled[self.stop_ids], 0)
        return self._truncate(out).log_softmax(-1)

    def _truncate(self, scaled: torch.Tensor) -> torch.Tensor:
        order = scaled.argsort(descending=True).tolist()
        keep = order[: self.top_k] if self.top_k else order
        probs = scaled[keep].softmax(-1).tolist()
        nucleus, mass = [], 0.0
        for i, p in zip(keep, probs, strict=True):
            if mass >= self.top_p:
                break
            nucleus.append(i)
            mass += p
        out = torch.full_like(scaled, float("-inf"))
        out[nucleus] = scaled[nucleus]
        return out

    def latent_logps(self, prefix, latent) -> list[torch.Tensor]:
        """Log-prob of each symbol of a [`Latent`], the stop included."""
        ids = list(latent.token_ids)
        rows = [self.symbols(prefix, ids[:j]) for j in range(len(ids) + latent.stopped)]
        return [row[s] for row, s in zip(rows, [*ids, self.stop_ids[0]], strict=False)]

    def line_A(self, document) -> list[torch.Tensor]:
        ids = document.input_ids
        spans = [(max(a.start, 1), a.end) for a in document.actions]
        return [continuation_logp(self.model, ids[:s], ids[s:e]) if e > s else torch.zeros(()) for s, e in spans]

    def gate(self, document, boundary: int) -> torch.Tensor:
        action = document.actions[boundary]
        return continuation_logp(self.model, document.input_ids[: action.start], action.boundary.think)

    def branch(self, document, boundary: int, latent, horizon: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """(line log-prob, log P(think again) or `None`) of the lines under a latent, up to a kept comment."""
        first = document.actions[boundary]
        row = [*document.input_ids[: first.start], *first.boundary.think, *latent.token_ids, *first.boundary.close]
        out = []
        for action in document.actions[boundary : boundary + horizon]:
            if action.comment:
                break
            gate = continuation_logp(self.model, row, action.boundary.think) if action.boundary else None
            line = document.input_ids[action.start : action.end]
            out.append((continuation_logp(self.model, row, line), gate))
            row += line
        return out
