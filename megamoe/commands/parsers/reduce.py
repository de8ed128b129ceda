"""The command line of ``megamoe reduce``."""

from __future__ import annotations

import argparse
from typing import Any

from megamoe.cases.pattern import PROBLEM_SUFFIX
from megamoe.commands import UsageError
from megamoe.commands.options import EXAMPLE, add_backend, seconds


def add(commands: Any, command: Any) -> None:
    """The parser of ``reduce``."""
    r = command(
        commands, "reduce", "shrink a failing case to the smallest file that fails", "reduce.run"
    )
    r.set_defaults(case_is="subject", example=f"{EXAMPLE} --backend FILE.py:CLASS", new=("out",),
                   combination=_combination)  # fmt: skip
    r.add_argument("subject", metavar="CASE",
                   help="one forward case, by its id or name, or a stored problem's file",
                   )  # fmt: skip
    add_backend(r, required=True)
    r.add_argument("--out", metavar="FILE.safetensors",
                   help="a new file; none is ever overwritten (default: the first free name of "
                   "reduced-CASE.safetensors, reduced-CASE-2.safetensors, ...)")  # fmt: skip
    r.add_argument("--after", action="store_true",
                   help="CASE passes alone and is red among others: find the earlier case after "
                   "which it fails")  # fmt: skip
    r.add_argument("--among", metavar="CASES",
                   help="with --after: look among these earlier cases only, as in "
                   "'forward/a,forward/b', in this order")  # fmt: skip
    r.add_argument("--first", metavar="CASES",
                   help="with --after: try these earlier cases before all others")  # fmt: skip
    r.add_argument("--seconds", type=seconds, default=100.0, metavar="S",
                   help="to shrink or to look (default 100)")  # fmt: skip


def _combination(a: argparse.Namespace) -> None:
    """``UsageError`` for options that do not go with ``--after``, or only with it."""
    if a.after and a.out:
        raise UsageError("--out: --after writes no file; leave one of the two out")
    if a.after and a.subject.endswith(PROBLEM_SUFFIX):
        raise UsageError(f"--after: {a.subject} holds one call and no case; name a case")
    for option in ("among", "first"):
        if getattr(a, option) and not a.after:
            raise UsageError(f"--{option}: it is of --after; give both, or leave it out")
