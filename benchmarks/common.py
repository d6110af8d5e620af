"""What the parts of `phases` share: documents, trainers with equal settings, and the times of their updates."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.records import Document
from ra3_trl.segmentation import PYTHON, Segmenter, document_to_row, standard_library
from ra3_trl.versions import CHECKPOINTING


# The same on all sides. TRL's own configs would switch on bfloat16 and gradient checkpointing.
SHARED = {
    "use_cpu": True, "bf16": False, CHECKPOINTING: False, "report_to": "none", "save_strategy": "no",
    "disable_tqdm": True, "logging_steps": 1, "lr_scheduler_type": "constant", "learning_rate": 1e-5,
    "train_sampling_strategy": "sequential", "dataloader_pin_memory": False,
}  # fmt: skip
LONG_PHASE = 1000  # so long that the probe of the code's loss, ten times a phase, stands at none of the timed updates
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_OPENING = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n"


@contextmanager
def no_warnings() -> Iterator[None]:
    """Keeps the trainer's warnings, which a benchmark provokes on purpose, from the screen."""
    logger = logging.getLogger("ra3_trl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def default_model() -> str:
    from ra3_trl.cli.smollm2 import smollm2

    with redirect_stdout(sys.stderr):  # it tells of the conversion, and the other one is for the JSON
        return str(smollm2())


def load(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A copy of the model of one's own, since TRL's trainers patch its forward, and the tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def chunks_of(tokenizer: PreTrainedTokenizerBase, module: str, tokens: int, fullness: float = 0.8) -> list[Document]:
    """Chunks of a file of the standard library of nearly `tokens` tokens with boundaries.

    Raises:
        `ValueError`: if the file is too short.
    """
    text = (standard_library() / module).read_text("utf-8")
    chunks = Segmenter(tokenizer, PYTHON, tokens, "strip")(1, text)
    full = [c for c in chunks if len(c.input_ids) >= fullness * tokens and c.boundaries]
    if not full:
        raise ValueError(f"`--module` {module!r} has no chunk of about {tokens} tokens; pass a longer file.")
    return full


def median_chunk(tokenizer: PreTrainedTokenizerBase, module: str, tokens: int) -> Document:
    """Of the nearly full chunks the one with the median number of boundaries."""
    full = sorted(chunks_of(tokenizer, module, tokens, 0.9), key=lambda c: len(c.boundaries))
    return full[(len(full) - 1) // 2]


def opening(tokenizer: PreTrainedTokenizerBase) -> Document:
    """A few lines for the warm-up update."""
    return Segmenter(tokenizer, PYTHON, 512)(0, _OPENING)[0]


class Clock(TrainerCallback):
    """Seconds of each update, from the end of the one before (or the save after it) to its own end.

    So an update holds all that a user waits for: data, rollout or generation, gradients, optimizer step, log.
    `optimizer` are the parts from the last gradient on, `ends` the moments at which updates ended.

    Args:
        clock (`str`):
            `"wall"` or `"cpu"`.
        last (`int`, *optional*):
            Stops the run after this update.
    """

    def __init__(self, clock: str, last: int | None = None):
        self.now = CLOCKS[clock]
        self.last = last
        self.seconds: list[float] = []
        self.optimizer: list[float] = []
        self.ends: list[float] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.seconds, self.optimizer, self.ends = [], [], []
        self._mark = self.now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._gradients = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        now = self.now()
        self.seconds.append(now - self._mark)
        self.optimizer.append(now - self._gradients)
        self.ends.append(now)
        self._mark = now
        if self.last is not None and state.global_step >= self.last:
            control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self._mark = self.now()


def timed(trainer: Trainer, clock: str, last: int | None = None) -> Clock:
    """Gives the trainer a [`Clock`] and takes away what prints."""
    clock = Clock(clock, last)
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    return clock


def make_ra3(folder: str, output_dir: Path | str, documents: Sequence[Document], **settings) -> RA3MidTrainer:
    """A trainer on the given documents, in order; `max_length` is that of a row, or of the longest document with the
    room for its latents."""
    model, tokenizer = load(folder)
    longest = max(len(d.input_ids) for d in documents)
    latent = settings.get("max_latent_length", 12)
    settings.setdefault("max_length", max(-(-longest * 5 // 4) + 1, longest + latent + 8))
    settings = {**SHARED, "engine": "branch", "log_latents_steps": 0, "code_loss_tolerance": 1e9, **settings}
    config = RA3Config(output_dir=str(output_dir), **settings)
    trainer = RA3MidTrainer(model, config, Dataset.from_dict({"text": [_OPENING]}), None, tokenizer)
    # Chunks of a long file as they are: cut and tokenized anew as texts of their own they would be others.
    trainer.train_dataset = Dataset.from_list([document_to_row(d) for d in documents], trainer.train_dataset.features)
    return trainer


@contextmanager
def scratch():
    """A folder that is gone afterwards."""
    with TemporaryDirectory(prefix="ra3-benchmark-") as folder:
        yield Path(folder)
