"""`ra3 annotate --annotator MODEL --dry_run`: what a language model would be asked, before anything is spent."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from contextlib import suppress

from datasets import Dataset

from ..files import write_whole
from ..hub import RowAnnotator
from ..policy.prompted import ChatServer, Cost, ModelAnnotator


def estimate(annotator: RowAnnotator, asks: ModelAnnotator, parts: Iterable[Dataset]) -> Cost:
    """Counts what it takes to ask about the rows of some data sets; those that can't be read are left out."""
    cost = Cost()
    for rows in parts:
        for row in rows:
            with suppress(ValueError):  # what is wrong with a row is said when it is its turn
                cost += asks.cost(annotator.source(annotator.read(row), row))
    return cost


def tell_cost(cost: Cost, asks: ModelAnnotator, options: argparse.Namespace) -> None:
    """Prints it, and writes it to the file that `--report` names."""
    about = "about " if isinstance(asks.model, ChatServer) else ""  # the server's tokenizer is not here
    print(f"{cost.documents:,} documents, {cost.boundaries:,} lines before which a latent may stand.")
    print(
        f"{cost.requests:,} requests to {asks.name}: {about}{cost.prompt_tokens:,} prompt tokens and at most "
        f"{cost.max_answer_tokens:,} answer tokens, retries not counted."
    )
    if options.annotator_prices:
        print(f"At most {cost.price(options.annotator_prices):,.2f}, at the prices of a million tokens given.")
    print("Nothing was asked or written.")
    if options.report:
        write_whole(options.report, (json.dumps(cost.report(options.annotator_prices), indent=1) + "\n").encode())
