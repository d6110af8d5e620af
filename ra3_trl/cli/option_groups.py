"""Groups of options that several commands have, and how they are read. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .devices import DEVICES, OPTIONS
from .sources import PACKAGE, SourceField, read_constant, read_fields


THINKING = read_constant("policy/policy.py", "THINKING")
RA3_FIELDS = read_fields(PACKAGE / "config.py", "RA3Config")
SAMPLING_FIELDS = read_fields(PACKAGE / "evaluation/draw.py", "EvaluationSettings", ("default", "text", "choices"))
ASKING_FIELDS = read_fields(PACKAGE / "policy/prompted/settings.py", "AskingSettings", ("default", "text"))


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
