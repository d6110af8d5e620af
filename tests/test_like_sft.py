"""Situations of TRL's own tests of `SFTTrainer`, with `RA3MidTrainer` in its place: the same, or refused by the table.

`e_steps=0` is next-token prediction, so the same means: losses and weights after 20 updates at most 1e-5 apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import trl
from conftest import furthest, weights
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.models import disable_dropout
from ra3_trl.policy import policy
from ra3_trl.rollout import ExpandEngine
from ra3_trl.versions import CHECKPOINTING


TEXTS = [
    f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n    return {'y - ' * (i % 3)}x\n"
    for i in range(12)
]
CUTS = [text.index("\n") + 1 for text in TEXTS]
PAIRS = {"prompt": [t[:c] for t, c in zip(TEXTS, CUTS, strict=True)],
         "completion": [t[c:] for t, c in zip(TEXTS, CUTS, strict=True)]}  # fmt: skip
# Among them logits that are scaled or capped, a mixture of experts, and no attention. GPT-2 is left out: of its class
# transformers does not know that the loss shifts labels, and divides by one token too many a row.
ARCHITECTURES = ("llama", "qwen3", "gemma2", "cohere", "opt", "qwen3_moe", "mamba")
# What a dashboard made for `SFTTrainer` shows; before 1.16 its entropy was of all tokens, not of trained ones alone.
LOGGED = ["loss", "mean_token_accuracy", "num_tokens", "aux_loss", "learning_rate", "epoch"]
if Version(trl.__version__) >= Version("1.16"):
    LOGGED.append("entropy")


@pytest.fixture
def tokenizer(tokenizers) -> PreTrainedTokenizerFast:
    return copy.deepcopy(tokenizers["newline_indent"])


@pytest.fixture
def both(tmp_path, tokenizer, tiny_model) -> Callable[..., tuple[SFTTrainer, RA3MidTrainer]]:
    """`both(rows, architecture, ours={...}, **settings)`: both trainers on copies of one model, untrained. `ours` are
    settings of RA3's alone, `arguments` those of both constructors."""

    def both(rows: Any, architecture="llama", ours=None, arguments=None, dtype=torch.float32, **settings):
        shared = {
            "max_length": 256, "learning_rate": 1e-3, "per_device_train_batch_size": 3, "max_steps": 20,
            "lr_scheduler_type": "linear", "logging_steps": 1, "report_to": "none", "save_strategy": "no", "seed": 3,
            "adam_epsilon": 1e-5,  # by default a gradient that is rounding alone moves a weight too
            "use_cpu": True, "disable_tqdm": True, CHECKPOINTING: False, "bf16": False,
        } | settings  # fmt: skip
        data = Dataset.from_dict(rows) if isinstance(rows, dict) else rows
        kinds = ((SFTTrainer, SFTConfig, {}), (RA3MidTrainer, RA3Config, {"e_steps": 0} | (ours or {})))
        trainers = []
        for trainer, config, own in kinds:
            model = tiny_model(architecture, tokenizer).to(dtype)
            disable_dropout(model)  # both draw it in another order
            args = config(output_dir=str(tmp_path / trainer.__name__), **shared | own)
            of_each = {"train_dataset": data, "processing_class": tokenizer} | (arguments or {})
            trainers.append(trainer(model, args, **{name: copy.deepcopy(value) for name, value in of_each.items()}))
        return tuple(trainers)

    return both


def assert_same(trainers: tuple[SFTTrainer, RA3MidTrainer], updates: int = 20) -> None:
    """Trains both: equal losses and weights, and these did move."""
    sft, ours = trainers
    before = weights(sft.model)
    sft.train(), ours.train()
    lines = [[e for e in t.state.log_history if "loss" in e] for t in trainers]
    assert len(lines[0]) == len(lines[1]) == updates
    for name in [name for name in LOGGED if name in lines[0][0]]:
        assert max(abs(a[name] - b[name]) for a, b in zip(*lines, strict=True)) < 1e-5, name
    assert furthest(weights(sft.model), weights(ours.model)) < 1e-5
    assert furthest(before, weights(ours.model)) > 1e-3


# ---- data of every form, on every kind of model ----


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_texts(both, architecture, packing):
    # Mamba's packing is undone with a warning, since documents of a row would see each other.
    assert_same(both({"text": TEXTS}, architecture, ours={"packing": packing}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_and_completions(both, architecture):
    assert_same(both(PAIRS, architecture, ours={"packing": False}))


@pytest.mark.parametrize("wanted", [None, True, False])
def test_completion_only_loss(both, wanted):
    assert_same(both(PAIRS, ours={"packing": False}, completion_only_loss=wanted))


@pytest.mark.parametrize("rows", [{"text": TEXTS}, PAIRS], ids=["texts", "pairs"])
def test_streams(both, rows):
    assert_same(both(Dataset.from_dict(rows).to_iterable_dataset(), ours={"packing": False}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter(both, architecture):
    targets = ["in_proj", "x_proj"] if architecture == "mamba" else ["q_proj", "v_proj"]
    lora = LoraConfig(r=4, init_lora_weights=False, target_modules=targets, task_type="CAUSAL_LM")
    trainers = both({"text": TEXTS}, architecture, ours={"packing": False}, arguments={"peft_config": lora})
    trainers[1].model.load_state_dict(trainers[0].model.state_dict())  # each drew its own
    assert_same(trainers)


class InFloat64(SFTTrainer):
    """With the loss that TRL's kernel computes in float32 computed in the model's own type."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]
        logits = model(**inputs).logits[:, :-1]
        wanted = labels != -100
        total = torch.nn.functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum")
        return total / (wanted.sum() if num_items_in_batch is None else num_items_in_batch)


def test_what_the_default_epsilon_of_adam_magnifies_is_rounding(both, monkeypatch):
    """Adam divides by the root of a squared gradient plus 1e-8, so that of a gradient of that size the rounding counts
    as much as itself: weights differ by 2e-5 in float32. In float64 roundings are 1e-9 of that."""
    monkeypatch.setitem(globals(), "SFTTrainer", InFloat64)
    monkeypatch.setattr(policy, "build_engine", lambda name, *parts: ExpandEngine(*parts))  # which float64 has none of
    trainers = both({"text": TEXTS}, ours={"packing": False}, adam_epsilon=1e-8, dtype=torch.float64)
    for trainer in trainers:
        trainer.train()
    assert furthest(*(weights(trainer.model) for trainer in trainers)) < 1e-10


# ---- what is logged ----

HELD_OUT = [*TEXTS[:3], "# a comment\nx = 1\n", "y = 2\n", TEXTS[5]]


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_evaluations(both, architecture):
    """In three batches of rows of other lengths, padded in SFT: `eval_loss` with the router loss, means of batches."""
    arguments = {"eval_dataset": Dataset.from_dict({"text": HELD_OUT})}
    trainers = both({"text": TEXTS}, architecture, ours={"packing": False}, arguments=arguments, max_steps=2,
                    eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2)  # fmt: skip
    lines = []
    for trainer in trainers:
        trainer.train()
        lines.append([e for e in trainer.state.log_history if "eval_loss" in e])
    names = [f"eval_{name}" for name in LOGGED if f"eval_{name}" in lines[0][0]]
    assert len(lines[0]) == len(lines[1]) == 2
    assert ("eval_aux_loss" in names) is (architecture == "qwen3_moe" and "entropy" in LOGGED)
    for name in names:
        assert max(abs(a[name] - b[name]) for a, b in zip(*lines, strict=True)) < 2e-5, name
    again = trainers[1].evaluate()  # what is returned has them too, and no training is counted
    assert again["eval_num_tokens"] == lines[1][-1]["eval_num_tokens"] > 0


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="summed the router loss over micro-batches")
def test_accumulation_of_a_router_loss(both):
    """A mean over micro-batches, whatever their tokens; with so large a weight that a share by tokens would show."""
    shared = {"gradient_accumulation_steps": 2, "router_aux_loss_coef": 1.0, "max_steps": 4}
    assert_same(both({"text": TEXTS}, "qwen3_moe", ours={"packing": False}, **shared), updates=4)


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_lines_of_e_updates_say_what_is_defined(both, logging_steps):
    """Two E-updates, two M-updates: accuracy and entropy are of annotated text, `num_tokens` of all that was read."""
    ours = both({"text": TEXTS}, ours={"e_steps": 2, "m_steps": 2, "num_latents": 2, "max_latent_length": 3},
                max_steps=-1, logging_steps=logging_steps)[1]  # fmt: skip
    ours.train()
    lines = [e for e in ours.state.log_history if "phase" in e]
    of_e = 2 // logging_steps
    assert all(not {"mean_token_accuracy", "entropy", "loss"} & set(line) for line in lines[:of_e])
    assert all({"mean_token_accuracy", "entropy", "loss"} <= set(line) for line in lines[of_e:])
    counts = [line["num_tokens"] for line in lines]
    assert counts == sorted(set(counts)) and counts[-1] == ours.state.num_input_tokens_seen


def test_outputs_are_those_that_the_loss_is_made_of(both):
    """One forward gives both, and the loss has the gradient of a loss that is made of the logits."""
    ours = both({"text": TEXTS})[1]
    runs, documents = [], next(iter(ours.get_train_dataloader()))["documents"]
    inputs = ours.loop.next_token.inputs_of(documents)
    handle = ours.model.model.register_forward_hook(lambda *_: runs.append(1))
    loss, outputs = ours.compute_loss(ours.model, inputs, return_outputs=True)
    handle.remove()
    labels, logits = inputs["labels"][:, 1:], outputs.logits[:, :-1]
    by_hand = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    weight = ours.model.lm_head.weight
    gradients = [torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (loss, by_hand)]
    assert len(runs) == 1
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(*gradients)


# ---- settings ----


def test_the_loss_of_dynamic_fine_tuning(both):
    """The first loss by hand: each token's -log p counts p times."""
    trainers = both({"text": TEXTS}, loss_type="dft")
    assert_same(trainers)
    plain = both({"text": TEXTS})[1]
    plain.train()
    first = [t.state.log_history[0]["loss"] for t in (trainers[1], plain)]
    assert 0 < first[0] < first[1] / 2  # -p log p is at most 1 / e, and this model begins at about log 600


@pytest.mark.parametrize("stream", [False, True])
def test_shuffled_data(both, stream):
    data = Dataset.from_dict({"text": TEXTS})
    assert_same(both(data.to_iterable_dataset() if stream else data, shuffle_dataset=True))


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_tokens_by_name(both, tmp_path, tokenizer, name):
    token = tokenizer.convert_ids_to_tokens(tokenizer("x")["input_ids"][0])
    trainers = both({"text": TEXTS}, max_steps=5, **{name: token})
    assert_same(trainers, 5)
    sft, ours = trainers
    assert getattr(ours.processing_class, name) == getattr(sft.processing_class, name) == token
    assert ours.model.config.eos_token_id == sft.model.config.eos_token_id
    assert ours.model.generation_config.eos_token_id == sft.model.generation_config.eos_token_id
    with pytest.raises(ValueError, match=f"`{name}` is '<no>', which .* does not have"):
        RA3MidTrainer(ours.model, RA3Config(str(tmp_path), use_cpu=True, **{name: "<no>"}), processing_class=tokenizer)


def test_settings_of_sft_itself(both, tokenizer, tiny_model):
    """An `SFTConfig` says the same to both; an E-phase, which it can't name, has its defaults."""
    sft, _ = both({"text": TEXTS}, max_steps=25, gradient_accumulation_steps=2)
    again = RA3MidTrainer(
        tiny_model("llama", tokenizer), sft.args, Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer
    )
    for name in ("learning_rate", "max_steps", "seed", "packing", "bf16", "logging_steps", "output_dir"):
        assert getattr(again.args, name) == getattr(sft.args, name), name
    assert (again.schedule.e_steps, again.schedule.m_steps) == (20, 5)
