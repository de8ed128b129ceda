"""The command line of ``megamoe golden``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import add_case, add_jobs
from megamoe.commands.parsers import bits, predictions


def add(commands: Any, command: Any) -> None:
    """The parsers of ``golden`` and its acts."""
    g = commands.add_parser("golden", help="record, diff, bless, verify")
    acts = g.add_subparsers(required=True, metavar="VERB")
    for name, text, run in (
        ("record", "compute candidates with the oracle", "golden.run_record"),
        ("verify", "recompute the goldens; they must be equal in every bit", "golden.run_verify"),
    ):
        r = command(acts, name, text, run)
        add_case(r)
        add_jobs(r)
    command(acts, "diff", "what blessing the candidates would change", "golden.run_diff")
    b = command(
        acts,
        "bless",
        "make the candidates the goldens; refuses where CI is set",
        "golden.run_bless",
    )
    b.add_argument("--durations", nargs="+", metavar="REPORT",
                   help="instead: take the cases' seconds from JSON reports")  # fmt: skip
    bits.add(acts, command)
    predictions.add(acts, command)
    r = command(
        acts,
        "import",
        "make a stored problem a case, and record its candidate",
        "golden.run_import",
    )
    r.add_argument("file", metavar="FILE.safetensors")
    r.add_argument("--name", help="of the case; default: the file's")
    r.add_argument("--breaks", metavar="SENTENCE", help="what is broken if it fails")
