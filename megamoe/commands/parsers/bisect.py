"""The command line of ``megamoe bisect``."""

from __future__ import annotations

import argparse
from typing import Any

from megamoe.commands import UsageError
from megamoe.commands.options import add_comparison, at_least_one


def add(commands: Any, command: Any) -> None:
    """The parser of ``bisect``."""
    c = command(commands, "bisect", "which commit, version or input moved the bits", "bisect.run")
    c.set_defaults(folders=("state",), combination=_combination)
    c.add_argument("--good", metavar="REV", help="a git revision whose bits are right")
    c.add_argument("--bad", metavar="REV", help="a later one whose bits are not")
    c.add_argument("--only", nargs="+", default=[], metavar="PATH",
                   help="try only commits that touch these")  # fmt: skip
    c.add_argument("--over", nargs="+", default=[], metavar="SIDE",
                   help="instead of commits: a list of what `ab` takes, the good one first, the "
                   "bad one last; NAME==1,2 and flake:INPUT=URL,URL are short forms")  # fmt: skip
    c.add_argument("--judge", action="store_true",
                   help="bad is what the goldens say is bad, instead of other bits than the good "
                   "end's")  # fmt: skip
    c.add_argument("--run", dest="script", metavar="COMMAND",
                   help="bad is where this fails; 125 skips, as in `git bisect run`; "
                   "$MEGAMOE_PYTHON is the interpreter")  # fmt: skip
    c.add_argument(
        "--repeat",
        type=at_least_one,
        default=2,
        metavar="N",
        help="runs of a step, in processes of their own, that must agree (default 2)",
    )
    c.add_argument("--state", metavar="DIR", help="where the search is logged, to go on after a "
                   "kill (default: a folder in the cache)")  # fmt: skip
    c.add_argument("--fresh", action="store_true", help="forget what an earlier run found out")
    c.add_argument("--archive", metavar="FILE.tar.gz", help="default: in the state")
    add_comparison(c)


def _combination(a: argparse.Namespace) -> None:
    """``UsageError`` where no range is given, or two, or two answers to what is bad."""
    if bool(a.over) == bool(a.good or a.bad) or bool(a.good) != bool(a.bad):
        raise UsageError("say where to look: --good REV --bad REV, or --over GOOD ... BAD")
    if a.over and a.only:
        raise UsageError("--only is for commits; name what to try in --over")
    if a.judge and a.script:
        raise UsageError("--judge and --run are two answers to what is bad; give one")
