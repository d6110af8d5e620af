"""`python -m benchmarks rollout --json`: runs one benchmark and prints what it measured."""

from __future__ import annotations

import argparse
import json
import sys

from . import (
    annotate,
    architectures,
    cost,
    head,
    launches,
    phases,
    picture,
    proposals,
    replication,
    rollout,
    sandbox,
    traces,
)


BENCHMARKS = {
    "annotate": annotate,
    "architectures": architectures,
    "cost": cost,
    "rollout": rollout,
    "phases": phases,
    "launches": launches,
    "head": head,
    "proposals": proposals,
    "sandbox": sandbox,
    "traces": traces,
    "replication": replication,
    "picture": picture,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        command = commands.add_parser(name, description=module.__doc__, help=module.__doc__.split("\n")[0])
        command.add_argument("--json", action="store_true", help="print one JSON object only; progress goes to stderr")
        module.add_arguments(command)
    args = parser.parse_args(argv)
    result = BENCHMARKS[args.benchmark].run(args)
    if args.json:
        json.dump(result, sys.stdout)
        print()
        return
    for key, value in result.items():
        print(f"{key:26} {value}")


if __name__ == "__main__":
    main()
