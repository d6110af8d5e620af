"""
Cold start: shows a model execution traces as thoughts, then lets RA3 improve its own (docs/cold_start.md).

On programs of your own, a JSON lines file whose rows have a column `text` (and perhaps `tests`, assertions that call
its functions):

```
python examples/cold_start.py --dataset_name programs.jsonl --output_dir out
```

Without a file it is MBPP: code with its assertions behind it, of the training split. Each stage is a command of its
own, which is left out where it is finished and goes on where it was killed. What is not named in `--help` goes to
`ra3 train`. The numbers of updates are for two CPU cores and 40 minutes; with a GPU take more.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path

from datasets import Dataset, load_dataset


MBPP = "google-research-datasets/mbpp"
TRAINING = range(601, 975)  # its training split, by `task_id`


def program(code: str, tests: list[str]) -> str:
    """Code, and behind it calls and what they must give. The call stands in a line before the assertion: the thought
    about it, between the two, can be derived."""
    lines = [code.replace("\r\n", "\n").rstrip(), ""]
    for test in tests:
        statement = ast.parse(test.strip()).body[0]
        match statement:
            case ast.Assert(test=ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[value])):
                lines += [f"result = {ast.unparse(call)}", f"assert result == {ast.unparse(value)}"]
    return "\n".join(lines) + "\n"


def mbpp_programs(output: Path, file: str | None) -> str:
    """Writes MBPP's training split as programs, out of its `mbpp.jsonl` or of the Hub."""
    path = output / "programs.jsonl"
    if file:
        lines = Path(file).read_text("utf-8").splitlines()
        rows = [row for line in lines if (row := json.loads(line))["task_id"] in TRAINING]
    else:
        rows = list(load_dataset(MBPP, split="train"))
    Dataset.from_list([{"text": program(row["code"], row["test_list"])} for row in rows]).to_json(path)
    return str(path)


def run(*words: str) -> None:
    """Runs a command of `ra3`; ends where it fails."""
    done = subprocess.run([sys.executable, "-m", "ra3_trl.cli.main", *words])
    if done.returncode:
        raise SystemExit(done.returncode)


def stages(args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """What each stage writes, and its command."""
    output = Path(args.output_dir)
    annotated, cold, final = output / "annotated", output / "cold", output / "ra3"
    rows = ["--max_length", str(args.max_length), "--max_latent_length", str(args.max_latent_length)]
    trained = ["--save_strategy", "steps", "--save_steps", "10", "--save_total_limit", "1", *rows, *args.train]
    return [
        (annotated, ["annotate", args.model_name_or_path, "--annotator", "trace", "--dataset_name", args.dataset_name,
                     "--output_dir", str(annotated), "--report", str(output / "report.json"), *rows]),
        (cold, ["train", "--model_name_or_path", args.model_name_or_path, "--dataset_name", str(annotated),
                "--dataset_text_field", "annotated_text", "--e_steps", "0", "--m_steps", str(args.cold_steps),
                "--output_dir", str(cold), *trained]),
        (final, ["train", "--model_name_or_path", str(cold), "--dataset_name", args.dataset_name,
                 "--e_steps", str(args.e_steps), "--m_steps", str(args.m_steps),
                 "--output_dir", str(final), *trained]),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--dataset_name", help="JSON lines file, Hub id or folder of programs (default: MBPP)")
    parser.add_argument("--mbpp", help="mbpp.jsonl, where the Hub is out of reach")
    parser.add_argument("--output_dir", default="cold_start")
    parser.add_argument("--max_length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--max_latent_length", type=int, default=64, help="tokens of a thought")
    parser.add_argument("--cold_steps", type=int, default=60, help="updates on traces")
    parser.add_argument("--e_steps", type=int, default=10, help="updates of the E-phase behind it")
    parser.add_argument("--m_steps", type=int, default=12, help="updates of the M-phase")
    args, args.train = parser.parse_known_args()  # what is not named here goes to `ra3 train`
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    args.dataset_name = args.dataset_name or mbpp_programs(output, args.mbpp)
    for folder, words in stages(args):
        if not (folder / "done").exists():
            run(*words, *(["--resume_from_checkpoint", "true"] if [*folder.glob("checkpoint-*")] else []))
            (folder / "done").touch()
    run("diagnose", str(output / "ra3"), str(output / "annotated"), "--documents", "16", "--boundaries", "8")


if __name__ == "__main__":
    main()
