"""
Trains a checkpoint, mid-trained with RA3 or not, on MBPP's training split: programs run in a sandbox, and one that
passes its tests is rewarded (RLVR).

```
python examples/rlvr_grpo.py \
    --model_name_or_path Qwen2.5-Coder-0.5B-RA3 \
    --output_dir Qwen2.5-Coder-0.5B-RA3-RLVR
```

Several GPUs, an adapter, a latent at every boundary:

```
accelerate launch examples/rlvr_grpo.py \
    --model_name_or_path Qwen2.5-Coder-0.5B-RA3 \
    --think always --think_cost 0.01 \
    --use_peft --learning_rate 1e-5 \
    --output_dir Qwen2.5-Coder-0.5B-RA3-RLVR
```

`ra3 rlvr` does the same and more (other tasks and rewards, checks before the model loads, resume).
"""

from dataclasses import dataclass, field
from typing import Literal

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from ra3_trl.evaluation import stop_strings
from ra3_trl.rlvr import CompletionRollout, code_execution_reward, get_think_cost_reward, until_stop


@dataclass
class Arguments(ScriptArguments):
    data_file: str | None = field(
        default=None,
        metadata={"help": "jsonl file with MBPP's columns; of its ids 601 to 974."},
    )
    think: Literal["auto", "always", "never"] = field(default="auto", metadata={"help": "Where latents stand."})
    think_cost: float = field(default=0.0, metadata={"help": "What a latent costs."})


def with_prompt(row: dict) -> dict:
    """The beginning of a program: a docstring with the description and a test."""
    return {"prompt": f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n'}


def main(script: Arguments, args: GRPOConfig, model: ModelConfig) -> None:
    if script.data_file:
        dataset = load_dataset("json", data_files=script.data_file, split="train")
        if "task_id" in dataset.column_names:  # MBPP's file has all its splits
            dataset = dataset.filter(lambda row: 601 <= row["task_id"] <= 974)
    else:
        dataset = load_dataset("google-research-datasets/mbpp", "full", split="train")

    args.model_init_kwargs = {"revision": model.model_revision, "dtype": model.dtype}
    trainer = GRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=[until_stop(code_execution_reward), until_stop(get_think_cost_reward(script.think_cost))],
        args=args,
        train_dataset=dataset.map(with_prompt),
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision),
        peft_config=get_peft_config(model),
        rollout_func=CompletionRollout(
            stop=stop_strings("mbpp", "complete"), think=None if script.think == "auto" else script.think
        ),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset_name="google-research-datasets/mbpp")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name="google-research-datasets/mbpp")


if __name__ == "__main__":
    main(*TrlParser((Arguments, GRPOConfig, ModelConfig)).parse_args_and_config())
