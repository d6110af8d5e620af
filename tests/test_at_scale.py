"""Phases as separate jobs, the scripts of examples/at_scale, and datatrove's pipelines."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import furthest, weights
from datasets import Dataset, load_dataset
from test_annotated_dataset import CODE
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from ra3_trl.cli.main import main as ra3


ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "examples" / "at_scale"
TEXTS = [CODE.replace("{i}", str(i)) for i in range(4)]
CORPUS = Dataset.from_dict({"text": TEXTS})
needs_datatrove = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("datatrove", "orjson")),
    reason="datatrove is missing: pip install 'ra3-trl[datatrove]'",
)
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is missing: pip install ray")
SGD = {"optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant", "abstraction_head": False}


def tokens(model: str, tmp_path: Path) -> str:
    """The corpus annotated by `ra3 annotate --tokens` with the settings of the checkpoint; gives the folder."""
    CORPUS.to_json(tmp_path / "rows.jsonl")
    output = str(tmp_path / "tokens")
    argv = ["annotate", model, "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", output, "--tokens"]
    assert ra3([*argv, "--shard_rows", "3"]) == 0
    return output


def shards(folder: str):
    return load_dataset("parquet", data_dir=folder, split="train", streaming=True)


# ---- EM as separate jobs ----


def test_an_m_phase_offline(make_trainer, tiny_model, tokenizers, tmp_path):
    """One update of a trainer that annotates as it goes, and the same of shards by `e_steps=0` and by SFTTrainer. A
    stream's noise is keyed by content, as the command's; it is that of update 0."""
    sampled = {"annotation": "resample", "prior_alpha": 0.5, "max_length": 128}
    common = SGD | {"e_steps": 0, "m_steps": 1, "per_device_train_batch_size": 4}
    inside = make_trainer(CORPUS.to_iterable_dataset(), **common | sampled)
    start = weights(inside.model)
    inside.save_model(tmp_path / "start")
    inside.train()
    folder = tokens(str(tmp_path / "start"), tmp_path)
    rows = list(shards(folder))
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    plain = [len(tokenizers["newline_indent"](text).input_ids) for text in TEXTS]
    assert sum(len(row["input_ids"]) for row in rows) > sum(plain) + 8  # some latents, besides an EOS each
    offline = make_trainer(shards(folder), **common)
    offline.train()
    assert (
        furthest(weights(inside.model), weights(offline.model)) < 1e-5 < 1e-3 < furthest(start, weights(inside.model))
    )
    args = SFTConfig(
        str(tmp_path / "sft"), max_steps=1, per_device_train_batch_size=4, optim="sgd", learning_rate=0.05, bf16=False,
        lr_scheduler_type="constant", report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        activation_checkpointing=False,
    )  # fmt: skip
    tokenizer = tokenizers["newline_indent"]
    data = load_dataset("parquet", data_dir=folder, split="train")
    sft = SFTTrainer(tiny_model("llama", tokenizer), args, train_dataset=data, processing_class=tokenizer)
    sft.train()
    assert furthest(weights(inside.model), weights(sft.model)) < 1e-5


def test_an_iteration_offline(make_trainer, tmp_path):
    """E-phase, annotation and M-phase as three jobs end where one trainer ends. With one likeliest latent at almost
    every boundary no draw matters, and SGD carries no moments over."""
    certain = {"num_latents": 2, "top_k": 1, "prior_alpha": 1e-12, "max_length": 128, "kl_coef": 0.0}
    settings = SGD | certain | {"e_learning_rate": 0.01, "e_steps": 2}
    whole = make_trainer(CORPUS.to_iterable_dataset(), m_steps=2, **settings)
    whole.train()
    first = make_trainer(CORPUS.to_iterable_dataset(), m_steps=0, **settings)
    first.train()
    first.save_model(tmp_path / "e-1")
    folder = tokens(str(tmp_path / "e-1"), tmp_path)
    assert json.loads(Path(folder, "manifest.json").read_text())["latents"] > 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "e-1", attn_implementation="eager")
    offline = make_trainer(shards(folder), model=model, m_steps=2, **SGD | {"e_steps": 0})
    offline.train()
    assert furthest(weights(whole.model), weights(offline.model)) < 1e-5
    assert furthest(weights(first.model), weights(offline.model)) > 1e-3


def test_the_recipe_runs_stages_once(tmp_path):
    """`make` on em.mk, with a command that only notes what it is given in the place of Python."""
    noted = tmp_path / "noted"
    noted.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/log\nfor word; do case "$last" in --output*) mkdir -p "$word";; esac; '
        'last="$word"; done\n[ ! -e "$0-stop" ] || ! echo "$@" | grep -q data-2\n'
    )
    noted.chmod(0o755)
    command = ["make", "-f", str(SCRIPTS / "em.mk"), "BASE=base", "CORPUS=c.jsonl", f"RUN={tmp_path}/run",
               "ITERATIONS=2", f"PYTHON={noted}"]  # fmt: skip
    (tmp_path / "noted-stop").touch()  # the second annotation fails
    assert subprocess.run(command, capture_output=True).returncode
    (tmp_path / "noted-stop").unlink()
    (tmp_path / "run" / "m-2" / "checkpoint-4").mkdir(parents=True)
    for _ in range(2):
        assert subprocess.run(command, capture_output=True).returncode == 0
    stages = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [Path(words[words.index("--output_dir") + 1]).name for words in
            stages] == ["e-1", "data-1", "m-1", "e-2", "data-2", "data-2", "m-2"]  # fmt: skip
    taken = [words[words.index("--model_name_or_path") + 1] for words in stages if "--model_name_or_path" in words]
    assert [Path(name).name for name in taken] == ["base", "e-1", "m-1", "e-2"]
    assert [words[-2:] == ["--resume_from_checkpoint", "true"] for words in stages] == [False] * 6 + [True]


# ---- Slurm ----


def test_the_array_job(tmp_path):
    """What it runs in each job: `ra3 annotate` with its part of the files."""
    script = SCRIPTS / "annotate.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    for name, body in {"srun": 'exec "$@"', "ra3": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    names = {"CHECKPOINT": "it", "CORPUS": "org/code", "OUTPUT": "out dir", "ARGS": "--num_latents 4"}
    ran = subprocess.run(["bash", str(script)], env=env | names, capture_output=True, text=True, check=True)
    assert ran.stdout == (
        "annotate it --dataset_name org/code --output_dir out dir --streaming --shard 3/16 --num_latents 4\n"
    )
    ran = subprocess.run(["bash", str(script)], env=env, capture_output=True, text=True)
    assert ran.returncode and "CHECKPOINT: a checkpoint of ra3 train" in ran.stderr


# ---- datatrove ----


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, tiny_model, tokenizers) -> Path:
    """A model, and two files of two documents each, one of which is too short for the filter."""
    folder = tmp_path_factory.mktemp("datatrove")
    tokenizer = tokenizers["newline_indent"]
    tiny_model("llama", tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "corpus").mkdir()
    for i, texts in enumerate((TEXTS[:2], [TEXTS[2], "x = 1\n"])):
        rows = [{"text": text, "id": f"{i}-{n}"} for n, text in enumerate(texts)]
        Dataset.from_list(rows).to_json(folder / "corpus" / f"{i}.jsonl")
    return folder


def script(name: str, corpus: Path, output: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script of examples/at_scale."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, str(SCRIPTS / name), str(corpus / "model"), str(corpus / "corpus"), str(output)]
    ran = subprocess.run([*command, "--tasks", "2", *words], env=env, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran


def annotated(folder: Path) -> dict[str, dict]:
    data = load_dataset("parquet", data_files=[str(path) for path in folder.glob("*.parquet")], split="train")
    return {row["id"]: row for row in data}


def by_command(corpus: Path, tmp_path: Path) -> list[dict]:
    """The first three documents by `ra3 annotate`."""
    CORPUS.select(range(3)).to_json(tmp_path / "rows.jsonl")
    argv = ["annotate", str(corpus / "model"), "--dataset_name", str(tmp_path / "rows.jsonl"), "--num_latents", "4"]
    assert ra3([*argv, "--output_dir", str(tmp_path / "command")]) == 0
    return load_dataset(str(tmp_path / "command"), split="train").to_list()


def assert_same_documents(folder: Path, rows: list[dict]) -> None:
    found = annotated(folder)
    assert set(found) == {"0-0", "0-1", "1-0"} and sum(len(row["latents"]) for row in rows)
    for name, row in zip(("0-0", "0-1", "1-0"), rows, strict=True):
        assert {key: found[name][key] for key in row} == row


@needs_datatrove
def test_a_pipeline_on_this_machine(corpus, tmp_path):
    """The rows of the command; a finished task is not done again."""
    script("local.py", corpus, tmp_path / "out", "--workers", "1")
    assert_same_documents(tmp_path / "out", by_command(corpus, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert "already been completed" in script("local.py", corpus, tmp_path / "out", "--workers", "1").stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")} == before


@needs_datatrove
def test_a_document_that_cannot_be_annotated(corpus):
    from datatrove.data import Document

    from ra3_trl.integrations.datatrove import RA3Annotator

    documents = [Document(text=TEXTS[0], id="good"), Document(text=None, id="bad")]
    steps = [RA3Annotator(corpus / "model", skip_broken_documents=skip, num_latents=1) for skip in (False, True)]
    with pytest.raises(ValueError, match=r"document 'bad' can't be annotated: `text` is None"):
        list(steps[0].run(iter(documents)))
    (kept,) = steps[1].run(iter(documents))
    assert kept.text == TEXTS[0] and set(kept.metadata) == {"annotated_text", "latents", "num_boundaries"}
    assert (
        steps[1].stats["broken"].total == 1 and steps[1].stats["boundaries"].total == kept.metadata["num_boundaries"]
    )


@needs_datatrove
def test_what_slurm_is_asked_for(corpus, tmp_path):
    """A stand-in for `sbatch` notes it; the script is one that bash reads, and asks for a GPU a task."""
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\necho "Submitted batch job 7"\n')
    (tmp_path / "sbatch").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script("slurm.py", corpus, tmp_path / "out", "--partition", "gpu", "--env_command", "module load cuda", PATH=path)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and "--export=ALL,RUN_OFFSET=0" in asked[0]  # the array, and the sum of its statistics
    launch = tmp_path / "out" / "logs" / "launch_script.slurm"
    subprocess.run(["bash", "-n", str(launch)], check=True)
    text = launch.read_text()
    for line in ("#SBATCH --array=0-1%2", "#SBATCH --partition=gpu", "#SBATCH --gpus=1", "module load cuda"):
        assert line in text
    assert "launch_pickled_pipeline" in text and (tmp_path / "out" / "logs" / "executor.pik").is_file()


SBATCH = """#!/bin/bash
# A stand-in for Slurm: runs the script's array here, task by task, as a node would.
for script; do :; done
echo "$@" >> "$(dirname "$0")/asked"
for task in $(seq 0 $(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")); do
  export RUN_OFFSET=0 SLURM_JOB_ID=7 SLURM_NODELIST=here SLURM_ARRAY_TASK_ID=$task
  bash "$script" >> "$(dirname "$0")/said" 2>&1 || echo "task $task: exit code $?" >> "$(dirname "$0")/failed"
done
echo "Submitted batch job 7"
"""
SLURM = {"sbatch": SBATCH, "scontrol": "#!/bin/sh\necho here\n", "srun": '#!/bin/sh\nshift 3\nexec "$@"\n'}


@needs_datatrove
@pytest.mark.slow
def test_the_tasks_of_slurm(corpus, tmp_path):
    """The pickle that is submitted does the work in the tasks; submitted again, there is nothing left to do."""
    for name, text in SLURM.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    words = ["--partition", "gpu", "--env_command", f"export PATH={Path(sys.executable).parent}:$PATH"]
    path = f"{tmp_path}:{os.environ['PATH']}"
    script("slurm.py", corpus, tmp_path / "out", *words, PATH=path)
    failed = tmp_path / "failed"
    assert not failed.exists(), failed.read_text() + (tmp_path / "said").read_text()[-4000:]
    assert_same_documents(tmp_path / "out", by_command(corpus, tmp_path))
    stats = json.loads((tmp_path / "out" / "logs" / "stats.json").read_text())
    (ours,) = [step["stats"] for step in stats if "RA3" in step["name"]]
    assert ours["doc_len"]["n"] == 3  # what the job that sums up has made of both tasks
    submitted = (tmp_path / "asked").read_text()
    script("slurm.py", corpus, tmp_path / "out", *words, PATH=path)
    assert (tmp_path / "asked").read_text() == submitted


@needs_datatrove
@needs_ray
@pytest.mark.slow
def test_a_pipeline_on_ray(corpus, tmp_path):
    """A real cluster on this machine, two workers."""
    script("ray_cluster.py", corpus, tmp_path / "out", "--workers", "2")
    assert_same_documents(tmp_path / "out", by_command(corpus, tmp_path))


def test_the_core_does_without():
    """datatrove is named in its integration and nowhere else."""
    named = [path for path in (ROOT / "ra3_trl").rglob("*.py") if "import datatrove" in path.read_text("utf-8")
             or "from datatrove" in path.read_text("utf-8")]  # fmt: skip
    assert named == [ROOT / "ra3_trl" / "integrations" / "datatrove.py"]
