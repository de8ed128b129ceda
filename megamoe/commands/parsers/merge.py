"""The command line of ``megamoe merge``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import add_reports


def add(commands: Any, command: Any) -> None:
    """The parser of ``merge``."""
    m = command(commands, "merge", "prove that shard reports hold each case once", "merge.run")
    m.set_defaults(example="shard-1.json shard-2.json")
    m.add_argument("reports", nargs="+", metavar="REPORT")
    add_reports(m)
