"""The command line of ``megamoe bench``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import at_least_one
from megamoe.commands.parsers.names import DEFAULT_SHARES, PEERS, SHARES


def add(commands: Any, command: Any) -> None:
    """The parser of ``bench``."""
    b = command(commands, "bench", "time a backend beside the floor and beside peers", "bench.run")
    b.set_defaults(backend_is="here", reads=("source",))
    b.add_argument("--backend", help="default: triton, and eager with --device cpu; without "
                   "--ep it must have `run`")  # fmt: skip
    b.add_argument("--ep", type=at_least_one, metavar="N",
                   help="the layer over N ranks of this machine, or of torchrun, in place of one "
                   "GPU: its stages and the link; --tokens are those of each rank")  # fmt: skip
    b.add_argument("--device", choices=("cpu", "cuda"), default="cuda",
                   help="default: cuda; cpu goes with --ep")  # fmt: skip
    b.add_argument("--share", nargs="+", choices=SHARES, default=list(DEFAULT_SHARES),
                   help=f"of which models (default {' '.join(DEFAULT_SHARES)})")  # fmt: skip
    b.add_argument("--tokens", nargs="+", type=at_least_one, metavar="T",
                   default=[1, 2, 4, 8, 16, 32, 64, 512, 2048, 8192])  # fmt: skip
    b.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    b.add_argument("--repeats", type=at_least_one, default=15, metavar="N")
    b.add_argument("--json", metavar="FILE", help="rows and what made them, saved row by row")
    b.add_argument("--plot", metavar="FILE.svg")
    b.add_argument("--from", dest="source", metavar="FILE",
                   help="time nothing: the table and plot of an earlier --json")  # fmt: skip
    b.add_argument("--dry-run", action="store_true", help="list what would be timed")
    b.add_argument("--scale", action="store_true",
                   help="time nothing: bytes and floors of EP 8 to 512 on published link speeds, "
                   "by arithmetic; --tokens are those of each rank")  # fmt: skip
