"""Options that several verbs have, and the types of their values."""

from __future__ import annotations

import argparse
import math
import os
from typing import Any, Final

from megamoe.cases import KINDS, TIERS
from megamoe.cases.pattern import HELP

EXAMPLE: Final = "forward/bell-h256-i128-drifts"
"""A case of a message that says what to type: small, and its data tell causes apart."""
DEFAULT_WORKERS: Final = min(2, os.cpu_count() or 1)
"""A real model's case takes up to 2 GiB, so memory, not cores, sets the default."""


def at_least_one(text: str) -> int:
    """A whole number from 1 on."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return value


def natural(text: str) -> int:
    """A whole number from 0 to 2**64 - 1."""
    if not (text.isdecimal() and int(text) < 2**64):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2**64 - 1")
    return int(text)


def seconds(text: str) -> float:
    """A finite number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


class _JoinAction(argparse.Action):
    """A pattern that may be repeated; its values become one, with commas between them."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        before = [getattr(namespace, self.dest, None)]
        words = filter(None, before + (value if isinstance(value, list) else [value]))
        setattr(namespace, self.dest, ",".join(words) or None)


def add_case(parser: argparse.ArgumentParser, more: str = "", bare: bool = False) -> None:
    """``--case`` and ``-k``: which cases, by :mod:`megamoe.cases.pattern`; ``more`` is help.
    ``bare``: a pattern without an option is taken, too."""
    parser.set_defaults(case_is="pattern")
    if bare:
        parser.set_defaults(bare="case")
        parser.add_argument("case", nargs="*", metavar="PATTERN", action=_JoinAction, default=None,
                            help="which cases, as --case takes")  # fmt: skip
    parser.add_argument("--case", "-k", metavar="PATTERN", action=_JoinAction,
                        help=HELP.replace("%", "%%") + (f"; {more}" if more else ""))  # fmt: skip


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """``-j``: of the verbs that record or verify."""
    parser.add_argument("-j", type=at_least_one, default=DEFAULT_WORKERS, metavar="N",
                        help="processes")  # fmt: skip


def add_reports(parser: argparse.ArgumentParser) -> None:
    """The files of a report."""
    parser.add_argument("--json", metavar="FILE",
                        help="write a report, for programs and for `megamoe report`")  # fmt: skip
    parser.add_argument("--junit", metavar="FILE", help="write a report in JUnit's XML")


def add_backend(parser: argparse.ArgumentParser, required: bool) -> None:
    """The options that say which backend runs a problem at hand, and where."""
    parser.set_defaults(backend_is="here")
    parser.add_argument("--backend", required=required, metavar="B",
                        help="a name, or path/to/file.py:OBJECT_OR_FACTORY")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"))
    add_contract(parser)
    parser.add_argument("--python", dest="interpreter", metavar="PYTHON",
                        help="the Python that runs the backend")  # fmt: skip
    parser.add_argument("--timeout", type=seconds, metavar="SECONDS",
                        help="of the backend a call (default 120)")  # fmt: skip


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """What the weights of a recorded call are compared with."""
    parser.add_argument("--checkpoint", metavar="DIR",
                        help="compare the recorded weights with the safetensors files of this "
                        "folder, byte for byte")  # fmt: skip
    parser.add_argument("--verbose", "-v", action="store_true",
                        help="with --checkpoint: name every tensor that differs")  # fmt: skip


def add_contract(parser: argparse.ArgumentParser) -> None:
    """Under which contract is judged."""
    parser.add_argument("--contract", metavar="REV",
                        help="judge under this revision (default auto: the one that the backend "
                        "names or its kernel's headers show, else the newest)")  # fmt: skip


def add_comparison(c: argparse.ArgumentParser) -> None:
    """What ``ab`` and ``bisect`` compare, and how a side is built."""
    c.add_argument("--backend", default="eager", metavar="SPEC",
                   help="a name, or path/to/file.py:OBJECT, looked for in a revision's tree "
                   "first (default eager)")  # fmt: skip
    c.add_argument("--kind", choices=KINDS)
    c.add_argument("--tier", choices=TIERS, help="default: quick; full where --case is given")
    add_case(c)
    c.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_contract(c)
    c.add_argument("--timeout", type=seconds, default=120.0, help="seconds a case (default 120)")
    c.add_argument("--repo", metavar="DIR", help="the checkout whose revisions are meant (default: "
                   "the one that holds the current folder), or the folder of the flake (default: "
                   "megamoe's)")  # fmt: skip
    c.add_argument("--build", metavar="COMMAND", help="shell command run in a revision's tree; "
                   "$MEGAMOE_PYTHON is its interpreter")  # fmt: skip
    c.add_argument("--build-timeout", type=seconds, default=3600.0, metavar="S")
    c.add_argument(
        "--path",
        default=".",
        metavar="SUB",
        help="folder of a revision's tree that goes on the import path (default .)",
    )
    c.add_argument("--python", metavar="PYTHON",
                   help="interpreter of revisions and requirements; a relative path counts from "
                   "the tree (default: this one)")  # fmt: skip
    c.add_argument("--with", dest="extra", action="append", default=[], metavar="REQUIREMENT",
                   help="install this too, beside each revision or requirement")  # fmt: skip
    c.add_argument("--shell", default="default", help="dev shell of a flake (default: default)")
    c.add_argument("--json", metavar="FILE")
