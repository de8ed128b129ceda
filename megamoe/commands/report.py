"""``megamoe report``: a result of ``check``, ``merge``, ``ab`` or ``bisect``, for a person to read.

It judges nothing: the exit status is 0 where a report was made, whatever colour it has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megamoe.console import Console
from megamoe.golden import write_atomically
from megamoe.report import terminal
from megamoe.report.page import page
from megamoe.report.read import read


def run(a: argparse.Namespace) -> int:
    """One HTML file where ``-o`` names one, else the terminal."""
    kind, result = read(Path(a.result))
    if a.out is None:
        terminal.show(kind, result, Console())
        return 0
    out = Path(a.out)
    if out.is_dir():
        raise ValueError(f"{out} is a directory; name a file, such as {out / 'report.html'}")
    if out.exists() and out.samefile(a.result):
        raise ValueError(f"{out} is the result itself; name another file")
    content = page(kind, result)
    write_atomically(out, content)
    print(f"{out}: {len(content) / 1024:.0f} KiB; open it in a browser")
    return 0
