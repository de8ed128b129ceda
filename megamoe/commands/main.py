"""The command ``megamoe``: parses, calls, prints. Exit 2 and one line for whatever is misused."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import megamoe
from megamoe import bench, golden
from megamoe.backends import load_backend
from megamoe.bench.floor import DEFAULT_SHARES, SHARES
from megamoe.bench.peers import PEERS
from megamoe.cases import KINDS, TIERS, Case, load_cases, select
from megamoe.cases.shards import ShardError
from megamoe.commands.at_hand import add_contract
from megamoe.spec.contract import NEWEST, REVISIONS
from megamoe.spec.problem import provided
from megamoe.suite import bits, check, dump, merge, results
from megamoe.suite.progress import PICTURES
from megamoe.suite.settings import Settings
from megamoe.suite.stops import Stopped, release
from megamoe.worker.session import AUTO

DEFAULT_WORKERS: Final = min(2, os.cpu_count() or 1)
"""A real model's case takes up to 2 GiB, so memory, not cores, sets the default."""

BITS_CANDIDATES: Final = "recorded-candidates"
"""Under golden/: what record-bits writes and bless-bits takes, where nothing else is said."""


ROOMS: Final[tuple[str, ...]] = (
    "megamoe.report",
    "megamoe.commands.contract",
    "megamoe.commands.explain",
    "megamoe.commands.at_hand",
    "megamoe.compare",
    "megamoe.worker.single",
)
"""Modules that bring commands of their own: each has ``add(commands, command)``, where
``command(commands, name, help, run)`` returns the parser to add arguments to."""


class UsageError(ValueError):
    """The command line asks for something that cannot be; one line that says how to mend it."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    try:
        arguments = _parser().parse_args(argv)
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough; nothing more is to be said there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        # Everything megamoe raises on purpose is a ValueError of one line.
        print(f"megamoe: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("megamoe: stopped", file=sys.stderr)
        return 130


# --- commands ---------------------------------------------------------------------------------


def _check(a: argparse.Namespace) -> int:
    settings = Settings.read(lambda name: getattr(a, name, None))
    for path in (a.json, a.junit):
        if path and Path(path).is_dir():
            raise UsageError(f"{path} is a directory; name a file")
    workers = a.workers or (a.n if settings.device == "cpu" else 1)
    console = Console()
    try:
        made = check.check(settings, a.n, workers, console, a.pictures, a.maxfail)
        return _finished(a, made, console)
    except Stopped as stopped:  # before the backend was loaded
        print(f"megamoe: stopped ({stopped}); nothing was judged", file=sys.stderr)
        return stopped.code
    finally:
        release()


def _finished(a: argparse.Namespace, outcome: check.Outcome, console: Console) -> int:
    """Write the reports and show the table; the exit status."""
    wrong = _write_reports(a, outcome.report)
    with suppress(BrokenPipeError, SystemExit):  # rich makes the second of the first
        results.print_summary(outcome.report, console)
    if outcome.stopped:
        _complain(f"stopped: {outcome.stopped}")
    return outcome.code or results.exit_code(outcome.report["counts"]) or (2 if wrong else 0)


def _bench(a: argparse.Namespace) -> int:
    if a.dry_run:
        for share in a.share:
            for tokens in a.tokens:
                print(f"{SHARES[share].name} T={tokens}: {', '.join([a.backend, *a.peers])}")
        return 0
    for path in (a.json, a.plot):
        if path and Path(path).is_dir():
            raise UsageError(f"{path} is a directory; name a file")
    if a.source and a.json:
        raise UsageError("--from times nothing, so there is no --json to write")
    if a.plot:
        bench.check_drawable()
    rows = bench.load(Path(a.source)) if a.source else _timed(a)
    # Plain width where this is no terminal: a table in a file should not wrap.
    Console(width=None if sys.stdout.isatty() else 150).print(bench.table(rows))
    if a.plot:
        bench.plot(rows, Path(a.plot))
    failed = [row for row in rows if row.best is None and row.what not in PEERS]
    return 1 if failed and not a.source else 0


def _timed(a: argparse.Namespace) -> list[bench.Row]:
    """The rows of a run; each is said and saved as soon as there is one."""
    _check_device("cuda")
    backend = load_backend(a.backend, "cuda")
    if not provided(backend, "run"):
        raise UsageError(f"backend {a.backend} has no `run`; bench times what has one")
    made_by = bench.provenance(shlex.join(["megamoe", *sys.argv[1:]]), backend)
    rows: list[bench.Row] = []
    for row in bench.measure(backend, a.share, a.tokens, a.peers, a.repeats):
        rows.append(row)
        print(row.line(), file=sys.stderr, flush=True)
        if a.json:
            bench.save(rows, Path(a.json), made_by)
    return rows


def _record(a: argparse.Namespace) -> int:
    root, cases = _selected(a)
    errors = _with_progress("recording", golden.record, root, cases, a.j)
    print(f"{len(cases) - len(errors)} candidates in {root / 'candidates'}")
    return _said(errors)


def _verify(a: argparse.Namespace) -> int:
    root, cases = _selected(a)
    problems = _with_progress("verifying", golden.verify, root, cases, a.j)
    extra = []
    if a.case is None:
        known = {case.id for case in cases}
        extra = [
            f"case {key}: in the manifest, but in no case file; restore the case, or bless"
            for key in sorted(golden.Store(root, golden.make).cases)
            if key.partition("@")[0] not in known
        ]
    print(f"{len(cases) - len(problems)} of {len(cases)} goldens are what the oracle computes")
    return _said(problems + extra)


def _diff(a: argparse.Namespace) -> int:
    root = _root(a)
    table = Table()
    for name in ("case", "tensor", "what"):
        table.add_column(name)
    for name in ("elements", "ULPs"):
        table.add_column(name, justify="right")
    changes = golden.diff(root, load_cases(root))
    for c in changes:
        ulps = "" if c.ulps is None else str(c.ulps)
        table.add_row(c.case_id, c.tensor, c.what, str(c.elements or ""), ulps)
    if changes:
        Console().print(table)
    print(f"{len(changes)} changes; `megamoe golden bless` makes them" if changes else "no changes")
    return 0


def _bless(a: argparse.Namespace) -> int:
    root = _root(a)
    if a.durations:
        count = golden.bless_durations(root, [merge.read_report(path) for path in a.durations])
        print(f"{count} durations taken")
        return 0
    blessed = golden.bless(root, load_cases(root))
    print(f"{len(blessed)} goldens blessed; commit {root}")
    return 0


def _record_bits(a: argparse.Namespace) -> int:
    settings = Settings(a.backend, a.device, "forward", "full", a.case, a.contract, golden=a.golden)
    out = Path(a.out) if a.out else settings.root / BITS_CANDIDATES
    if not a.out:
        golden.write_atomically(out / ".gitignore", b"*\n")
    counter = Console(stderr=True)
    with Progress(console=counter, transient=True, disable=not counter.is_terminal) as bar:
        task = bar.add_task("recording bits", total=None)

        def done(case: Case, error: str) -> None:
            bar.update(task, advance=1, description=f"recording bits {case.id}")

        path, cases, declined = bits.record(settings, out, a.j, done)
    rest = f", {declined} declined by the backend" if declined else ""
    print(f"{path}: {cases} cases{rest}; three runs in two processes agree in every bit")
    return 0


def _bless_bits(a: argparse.Namespace) -> int:
    root = _root(a)
    source = Path(a.source) if a.source else root / BITS_CANDIDATES
    written = golden.recorded.bless(root, source, take=not a.source)
    print(f"{', '.join(map(str, written))}: blessed; commit {root / 'recorded'}")
    return 0


def _merge(a: argparse.Namespace) -> int:
    reports = [merge.read_report(path) for path in a.reports]
    first = reports[0]
    root = _root(a)
    selection = select(
        load_cases(root), first.get("kind"), first.get("tier", "full"), first.get("case")
    )
    selection = [case for case in selection if first.get("contract") in case.revisions]
    try:
        merged = merge.merge(reports, selection, a.reports)
    except ShardError as error:
        print(f"megamoe: error: {error}", file=sys.stderr)
        return 1
    wrong = _write_reports(a, merged)
    results.print_summary(merged, Console())
    print(f"{len(reports)} reports hold each of {len(selection)} cases once")
    return results.exit_code(merged["counts"]) or (2 if wrong else 0)


def _oracle(a: argparse.Namespace) -> int:
    case = _one_case(load_cases(_root(a)), a.case)
    names = dump.write_case(
        case, Path(a.out), NEWEST if a.contract == AUTO else REVISIONS[a.contract]
    )
    print(f"{a.out}: {', '.join(names)}")
    return 0


def _list(a: argparse.Namespace) -> int:
    cases = select(load_cases(_root(a)), a.kind, a.tier or "full", a.case)
    console = Console()
    if not console.is_terminal:  # for other programs: id, tier, what breaks
        for case in cases:
            print(case.id, case.tier, case.breaks, sep="\t")
        return 0
    table = Table("case", "tier", "what is broken if it fails")
    for case in cases:
        table.add_row(case.id, case.tier, case.breaks)
    console.print(table)
    console.print(f"{len(cases)} cases")
    return 0


# --- parts ------------------------------------------------------------------------------------


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here; use --device cpu")


def _root(a: argparse.Namespace) -> Path:
    return Settings(golden=a.golden).root


def _selected(a: argparse.Namespace) -> tuple[Path, list[Case]]:
    root = _root(a)
    cases = select(load_cases(root), glob=a.case)
    if not cases:
        raise UsageError(f"no cases under {root / 'cases'}")
    return root, cases


def _one_case(cases: list[Case], name: str) -> Case:
    found = [case for case in cases if case.id == name]
    if not found:
        raise UsageError(f"unknown case {name!r}; `megamoe list` shows all")
    return found[0]


def _with_progress(
    what: str, act: Callable[..., list[str]], root: Path, cases: list[Case], jobs: int
) -> list[str]:
    console = Console()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=len(cases))

        def done(case: Case, error: str) -> None:
            bar.update(task, advance=1, description=f"{what} {case.id}")

        return act(root, cases, jobs, done)


def _write_reports(a: argparse.Namespace, made: dict[str, Any]) -> bool:
    """Write what ``--json`` and ``--junit`` ask for; whether a file could not be written."""
    wrong = []
    if a.json:
        wrong.append(results.write(a.json, (json.dumps(made, indent=1) + "\n").encode()))
    if a.junit:
        wrong.append(results.write(a.junit, results.junit(made)))
    for text in filter(None, wrong):
        _complain(text)
    return any(wrong)


def _complain(text: str) -> None:
    with suppress(BrokenPipeError):
        print(f"megamoe: error: {text}", file=sys.stderr)


def _said(errors: list[str]) -> int:
    for error in sorted(errors):
        print(f"megamoe: error: {error}", file=sys.stderr)
    return 1 if errors else 0


def _at_least_one(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megamoe", description=megamoe.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"megamoe {megamoe.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        parent: Any, name: str, text: str, run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = parent.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        made.set_defaults(run=run)
        made.add_argument("--golden", metavar="DIR", help="the directory golden/")
        return made

    c = command(commands, "check", "judge a backend against the goldens", _check)
    c.add_argument("--backend", required=True, help="a name, or path/to/file.py:OBJECT_OR_FACTORY")
    c.add_argument("--kind", choices=KINDS)
    c.add_argument("--tier", choices=TIERS, help="default: quick; full where --case is given")
    c.add_argument("--case", metavar="GLOB[,GLOB]",
                   help="only cases whose id or name matches")  # fmt: skip
    add_contract(c)
    c.add_argument("--failed", metavar="REPORT", help="only cases that failed in a JSON report")
    c.add_argument("--shard", metavar="I/N", help="the I-th of N parts, balanced by duration")
    c.add_argument("-n", type=_at_least_one, default=DEFAULT_WORKERS, metavar="N",
                   help=f"judging processes (default {DEFAULT_WORKERS})")  # fmt: skip
    c.add_argument("--workers", type=_at_least_one, metavar="N",
                   help="processes that run it (default: 1 on a GPU, else as -n)")  # fmt: skip
    c.add_argument("--python", dest="interpreter", metavar="PYTHON",
                   help="the Python that runs the backend; it needs torch only")  # fmt: skip
    c.add_argument("--timeout", type=_seconds, help="seconds of the backend a case (default 120)")
    c.add_argument("--load-timeout", type=_seconds,
                   help="seconds until the backend is loaded (default 300)")  # fmt: skip
    c.add_argument("--maxfail", type=_at_least_one, metavar="N", help="stop after N reds")
    c.add_argument("--pictures", type=_at_least_one, default=PICTURES, metavar="N",
                   help=f"reds shown in full (default {PICTURES})")  # fmt: skip
    c.add_argument("--json", metavar="FILE")
    c.add_argument("--junit", metavar="FILE")
    c.add_argument("--device", choices=("cpu", "cuda"))

    g = commands.add_parser("golden", help="record, diff, bless, verify", allow_abbrev=False)
    acts = g.add_subparsers(required=True, metavar="ACT")
    for name, text, run in (
        ("record", "compute candidates with the oracle", _record),
        ("verify", "recompute the goldens; they must be equal in every bit", _verify),
    ):
        r = command(acts, name, text, run)
        r.add_argument("--case", metavar="GLOB")
        r.add_argument("-j", type=_at_least_one, default=DEFAULT_WORKERS, metavar="N",
                       help="processes")  # fmt: skip
    command(acts, "diff", "what blessing the candidates would change", _diff)
    b = command(acts, "bless", "make the candidates the goldens; refuses where CI is set", _bless)
    b.add_argument("--durations", nargs="+", metavar="REPORT",
                   help="instead: take the cases' seconds from JSON reports")  # fmt: skip

    r = command(acts, "record-bits", "a backend's own bits, if three runs agree", _record_bits)
    r.add_argument("--backend", required=True, help="a name, or path/to/file.py:OBJECT_OR_FACTORY")
    r.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_contract(r)
    r.add_argument("--case", metavar="GLOB", help="for a trial: such a file cannot be blessed")
    r.add_argument("--out", metavar="DIR", help="default: golden/recorded-candidates")
    r.add_argument("-j", type=_at_least_one, default=DEFAULT_WORKERS, metavar="N",
                   help="processes")  # fmt: skip
    b = command(acts, "bless-bits", "make them recorded goldens; refuses where CI is set",
                _bless_bits)  # fmt: skip
    b.add_argument("--from", dest="source", metavar="DIR",
                   help="default: golden/recorded-candidates")  # fmt: skip

    m = command(commands, "merge", "prove that shard reports hold each case once", _merge)
    m.add_argument("reports", nargs="+", metavar="REPORT")
    m.add_argument("--json", metavar="FILE")
    m.add_argument("--junit", metavar="FILE")

    o = command(commands, "oracle", "write a case's inputs and every oracle stage", _oracle)
    o.add_argument("--case", required=True, metavar="ID")
    o.add_argument("--out", required=True, metavar="FILE.safetensors")
    add_contract(o)

    b = command(commands, "bench", "time a backend beside the floor and beside peers", _bench)
    b.add_argument("--backend", default="triton", help="default: triton; it must have `run`")
    b.add_argument("--share", nargs="+", choices=sorted(SHARES), default=list(DEFAULT_SHARES),
                   help=f"of which models (default {' '.join(DEFAULT_SHARES)})")  # fmt: skip
    b.add_argument("--tokens", nargs="+", type=_at_least_one, metavar="T",
                   default=[1, 2, 4, 8, 16, 32, 64, 512, 2048, 8192])  # fmt: skip
    b.add_argument("--peers", nargs="*", choices=sorted(PEERS), default=sorted(PEERS))
    b.add_argument("--repeats", type=_at_least_one, default=15, metavar="N")
    b.add_argument("--json", metavar="FILE", help="rows and what made them, saved row by row")
    b.add_argument("--plot", metavar="FILE.svg")
    b.add_argument("--from", dest="source", metavar="FILE",
                   help="time nothing: the table and plot of an earlier --json")  # fmt: skip
    b.add_argument("--dry-run", action="store_true", help="list what would be timed")

    s = command(commands, "list", "the cases", _list)
    s.add_argument("--kind", choices=KINDS)
    s.add_argument("--tier", choices=TIERS)
    s.add_argument("--case", metavar="GLOB")

    for room in ROOMS:
        import_module(room).add(commands, command)
    return parser
