"""Annotates a corpus with datatrove on Slurm:

    python examples/at_scale/slurm.py CHECKPOINT CORPUS OUTPUT --partition gpu

Submits an array job with a task on a GPU each; run again, it submits those tasks that are not finished.
"""

from __future__ import annotations

from datatrove.executor import SlurmPipelineExecutor
from pipeline import parser, pipeline


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--partition", required=True)
    options.add_argument("--time", default="20:00:00", help="limit of a task")
    options.add_argument("--gpus_per_task", type=int, default=1)
    options.add_argument("--env_command", help="shell command that makes Python and ra3-trl available on a node")
    options = options.parse_args()
    SlurmPipelineExecutor(
        pipeline(options),
        tasks=options.tasks,
        workers=options.workers,
        time=options.time,
        partition=options.partition,
        gpus_per_task=options.gpus_per_task,
        env_command=options.env_command,
        job_name="ra3-annotate",
        mem_per_cpu_gb=16,
        logging_dir=f"{options.output}/logs",
    ).run()
