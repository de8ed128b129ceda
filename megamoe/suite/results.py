"""The report of a run: JSON, JUnit, and the table at the end."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from rich.console import Console
from rich.table import Table

from megamoe.cases import KINDS, SIZES, Case
from megamoe.environment import machine, versions
from megamoe.files import MIB, digest_bounded, write_atomically
from megamoe.judge import BAD, OF_MODULE, STATUSES, VERDICTS, WORDS, Verdict
from megamoe.printable import quantity
from megamoe.suite.settings import Settings
from megamoe.worker import known
from megamoe.worker.session import Identity

Report = dict[str, Any]
SOURCE_LIMIT: Final = 64 * MIB
"""The largest file of a backend that is hashed."""


def build(settings: Settings, identity: Identity, verdicts: Sequence[Verdict]) -> Report:
    """The JSON report; ``cases`` in the order of ids, so that two runs can be compared."""
    counts = Counter(v.status for v in verdicts)
    build_of = identity.fingerprint
    return {
        "backend": settings.backend,
        "name": identity.name,
        "accumulator": identity.accumulator,
        "callables": list(identity.callables),
        "batch_invariant": identity.batch_invariant,
        # Binaries are compiled as the cases need them, and differ with the cases.
        "fingerprint": build_of and {name: build_of[name] for name in ("sources", "options")},
        **_digest_of(settings.backend),
        "worker": dict(identity.facts),
        "counts": {status: counts.get(status, 0) for status in STATUSES},
        "tier": settings.chosen_tier,
        "kind": settings.kind,
        "case": settings.case,
        "shard": settings.shard,
        "contract": identity.contract,
        "contract_why": identity.why,
        "device": settings.device,
        "versions": versions(),
        "machine": machine(identity.facts),
        "cases": [v.to_dict() for v in sorted(verdicts, key=lambda v: v.case_id)],
    }


def _digest_of(backend: str) -> dict[str, str]:
    """``file_sha256`` of the file that the backend was named by; empty where it has none."""
    try:
        path = Path(known.file_of(backend)).expanduser()
        digest = digest_bounded(path, SOURCE_LIMIT) if known.is_file(backend) else ""
    except (OSError, ValueError):
        return {}
    return {"file_sha256": digest} if digest else {}


def modules_of(backend: str, sources: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """``modules_sha256`` of the Python files that the backend imported from its own repository or
    folder; empty where the backend was named by no file."""
    return {"modules_sha256": dict(sorted(sources.items()))} if known.is_file(backend) else {}


def describe(report: Report, cases: Sequence[Case], details: Mapping[str, Any]) -> None:
    """Add to each case of ``report`` its sizes and, where it is bad, what it breaks and details.

    ``details`` of None were left out: the case is ``shortened``.
    """
    by_id = {case.id: case for case in cases}
    for entry in report["cases"]:
        case = by_id.get(entry["id"])
        if case is None:
            continue
        entry["sizes"] = {name: case.params[name] for name in SIZES if name in case.params}
        if entry["status"] in BAD:
            entry["breaks"] = case.breaks
            case_details = details.get(case.id, [])
            entry["details"] = case_details or []
            if case_details is None:
                entry["shortened"] = True


def exit_code(counts: Mapping[str, int]) -> int:
    """0: something was judged and all of it passed; 1: a fail or an error; 2: nothing judged.

    A run that was stopped has no 0: 2 where what was judged passed.
    """
    if counts.get("fail", 0) or counts.get("error", 0):
        return 1
    return 0 if counts.get("pass", 0) and not counts.get("not-run", 0) else 2


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd]")


def junit(report: Mapping[str, Any]) -> bytes:
    """JUnit XML: a test suite a kind; skip and not-provided are both skipped, with the reason."""
    root = ElementTree.Element("testsuites", name="megamoe")
    for kind in KINDS:
        cases = [c for c in report["cases"] if c["kind"] == kind]
        if not cases:
            continue
        counts = Counter(c["status"] for c in cases)
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=f"megamoe.{kind}",
            tests=str(len(cases)),
            failures=str(counts["fail"]),
            errors=str(counts["error"]),
            skipped=str(counts["skip"] + counts["not-provided"] + counts["not-run"]),
            time=f"{sum(c['seconds'] for c in cases):.3f}",
        )
        for case in cases:
            item = ElementTree.SubElement(
                suite, "testcase", classname=f"megamoe.{kind}", name=case["id"],
                time=f"{case['seconds']:.3f}",
            )  # fmt: skip
            fields = {
                "judged": ", ".join(case.get("how", ())),
                "recorded": case.get("recorded"),
                "predicted": case.get("predicted"),
                "unlike": case.get("unlike"),
            }
            non_empty = {name: value for name, value in fields.items() if value}
            if non_empty:
                properties = ElementTree.SubElement(item, "properties")
                for name, value in non_empty.items():
                    ElementTree.SubElement(properties, "property", name=name, value=str(value))
            tag = {"fail": "failure", "error": "error"}.get(case["status"], "skipped")
            if case["status"] != "pass":
                reason = _NOT_XML.sub("?", case["reason"])
                message = reason if tag != "skipped" else f"{case['status']}: {reason}"
                ElementTree.SubElement(item, tag, message=message)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def write(path: str, content: bytes) -> str:
    """Write a report whole or not at all, making its folder; returns what went wrong, or ''."""
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        return f"{path} cannot be written: {error.strerror or error}"
    return ""


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
    frequent first."""
    out = []
    for status, word in WORDS.items():
        reasons = Counter(c["reason"] for c in report["cases"] if c["status"] == status)
        if not reasons:
            continue
        begin, once = _BEGIN.get(status, ("", ""))
        if not all(reason.startswith(begin) for reason in reasons):
            begin = once = ""
        most = len(reasons) if len(reasons) <= REASONS + 1 else REASONS  # a line for one is no gain
        lines = [
            reason.removeprefix(begin).removeprefix(_PREFIX)
            + (f" ({count})" if len(reasons) > 1 else "")
            for reason, count in reasons.most_common(most)
        ]
        if len(reasons) > most:
            lines.append(f"{len(reasons) - most} other reasons (--json FILE has them)")
        if len(lines) > 1:
            more = f"; {once.rstrip(' :')}" if once else ""
            out.append(f"{reasons.total()} {word}{more}:")
            out += [f"  {line}" for line in lines]
        else:
            out.append(f"{reasons.total()} {word}: {once}{lines[0]}")
    return out


def module_line(report: Mapping[str, Any]) -> str:
    """How many verdicts are of megamoe's own module, whatever the backend is; else empty."""
    of_module = sum(OF_MODULE in c.get("how", ()) for c in report["cases"])
    if not of_module or of_module == sum(report["counts"].get(s, 0) for s in VERDICTS) == 1:
        return ""
    return (
        f"{of_module} of the judged cases are wrong calls of megamoe's own module: they say "
        "nothing of the backend"
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
