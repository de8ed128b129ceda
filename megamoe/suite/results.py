"""The report of a run: JSON and JUnit, and its exit status."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from megamoe.cases import KINDS, SIZES, Case
from megamoe.environment import machine, versions
from megamoe.files import MIB, digest_bounded, write_atomically
from megamoe.judge import BAD, STATUSES, Verdict
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
