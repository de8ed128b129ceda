"""The command ``megamoe``: parses and calls. Exit 2 and one line for whatever is misused."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final

import megamoe
from megamoe.commands import UsageError

VERBS: Final = {
    "check": "check", "golden": "golden", "contract": "contract", "merge": "merge",
    "oracle": "oracle", "bench": "bench", "list": "listing", "coverage": "coverage",
    "report": "report", "explain": "explain", "replay": "replay", "reduce": "reduce",
    "fuzz": "fuzz", "capture": "capture", "ab": "ab", "bisect": "bisect", "worker": "worker",
    "confirm": "confirm",
}  # fmt: skip
"""Verb to module of this folder, in the order of ``--help``. Each module has
``add(commands, command)``, where ``command(commands, name, help, run)`` returns the parser to add
arguments to. Only the module of the verb that is asked for is imported."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        given = sys.argv[1:] if argv is None else argv
        arguments = _parser(given).parse_args(given)
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


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
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

    for verb in given[:1] if given and given[0] in VERBS else VERBS:
        _module(verb).add(commands, command)
    return parser


def _module(verb: str) -> ModuleType:
    """The module of a verb. What an import makes stays, so no collection looks for garbage in it:
    that is a fifth of what it takes to import torch."""
    first, collects = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        module = importlib.import_module(f"megamoe.commands.{VERBS[verb]}")
        if first:
            gc.freeze()
    finally:
        if collects:
            gc.enable()
    return module
