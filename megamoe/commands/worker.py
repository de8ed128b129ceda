"""``megamoe worker``: write the worker as one file."""

from __future__ import annotations

import argparse
from pathlib import Path

from megamoe.files import write_atomically
from megamoe.worker import single


def run(a: argparse.Namespace) -> int:
    """Write the file, and say how to run it."""
    out = Path(a.out)
    if out.suffix != ".py" or out.is_dir():
        raise ValueError(f"--out {out}: name a file that ends in .py")
    write_atomically(out, single.source().encode())
    print(f"{out}: run it with a Python that has torch; docs/protocol.md says what it is told")
    return 0
