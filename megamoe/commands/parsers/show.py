"""The command line of ``megamoe show``."""

from __future__ import annotations

from typing import Any


def add(commands: Any, command: Any) -> None:
    """The parser of ``show``."""
    s = command(commands, "show", "sizes, recipe, judgement and contracts of a case", "show.run")
    s.set_defaults(case_is="pattern")
    s.add_argument("case", metavar="CASE", help="an id, a name or a pattern, as --case takes")
    s.add_argument("--json", action="store_true", help="an array of objects")
