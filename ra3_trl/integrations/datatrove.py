"""A step of a [datatrove](https://github.com/huggingface/datatrove) pipeline that splices latents into documents.

`pip install ra3-trl[datatrove]`. Documents come from datatrove's readers and filters and go to its writers; its
executors run the pipeline on a laptop, a Slurm cluster or Ray, see `examples/at_scale`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from datasets import Features, Value
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from ..hub import ANNOTATION, RowAnnotator
from ..policy import Policy


# Columns for `ParquetWriter(..., expand_metadata=True, schema=SCHEMA)`, which would else guess the type of `latents`
# by the first document. Of other metadata add a field each: `SCHEMA.append(pyarrow.field(...))`.
SCHEMA = Features({"text": Value("string"), "id": Value("string")} | ANNOTATION).arrow_schema.remove_metadata()


class RA3Annotator(PipelineStep):
    """
    Annotates each document: its text stays, its `metadata` gets `annotated_text`, `latents` and `num_boundaries` as
    the columns of `ra3 annotate` have them. What comes of a document does not depend on task, worker or executor.

    Example:

    ```python
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import ParquetWriter
    from ra3_trl.integrations.datatrove import SCHEMA, RA3Annotator

    writer = ParquetWriter("annotated", expand_metadata=True, schema=SCHEMA)
    steps = [JsonlReader("corpus"), RA3Annotator("qwen-ra3"), writer]
    LocalPipelineExecutor(steps, tasks=8, workers=2, logging_dir="logs").run()
    ```

    Args:
        checkpoint (`str`):
            Folder or Hub id of a causal language model. It is opened where the step runs, once in a process.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Arguments of `from_pretrained`: `revision`, `dtype` (float32 by default), ...
        skip_broken_documents (`bool`, *optional*, defaults to `False`):
            Drop documents that can't be annotated, counted as `broken`, instead of ending the task.
        **settings:
            Fields of [`~ra3_trl.RA3Config`] to set otherwise than in training.
    """

    name = "RA3"
    type = "ANNOTATOR"

    def __init__(
        self,
        checkpoint: str,
        model_init_kwargs: dict[str, Any] | None = None,
        skip_broken_documents: bool = False,
        **settings: Any,
    ):
        super().__init__()
        self.checkpoint = str(checkpoint)
        self.model_init_kwargs = model_init_kwargs or {}
        self.skip_broken_documents = skip_broken_documents
        self.settings = settings

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Annotates the documents of a task.

        Raises:
            `ValueError`: for one that can't be annotated, by its id.
        """
        annotator = _annotator(
            self.checkpoint, tuple(sorted(self.model_init_kwargs.items())), tuple(sorted(self.settings.items()))
        )
        for document in data:
            with self.track_time():
                done = self._annotate(annotator, document)
            if done:
                yield document

    def _annotate(self, annotator: RowAnnotator, document: Document) -> bool:
        try:
            example = annotator.read({annotator.policy.args.dataset_text_field: document.text})
            with annotator.policy.inference():
                row = annotator(example)
        except ValueError as error:
            if self.skip_broken_documents:
                self.stat_update("broken")
                return False
            raise ValueError(f"document {document.id!r} can't be annotated: {error}") from error
        document.metadata |= row.columns()
        self.update_doc_stats(document)
        for label, count in (
            ("latents", len(row.latents)),
            ("boundaries", row.num_boundaries),
            ("tokens", row.tokens),
        ):
            self.stat_update(label, value=count)
        return True


@lru_cache(maxsize=1)
def _annotator(
    checkpoint: str, model_init_kwargs: tuple[tuple[str, Any], ...], settings: tuple[tuple[str, Any], ...]
) -> RowAnnotator:
    """Opens a checkpoint; the tasks of a process follow one another and share it."""
    use_cpu = {"use_cpu": not torch.accelerator.is_available()}
    policy = Policy.open(checkpoint, model_init_kwargs=dict(model_init_kwargs), **use_cpu | dict(settings))
    return RowAnnotator(policy)
