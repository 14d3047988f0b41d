"""The command line of the benchmarks: `python -m bench COMMAND`, run from the repository's root.

A command is a module of bench.commands with a docstring (its first line is the summary),
`add_arguments(parser)` and `run(args) -> exit code`. To add one, write the module and name it in COMMANDS.
"""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from bench.commands import (
    effect,
    figures,
    gradients,
    latency,
    memory,
    overhead,
    release,
    sharded,
    step,
    store,
    sweep,
    traffic,
    train,
)

COMMANDS: dict[str, ModuleType] = {
    "step": step,
    "sweep": sweep,
    "memory": memory,
    "overhead": overhead,
    "gradients": gradients,
    "release": release,
    "sharded": sharded,
    "traffic": traffic,
    "latency": latency,
    "effect": effect,
    "train": train,
    "figures": figures,
    "store": store,
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line, one subparser a command."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of agr_cuda's optimizers.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        description = module.__doc__ or ""
        subparser = subparsers.add_parser(
            name,
            help=description.partition("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code; bad arguments end the process with exit code 2."""
    args = build_parser().parse_args(arguments)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
