"""Annotation in shards: how fast it is in one process and in two, whether memory grows, and what SIGKILLs lose.

Throughput is of the time that shards took, without start-up: of two processes the one that took longer. Memory and
kills are measured on a random model of two layers with the checkpoint's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from datasets import Dataset, load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ra3_trl import Policy
from ra3_trl.hub import MANIFEST, Manifest, Origin, RowAnnotator, ShardedAnnotation
from ra3_trl.segmentation import load_code_directory

from .common import default_model, say, scratch


ROOT = Path(__file__).parent.parent
_SHARD = 5  # rows of a shard of the annotation that is killed
_ALWAYS = {"max_length": 512, "horizon": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or Hub id (default: the demo's SmolLM2-135M, converted once)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--documents", type=int, default=32, help="functions of the standard library, for the speed")
    parser.add_argument("--rounds", type=int, default=2, help="one process and two in turn, so often")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="of the speed; cpu where others share the machine: "
        "what two processes would do with a core each",
    )  # fmt: skip
    parser.add_argument("--num_latents", type=int, default=4, help="latents per boundary")
    parser.add_argument("--latent_tokens", type=int, default=12, help="longest latent")
    parser.add_argument("--soak_documents", type=int, default=10_000, help="for the growth of memory")
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs of one annotation")
    parser.add_argument("--kill_documents", type=int, default=200, help="documents of that annotation")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws, the moments of the kills among them")


def _corpus(documents: int, lines: int = 16) -> Dataset:
    """Short functions of the standard library, each with a number and so another one than all others."""
    texts = [row["text"] for row in load_code_directory(min_lines=4) if row["text"].count("\n") <= lines]
    rows = [f"{texts[i % len(texts)]}# {i}\n" for i in range(documents)]
    return Dataset.from_dict({"text": rows, "number": list(range(documents))})


def _command(model: str, rows: Path, output: Path, args: argparse.Namespace, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    settings = _ALWAYS | {"num_latents": args.num_latents, "max_latent_length": args.latent_tokens, "seed": args.seed}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    module = "benchmarks.annotate_cpu" if args.clock == "cpu" else "ra3_trl.cli.annotate"
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", module, model]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [*command, "--dataset_name", str(rows), "--output_dir", str(output), "--use_cpu", *words],
        cwd=ROOT, env=env, stdout=2,  # the output is for the JSON
    )  # fmt: skip


def _finish(process: subprocess.Popen) -> None:
    if process.wait():
        raise RuntimeError(f"{process.args} ended with exit code {process.returncode}.")


def measure_speed(model: str, args: argparse.Namespace) -> dict:
    """The same corpus by one process of one thread and by two, in turn; of each the quickest round counts, since what
    else the machine does only adds to it."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    found = {}
    with scratch() as folder:
        _corpus(args.documents).to_json(folder / "rows.jsonl")
        for turn, processes in ((turn, processes) for turn in range(args.rounds) for processes in seconds):
            output = folder / f"out-{processes}-{turn}"
            _finish(_command(model, folder / "rows.jsonl", output, args, processes))
            found = json.loads((output / MANIFEST).read_text())
            took: Counter[int] = Counter()
            for entry in found["shards"]:
                took[entry["shard"] % processes] += entry["seconds"]
            seconds[processes].append(max(took.values()))
            say(f"{args.documents} documents in {seconds[processes][-1]:.1f} s with {processes} processes")
        alike = [(folder / f"out-{n}-0" / "train-000000.parquet").read_bytes() for n in seconds]
    single, double = map(min, seconds.values())
    return {
        "documents_per_s": round(args.documents / single, 3),
        "boundaries_per_s": round(found["boundaries"] / single, 3),
        "tokens_per_s": round(found["tokens"] / single, 1),
        "two_process_speedup": round(single / double, 3),
        "seconds_of_rounds": {str(n): [round(s, 2) for s in rounds] for n, rounds in seconds.items()},
        "two_process_bytes_equal": alike[0] == alike[1],
        "documents": args.documents,
        "clock": args.clock,
    }


def tiny_model(model: str, folder: Path) -> str:
    """Saves a random model of two layers with the tokenizer of `model`."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def measure_growth(model: str, args: argparse.Namespace) -> dict:
    """Resident memory of a process at the end of many documents, over that after the first tenth."""
    few = argparse.Namespace(**vars(args) | {"num_latents": 1, "latent_tokens": 2})
    with scratch() as folder:
        tiny = tiny_model(model, folder / "tiny")
        _corpus(args.soak_documents, lines=6).to_json(folder / "rows.jsonl")
        process, output = _command(tiny, folder / "rows.jsonl", folder / "out", few), folder / "out" / MANIFEST
        resident: list[tuple[int, int]] = []
        while process.poll() is None:
            time.sleep(0.5)
            done = json.loads(output.read_text())["rows_in"] if output.exists() else 0
            try:
                resident.append((done, psutil.Process(process.pid).memory_info().rss))
            except psutil.NoSuchProcess:
                break
        _finish(process)
        begun = [rss for done, rss in resident if args.soak_documents / 10 <= done < args.soak_documents / 2]
        late = [rss for done, rss in resident if done >= args.soak_documents / 2]
    say(f"{args.soak_documents} documents: {len(resident)} looks at the memory")
    growth = (max(late) - max(begun)) / 2**20 if begun and late else 0.0
    return {
        "rss_growth_mb": round(growth, 1),
        "rss_mb": round(max(rss for _, rss in resident) / 2**20, 1),
        "soak_documents": args.soak_documents,
    }


def measure_kills(model: str, args: argparse.Namespace) -> dict:
    """An annotation that is killed so often, at random moments, and then left alone: are all rows there once?

    Children of this process do it, since a Python that starts takes longer than the work.
    """
    torch.set_num_threads(1)  # a fork has none of the parent's threads
    draw = random.Random(args.seed)
    with scratch() as folder:
        policy = Policy.open(
            tiny_model(model, folder / "tiny"), use_cpu=True, num_latents=1, max_latent_length=2, **_ALWAYS
        )
        policy.args.disable_tqdm = True
        annotator, corpus = RowAnnotator(policy), _corpus(args.kill_documents, lines=6)

        def annotate(output: Path) -> None:
            ShardedAnnotation(
                annotator, corpus, Manifest(output, Origin({}, "tiny", "", "", len(corpus), _SHARD))
            ).run()

        begin = time.perf_counter()
        annotate(folder / "alone")
        whole, killed, rounds, redone = time.perf_counter() - begin, 0, 0, 0
        seen: Counter[tuple[int, int]] = Counter()
        alike = True
        while killed < args.kills:  # anew where it has come to its end before
            output, finished = folder / f"killed-{rounds}", dict[str, int]()
            while killed < args.kills and not _done(output, len(corpus)):
                child = os.fork()
                if child == 0:
                    annotate(output)
                    os._exit(0)
                time.sleep(draw.uniform(0, 2 * whole / args.kills))
                os.kill(child, signal.SIGKILL)
                killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
                redone += sum((output / name).stat().st_mtime_ns != then for name, then in finished.items())
                finished = {name: (output / name).stat().st_mtime_ns for name in _listed(output)}
            annotate(output)
            numbers = load_dataset("parquet", data_dir=str(output), split="train")["number"][:]
            seen.update((rounds, number) for number in numbers)
            shards = (folder / "alone").glob("*.parquet")
            alike = alike and all(path.read_bytes() == (output / path.name).read_bytes() for path in shards)
            rounds += 1
    wanted = [(number, row) for number in range(rounds) for row in range(len(corpus))]
    return {
        "kills": killed,
        "rows_lost": sum(key not in seen for key in wanted),
        "rows_doubled": sum(count - 1 for count in seen.values()),
        "killed_annotations": rounds,
        "finished_shards_redone": redone,
        "killed_bytes_equal": alike,
    }


def _listed(output: Path) -> list[str]:
    """Files of the shards that the manifest has."""
    manifest = output / MANIFEST
    return [entry["file"] for entry in json.loads(manifest.read_text())["shards"]] if manifest.exists() else []


def _done(output: Path, rows: int) -> bool:
    return len(_listed(output)) == -(-rows // _SHARD)


PARTS = {"speed": measure_speed, "soak": measure_growth, "kills": measure_kills}


def run(args: argparse.Namespace) -> dict:
    begin = time.perf_counter()
    model = args.model or default_model()
    result: dict = {}
    for part in args.parts:
        result |= PARTS[part](model, args)
    return result | {"model": Path(model).name, "benchmark_seconds": round(time.perf_counter() - begin, 1)}
