"""A small world where everything about thinking can be measured: programs, a tiny model, and how it behaves on them.

`ra3 demo` shows RA3 here; `python -m benchmarks replication` measures it.
"""

from .behaviour import Behaviour, complete, gates, observe, think_probs
from .corpus import Corpus, Example, examples, make_tokenizer, programs
from .model import fresh_model, pretraining


__all__ = [
    "Behaviour",
    "Corpus",
    "Example",
    "complete",
    "examples",
    "fresh_model",
    "gates",
    "make_tokenizer",
    "observe",
    "pretraining",
    "programs",
    "think_probs",
]
