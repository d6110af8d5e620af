"""A model whose own comments start almost always wrong, and a measure of what becomes of its P(think).

Programs are stanzas of three lines, `x=7`, `pass`, `assert x==7`. The corpus the model is pre-trained on, from
scratch and in seconds, is careless: before 40 % of the assertions stands a comment such as `#7` (before 2 % of the
other lines too), right in `RIGHT` of the cases only; the assertion after a comment states the comment's value, one
without a comment states any digit. So the model believes comments and guesses without them. The expert's corpus has
true values and no comments: a right comment brings about log 10 = 2.3 nats, a wrong one costs more than that.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ra3_trl import RA3MidTrainer
from ra3_trl.losses import compute_returns
from ra3_trl.rollout import NoiseKey
from ra3_trl.segmentation import row_to_document


RIGHT, AGREE = 0.1, 0.8
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
PIECES = ("\n", "#", "x=", "pass", "assert x==", *"0123456789")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of `PIECES`; BOS in front, as Llama has it."""
    vocab = {piece: i for i, piece in enumerate((BOS, EOS, PAD, *PIECES))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"assert x==|x=|pass|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD)


def program(rng: random.Random, stanzas: int, think: float = 0.0, right: float = 1.0, agree: float = 1.0) -> str:
    """One program, with comments before a share `think` of the assertions (none: the expert's), of which a share
    `right` states the value, and a share `agree` is followed by an assertion that agrees with it."""
    lines = []
    for _ in range(stanzas):
        value = rng.randrange(10)
        for line in (f"x={value}", "pass"):
            if think and rng.random() < 0.02:
                lines.append(f"#{rng.randrange(10)}")
            lines.append(line)
        if rng.random() < think:
            comment = value if rng.random() < right else (value + rng.randrange(1, 10)) % 10
            lines.append(f"#{comment}")
            value = comment if rng.random() < agree else rng.randrange(10)
        elif think:
            value = rng.randrange(10)
        lines.append(f"assert x=={value}")
    return "\n".join(lines) + "\n"


def expert(seed: int, count: int, stanzas: int = 8) -> Dataset:
    """The expert's programs, all assertions true."""
    rng = random.Random(seed)
    return Dataset.from_list([{"text": program(rng, stanzas)} for _ in range(count)])


def pretrain(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 300) -> LlamaForCausalLM:
    """A Llama of two layers, pre-trained on careless programs."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    rng = random.Random(seed)
    for step in range(steps):
        corpus = (0.8, 1.0, 1.0) if step < steps // 2 else (0.4, RIGHT, AGREE)
        texts = [program(rng, 8, *corpus) + EOS for _ in range(8)]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Probe:
    """Averages over held-out programs: P(think) before assertions and before other lines, gain (nats) of a comment
    before an assertion, share of them that state the value."""

    hard: float
    easy: float
    gain: float
    right: float

    def __str__(self) -> str:
        return f"hard {self.hard:.3f} easy {self.easy:.3f} gain {self.gain:+.2f} right {self.right:.2f}"


@torch.no_grad()
def probe(trainer: RA3MidTrainer) -> Probe:
    """Measures the model on the trainer's held-out programs, always with the same noise."""
    hard, easy, gain, right = [], [], [], []
    tokenizer = trainer.processing_class
    for row in trainer.eval_dataset:
        document = row_to_document(row)
        texts = [tokenizer.decode(document.input_ids[a.start : a.end]) for a in document.actions]
        sites = [i for i in document.sites if texts[i].startswith("assert")]
        gates = trainer.engine.trunk(document).gate_logps_A.exp()
        hard += gates[sites].tolist()
        easy += [float(gates[i]) for i in document.sites if i not in sites]
        group = trainer.engine.rollout(document, sites, 4, 1, NoiseKey(seed=7, phase=0, step=0))
        gain += compute_returns(group, 1, 1.0).gain_TG.flatten().tolist()
        for site, row in zip(sites, group.latents, strict=True):
            value = texts[site].strip()[-1]
            right += [tokenizer.decode(z.token_ids).strip() == value for z in row]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return Probe(mean(hard), mean(easy), mean(gain), mean(right))
