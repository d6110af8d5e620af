"""The tables of `ra3 diagnose`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .show import visible


# Of each number: what it is called, and how it is written.
_ROWS = {
    "horizon": {
        "latents": ("latents that the policy places", "d"),
        "lines_per_latent": ("lines that one lasts", ".2f"),
        "cut": ("of these ended by the text's end", ".0%"),
        "gbar": ("E[gamma^tau] over decisions", ".4f"),
        "iterations": ("iterations that the bound asks for", ".0f"),
        "iterations_by_line": ("the same, line by line", ".0f"),
    },
    "pruning": {
        "removed": ("mass on lines that a latent rules out", ".3f"),
        "removed_by_others": ("the same, latents of other boundaries", ".3f"),
        "expert_kept": ("latents that keep the expert's line", ".0%"),
        "expert_helped": ("latents that make it likelier", ".0%"),
        "boundaries": ("boundaries", "d"),
        "lines": ("lines drawn there", "d"),
        "left_out": ("too long to be used", "d"),
    },
    "economics": {
        "think_rate": ("P(think), mean over boundaries", ".4f"),
        "gain": ("nats that a latent brings", "+.3f"),
        "gain_per_token": ("for each of its tokens", "+.3f"),
        "helps": ("latents that bring something", ".0%"),
        "gain_where_it_thinks": ("nats, weighed by P(think)", "+.3f"),
        "gain_per_token_where_it_thinks": ("for each token, weighed", "+.3f"),
        "gain_over_other": ("nats more than another document's bring", "+.3f"),
        "distinct_rate": ("different ones, one a document", ".0%"),
        "most_frequent": ("the most frequent of these", ""),
        "most_frequent_rate": ("its share", ".0%"),
        "price": ("nats to write one, -log pi(z | s)", ".2f"),
        "latent_tokens": ("tokens of a latent", ".1f"),
    },
    "thoughts": {
        "kept": ("boundaries where a thought was kept", "d"),
        "think_there": ("P(think) there", ".4f"),
        "gain_there": ("nats that its own latents bring there", "+.3f"),
        "others": ("other boundaries", "d"),
        "think_elsewhere": ("P(think) there", ".4f"),
        "gain_elsewhere": ("nats that its own latents bring there", "+.3f"),
    },
}
_DISTINCT = 0.9  # share of draws seen once above which entropy can't be told
_COMPACTNESS = (("entropy", ".2f"), ("effective", ".1f"), ("distinct", ".0%"), ("given_state", ".2f"))


def print_diagnosis(diagnosis: dict[str, Any], console: Console) -> None:
    """Prints what [`~ra3_trl.evaluation.diagnose.diagnose`] measured."""
    for section, rows in _ROWS.items():
        table = Table(title=section.capitalize(), title_justify="left", show_header=False)
        numbers = diagnosis.get(section) or {}
        if section == "thoughts" and not numbers:
            continue
        for key, (label, form) in rows.items():
            if numbers.get(key) is not None:
                cell = visible(numbers[key].strip()) if isinstance(numbers[key], str) else format(numbers[key], form)
                table.add_row(Text(label), Text(cell))
        console.print(table)
    table = Table(title="Compactness", title_justify="left")
    for name in ("", "entropy (nats)", "effective number", "distinct", "given the state (nats)"):
        table.add_column(name, justify="right")
    for kind, numbers in diagnosis["compactness"].items():
        hidden = ("entropy", "effective") if numbers["distinct"] > _DISTINCT else ()
        cells = (format(numbers[k], form) if k in numbers and k not in hidden else "-" for k, form in _COMPACTNESS)
        table.add_row(kind, *cells)
    console.print(table)
    for sentence in diagnosis.get("advice") or ():
        console.print(Text(sentence))
