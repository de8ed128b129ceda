"""``megamoe golden record-bits`` and ``bless-bits``: a backend's own bits as recorded goldens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from megamoe import golden
from megamoe.commands.options import add_case, add_contract, add_jobs
from megamoe.commands.shared import progress, root_of
from megamoe.console import Console
from megamoe.printable import counted
from megamoe.suite import bits
from megamoe.suite.settings import Settings
from megamoe.worker.choice import AUTO
from megamoe.worker.session import Identity

CANDIDATES: Final = "recorded-candidates"
"""Under golden/: what record-bits writes and bless-bits takes, where nothing else is said."""


def add(acts: Any, command: Any) -> None:
    """The parsers of both, among the acts of ``golden``."""
    r = command(acts, "record-bits", "a backend's own bits, if three runs agree", _record)
    r.add_argument("--backend", required=True, help="a name, or path/to/file.py:OBJECT_OR_FACTORY")
    r.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_contract(r)
    add_case(r, "for a trial: such a file cannot be blessed")
    r.add_argument("--out", metavar="DIR", help="default: golden/recorded-candidates")
    add_jobs(r)
    b = command(acts, "bless-bits", "make them recorded goldens; refuses where CI is set", _bless)
    b.add_argument("--from", dest="source", metavar="DIR",
                   help="default: golden/recorded-candidates")  # fmt: skip


def _record(a: argparse.Namespace) -> int:
    settings = Settings(
        a.backend, a.device, "forward", "full", a.case, a.contract or AUTO, golden=a.golden
    )
    out = Path(a.out) if a.out else settings.root / CANDIDATES
    if not a.out:
        golden.write_atomically(out / ".gitignore", b"*\n")
    console = Console(stderr=True)

    def said(identity: Identity) -> None:
        console.print(identity.judged_under, markup=False, highlight=False, soft_wrap=True)

    with progress("recording bits", None, console) as done:
        path, cases, declined = bits.record(settings, out, a.j, done, said)
    rest = f", {declined} declined by the backend" if declined else ""
    print(f"{path}: {counted(cases, 'case')}{rest}; three runs in two processes agree in every bit")
    return 0


def _bless(a: argparse.Namespace) -> int:
    root = root_of(a)
    source = Path(a.source) if a.source else root / CANDIDATES
    written = golden.recorded.bless(root, source, take=not a.source)
    print(f"{', '.join(map(str, written))}: blessed; commit {root / 'recorded'}")
    return 0
