"""The commands ``megamoe ab`` and ``megamoe bisect``: parse, call, print."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megamoe.cases import KINDS, TIERS, Case, load_cases, select
from megamoe.compare import ab, bisect, disk, stages
from megamoe.compare.job import Job, Range
from megamoe.compare.probe import Test
from megamoe.compare.running import COMPARABLE
from megamoe.compare.sides import HOME, Options, parse
from megamoe.judge import Worst
from megamoe.suite import results
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

    c = command(commands, "bisect", "which commit, version or input moved the bits", _bisect)
    c.add_argument("--good", metavar="REV", help="a git revision whose bits are right")
    c.add_argument("--bad", metavar="REV", help="a later one whose bits are not")
    c.add_argument("--only", nargs="+", default=[], metavar="PATH",
                   help="try only commits that touch these")  # fmt: skip
    c.add_argument("--over", nargs="+", default=[], metavar="SIDE",
                   help="instead of commits: a list of what `ab` takes, the good one first, the "
                   "bad one last; NAME==1,2 and flake:INPUT=URL,URL are short forms")  # fmt: skip
    c.add_argument("--judge", action="store_true",
                   help="bad is what the goldens say is bad, instead of other bits than the good "
                   "end's")  # fmt: skip
    c.add_argument("--run", dest="script", metavar="COMMAND",
                   help="bad is where this fails; 125 skips, as in `git bisect run`; "
                   "$MEGAMOE_PYTHON is the interpreter")  # fmt: skip
    c.add_argument(
        "--repeat",
        type=_count,
        default=2,
        metavar="N",
        help="runs of a step, in processes of their own, that must agree (default 2)",
    )
    c.add_argument("--state", metavar="DIR", help="where the search is logged, to go on after a "
                   "kill (default: a folder in the cache)")  # fmt: skip
    c.add_argument("--fresh", action="store_true", help="forget what an earlier run found out")
    c.add_argument("--archive", metavar="FILE.tar.gz", help="default: in the state")
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
    c.add_argument(
        "--path",
        default=".",
        metavar="SUB",
        help="folder of a revision's tree that goes on the import path (default .)",
    )
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


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
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
    total = len([c for c in cases if c.kind in COMPARABLE])
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
    for name in sorted(rows, key=stages.place):
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


# --- bisect -----------------------------------------------------------------------------------

_COLOURS = {"good": "green", "bad": "red", "skip": "dim", "flaky": "yellow"}


def _bisect(a: argparse.Namespace) -> int:
    if a.judge and a.script:
        raise ValueError("--judge and --run are two answers to what is bad; give one")
    root, cases = _cases(a)
    cases = [case for case in cases if case.kind in COMPARABLE]
    if a.script:
        cases = []
    elif not cases:
        raise ValueError("no case with tensors is selected; errors cases cannot be compared")
    how = "command" if a.script else "judge" if a.judge else "bits"
    test = Test(cases, root, a.backend, a.device, how, a.script or "", a.repeat, a.timeout,
                _options(a))  # fmt: skip
    job = Job(_range(a), test, Path(a.state).absolute() if a.state else None, a.fresh,
                     Path(a.archive) if a.archive else None)  # fmt: skip
    console, notes = Console(), Console(stderr=True)
    if job.where.good.kind == "git":
        changes = ab.describe(job.where.good.repo)
        if changes:
            notes.print(changes, style="dim", soft_wrap=True)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        with console.status("checking the ends, the bad one first", spinner="line") as status:

            def said(step: dict[str, Any], known: bool) -> None:
                console.print(_line(step, known), highlight=False, soft_wrap=True)
                status.update("walking")

            def note(text: str) -> None:
                notes.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

            made = bisect.run(job, said, note)
    finally:
        signal.signal(signal.SIGTERM, before)
    _print_bisect(made, console)
    if a.json:
        _write_json(a.json, made)
    return 0 if made["first_bad"] else 1


def _stop(*_: object) -> None:
    raise KeyboardInterrupt  # so that the worktree goes, and git's walk with it


def _range(a: argparse.Namespace) -> Range:
    repo = Path(a.repo).resolve() if a.repo else None
    if bool(a.over) == bool(a.good or a.bad) or bool(a.good) != bool(a.bad):
        raise ValueError("say where to look: --good REV --bad REV, or --over GOOD ... BAD")
    if a.over:
        if a.only:
            raise ValueError("--only is for commits; name what to try in --over")
        sides = tuple(parse(word, repo) for text in a.over for word in _spread(text))
        return Range(sides[0], sides[-1], sides)
    good, bad = (parse(f"git:{rev.removeprefix('git:')}", repo) for rev in (a.good, a.bad))
    return Range(good, bad, (), tuple(a.only))


def _spread(text: str) -> list[str]:
    """``name==1,2`` and ``flake:input=url,url`` as one word each."""
    for mark in ("==", "="):
        head, found, tail = text.partition(mark)
        if found and (mark == "==" or text.startswith("flake:")):
            return [f"{head}{mark}{part}" for part in tail.split(",") if part]
    return [text]


def _line(step: dict[str, Any], known: bool) -> Text:
    rev = step["rev"][:12] if len(step["rev"]) == 40 else step["rev"]
    out = Text()
    out.append(f"{step['verdict'] if step['verdict'] != 'seen' else step['role'] + ' end':<8} ",
               style=_COLOURS.get(step["verdict"], ""))  # fmt: skip
    out.append(f"{rev}  {step['subject']}".rstrip())
    out.append(f"  {'known' if known else str(step['seconds']) + ' s'}", style="dim")
    return out.append(f"  {step['reason']}") if step["reason"] else out


def _print_bisect(made: dict[str, Any], console: Console) -> None:
    if made["cases"]:
        table = Table("case", "first stage", title="what the first bad one moved",
                      title_justify="left")  # fmt: skip
        table.add_column("elements", justify="right")
        table.add_column("most ULPs", justify="right")
        for case in made["cases"][:10]:
            stage = case["stages"][case["first_stage"]]
            far = "NaN" if stage["max_ulps"] is None else str(stage["max_ulps"])
            table.add_row(case["id"], case["first_stage"], f"{stage['moved']} of "
                          f"{stage['elements']}", far)  # fmt: skip
        console.print(table)
        if len(made["cases"]) > 10:
            console.print(f"and {len(made['cases']) - 10} more cases")
    plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    worst = made["worst"]
    if worst:
        line = Worst(**{k: v for k, v in worst.items() if k != "case"}).line()
        for judged, compared in (("expected", "good"), ("got", "bad"), ("ULP outside", "ULP")):
            line = line.replace(judged, compared)
        console.print(f"worst    {worst['case']}: {line}", **plain)
    if made["archive"]:
        console.print(f"archive  {made['archive']}", **plain)
    console.print(made["headline"], **plain)


def _write_json(path: str, made: dict[str, Any]) -> None:
    content = (json.dumps(made, indent=1) + "\n").encode()
    try:
        results.write(path, content)
    except OSError as error:
        raise disk.said(error) from error
