"""Every architecture by itself: which engine it gets, that its numbers and gradients are those of plain forwards, and
what half precision costs. Those of `conftest.ARCHITECTURES` are in test_rollout.py; the check that chooses is here."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import _SETTINGS, ARCHITECTURES
from slow_path import plain_forward
from test_rollout import (
    CODE,
    KEY,
    assert_gradients_agree,
    assert_group_is_exact,
    assert_latents_are_exact,
    gradients,
    random_weights,
    slow_objective,
)

from ra3_trl.models import context_length, disable_dropout
from ra3_trl.rollout import Backbone, SamplingParams, build_engine
from ra3_trl.rollout import attention as attention_module
from ra3_trl.segmentation import build_token_table
from ra3_trl.versions import TRANSFORMERS


EXPAND = {  # and what the warning must say
    "falcon": "does not follow transformers' attention interface",
    "bloom": "does not follow transformers' attention interface",
    "gpt_oss": "s_aux",  # attention sinks
    "lfm2": "only 1 of 2 layers are plain attention",  # a convolution
    "mamba": "only 0 of 2 layers are plain attention",
    "stablelm": "ra3_branch",  # drops the extra argument on its way
}
if TRANSFORMERS < (5, 24):
    EXPAND["codegen"] = "does not follow transformers' attention interface"
BRANCH = tuple(name for name in _SETTINGS if name not in EXPAND and name != "rwkv")  # test_engine_check.py
WINDOWED = ("mistral", "mixtral", "ministral", "phi3", "olmo3", "gemma2", "gemma3_text", "cohere2", "exaone4")


@pytest.fixture(scope="module")
def document(tokenizers, segmenter):
    (document,) = segmenter(tokenizers["newline_indent"])(5, CODE)
    return document


@pytest.fixture
def engine_for(tokenizers):
    def make(model, name="auto", max_length=3):
        backbone = Backbone(model)
        table = build_token_table(tokenizers["newline_indent"], backbone.vocab_size)
        return build_engine(name, backbone, table, SamplingParams(max_length))

    return make


def assert_exact(engine, model, document, slow) -> None:
    """Boundaries 2 to 4 of 6, two latents each: scores, sampled log-probs, gradients of a weighted objective."""
    group = engine.rollout(document, document.boundaries[2:5], 2, 2, KEY)
    assert_group_is_exact(group, slow, horizon=2)
    assert_latents_are_exact(group, slow)
    weight_T, weight_n = random_weights(group)
    wanted = gradients(model, slow_objective(slow, group, weight_T, weight_n))
    logps = engine.log_probs(group, slice(0, 3))
    loss = (logps.gate_T * weight_T).sum() + (logps.token_n * weight_n).sum()
    assert_gradients_agree(gradients(model, loss), wanted)


@pytest.mark.parametrize("model_type", BRANCH)
def test_branch_architectures(model_type, tiny_model, tokenizers, document, slow_path, engine_for, caplog):
    """`auto` takes the branch engine without a word. 1e-4 nats a number, 1e-4 of the largest gradient; float32."""
    model = tiny_model(model_type, tokenizers["newline_indent"])
    config = model.config
    if model_type in WINDOWED:  # else nothing of the window is tested: 54 tokens against 12
        assert config.sliding_window == 12 and len(document.input_ids) > 4 * config.sliding_window
        assert model_type in ("mistral", "mixtral", "phi3") or "sliding_attention" in config.layer_types
    with caplog.at_level(logging.WARNING):
        engine = engine_for(model)
    assert engine.name == "branch" and not caplog.records
    if model_type not in ARCHITECTURES:  # the others' numbers: test_rollout.py
        assert_exact(engine, model, document, slow_path(model, tokenizers["newline_indent"], max_length=3))


@pytest.mark.parametrize("model_type", EXPAND)
def test_expand_architectures(model_type, tiny_model, tokenizers, document, slow_path, engine_for, caplog):
    model = tiny_model(model_type, tokenizers["newline_indent"])
    with caplog.at_level(logging.WARNING, "ra3_trl"):
        engine = engine_for(model)
    (record,) = [r for r in caplog.records if r.name.startswith("ra3_trl")]
    assert engine.name == "expand" and EXPAND[model_type] in record.getMessage()
    assert_exact(engine, model, document, slow_path(model, tokenizers["newline_indent"], max_length=3))
    with pytest.raises(ValueError, match="'branch', which is not exact"):
        engine_for(model, "branch")


# ---- half precision ----

# A number in bfloat16 is off by up to 2^-9 of itself, in float16 by 2^-12. A tiny model's logits are up to 7, so one
# rounding of a logit is up to 7 * 2^-9 = 0.014 (float16: 0.0017); some ten roundings on the way (two layers of norm,
# attention, feed-forward and residual) add up as sqrt(10) times that: 0.043 (0.0054). A line averages that over its
# tokens. Measured on 8 architectures, 180 symbols each: lines 0.033 (0.0043) a token, symbols 0.053 (0.0053).
TOLERANCE = {"bfloat16": 0.1, "float16": 0.0125, "autocast": 0.1}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_half_precision_within_its_tolerance(model_type, precision, tiny_model, tokenizers, document, engine_for):
    """Engine against plain forward in the same precision, and log-probs as sampled against those of the update."""
    model = tiny_model(model_type, tokenizers["newline_indent"])
    if precision != "autocast":
        model.to(getattr(torch, precision))
    engine = engine_for(model, max_length=4)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        group = engine.rollout(document, document.boundaries, 4, 2, KEY)
        logps = engine.log_probs(group, slice(0, len(document.boundaries)))
        rows = plain_forward(model, document.input_ids).detach()
    tolerance = TOLERANCE[precision]
    for action, found in zip(document.actions, group.line_logps_A.tolist(), strict=True):
        span = range(max(action.start, 1), action.end)
        wanted = sum(float(rows[p - 1, document.input_ids[p]]) for p in span)
        assert abs(found - wanted) < tolerance * len(span)
    sampled = torch.tensor([logp for row in group.latents for z in row for logp in z.logps])
    torch.testing.assert_close(logps.token_n.detach().float(), sampled, atol=tolerance, rtol=0)
    boundaries = list(group.boundaries)
    torch.testing.assert_close(logps.gate_T.detach().float(), group.gate_logps_A[boundaries], atol=tolerance, rtol=0)
    assert logps.token_n.requires_grad and not torch.equal(rows, plain_forward(model.float(), document.input_ids))


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "cohere2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_window_that_is_ignored_is_noticed(model_type, dtype, tiny_model, tokenizers, engine_for):
    """Ignoring it changes numbers by 0.8 nats (cohere2's flat logits) to 12, in bfloat16 as in float32."""
    right = attention_module._branch_attention

    def without_window(*args, sliding_window=None, **kwargs):
        return right(*args, **kwargs)

    model = tiny_model(model_type, tokenizers["newline_indent"]).to(dtype)
    register = attention_module.AttentionInterface.register
    register(attention_module.NAME, without_window)
    try:
        assert engine_for(model).name == "expand"
    finally:
        register(attention_module.NAME, right)
    assert engine_for(model).name == "branch"


@pytest.mark.parametrize(("model_type", "seed", "scale"), [("llama", 0, 10.0), ("qwen2", 1, 1.0)])
def test_a_right_engine_is_not_refused_for_rounding(model_type, seed, scale, tiny_model, tokenizers, engine_for):
    """bfloat16: a line of 5 tokens is off by 0.5 nats where logits reach 7 and by 2.3 where they reach 70."""
    model = tiny_model(model_type, tokenizers["newline_indent"], seed, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    assert engine_for(model.to(torch.bfloat16), max_length=4).name == "branch"


# ---- dropout and contexts, which each architecture keeps in its own way ----


@pytest.mark.parametrize(
    ("model_type", "rates"),
    [
        ("llama", {"attention_dropout": 0.3}),
        ("gpt2", {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3}),
        ("opt", {"dropout": 0.3, "attention_dropout": 0.3, "layerdrop": 0.5}),
        ("bloom", {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    ],
)
def test_disable_dropout_finds_every_rate(model_type, rates, tiny_model, tokenizers):
    """OPT and Bloom keep the rate as a number and call `nn.functional.dropout`."""
    tokenizer = tokenizers["newline_indent"]
    model, ids = tiny_model(model_type, tokenizer, **rates).train(), torch.arange(20)[None] + 5
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        once = model(ids).logits
        assert torch.equal(once, model(ids).logits) and torch.equal(once, model.eval()(ids).logits)


def test_context_length(tiny_model, tokenizers):
    tokenizer = tokenizers["newline_indent"]
    assert context_length(tiny_model("gpt2", tokenizer, n_positions=40)) == 40
    assert context_length(tiny_model("bloom", tokenizer)) is None
    rope = {"rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_type": "longrope"}
    rope["original_max_position_embeddings"] = 64
    phi = tiny_model("phi3", tokenizer, sliding_window=None, rope_parameters=rope, original_max_position_embeddings=64)
    assert phi.config.max_position_embeddings == 2048 and context_length(phi) == 64
    ids = torch.arange(80)[None] + 5
    with torch.no_grad():  # why: behind the original context the past itself changes
        assert not torch.allclose(phi(ids).logits[0, :10], phi(ids[:, :60]).logits[0, :10], atol=1e-2)
