"""The command line of ``megamoe coverage``."""

from __future__ import annotations

from typing import Any

from megamoe.cases import KINDS, TIERS
from megamoe.commands.options import add_case, add_jobs


def add(commands: Any, command: Any) -> None:
    """The parser of ``coverage``."""
    c = command(
        commands, "coverage", "what the cases enter, and what no case enters", "coverage.run"
    )
    c.add_argument("--kind", choices=KINDS)
    c.add_argument("--tier", choices=TIERS, help="default: full")
    add_case(c)
    c.add_argument("--contract", metavar="REV", help="whose bytes and branches are the goal "
                   "(default: the newest)")  # fmt: skip
    c.add_argument("--dimension", metavar="NAME", help="only this one, with every class")
    c.add_argument("--traffic", metavar="DIR", help="what of the calls that `megamoe capture` "
                   "wrote there no case enters")  # fmt: skip
    c.add_argument("--record", action="store_true", help="keep what was counted in golden/: "
                   "coverage.json, and holes.toml without the closed ones")  # fmt: skip
    c.add_argument("--json", metavar="FILE")
    c.add_argument("--page", metavar="FILE.html")
    add_jobs(c)
