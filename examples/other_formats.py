"""
RA3 on text other than Python: `python examples/other_formats.py` (seconds, on one core, offline).

The three presets of `action_format` on a random model with a tokenizer trained here, so what it writes means nothing;
what to look at is where latents stand and how they look. The paper tried Python only.

- `"slashes"`: comments before the lines of C, C++, C#, Go, Java, JavaScript, Kotlin, Rust, Swift, TypeScript;
- `"prose"`: asides in brackets between sentences;
- `"tags"`: `<think>...</think>` before lines of any text, two special tokens that the trainer adds to the tokenizer
  and the model and saves with both (`"python_tags"`: before Python's logical lines).
"""

import logging
import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ra3_trl import RA3Config, RA3MidTrainer


TEXTS = {
    "slashes": "int largest(int *a, int n) {\n    int best = a[0];\n    for (int i = 1; i < n; i++) {\n"
    "        if (a[i] > best)\n            best = a[i];\n    }\n"
    '    log("http://x",\n        best);\n    return best;\n}\n',
    "prose": "Dr. Lee rose early, i.e. at 5.30. It had rained. The road was wet!\n\nShe walked. Why hurry?\n",
    "tags": "Q: What is 12 * 12?\nA: 144\n\nQ: And 13 * 13?\nA: 169\n",
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, 400 tokens, learnt from the texts above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS.values(), " think reason"], learner)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def tiny_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocab_size, bos_token_id=None, eos_token_id=0, pad_token_id=None, **sizes)
    )


def main() -> None:
    logging.disable(logging.WARNING)  # of a random model there is much to warn
    disable_progress_bars()
    for name, text in TEXTS.items():
        tokenizer = tiny_tokenizer()
        with tempfile.TemporaryDirectory() as output:
            args = RA3Config(
                output_dir=output, action_format=name, e_steps=2, m_steps=2, max_length=256, max_latent_length=6,
                per_device_train_batch_size=2, report_to="none", disable_tqdm=True, log_latents_steps=0,
                save_strategy="no", logging_strategy="no", use_cpu=True,
                prior_alpha=0.1, penalty=0.0,  # or a random model, which hardly thinks, would place none
            )  # fmt: skip
            trainer = RA3MidTrainer(
                tiny_model(len(tokenizer)), args, Dataset.from_dict({"text": [text] * 4}), processing_class=tokenizer
            )
            trainer.train()
        (document,) = trainer.policy.segment(text)
        example = trainer.policy.annotate(document)
        print(
            f"\n--- {name}: {len(document.boundaries)} boundaries, {len(example.placed)} latents\n"
            + trainer.policy.text(example)
        )


if __name__ == "__main__":
    main()
