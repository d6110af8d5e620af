"""Attention of ragged rows against dense attention by a mask of all pairs, written token by token."""

from __future__ import annotations

import logging
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from ra3_trl.rollout import ragged
from ra3_trl.rollout.attention import BranchState
from ra3_trl.rollout.forward import BranchTokens, chained
from ra3_trl.rollout.ragged import BLOCK, Row, attend, bucket, of_documents


DOCUMENTS = (300, 1, 200)
# Branches of a document, the tokens of it that they see, and their lengths; enough for several blocks.
BRANCHES = [
    (d, sees, n) for d, sees, n in ((0, 40, 5), (0, 40, 9), (0, 299, 40), (1, 1, 3), (2, 130, 150), (2, 131, 7))
]
HEADS, KV_HEADS, SIZE = 4, 2, 8


def packed_row() -> tuple[Row, list[tuple[str, int, int]]]:
    """A row of documents and branches, and who each token is: what it belongs to, and its position."""
    state = BranchState(np.array([sees for _, sees, _ in BRANCHES]), [d for d, _, _ in BRANCHES], 150, cached=False)
    plan = state.plan(chained([range(n) for _, _, n in BRANCHES]), [range(n) for n in DOCUMENTS])
    tokens = [(f"d{d}", d, i, i) for d, n in enumerate(DOCUMENTS) for i in range(n)]
    tokens += [(f"b{m}", d, sees, sees + j) for m, (d, sees, n) in enumerate(BRANCHES) for j in range(n)]
    return begun(plan.row), tokens


def begun(row: Row) -> Row:
    row.begin(*(torch.as_tensor(x) for x in row.arrays))
    return row


@cache
def seen_by(window: int | None) -> torch.Tensor:
    """`[n, n]`, pair by pair: a document's token sees those before it; a branch's also its document's before it."""
    _, tokens = packed_row()
    pairs = [
        (me == other and position <= at or other == f"d{document}" != me and position < sees)
        and (window is None or at - position < window)
        for me, document, sees, at in tokens
        for other, _, _, position in tokens
    ]
    return torch.tensor(pairs).view(len(tokens), len(tokens))


def dense(q, k, v, seen, cap):
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * SIZE**-0.5
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("window", [None, 30, 140])
@pytest.mark.parametrize("cap, values", [(None, SIZE), (2.0, SIZE), (None, 6)])
def test_a_packed_row_and_its_gradients(window, cap, values):
    """In float64, so that nothing hides behind rounding: the largest differences of sums of 500 are about 1e-14."""
    row, tokens = packed_row()
    torch.manual_seed(0)
    q, k = torch.randn(HEADS, len(tokens), SIZE).double(), torch.randn(KV_HEADS, len(tokens), SIZE).double()
    v, slope = (torch.randn(heads, len(tokens), values).double() for heads in (KV_HEADS, HEADS))
    seen, found = seen_by(window), []
    for way in (lambda *qkv: attend(row, *qkv, None, window, cap), lambda *qkv: dense(*qkv, seen, cap)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = way(*leaves)
        (out * slope).sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=0)


def test_pairs_of_blocks_hold_what_they_say():
    """Every pair that sees is in a block that is computed; blocks without a mask hold such pairs alone."""
    row, tokens = packed_row()
    for window in (None, 30, 140, 10**6):
        seen = torch.zeros(row.queries.shape[1], row.keys.shape[1], dtype=torch.bool)
        seen[: len(tokens), : len(tokens)] = seen_by(window)
        for size in (BLOCK, 32):
            blocks = seen.view(len(seen) // size, size, -1, size)
            some, whole = (torch.from_numpy(x) for x in row.pairs(window, size))
            assert not (blocks.any(3).any(1) & ~some).any() and not (whole & ~some).any()
            there = [max(0, len(tokens) - i * size) for i in range(len(whole))]
            assert all(blocks[i, : there[i], j].all() for i, j in whole.nonzero().tolist())
        assert whole.any() == (window != 30)
        # By blocks of 32 hardly more is computed than must be: of four pairs three hold some that sees.
        assert window is not None or blocks.any(3).any(1).sum() > 0.75 * some.sum()


@pytest.mark.parametrize(
    "sees, window, whole", [(127, None, False), (128, None, True), (128, 383, False), (128, 384, True)]
)
def test_a_block_without_a_mask_is_seen_to_its_last_key(sees, window, whole):
    """A document of 128 tokens is one block of keys; of a branch of 300 behind it the third block of queries holds the
    tokens to number 255, which stands 255 + 128 tokens behind the first key."""
    state = BranchState(np.array([sees]), [0], 300, cached=False)
    row = state.plan(chained([range(300)]), [range(128)]).row
    assert row.pairs(window)[1][2, 0] == whole


def test_side_runs_and_kept_keys():
    """On a cache: two branches of one document with keys of before; a side run sees the slots below 2 and itself."""
    trunk = BranchState(np.zeros(0), (), 1, cached=True)
    trunk.plan(None, [range(5)])
    state = BranchState(np.array([2, 4]), [0, 0], 6, cached=True, trunk=trunk)
    tokens = BranchTokens(*map(np.array, ([7, 8, 9, 7], [0, 0, 0, 1], [2, 3, 4, 1], [3, 2, 2, 2], [2, 3, 3, 1])))
    row = begun(state.plan(tokens).row)
    query, key = row.columns
    seen = ragged.visible([x[:4, None] for x in query], [x[None] for x in key], None)
    keys = [*(("document", i) for i in range(5)), *((m, s) for m in (0, 1) for s in range(6))]
    found = [{keys[j] for j in seen[i].nonzero()[:, 0].tolist()} for i in range(4)]
    first, second = {("document", 0), ("document", 1)}, {("document", i) for i in range(4)}
    assert found == [
        first | {(0, 0), (0, 1), (0, 2)},
        first | {(0, 0), (0, 1), (0, 3)},
        first | {(0, 0), (0, 1), (0, 3), (0, 4)},
        second | {(1, 0), (1, 1)},
    ]


def test_lengths_are_few():
    lengths = {bucket(n) for n in range(1, 20_000)}
    assert len(lengths) <= 8 + 4 * 5 and all(n % BLOCK == 0 for n in lengths)
    assert all(n <= bucket(n) <= max(1.25 * n, n + BLOCK - 1) for n in range(1, 20_000))


def test_masks_grow_with_blocks():
    """Documents of 4,096 tokens with 8 latents of 8 tokens at each of 100 boundaries: a mask for each branch and all
    that it may see would be 800 * 8 * 4,096 numbers and more. Here it is the edges of blocks, not two in a row."""
    places = np.repeat(np.linspace(40, 4000, 100).astype(int), 8)
    state = BranchState(places, [0] * 800, 8, cached=False)
    row = begun(state.plan(chained([range(8)] * 800), [range(4096)]).row)
    numbers = sum(work.mask.numel() for work in row.work(None, torch.float32))
    assert 328 * 32**2 <= numbers <= 2 * 328 * 32**2 < 0.03 * 800 * 8 * 4096  # 10,496 tokens are 328 blocks


# ---- flex attention ----


@pytest.mark.parametrize("window, cap", [(None, None), (30, 2.0)])
def test_flex_attention_sees_the_same(window, cap, monkeypatch):
    """As PyTorch computes it without a compiler."""
    row, tokens = packed_row()
    monkeypatch.setattr(ragged, "compiled_flex", lambda: flex_attention)
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, len(tokens), 16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    found = ragged.flex(row, q, k, v, None, window, cap)
    torch.testing.assert_close(found, attend(row, q, k, v, None, window, cap), atol=2e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_flex_attention_sees_the_same():
    """As `torch.compile` makes it, without gradients: its backward has no CPU kernel in torch 2.13, and its forward
    does not compile there for a sliding window."""
    row, tokens = packed_row()
    torch.manual_seed(0)
    q, k, v = (torch.randn(heads, len(tokens), 16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    with torch.no_grad():
        found = ragged.flex(row, q, k, v, None, None, None)
    torch.testing.assert_close(found, attend(row, q, k, v, None, None, None), atol=2e-6, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention's backward has no CPU kernel in torch 2.13")
def test_flex_attention_has_the_same_gradients():
    assert ragged.works(torch.device("cuda"), torch.float32, (HEADS, KV_HEADS), (16, 16), None)
    assert ragged.works(torch.device("cuda"), torch.bfloat16, (HEADS, KV_HEADS), (64, 64), 30.0)


def test_flex_attention_that_fails_or_errs_is_not_used(monkeypatch, caplog):
    """Tried with gradients before it is used; a stand-in for the kernel is right, fails, or sees too much."""
    args = (torch.device("cpu"), torch.float32, (HEADS, KV_HEADS), (16, 16), None)
    masks = ragged._with_masks

    def failing(*args):
        raise RuntimeError("out of resource: shared memory")

    def careless(row, q, k, v, *rest):
        return masks(begun(Row.of(*of_documents((240,), (0,)))), q, k, v, *rest)

    for stand_in, right, words in ((masks, True, ""), (failing, False, "shared memory"), (careless, False, "numbers")):
        ragged.works.cache_clear()
        monkeypatch.setattr(ragged, "flex", stand_in)
        with caplog.at_level(logging.WARNING):
            assert ragged.works(*args) is right
        assert words in caplog.text
    ragged.works.cache_clear()
