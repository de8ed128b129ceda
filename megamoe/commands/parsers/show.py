"""The command line of ``megamoe show``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import add_case


def add(commands: Any, command: Any) -> None:
    """The parser of ``show``."""
    s = command(commands, "show", "sizes, recipe, judgement and contracts of a case", "show.run")
    add_case(s, bare=True)
    s.set_defaults(needs_case=True, takes_file=True)
    s.add_argument("--json", action="store_true", help="an array of objects")
