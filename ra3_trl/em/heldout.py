"""Held-out numbers of a trainer: those of the policy, and the loss that `SFTTrainer` has on the same batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any

import torch
from accelerate.utils import gather_object

from ..models import cast_to
from ..policy import evaluate_documents, finish_metrics
from ..records import Document
from .loop import EMLoop
from .monitor import MetricSums


def evaluate_batches(
    loop: EMLoop,
    batches: Iterable[dict[str, list[Document]]],
    loss_of: Callable[[dict[str, Any]], torch.Tensor],
    done: Callable[[], None],
    trains: bool,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, float], int]:
    """Evaluates the documents of all processes.

    Args:
        loop ([`EMLoop`]):
            Of the policy that is evaluated.
        batches (`Iterable[dict[str, list[Document]]]`):
            Of this process, under the name `"documents"`.
        loss_of (`Callable[[dict[str, Any]], torch.Tensor]`):
            Next-token loss of model inputs with labels.
        done (`Callable[[], None]`):
            Called behind each batch.
        progress (`Callable[[int], None]`, *optional*):
            Called with the number of documents that were evaluated since the last call.
        trains (`bool`):
            Whether training goes on behind it. If not, `bf16_full_eval` and `fp16_full_eval` hold, as in `Trainer`,
            and the weights are what they were afterwards.

    Returns:
        Metrics of [`~ra3_trl.policy.finish_metrics`], with `loss` and what `SFTTrainer` logs beside it, and how many
        documents they are of. `loss` is averaged as in `Trainer`, over tokens within a batch and over batches by their
        documents: it counts each end of text and the expert's own comments, which are no code. The others are means
        over batches, those of all processes that are evaluated at once together.
    """
    totals, seen = {"loss": 0.0, "rows": 0.0}, list[list[dict[str, float]]]()

    def documents() -> Iterator[Document]:
        for batch in batches:
            of_batch = batch["documents"]
            inputs = loop.next_token.inputs_of(of_batch)
            if (inputs["labels"][:, 1:] != -100).any():
                totals["loss"] += float(loss_of(inputs)) * len(of_batch)
                totals["rows"] += len(of_batch)
            seen.append([parts for parts, _ in loop.next_token.read()])
            yield from of_batch
            done()

    args = loop.args
    low = torch.bfloat16 if args.bf16_full_eval else torch.float16 if args.fp16_full_eval else None
    with cast_to(loop.policy.model, None if trains else low), loop.policy.inference():
        sums = evaluate_documents(loop.policy, documents(), progress)
    together: Counter[str] = Counter()
    for of_process in gather_object([sums | totals]):
        together.update(of_process)
    loss = {"loss": together["loss"] / together["rows"]} if together["rows"] else {}
    return loss | _of_tokens(gather_object([seen])) | finish_metrics(dict(together)), int(together["documents"])


def _of_tokens(seen: list[list[list[dict[str, float]]]]) -> dict[str, float]:
    """Means over batches of what the forwards of each process saw in each batch."""
    metrics = MetricSums()
    for of_batch in zip_longest(*seen, fillvalue=[]):
        forwards = [parts for of_process in of_batch for parts in of_process]
        tokens = sum(parts["code_count"] + parts["latent_count"] for parts in forwards)
        if tokens:
            metrics.add("mean_token_accuracy", sum(parts["correct_sum"] for parts in forwards) / tokens)
            metrics.add("entropy", sum(parts["entropy_sum"] for parts in forwards) / tokens)
        router = [parts["aux_loss"] for parts in forwards if "aux_loss" in parts]
        if router:
            metrics.add("aux_loss", sum(router) / len(router))
    return metrics.averages()
