"""A run that does an update whenever it is its turn: `python -m benchmarks.worker FOLDER`, or under torchrun.

FOLDER holds `settings.json`. For each phase and number the run waits for the file `go-E0`, does the update between two
barriers and writes its seconds to `done-E0`. While it waits it sleeps, so that the other run has the machine.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PrinterCallback, TrainerCallback

from .common import LONG_PHASE, load, make_ra3, median_chunk


class TurnCallback(TrainerCallback):
    """Waits before each update and reports after it."""

    def __init__(self, folder: Path, phase: str, rounds: int):
        self.folder, self.phase, self.rounds = folder, phase, rounds
        self.number = -1

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin()

    def on_step_end(self, args, state, control, **kwargs):
        main = PartialState()
        main.wait_for_everyone()
        if main.is_main_process:
            answer = self.folder / f"done-{self.phase}{self.number}"
            aside = answer.with_suffix(".part")
            aside.write_text(str(time.perf_counter() - self._start))
            aside.rename(answer)
        if self.number == self.rounds:
            control.should_training_stop = True
        else:
            self._begin()

    def _begin(self) -> None:
        self.number += 1
        go = self.folder / f"go-{self.phase}{self.number}"
        while not go.exists():  # all processes see the folder
            time.sleep(0.005)
        PartialState().wait_for_everyone()
        self._start = time.perf_counter()


def main(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    document = median_chunk(load(settings["model"])[1], settings["module"], settings["tokens"])
    # One document, many times: its latents are drawn by the same noise, so that all processes have the same work.
    documents = [document] * settings["batch"] * (settings["rounds"] + 1)
    common = {
        "num_latents": settings["num_latents"], "max_latent_length": settings["latent_tokens"], "horizon": 1,
        "per_device_train_batch_size": settings["batch"] // state.num_processes, "seed": settings["seed"],
    }  # fmt: skip
    phases = {
        "E": {"e_steps": LONG_PHASE, "m_steps": 0},
        "M": {"e_steps": 0, "m_steps": LONG_PHASE, "annotation": "resample"},
    }
    for phase, steps in phases.items():
        out = folder / f"run-{phase}"
        trainer = make_ra3(settings["model"], out, documents, **common, **steps)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(TurnCallback(folder, phase, settings["rounds"]))
        trainer.train()
        del trainer
        gc.collect()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(Path(sys.argv[1]))
