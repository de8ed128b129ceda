"""The command line of ``megamoe capture``."""

from __future__ import annotations

import argparse
from typing import Any

from megamoe.commands.options import add_checkpoint


def add(commands: Any, command: Any) -> None:
    """The parser of ``capture``."""
    r = command(commands, "capture", "run a Python script, and record its call of the experts",
                "capture.run")  # fmt: skip
    r.add_argument("--out", metavar="FILE.safetensors", default="captured.safetensors")
    r.add_argument("--calls", type=int, default=1, metavar="N")
    r.add_argument("--skip", type=int, default=0, metavar="N", help="calls to let pass before")
    add_checkpoint(r)
    r.set_defaults(reads=("script",), example="engine.py", endings={"out": ".safetensors"})
    r.add_argument("script", metavar="SCRIPT.py")
    r.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
