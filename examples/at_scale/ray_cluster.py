"""Annotates a corpus with datatrove on Ray: python examples/at_scale/ray_cluster.py CHECKPOINT CORPUS OUTPUT

Without --address Ray starts on this machine. Paths must be the same on all nodes.
"""

from __future__ import annotations

import ray
from datatrove.executor.ray import RayPipelineExecutor
from pipeline import parser, pipeline


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--address", help="of a running cluster, such as auto")
    options.add_argument("--gpus_per_task", type=int, default=0)
    options = options.parse_args()
    ray.init(address=options.address)
    RayPipelineExecutor(
        pipeline(options),
        tasks=options.tasks,
        workers=options.workers,
        gpus_per_task=options.gpus_per_task,
        logging_dir=f"{options.output}/logs",
    ).run()
