"""What tests/test_processes.py runs in two processes: one scenario after the other, each leaving a file.

`python -m accelerate.commands.launch --config_file examples/accelerate_configs/multi_process.yaml tests/worker.py
FOLDER`, where FOLDER holds `model` (a tiny checkpoint with its tokenizer). Without a launcher the same scenarios run
in one process, with twice the batch.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.experimental.hindsight import HindsightConfig, HindsightTrainer
from ra3_trl.generation import AutoModelForCausalLMWithAbstractionHead
from ra3_trl.versions import TRANSFORMERS


warnings.filterwarnings("ignore")
torch.set_num_threads(1)
TEXTS = [
    f"def f{i}(x):\n    y = x + {i}\n    if y > {i * 7}:\n        return y\n"
    "    for k in range(y):\n        y -= k\n    return y\n"
    for i in range(16)
]
# Of very different length; the short ones have no boundary at all (the tokenizer adds no BOS).
UNEVEN = [text * (3 if i % 4 == 0 else 1) if i % 2 == 0 else f"x = {i}\n" for i, text in enumerate(TEXTS)]


def stream(count: int, shards: int) -> IterableDataset:
    """`count` texts in `shards` shards, of which the first has all but one for each of the others."""

    def rows(starts: list[int]):
        for start in starts:
            for i in range(count - shards + 1) if start == 0 else [count - shards + start]:
                yield {"text": TEXTS[i]}

    return IterableDataset.from_generator(rows, gen_kwargs={"starts": list(range(shards))})


def make(folder: Path, data, name: str, batch: int = 4, model=None, peft_config=None, **settings) -> RA3MidTrainer:
    """A trainer with a global batch of `batch` documents a micro-batch."""
    defaults = {
        "output_dir": str(folder / f"{name}-{PartialState().num_processes}"), "max_length": 256, "e_steps": 2,
        "m_steps": 2, "num_latents": 2, "max_latent_length": 4, "optim": "sgd", "learning_rate": 0.05,
        "e_learning_rate": 0.05, "save_strategy": "no", "report_to": "none", "log_latents_steps": 0,
        "disable_tqdm": True, "use_cpu": True,
        "per_device_train_batch_size": batch // PartialState().num_processes,
    }  # fmt: skip
    model = model or AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    if isinstance(data, list):
        data = Dataset.from_dict({"text": data})
    torch.manual_seed(0)  # an adapter begins at random
    kinds = (HindsightTrainer, HindsightConfig) if "proposal" in settings else (RA3MidTrainer, RA3Config)
    return kinds[0](model, kinds[1](**defaults | settings), data, None, tokenizer, peft_config=peft_config)


def keep(trainer: RA3MidTrainer, folder: Path, name: str) -> None:
    """Writes weights, log and world size of this process."""
    state = PartialState()
    log = [{k: v for k, v in e.items() if not k.startswith(("seconds", "train_"))} for e in trainer.state.log_history]
    weights = {n: p.detach().clone() for n, p in trainer.policy.backbone.model.named_parameters()}
    found = {
        "weights": weights,
        "log": log,
        "world": trainer.args.world_size,
        "held": trainer.loop.state.gate_hold.gains,
    }
    found["head"] = trainer.loop.learner.head.state_dict()
    torch.save(found, folder / f"{name}-{state.num_processes}-{state.process_index}.pt")


def step_wrapper(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    """One SGD step of a wrapper on this process's share of four texts, all losses on; the loss."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = tokenizer(TEXTS[:4], return_tensors="pt", padding=True, padding_side="right")["input_ids"]
    ids = ids.tensor_split(PartialState().num_processes)[PartialState().process_index]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(input_ids=ids, labels=ids, think_labels=(ids % 2).float(), gain_labels=(ids % 5).float()).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    # 1. Two processes are one with twice the batch.
    trainer = make(folder, TEXTS, "same", reward_model="frozen")
    trainer.train()
    keep(trainer, folder, "same")
    # 2. Documents of different length and number of boundaries, small chunks, accumulation.
    trainer = make(folder, UNEVEN, "uneven", max_branch_tokens=64, gradient_accumulation_steps=2, m_steps=2)
    trainer.train()
    keep(trainer, folder, "uneven")
    # 3. An adapter scored by its base, activation checkpointing, the expand engine.
    adapter = {"reward_model": "base", "activation_checkpointing": True, "engine": "expand"}
    trainer = make(
        folder, TEXTS, "adapter", peft_config=LoraConfig(r=4, target_modules=["q_proj", "up_proj"]), **adapter
    )
    trainer.train()
    keep(trainer, folder, "adapter")
    # 4. Latents proposed in hindsight, learned from in both phases; some batches are without a boundary on a rank.
    proposals = {"proposal": "causal+template", "proposal_template": "{prefix}{suffix}{think}", "num_latents": 4}
    trainer = make(
        folder,
        UNEVEN,
        "hindsight",
        prior_alpha=0.5,
        gradient_accumulation_steps=2,
        max_boundaries=3,
        **proposals,
    )
    trainer.train()
    keep(trainer, folder, "hindsight")
    # 5. An evaluation set that does not divide evenly: no document counts twice.
    metrics = make(folder, TEXTS, "eval", per_device_eval_batch_size=2).evaluate(
        Dataset.from_dict({"text": TEXTS[:5]})
    )
    torch.save(metrics, folder / f"eval-{state.num_processes}-{state.process_index}.pt")
    # 6. A run that goes on.
    if state.num_processes == 2:
        trainer = make(
            folder,
            TEXTS,
            "left",
            optim="adamw_torch",
            e_learning_rate=1e-3,
            save_strategy="steps",
            save_steps=1,
            m_steps=3,
        )
        trainer.train()
        keep(trainer, folder, "left")
        for step in (1, 3) if TRANSFORMERS >= (5, 18) else ():
            trainer = make(folder, TEXTS, f"resumed{step}", optim="adamw_torch", e_learning_rate=1e-3, m_steps=3)
            trainer.train(resume_from_checkpoint=str(folder / "left-2" / f"checkpoint-{step}"))
            keep(trainer, folder, f"resumed{step}")
    # 7. Streams: a process that runs dry goes on with empty batches; no document twice.
    for workers in (0, 2):
        data = stream(11, 2)
        settings = {"dataloader_num_workers": workers, "m_steps": 3, "e_steps": 1, "max_steps": 4, "batch": 2}
        trainer = make(folder, data, f"stream{workers}", **settings)
        seen = [d.doc_id for batch in trainer.get_train_dataloader() for d in batch["documents"]]
        trainer.train()
        keep(trainer, folder, f"stream{workers}")
        torch.save(seen, folder / f"seen{workers}-{state.num_processes}-{state.process_index}.pt")
    # 8. The wrapper under DDP, in anyone's own loop.
    wrapper = AutoModelForCausalLMWithAbstractionHead.from_pretrained(str(folder / "model"))
    model = DistributedDataParallel(wrapper) if state.num_processes > 1 else wrapper
    step_wrapper(model, folder)
    torch.save(wrapper.state_dict(), folder / f"wrapper-{state.num_processes}-{state.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
