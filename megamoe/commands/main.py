"""The command ``megamoe``: parses and calls. Exit 2 and one line for whatever is misused."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, Final

import megamoe
from megamoe.commands import early
from megamoe.commands.parser import Parser
from megamoe.printable import guard, printable

CLOSED_PIPE: Final = 128 + signal.SIGPIPE
"""Exit status where the output was closed, as of `head` before all was read."""

VERBS: Final = {
    "init": ("init", "write a correct kernel to start from, and a CI file"),
    "check": ("check", "judge a backend against the goldens"),
    "golden": ("golden", "record, diff, bless, verify"),
    "contract": ("contract", "revisions of the numerics contract, and which build follows which"),
    "merge": ("merge", "prove that shard reports hold each case once"),
    "oracle": ("oracle", "write a case's inputs and every oracle stage"),
    "bench": ("bench", "time a backend beside the floor and beside peers"),
    "list": ("listing", "the cases"),
    "show": ("show", "sizes, recipe, judgement and contracts of a case"),
    "doctor": ("doctor", "what is installed here, what lacks, and what to do"),
    "coverage": ("coverage", "what the cases enter, and what no case enters"),
    "kernels": ("kernels", "the published kernels: what each needs, and how it was judged"),
    "report": ("report", "a result as an HTML file, or in the terminal"),
    "explain": ("explain", "why an output is wrong: stage, element and cause"),
    "replay": ("replay", "judge a stored problem: a backend, or what was recorded"),
    "reduce": ("reduce", "shrink a failing case to the smallest file that fails"),
    "fuzz": ("fuzz", "judge a backend on random problems; reduce the first failure"),
    "capture": ("capture", "run a Python script, and record its call of the experts"),
    "ab": ("ab", "run the same cases in two environments, bit for bit"),
    "bisect": ("bisect", "which commit, version or input moved the bits"),
    "confirm": ("confirm", "ask a chip what the models assume, or read what it said"),
    "worker": ("worker", "write the worker as one file that needs torch only"),
    "completion": ("completion", "print a script that completes megamoe's words in a shell"),
}
"""Verb to module of this folder and what ``--help`` says of it, in the order of ``--help``. The
module of the same name in ``parsers/`` has its parser. Only the verb that is asked for is imported,
and only if its arguments are right: most verbs import torch, which takes two seconds."""


class _Help(argparse.HelpFormatter):
    """Leaves room for the longest verb: argparse does not count that verbs are indented."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        self._action_max_length = max(self._action_max_length, max(map(len, VERBS)) + 4)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        words = _words(sys.argv[1:] if argv is None else argv)
        arguments = _parser(words).parse_args(words)
        with guard():
            early.check(arguments)
            code: int = _function(arguments.run)(arguments)
        return _flush(code)
    except SystemExit as end:  # of --help and --version
        raise SystemExit(_flush(end.code if isinstance(end.code, int) else 0)) from None
    except BrokenPipeError:  # whoever reads has seen enough; nothing more is to be said there
        return _flush(CLOSED_PIPE)
    except (ValueError, OSError) as error:
        # Everything megamoe raises on purpose is a ValueError of one line.
        return _last_word(f"error: {' '.join(str(error).split())}", 2)
    except KeyboardInterrupt:
        return _last_word("stopped", 130)


def _words(words: Sequence[str]) -> Sequence[str]:
    """The command line; ``help VERB`` is ``VERB --help``."""
    return [*words[1:], "--help"] if words and words[0] == "help" else words


def _last_word(text: str, code: int) -> int:
    """Say one line on standard error, if somebody still reads there; the exit status."""
    with suppress(BrokenPipeError):
        print(printable(f"megamoe: {text}"), file=sys.stderr, flush=True)
    return _flush(code)


def _flush(code: int) -> int:
    """Write what is still buffered; the exit status, that of a closed pipe where nobody reads.

    A closed stream leads nowhere from here on: else Python flushes it again at its end and prints
    an error of its own.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or CLOSED_PIPE
    return code


def whole_parser() -> argparse.ArgumentParser:
    """The parser with the options of every verb; it imports all of their modules."""
    return _parser((), whole=True)


def _parser(words: Sequence[str], whole: bool = False) -> argparse.ArgumentParser:
    about = str(megamoe.__doc__).partition("\n")[0]
    parser = Parser(prog="megamoe", description=about, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"megamoe {megamoe.__version__}")
    commands = parser.add_subparsers(required=True, metavar="VERB")

    def command(parent: Any, name: str, text: str, run: str) -> argparse.ArgumentParser:
        child: argparse.ArgumentParser = parent.add_parser(name, help=text, description=text)
        child.set_defaults(run=run)
        child.add_argument("--golden", metavar="DIR", help="the directory golden/")
        return child

    if whole:
        for verb in VERBS:
            _parsers(verb).add(commands, command)
    elif words and words[0] in VERBS:
        _parsers(words[0]).add(commands, command)
    else:  # --help, --version or a mistake: names and texts are enough
        for verb, (_, text) in VERBS.items():
            commands.add_parser(verb, help=text)
    return parser


def _parsers(verb: str) -> ModuleType:
    return importlib.import_module(f"megamoe.commands.parsers.{VERBS[verb][0]}")


def _function(run: str) -> Callable[[argparse.Namespace], int]:
    """``"check.run"``: that function. What an import makes stays, so no collection looks for
    garbage in it: that is a fifth of what it takes to import torch."""
    name, _, function = run.partition(".")
    first, collects = "torch" not in sys.modules, gc.isenabled()
    gc.disable()
    try:
        module = importlib.import_module(f"megamoe.commands.{name}")
        if first:
            gc.freeze()
    finally:
        if collects:
            gc.enable()
    entry: Callable[[argparse.Namespace], int] = getattr(module, function)
    return entry
