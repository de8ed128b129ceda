"""The command line of ``megamoe ab``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import add_comparison


def add(commands: Any, command: Any) -> None:
    """The parser of ``ab``."""
    c = command(commands, "ab", "run the same cases in two environments, bit for bit", "ab.run")
    c.set_defaults(example="HEAD~1 this --backend FILE.py:CLASS", sides="LEFT and RIGHT")
    c.add_argument("left", metavar="LEFT", help="this, an interpreter, a virtual environment, a "
                   "requirement, a git revision, or flake:INPUT=URL")  # fmt: skip
    c.add_argument("right", metavar="RIGHT")
    c.add_argument("--left-backend", metavar="SPEC", help="default: --backend")
    c.add_argument("--right-backend", metavar="SPEC", help="default: --backend")
    add_comparison(c)
