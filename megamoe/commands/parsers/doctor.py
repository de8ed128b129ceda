"""The command line of ``megamoe doctor``."""

from __future__ import annotations

from typing import Any


def add(commands: Any, command: Any) -> None:
    """The parser of ``doctor``."""
    c = command(
        commands, "doctor", "what is installed here, what lacks, and what to do", "doctor.run"
    )
    c.add_argument("--json", action="store_true", help="one object: `ok`, and a list of `lines`")
