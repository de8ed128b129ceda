"""``megamoe kernels``: the published kernels, and a site of how they were judged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megamoe.commands import UsageError
from megamoe.kernels.registry import Kernel, kernel, kernels
from megamoe.printable import quantity

if TYPE_CHECKING:
    from megamoe.kernels.results import Result


def run(a: argparse.Namespace) -> int:
    """A table, one kernel, or a site. Exit status 0: it judges nothing."""
    if a.results is not None:
        if a.name is not None:
            raise UsageError("name a kernel or --results, not both")
        from megamoe.kernels import results  # torch, for what is judged alone

        judgements = results.read_all([Path(path) for path in a.results])
        if a.report is not None:
            return _site(judgements, Path(a.report))
        print(results.markdown(judgements), end="") if a.markdown else _show(
            [results.COLUMNS, *results.table(judgements)]
        )
        return 0
    if a.report is not None:
        raise UsageError("--report needs --results FILE.json ...")
    if a.name is not None:
        _about(kernel(a.name))
        return 0
    heads = ("kernel", "contract", "class", "kinds", "versions", "here")
    _show([heads, *(row(one) for one in kernels().values())])
    return 0


def row(one: Kernel) -> tuple[str, ...]:
    """A kernel in the table."""
    return (
        one.name, ", ".join(one.contracts), one.accumulator, ", ".join(one.kinds), one.versions,
        here(one),
    )  # fmt: skip


def here(one: Kernel) -> str:
    """Whether the kernel runs on this machine: ``yes``, or ``no`` with the reasons, in one line."""
    refusals = one.refusals()
    return "no: " + " ".join("; ".join(refusals).split()) if refusals else "yes"


def _show(rows: Sequence[tuple[str, ...]]) -> None:
    """A table in a terminal, else tabs between the cells, for other programs."""
    if sys.stdout is None or not sys.stdout.isatty():
        for cells in rows:
            print(*cells, sep="\t")
        return
    from rich.table import Table  # a list for another program does without

    from megamoe.console import Console

    table = Table(*rows[0])
    for cells in rows[1:]:
        table.add_row(*cells)
    Console().print(table)


def _about(one: Kernel) -> None:
    print(f"{one.name}: {one.title}")
    print(f"  {one.url}")
    print(f"  written for   {one.versions}")
    unknown = one.unknown_contracts
    note = f" (not in this megamoe: {', '.join(unknown)})" if unknown else ""
    print(f"  contract      {', '.join(one.contracts)}{note}")
    print(f"  class         {one.accumulator}")
    print(f"  kinds         {', '.join(one.kinds)}")
    print(f"  theirs        {one.theirs}")
    print(f"  ours          {one.ours}")
    for line in one.evidence:
        print(f"  evidence      {line}")
    for need in one.needs:
        print(f"  needs         {need.installation() or need.missing()}")
    print(f"  here          {here(one)}")
    device = "cpu" if one.cpu else "cuda"
    print(f"  command       megamoe check --backend {one.name} --device {device} --json FILE.json")


def _site(judgements: Sequence[Result], folder: Path) -> int:
    from megamoe.report.site import write  # templates, for the site alone

    files = write(judgements, folder)
    print(f"{folder / 'index.html'}: {quantity(len(files), 'file')}; open it in a browser")
    return 0
