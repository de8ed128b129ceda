"""The command line of ``megamoe listing``."""

from __future__ import annotations

from typing import Any

from megamoe.cases import KINDS, TIERS
from megamoe.commands.options import add_case


def add(commands: Any, command: Any) -> None:
    """The parser of ``list``."""
    s = command(commands, "list", "the cases", "listing.run")
    s.add_argument("--kind", choices=KINDS)
    s.add_argument("--tier", choices=TIERS)
    add_case(s, bare=True)
    s.add_argument("--json", action="store_true", help="an array of objects, a line a case")
