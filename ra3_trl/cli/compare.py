"""`ra3 compare`: checkpoints side by side, or what `ra3 evaluate` found for them."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console

from ..config import RA3Config
from ..config_file import read_settings
from ..evaluation import Benchmark, check_k, read_results
from ..evaluation.compare import Problems, check_same_problems, common_ks, compare_runs, sampling_notes
from ..evaluation.results import RESULTS
from ..files import find_file, fingerprint
from ..hub.card import public_name
from ..models import load_tokenizer
from ..policy import THINKING, Policy
from ..report.compare import comparison_markdown, comparison_table, plot_comparison
from ..sandbox import Judge, Limits
from ..segmentation import find_format, require_tags, row_to_document, segment_dataset, token_bytes
from . import evaluate
from .checkpoint import add_settings, flag_settings
from .data import hold_out, limit, load_splits


VERSION = 1
_FLAGS = (
    "action_format", "existing_comments", "max_length", "max_latent_length", "horizon", "dataset_text_field",
    "eval_num_latents", "eval_max_boundaries", "engine", "max_branch_tokens",
)  # fmt: skip
_SHARED = (*_FLAGS[:5], "temperature", "top_k", "top_p")  # those of one checkpoint are taken for all
_MEASURED = ("ce", "ce_never", "ce_policy", "elbo", "bound_multi", "think_rate", "code_tokens")
_WEIGHTS = ("config.json", "adapter_config.json")
_EPILOG = """Each A is a checkpoint (a folder or Hub id), which is evaluated as `ra3 evaluate` does into
OUTPUT_DIR/NAME/ and goes on there after a kill, or a folder that `ra3 evaluate` wrote. The others are compared with
the first. OUTPUT_DIR gets compare.md, compare.json and compare.png."""


@dataclass(frozen=True)
class Entrant:
    """One of those compared: `results` of a folder that was given, or else a checkpoint at `place`.

    `weights` is the checkpoint whose cross-entropy can be measured, `None` where it is not at hand.
    """

    name: str
    place: str
    results: dict[str, Any] | None
    weights: str | None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ra3 compare", description=__doc__, epilog=_EPILOG, allow_abbrev=False)
    parser.add_argument("places", nargs="+", metavar="A", help="checkpoint, or folder of results")
    parser.add_argument("--names", nargs="+", help="what to call them (default: the folders' names)")
    parser.add_argument("--output_dir", help="folder of samples, table and picture (default: results/compare-TASK)")
    parser.add_argument(
        "--task", help="humaneval, mbpp, or a jsonl file of problems (default: that of the results, else humaneval)"
    )
    parser.add_argument("--k", help="of pass@k, with commas (default: those that all results have, else 1)")
    evaluate.add_options(parser)
    text = parser.add_argument_group("cross-entropy")
    text.add_argument("--no_ce", action="store_true", help="leave it out")
    text.add_argument(
        "--dataset_name", help="Hub id, folder of save_to_disk, or json(l), parquet, csv file (default: the tasks' "
        "own solutions)",
    )  # fmt: skip
    text.add_argument("--dataset_config", help="configuration of the dataset")
    text.add_argument(
        "--dataset_split", help="the first rows of this split (default: the rows that `ra3 train` holds out)"
    )
    text.add_argument("--code_dir", help="folder of .py files")
    text.add_argument("--eval_documents", type=int, help="documents (default: 64, and as `ra3 train` if it holds out)")
    add_settings(parser, "settings of the cross-entropy", _FLAGS, _SHARED)
    return parser


def read_entrants(places: Sequence[str], names: Sequence[str] | None) -> list[Entrant]:
    """What is to be compared, by name; nothing big is loaded.

    Raises:
        `ValueError`: for fewer than two, names that do not fit, and folders that hold neither weights nor results.
    """
    if len(places) < 2:
        raise ValueError(f"{places[0]!r} is all there is to compare; give two or more.")
    if names is not None and len(names) != len(places):
        raise ValueError(f"`names` has {len(names)} names for {len(places)} checkpoints; give each one.")
    found = [_entrant(place, names and names[i]) for i, place in enumerate(places)]
    for i, one in enumerate(found):
        if one.name in ("", ".", "..") or set(one.name) & set("/\\\0"):
            raise ValueError(f"`names` has {one.name!r}, which is no folder's name; use letters, digits and dashes.")
        if one.name in (other.name for other in found[:i]):
            raise ValueError(f"two are called {one.name!r}; tell them apart by `--names`.")
    return found


def _entrant(place: str, name: str | None) -> Entrant:
    folder = Path(place)
    if folder.is_file():
        raise ValueError(f"{place!r} is a file; give a checkpoint, or a folder that `ra3 evaluate` wrote.")
    base = folder.resolve().name if folder.is_dir() else place.rstrip("/").split("/")[-1]
    if not folder.is_dir() or any((folder / one).is_file() for one in _WEIGHTS):
        return Entrant(name or base, place, None, place)
    if not (folder / RESULTS).is_file():
        raise ValueError(
            f"{place!r} is a folder with neither config.json (a checkpoint) nor {RESULTS} (of `ra3 evaluate`)."
        )
    results = read_results(folder)
    about = results["run"]
    known = about.get("checkpoint")  # of a path its last part
    here = isinstance(known, str) and _holds(Path(known), about.get("weights"))
    return Entrant(name or base.removesuffix(f"-{results['task']}"), place, results, known if here else None)


def _holds(folder: Path, weights: str) -> bool:
    """Whether a folder has the weights of this fingerprint."""
    try:
        return folder.is_dir() and fingerprint(folder) == weights
    except ValueError:  # it has none
        return False


def read_tasks(options: argparse.Namespace, entrants: Sequence[Entrant]) -> tuple[list[int], Benchmark | None]:
    """For which k to estimate, and the tasks if they are needed; all that can be known to be wrong is refused.

    Raises:
        `ValueError`: for settings out of range, and for results that can't be compared.
    """
    evaluate.check_numbers(options)
    if options.eval_documents is not None and options.eval_documents < 1:
        raise ValueError(f"`eval_documents` is {options.eval_documents}; use at least 1, or `no_ce`.")
    runs = {one.name: one.results for one in entrants if one.results is not None}
    drawn = [one.name for one in entrants if one.results is None]
    ks = _ks(options, runs, bool(drawn))
    solutions = not (options.no_ce or options.dataset_name or options.code_dir) and any(e.weights for e in entrants)
    if options.task is None:
        known = next((run["task"] for run in runs.values()), "humaneval")
        if known not in ("humaneval", "mbpp") and drawn:
            raise ValueError(f"`task` is missing; the results are of {known!r}, so give the file of its problems.")
        options.task = known if known in ("humaneval", "mbpp") else None
    benchmark = evaluate.read_benchmark(options) if options.task and (drawn or solutions) else None
    problems = {name: Problems.of_run(run) for name, run in runs.items()}
    if benchmark and not drawn:  # for its solutions, of the problems that the results are of
        benchmark = benchmark.only(next(iter(runs.values()))["problems"])
    if benchmark:
        problems |= dict.fromkeys(drawn or [f"`task` {benchmark.name}"], Problems.of_benchmark(benchmark))
    check_same_problems(problems)
    return ks, benchmark


def _ks(options: argparse.Namespace, runs: dict[str, dict[str, Any]], drawn: bool) -> list[int]:
    if options.k is None and not runs:
        return [1]
    if options.k is None:
        ks = common_ks(runs)
        ks = [k for k in ks if k <= options.num_samples] or ks if drawn else ks
    else:
        ks = evaluate.read_ks(options.k)
    check_k(ks, options.num_samples if drawn else max(ks))
    return common_ks(runs, ks) if runs else ks


def held_out(options: argparse.Namespace, benchmark: Benchmark | None) -> tuple[Dataset | None, str]:
    """The texts of the cross-entropy, and what they are in words; `None` if there are none.

    Raises:
        `ValueError`: if the corpus can't be read, or nothing of it is held out.
    """
    documents, split = options.eval_documents, options.dataset_split
    name = options.dataset_name or options.code_dir
    if name is None:
        programs = [task.solution for task in benchmark.tasks if task.solution] if benchmark else []
        data = Dataset.from_dict({options.dataset_text_field or "text": programs}) if programs else None
        return limit(data, documents), "the tasks' own solutions"
    splits = load_splits(options.dataset_name, options.code_dir, split or "train", options.dataset_config)
    if split is not None or "test" in splits:
        split = split or "test"
        return limit(splits[split], documents), f"the first of {public_name(name)}, {split}"
    found = hold_out(splits["train"], documents, None, options.seed)[1]
    if found is None:
        raise ValueError(f"{name!r} is too small to hold some of it out; set `dataset_split` to take its first rows.")
    return found, f"of {public_name(name)}, those that `ra3 train` holds out with seed {options.seed}"


class CrossEntropy:
    """Measures checkpoints on the same texts, with the same settings.

    Args:
        options (`argparse.Namespace`):
            Of the command line.
        entrants (`Sequence[Entrant]`):
            Those to be measured; settings that are not given are those of the first that was mid-trained.

    Raises:
        `ValueError`: if a tokenizer lacks what the action format needs.
    """

    def __init__(self, options: argparse.Namespace, entrants: Sequence[Entrant]):
        place = {"revision": options.model_revision}
        self.options, self.notes = options, []
        self.own = {one.name: read_settings(one.weights, **place) or {} for one in entrants}
        first = next((name for name, own in self.own.items() if own), None)
        self.shared = {key: self.own[first][key] for key in _SHARED if key in self.own[first]} if first else {}
        for name, own in self.own.items():
            other = [key for key, value in self.shared.items() if own.get(key, value) != value]
            if other := [f"`{key}`" for key in other if vars(options).get(key) is None or key not in _FLAGS]:
                self.notes.append(f"All were measured with {first}'s settings; {name} has another {', '.join(other)}.")
        self.format = options.action_format or self.shared.get("action_format", "python")
        self.tokens: dict[str, str] = {}
        for one in entrants:
            try:
                require_tags(load_tokenizer(one.weights, place), find_format(self.format))
            except ValueError as error:
                raise ValueError(f"{one.name}: {error} Or set `no_ce`, or another `action_format`.") from error

    def __call__(self, one: Entrant, texts: Dataset) -> dict[str, float]:
        """Nats per code token and rates of a checkpoint."""
        options, own = self.options, self.own[one.name]
        head = own.get("gate") == "head" and own.get("action_format") == self.format
        head = head and find_file(one.weights, "abstraction_head.safetensors", revision=options.model_revision)
        # Every setting is named: those that one checkpoint has of its own would not be shared.
        neutral = {name: getattr(RA3Config, name) for name in THINKING} | {"boundary_selection": "random"}
        settings = neutral | self.shared | {"gate": "head" if head else "token"} | flag_settings(options, _FLAGS)
        place = {"dtype": options.dtype, "revision": options.model_revision}
        policy = Policy.open(one.weights, model_init_kwargs=place, **settings)
        rows = segment_dataset(texts, policy.segmenter, policy.args.dataset_text_field)
        documents = [row_to_document(row) for row in rows]
        found = policy.evaluate(documents)
        measured = {key: found[key] for key in _MEASURED}
        table, size, seen = token_bytes(policy.tokenizer), 0, hashlib.sha256()
        for document in documents:
            seen.update(repr(document.input_ids).encode())
            spans = [(max(a.start, 1), a.end) for a in document.actions if not a.comment]
            size += sum(len(table[i] or b"") for start, end in spans for i in document.input_ids[start:end])
        self.tokens[one.name] = seen.hexdigest()
        measured["bits_per_byte"] = measured["ce"] * measured["code_tokens"] / max(size, 1) / math.log(2)
        return measured

    def tokenizer_note(self) -> list[str]:
        """A sentence if not all saw the same tokens."""
        if len(set(self.tokens.values())) < 2:
            return []
        return ["Tokenizers differ, so nats per code token can't be compared between them; bits per byte can."]


def _evaluated(
    options: argparse.Namespace, entrants: Sequence[Entrant], benchmark: Benchmark | None, ks: list[int], folder: Path
) -> dict[str, dict[str, Any]]:
    """Results of each; checkpoints are evaluated now."""
    runs = {one.name: one.results for one in entrants}
    drawn = [one for one in entrants if one.results is None]
    if not drawn:
        return runs
    limits = Limits(seconds=options.timeout, memory_mb=options.memory_mb)
    with evaluate.open_judge(limits, options.slots) as judge:
        for one in drawn:
            runs[one.name] = _evaluate(one, options, benchmark, ks, folder / one.name, judge)
            gc.collect()  # the weights, before others are loaded
    return runs


def _evaluate(
    one: Entrant, options: argparse.Namespace, benchmark: Benchmark, ks: list[int], folder: Path, judge: Judge
) -> dict[str, Any]:
    print(f"{one.name}:", file=sys.stderr)
    options = argparse.Namespace(**{**vars(options), "checkpoint": one.place})
    evaluate.finish(evaluate.evaluate(options, benchmark, folder, judge), benchmark, ks, folder)
    return read_results(folder)  # as those that are there, JSON's lists among it


def write_comparison(comparison: dict[str, Any], folder: Path) -> list[str]:
    """Writes compare.json, compare.md and, where there is matplotlib, compare.png; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = "compare.png"
    try:
        plot_comparison(comparison, folder / picture)
    except ImportError:
        comparison["notes"].append("There is no picture, since matplotlib is not installed (`ra3-trl[plots]`).")
        picture = None
    (folder / "compare.json").write_text(json.dumps({"version": VERSION, **comparison}, indent=1) + "\n", "utf-8")
    (folder / "compare.md").write_text(comparison_markdown(comparison, picture), "utf-8")
    return ["compare.md", "compare.json", *([picture] if picture else [])]


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 compare`; see `ra3 compare --help`. Returns the exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    entrants = read_entrants(options.places, options.names)
    ks, benchmark = read_tasks(options, entrants)
    for one in entrants:
        if one.results is None:
            load_tokenizer(one.place, {"revision": options.model_revision})  # says best that there is no checkpoint
    texts, measured, source = None, [one for one in entrants if one.weights], ""
    if measured and not options.no_ce:
        texts, source = held_out(options, benchmark)
    entropy = CrossEntropy(options, measured) if texts is not None else None
    task = next((one.results["task"] for one in entrants if one.results is not None), benchmark and benchmark.name)
    folder = Path(options.output_dir or f"results/compare-{task}")
    runs = _evaluated(options, entrants, benchmark, ks, folder)
    models, notes = compare_runs(runs, ks), sampling_notes(runs)
    if entropy is not None:
        for one in measured:
            models[one.name]["cross_entropy"] = entropy(one, texts)
            gc.collect()
        notes.append(f"Cross-entropy is in nats per code token; documents: {len(texts)} ({source}).")
        notes += entropy.notes + entropy.tokenizer_note()
    if not options.no_ce and (lacking := [name for name, model in models.items() if "cross_entropy" not in model]):
        notes.append(_why_not(lacking, entrants))
    comparison = {"task": task, "num_tasks": len(runs[entrants[0].name]["problems"]), "models": models, "notes": notes}
    written = write_comparison(comparison, folder)
    if isinstance(sys.stdout, TextIOWrapper):  # what its encoding lacks must not end the print
        sys.stdout.reconfigure(errors="backslashreplace")
    Console(file=sys.stdout, highlight=False).print(comparison_table(comparison))
    print("\n".join([*notes, f"Written to {folder}: {', '.join(written)}"]))
    return 0


def _why_not(lacking: list[str], entrants: Sequence[Entrant]) -> str:
    if any(one.weights for one in entrants if one.name in lacking):
        cure = "the tasks have no solutions that are at hand; give `dataset_name`, `code_dir`, or the file as `task`"
    else:
        cure = "the weights that were evaluated are not in a folder of that name here; give the checkpoint instead"
    return f"Without cross-entropy: {', '.join(lacking)}; {cure}."
