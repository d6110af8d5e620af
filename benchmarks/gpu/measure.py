"""`python -m benchmarks.gpu.measure MODEL OUT SEED DOCUMENTS CODE_DIR SETTINGS`: held-out numbers of a checkpoint.

The same as `trainer.evaluate()`, and the sums of each document, for intervals over documents. The documents are those
that `ra3 train` holds out with this seed; noise and documents are the same for all arms.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import groupby

from ra3_trl import Policy
from ra3_trl.cli.data import hold_out, load_splits
from ra3_trl.files import write_whole
from ra3_trl.policy import evaluate_documents, finish_metrics
from ra3_trl.segmentation import row_to_document, segment_dataset


LATENTS = 4


def main(model: str, out: str, seed: str, documents: str, code_dir: str, settings: str) -> None:
    held_out = hold_out(load_splits(None, code_dir or None, "train")["train"], int(documents), None, int(seed))[1]
    settings_of_run = json.loads(settings)
    settings_of_run["eval_max_boundaries"] = settings_of_run.pop("max_boundaries", 0)
    policy = Policy.open(model, seed=int(seed), eval_num_latents=LATENTS, **settings_of_run)
    sums = []
    rows = segment_dataset(held_out, policy.segmenter, policy.args.dataset_text_field)
    with policy.inference():
        for _, of_document in groupby(map(row_to_document, rows), key=lambda chunk: chunk.doc_id):
            sums.append(evaluate_documents(policy, of_document))
    total: Counter[str] = Counter()
    for row in sums:
        total.update(row)
    found = {f"eval_{name}": value for name, value in finish_metrics(total).items()} | {"sums": sums}
    write_whole(out, f"{json.dumps(found, indent=1)}\n".encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
