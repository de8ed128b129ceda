"""The command line of ``megamoe init``."""

from __future__ import annotations

from typing import Any


def add(commands: Any, command: Any) -> None:
    """The parser of ``init``."""
    c = command(commands, "init", "write a correct kernel to start from, and a CI file", "init.run")
    c.set_defaults(example="my-kernel")
    c.add_argument("dir", metavar="DIR", help="the root of your repository; made if it is missing")
