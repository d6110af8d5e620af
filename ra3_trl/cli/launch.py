"""`--accelerate_config`: the same command in several processes, through `accelerate launch`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

from .parser import TrainParser, read_config


LAUNCHED = "RA3_LAUNCHED"  # set in the processes that accelerate starts; holds the user's command


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
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), *options]
    return [*launcher, "-m", "ra3_trl.cli.train", *without(argv, unknown)]


def launch(command: list[str], typed: str) -> int:
    """Runs `command`; `typed` is what the user typed, for the message of an interrupted run."""
    with subprocess.Popen(command, env={**os.environ, LAUNCHED: typed}) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the processes got it too; they say how to go on
            process.wait()
            return 130
