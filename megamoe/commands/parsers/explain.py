"""The command line of ``megamoe explain``."""

from __future__ import annotations

import argparse
from typing import Any

from megamoe.commands import UsageError
from megamoe.commands.options import EXAMPLE, add_backend, at_least_one
from megamoe.spec.accumulators import ACCUMULATORS, FP32
from megamoe.spec.stages import STAGES


def add(commands: Any, command: Any) -> None:
    """The parser of ``explain``."""
    c = command(
        commands, "explain", "why an output is wrong: stage, element and cause", "explain.run"
    )
    c.set_defaults(case_is="subject", example=f"{EXAMPLE} --backend FILE.py:CLASS",
                   combination=_combination)  # fmt: skip
    c.add_argument(
        "subject", metavar="CASE", help="a case's id or name, or a stored problem's file"
    )
    c.add_argument("--stage", choices=STAGES, metavar="STAGE",
                   help=f"show the worst element of this stage: {', '.join(STAGES)} "
                   "(default: of the first wrong stage)")  # fmt: skip
    c.add_argument("--token", type=int, metavar="T",
                   help="default: the worst element's, or 0")  # fmt: skip
    c.add_argument("--channel", type=int, metavar="H",
                   help="of y (staging: of x); default: the worst element's, or 0")  # fmt: skip
    c.add_argument("--full", action="store_true",
                   help="every number behind the element, in tables")  # fmt: skip
    c.add_argument("--accumulator", choices=sorted(ACCUMULATORS), metavar="CLASS",
                   help=f"default: the backend's, or the file's, or {FP32.name}")  # fmt: skip
    c.add_argument("--actual", metavar="FILE.safetensors",
                   help="an output of your kernel: y and any stages of all tokens; of a staging "
                   "case x, x_sf, topk_idx and topk_weights")  # fmt: skip
    add_backend(c, required=False)
    c.add_argument(
        "--top", type=at_least_one, default=3, metavar="N", help="contributions shown of a sum"
    )
    c.add_argument("--json", nargs="?", const="-", metavar="FILE", help="for machines")


def _combination(a: argparse.Namespace) -> None:
    """``UsageError`` for two outputs."""
    if a.actual and a.backend:
        raise UsageError("--actual and --backend both name an output; give one")
