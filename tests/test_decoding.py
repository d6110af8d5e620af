"""Decoding: latents of a boundary that are the same so far run once; on accelerators each step has the same shapes."""

from __future__ import annotations

import shutil
from itertools import chain

import pytest
import torch
from test_rollout import CODE, KEY, assert_same_groups, engine_of

from ra3_trl.rollout import attention
from ra3_trl.rollout.attention import BranchState
from ra3_trl.rollout.backbone import Backbone
from ra3_trl.rollout.branch import BranchEngine
from ra3_trl.rollout.decode import Decoding
from ra3_trl.rollout.expand import ExpandEngine
from ra3_trl.rollout.plan import plan_boundary


LATENTS, LONGEST = 8, 5


@pytest.fixture(scope="module")
def document(tokenizers, segmenter):
    return segmenter(tokenizers["newline_indent"])(5, CODE)[0]


@pytest.mark.parametrize("params", [{"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.2, "temperature": 0.5}])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])  # with sliding windows and soft-capping
def test_latents_that_begin_alike_run_once(model_type, params, tiny_model, tokenizers, document):
    tokenizer, run = tokenizers["newline_indent"], list[int]()
    model = tiny_model(model_type, tokenizer)
    engine = engine_of(BranchEngine, model, tokenizer, max_length=LONGEST, **params)
    handle = engine.backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    group = engine.rollout(document, document.boundaries, LATENTS, 2, KEY)
    handle.remove()
    expand = engine_of(ExpandEngine, model, tokenizer, max_length=LONGEST, **params)
    assert_same_groups(group, expand.rollout(document, document.boundaries, LATENTS, 2, KEY))
    # What is fed at step j are the different first j tokens of a boundary's latents that go on from there.
    at = [(t, z.token_ids) for t, row in enumerate(group.latents) for z in row]
    steps = [len({(t, z[:j]) for t, z in at if len(z) >= j}) for j in range(1, LONGEST)]
    steps = [step for step in steps if step]
    decoding, scoring = run[-1 - len(steps) : -1], run[-1]
    assert sum(steps) < 0.7 * sum(min(len(z), LONGEST - 1) for _, z in at)  # else this would test nothing
    # One that has nothing to go on may stay, where an eighth of the rows at most would leave.
    assert all(step <= rows <= 8 / 7 * step for step, rows in zip(steps, decoding, strict=True))
    lines = {t: len(plan_boundary(document, b, 2).tokens) for t, b in enumerate(group.boundaries)}
    assert scoring == sum(lines[t] + (len(z) == LONGEST) for t, z in set(at))  # the last token of a cut one is new


def test_equal_latents_that_are_given_run_once(tiny_model, tokenizers, document):
    """Three latents of which two are the same: as many tokens as two, and each its own row of scores."""
    tokenizer, run = tokenizers["newline_indent"], list[int]()
    engine = engine_of(BranchEngine, tiny_model("llama", tokenizer), tokenizer)
    group = engine.rollout(document, document.boundaries, 2, 2, KEY)
    assert all(a.token_ids != b.token_ids for a, b in group.latents)
    handle = engine.backbone.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    twice = engine.score(document, group.boundaries, [(b, a, b) for a, b in group.latents], 2)
    several = run[-1]
    engine.score(document, group.boundaries, group.latents, 2)
    handle.remove()
    assert several == run[-1]
    for g, wanted in enumerate((1, 0, 1)):
        assert twice.latent_line_logps_TGH[:, g].allclose(group.latent_line_logps_TGH[:, wanted], atol=1e-4)
        assert twice.latent_gate_logps_TGH[:, g].allclose(group.latent_gate_logps_TGH[:, wanted], atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mistral"])  # the last with windows, which go by blocks
def test_attention_by_boundary_is_attention_by_block(model_type, tiny_model, tokenizers, document, monkeypatch):
    tokenizer, calls, groups = tokenizers["newline_indent"], list[int](), []
    engine = engine_of(BranchEngine, tiny_model(model_type, tokenizer), tokenizer)
    apart = BranchState._attend_apart
    monkeypatch.setattr(BranchState, "_attend_apart", lambda self, *rest: calls.append(1) or apart(self, *rest))
    for least in (1, 10**6):  # tokens a boundary
        monkeypatch.setattr(attention, "_OF_A_BOUNDARY", least)
        groups.append(engine.rollout(document, document.boundaries, 3, 2, KEY))
        groups.append(engine.score(document, document.boundaries, groups[0].latents, 2))
        assert bool(calls) == (least == 1 and model_type != "mistral")
        calls.clear()
    for group in groups[1:]:
        assert_same_groups(group, groups[0], tolerance=5e-5)


@pytest.fixture
def fixed(monkeypatch):
    """Decoding as accelerators have it, on the CPU."""
    monkeypatch.setattr(BranchEngine, "fixed_shapes", True)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_with_fixed_shapes_latents_are_the_same(model_type, tiny_model, tokenizers, document, fixed):
    tokenizer, shapes = tokenizers["newline_indent"], set()
    model = tiny_model(model_type, tokenizer)
    engine = engine_of(BranchEngine, model, tokenizer, max_length=LONGEST)
    attend = Decoding.attend

    def noted(self, layer, qkv, *rest):
        shapes.add((*(x.shape for x in qkv), self._wide))
        return attend(self, layer, qkv, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoding, "attend", noted)
        group = engine.rollout(document, document.boundaries, 3, 2, KEY)
    assert len(shapes) == 1
    expand = engine_of(ExpandEngine, model, tokenizer, max_length=LONGEST)
    assert_same_groups(group, expand.rollout(document, document.boundaries, 3, 2, KEY))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_decoding_step_compiles_whole(tiny_model, tokenizers, document, fixed, monkeypatch):
    """In one graph each: the first step, which gathers the documents' keys, and all others."""
    tokenizer, compiled = tokenizers["newline_indent"], list[torch.fx.GraphModule]()
    engine = engine_of(BranchEngine, tiny_model("llama", tokenizer), tokenizer, max_length=LONGEST)
    wanted = engine.rollout(document, document.boundaries, 3, 1, KEY)

    def inductor(graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        compiled.append(graph)
        return compile_fx(graph, inputs)

    step, hidden = torch.compile(engine.backbone.decoder, fullgraph=True, backend=inductor), Backbone.hidden

    def compiled_steps(self, through=None, **inputs):
        if isinstance(inputs["ra3"], Decoding):
            return step(use_cache=False, **inputs)[0]
        return hidden(self, through, **inputs)

    monkeypatch.setattr(Backbone, "hidden", compiled_steps)
    assert_same_groups(engine.rollout(document, document.boundaries, 3, 1, KEY), wanted)
    assert max(map(len, (z.token_ids for z in chain(*wanted.latents)))) == LONGEST  # four steps
    assert len(compiled) <= 2
