"""The short help of each command: what it does, the options that are asked for first, three examples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Help:
    """A command's usage, purpose, first options with their meaning, and examples that run as they stand."""

    usage: str
    about: str
    options: tuple[tuple[str, str], ...]
    examples: tuple[str, ...]

    def text(self, command: str) -> str:
        """What `--help` prints."""
        width = max(len(option) for option, _ in self.options)
        lines = [f"usage: ra3 {command} {self.usage}".rstrip(), "", self.about, ""]
        lines += [f"  {option.ljust(width)}  {text}" for option, text in self.options]
        lines += ["", "examples:", *(f"  ra3 {command} {example}".rstrip() for example in self.examples)]
        return "\n".join([*lines, "", f"All options: ra3 {command} --help-all"])


_CODE_DIR = ("--code_dir FOLDER", "folder of .py files (default: the standard library of this Python)")
_DATASET = ("--dataset_name NAME", "Hub id, folder of save_to_disk, or json(l), parquet, csv file")
_MAX = ("--max_documents N", "the first so many documents only")
_CHECKPOINT = ("CHECKPOINT", "folder or Hub id of a causal language model, mid-trained or not")

HELPS = {
    "train": Help(
        "--model_name_or_path MODEL [--code_dir FOLDER | --dataset_name NAME] [OPTION ...]",
        "Mid-trains a causal language model on expert text: E-phases find comments that make its next lines\n"
        "likelier, M-phases train on the text with these comments in. Says at the end what has changed.",
        (
            ("--model_name_or_path MODEL", "folder or Hub id"), _CODE_DIR, _DATASET, _MAX,
            ("--output_dir DIR", "where the checkpoint goes (default: MODEL-RA3)"),
            ("--e_steps N --m_steps N", "updates of an E-phase and of an M-phase (e_steps 0: next-token prediction)"),
            ("--use_peft", "train a LoRA adapter"),
            ("--eval_documents N", "hold out so many documents (default: one in twenty, at most 64)"),
            ("--eval_on_start false", "do not evaluate the base before the first update"),
            ("--resume_from_checkpoint true", "go on from the last checkpoint in output_dir"),
            ("--dry_run", "say what memory and time it would take, and end"),
            ("--device NAME --devices N", "with dry_run: what it would take on a100, l40s, h100, h200 or b200"),
        ),
        (
            "--model_name_or_path Qwen/Qwen2.5-Coder-0.5B --code_dir src --e_steps 20 --m_steps 200 --dry_run",
            "--model_name_or_path Qwen/Qwen2.5-Coder-0.5B --code_dir src --output_dir qwen-ra3 --use_peft",
            "--config run.yaml --resume_from_checkpoint true",
        ),
    ),
    "annotate": Help(
        "CHECKPOINT [--code_dir FOLDER | --dataset_name NAME] --output_dir DIR [OPTION ...]",
        "Writes a corpus with a checkpoint's comments spliced in, and what each of them brings.",
        (_CHECKPOINT, _CODE_DIR, _DATASET, _MAX, ("--output_dir DIR", "folder of its Parquet files"),
         ("--annotator NAME", "trace, or another model: writes comments that the checkpoint is helped by"),
         ("--push_to_hub ORG/NAME", "push it, with a card"), ("--dry_run", "say what it would take, and end"),
         ("--device NAME --devices N", "with dry_run: what it would take on a100, l40s, h100, h200 or b200")),
        (
            "qwen-ra3 --code_dir src --output_dir annotated",
            "qwen-ra3 --dataset_name code.jsonl --max_documents 100 --output_dir annotated",
            "qwen-ra3 --code_dir src --annotation policy --push_to_hub org/annotated",
        ),
    ),
    "show": Help(
        "CHECKPOINT FILE [--html OUT] [OPTION ...]",
        "Shows a file as a checkpoint sees it: where it would think, what it would write there, and what that brings.",
        (_CHECKPOINT, ("FILE", "a program"), ("--html OUT", "write a page for a browser"),
         ("--lines A:B", "these lines only"), ("--num_latents N", "comments drawn at each place")),
        ("qwen-ra3 src/area.py", "qwen-ra3 src/area.py --html page.html", "qwen-ra3 src/area.py --lines 10:40"),
    ),
    "play": Help(
        "CHECKPOINT [OPTION ...]",
        "Opens a local page: type or paste code and see P(think) at every boundary, draw thoughts and what each\n"
        "brings the lines that follow, move the threshold and see what is written with and without thinking.",
        (_CHECKPOINT, ("--port N", "of the page's address (default: the first free one from 7860 on)"),
         ("--open", "open it in the browser"),
         ("--push_to_space ORG/NAME", "make a Hugging Face Space of it and open nothing here"),
         ("--private", "a private Space, if it is new")),
        ("qwen-ra3", "qwen-ra3 --port 8000 --open", "org/qwen-ra3 --push_to_space org/qwen-ra3-play"),
    ),
    "evaluate": Help(
        "CHECKPOINT [--task NAME] [OPTION ...]",
        "pass@k of a checkpoint; programs run in a sandbox.",
        (_CHECKPOINT, ("--task NAME", "humaneval, mbpp, or a jsonl file of problems"),
         ("--num_samples N --k 1,10", "samples of each task, and the k of pass@k"),
         ("--think auto|always|never", "where it may think"), ("--output_dir DIR", "of samples and results"),
         ("--max_tasks N", "the first tasks only")),
        (
            "qwen-ra3 --task humaneval",
            "qwen-ra3 --task mbpp --num_samples 10 --temperature 0.8 --k 1,10",
            "qwen-ra3 --task my_problems.jsonl --think never",
        ),
    ),
    "rlvr": Help(
        "--model_name_or_path MODEL (--task mbpp|FILE | --dataset_name NAME) [OPTION ...]",
        "RL post-training on programs and their tests, with TRL's GRPOTrainer, from any checkpoint.",
        (("--model_name_or_path MODEL", "folder or Hub id"), ("--task NAME", "mbpp, or a jsonl file of problems"),
         ("--output_dir DIR", "where the checkpoint goes (default: MODEL-RLVR)"),
         ("--max_steps N", "updates"), ("--think auto|always|never", "where completions may think"),
         ("--use_cpu --bf16 false", "without a GPU")),
        (
            "--model_name_or_path qwen-ra3 --task mbpp --output_dir qwen-ra3-rlvr",
            "--model_name_or_path qwen-ra3 --task my_problems.jsonl --max_steps 100",
            "--model_name_or_path qwen-ra3 --task mbpp --use_cpu --bf16 false",
        ),
    ),
    "compare": Help(
        "A B [...] [OPTION ...]",
        "Checkpoints side by side, each beside the first: pass@k with intervals, cross-entropy, latents and tokens.",
        (("A", "checkpoint, or folder of `ra3 evaluate`"), ("--names NAME ...", "what to call them"),
         ("--task NAME", "humaneval, mbpp, or a jsonl file of problems"),
         ("--code_dir FOLDER", "text of the cross-entropy"),
         ("--max_documents N", "so many documents of it"), ("--output_dir DIR", "of table and picture")),
        (
            "Qwen/Qwen2.5-Coder-0.5B qwen-ra3 --names base ra3 --task humaneval",
            "base qwen-ra3 --task my_problems.jsonl --code_dir src",
            "results/base-humaneval results/qwen-ra3-humaneval",
        ),
    ),
    "diagnose": Help(
        "CHECKPOINT [--code_dir FOLDER | --dataset_name NAME] [OPTION ...]",
        "The theory's measures of a checkpoint: how long its thoughts last, how many there are, what they rule out.",
        (_CHECKPOINT, _CODE_DIR, _DATASET, _MAX, ("--output_dir DIR", "write diagnosis.json there")),
        (
            "qwen-ra3 --code_dir src",
            "qwen-ra3 --dataset_name code.jsonl --max_documents 32 --output_dir diagnosed",
            "qwen-ra3 --code_dir src --boundaries 64 --lines 32",
        ),
    ),
    "report": Help(
        "RUN [RUN ...] [--output_dir DIR]",
        "One page of what runs did: base and now, phases as curves, programs with latents.",
        (("RUN", "folder of a run or an annotated corpus; LABEL=RUN calls it LABEL"),
         ("--output_dir DIR", "of report.html, tables.md, overview.png and a PNG for each chart"),
         ("--programs N", "programs shown of each corpus")),
        ("qwen-ra3", "ra3=qwen-ra3 ntp=qwen-ntp --output_dir report", "ra3=seed0 ra3=seed1 annotated"),
    ),
    "demo": Help(
        "[OPTION ...]",
        "What RA3 is for, in minutes and without a model hub: a tiny model on programs whose next line must be\n"
        "computed, by next-token prediction and by RA3. With your own model or code: a few updates of both there.",
        (("--output_dir DIR", "where everything is written (default: runs/demo)"), ("--smoke", "a few updates only"),
         ("--model_name_or_path MODEL", "your own model"), _CODE_DIR),
        ("", "--smoke", "--model_name_or_path MODEL --code_dir src"),
    ),
    "env": Help(
        "",
        "Versions and devices, for bug reports.",
        (("--help", "this text"),),
        ("",),
    ),
}  # fmt: skip
