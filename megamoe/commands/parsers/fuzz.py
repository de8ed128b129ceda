"""The command line of ``megamoe fuzz``."""

from __future__ import annotations

import os
from typing import Any

from megamoe.commands.options import add_backend, at_least_one, natural, seconds

WORKERS_OF_A_GPU = 4
"""A context of its own each; one problem leaves most of a GPU idle."""


def add(commands: Any, command: Any) -> None:
    """The parser of ``fuzz``."""
    f = command(commands, "fuzz", "judge a backend on random problems; reduce the first failure",
                "fuzz.run")  # fmt: skip
    f.set_defaults(new=("out",))
    add_backend(f, required=True)
    f.add_argument("--seconds", type=seconds, default=60.0, metavar="S",
                   help="for how long problems begin (default 60)")  # fmt: skip
    f.add_argument("--seed", type=natural, default=0, metavar="N",
                   help="which problems: the same everywhere (default 0)")  # fmt: skip
    f.add_argument("--problems", type=at_least_one, metavar="N",
                   help="stop after the first N numbers")  # fmt: skip
    f.add_argument("--only", type=natural, metavar="I", help="judge problem I of the seed alone")
    f.add_argument("--jobs", type=at_least_one, default=os.cpu_count() or 1, metavar="N",
                   help="judging processes (default: one a core)")  # fmt: skip
    f.add_argument("--workers", type=at_least_one, metavar="N",
                   help=f"processes that run it (default: as --jobs, at most {WORKERS_OF_A_GPU} on "
                   "a GPU)")  # fmt: skip
    f.add_argument("--wide", action="store_true",
                   help="also problems in which an operand with its scale factor is no bfloat16 "
                   "number; for a kernel that folds no scale into an operand")  # fmt: skip
    f.add_argument("--reduce-seconds", type=seconds, default=100.0, metavar="S",
                   help="to reduce the first failure (default 100)")  # fmt: skip
    f.add_argument("--out", metavar="FILE.safetensors",
                   help="of the failure, a new file; none is ever overwritten (default: the first "
                   "free name of fuzz-SEED-NUMBER.safetensors, fuzz-SEED-NUMBER-2.safetensors, "
                   "...)")  # fmt: skip
