"""`ra3 annotate --dry_run`: what annotation takes, before anything is spent."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from contextlib import suppress

from datasets import Dataset

from ..files import write_whole
from ..hub import RowAnnotator
from ..policy.prompted import ChatServer, Cost, ModelAnnotator


def estimate(annotator: RowAnnotator, parts: Iterable[Dataset]) -> Cost:
    """Counts what it takes to annotate the rows of some data sets; those that can't be read are left out."""
    cost = Cost()
    proposer = annotator.annotation and annotator.annotation.annotator
    for rows in parts:
        for row in rows:
            with suppress(ValueError):  # what is wrong with a row is said when it is its turn
                source = annotator.source(annotator.read(row), row)
                asked = isinstance(proposer, ModelAnnotator)
                cost += proposer.cost(source) if asked else Cost(1, len(source.lines))
    return cost


def tell_cost(cost: Cost, annotator: RowAnnotator, options: argparse.Namespace) -> None:
    """Prints it, and writes it to the file that `--report` names."""
    print(f"{cost.documents:,} documents, {cost.boundaries:,} lines before which a latent may stand.")
    proposer = annotator.annotation and annotator.annotation.annotator
    if isinstance(proposer, ModelAnnotator):
        about = "about " if isinstance(proposer.model, ChatServer) else ""  # the server's tokenizer is not here
        print(
            f"{cost.requests:,} requests to {proposer.name}: {about}{cost.prompt_tokens:,} prompt tokens and at most "
            f"{cost.max_answer_tokens:,} answer tokens, retries not counted."
        )
        if options.annotator_prices:
            print(f"At most {cost.price(options.annotator_prices):,.2f}, at the prices of a million tokens given.")
    print("Nothing was asked or written.")
    if options.report:
        write_whole(options.report, (json.dumps(cost.report(options.annotator_prices), indent=1) + "\n").encode())
