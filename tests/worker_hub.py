"""What tests/test_hub.py has the real clients do, in a process whose Hub is tests/hub_server.py.

Each line of its standard input is a call, `["push", ["name"], {}]`; it answers with `{"value": ...}` or `{"error":
[classes, message]}` on its standard output. What the libraries print there goes to standard error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback

import torch
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard, HfApi
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ra3_trl import RA3Config, RA3MidTrainer
from ra3_trl.cli import main as cli
from ra3_trl.generation import AutoModelForCausalLMWithAbstractionHead
from ra3_trl.hub import DatasetPush


torch.set_num_threads(1)
logging.set_verbosity_debug()  # the log is searched for tokens
TEXTS = [f"def f{i}(x):\n    y = x + {i}\n    if y > {i}:\n        return y\n    return x\n" for i in range(8)]
made: dict[str, RA3MidTrainer | AutoModelForCausalLMWithAbstractionHead] = {}


def digest(model: nn.Module) -> str:
    """Changes with any bit of the weights."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def environ(**values: str | None) -> None:
    """Sets variables, or unsets them."""
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def trainer(name: str, model: str, lora: bool = False, **settings) -> None:
    """Makes a trainer."""
    defaults = {
        "max_length": 128, "e_steps": 1, "m_steps": 1, "num_latents": 2, "max_latent_length": 4, "learning_rate": 1e-3,
        "e_learning_rate": 1e-3, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none",
        "log_latents_steps": 0, "disable_tqdm": True, "use_cpu": True, "max_boundaries": 2,
    }  # fmt: skip
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False) if lora else None
    data = Dataset.from_dict({"text": TEXTS})
    made[name] = RA3MidTrainer(model, RA3Config(**defaults | settings), data, peft_config=config)


def train(name: str, **options) -> dict:
    """Trains a trainer."""
    made[name].train(**options)
    return state(name)


def save(name: str) -> None:
    """Saves a trainer's model, which may push it."""
    made[name].save_model()


def state(name: str) -> dict:
    """Digests of model and head, what the head learned from, some logits, and a setting."""
    one = made[name]
    if isinstance(one, RA3MidTrainer):
        model, head, settings = one.model, one.loop.learner.head, one.args
    else:
        model, head, settings = one.pretrained_model, one.abstraction_head, one.ra3_config
    return {
        "weights": digest(model), "head": digest(head), "trained_on": head.config.trained_on,
        "logits": logits(model), "latents": settings and settings.num_latents,
    }  # fmt: skip


@torch.no_grad()
def logits(model: nn.Module) -> list[float]:
    return model.eval()(input_ids=torch.arange(8)[None]).logits[0, -1, :8].tolist()


def push(name: str, **options) -> dict:
    """`push_to_hub` of a trainer or a wrapper."""
    info = made[name].push_to_hub(**options)
    return state(name) | {"repo": info.repo_url.repo_id, "commit": info.oid, "pull": info.pr_num}


def load(repo: str, **options) -> dict:
    """The plain model; the tokenizer must load too."""
    AutoTokenizer.from_pretrained(repo, **options)
    model = AutoModelForCausalLM.from_pretrained(repo, **options)
    return {"weights": digest(model), "logits": logits(model)}


def wrapper(name: str, source: str, trained_on: int | None = None, **options) -> dict:
    """The model with its head, to which a number of documents may be ascribed."""
    made[name] = AutoModelForCausalLMWithAbstractionHead.from_pretrained(source, **options)
    if trained_on is not None:
        torch.manual_seed(trained_on)
        nn.init.normal_(made[name].abstraction_head.outer.weight)
        made[name].abstraction_head.trained_on(trained_on)
    return state(name)


def ra3(argv: list[str]) -> int:
    """The command line."""
    return cli.main(argv)


def push_rows(repo: str, rows: list[dict], **options) -> str:
    """As the annotated corpus is pushed."""
    push = DatasetPush(repo, **options)
    return push.upload(push.check(Dataset.from_list(rows)), DatasetCard("---\nlicense: mit\n---\nRows.\n")).oid


def push_corpus(name: str, **options) -> str:
    """What a trainer was trained on, annotated."""
    return made[name].push_annotated_dataset(**options).oid


def push_plain_rows(repo: str, rows: list[dict]) -> str:
    """As `datasets` pushes."""
    return Dataset.from_list(rows).push_to_hub(repo).oid


def load_rows(repo: str, **options) -> list[dict]:
    return load_dataset(repo, split="train", **options).to_list()


def api(method: str, **options) -> str:
    """Any method of `HfApi`."""
    return str(getattr(HfApi(), method)(**options))


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    known = (environ, trainer, train, save, state, push, load, wrapper, ra3, api)
    calls = {call.__name__: call for call in (*known, push_rows, push_corpus, push_plain_rows, load_rows)}
    for line in sys.stdin:
        name, args, options = json.loads(line)
        try:
            answer = {"value": calls[name](*args, **options)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": [[kind.__name__ for kind in type(error).__mro__], str(error)]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
