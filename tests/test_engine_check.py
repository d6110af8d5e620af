"""What is checked when a model is opened: each engine against plain forwards, the model's own forwards first."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from conftest import furthest, weights
from torch import nn

from ra3_trl.rollout import Backbone, SamplingParams, branch, build_engine, evaluating, expand
from ra3_trl.rollout.attention import BranchState
from ra3_trl.segmentation import build_token_table


@pytest.fixture
def opened(tokenizers):
    def make(model, name="auto", max_length=8, **params):
        backbone = Backbone(model)
        table = build_token_table(tokenizers["newline_indent"], backbone.vocab_size)
        return build_engine(name, backbone, table, SamplingParams(max_length, **params))

    return make


@pytest.fixture
def llama(tiny_model, tokenizers):
    return tiny_model("llama", tokenizers["newline_indent"])


def off_by(module, monkeypatch, name, amount):
    """Has `module.name` give log-probs of draws that are `amount` too large."""
    right = getattr(module, name)

    def wrong(*args, **kwargs):
        draw = right(*args, **kwargs)
        return replace(draw, logps_n=draw.logps_n + amount)

    monkeypatch.setattr(module, name, wrong)


def test_an_architecture_that_fails_both_is_refused(tiny_model, tokenizers, opened):
    """RWKV carries its state through `generate` and is given all tokens again at each step."""
    model = tiny_model("rwkv", tokenizers["newline_indent"])
    with pytest.raises(ValueError, match="RwkvForCausalLM, on which no engine is exact") as refused:
        opened(model)
    assert "branch: ValueError: RwkvForCausalLM does not follow transformers' attention" in str(refused.value)
    assert "expand: log-probs of sampled latents differ by up to" in str(refused.value)
    with pytest.raises(ValueError, match="`engine` is 'expand', which is not exact on RwkvForCausalLM: log-probs"):
        opened(model, "expand")


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}])
def test_what_an_engine_draws_is_checked(llama, opened, monkeypatch, caplog, params):
    """A hundredth of a nat; the bound is 1e-3 in float32."""
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        off_by(branch, patch, "draw_from_hidden", 0.01)
        assert opened(llama, **params).name == "expand"
        text = "The branch engine is not exact on LlamaForCausalLM, so `expand` is used: log-probs of sampled latents"
        assert text in caplog.text and "differ by up to 0.01 nats from those of plain forwards" in caplog.text
        off_by(expand, patch, "draw", 0.01)
        with pytest.raises(ValueError, match="no engine is exact"):
            opened(llama, **params)
    assert opened(llama, **params).name == "branch"


def test_documents_in_lockstep_are_checked(llama, opened, monkeypatch):
    """Positions that go on from one document to the next are right for the first alone."""
    right = BranchState.begin

    def running(self, plan, arrays):
        ids, positions = right(self, plan, arrays)
        return ids, torch.arange(len(positions)) if plan.tokens is None else positions

    monkeypatch.setattr(BranchState, "begin", running)
    with pytest.raises(ValueError, match="'branch', which is not exact on LlamaForCausalLM: .* log-probs differ"):
        opened(llama, "branch")


def test_scores_of_expand_are_checked(llama, opened, monkeypatch):
    right = expand.collect_scores

    def wrong(*args):
        lines, gates = right(*args)
        return lines + 0.01, gates

    monkeypatch.setattr(expand, "collect_scores", wrong)
    with pytest.raises(ValueError, match="line log-probs under latents differ by up to 0.01 nats"):
        opened(llama, "expand")
    assert opened(llama).name == "branch"  # which is not `expand`'s


@pytest.mark.parametrize(
    "error",
    [
        TypeError("no `use_cache` here"), IndexError("out of range"), RuntimeError("no"), NameError("no `mask`"),
        ZeroDivisionError("by zero"), NotImplementedError("not yet"), OSError("no such file"), MemoryError("no room"),
    ],
)  # fmt: skip
def test_an_error_of_the_models_own_forward_is_said(llama, opened, error):
    def fail(module, args):
        raise error

    llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="`model` is a LlamaForCausalLM, whose own forward fails on a short") as said:
        opened(llama)
    assert f"({type(error).__name__}: {error})" in str(said.value) and said.value.__cause__ is error


def test_a_model_that_is_not_causal_is_refused(llama, opened):
    def mix(module, args, output):
        return output + 0.1 * output.mean(1, keepdim=True)

    llama.model.norm.register_forward_hook(mix)
    with pytest.raises(ValueError, match="LlamaForCausalLM, whose logits depend on tokens that come later"):
        opened(llama)


class _Packing(nn.Module):
    """A linear layer of whole numbers that, as bitsandbytes' do on a CPU, loses precision when it evaluates."""

    def __init__(self, linear: nn.Linear, scale: float):
        super().__init__()
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            self.scale = self.scale.bfloat16().float()
        return x @ (self.weight * self.scale).T


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_quantized_weights_alone(llama, opened, training):
    mlp = llama.model.layers[0].mlp
    mlp.down_proj = _Packing(mlp.down_proj, 0.01003)
    llama.train(training)
    dropout = nn.Dropout(0.5).train(training)
    llama.model.layers[1].dropout = dropout
    before = weights(llama)
    assert opened(llama, "auto").name == "branch" and opened(llama, "expand").name == "expand"
    assert float(mlp.down_proj.scale) == pytest.approx(0.01003, abs=1e-9)
    assert furthest(before, weights(llama)) == 0 and all(m.training is training for m in llama.modules())
    with evaluating(llama):
        assert mlp.down_proj.training and not dropout.training and not mlp.training


def test_the_check_is_cheap(llama, opened):
    """Counted in tokens that the model runs. Two made-up documents of 41 and 31 tokens, four boundaries and four
    latents each; a branch is at most 36 + 3 + 4 + 2 + 10 = 55 tokens long. Plain forwards, undisturbed and disturbed:
    below 2 * 2 * (41 + 4 * (4 + 1) * 55) = 4,564. The engine and its draws: below half of that."""
    tokens = []
    llama.model.register_forward_pre_hook(lambda m, a, k: tokens.append(k["input_ids"].numel()), with_kwargs=True)
    opened(llama)
    assert sum(tokens) < 5000
