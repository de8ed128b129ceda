"""``megamoe golden record-bits`` and ``bless-bits``: a backend's own bits as recorded goldens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from megamoe import golden
from megamoe.commands.shared import progress, root_of
from megamoe.console import Console
from megamoe.printable import quantity
from megamoe.suite import bits
from megamoe.suite.settings import Settings
from megamoe.worker.choice import AUTO
from megamoe.worker.session import Identity

CANDIDATES: Final = "recorded-candidates"
"""Under golden/: what record-bits writes and bless-bits takes, where nothing else is said."""


def run_record(a: argparse.Namespace) -> int:
    """Record the bits of a backend, if three runs agree."""
    settings = Settings(
        a.backend, a.device, "forward", "full", a.case, a.contract or AUTO, golden=a.golden
    )
    out = Path(a.out) if a.out else settings.root / CANDIDATES
    if not a.out:
        golden.write_atomically(out / ".gitignore", b"*\n")
    console = Console(stderr=True)

    def on_identity(identity: Identity) -> None:
        console.print(identity.contract_line, markup=False, highlight=False, soft_wrap=True)

    with progress("recording bits", None, console) as on_result:
        path, cases, refusals = bits.record(settings, out, a.j, on_result, on_identity)
    rest = f", {refusals} declined by the backend" if refusals else ""
    print(
        f"{path}: {quantity(cases, 'case')}{rest}; three runs in two processes agree in every bit"
    )
    return 0


def run_bless(a: argparse.Namespace) -> int:
    """Make the candidates the recorded goldens."""
    root = root_of(a)
    source = Path(a.source) if a.source else root / CANDIDATES
    paths = golden.recorded.bless(root, source, take=not a.source)
    print(f"{', '.join(map(str, paths))}: blessed; commit {root / 'recorded'}")
    return 0
