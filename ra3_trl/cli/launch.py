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

from ..files import is_a
from ..kinds import shown
from .main import called
from .parser import TrainParser, read_config, read_yaml, refuse_unknown, without_theirs


LAUNCHED = "RA3_LAUNCHED"  # set in the processes that accelerate starts; holds the user's command
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def config_file(name: str) -> Path:
    """Finds the YAML file that `--accelerate_config` names: a path, or one of those that trl brings along."""
    if Path(name).is_file():
        return Path(name)
    folder = Path(str(resources.files("trl") / "accelerate_configs"))
    if (folder / f"{name}.yaml").is_file():
        return folder / f"{name}.yaml"
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise ValueError(f"`accelerate_config` is {name!r}, neither a file nor one of {names}.")


def _without(argv: list[str], option: str) -> list[str]:
    """`argv` less an option and its value."""
    at = argv.index(option) if option in argv else len(argv)
    return argv[:at] + argv[at + 2 :]


def launch_command(parser: TrainParser, argv: list[str]) -> list[str] | None:
    """The `accelerate launch` command for `argv`, `None` if it is not asked for."""
    names = parser.option_names() | {"env"}
    others = {key: value for key, value in read_config(argv).items() if key not in names and not parser.is_theirs(key)}
    in_file = {f"--{key}": str(value) for key, value in others.items()}
    if "--accelerate_config" not in [*argv, *in_file]:
        return None
    _, unknown = parser.parse_known_args(_without(argv, "--config"))
    options = [*(word for item in in_file.items() for word in item), *unknown]
    file = config_file(options[options.index("--accelerate_config") + 1])
    # What this parser does not know is for the launcher; argparse leaves it in order, so the rest is the command's.
    command_argv = []
    for word in argv:
        if unknown and word == unknown[0]:
            unknown.pop(0)
        else:
            command_argv.append(word)
    settings = read_yaml(file, "--accelerate_config")
    says_device = any(word.partition("=")[0] in ("--use_cpu", "--use-cpu") for word in command_argv)
    if isinstance(settings, dict) and settings.get("use_cpu") is True and not says_device:
        command_argv.append("--use_cpu")  # else each of accelerate's processes would take itself for the only one
    launcher = ["accelerate.commands.launch", "--config_file", str(file), *_without(options, "--accelerate_config")]
    module = f"{__package__}.{parser.prog.rpartition(' ')[2]}"
    return [sys.executable, "-m", *launcher, "-m", module, *command_argv]


def asked_processes(parser: TrainParser, argv: list[str]) -> int:
    """How many processes `--accelerate_config` and the launcher's options ask for; 1 without."""
    command = launch_command(parser, argv)
    if command is None:
        return 1
    words = [word for piece in command for word in piece.split("=", 1)]
    if "--num_processes" in words:
        return int(words[words.index("--num_processes") + 1])
    path = Path(words[words.index("--config_file") + 1])
    settings = read_yaml(path, "--accelerate_config")
    count = settings.get("num_processes", 1) if isinstance(settings, dict) else 1
    if not is_a(count, int):
        raise ValueError(f"`num_processes` of {path} is {shown(count)}; give a whole number.")
    return count


def read_arguments(parser: TrainParser, argv: list[str], here: bool = False) -> tuple[list[Any], str, int | None]:
    """Parses the arguments of a run; where `--accelerate_config` asks for other processes these run it, unless `here`.

    Returns:
        One object of each of the parser's types, what the user typed, and the exit code of the other processes.
    """
    typed = os.environ.get(LAUNCHED) or shlex.join([called(), *parser.prog.split()[1:], *argv])
    argv = without_theirs(argv, parser)
    with parser.naming_its_file():
        command = None if LAUNCHED in os.environ else launch_command(parser, argv)
    if command is not None and not here:
        return [], typed, launch(command, typed)
    with parser.naming_its_file():
        *arguments, in_file, unknown = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
        if LAUNCHED not in os.environ and command is None:  # else they are options of `accelerate launch`
            refuse_unknown([*unknown, *in_file], parser)
    check_world(arguments[1].world_size)
    return arguments, typed, None


def check_world(world_size: int) -> None:
    """Refuses processes that do not know of each other (`world_size` is 1): all would write the same checkpoints."""
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > 1 and world_size == 1:
        raise ValueError(
            f"`use_cpu` is False and there is no accelerator for the {started} processes that were started: pass "
            "`--use_cpu`, or start one process."
        )


def launch(command: list[str], typed: str) -> int:
    """Runs an `accelerate launch` command; signals go on to the training processes, which save and say how to go on.

    Returns the command's exit code; after a signal that ended it 128 + its number, as shells say it. `typed` is what
    the user typed, for the message of an interrupted run.
    """
    sent: list[int] = []
    # In a session of its own, so that a terminal's Ctrl-C does not come twice.
    process = subprocess.Popen(command, env={**os.environ, LAUNCHED: typed}, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        sent.append(number)
        # Past `accelerate launch`, which would kill its processes 30 seconds later, saved or not; to itself only
        # while it has started none.
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(process.pid)
            for child in launcher.children() or [launcher]:
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
