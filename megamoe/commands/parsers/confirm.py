"""The command line of ``megamoe confirm``."""

from __future__ import annotations

import argparse
from typing import Any

from megamoe.commands import UsageError
from megamoe.commands.options import add_contract, add_jobs, at_least_one
from megamoe.commands.parsers.names import MODEL, MODELS


def add(commands: Any, command: Any) -> None:
    """The parser of ``confirm``."""
    c = command(
        commands,
        "confirm",
        "ask a chip what the models assume, or read what it said",
        "confirm.run",
    )
    c.add_argument("--out", metavar="FILE", help="where the GPU is: write what it computes")
    c.add_argument("--from", dest="source", metavar="FILE", help="elsewhere: read such a file")
    c.add_argument("--write", action="store_true",
                   help="with --from: keep its silu tables in megamoe/predict/silu/, and its bits "
                   "as a candidate for `golden bless-bits`")  # fmt: skip
    c.add_argument("--model", choices=MODELS, default=MODEL,
                   help=f"whose prediction the cases are (default {MODEL})")  # fmt: skip
    c.set_defaults(backend_is="here", combination=_combination, reads=("source",))
    c.add_argument("--backend", help="runs the predicted cases; without it none is asked")
    c.add_argument("--case", metavar="GLOB", help="a part of the predicted cases")
    c.add_argument("--outputs", type=at_least_one, default=1 << 20, metavar="N",
                   help="words of each instruction (default 1048576)")  # fmt: skip
    add_contract(c)
    add_jobs(c)


def _combination(a: argparse.Namespace) -> None:
    """``UsageError`` unless the file is one to write or one to read."""
    if bool(a.out) == bool(a.source):
        raise UsageError("confirm: give --out FILE where the GPU is, or --from FILE")
