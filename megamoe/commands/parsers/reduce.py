"""The command line of ``megamoe reduce``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import EXAMPLE, add_backend


def add(commands: Any, command: Any) -> None:
    """The parser of ``reduce``."""
    r = command(
        commands, "reduce", "shrink a failing case to the smallest file that fails", "reduce.run"
    )
    r.set_defaults(case_is="subject", example=f"{EXAMPLE} --backend FILE.py:CLASS")
    r.add_argument("subject", metavar="CASE",
                   help="one forward case, by its id or name, or a stored problem's file",
                   )  # fmt: skip
    add_backend(r, required=True)
    r.add_argument("--out", metavar="FILE.safetensors",
                   help="a new file; none is ever overwritten (default: the first free name of "
                   "reduced-CASE.safetensors, reduced-CASE-2.safetensors, ...)")  # fmt: skip
    r.add_argument("--after", action="store_true",
                   help="CASE passes alone and is red among others: find the earlier case after "
                   "which it fails")  # fmt: skip
    r.add_argument("--among", metavar="CASES",
                   help="with --after: look among these earlier cases only, as in "
                   "'forward/a,forward/b', in this order")  # fmt: skip
    r.add_argument("--first", metavar="CASES",
                   help="with --after: try these earlier cases before all others")  # fmt: skip
    r.add_argument(
        "--seconds", type=float, default=100.0, help="to shrink or to look (default 100)"
    )
