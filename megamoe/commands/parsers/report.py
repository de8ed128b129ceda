"""The command line of ``megamoe report``."""

from __future__ import annotations

from typing import Any


def add(commands: Any, command: Any) -> None:
    """The parser of ``report``."""
    c = command(commands, "report", "a result as an HTML file, or in the terminal", "report.run")
    c.set_defaults(example="out.json -o report.html")
    c.add_argument(
        "result", metavar="RESULT.json", help="what --json of check, merge, ab or bisect wrote"
    )
    c.add_argument("-o", dest="out", metavar="FILE.html", help="default: print it here")
