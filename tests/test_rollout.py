"""Engines against the slow path (`slow_path.py`): one plain forward per number, no cache, no batching."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from peft import LoraConfig, get_peft_model
from slow_path import plain_forward

from ra3_trl.records import Latent
from ra3_trl.rollout.attention import NAME
from ra3_trl.rollout.backbone import Backbone
from ra3_trl.rollout.branch import BranchEngine
from ra3_trl.rollout.expand import ExpandEngine
from ra3_trl.rollout.noise import NoiseKey, keyed_uniform
from ra3_trl.rollout.plan import horizon_lines, plan_boundary
from ra3_trl.rollout.sampler import LatentDistribution, SamplingParams
from ra3_trl.segmentation import build_token_table, splice


# Dedents force side runs: where 12 spaces are expected and 4 come, the prefix parts from the expert's tokens.
CODE = """def f(x, y):
    for i in x:
        if i:
            y = y + 1
    # kept
    z = y
    while z:
        z = 0
    return z
"""
KEY = NoiseKey(seed=1, phase=2, step=3)


def engine_of(kind, model, tokenizer, max_branch_tokens=8192, **params):
    params = SamplingParams(**{"max_length": 4, **params})
    backbone = Backbone(model)
    return kind(backbone, build_token_table(tokenizer, backbone.vocab_size), params, max_branch_tokens)


@pytest.fixture(scope="module")
def document(tokenizers, segmenter):
    (document,) = segmenter(tokenizers["newline_indent"])(5, CODE)
    return document


@pytest.fixture(scope="module")
def llama(tiny_model, tokenizers):
    return tiny_model("llama", tokenizers["newline_indent"])


def assert_same_groups(one, other, tolerance: float = 2e-4) -> None:
    assert one.boundaries == other.boundaries
    assert [[z.token_ids for z in row] for row in one.latents] == [[z.token_ids for z in row] for row in other.latents]
    assert [[z.stopped for z in row] for row in one.latents] == [[z.stopped for z in row] for row in other.latents]
    for a, b in zip([z for r in one.latents for z in r], [z for r in other.latents for z in r], strict=True):
        torch.testing.assert_close(torch.tensor(a.logps), torch.tensor(b.logps), atol=tolerance, rtol=0)
    for name in ("line_logps_A", "gate_logps_A", "latent_line_logps_TGH", "latent_gate_logps_TGH"):
        torch.testing.assert_close(
            getattr(one, name), getattr(other, name), atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_group_is_exact(group, slow, horizon: int, tolerance: float = 1e-4) -> None:
    """Every number of a group against its own plain forward. Tolerance per number: 1e-4, sums of up to 20 tokens of
    several nats each in float32."""
    document = group.document
    with torch.no_grad():
        torch.testing.assert_close(group.line_logps_A, torch.stack(slow.line_A(document)), atol=tolerance, rtol=1e-5)
        for i, action in enumerate(document.actions):
            wanted = slow.gate(document, i) if action.boundary else torch.tensor(-torch.inf)
            assert float(group.gate_logps_A[i]) == pytest.approx(float(wanted), abs=tolerance)
        for t, boundary in enumerate(group.boundaries):
            for g, latent in enumerate(group.latents[t]):
                scores = slow.branch(document, boundary, latent, horizon)
                for k in range(horizon):
                    line, gate = scores[k] if k < len(scores) else (0.0, None)
                    wanted = -torch.inf if gate is None else float(gate)
                    assert float(group.latent_line_logps_TGH[t, g, k]) == pytest.approx(
                        float(line), abs=tolerance, rel=1e-5
                    )
                    assert float(group.latent_gate_logps_TGH[t, g, k]) == pytest.approx(
                        wanted, abs=tolerance, rel=1e-5
                    )


def assert_latents_are_exact(group, slow, tolerance: float = 1e-4) -> None:
    """Sampled log-probs against the distribution spelled out token by token."""
    with torch.no_grad():
        for boundary, row in zip(group.boundaries, group.latents, strict=True):
            action = group.document.actions[boundary]
            prefix = [*group.document.input_ids[: action.start], *action.boundary.think]
            for latent in row:
                wanted = torch.stack(slow.latent_logps(prefix, latent))
                torch.testing.assert_close(torch.tensor(latent.logps), wanted, atol=tolerance, rtol=0)


# ---- exactness, by architecture ----


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_branch_engine_equals_plain_forwards(model_type, tiny_model, tokenizers, document, slow_path):
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model(model_type, tokenizer)
    before = plain_forward(model, document.input_ids)
    assert not model_type.startswith(("mistral", "gemma")) or len(document.input_ids) > 2 * model.config.sliding_window
    group = engine_of(BranchEngine, model, tokenizer).rollout(document, document.boundaries[1::2], 2, 3, KEY)
    slow = slow_path(model, tokenizer)
    assert_group_is_exact(group, slow, horizon=3)
    assert_latents_are_exact(group, slow)
    # Afterwards the model attends as before.
    assert model.config._attn_implementation == "eager" != NAME
    assert torch.equal(plain_forward(model, document.input_ids), before)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_expand_engine_samples_and_scores_the_same(model_type, tiny_model, tokenizers, document):
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model(model_type, tokenizer)
    branch = engine_of(BranchEngine, model, tokenizer).rollout(document, document.boundaries, 2, 2, KEY)
    expand = engine_of(ExpandEngine, model, tokenizer).rollout(document, document.boundaries, 2, 2, KEY)
    assert_same_groups(branch, expand)


def slow_objective(slow, group, weight_T, weight_n):
    """A loss with a different weight on each gate and each symbol, from plain forwards."""
    loss, n = 0.0, 0
    for t, boundary in enumerate(group.boundaries):
        action = group.document.actions[boundary]
        prefix = [*group.document.input_ids[: action.start], *action.boundary.think]
        loss = loss + weight_T[t] * slow.gate(group.document, boundary)
        for latent in group.latents[t]:
            for logp in slow.latent_logps(prefix, latent):
                loss = loss + weight_n[n] * logp
                n += 1
    return loss


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_gradients_agree(found, wanted, tolerance: float = 1e-4) -> None:
    largest = max(float(g.abs().max()) for g in wanted.values())
    assert largest > 0 and set(wanted) == set(found)
    for name, gradient in wanted.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * largest, name


def random_weights(group):
    """One number for each gate and each symbol."""
    generator = torch.Generator().manual_seed(0)
    count = sum(len(z.logps) for row in group.latents for z in row)
    return torch.randn(len(group.boundaries), generator=generator), torch.randn(count, generator=generator)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_gradients_equal_those_of_plain_forwards(model_type, tiny_model, tokenizers, document, slow_path):
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model(model_type, tokenizer)
    engine = engine_of(BranchEngine, model, tokenizer, max_length=3)
    group = engine.rollout(document, document.boundaries[2:5], 2, 1, KEY, score=False)
    weight_T, weight_n = random_weights(group)
    slow = slow_path(model, tokenizer, max_length=3)
    wanted = gradients(model, slow_objective(slow, group, weight_T, weight_n))
    for kind in (BranchEngine, ExpandEngine):
        logps = engine_of(kind, model, tokenizer, max_length=3).log_probs(group, slice(0, 3))
        loss = (logps.gate_T * weight_T).sum() + (logps.token_n * weight_n).sum()
        assert_gradients_agree(gradients(model, loss), wanted)


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
def test_latents_that_are_the_same_get_the_gradients_of_each(kind, llama, tokenizers, document, slow_path):
    """Equal latents of a boundary are run once; other numbers of different ones at each boundary, and two documents'
    pieces in one forward."""
    engine = engine_of(kind, llama, tokenizers["newline_indent"], max_length=3)
    group = engine.rollout(document, document.boundaries[2:5], 3, 1, KEY, score=False)
    a, b, c = group.latents
    group = replace(group, latents=((a[0], a[1], a[0]), (b[2], b[2], b[2]), (c[0], c[1], c[2])))
    weight_T, weight_n = random_weights(group)
    slow = slow_path(llama, tokenizers["newline_indent"], max_length=3)
    wanted = gradients(llama, slow_objective(slow, group, weight_T, weight_n))
    first, second = engine.packed_log_probs([(group, slice(0, 1)), (group, slice(1, 3))])
    counts = [len(z.logps) for row in group.latents for z in row]
    assert first.branch_n.tolist() == [m for m, n in enumerate(counts[:3]) for _ in range(n)]
    assert second.branch_n.tolist() == [m for m, n in enumerate(counts[3:]) for _ in range(n)]
    gate_T, token_n = torch.cat([first.gate_T, second.gate_T]), torch.cat([first.token_n, second.token_n])
    assert_gradients_agree(gradients(llama, (gate_T * weight_T).sum() + (token_n * weight_n).sum()), wanted)


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
def test_recomputed_log_probs_are_the_sampled_ones(kind, llama, tokenizers, document):
    engine = engine_of(kind, llama, tokenizers["newline_indent"])
    group = engine.rollout(document, document.boundaries, 3, 1, KEY)
    logps = engine.log_probs(group, slice(0, len(group.boundaries)))
    sampled = [logp for row in group.latents for z in row for logp in z.logps]
    torch.testing.assert_close(logps.token_n.detach(), torch.tensor(sampled), atol=1e-4, rtol=0)
    torch.testing.assert_close(logps.gate_T.detach(), group.gate_logps_A[list(group.boundaries)], atol=1e-4, rtol=0)
    counts = [len(z.logps) for row in group.latents for z in row]
    assert logps.branch_n.tolist() == [m for m, n in enumerate(counts) for _ in range(n)]
    # A part of the boundaries: branches are counted from the first of them.
    part = engine.log_probs(group, slice(1, 3))
    skipped = sum(counts[:3])
    torch.testing.assert_close(part.token_n, logps.token_n[skipped : skipped + sum(counts[3:9])], atol=1e-4, rtol=0)
    assert part.branch_n.tolist() == [m for m, n in enumerate(counts[3:9]) for _ in range(n)]


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
def test_gradients_go_through_a_wrapper(kind, llama, tokenizers, document):
    """With `through` the wrapper's own forward runs (DDP arms its reduction there) and the numbers stay."""

    class Wrapper(torch.nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.module = llama

        def forward(self, **inputs):
            self.calls += 1
            return self.module(**inputs)

    engine = engine_of(kind, llama, tokenizers["newline_indent"])
    group = engine.rollout(document, document.boundaries[:3], 2, 1, KEY)
    plain = engine.log_probs(group, slice(0, 3))
    wrapper = Wrapper()
    wrapped = engine.log_probs(group, slice(0, 3), through=wrapper)
    assert wrapper.calls == 1
    torch.testing.assert_close(wrapped.token_n, plain.token_n, atol=1e-5, rtol=0)
    assert_gradients_agree(gradients(llama, wrapped.token_n.sum()), gradients(llama, plain.token_n.sum()))


def test_a_lora_model(tiny_model, tokenizers, document, slow_path):
    """Forward and gradients of an adapter; only the adapter has gradients."""
    tokenizer = tokenizers["newline_indent"]
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    model = get_peft_model(tiny_model("llama", tokenizer), config).eval()
    engine = engine_of(BranchEngine, model, tokenizer, max_length=3)
    group = engine.rollout(document, document.boundaries[1:4], 2, 2, KEY)
    slow = slow_path(model, tokenizer, max_length=3)
    assert_group_is_exact(group, slow, horizon=2)
    assert_latents_are_exact(group, slow)
    weight_T, weight_n = random_weights(group)
    wanted = gradients(model, slow_objective(slow, group, weight_T, weight_n))
    assert wanted and all("lora_" in name for name in wanted)
    for through in (None, model):
        logps = engine.log_probs(group, slice(0, 3), through)
        assert_gradients_agree(
            gradients(model, (logps.gate_T * weight_T).sum() + (logps.token_n * weight_n).sum()), wanted
        )
    # The adapter is really in use.
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(engine.trunk(document).line_logps_A, group.line_logps_A, atol=1e-2)
    expand = engine_of(ExpandEngine, model, tokenizer, max_length=3).rollout(
        document, document.boundaries[1:4], 2, 2, KEY
    )
    assert_same_groups(group, expand)


def test_bfloat16_within_its_tolerance(tiny_model, tokenizers, document):
    """bfloat16 has 8 bits: 2^-8 relative a rounding. On logits of a few nats a token's log-prob is off by some 0.02,
    so engine and plain forward (both in bfloat16) may differ by 0.1 a token on average."""
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("llama", tokenizer).to(torch.bfloat16)
    trunk = engine_of(BranchEngine, model, tokenizer).trunk(document)
    rows = plain_forward(model, document.input_ids)
    for action, found in zip(document.actions, trunk.line_logps_A.tolist(), strict=True):
        span = range(max(action.start, 1), action.end)
        wanted = sum(float(rows[p - 1, document.input_ids[p]]) for p in span)
        assert abs(found - wanted) < 0.1 * len(span)


# ---- tokenizers and side runs ----


def test_every_tokenizer_and_horizon_one(tokenizer, tiny_model, segmenter, slow_path):
    model = tiny_model("llama", tokenizer)
    (document,) = segmenter(tokenizer)(0, CODE)
    group = engine_of(BranchEngine, model, tokenizer).rollout(document, document.boundaries, 2, 1, KEY)
    slow = slow_path(model, tokenizer)
    assert_group_is_exact(group, slow, horizon=1)
    assert_latents_are_exact(group, slow)


def test_multi_token_prefixes_need_side_runs_and_are_exact(tokenizers, tiny_model, segmenter, slow_path):
    """`newline_alone`: think = (11 spaces, " #"). Before a dedent the expert's next token is another: a side run."""
    tokenizer = tokenizers["newline_alone"]
    (document,) = segmenter(tokenizer)(0, "if a:\n    if b:\n        c = 1\nd = 2\nif e:\n    f = 3\ng = 4\n")
    thinks = [document.actions[s].boundary.think for s in document.boundaries]
    assert max(map(len, thinks)) >= 2
    plans = [plan_boundary(document, boundary, 3) for boundary in document.boundaries]
    assert any((p.sees <= np.arange(len(p.tokens))).any() for p in plans), "no side run in this test"
    model = tiny_model("qwen2", tokenizer)
    for kind in (BranchEngine, ExpandEngine):
        group = engine_of(kind, model, tokenizer).rollout(document, document.boundaries, 2, 3, KEY)
        assert_group_is_exact(group, slow_path(model, tokenizer), horizon=3)


def test_spliced_documents_are_scored_as_any_other(llama, tokenizers, document, slow_path):
    """Annotation rolls out on a text that has latents already."""
    tokenizer = tokenizers["newline_indent"]
    engine = engine_of(BranchEngine, llama, tokenizer)
    first = engine.rollout(document, document.boundaries[:2], 1, 1, KEY)
    spliced = splice(document, {s: row[0] for s, row in zip(first.boundaries, first.latents, strict=True)}).document
    group = engine.rollout(spliced, spliced.boundaries[2:], 1, 2, KEY)
    assert_group_is_exact(group, slow_path(llama, tokenizer), horizon=2)


def test_chunks_with_context(llama, tokenizers, segmenter, slow_path):
    """Later chunks, prompts: the first action's line and gate are predicted from the context."""
    tokenizer = tokenizers["newline_indent"]
    chunk = segmenter(tokenizer, 40)(0, CODE * 2)[1]
    (prompted,) = segmenter(tokenizer)(0, CODE, CODE.index("    # kept"))
    for document in (chunk, prompted):
        group = engine_of(BranchEngine, llama, tokenizer).rollout(document, document.boundaries, 1, 2, KEY)
        assert_group_is_exact(group, slow_path(llama, tokenizer), horizon=2)


# ---- plans ----


def test_the_horizon_ends_at_the_document_and_at_a_kept_comment(document):
    comment = next(i for i, a in enumerate(document.actions) if a.comment)
    assert horizon_lines(document, comment - 2, 5) == 2
    assert horizon_lines(document, len(document.actions) - 1, 5) == 1
    assert horizon_lines(document, comment + 1, 2) == 2


def test_lines_beyond_the_horizon_are_zero_and_without_gate(llama, tokenizers, document):
    group = engine_of(BranchEngine, llama, tokenizers["newline_indent"]).rollout(
        document, document.boundaries, 1, 3, KEY
    )
    for t, boundary in enumerate(document.boundaries):
        lines = horizon_lines(document, boundary, 3)
        assert (group.latent_line_logps_TGH[t, :, :lines] < 0).all() and (
            group.latent_line_logps_TGH[t, :, lines:] == 0
        ).all()
        assert torch.isneginf(group.latent_gate_logps_TGH[t, :, lines:]).all()


# ---- the same whatever the grouping ----


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
def test_score_after_rollout_equals_score_from_scratch(kind, llama, tokenizers, document):
    engine = engine_of(kind, llama, tokenizers["newline_indent"])
    group = engine.rollout(document, document.boundaries, 2, 3, KEY)
    assert_same_groups(group, engine.score(document, document.boundaries, group.latents, 3))


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
@pytest.mark.parametrize("most", [1, 60, 10**6])
def test_any_max_branch_tokens_gives_the_same(kind, most, llama, tokenizers, document):
    tokenizer = tokenizers["newline_indent"]
    wanted = engine_of(kind, llama, tokenizer).rollout(document, document.boundaries, 3, 2, KEY)
    engine = engine_of(kind, llama, tokenizer, max_branch_tokens=most)
    assert_same_groups(engine.rollout(document, document.boundaries, 3, 2, KEY), wanted)
    parts = engine.split(wanted)
    assert [t for part in parts for t in range(part.start, part.stop)] == list(range(len(wanted.boundaries)))
    assert len(parts) == (1 if most == 10**6 else len(wanted.boundaries)) or most == 60
    whole = gradients(llama, engine.log_probs(wanted, slice(0, len(wanted.boundaries))).token_n.sum())
    llama.zero_grad(set_to_none=True)
    for part in parts:
        engine.log_probs(wanted, part).token_n.sum().backward()
    assert_gradients_agree({n: p.grad for n, p in llama.named_parameters() if p.grad is not None}, whole)


OTHER = "if a:\n    if b:\n        c = 1\nd = 2\nif e:\n    f = 3\ng = 4\n"


@pytest.fixture(scope="module")
def several(tokenizers, segmenter):
    """Documents of different lengths, one without a boundary; `newline_alone` needs side runs at dedents."""

    def several(name: str):
        texts = [CODE, OTHER, "x = 1\n", CODE[CODE.index("    # kept") :].replace("    ", "")]
        return [segmenter(tokenizers[name])(i, text)[0] for i, text in enumerate(texts)]

    return several


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
@pytest.mark.parametrize("model_type, most", [("llama", 10**6), ("llama", 150), ("llama", 1), ("gemma2", 10**6)])
def test_documents_together_are_as_one_by_one(kind, model_type, most, several, tiny_model, tokenizers):
    """Each document's latents, scores and states: those of the expand engine alone, whatever fits together."""
    tokenizer = tokenizers["newline_alone"]
    model, documents = tiny_model(model_type, tokenizer), several("newline_alone")
    assert sum(bool(document.boundaries) for document in documents) == 3
    alone = engine_of(ExpandEngine, model, tokenizer)
    wanted = [alone.rollout(document, document.boundaries[1:], 2, 2, KEY) for document in documents]
    engine, asked = engine_of(kind, model, tokenizer, max_branch_tokens=most), []

    def later(trunk):
        asked.append(trunk.document)
        return trunk.document.boundaries[1:]

    boundaries, latents = [group.boundaries for group in wanted], [group.latents for group in wanted]
    for found in (
        engine.rollouts(documents, [later] * 4, 2, 2, KEY),
        engine.scores(documents, boundaries, latents, 2),
    ):
        for one, other in zip(found, wanted, strict=True):
            assert one.document is other.document
            assert_same_groups(one, other)
            torch.testing.assert_close(one.states_SD, other.states_SD, atol=1e-4, rtol=1e-4)
    assert [id(document) for document in asked] == [id(document) for document in documents]
    for trunk, other in zip(engine.trunks(documents), wanted, strict=True):
        torch.testing.assert_close(trunk.gate_logps_A, other.gate_logps_A, atol=2e-4, rtol=0)
    assert engine.trunks([]) == engine.rollouts([], [], 2, 2, KEY) == engine.scores([], [], [], 2) == []


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_gradients_of_pieces_together_are_those_of_each(kind, model_type, several, tiny_model, tokenizers):
    """Pieces of several documents, of other numbers of latents and boundaries, in one forward."""
    tokenizer = tokenizers["newline_alone"]
    model = tiny_model(model_type, tokenizer)
    first, second, _, last = several("newline_alone")
    expand, engine = (engine_of(k, model, tokenizer, max_length=3) for k in (ExpandEngine, kind))
    groups = [
        expand.rollout(document, document.boundaries[:3], count, 1, KEY, score=False)
        for document, count in ((first, 2), (second, 3), (last, 2))
    ]
    pieces = [(groups[0], slice(0, 1)), (groups[1], slice(0, 2)), (groups[0], slice(1, 3)), (groups[2], slice(0, 3))]
    alone = [expand.log_probs(*piece) for piece in pieces]
    together = engine.packed_log_probs(pieces)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.gate_T, other.gate_T, atol=1e-4, rtol=0)
        torch.testing.assert_close(one.token_n, other.token_n, atol=1e-4, rtol=0)
        assert one.branch_n.tolist() == other.branch_n.tolist()
    # A weight of its own for each piece, so that gradients of one can't pass for another's.
    found, wanted = (
        gradients(model, sum((i + 1) * (p.token_n.sum() + p.gate_T.sum()) for i, p in enumerate(logps)))
        for logps in (together, alone)
    )
    assert_gradients_agree(found, wanted)


def test_pieces_are_joined_as_far_as_they_fit(llama, tokenizers, several):
    """By hand: document tokens up to the last boundary, and branches times the longest of them."""
    engine = engine_of(BranchEngine, llama, tokenizers["newline_indent"])
    documents = several("newline_indent")[:2]
    groups = engine.rollouts(documents, [document.boundaries[:2] for document in documents], 3, 1, KEY, score=False)
    pieces = [(group, slice(0, 2)) for group in groups]
    sizes = []
    for group in groups:
        opened = [group.document.actions[boundary] for boundary in group.boundaries]
        longest = max(len(a.think) + len(z.token_ids) for a, r in zip(opened, group.latents, strict=True) for z in r)
        sizes.append(opened[1].start + 2 * 3 * longest)
    engine.max_branch_tokens = sum(sizes)
    assert engine.join(pieces) == [slice(0, 2)]
    engine.max_branch_tokens = sum(sizes) - 1
    assert engine.join(pieces) == [slice(0, 1), slice(1, 2)]
    assert engine.join([]) == []


def test_documents_in_lockstep_share_their_forwards(llama, tokenizers, several):
    """Four documents take as many forwards as one whose latents are as long; none has more tokens than asked for."""
    documents, calls = several("newline_indent"), []
    engine = engine_of(BranchEngine, llama, tokenizers["newline_indent"], max_length=4)
    handle = engine.backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    engine.rollouts(documents, [document.boundaries for document in documents], 2, 1, KEY)
    # Documents, side runs of gates, think prefixes, tokens 1 to 3 (nothing is predicted from the fourth), scores.
    assert len(calls) == 7 and calls[0] == sum(len(document.input_ids) for document in documents)
    engine.max_branch_tokens, together = 100, len(calls)
    calls.clear()
    engine.rollouts(documents, [document.boundaries for document in documents], 2, 1, KEY)
    handle.remove()
    assert len(calls) > 2 * together
    assert max(calls) <= max(100, *(len(document.input_ids) for document in documents))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt2"])
def test_what_is_remembered_of_a_text_changes_nothing(model_type, tiny_model, tokenizers, segmenter):
    """A text up to line 6, the whole, with a latent before line 4, without it again; another text of that number,
    twice; the first one and the same with another token in line 4, whose lines stand where the others do."""
    tokenizer = tokenizers["newline_alone"]  # side runs at dedents
    model = tiny_model(model_type, tokenizer)
    document, other = (segmenter(tokenizer)(5, text)[0] for text in (CODE, OTHER))
    start = replace(document, actions=document.actions[:6], input_ids=document.input_ids[: document.actions[5].end])
    engine, run = engine_of(BranchEngine, model, tokenizer), list[int]()
    (latent,) = engine.rollout(document, [document.boundaries[3]], 1, 1, KEY, score=False).latents[0]
    spliced = splice(document, {document.boundaries[3]: latent}).document
    at = document.actions[3].end - 2
    changed = replace(document, input_ids=(*document.input_ids[:at], 77, *document.input_ids[at + 1 :]))
    assert changed.input_ids != document.input_ids
    texts = (start, document, spliced, document, other, other, document, changed)
    alone = [engine.rollout(text, text.boundaries[1::2], 2, 2, KEY) for text in texts]
    handle = engine.backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    firsts = []  # tokens of each text that were run
    with engine.remembering():
        for text, wanted in zip(texts, alone, strict=True):
            run.clear()
            found = engine.rollout(text, text.boundaries[1::2], 2, 2, KEY)
            firsts.append(run[0])
            assert_same_groups(found, wanted)
            torch.testing.assert_close(found.states_SD, wanted.states_SD, atol=1e-4, rtol=1e-4)
    handle.remove()
    # Of a text that goes on, from the token before on; of the same text the last one; of another text all but what
    # both begin with, if anything.
    lengths = [len(text.input_ids) for text in texts]
    assert firsts[0] == lengths[0] and firsts[1] == lengths[1] - lengths[0] + 1 and firsts[5] == 1
    assert all(0 < first < length for first, length in zip(firsts[2:4], lengths[2:4], strict=True))
    assert firsts[4] <= lengths[4] and engine._memory is None


@pytest.mark.parametrize("model_type, max_branch_tokens", [("llama", 8192), ("mistral", 8192), ("llama", 60)])
def test_what_was_scored_under_a_placed_latent_is_not_run_again(
    model_type, max_branch_tokens, tiny_model, tokenizers, segmenter
):
    """Two lines were scored under each latent, so a text with one of them placed runs from the last token of the
    second on; with a latent that was not scored it runs more, and where little may be kept."""
    tokenizer = tokenizers["newline_alone"]  # side runs at dedents
    document, run = segmenter(tokenizer)(5, CODE)[0], list[int]()
    model = tiny_model(model_type, tokenizer)
    engine = engine_of(BranchEngine, model, tokenizer)
    engine.max_branch_tokens = max_branch_tokens
    handle = engine.backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    for b in document.boundaries[1::4]:
        with engine.remembering():
            latents = engine.rollout(document, document.boundaries, 3, 2, KEY).latents[document.boundaries.index(b)]
            strange = replace(latents[0], token_ids=(*latents[0].token_ids, 9))
            for latent, scored in ((latents[2], True), (strange, False)):
                text = splice(document, {b: latent}).document
                wanted = engine_of(BranchEngine, model, tokenizer).rollout(text, text.boundaries[::2], 2, 2, KEY)
                engine.rollout(document, document.boundaries, 3, 2, KEY)
                run.clear()
                found = engine.rollout(text, text.boundaries[::2], 2, 2, KEY)
                assert_same_groups(found, wanted)
                torch.testing.assert_close(found.states_SD, wanted.states_SD, atol=1e-4, rtol=1e-4)
                least = len(text.input_ids) - text.actions[b + horizon_lines(document, b, 2) - 1].end + 1
                assert run[0] == least if scored and max_branch_tokens > 60 else run[0] >= least + (not scored)
    handle.remove()


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
def test_a_latent_does_not_depend_on_its_company(kind, llama, tokenizers, document):
    """Fewer boundaries, fewer latents, one more phase: only the key decides."""
    engine = engine_of(kind, llama, tokenizers["newline_indent"])
    group = engine.rollout(document, document.boundaries, 3, 1, KEY)
    alone = engine.rollout(document, document.boundaries[3:4], 2, 1, KEY)
    assert [z.token_ids for z in alone.latents[0]] == [z.token_ids for z in group.latents[3][:2]]
    other = engine.rollout(document, document.boundaries, 3, 1, replace(KEY, step=4))
    assert [[z.token_ids for z in r] for r in other.latents] != [[z.token_ids for z in r] for r in group.latents]
    # Latents of a group differ among themselves.
    assert len({z.token_ids for row in group.latents for z in row}) > len(group.boundaries)


def test_no_boundaries(llama, tokenizers, segmenter, document):
    for kind in (BranchEngine, ExpandEngine):
        engine = engine_of(kind, llama, tokenizers["newline_indent"])
        group = engine.rollout(document, (), 3, 2, KEY)
        assert group.boundaries == () and group.latent_line_logps_TGH.shape[0] == 0
        torch.testing.assert_close(group.line_logps_A, engine.trunk(document).line_logps_A)
        (one_line,) = segmenter(tokenizers["newline_indent"])(0, "x = 1\n")
        assert engine.trunk(one_line).gate_logps_A.tolist() == [-math.inf]
        assert engine.split(group) == []


def test_branches_longer_than_the_room_for_own_keys(tiny_model, tokenizers, segmenter):
    """The branch engine keeps room for 1024 own keys of a block; a line of more tokens must still be right."""
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("llama", tokenizer)
    (document,) = segmenter(tokenizer)(0, "a = 0\nx = [" + "1, 23, " * 260 + "]\nb = 2\n")
    assert document.actions[1].end - document.actions[1].start > 1030
    branch = engine_of(BranchEngine, model, tokenizer).rollout(document, (1,), 1, 1, KEY)
    expand = engine_of(ExpandEngine, model, tokenizer).rollout(document, (1,), 1, 1, KEY)
    assert_same_groups(branch, expand, tolerance=2e-2)  # a sum over 1000 tokens


def test_settings_of_the_models_generation_config_do_not_leak_in(tiny_model, tokenizers, document):
    """Checkpoints ship repetition penalties and top-k (Qwen: 1.1 and 20); the policy is the plain softmax."""
    tokenizer = tokenizers["newline_indent"]
    model = tiny_model("llama", tokenizer)
    wanted = engine_of(BranchEngine, model, tokenizer).rollout(document, document.boundaries, 2, 1, KEY)
    model.generation_config.update(
        repetition_penalty=3.0, do_sample=True, temperature=0.1, top_k=1, min_new_tokens=4, suppress_tokens=[5, 6]
    )
    assert_same_groups(
        engine_of(ExpandEngine, model, tokenizer).rollout(document, document.boundaries, 2, 1, KEY), wanted
    )


# ---- what latents are made of ----


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
@pytest.mark.parametrize("max_length", [1, 2, 3, 6])
def test_latents_are_legal_text(kind, max_length, tokenizer, tiny_model, segmenter):
    """Never empty or blank, no newline, carriage return or NUL, UTF-8 even when cut: from a model that loves bytes."""
    model = tiny_model("llama", tokenizer, seed=3)
    engine = engine_of(kind, model, tokenizer, max_length=max_length, temperature=3.0)
    (document,) = segmenter(tokenizer)(0, CODE)
    group = engine.rollout(document, document.boundaries, 24 if kind is BranchEngine else 6, 1, KEY)
    latents, data = [z for row in group.latents for z in row], engine.table.token_bytes
    for latent in latents:
        text = b"".join(data[i] for i in latent.token_ids).decode("utf-8", "strict")
        assert text.strip() and not set(text) & {chr(c) for c in range(0x20) if c != 0x09}
        assert len(latent.token_ids) <= max_length
        assert len(latent.logps) == len(latent.token_ids) + latent.stopped
        assert latent.stopped or len(latent.token_ids) == max_length
    if max_length == 6 and kind is BranchEngine:
        assert any(not b"".join(data[i] for i in z.token_ids).isascii() for z in latents)


def test_no_path_leads_to_a_blank_latent(tokenizer):
    """Also not through bytes: C2 A0 is a no-break space, E3 80 80 an ideographic one."""
    table = build_token_table(tokenizer, len(tokenizer))
    distribution = LatentDistribution(table, SamplingParams(max_length=4))
    for character in ("\u00a0", "\u3000", "\u2003"):
        ids = [table.token_bytes.index(bytes([b])) for b in character.encode()]
        state, legal = 0, True
        for step, token in enumerate(ids):
            legal = legal and bool(distribution.allowed(state, step)[token])
            state = int(table.next_state_SV[state, token])
        stop = legal and bool(distribution.allowed(state, len(ids))[table.stop_id])
        assert not stop, f"a latent may be {character!r} alone"


def test_the_stop_is_one_symbol(llama, tokenizers, document, slow_path):
    """Its log-prob is the log-sum-exp over all newline-bearing tokens and EOS; the others of them are closed."""
    tokenizer = tokenizers["newline_indent"]
    table = build_token_table(tokenizer, len(tokenizer))
    distribution = LatentDistribution(table, SamplingParams(max_length=4))
    logits = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(0))
    scaled = distribution(logits, torch.tensor([0]), torch.tensor([1]))[0]
    stop_ids = slow_path(llama, tokenizer).stop_ids
    assert len(stop_ids) > 3
    assert float(scaled[table.stop_id]) == pytest.approx(
        math.log(sum(math.exp(float(logits[0, i])) for i in stop_ids)), abs=1e-5
    )
    assert torch.isneginf(scaled[[i for i in stop_ids if i != table.stop_id]]).all()
    # No stop at the first token, and none inside a character.
    assert torch.isneginf(distribution(logits, torch.tensor([0]), torch.tensor([0]))[0, stop_ids]).all()
    assert torch.isneginf(distribution(logits, torch.tensor([2]), torch.tensor([1]))[0, stop_ids]).all()


# ---- the distribution sampled from ----


@pytest.mark.parametrize("kind", [BranchEngine, ExpandEngine])
@pytest.mark.parametrize(
    "params", [{"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.8}]
)
def test_log_probs_are_of_the_truncated_distribution(kind, params, llama, tokenizers, document, slow_path):
    tokenizer = tokenizers["newline_indent"]
    engine = engine_of(kind, llama, tokenizer, **params)
    group = engine.rollout(document, document.boundaries[:3], 4, 1, KEY)
    assert_latents_are_exact(group, slow_path(llama, tokenizer, **params))
    logps = engine.log_probs(group, slice(0, 3)).token_n
    sampled = torch.tensor([logp for row in group.latents for z in row for logp in z.logps])
    torch.testing.assert_close(logps.detach(), sampled, atol=1e-4, rtol=0)
    for latent in (z for row in group.latents for z in row):
        if "top_k" not in params and "top_p" not in params:
            assert latent.kept is None
            continue
        symbols = [*latent.token_ids, engine.table.stop_id][: len(latent.logps)]
        assert len(latent.kept) == len(symbols)
        assert all(s in kept.tolist() for s, kept in zip(symbols, latent.kept, strict=True))
        assert all(len(kept) <= params.get("top_k", 10**6) for kept in latent.kept)


def test_a_stored_kept_set_stays_finite_under_other_weights(tiny_model, tokenizers, document):
    """A recomputed nucleus under new weights may leave out the very symbol that was drawn; the stored set does not."""
    tokenizer = tokenizers["newline_indent"]
    old, new = tiny_model("llama", tokenizer), tiny_model("llama", tokenizer, seed=9)
    group = engine_of(BranchEngine, old, tokenizer, top_k=2).rollout(document, document.boundaries, 3, 1, KEY)
    engine = engine_of(BranchEngine, new, tokenizer, top_k=2)
    logps = engine.log_probs(group, slice(0, len(group.boundaries))).token_n
    assert torch.isfinite(logps).all()
    # The distribution is that of the kept set: its two symbols share all the mass under the new weights too.
    kept = group.latents[0][0].kept[0].tolist()
    assert len(kept) == 2
    both = [Latent((k,), False, (0.0,), (group.latents[0][0].kept[0],)) for k in kept]
    pair = replace(group, boundaries=group.boundaries[:1], latents=(tuple(both),))
    assert float(engine.log_probs(pair, slice(0, 1)).token_n.exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"temperature": 2.0}, {"top_k": 4}, {"top_p": 0.5}])
def test_frequencies_of_first_tokens(params, llama, tokenizers, document, slow_path):
    """n = 3000 draws: a frequency has standard deviation sqrt(p (1-p) / n), at most 0.009; 5 of them are allowed (a
    right sampler passes with probability 1 - 600 * 6e-7), plus one draw for the rarest tokens."""
    tokenizer, n = tokenizers["newline_indent"], 3000
    boundary = document.boundaries[2]
    action = document.actions[boundary]
    engine = engine_of(BranchEngine, llama, tokenizer, max_length=1, **params)
    group = engine.rollout(document, (boundary,), n, 1, KEY, score=False)
    prefix = [*document.input_ids[: action.start], *action.boundary.think]
    with torch.no_grad():
        exact = slow_path(llama, tokenizer, max_length=1, **params).symbols(prefix, []).exp()
    counts = torch.bincount(torch.tensor([z.token_ids[0] for z in group.latents[0]]), minlength=len(exact))
    assert not any(z.stopped for z in group.latents[0])
    tolerance = 5 * (exact * (1 - exact) / n).sqrt() + 1 / n
    assert ((counts / n - exact).abs() <= tolerance).all()
    assert (counts[exact == 0] == 0).all()
    assert len(exact[exact > 0.01]) >= 2, "too flat or too sharp to show anything"


def test_frequencies_of_whole_latents(llama, tokenizers, document, slow_path):
    """All pairs (first token, second symbol or stop) under top-k 3: at most 9 outcomes, exact by enumeration."""
    tokenizer, n, params = tokenizers["newline_indent"], 3000, {"top_k": 3, "temperature": 1.5}
    boundary = document.boundaries[1]
    action = document.actions[boundary]
    engine = engine_of(BranchEngine, llama, tokenizer, max_length=2, **params)
    group = engine.rollout(document, (boundary,), n, 1, KEY, score=False)
    slow, exact = slow_path(llama, tokenizer, max_length=2, **params), {}
    prefix = [*document.input_ids[: action.start], *action.boundary.think]
    with torch.no_grad():
        first = slow.symbols(prefix, []).exp()
        for a in first.nonzero()[:, 0].tolist():
            second = slow.symbols(prefix, [a]).exp()
            for b in second.nonzero()[:, 0].tolist():
                exact[a, b] = float(first[a] * second[b])
    assert 5 <= len(exact) <= 9 and sum(exact.values()) == pytest.approx(1, abs=1e-5)
    counts = dict.fromkeys(exact, 0)
    for z in group.latents[0]:
        counts[(*z.token_ids, engine.table.stop_id)[:2]] += 1
    for pair, p in exact.items():
        assert abs(counts[pair] / n - p) <= 5 * math.sqrt(p * (1 - p) / n) + 1 / n


# ---- noise ----


def test_noise_depends_on_the_key_alone():
    index = np.array([3, 1, 2])
    together = KEY.uniform(7, index, 0, 5)
    assert together.tolist() == [float(KEY.uniform(7, int(i), 0, 5)) for i in index]
    keys = [(1, 2, 3, 7, 1, 0, 5), (2, 2, 3, 7, 1, 0, 5), (1, 3, 3, 7, 1, 0, 5), (1, 2, 4, 7, 1, 0, 5)]
    keys += [
        (1, 2, 3, 8, 1, 0, 5),
        (1, 2, 3, 7, 2, 0, 5),
        (1, 2, 3, 7, 1, 1, 5),
        (1, 2, 3, 7, 1, 0, 6),
        (1, 2, 3, 7, 1, -1, 5),
    ]
    assert len({float(keyed_uniform(*key)) for key in keys}) == len(keys)
    assert float(keyed_uniform(1, 2)) != float(keyed_uniform(2, 1))


def test_noise_is_pinned():
    """A change here changes every run: splitmix64 over the keys, by Python integers."""

    def by_hand(*keys: int) -> float:
        mask, state = 2**64 - 1, 0
        for key in keys:
            state = ((state ^ (key & mask)) + 0x9E3779B97F4A7C15) & mask
            state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
            state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
            state ^= state >> 31
        return ((state >> 11) + 0.5) * 2.0**-53

    for keys in [(0,), (42, 0, 1, 2, 3, 4, 5), (-1, 2**40), (1, 2, 3, 7, 1, -2, 0)]:
        assert float(keyed_uniform(*keys)) == by_hand(*keys)
    # The first output of splitmix64 with seed 0 is 0xE220A8397B1DCDAF; its top 53 bits over 2^53.
    assert float(keyed_uniform(0)) == ((0xE220A8397B1DCDAF >> 11) + 0.5) / 2**53


def test_noise_is_uniform_and_uncorrelated():
    """40,000 numbers: each tenth holds 4000 +- 60 (5 standard deviations: 300); neighbours' correlation +- 0.005."""
    u = keyed_uniform(0, 0, 0, 0, np.arange(200)[:, None], np.arange(200)[None], 0)
    assert u.min() > 0 and u.max() < 1
    counts = np.histogram(u, bins=10, range=(0, 1))[0]
    assert np.abs(counts - 4000).max() < 300
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.025
