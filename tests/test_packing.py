"""Rows of several documents: exact on the model at hand, or not packed."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import furthest, weights
from datasets import Dataset
from slow_path import plain_forward
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from trl import SFTConfig, SFTTrainer

from ra3_trl.em import check_packing, mstep_loss, pack
from ra3_trl.records import AnnotatedExample, Document
from ra3_trl.rollout import Backbone
from ra3_trl.versions import CHECKPOINTING, TRANSFORMERS


OF_VERSION = ("falcon",)  # packs from transformers 5.24 on
LEAKS = ("opt", "lfm2", "bloom", "mamba", "gpt_oss", *(OF_VERSION if TRANSFORMERS < (5, 24) else ()))
LENGTHS = (23, 9, 30, 1, 14)
TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    return y * {i}\n" for i in range(4)] + ["pass\n", "x = 1\ny = 2\n"]


def examples(vocab: int, seed: int = 0) -> list[AnnotatedExample]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i, length in enumerate(LENGTHS):
        ids = tuple(torch.randint(5, vocab, (length,), generator=generator).tolist())
        found.append(AnnotatedExample(Document(i, 0, ids, (), 1), ids, (-100, *ids[1:]), (False,) * length))
    return found


def alone(model, docs) -> float:
    """Mean loss of every token from a forward of its document alone."""
    logps = [plain_forward(model, d.input_ids)[:-1].gather(1, torch.tensor(d.input_ids[1:])[:, None]) for d in docs]
    return -torch.cat(logps).mean().item()


def warned(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if "packing" in r.getMessage() and r.name.startswith("ra3_trl")]


# Architectures by what could go wrong: windows, soft-capping, learned positions with an offset and without, ALiBi, a
# convolution, a state, sinks, routers with their loss (one flat row) and without.
@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "mistral",
        "gemma2",
        "gpt2",
        "qwen3_moe",
        "mixtral",
        "deepseek_v3",
        "gpt_bigcode",
        "stablelm",
        *sorted({*OF_VERSION, *LEAKS}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_exact_or_not_packed(model_type, dtype, tiny_model, tokenizers, caplog):
    """Documents of 23, 9, 30, 1 and 14 tokens in rows of 40: 72 labels. In float32 a mean over 72 log-probs of size 10
    is off by 1e-6 at most where nothing leaks, and by 1e-4 and more where something does."""
    model = tiny_model(model_type, tokenizers["newline_indent"])
    backbone, docs = Backbone(model, 0.0 if model_type in ("mixtral", "gpt_oss") else None), examples(500)
    model.to(dtype)
    with caplog.at_level(logging.WARNING):
        check_packing(backbone, 40, packing=True)
    leaks = model_type in LEAKS
    assert backbone.packs is not leaks and len(warned(caplog)) == leaks
    if leaks:
        assert "`packing` is not exact on" in warned(caplog)[0] and "a row of its own" in warned(caplog)[0]
    model.float()
    expected = alone(model, docs)
    with torch.no_grad():
        loss = float(mstep_loss(backbone, pack(docs, 40, True), 72.0)[0])
        assert loss - _router(backbone) == pytest.approx(expected, abs=1e-5)
        backbone.packs = True  # and this is what the check prevents
        loss = float(mstep_loss(backbone, pack(docs, 40, True), 72.0)[0])
    assert (abs(loss - _router(backbone) - expected) > 1e-4) is leaks


def _router(backbone: Backbone) -> float:
    return 0.0 if backbone.router_loss is None else float(backbone.router_loss)


@pytest.mark.parametrize(("model_type", "std"), [("lfm2", 0.02), ("bloom", 0.02), ("gpt_oss", 0.02)])
def test_a_small_leak_is_seen_in_half_precision(model_type, std, tiny_model, tokenizers):
    """Weights as they are before training: LFM2's leak is 2e-4 of the states' size, below a rounding in bfloat16
    (2^-8 = 4e-3), which a comparison with the document alone can't tell from noise."""
    model = tiny_model(model_type, tokenizers["newline_indent"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(std / 0.3)
    backbone = Backbone(model.to(torch.bfloat16))
    check_packing(backbone, 100, packing=True)
    assert not backbone.packs


def test_what_matters_only_far_out_is_seen(tiny_model, tokenizers):
    """A model whose tokens see, besides their document, what stands exactly 60 tokens before in the row: rows of 40
    know nothing of it, rows of 200 do, and `max_length` says which there are."""
    model = tiny_model("llama", tokenizers["newline_indent"])

    def far(module, args, output):
        return (
            torch.cat([output[:, :60], output[:, 60:] + 0.01 * output[:, :-60]], 1) if output.shape[1] > 60 else output
        )

    handle = model.model.layers[0].mlp.register_forward_hook(far)
    backbone = Backbone(model)
    for length, packs in ((40, True), (200, False)):
        check_packing(backbone, length, packing=True)
        assert backbone.packs is packs
    handle.remove()


def test_positions_that_do_not_start_anew_are_seen(tiny_model, tokenizers):
    """Documents do not see each other here, but learned positions go on from one to the next."""
    model = tiny_model("gpt2", tokenizers["newline_indent"])

    def running(module, args):
        return (torch.arange(args[0].shape[-1])[None].expand_as(args[0]),)

    handle = model.transformer.wpe.register_forward_pre_hook(running)
    backbone = Backbone(model)
    check_packing(backbone, 100, packing=True)
    assert not backbone.packs
    handle.remove()
    check_packing(backbone, 100, packing=True)
    assert backbone.packs


def test_a_model_that_takes_no_positions_has_no_packed_rows(tiny_model, tokenizers, caplog):
    """Its forward raises a TypeError; the warning says so, and training goes on."""
    model = tiny_model("llama", tokenizers["newline_indent"])

    def refuse(module, args, kwargs):
        if kwargs.get("position_ids") is not None:
            raise TypeError("got an unexpected keyword argument 'position_ids'")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    backbone, docs = Backbone(model), examples(500)
    with caplog.at_level(logging.WARNING):
        check_packing(backbone, 40, packing=True)
    assert "a packed row fails (TypeError: got an unexpected keyword argument 'position_ids')" in warned(caplog)[0]
    assert mstep_loss(backbone, pack(docs, 40, True), 72.0)[0].item() == pytest.approx(alone(model, docs), abs=1e-5)


def test_who_does_not_pack_is_told_nothing(tiny_model, tokenizers, caplog):
    backbone = Backbone(tiny_model("mamba", tokenizers["newline_indent"]))
    with caplog.at_level(logging.WARNING):
        check_packing(backbone, 40, packing=False)
    assert not backbone.packs and not warned(caplog)
    routed = Backbone(tiny_model("gpt_oss", tokenizers["newline_indent"]))  # its router loss wants one flat row
    with caplog.at_level(logging.WARNING):
        check_packing(routed, 40, packing=False)
    assert routed.wants_flat_rows and not routed.packs and len(warned(caplog)) == 1


def test_the_check_leaves_the_model_alone_and_is_cheap(tiny_model, tokenizers):
    """Two forwards of two packed rows, two of documents alone, two of a batch with another row: at most eight rows of
    `max_length` tokens, a third of the forward of an update of eight documents with its backward pass."""
    model = tiny_model("llama", tokenizers["newline_indent"]).train()
    before, tokens = weights(model), []

    def count(module, args, kwargs):
        tokens.append(kwargs["input_ids"].numel())

    model.model.register_forward_pre_hook(count, with_kwargs=True)
    check_packing(Backbone(model), 200, packing=True)
    assert sum(tokens) <= 8 * 200
    assert furthest(before, weights(model)) == 0 and all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("model_type", ["opt", "gpt_oss", "lfm2", "llama"])
def test_the_trainer_is_sft_on_every_architecture(model_type, make_trainer, tokenizers, tiny_model, tmp_path, caplog):
    """`packing=True` with `e_steps=0` against `SFTTrainer` without packing: 4 updates, 1e-5. Not with Adam, which
    makes steps of the rounding of gradients that are 0, such as those of OPT's key biases."""
    tokenizer = tokenizers["newline_indent"]
    calm = {"dropout": 0.0} if model_type == "opt" else {}  # which `SFTTrainer` leaves on
    shared = {
        "max_length": 64, "learning_rate": 0.05, "optim": "sgd", "per_device_train_batch_size": 3, "max_steps": 4,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "seed": 3, "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip
    sft = SFTTrainer(
        tiny_model(model_type, tokenizer, **calm),
        SFTConfig(output_dir=str(tmp_path / "sft"), bf16=False, packing=False, **{CHECKPOINTING: False}, **shared),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    sft.train()
    with caplog.at_level(logging.WARNING):
        ours = make_trainer(
            TEXTS, model=tiny_model(model_type, tokenizer, **calm), e_steps=0, m_steps=-1, packing=True, **shared
        )
    assert len(warned(caplog)) == (model_type in LEAKS)
    ours.train()
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (sft, ours)]
    assert len(losses[0]) == 4 and max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    assert furthest(weights(sft.model), weights(ours.model)) < 1e-5


# ---- what attention reads ----


def test_flash_attention_gets_the_lengths(tiny_model, tokenizers):
    """A stand-in for the kernel, which knows lengths and nothing else: no mask, no positions. The same loss."""
    seen = []

    def by_length(module, q, k, v, mask, scaling=None, **kwargs):
        assert mask is None
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        if "cu_seq_lens_q" not in kwargs:  # a document alone
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2), None
        edges, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
        assert len(q) == 1 and edges.dtype == torch.int32 and isinstance(longest, int)
        assert torch.equal(edges, kwargs["cu_seq_lens_k"]) and longest == kwargs["max_length_k"]
        seen.append((edges.tolist(), longest))
        parts = [
            scaled_dot_product_attention(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True, scale=scaling)
            for a, b in zip(edges.tolist(), edges.tolist()[1:], strict=False)
        ]
        return torch.cat(parts, 2).transpose(1, 2), None

    AttentionInterface.register("flash_by_length", by_length)
    AttentionMaskInterface.register("flash_by_length", lambda *args, **kwargs: None)
    model = tiny_model("llama", tokenizers["newline_indent"])
    expected = alone(model, docs := examples(500))
    model.config._attn_implementation = "flash_by_length"
    backbone = Backbone(model)
    check_packing(backbone, 40, packing=True)
    assert backbone.packs
    seen.clear()
    rows = pack(docs, 40, True)
    assert mstep_loss(backbone, rows, 72.0)[0].item() == pytest.approx(expected, abs=1e-5)
    lengths = [b - a for a, b in zip(seen[0][0], seen[0][0][1:], strict=False)]
    assert sorted(lengths) == [9, 14, 23, 30]  # one token alone is no text
    assert seen[0][1] == max(LENGTHS) and len(seen) == 2  # layers


@torch.compiler.set_stance("force_eager")  # transformers compiles what makes the mask, which takes ten seconds
def test_flex_attention_gets_a_block_mask(tiny_model, tokenizers, monkeypatch):
    """transformers makes it of the position ids, with the window. A stand-in for the kernel, which must be compiled,
    reads the mask function off it, and nothing else."""
    masks = []

    def by_block_mask(module, q, k, v, mask, scaling=None, **kwargs):
        assert isinstance(mask, BlockMask)
        masks.append(mask)
        row, i = torch.arange(len(q))[:, None, None, None], torch.arange(q.shape[2])
        seen = mask.mask_mod(row, torch.tensor(0), i[:, None], i)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", by_block_mask)
    model = tiny_model("mistral", tokenizers["newline_indent"])
    expected = alone(model, docs := examples(500))
    model.config._attn_implementation = "flex_attention"
    backbone = Backbone(model)
    check_packing(backbone, 40, packing=True)
    assert backbone.packs
    masks.clear()
    with torch.no_grad():
        assert mstep_loss(backbone, pack(docs, 40, True), 72.0)[0].item() == pytest.approx(expected, abs=1e-5)
    assert len(masks) == 2  # layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex attention's backward has no CPU kernel in torch 2.13")
def test_flex_attention_has_the_same_gradients(tiny_model, tokenizers):
    docs, found = examples(500), []
    for attention in ("sdpa", "flex_attention"):
        model = tiny_model("mistral", tokenizers["newline_indent"]).cuda()
        model.set_attn_implementation(attention)
        mstep_loss(Backbone(model), pack(docs, 40, True), 72.0)[0].backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert furthest(*found) < 1e-4
