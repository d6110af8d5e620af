"""Memory: activation checkpointing, the bound on branches in flight, modes that are restored whatever is raised."""

from __future__ import annotations

import pytest
import torch
from conftest import furthest, weights

from ra3_trl import RA3MidTrainer
from ra3_trl.versions import CHECKPOINTING, enable_checkpointing


TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return x\n" for i in range(8)]


@pytest.fixture
def make(make_trainer, tiny_model, tokenizers):
    """`make(texts, e_steps=2, ...)`: a trainer with plain SGD, which shows the gradients."""

    def make(texts=TEXTS, architecture: str = "llama", **settings) -> RA3MidTrainer:
        model = tiny_model(architecture, tokenizers["newline_indent"])
        rates = {"optim": "sgd", "learning_rate": 0.05, "e_learning_rate": 0.05}
        return make_trainer(texts, model=model, **rates | settings)

    return make


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("engine", ["branch", "expand"])
def test_activation_checkpointing_changes_nothing_but_memory(make, engine, architecture):
    """Layers run again in the backward pass, and must attend to branches there as they did at first (with plain
    attention in the second pass gradients would be of another model)."""
    kept, plain = {}, {}
    for checkpointing in (False, True):
        trainer = make(architecture=architecture, engine=engine, activation_checkpointing=checkpointing)
        layers = trainer.policy.backbone.decoder.layers
        calls = []
        layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        trainer.train()
        (kept if checkpointing else plain).update(weights(trainer.model) | {"calls": torch.tensor(float(sum(calls)))})
    # Each of the 2 E- and 2 M-updates runs layer 0 with gradients once (the 2 documents of an E-update go together),
    # and with checkpointing once more: 4 against 8.
    assert plain.pop("calls") == 4 and kept.pop("calls") == 8
    assert furthest(plain, kept) < 1e-6


def test_no_forward_is_longer_than_document_and_bound(make):
    """500 boundaries with 16 latents each: 8,000 branches. Stated bound: no forward has more tokens than the document
    (here with the think tokens that its gates need) and `max_branch_tokens` branch tokens."""
    text = "x\n" * 501
    trainer = make([text], max_length=2048, num_latents=16, max_branch_tokens=2048, e_steps=1, m_steps=0,
                   max_latent_length=3, per_device_train_batch_size=1)  # fmt: skip
    (row,) = trainer.train_dataset
    assert sum(1 for think in row["think"] if think) == 500
    longest: dict[bool, int] = {False: 0, True: 0}

    def watch(module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        longest[torch.is_grad_enabled()] = max(longest[torch.is_grad_enabled()], ids.numel())

    trainer.policy.backbone.decoder.register_forward_pre_hook(watch, with_kwargs=True)
    before = weights(trainer.model)
    trainer.train()
    assert furthest(before, weights(trainer.model)) > 0
    document = len(row["input_ids"])
    assert 2048 // 2 < longest[True] - document <= 2048
    # Without gradients the document is cached, so that branches run without it; but the log-probs under the weights at
    # the start (for the KL) come from packed forwards as those of the update do.
    assert longest[False] - document <= 2048


@pytest.mark.parametrize("where", ["sample", "score"])
def test_model_is_as_before_when_a_rollout_raises(make, monkeypatch, where):
    """Mode, attention and checkpointing are restored, and the run can go on."""
    from ra3_trl.rollout import branch

    trainer = make(activation_checkpointing=True)
    enable_checkpointing(trainer.model)
    trainer.model.train()
    attention = trainer.model.config._attn_implementation

    def fail(*args, **kwargs):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(branch._Flight, where, fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            trainer.train()
    assert trainer.model.training and getattr(trainer.model, f"is_{CHECKPOINTING}")
    assert trainer.model.config._attn_implementation == attention
    trainer.train()
    assert trainer.state.global_step == 4
