"""`python -m benchmarks.gpu.measure MODEL OUT SEED DOCUMENTS CODE_DIR SETTINGS`: held-out numbers of a checkpoint.

The same as `trainer.evaluate()`, and the sums of each document, for intervals over documents. The documents are those
that `ra3 train` holds out with this seed; noise and documents are the same for all arms.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.cli.data import hold_out, load_splits
from ra3_trl.em import evaluate_documents, finish_metrics
from ra3_trl.segmentation import row_to_document


LATENTS = 4


def main(model: str, out: str, seed: str, documents: str, code_dir: str, settings: str) -> None:
    held_out = hold_out(load_splits(None, code_dir or None, "train")["train"], int(documents), None, int(seed))[1]
    known = json.loads(settings)
    known["eval_max_boundaries"] = known.pop("max_boundaries", 0)
    with TemporaryDirectory() as folder:
        args = RA3Config(
            output_dir=folder, seed=int(seed), eval_num_latents=LATENTS, report_to="none", disable_tqdm=True,
            abstraction_head=False, **known,
        )  # fmt: skip
        trainer = RA3MidTrainer(model, args, eval_dataset=held_out)
        chunks = [row_to_document(row) for row in trainer.eval_dataset]
        trainer.model.eval()
        sums = []
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for _, of_document in groupby(chunks, key=lambda chunk: chunk.doc_id):
                sums.append(evaluate_documents(trainer.policy.engine, of_document, args))
    total: Counter[str] = Counter()
    for row in sums:
        total.update(row)
    found = {f"eval_{name}": value for name, value in finish_metrics(total).items()} | {"sums": sums}
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
