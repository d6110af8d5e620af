"""What tests/test_processes.py runs in two processes with a model that FSDP2 shards (native `fully_shard`, gloo).

Transformers shards at load time (`DistributedConfig`), since accelerate refuses FSDP2 on CPU. Launched as worker.py,
whose scenarios are run first.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import worker
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from worker import TEXTS, UNEVEN, make, step_wrapper

from ra3_trl.generation import AutoModelForCausalLMWithAbstractionHead


warnings.filterwarnings("ignore")


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    for name, data, settings in (
        ("sharded", TEXTS, {"reward_model": "frozen"}),
        ("sharded_uneven", UNEVEN, {"max_branch_tokens": 64, "gradient_accumulation_steps": 2}),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            folder / "model", attn_implementation="eager", distributed_config=DistributedConfig(fsdp_size=2)
        )
        assert isinstance(model, FSDPModule) and isinstance(model.lm_head.weight, DTensor)
        trainer = make(folder, data, name, model=model, **settings)
        trainer.train()
        assert isinstance(model.lm_head.weight, DTensor)
        trainer.save_model(str(folder / name))
        found = {"world": trainer.args.world_size, "held": trainer.loop.state.gate_hold.gains}
        torch.save(found, folder / f"{name}-{state.process_index}.pt")
    wrapper = AutoModelForCausalLMWithAbstractionHead.from_pretrained(str(folder / "model"))
    for layer in wrapper.model.layers:
        fully_shard(layer)
    fully_shard(wrapper)
    assert isinstance(wrapper.abstraction_head.outer.weight, DTensor)
    step_wrapper(wrapper, folder)
    whole = {name: value.full_tensor() for name, value in wrapper.state_dict().items()}
    torch.save(whole, folder / f"wrapper-fsdp-{state.process_index}.pt")


if __name__ == "__main__":
    worker.main(Path(sys.argv[1]))
    main(Path(sys.argv[1]))
