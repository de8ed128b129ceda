"""The command line of ``megamoe worker``."""

from __future__ import annotations

from typing import Any


def add(commands: Any, command: Any) -> None:
    """The parser of ``worker``."""
    c = command(
        commands, "worker", "write the worker as one file that needs torch only", "worker.run"
    )
    c.set_defaults(endings={"out": ".py"})
    c.add_argument("--out", metavar="FILE.py", default="megamoe_worker.py")
