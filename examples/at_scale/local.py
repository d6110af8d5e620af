"""Annotates a corpus with datatrove on one machine: python examples/at_scale/local.py CHECKPOINT CORPUS OUTPUT"""

from __future__ import annotations

from datatrove.executor import LocalPipelineExecutor
from pipeline import parser, pipeline


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    LocalPipelineExecutor(
        pipeline(options), tasks=options.tasks, workers=options.workers, logging_dir=f"{options.output}/logs"
    ).run()
