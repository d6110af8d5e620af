"""The pipeline of the three scripts beside it: jsonl in, short texts out, latents in, Parquet out."""

from __future__ import annotations

import argparse

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import RegexFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import ParquetWriter

from ra3_trl.integrations.datatrove import SCHEMA, RA3Annotator


SHORT = r"\A(?:[^\n]*\n){0,3}[^\n]*\Z"  # fewer than four lines: left out


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of all scripts."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("checkpoint", help="folder or Hub id of a checkpoint of `ra3 train`")
    options.add_argument("corpus", help="folder of .jsonl files with a column `text`; more files than tasks")
    options.add_argument("output", help="folder that the Parquet files and, in logs/, the finished tasks go to")
    options.add_argument("--tasks", type=int, default=8, help="parts of the work; a finished one is not done again")
    options.add_argument("--workers", type=int, default=2, help="parts at the same time")
    options.add_argument("--num_latents", type=int, default=4, help="candidates at each boundary")
    return options


def pipeline(options: argparse.Namespace) -> list[PipelineStep]:
    """Steps from the corpus to the annotated one."""
    return [
        JsonlReader(options.corpus),
        RegexFilter(SHORT),
        RA3Annotator(options.checkpoint, num_latents=options.num_latents, skip_broken_documents=True),
        ParquetWriter(options.output, expand_metadata=True, schema=SCHEMA),
    ]
