"""The command line of ``megamoe replay``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import add_backend, add_checkpoint
from megamoe.spec.accumulators import CLASSES


def add(commands: Any, command: Any) -> None:
    """The parser of ``replay``."""
    r = command(commands, "replay", "judge a stored problem: a backend, or what was recorded",
                "replay.run")  # fmt: skip
    r.set_defaults(stored=("file",), example="reduced-CASE.safetensors --backend FILE.py:CLASS")
    r.add_argument("file", metavar="FILE.safetensors")
    add_backend(r, required=False)
    r.add_argument("--accumulator", choices=sorted(CLASSES), metavar="CLASS",
                   help="of what was recorded; default: as the file says")  # fmt: skip
    add_checkpoint(r)
    r.add_argument("--json", metavar="FILE")
