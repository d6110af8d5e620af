"""A controlled replication of the paper's claims on a testbed small enough for two CPU cores.

A tiny Llama is pre-trained on programs some of whose hard lines follow a comment in steps, then mid-trained on
programs without comments: by next-token prediction, or by RA3. What each thinks, says and learns afterwards by GRPO is
measured over seeds. All of it goes through `RA3MidTrainer`, `GRPOTrainer` and `generate`.

The experiments `real_*` ask the same of a real checkpoint, SmolLM2-135M, prepared on programs that it gets right only
behind a comment; `--domain traces` asks all of it of that checkpoint, over bases of three qualities. `cold_start`
asks whether the same checkpoint, shown traces of MBPP's functions, thinks on others.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from datasets import disable_progress_bars

from ..common import no_warnings
from .bases import find_bases
from .cold_start import COLD_EXPERIMENTS, ColdRecipe, run_cold
from .domain import ARMS, CORPORA, DOMAINS, PARTS, UPDATES, DomainForm, chosen, plan, run_domain, traces_form
from .experiments import EXPERIMENTS, of_arms, run_experiment
from .real_gate import REAL_EXPERIMENTS, run_real
from .store import Store
from .table import Form, rows, run_seed, samples


CACHE = "~/.cache/ra3_trl/replication"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=1, help="runs of all arms, each with data and noise of its own")
    parser.add_argument(
        "--bases", type=int, default=None, help="independent bases, used in turn; 2 if there are seeds"
    )
    parser.add_argument("--cache", default=CACHE, help="folder of finished and begun results")
    parser.add_argument(
        "--full", action="store_true", help="also NTP with RA3's tokens and CPU seconds, and RA3 without E-steps"
    )
    parser.add_argument(
        "--experiment",
        choices=sorted({*EXPERIMENTS, *REAL_EXPERIMENTS, *COLD_EXPERIMENTS}),
        help="one of the experiments beside the table, in its place",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        help=f"of an experiment's, or with `--domain traces` of {', '.join(ARMS)} and real_gate's ablations (default: "
        "all; of the domain all but the ablations)",
    )
    parser.add_argument("--domain", choices=DOMAINS, default=DOMAINS[0], help="where it is measured")
    traces = parser.add_argument_group("of --domain traces")
    traces.add_argument("--corpus", choices=CORPORA, default=CORPORA[0], help="programs of preparation and training")
    traces.add_argument("--base", nargs="+", help=f"of {', '.join(UPDATES)} (default: all)")
    traces.add_argument("--parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all), beside the measures")
    traces.add_argument("--plan", action="store_true", help="say what is to be done, how long, and what is there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", help="the real checkpoint (default: the demo's SmolLM2-135M-Instruct)")
    parser.add_argument("--annotator", help="of cold_start_annotators: another model that is asked, too, as `asked`")
    parser.add_argument("--mbpp", help="of MBPP's parts: mbpp.jsonl (default: beside the checkout, else of the Hub)")


@no_warnings()
def run(args: argparse.Namespace, form: Form | None = None) -> dict[str, Any]:
    """Bases, seeds and rows; whatever the cache has is not done again.

    Raises:
        `ValueError`: for arms that there are none of.
    """
    if vars(args).get("annotator") and args.experiment != "cold_start_annotators":
        raise ValueError("`--annotator` is of `--experiment cold_start_annotators`; leave it out.")
    disable_progress_bars()
    torch.set_num_threads(args.threads)
    store = Store(args.cache)
    if vars(args).get("domain") == "traces":  # callers of before have no such field
        return run_traces(store, args)
    form = form or Form(full=args.full)
    if vars(args).get("arms") and not args.experiment:
        raise ValueError("`--arms` is of `--experiment` and `--domain traces`; name one, or leave it out.")
    if args.experiment:
        return {"experiment": args.experiment, **run_named(store, args)}
    wanted = min(2, args.seeds) if args.bases is None else args.bases
    tried = find_bases(store, form.base, form.measure, wanted, (form.gate, 1.0))
    bases = [base.recipe for base in tried if base.passed]
    results = [run_seed(store, form, bases[seed % len(bases)], seed) for seed in range(args.seeds)]
    seeds = [{arm: found.about() for arm, found in result.items()} for result in results]
    return {
        "seeds": args.seeds,
        "bases": [base.told() for base in tried],
        "samples": samples(form),
        "form": asdict(form),
        **rows(results, form),
        "runs": seeds,
    }


def run_named(store: Store, args: argparse.Namespace) -> dict[str, Any]:
    """The experiment of a name, with `args.arms` those of its arms."""
    experiment: Any
    if args.experiment in COLD_EXPERIMENTS:
        make, go = COLD_EXPERIMENTS[args.experiment], run_cold
        experiment = make(ColdRecipe(model=args.model, mbpp=args.mbpp), asked=vars(args).get("annotator"))
    elif args.experiment in REAL_EXPERIMENTS:
        experiment, go = REAL_EXPERIMENTS[args.experiment](), run_real
    else:
        experiment, go = EXPERIMENTS[args.experiment](), run_experiment
    return go(store, of_arms(experiment, vars(args).get("arms")), args.seeds)


def run_traces(store: Store, args: argparse.Namespace, form: DomainForm | None = None) -> dict[str, Any]:
    """The domain `traces`, or what of it is to be done.

    Raises:
        `ValueError`: for an option that is not of this domain.
    """
    if args.experiment or args.full or args.bases is not None:
        raise ValueError("`--experiment`, `--full` and `--bases` are not of `--domain traces`; leave them out.")
    form = chosen(form or traces_form(args.corpus, args.mbpp, args.model), args.base, args.arms, args.parts)
    if not args.plan:
        return run_domain(store, form, args.seeds)
    stages = plan(store, form, args.seeds)
    left = sum(stage.minutes for stage in stages if not stage.done)
    return {"domain": "traces", "minutes_left": round(left, 1), "stages": [asdict(stage) for stage in stages]}
