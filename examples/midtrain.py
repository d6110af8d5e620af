"""
Mid-trains a causal language model on Python code with RA3 (https://huggingface.co/papers/2509.25810).

One process, on a folder of your own code:

```
python examples/midtrain.py \
    --model_name_or_path Qwen/Qwen2.5-Coder-0.5B \
    --code_dir path/to/code \
    --output_dir Qwen2.5-Coder-0.5B-RA3
```

Several GPUs, a dataset of the Hub, an adapter instead of full fine-tuning:

```
accelerate launch examples/midtrain.py \
    --model_name_or_path Qwen/Qwen2.5-Coder-0.5B \
    --dataset_name ORG/NAME \
    --use_peft \
    --e_learning_rate 1e-4 --learning_rate 2e-4 \
    --output_dir Qwen2.5-Coder-0.5B-RA3 --push_to_hub
```

`ra3 train` does the same and more (dry run, resume, held-out documents of several kinds of data).
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from ra3_trl import RA3Config, RA3MidTrainer, load_code_directory


@dataclass
class Arguments(ScriptArguments):
    code_dir: str | None = field(default=None, metadata={"help": "Folder of .py files, instead of a dataset."})
    eval_documents: int = field(default=16, metadata={"help": "Documents to hold out."})


def main(script: Arguments, args: RA3Config, model: ModelConfig) -> None:
    if script.dataset_name:
        dataset = load_dataset(script.dataset_name, script.dataset_config, split=script.dataset_train_split)
    else:  # without a folder: the standard library of the running Python
        dataset = load_code_directory(script.code_dir)
    dataset = dataset.train_test_split(min(script.eval_documents, len(dataset) // 2), seed=args.seed)

    options = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
    }
    args.model_init_kwargs = {k: v for k, v in options.items() if v is not None}
    trainer = RA3MidTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision),
        peft_config=get_peft_config(model),
    )
    trainer.evaluate()  # before, for the model card
    trainer.train()
    print(trainer.evaluate())
    trainer.save_model()
    source = script.dataset_name or script.code_dir or "Python's standard library"
    trainer.create_model_card(dataset_name=source)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=source)


if __name__ == "__main__":
    main(*TrlParser((Arguments, RA3Config, ModelConfig)).parse_args_and_config())
