"""The command ``megamoe``: parses and calls. Exit 2 and one line for whatever is misused."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

import megamoe
from megamoe.commands import (
    ab,
    bench,
    bisect,
    capture,
    check,
    contract,
    explain,
    fuzz,
    golden,
    listing,
    merge,
    oracle,
    reduce,
    replay,
    report,
    worker,
)
from megamoe.commands.shared import UsageError

VERBS: Final[tuple[ModuleType, ...]] = (
    check, golden, contract, merge, oracle, bench, listing, report, explain, replay, reduce,
    fuzz, capture, ab, bisect, worker,
)  # fmt: skip
"""In the order of ``--help``. Each has ``add(commands, command)``, where
``command(commands, name, help, run)`` returns the parser to add arguments to."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough; nothing more is to be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        # Everything megamoe raises on purpose is a ValueError of one line.
        print(f"megamoe: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("megamoe: stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megamoe", description=megamoe.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"megamoe {megamoe.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        parent: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = parent.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        made.set_defaults(run=run)
        made.add_argument("--golden", metavar="DIR", help="the directory golden/")
        return made

    for verb in VERBS:
        verb.add(commands, command)
    return parser
