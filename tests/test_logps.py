"""From hidden states to log-probs and draws, against the plain way: one float64 softmax over the whole vocabulary."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from ra3_trl.records import TokenTable
from ra3_trl.rollout import Backbone, SamplingParams, logps
from ra3_trl.rollout.inversion import block_size
from ra3_trl.rollout.sampler import (
    LatentDistribution,
    Symbols,
    draw_from_hidden,
    symbol_logps,
    token_and_symbol_logps,
)


STOPS, MOST = [5, 7, 40], 6  # tokens of the stop symbol, longest latent


def table_of(vocab_size: int) -> TokenTable:
    """Ids 0 to 4 are forbidden, 8 and 9 blank; 10 to 15 begin a character of 2 bytes, 16 to 19 one of 3; 20 to 29 go
    on with one."""
    following = torch.full((3, vocab_size), -1, dtype=torch.int8)
    following[0, 5:] = 0
    following[0, 10:16], following[0, 16:20], following[0, 20:30] = 1, 2, -1
    following[1, 20:30], following[2, 20:30] = 0, 1
    blank = torch.zeros(vocab_size, dtype=torch.bool)
    blank[8:20] = True
    return TokenTable(torch.tensor(STOPS), blank, following, torch.tensor([0, 1, 2]), (b"a",) * vocab_size, 5)


def plain_mask(vocab_size: int, state: int, step: int) -> torch.Tensor:
    """What may follow, by hand; all tokens of the stop symbol where the stop may."""
    left, allowed = MOST - 1 - step, torch.zeros(vocab_size, dtype=torch.bool)
    if state:
        allowed[20:30] = state - 1 <= left
        return allowed
    allowed[5:] = True
    allowed[20:30] = False
    allowed[10:16] &= left >= 1
    allowed[16:20] &= left >= 2
    allowed[STOPS] = step > 0
    if step == 0:
        allowed[8:20] = False
    return allowed


def plain_logps(logits_nV, symbols: Symbols, temperature: float) -> torch.Tensor:
    """The log-prob of each symbol, row by row in float64."""
    out = []
    for row, token, state, step in zip(logits_nV, symbols.token, symbols.state, symbols.step, strict=True):
        mask = plain_mask(len(row), int(state), int(step))
        probs = (row.double() / temperature).masked_fill(~mask, -math.inf).softmax(-1)
        out.append(probs[STOPS].sum().log() if token == STOPS[0] else probs[int(token)].log())
    return torch.stack(out)


def some_symbols(vocab_size: int, count: int = 40) -> Symbols:
    """Of all states and steps, every fifth a stop where it may be."""
    generator, rows = np.random.default_rng(0), []
    for i in range(count):
        step, state = int(generator.integers(MOST)), int(generator.integers(3)) if i % 2 else 0
        state = 0 if step == 0 else min(state, MOST - step)
        mask = plain_mask(vocab_size, state, step)
        mask[STOPS] = False
        token = int(generator.choice(mask.nonzero()[:, 0].numpy()))
        rows.append((STOPS[0] if i % 5 == 0 and step and state == 0 else token, state, step, i))
    return Symbols(*np.array(rows).T)


@pytest.fixture
def backbone(tiny_model, tokenizers):
    """`backbone("llama")`: of a tiny model; more settings are the configuration's."""
    return lambda kind="llama", **more: Backbone(tiny_model(kind, tokenizers["newline_indent"], **more))


@pytest.fixture(params=[3, 10**6])
def small_chunks(request, monkeypatch):
    """Three rows of logits at once, and all."""
    monkeypatch.setattr(logps, "rows_at_once", lambda *_: request.param)
    monkeypatch.setattr("ra3_trl.rollout.backbone.rows_at_once", lambda *_: request.param)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "kind, more, matrix",
    [("llama", {}, True), ("llama", {"tie_word_embeddings": True}, True), ("granite", {}, True), ("phi", {}, False),
     ("gemma2", {"final_logit_softcapping": 5.0}, False)],
)  # fmt: skip
def test_symbols_and_their_gradients(kind, more, matrix, temperature, backbone, small_chunks):
    """Heads that are one matrix, and those that are not (a bias, soft-capping), of several kinds of rows."""
    head = backbone(kind, **more)
    assert (head.matrix is not None) == matrix
    vocab_size = head.vocab_size
    symbols = some_symbols(vocab_size)
    distribution = LatentDistribution(table_of(vocab_size), SamplingParams(MOST, temperature))
    hidden = torch.randn(len(symbols.token), 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = head.causal_lm.get_output_embeddings().weight
    factor = torch.linspace(-1, 2, len(symbols.token))

    def gradients(of: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad((factor * of).sum(), (hidden, weight))

    found = symbol_logps(head, distribution, hidden, symbols)
    wanted = plain_logps(head.logits(hidden), symbols, temperature).float()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(found), gradients(wanted), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(symbol_logps(head, distribution, hidden, symbols), wanted, atol=1e-5, rtol=1e-5)
    # Tokens of the model's own distribution, nothing forbidden.
    token_n = torch.as_tensor(symbols.token)
    found, wanted = head.token_logps(hidden, token_n), head.logits(hidden).log_softmax(-1)[range(40), token_n]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients(found), gradients(wanted), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    # Both in one pass: seven tokens, of which the first three stand before the symbols of a chunk of three.
    both = token_and_symbol_logps(head, distribution, (hidden[:7], hidden), token_n[:7], symbols)
    plain = head.logits(hidden)
    apart = plain.log_softmax(-1)[range(7), token_n[:7]], plain_logps(plain, symbols, temperature).float()
    for one, other in zip(both, apart, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    sums = (gradients(2 * of_symbols + pad(tokens, (0, 33))) for tokens, of_symbols in (both, apart))
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


class Shapes(TorchDispatchMode):
    """Collects the shapes of the storages that operations inside make."""

    def __init__(self):
        super().__init__()
        self.made: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.made.setdefault(out.untyped_storage()._cdata, out)
        return out

    def count(self, shape: torch.Size) -> int:
        return sum(x.shape == shape for x in self.made.values())


def test_gates_and_symbols_leave_one_gradient_of_the_head(backbone):
    """Two passes of the head leave two, and their sum: three matrices as large as the vocabulary."""
    head = backbone()
    weight, symbols = head.causal_lm.get_output_embeddings().weight, some_symbols(head.vocab_size)
    distribution = LatentDistribution(table_of(head.vocab_size), SamplingParams(MOST))
    hidden, token_n = torch.randn(40, 32).requires_grad_(), torch.as_tensor(symbols.token)
    together = token_and_symbol_logps(head, distribution, (hidden, hidden), token_n, symbols)
    apart = head.token_logps(hidden, token_n), symbol_logps(head, distribution, hidden, symbols)
    counts = []
    for tokens, of_symbols in (together, apart):
        with Shapes() as shapes:
            torch.autograd.grad(tokens.sum() + of_symbols.sum(), weight)
        counts.append(shapes.count(weight.shape))
    assert counts == [1, 3]


def test_a_frozen_head_gives_gradients_to_the_states_alone(backbone, small_chunks):
    """As under an adapter: they are computed in the forward pass, and no logits are made in the backward one."""
    head = backbone()
    weight = head.causal_lm.get_output_embeddings().weight
    hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    symbols = some_symbols(head.vocab_size)
    distribution = LatentDistribution(table_of(head.vocab_size), SamplingParams(MOST, 0.6))
    (wanted,) = torch.autograd.grad(symbol_logps(head, distribution, hidden, symbols).square().sum(), hidden)
    weight.requires_grad_(False)
    found = symbol_logps(head, distribution, hidden, symbols).square().sum()
    weight.data.zero_()
    torch.testing.assert_close(torch.autograd.grad(found, hidden)[0], wanted, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_the_head_is_no_matrix(backbone):
    head = backbone()
    adapted = get_peft_model(head.causal_lm, LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    assert head.matrix is None and Backbone(adapted).matrix is None


@pytest.mark.parametrize("grad", [False, True])
def test_bfloat16_and_mixed_precision(backbone, grad):
    """8 bits: a logit of a few nats is off by some 0.02; the sums are float32."""
    head, hidden = backbone(), torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    token_n = torch.arange(40)
    wanted = head.token_logps(hidden, token_n).detach()
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        mixed = head.token_logps(hidden, token_n)
    if grad:
        mixed.sum().backward()
        assert head.causal_lm.get_output_embeddings().weight.grad.dtype is torch.float32
    head.causal_lm.to(torch.bfloat16)
    whole = head.token_logps(hidden.bfloat16(), token_n)
    for found in (mixed, whole):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, wanted, atol=0.1, rtol=0)


def test_nothing_is_a_log_prob_of_nothing(backbone):
    head = backbone()
    hidden = torch.zeros(0, 32, requires_grad=True)
    found = head.token_logps(hidden, torch.zeros(0, dtype=torch.long))
    assert found.shape == (0,)
    found.sum().backward()
    assert hidden.grad.shape == (0, 32)


# ---- draws ----


def plain_draw(logits_nV, state_n, step: int, uniform_n, temperature: float) -> list[int]:
    """The first symbol whose cumulative probability passes the number, in float64."""
    out = []
    for row, state, u in zip(logits_nV, state_n.tolist(), uniform_n.tolist(), strict=True):
        scaled = row.double() / temperature
        stop, mask = scaled[STOPS].logsumexp(0), plain_mask(len(row), state, step)
        mask[STOPS[1:]] = False
        scaled[STOPS[0]] = stop
        out.append(int((scaled.masked_fill(~mask, -math.inf).softmax(-1).cumsum(-1) <= u).sum()))
    return out


@pytest.mark.parametrize("vocab_size", [600, 601, 1024])  # 601 is prime: one block
@pytest.mark.parametrize("step, temperature", [(0, 1.0), (2, 1.0), (2, 0.1), (4, 1.0), (5, 1.0)])
def test_draws_invert_the_cumulative_distribution(vocab_size, step, temperature, tiny_model, tokenizers):
    model = tiny_model("llama", tokenizers["newline_indent"], vocab_size=vocab_size)
    head, generator = Backbone(model), torch.Generator().manual_seed(1)
    distribution = LatentDistribution(table_of(vocab_size), SamplingParams(MOST, temperature))
    hidden, uniform = torch.randn(300, 32, generator=generator) * 2, torch.rand(300, generator=generator).double()
    state = torch.arange(300) % 3 if step else torch.zeros(300, dtype=torch.long)
    state = state.clamp(max=MOST - step)
    with torch.no_grad():
        drawn = draw_from_hidden(head, distribution, hidden, state, step, uniform)
        wanted = plain_draw(head.logits(hidden), state, step, uniform, temperature)
        symbols = Symbols(drawn.tokens_n.numpy(), state.numpy(), np.full(300, step), np.arange(300))
        logps_n = plain_logps(head.logits(hidden), symbols, temperature).float()
    # A number within 1e-6 of an edge may fall on its other side: at most one in 300.
    assert sum(a != b for a, b in zip(drawn.tokens_n.tolist(), wanted, strict=True)) <= 1
    torch.testing.assert_close(drawn.logps_n, logps_n, atol=1e-4, rtol=1e-5)
    following = table_of(vocab_size).next_state_SV
    assert drawn.state_n.tolist() == [int(following[s, t]) for s, t in zip(state, drawn.tokens_n, strict=True)]
    assert len(set(drawn.tokens_n.tolist())) > 20 or temperature < 1


def test_numbers_at_the_ends_draw_symbols_that_may_be(tiny_model, tokenizers):
    """0 and 1 are the first and the last symbol that has any mass."""
    head = Backbone(tiny_model("llama", tokenizers["newline_indent"], vocab_size=600))
    distribution = LatentDistribution(table_of(600), SamplingParams(MOST))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    hidden = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).expand(2, 32)
    with torch.no_grad():
        drawn = draw_from_hidden(head, distribution, hidden, torch.zeros(2, dtype=torch.long), 0, ends)
        probs = head.logits(hidden[:1])[0].masked_fill(~plain_mask(600, 0, 0), -math.inf).softmax(-1)
    some = (probs > 1e-7).nonzero()[:, 0]
    assert drawn.tokens_n[0] == 6 and drawn.tokens_n[1] >= some[-1]  # 6: behind what is forbidden, and not the stop


def test_blocks_tile_the_vocabulary():
    for vocab_size in (7, 600, 601, 32016, 49152, 49154, 50257, 128256, 151936):
        assert vocab_size % block_size(vocab_size) == 0
    # 601 is prime: 601 blocks of one symbol or one of 601 are the same work.
    assert [block_size(v) for v in (600, 601)] == [25, 601]


# ---- memory ----


def test_rows_of_logits_follow_free_memory(monkeypatch):
    """On CUDA an eighth of what is free at 12 bytes a logit, at most 2^27 logits; a constant elsewhere, and where
    results must be the same again."""
    free = {"bytes": 0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 << 30)
    cuda = torch.device("cuda")
    free["bytes"] = (8 * 12 * 50_000 * 100) - (1 << 30)  # beside 1 GiB that torch holds and does not use
    assert logps.rows_at_once(cuda, 50_000) == 100
    free["bytes"] = 70 << 30
    assert logps.rows_at_once(cuda, 50_000) == 2**27 // 50_000
    free["bytes"] = -(1 << 30)
    assert logps.rows_at_once(cuda, 50_000) == 1
    for vocabulary in (50_000, 49_152, 32_768, 2**24):  # on the CPU no less than 2^23 logits, and no row more
        rows = logps.rows_at_once(torch.device("cpu"), vocabulary)
        assert rows * vocabulary >= 2**23 > (rows - 1) * vocabulary
    torch.use_deterministic_algorithms(True)
    try:
        assert logps.rows_at_once(cuda, 50_000) == 2**23 // 50_000
    finally:
        torch.use_deterministic_algorithms(False)
