"""The commands ``megamoe ab`` and ``megamoe bisect``: parse, call, print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megamoe.cases import KINDS, TIERS, Case, load_cases, select
from megamoe.compare import ab, disk
from megamoe.compare.sides import HOME, Options, parse
from megamoe.suite import report
from megamoe.suite.settings import Settings


def add(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add both commands to the parser of ``megamoe``."""
    c = command(commands, "ab", "run the same cases in two environments, bit for bit", _ab)
    c.add_argument("left", metavar="LEFT", help="this, an interpreter, a virtual environment, a "
                   "requirement, a git revision, or flake:INPUT=URL")  # fmt: skip
    c.add_argument("right", metavar="RIGHT")
    c.add_argument("--left-backend", metavar="SPEC", help="default: --backend")
    c.add_argument("--right-backend", metavar="SPEC", help="default: --backend")
    _common(c)


def _common(c: argparse.ArgumentParser) -> None:
    c.add_argument("--backend", default="eager", metavar="SPEC",
                   help="a name, or path/to/file.py:OBJECT, looked for in a revision's tree "
                   "first (default eager)")  # fmt: skip
    c.add_argument("--kind", choices=KINDS)
    c.add_argument("--tier", choices=TIERS, help="default: quick; full where --case is given")
    c.add_argument("--case", metavar="GLOB", help="only cases whose id or name matches")
    c.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    c.add_argument("--timeout", type=_seconds, default=120.0, help="seconds a case (default 120)")
    c.add_argument("--repo", metavar="DIR", help="the checkout whose revisions are meant, or the "
                   "directory of the flake (default: this one)")  # fmt: skip
    c.add_argument("--build", metavar="COMMAND", help="shell command run in a revision's tree; "
                   "$MEGAMOE_PYTHON is its interpreter")  # fmt: skip
    c.add_argument("--build-timeout", type=_seconds, default=3600.0, metavar="S")
    c.add_argument("--path", default=".", metavar="SUB",
                   help="folder of a revision's tree that goes on the import path (default .)")
    c.add_argument("--python", metavar="PYTHON",
                   help="interpreter of revisions and requirements; a relative path counts from "
                   "the tree (default: this one)")  # fmt: skip
    c.add_argument("--with", dest="extra", action="append", default=[], metavar="REQUIREMENT",
                   help="install this too, beside each revision or requirement")  # fmt: skip
    c.add_argument("--shell", default="default", help="dev shell of a flake (default: default)")
    c.add_argument("--json", metavar="FILE")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError
    return value


def _options(a: argparse.Namespace) -> Options:
    return Options(a.python, a.build, a.path, tuple(a.extra), a.shell, a.build_timeout)


def _cases(a: argparse.Namespace) -> tuple[Path, list[Case]]:
    settings = Settings(case=a.case, tier=a.tier, golden=a.golden)
    root = settings.root
    return root, select(load_cases(root), a.kind, settings.chosen_tier, a.case)


# --- ab ---------------------------------------------------------------------------------------


def _ab(a: argparse.Namespace) -> int:
    repo = Path(a.repo).resolve() if a.repo else None
    sides = (parse(a.left, repo), parse(a.right, repo))
    root, cases = _cases(a)
    backends = (a.left_backend or a.backend, a.right_backend or a.backend)
    q = ab.Question(sides, backends, cases, root, a.device, a.timeout, _options(a))
    console, notes = Console(), Console(stderr=True)
    if any(side.kind == "git" for side in sides):
        note = ab.describe(repo or HOME)
        if note:
            notes.print(note, style="dim", soft_wrap=True)
    total = len([c for c in cases if c.kind in ab.stages.COMPARABLE])
    counted = 0
    with console.status("starting both sides", spinner="line") as status:

        def done(result: dict[str, Any]) -> None:
            nonlocal counted
            counted += 1
            status.update(f"{counted} of {total}: {result['id']}")
            if result["status"] in ("moved", "error"):
                console.print(
                    f"{result['status']:<6} {result['id']}  {result.get('reason', '')}",
                    markup=False, highlight=False, soft_wrap=True,
                )  # fmt: skip

        try:
            made = ab.run(q, done)
        except OSError as error:
            raise disk.said(error) from error
    _print_ab(made, console)
    if a.json:
        _write_json(a.json, made)
    return ab.exit_code(made)


def _print_ab(made: dict[str, Any], console: Console) -> None:
    table = Table("stage", title="what moved", title_justify="left")
    for name in ("cases", "elements", "most ULPs", "outside left", "outside right"):
        table.add_column(name, justify="right")
    rows: dict[str, list[dict[str, Any]]] = {}
    for case in made["cases"]:
        for name, stage in case["stages"].items():
            if stage["moved"]:
                rows.setdefault(name, []).append(stage)
    for name in sorted(rows, key=ab.stages.ORDER.index):
        few = rows[name]
        ulps = [s["max_ulps"] for s in few]
        outs = [[s[f"outside_{side}"] for s in few] for side in ab.NAMES]
        table.add_row(
            name, str(len(few)), str(sum(s["moved"] for s in few)),
            "NaN" if None in ulps else str(max(ulps)),
            *("not judged" if None in out else str(sum(out)) for out in outs),
        )  # fmt: skip
    if rows:
        console.print(table)
    skipped = len(made["not_compared"])
    if skipped:
        console.print(f"{skipped} cases not compared: neither backend has what they need")
    console.print(made["headline"], markup=False, highlight=False, soft_wrap=True)


def _write_json(path: str, made: dict[str, Any]) -> None:
    content = (json.dumps(made, indent=1) + "\n").encode()
    try:
        report.write(path, content)
    except OSError as error:
        raise disk.said(error) from error
