"""Two processes of one thread each against one, in turns: the launcher here, the worker in `worker.py`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .common import say, scratch


ROOT = Path(__file__).parent.parent
_PATIENCE = 900  # most seconds of one turn, start-up and warm-up of all included


class Job:
    """One run, of one process or of two, that does an update whenever it is given the turn."""

    def __init__(self, folder: Path, processes: int, settings: dict):
        self.folder, self.processes = folder / f"{processes}", processes
        self.folder.mkdir()
        (self.folder / "settings.json").write_text(json.dumps(settings))
        worker = ["-m", "benchmarks.worker", str(self.folder)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), *worker]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
        self._log = (self.folder / "log").open("w")
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def turn(self, name: str) -> float:
        """Lets the run go until it has written `name`; returns the seconds that stand in it.

        Raises:
            `RuntimeError`: if the run ends before, or takes too long; with the end of its output.
        """
        (self.folder / f"go-{name}").touch()
        answer, begin = self.folder / f"done-{name}", time.perf_counter()
        while not answer.exists():
            if self._process.poll() is not None or time.perf_counter() - begin > _PATIENCE:
                raise RuntimeError(f"{self.processes} processes, {name}:\n{(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.005)
        return float(answer.read_text())

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # the launcher and the workers it started
        self._process.wait()
        self._log.close()


def measure_processes(folder: str, args: argparse.Namespace) -> dict:
    """Best update of each phase and number of processes, in turns so that both meet the same neighbours."""
    settings = {
        "model": folder, "module": args.module, "tokens": args.process_tokens, "batch": args.process_batch,
        "rounds": args.process_rounds, "num_latents": args.num_latents, "latent_tokens": args.latent_tokens,
        "seed": args.seed,
    }  # fmt: skip
    best = {(phase, count): float("inf") for phase in "EM" for count in (1, 2)}
    with scratch() as out:
        jobs = [Job(out, 1, settings), Job(out, 2, settings)]
        try:
            for phase in "EM":
                for turn in range(args.process_rounds + 1):  # number 0 is the warm-up
                    times = {job.processes: job.turn(f"{phase}{turn}") for job in jobs}
                    say(f"{phase}-update {turn}: " + ", ".join(f"{t:.2f} s with {n}" for n, t in times.items()))
                    if turn:
                        for count, seconds in times.items():
                            best[phase, count] = min(best[phase, count], seconds)
        finally:
            for job in jobs:
                job.end()
    both = {count: best["E", count] + best["M", count] for count in (1, 2)}
    return {
        "two_process_speedup": round(both[1] / both[2], 3),
        "two_process_speedup_e": round(best["E", 1] / best["E", 2], 3),
        "two_process_speedup_m": round(best["M", 1] / best["M", 2], 3),
        "one_process_documents_per_s": round(2 * args.process_batch / both[1], 3),
        "two_process_documents_per_s": round(2 * args.process_batch / both[2], 3),
        "process_update_seconds": {f"{phase}{count}": round(s, 2) for (phase, count), s in best.items()},
        "process_batch": args.process_batch,
        "process_tokens": args.process_tokens,
        "process_rounds": args.process_rounds,
    }
