"""The end of a run in the terminal: the table, what was not judged and why, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from megamoe.cases import KINDS
from megamoe.judge import OF_MODULE, STATUSES, VERDICTS, WORDS
from megamoe.printable import quantity, verb
from megamoe.suite.results import exit_code
from megamoe.suite.shard_report import LONGEST


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """Kind x status where there are several cases, why some were not judged, and the verdict in
    one line."""
    if len(report["cases"]) != 1:
        about = f"backend {report['backend']}, tier {report['tier']}"  # a title would be wrapped
        console.print(about, markup=False, highlight=False, soft_wrap=True)
        console.print(_table(report))
    lines = [
        *unjudged_lines(report), module_line(report), invariance_line(report),
        recorded_line(report), *predicted_lines(report), verdict_line(report),
    ]  # fmt: skip
    for line in filter(None, lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(report: Mapping[str, Any]) -> Table:
    table = Table()
    table.add_column("kind")
    total = report["counts"]
    columns = [s for s in STATUSES if s in ("pass", "fail") or total.get(s)]
    for status in columns:
        table.add_column(WORDS.get(status, status), justify="right")
    for kind in KINDS:
        counts = Counter(c["status"] for c in report["cases"] if c["kind"] == kind)
        if counts:
            table.add_row(kind, *(str(counts[s] or "") for s in columns))
    if len(table.rows) > 1:
        table.add_section()
        table.add_row("all", *(str(total.get(s, 0)) for s in columns))
    return table


_PREFIX: Final = "NotImplementedError: "
"""How a backend's own reason may begin; the line before it says so already."""
REASONS: Final = 12
"""Reasons that are named of one status."""
_BEGIN: Final[Mapping[str, tuple[str, str]]] = {
    "skip": ("the backend declined: ", "the backend raised NotImplementedError: "),
    "not-provided": ("the backend has no ", "the backend lacks "),
    "not-run": ("not run: ", ""),
}
"""How the reasons of a status begin, and what a line says of it once."""


def unjudged_lines(report: Mapping[str, Any]) -> list[str]:
    """Why cases were not judged, by status: a line for each reason with its count, the most
    frequent first; what the backend lacks before what the run or the machine lacks."""
    out = []
    for status, word in WORDS.items():
        every = Counter(c["reason"] for c in report["cases"] if c["status"] == status)
        begin, once = _BEGIN.get(status, ("", ""))
        usual = Counter({r: n for r, n in every.items() if r.startswith(begin)})
        out += _reason_lines(usual, word, begin, once)
        out += _reason_lines(every - usual, f"more {word}" if usual else word)
    return out


def _reason_lines(reasons: Counter[str], word: str, begin: str = "", once: str = "") -> list[str]:
    """The lines of some reasons of one status that all ``begin`` alike, of which ``once`` tells."""
    if not reasons:
        return []
    most = len(reasons) if len(reasons) <= REASONS + 1 else REASONS  # a line for one is no gain
    lines = [
        reason.removeprefix(begin).removeprefix(_PREFIX)
        + (f" ({count})" if len(reasons) > 1 else "")
        for reason, count in reasons.most_common(most)
    ]
    if len(lines) == 1:
        return [f"{reasons.total()} {word}: {once}{lines[0]}"]
    if len(reasons) > most:
        lines.append(f"{len(reasons) - most} other reasons (--json FILE has them)")
    more = f"; {once.rstrip(' :')}" if once else ""
    return [f"{reasons.total()} {word}{more}:", *(f"  {line}" for line in lines)]


def module_line(report: Mapping[str, Any]) -> str:
    """How many verdicts are of megamoe's own module, whatever the backend is; else empty."""
    of_module = sum(OF_MODULE in c.get("how", ()) for c in report["cases"])
    if not of_module or of_module == sum(report["counts"].get(s, 0) for s in VERDICTS) == 1:
        return ""
    what = verb(of_module, "is a wrong call", "are wrong calls")
    say = verb(of_module, "it says", "they say")
    return (
        f"{of_module} of the judged cases {what} of megamoe's own module: {say} nothing of the "
        "backend"
    )


def invariance_line(report: Mapping[str, Any]) -> str:
    """What a backend that is not batch-invariant by its own word was excused from; else empty."""
    if report.get("batch_invariant", True):
        return ""
    excuses = sum(
        c["status"] == "not-provided" and c["reason"].endswith("batch_invariant = False")
        for c in report["cases"]
    )
    return (
        "not batch-invariant, by the backend's own word: in "
        f"{quantity(excuses, 'case')} the law was not judged, the golden was"
    )


def recorded_line(report: Mapping[str, Any]) -> str:
    """How many forward cases were compared with recorded bits, and why the others were not; empty
    where this backend has none on this machine."""
    counts = Counter(c["recorded"] for c in report["cases"] if c.get("recorded"))
    if not counts:
        return ""
    record = report.get("recorded", {})
    if set(counts) == {"none"} and not record.get("file"):
        return ""
    text = ", ".join(f"{state} {count}" for state, count in counts.most_common())
    rest = "" if set(counts) <= {"matched", "moved"} else "; all were judged by the goldens"
    return f"recorded bits ({record.get('file')}): {text}{rest}"


def predicted_lines(report: Mapping[str, Any]) -> list[str]:
    """How many forward cases are what the model of the class predicts; what explains the others.

    Nothing where no model predicts the class.
    """
    counts = Counter(c["predicted"] for c in report["cases"] if c.get("predicted"))
    if not counts:
        return []
    names = {"equal": "equal", "inside": "inside the envelope but not the prediction",
             "outside": "outside the envelope", "none": "without a prediction"}  # fmt: skip
    text = ", ".join(f"{count} {names.get(name, name)}" for name, count in counts.most_common())
    out = [f"predicted bits (a model's, of no machine): {text}"]
    if (report.get("predicted") or {}).get("explained"):
        out += [f"  {c['id']}: {c['unlike']}" for c in report["cases"] if c.get("unlike")]
    elif counts["inside"]:
        out[0] += "; --explain-predictions says what would explain it"
    return out


def verdict_line(report: Mapping[str, Any]) -> str:
    """One line that says what a person may conclude."""
    counts = report["counts"]
    total = sum(counts.get(s, 0) for s in VERDICTS)
    omissions = {WORDS[s]: counts[s] for s in ("not-provided", "skip") if counts.get(s)}
    rest, not_run = sum(omissions.values()), counts.get("not-run", 0)
    took = f" in {report['seconds']:.0f} s" if "seconds" in report else ""
    if took and LONGEST in report:
        took += f" of machine time, {report[LONGEST]:.0f} s of them in the longest shard"
    several = len(omissions) > 1
    why = ", ".join(f"{count} {word}" if several else word for word, count in omissions.items())
    more = f"{took}; {rest} of {total + rest + not_run} not judged ({why})" if rest else took
    stop = f"; the run was stopped, {not_run} not run" if not_run else ""
    more += stop
    code = exit_code(counts)
    subject = "the one judged case" if total == 1 else f"all {total} judged cases"
    if code == 2:
        if total:
            return f"STOPPED: {subject} passed{more}"
        why = f" ({why})" if why else ""
        return f"NOTHING JUDGED: 0 of {quantity(rest + not_run, 'case')}{why}{stop}{took}"
    if code:
        bad = counts.get("fail", 0) + counts.get("error", 0)
        some = "the one judged case" if total == 1 else f"{bad} of {total} judged cases"
        return f"RED: {some} did not pass{more}"
    return f"GREEN: {subject} passed{more}"
