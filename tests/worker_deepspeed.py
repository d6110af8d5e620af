"""What a slow test of tests/test_processes.py runs in two processes with DeepSpeed's ZeRO on the CPU.

`DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 tests/worker_deepspeed.py FOLDER STAGE`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from worker import TEXTS, UNEVEN, make


warnings.filterwarnings("ignore")


def main(folder: Path, stage: int) -> None:
    PartialState(cpu=True)
    config = {
        "zero_optimization": {
            "stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True
        },
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    uneven = {"max_branch_tokens": 64, "gradient_accumulation_steps": 2}
    for name, data, settings in (("same", TEXTS, {"reward_model": "frozen"}), ("uneven", UNEVEN, uneven)):
        trainer = make(folder, data, f"zero{stage}_{name}", deepspeed=config, **settings)
        trainer.train()
        assert trainer.accelerator.distributed_type == DistributedType.DEEPSPEED and dist.get_world_size() == 2
        trainer.save_model(str(folder / f"zero{stage}_{name}"))
    settings = {"deepspeed": config, "optim": "adamw_torch", "m_steps": 3, "reward_model": "frozen"}
    trainer = make(folder, TEXTS, f"zero{stage}_left", save_strategy="steps", save_steps=1, **settings)
    trainer.train()
    trainer.save_model(str(folder / f"zero{stage}_left"))
    for step in (1, 3):
        trainer = make(folder, TEXTS, f"zero{stage}_resumed{step}", **settings)
        trainer.train(resume_from_checkpoint=str(folder / f"zero{stage}_left-2" / f"checkpoint-{step}"))
        trainer.save_model(str(folder / f"zero{stage}_resumed{step}"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
