"""The command line of ``megamoe check``."""

from __future__ import annotations

from typing import Any

from megamoe.cases import KINDS, TIERS
from megamoe.commands.options import (
    DEFAULT_WORKERS,
    add_case,
    add_contract,
    add_reports,
    at_least_one,
    seconds,
)
from megamoe.commands.parsers.names import ALL_PICTURES, PICTURES


def add(commands: Any, command: Any) -> None:
    """The parser of ``check``."""
    c = command(commands, "check", "judge a backend against the goldens", "check.run")
    c.set_defaults(backend_is="here")
    c.add_argument("--backend", required=True, help="a name, or path/to/file.py:OBJECT_OR_FACTORY")
    c.add_argument("--kind", choices=KINDS, help="only cases of this kind")
    c.add_argument("--tier", choices=TIERS,
                   help="default: quick; full where a pattern or --failed is given")  # fmt: skip
    add_case(c, bare=True)
    add_contract(c)
    c.add_argument("--failed", metavar="REPORT", help="only cases that failed in a JSON report")
    c.add_argument("--shard", metavar="I/N", help="the I-th of N parts, balanced by duration")
    c.add_argument("-n", type=at_least_one, default=DEFAULT_WORKERS, metavar="N",
                   help=f"judging processes (default {DEFAULT_WORKERS})")  # fmt: skip
    c.add_argument("--workers", type=at_least_one, metavar="N",
                   help="processes that run it (default: 1 on a GPU, else as -n)")  # fmt: skip
    c.add_argument("--python", dest="interpreter", metavar="PYTHON",
                   help="the Python that runs the backend; it needs torch only")  # fmt: skip
    c.add_argument("--ep", type=at_least_one, metavar="N",
                   help="judge the cases of kind ep over N ranks of this machine")  # fmt: skip
    c.add_argument("--timeout", type=seconds, metavar="S",
                   help="seconds that the backend may take for a case (default 120)")  # fmt: skip
    c.add_argument("--load-timeout", type=seconds, metavar="S",
                   help="seconds until the backend is loaded (default 300)")  # fmt: skip
    lines = c.add_mutually_exclusive_group()
    lines.add_argument("--quiet", "-q", action="store_true",
                       help="while it runs, lines for reds only")  # fmt: skip
    lines.add_argument("--verbose", "-v", action="store_true",
                       help="while it runs, a line for every case")  # fmt: skip
    c.add_argument("--in-order", action="store_true",
                   help="one process judges the cases, in the order of their names in --case",
                   )  # fmt: skip
    c.add_argument("--maxfail", type=at_least_one, metavar="N", help="stop after N reds")
    c.add_argument("--pictures", type=_pictures, default=PICTURES, metavar="N",
                   help="the most pictures at the end and in a report, one for each symptom and "
                   f"kind (default {PICTURES}); `all`: every red, whole")  # fmt: skip
    c.add_argument("--explain-predictions", action="store_true",
                   help="which change of a model gives an output unlike its bits")  # fmt: skip
    add_reports(c)
    c.add_argument("--device", choices=("cpu", "cuda"), help="of the backend (default cpu)")


def _pictures(text: str) -> int:
    """A number from 1 on, or ``all``."""
    return ALL_PICTURES if text == "all" else at_least_one(text)
