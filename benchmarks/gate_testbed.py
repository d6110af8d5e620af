"""A model whose own comments start almost always wrong, and a measure of what becomes of its P(think).

Programs are stanzas of three lines, `x=7`, `pass`, `assert x==7`. The model is pre-trained from scratch, in seconds,
on programs whose assertions state any digit, so that it guesses them: log 10 = 2.3 nats. Comments such as `#7` stand
before some assertions, and the assertion mostly agrees with the comment. First the comments are right, so that the
model learns to write and to read them; then they are careless: before 40 % of the assertions (and 2 % of the other
lines), right in 10 % of the cases, with 80 % + 20 % / 10 = 82 % of the assertions in agreement.

The expert's programs have true values and no comments. There a right comment brings log(0.82 / 0.1) = +2.1 nats, a
wrong one log(0.02 / 0.1) = -1.6 nats, and a comment that is right in 10 % of the cases -1.2 nats on average: a gate
that follows the mean gain learns never to think. Comments pay their cost of 0.2 nats from (1.6 + 0.2) / (2.1 + 1.6) =
49 % right on.
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


CAREFUL, CARELESS = (0.8, 1.0, 1.0), (0.4, 0.1, 0.8)  # arguments of `program`
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


def pretrain(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 200) -> LlamaForCausalLM:
    """A Llama of two layers and 83,392 parameters, pre-trained on careful, then on careless programs."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    # Tied and large at the start: copying a digit from the comment is then learned in a few dozen steps.
    init = {"tie_word_embeddings": True, "initializer_range": 0.2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**shape, **special, **init))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    rng = random.Random(seed)
    for step in range(steps):
        corpus = CAREFUL if step < steps // 2 else CARELESS
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
        boundaries = [i for i in document.boundaries if texts[i].startswith("assert")]
        gates = trainer.policy.engine.trunk(document).gate_logps_A.exp()
        hard += gates[boundaries].tolist()
        easy += [float(gates[i]) for i in document.boundaries if i not in boundaries]
        group = trainer.policy.engine.rollout(document, boundaries, 4, 1, NoiseKey(seed=7, phase=0, step=0))
        gain += compute_returns(group, 1, 1.0).gain_TG.flatten().tolist()
        for boundary, row in zip(boundaries, group.latents, strict=True):
            value = texts[boundary].strip()[-1]
            right += [tokenizer.decode(z.token_ids).strip() == value for z in row]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return Probe(mean(hard), mean(easy), mean(gain), mean(right))
