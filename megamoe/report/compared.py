"""What a report says of ``megamoe ab`` and ``megamoe bisect``: plain data, as :mod:`.run` makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megamoe.printable import part, quantity
from megamoe.report import draw, read, words
from megamoe.report.read import View

SIGN: Mapping[str, str] = {"identical": "✓", "moved": "✗", "error": "!"}


def ab(result: Mapping[str, Any]) -> View:
    """Two environments: a row for each case and stage that moved, and the cases that did not."""
    cases = read.objects(result, "cases")
    counts = Counter(read.text(c, "status", "error") for c in cases)
    other = len(cases) - counts["identical"] - counts["moved"]
    colour = "red" if counts["moved"] else "grey" if other or not cases else "green"
    summary = f"{part(counts['identical'], len(cases), 'case')} identical bit for bit"
    summary += f", {counts['moved']} moved" if counts["moved"] else ""
    summary += f", {other} could not be compared" if other else ""
    return {
        "verdict": read.text(result, "headline") or summary,
        "summary": summary,
        "colour": colour,
        "sides": [(n, _lines(result.get(n))) for n in ("left", "right")],
        "cases": sorted(map(_case_view, cases), key=lambda c: c["status"] == "identical"),
        "rest": _rest(result, ("kind", "left", "right", "headline", "cases")),
    }


def _case_view(case: Mapping[str, Any]) -> View:
    stages = read.mapping(case, "stages")
    status = read.text(case, "status", "error")
    return {
        "id": read.text(case, "id", "?"),
        "status": status,
        "word": words.STATUS.get(status, status),
        "sign": SIGN.get(status, "!"),
        "first": read.text(case, "first_stage"),
        "reason": read.text(case, "reason") or read.text(case, "error"),
        "more": _more(case),
        "stages": [
            {
                "name": name,
                "moved": read.count(stages[name], "moved"),
                "elements": read.count(stages[name], "elements"),
                "ulps": read.text(stages[name], "max_ulps"),
                "left": read.text(stages[name], "outside_left"),
                "right": read.text(stages[name], "outside_right"),
            }
            for name in stages
        ],
    }


def _more(case: Mapping[str, Any]) -> list[str]:
    """What else is known of a case that moved; its reason names its right contracts."""
    verdicts = [(n, read.text(case, f"verdict_{n}")) for n in ("left", "right")]
    out = [f"judged by its golden: {', '.join(f'{n} {v}' for n, v in verdicts if v)}"]
    out = out if any(v for _, v in verdicts) else []
    unsteady = read.sentence(case.get("unsteady"))
    if unsteady:
        out.append(f"does not return its own bits again: {unsteady}")
    one_sided = read.sentence(case.get("one_sided"))
    return [*out, f"shown by one side only: {one_sided}"] if one_sided else out


def bisect(result: Mapping[str, Any]) -> View:
    """A search: its picture, its steps and what it ended with."""
    steps = read.objects(result, "steps")
    bad, good = (_commit(result.get(name)) for name in ("first_bad", "last_good"))
    bad = " ".join(filter(None, [bad, read.text(result, "subject")])) if bad else bad
    if bad:
        verdict = f"First bad: {bad}" + (f"; last good: {good}" if good else "")
    else:
        verdict = "No first bad one was found"
    tables = [c for c in read.objects(result, "cases") if read.mapping(c, "stages")]
    facts = {
        "first stage": result.get("first_stage"),
        "worst element": result.get("worst"),
        "cases": None if tables else result.get("cases"),
    }
    counts = Counter(read.text(s, "verdict", "unknown") for s in steps)
    return {
        "verdict": read.text(result, "headline") or verdict,
        "summary": f"{quantity(len(steps), 'step')}: "
        + ", ".join(f"{n} {words.STATUS.get(v, v)}" for v, n in counts.most_common()),
        "colour": "red" if bad else "grey",
        "found": [("first bad", bad), ("last good", good)],
        "facts": [(n, _lines(value)) for n, value in facts.items() if read.sentence(value)],
        "moved": [_case_view({"status": "moved", **c}) for c in tables],
        "walk": draw.walk(steps),
        "placed": draw.order(steps)[1],
        "steps": list(map(_step, steps)),
        "rest": _rest(
            result, ("kind", "steps", "first_bad", "last_good", "headline", "subject", *_FACT_KEYS)
        ),
    }  # fmt: skip


def _step(step: Mapping[str, Any]) -> View:
    verdict = read.text(step, "verdict", "unknown")
    return {
        **{k: read.text(step, k) for k in ("rev", "subject", "reason")},
        "verdict": verdict,
        "word": words.STATUS.get(verdict, verdict),
        "seconds": read.number(step, "seconds"),
    }


def _commit(value: Any) -> str:
    """``rev subject`` where the two are known."""
    both = [read.text(value, "rev")[:12], read.text(value, "subject")]
    return " ".join(filter(None, both)) or read.sentence(value)


_FACT_KEYS = ("first_stage", "worst", "cases")


def _lines(value: Any) -> list[tuple[str, str]]:
    """(words, value) of an object; one nameless line of anything else."""
    if isinstance(value, Mapping):
        return [(words.of(str(k)), read.sentence(v)) for k, v in value.items() if read.sentence(v)]
    if isinstance(value, list):
        return [("", read.sentence(v)) for v in value]
    return [("", read.sentence(value))]


def _rest(result: Mapping[str, Any], keys: tuple[str, ...]) -> list[tuple[str, str]]:
    """What else stands in the result: nothing is kept from the reader."""
    rest = [(words.of(k), read.sentence(v)) for k, v in result.items() if k not in keys]
    return [(k, v[: read.LONGEST]) for k, v in rest if v]
