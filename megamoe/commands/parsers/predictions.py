"""The command line of ``megamoe predictions``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import add_jobs


def add(acts: Any, command: Any) -> None:
    """The parsers of the three acts."""
    p = command(acts, "predict", "compute the bits of the SM100 kernel's model as candidates",
                "predictions.run_predict")  # fmt: skip
    p.add_argument("--case", metavar="GLOB", help="a part; the candidate keeps its other cases")
    command(acts, "bless-predictions", "make them predicted goldens; refuses where CI is set",
            "predictions.run_bless")  # fmt: skip
    v = command(
        acts, "verify-predictions", "compute the predicted goldens again", "predictions.run_verify"
    )
    v.add_argument("--case", metavar="GLOB")
    for each in (p, v):
        each.add_argument("--envelope", action="store_true",
                          help="judge each by its derived golden too")  # fmt: skip
        add_jobs(each)
