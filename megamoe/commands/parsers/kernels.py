"""The command line of ``megamoe kernels``."""

from __future__ import annotations

from typing import Any


def add(commands: Any, command: Any) -> None:
    """The parser of ``kernels``."""
    c = command(
        commands, "kernels", "the published kernels: what each needs, and how it was judged",
        "kernels.run",
    )  # fmt: skip
    c.add_argument("name", metavar="NAME", nargs="?", help="everything about one kernel")
    c.add_argument(
        "--results", metavar="FILE.json", nargs="+", default=None,
        help="results of check --json: a table of their verdicts",
    )  # fmt: skip
    c.add_argument(
        "--report", metavar="DIR", help="write a static site of --results into this folder"
    )
    c.add_argument("--markdown", action="store_true", help="the table in Markdown")
    c.set_defaults(reads=("results",), folders=("report",))
