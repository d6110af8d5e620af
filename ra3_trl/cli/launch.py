"""`--accelerate_config`: the same command in several processes, through `accelerate launch`."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml

from .parser import TrainParser, read_config, refuse_unknown


LAUNCHED = "RA3_LAUNCHED"  # set in the processes that accelerate starts; holds the user's command
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def config_file(name: str) -> Path:
    """The YAML file that `--accelerate_config` names: a path, or one of those that trl brings along.

    Raises:
        `ValueError`: if there is neither.
    """
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(resources.files("trl") / "accelerate_configs"))
    if (folder / f"{name}.yaml").is_file():
        return folder / f"{name}.yaml"
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"`accelerate_config` is {name!r}, neither a file nor one of {known}.")


def without(argv: list[str], removed: list[str]) -> list[str]:
    """`argv` less the subsequence `removed`: `without(["a", "b", "c"], ["b"]) == ["a", "c"]`."""
    left, out = list(removed), []
    for argument in argv:
        if left and argument == left[0]:
            left.pop(0)
        else:
            out.append(argument)
    return out


def launch_command(parser: TrainParser, argv: list[str]) -> list[str] | None:
    """The `accelerate launch` command for `argv`, `None` if it is not asked for."""
    names = parser.option_names() | {"env"}
    config = [
        word for key, value in read_config(argv).items() if key not in names for word in (f"--{key}", str(value))
    ]
    if "--accelerate_config" not in [*argv, *config]:
        return None
    plain = without(argv, ["--config", argv[argv.index("--config") + 1]]) if "--config" in argv else argv
    _, unknown = parser.parse_known_args(plain)
    options = [*config, *unknown]
    at = options.index("--accelerate_config")
    file, options = config_file(options[at + 1]), options[:at] + options[at + 2 :]
    own = without(argv, unknown)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *options]
    module = f"{__package__}.{parser.prog.rpartition(' ')[2]}"
    return [*launcher, "-m", module, *own, *_on_cpu(file, own)]


def _on_cpu(file: Path, argv: list[str]) -> list[str]:
    """`--use_cpu` where accelerate's file says so: each of its processes would take itself for the only one else."""
    settings = yaml.safe_load(file.read_text("utf-8"))
    said = any(word.partition("=")[0] in ("--use_cpu", "--use-cpu") for word in argv)
    wanted = isinstance(settings, dict) and settings.get("use_cpu") is True
    return ["--use_cpu"] if wanted and not said else []


def read_arguments(parser: TrainParser, argv: list[str], here: bool = False) -> tuple[list[Any], str, int | None]:
    """The arguments of a run, unless `--accelerate_config` makes others run it.

    Args:
        parser ([`TrainParser`]):
            The command's.
        argv (`list[str]`):
            Its arguments, [`~ra3_trl.cli.parser.normalise`]d.
        here (`bool`, *optional*, defaults to `False`):
            Do not start other processes.

    Returns:
        `tuple[list[Any], str, int | None]`: one object of each of the parser's types, what the user typed, and the
        exit code where other processes did the work.
    """
    typed = os.environ.get(LAUNCHED) or shlex.join([*parser.prog.split(), *argv])
    command = None if LAUNCHED in os.environ else launch_command(parser, argv)
    if command is not None and not here:
        return [], typed, launch(command, typed)
    *parts, in_file, unknown = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    if LAUNCHED not in os.environ and command is None:  # else they are options of `accelerate launch`
        refuse_unknown([*unknown, *in_file], parser)
    check_world(parts[1].world_size)
    return parts, typed, None


def check_world(world_size: int) -> None:
    """Refuses processes that do not know of each other, which would all write the same checkpoints.

    Args:
        world_size (`int`):
            How many processes the training arguments found.

    Raises:
        `ValueError`: if the launcher started more.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > 1 and world_size == 1:
        raise ValueError(
            f"`use_cpu` is False and there is no accelerator for the {started} processes that were started: pass "
            "`--use_cpu`, or start one process."
        )


def launch(command: list[str], typed: str) -> int:
    """Runs `command`; SIGINT (Ctrl-C), SIGTERM and SIGHUP go on to the training processes, which save and say how to
    go on.

    They go past `accelerate launch`: it would kill its processes 30 seconds later, saved or not.

    Args:
        command (`list[str]`):
            An `accelerate launch` command.
        typed (`str`):
            What the user typed, for the message of an interrupted run.

    Returns:
        `int`: the command's exit code; after a signal that ended it 128 + its number, as shells say it.
    """
    sent: list[int] = []
    # In a session of its own, so that a terminal's Ctrl-C does not come twice.
    process = subprocess.Popen(command, env={**os.environ, LAUNCHED: typed}, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        sent.append(number)
        for child in _training_processes(process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    heeded = [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores one
    before = {number: signal.signal(number, forward) for number in heeded}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code and sent:
        name = signal.Signals(sent[-1]).name
        print(f"{name} went on to the training; what it said is above the launcher's report.", file=sys.stderr)
        return 128 + sent[-1]
    return code if code >= 0 else 128 - code


def _training_processes(launcher: int) -> list[psutil.Process]:
    """The processes that `accelerate launch` has started, or itself before it has."""
    try:
        process = psutil.Process(launcher)
        return process.children() or [process]
    except psutil.NoSuchProcess:
        return []
