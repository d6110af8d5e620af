"""The console script `ra3`: finds the command and loads nothing else, so that `ra3 --help` is quick."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import select
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import FrameType

from .early import check_config, refuse_early
from .helps import HELPS


COMMANDS = {
    "train": "mid-train a causal language model on expert text (--dry_run says what it would take)",
    "annotate": "splice latents of a checkpoint into a corpus and save it as a dataset",
    "show": "a file as a checkpoint sees it: P(think), latents and their gains, in the terminal or as a page",
    "play": "a local page to type code in: P(think), latents and their gains, completions with and without thinking",
    "evaluate": "pass@k of a checkpoint on HumanEval, MBPP or problems of your own, run in a sandbox",
    "rlvr": "RL post-training on programs and their tests, with TRL's GRPOTrainer",
    "compare": "checkpoints side by side: pass@k, cross-entropy, latents and tokens, as a table and a picture",
    "diagnose": "the theory's measures of a checkpoint: how long latents last, how many there are, what they rule out",
    "report": "what runs did, as one page and pictures: phases, RLVR, annotated programs",
    "demo": "what RA3 is for, in minutes: a tiny model by next-token prediction and by RA3, side by side",
    "env": "versions and devices, for bug reports",
}
_EXAMPLES = """examples:
  ra3 demo
  ra3 train --model_name_or_path Qwen/Qwen2.5-Coder-0.5B --code_dir src --output_dir qwen-ra3
  ra3 show qwen-ra3 src/area.py --html page.html

`ra3 COMMAND --help` has its options. With RA3_TRACEBACK=1 errors come with their traceback."""
_MOST = 2000  # characters of an error


def called() -> str:
    """What the user types for `ra3`: its path where it is not on PATH, as in the checkout of `make demo`."""
    return sys.argv[0] if Path(sys.argv[0]).name == "ra3" and shutil.which("ra3") is None else "ra3"


def guarded(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Exit code of `command(argv)`: what the user can mend is printed without a traceback (2), Ctrl-C is 130."""
    try:
        with _interrupts():
            try:
                return command(argv)
            finally:
                sys.stdout.flush()  # where an error of it is still caught
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        if os.environ.get("RA3_TRACEBACK"):
            raise
        text = re.sub(r"\s*\n\s*", " ", str(error).strip())  # what was read may stand in it, however long
        print(f"error: {text if len(text) <= _MOST else text[:_MOST] + '...'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether what is printed goes to a pipe that was closed, as by `| head`; the rest of it goes nowhere then."""
    asked = select.poll()
    asked.register(1, 0)  # of errors there is always word
    gone = any(event & select.POLLERR for _, event in asked.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


@contextmanager
def _interrupts() -> Iterator[None]:
    """Inside, the first Ctrl-C is a `KeyboardInterrupt`, after which things end in order; a second one ends the
    process where it stands. Files are whole at any time, and programs in the sandbox end with it."""

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        raise KeyboardInterrupt

    # Not where somebody else listens, or where Ctrl-C is to be ignored, as in the background of a shell.
    listens = threading.current_thread() is threading.main_thread()
    if not listens or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, first)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is first:  # else the process is on its way out
            signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: list[str] | None = None) -> int:
    """Runs `ra3 COMMAND ...`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in COMMANDS:  # for help, version and errors only: each command parses its own options
        parser = argparse.ArgumentParser(
            prog="ra3",
            description="RA3 mid-training, in TRL's manner: teaches a language model to think where that pays.",
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--version", action="version", version=f"ra3-trl {metadata.version('ra3-trl')}")
        commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
        for name, text in COMMANDS.items():
            commands.add_parser(name, help=text, add_help=False)
        parser.parse_args(argv or ["--help"])
    return guarded(lambda words: _run(argv[0], words), argv[1:])


def _run(command: str, words: list[str]) -> int:
    """Says what needs no torch: the short help, and what is wrong with the words. Then loads the command, inside of
    [`guarded`], since that takes seconds, in which an interrupt should end it as at any other time."""
    if {"-h", "--help"} & set(words):
        print(HELPS[command].text(command))
        raise SystemExit(0)
    words = ["--help" if word in ("--help-all", "--help_all") else word for word in words]
    if "--help" not in words:
        check_config(command, words)
        refuse_early(command, words)
    return int(importlib.import_module(f".{command}", __package__).main(words))


if __name__ == "__main__":
    raise SystemExit(main())
