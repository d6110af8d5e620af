"""The M-step against TRL's `SFTTrainer` on the same packed rows."""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from ra3_trl.em.mstep import pack
from ra3_trl.records import Document, Latent
from ra3_trl.segmentation import splice

from .common import SHARED, Clock, chunks_of, load, make_ra3, say, scratch, timed


def pick_documents(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace, annotated: bool) -> list[Document]:
    """`row_documents` chunks for each update that together fill a row of `row_tokens`, or nearly.

    Annotated ones hold a comment at every boundary: to the M-step of a document that is annotated already these are
    tokens as any.
    """
    count = args.row_documents * (args.mstep_updates + 1)
    tokens = args.row_tokens // args.row_documents
    if not annotated:
        chunks = chunks_of(tokenizer, args.module, tokens)
        return [chunks[i % len(chunks)] for i in range(count)]
    latent = Latent(tuple(tokenizer(" the next step", add_special_tokens=False)["input_ids"]), True)
    for share in (0.8, 0.7, 0.6, 0.5, 0.4):  # the largest chunks that leave room for the comments
        plain = chunks_of(tokenizer, args.module, int(share * tokens))
        chunks = [splice(c, dict.fromkeys(c.boundaries, latent)).document for c in plain]
        chunks = [c for c in chunks if len(c.input_ids) <= tokens]
        if len(chunks) >= len(plain) / 4:
            return [chunks[i % len(chunks)] for i in range(count)]
    raise ValueError(f"`--row_tokens` {args.row_tokens}: too short for {args.row_documents} documents; raise it.")


def sft_rows(documents: list[Document], args: argparse.Namespace) -> Dataset:
    """The rows that the M-step packs, as `SFTTrainer` has them after its own packing."""
    rows = []
    for i in range(0, len(documents), args.row_documents):
        examples = [splice(d, {}) for d in documents[i : i + args.row_documents]]
        packed = pack(examples, args.row_tokens, packing=True)
        if len(packed.input_ids) != 1:
            raise ValueError(f"`--row_tokens` {args.row_tokens}: {args.row_documents} documents take more than a row.")
        starts = [*(packed.position_ids[0] == 0).nonzero()[:, 0].tolist(), packed.input_ids.shape[1]]
        rows.append(
            {
                "input_ids": packed.input_ids[0].tolist(),
                "labels": packed.labels[0].tolist(),
                "seq_lengths": [b - a for a, b in zip(starts, starts[1:], strict=False)],
            }
        )
    return Dataset.from_list(rows)


def make_sft(folder: str, output_dir: Path, rows: Dataset, args: argparse.Namespace) -> SFTTrainer:
    model, tokenizer = load(folder)
    config = SFTConfig(
        output_dir=str(output_dir), per_device_train_batch_size=1, max_steps=len(rows), seed=args.seed, packing=True,
        max_length=args.row_tokens, dataset_kwargs={"skip_prepare_dataset": True}, **SHARED,
    )  # fmt: skip
    return SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)


def _losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def measure_mstep(folder: str, args: argparse.Namespace, annotated: bool = False) -> dict:
    """Both trainers run the same updates in turns; of each the best update but for the first of a run counts.

    The first round is a warm-up: where other trainers ran before, its first side was a tenth too fast (LOG.md).
    """
    gc.collect()
    tokenizer = load(folder)[1]
    documents = pick_documents(tokenizer, args, annotated)
    rows = sft_rows(documents, args)
    with scratch() as out:
        ours = make_ra3(
            folder, out / "ra3", documents, max_length=args.row_tokens, e_steps=0, m_steps=len(rows), seed=args.seed,
            per_device_train_batch_size=args.row_documents,
        )  # fmt: skip
        theirs = make_sft(folder, out / "sft", rows, args)
        clocks: dict[Trainer, Clock] = {trainer: timed(trainer, args.clock) for trainer in (theirs, ours)}
        times: dict[Trainer, list[list[float]]] = {theirs: [], ours: []}
        difference = 0.0
        for turn in range(args.repeats + 1):
            for trainer in (theirs, ours) if turn % 2 == 0 else (ours, theirs):
                trainer.train()
                if turn:
                    times[trainer].append(clocks[trainer].seconds[1:])
            if turn == 0:
                losses = zip(_losses(theirs), _losses(ours), strict=True)
                difference = max(abs(a - b) for a, b in losses)
            seconds = {
                name: [round(s, 2) for s in clocks[t].seconds[1:]] for name, t in (("SFT", theirs), ("RA3", ours))
            }
            say(f"M-step round {turn}: {seconds}")
    # Rows differ in length by a little, so an update is compared with itself.
    best = {t: [min(column) for column in zip(*runs, strict=True)] for t, runs in times.items()}
    tokens = sum(len(row) for row in rows["input_ids"][1:])
    name = "_annotated" if annotated else ""
    return {
        f"mstep_vs_sft{name}": round(sum(best[theirs]) / sum(best[ours]), 3),
        f"mstep{name}_tokens_per_s": round(tokens / sum(best[ours]), 1),
        f"sft{name}_tokens_per_s": round(tokens / sum(best[theirs]), 1),
        f"mstep{name}_loss_diff": float(f"{difference:.1e}"),
        f"mstep{name}_updates": len(best[ours]),
        f"mstep{name}_tokens": tokens,
    }
