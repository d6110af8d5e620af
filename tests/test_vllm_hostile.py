"""What `generate` forbids is forbidden under vLLM's interface too, whatever the scores want (test_hostile_latents.py).

Scores are plain tensors that tempt; with vLLM itself, and its `logit_bias`, the same is in test_vllm.py.
"""

from __future__ import annotations

import codecs
from types import SimpleNamespace

import pytest
import torch
from conftest import TOKENIZERS
from slow_path import bytes_of

from ra3_trl.generation import ThinkLogitsProcessor
from ra3_trl.generation.requests import BatchThinking, RequestThinking
from ra3_trl.generation.vllm_engine import RowReader
from ra3_trl.segmentation import PYTHON


PROMPTS = ("x = 1\n", "def f(x):\n    return x\n\n\ny = 1\n", "x = 1\n# codin", "y = 'é'\n#typ")
KNOBS = ({"think": "always"}, {"think": "never"}, {"think": "auto"}, {"think": "auto", "threshold": 1e-6})
LENGTH = 9  # most tokens of a latent
STEPS = 40
TEMPERATURE = 3.0


class Tempter:
    """Scores by which a comment is to hold what a compiler reads, a newline, a special token or a broken character.
    Lines of code are `x`, so that boundaries come."""

    def __init__(self, tokenizer, seed: int):
        self.data = bytes_of(tokenizer)
        self.generator = torch.Generator().manual_seed(seed)
        self.texts = [text.encode() for text in PYTHON.forbidden_texts]
        self.code = {b: 100.0 * torch.tensor([other == b for other in self.data]) for b in (b"x", b"\n")}
        self.moods = [
            [bool(b and b"\n" in b) for b in self.data],
            [b is None for b in self.data],
            [bool(b and (b"\r" in b or b"\0" in b or max(b) > 127)) for b in self.data],
            [bool(b and b"#" in b) for b in self.data],
        ]

    def spelled(self, line: bytes) -> int:
        """How many bytes of a forbidden text stand at the end of the line; 50 once it holds a whole one."""
        if any(text in line for text in self.texts):
            return 50
        return max(k for text in self.texts for k in range(len(text)) if line.endswith(text[:k]))

    def __call__(self, row: list[int]) -> torch.Tensor:
        scores = torch.randn(len(self.data), generator=self.generator)
        mood = int(torch.randint(12, (), generator=self.generator))
        line = b"".join(self.data[i] or b"" for i in row).rpartition(b"\n")[2]
        if line.strip() and not line.lstrip().startswith(b"#"):
            return scores + self.code[b"\n"]
        if mood < len(self.moods):
            return scores + 60.0 * torch.tensor(self.moods[mood])
        if not line.strip():
            return scores + self.code[b"x"]
        return scores + 12.0 * torch.tensor([self.spelled(line + (b or b"")) for b in self.data])


def latents(data: list[bytes | None], row: list[int], forced: list[bool]) -> list[list[int]]:
    """Tokens of each latent: those behind a marker that was forced, up to one that ends the line or the text."""
    out: list[list[int]] = []
    inside, line = False, b""
    for token, by_force in zip(row, forced, strict=True):
        ends = data[token] is None or b"\n" in data[token]
        if inside and not ends:
            out[-1].append(token)
        line = b"" if data[token] is None else (line + data[token]).rpartition(b"\n")[2]
        begins = by_force and line.strip() == b"#"
        inside = begins or (inside and not ends)
        if begins:
            out.append([])
    return out


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_generate_forbids_is_forbidden_in_a_batch(tokenizers, name):
    """16 requests of 40 tokens, drawn hot. At each of the 640 steps the same tokens are possible as under
    `ThinkLogitsProcessor`, with the same log-probs, and no latent holds what the scores want it to."""
    tokenizer = tokenizers[name]
    eos, data, tempter = tokenizer.eos_token_id, bytes_of(tokenizer), Tempter(tokenizer, 0)
    batch, rows, added = BatchThinking(lambda: tokenizer), [], []
    for prompt, knob in ((prompt, knob) for prompt in PROMPTS for knob in KNOBS):
        thinking = RequestThinking(**knob, max_latent_length=LENGTH, eos_token_ids=(eos,))
        slow = ThinkLogitsProcessor(tokenizer, **knob, max_latent_length=LENGTH, eos_token_ids=(eos,))
        ids = tokenizer(prompt).input_ids
        rows.append(SimpleNamespace(prompt=ids, written=[], thinking=thinking, slow=slow, forced=[]))
        params = SimpleNamespace(extra_args=thinking.extra_args())
        added.append((len(added), params, ids, rows[-1].written))
    batch.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
    refused = {"text": 0, "other": 0}
    for _ in range(STEPS):
        scores = torch.stack([tempter(row.prompt + row.written) for row in rows])
        shaped = batch.apply(scores.clone())
        for row, wanted, out in zip(rows, scores, shaped, strict=True):
            expected = row.slow(torch.tensor([row.prompt + row.written]), wanted[None])[0]
            assert torch.equal(out.isfinite(), expected.isfinite())
            torch.testing.assert_close(out.log_softmax(-1), expected.log_softmax(-1))
            row.forced.append(row.slow.forced[-1][0])
            best = int(wanted.argmax())
            if not out[best].isfinite() and not row.forced[-1]:
                refused["text" if data[best] and wanted[best] > 500 else "other"] += 1
            probs = (out / TEMPERATURE).softmax(-1)
            row.written.append(int(torch.multinomial(probs, 1, generator=tempter.generator)))
    count = 0
    for row in rows:
        for latent in latents(data, row.written, row.forced):
            text = b"".join(data[i] for i in latent)
            count += 1
            assert not any(forbidden in text for forbidden in tempter.texts), text
            assert not set(text) & set(b"\r\n\0") and len(latent) <= LENGTH, text
            codecs.getincrementaldecoder("utf-8")().decode(text)  # the last may be cut within a character
        read = RowReader(tokenizer, row.thinking, (), ())(row.prompt, row.written)
        assert list(read.forced) == row.forced and read.token_ids == tuple(row.written)
    print(name, refused, count)
    assert refused["text"] > 3 and refused["other"] > 10 and count > 10
