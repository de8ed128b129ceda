"""The command line of ``megamoe oracle``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import add_contract


def add(commands: Any, command: Any) -> None:
    """The parser of ``oracle``."""
    o = command(commands, "oracle", "write a case's inputs and every oracle stage", "oracle.run")
    o.set_defaults(case_is="one")
    o.add_argument("--case", required=True, metavar="ID")
    o.add_argument("--out", required=True, metavar="FILE.safetensors")
    add_contract(o)
