"""What a red looks like, in words that other reds share. One fault can have several symptoms."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from megamoe.printable import quantity

RAISED: Final = "the backend raised"
"""Begins the reason of a call that raised an exception."""
_EXCEPTION: Final = re.compile(
    RAISED + r" (?P<type>[\w.]+)(?:: (?P<text>.*))? "
    r"\((?P<place>[^()]*, line \d+, in (?P<function>[^()\s]+))\)(?P<rest>.*)", re.S,
)  # fmt: skip
_IN_CALL: Final = "in a call "
_WITHIN: Final = f"(?:under |{_IN_CALL})"
"""How :func:`in_variant` begins."""
_OF_CALLS: Final = re.compile(
    rf"{_WITHIN}[^:]+: (?P<type>\w+):(?: (?P<text>(?!.*; {_WITHIN}).*))?", re.S
)
"""What a law of an engine's surroundings says of one exception that some of its calls raised. Of
several, or of one and other outputs, it says more than an ordinary call can."""
_ID: Final = re.compile(r"\b(?=[a-f]*\d)[0-9a-f]{8,}\b")
_NUMBER: Final = re.compile(
    r"\b(?P<revision>\d{4}-\d{2})\b"
    r"|(?<![\w.])[-+]?(?:0x[0-9a-fA-F]+|(?:\d[\d,]*\d|\d)(?:\.\d+)?(?:e[-+]?\d+)?)(?![\w])"
)
TO_CATCH: Final = "this case was made to catch"
"""Begins the line with the sentence of a case: a red can have other causes."""
IN_LAW: Final = "; in law "
"""Begins the end of an exception's reason that names the law whose variant raised it."""
CRASH: Final = "the backend ended its process"
"""Begins the reason of a call whose process ended."""
HANG: Final = "no result within"
"""Begins the reason of a call that takes too long."""
LEARNED_LIMIT: Final = "; the limit was learned from cases that passed, after a first hang"
"""Ends the reason of a hang whose limit nobody asked for."""
_SINGULAR: Final = re.compile(
    r"\bN ((?:[a-z]+ )?(?:row|token|slot|rank|expert|call|output|element|value|byte|channel|group"
    r"|tile|block|replica|run|copy|kernel|thread|step|stage))\b"
)
"""A number of things in the singular: whether there was one is a number too."""
_ROWS_OF: Final = re.compile(r"(\w+): N of N rows have other bits, the first is N")
"""What a golden of digests says in place of elements."""
_RIGHT: Final = re.compile(r"; right under [^;]*$")


class Origin(NamedTuple):
    """An exception of the backend, and the line that raised it."""

    type: str
    text: str
    place: str
    """``k.py, line 7, in f``."""
    function: str
    rest: str
    """What the reason says after it."""


def in_variant(label: str) -> str:
    """A variant of a law, in the reason of an error: ``under`` a mode of torch, or ``in a call``
    that its label describes."""
    inside = f"in {label}"
    return inside if inside.startswith(_IN_CALL) else f"under {label}"


def origin_of(reason: str) -> Origin | None:
    """The exception of which the reason of an error tells; None where it tells of none. If all
    calls of a law that raised have the same exception, it is that one: their list goes."""
    text, in_law, _ = reason.partition(IN_LAW)
    match = _EXCEPTION.search(text)
    if match is None:
        return None
    of_calls = _OF_CALLS.fullmatch(match["text"] or "") if in_law else None
    kind, words = (of_calls or match).group("type", "text")
    return Origin(kind, words or "", match["place"], match["function"], match["rest"])


def symptom_of(case_id: str, status: str, reason: str) -> str:
    """The symptom of a red in one line: of an error the exception's type, function and text, of a
    fail the first bad stage or law. Numbers are N, other ids are ID, and the case is CASE, so that
    cases of one sort have one symptom; one thing and several are one symptom too. The name of a
    contract stays, and so do the numbers of its clauses, where the output is right under these; the
    law whose variant raised goes, and so does the list of its calls that raised the same."""
    text = reason.removeprefix(f"case {case_id}: ")
    text = text.replace(case_id, "CASE").partition(LEARNED_LIMIT)[0]
    origin, right = origin_of(text), None
    text = text.partition(IN_LAW)[0]
    if origin and text.startswith(RAISED):
        detail = f": {origin.text}" if origin.text else ""
        text = f"{origin.type} in {origin.function}{detail}{origin.rest}"
    elif status == "fail":
        right = _RIGHT.search(text)
        text = text.partition("; ")[0]
    text = _ID.sub("ID", text)
    text = _NUMBER.sub(lambda match: match["revision"] or "N", text)
    text = _ROWS_OF.sub(r"\1: N of N outside", _SINGULAR.sub(r"N \1s", text))
    return text + (right[0] if right else "")


@dataclass
class Symptom:
    """Reds of one symptom."""

    text: str
    """As :func:`symptom_of` gives it."""
    cases: list[Mapping[str, Any]] = field(default_factory=list)

    def examples_with(self, first: str | None) -> list[Mapping[str, Any]]:
        """:attr:`examples`, but with the case of the id ``first`` for those of its kind, if it is
        one of these cases and not ``shortened``."""
        case = next((c for c in self.cases if c["id"] == first and not c.get("shortened")), None)
        if case is None:
            return self.examples
        stands_for = ("forward", "property") if case["kind"] == "property" else (case["kind"],)
        return [case, *(c for c in self.examples if c["kind"] not in stands_for)]

    @property
    def examples(self) -> list[Mapping[str, Any]]:
        """The first case of each kind, one that is not ``shortened`` before others: its picture
        stands for them. A property that fails as forwards do is one of them: its law holds."""
        first: dict[Any, Mapping[str, Any]] = {}
        for case in sorted(self.cases, key=lambda case: bool(case.get("shortened"))):
            first.setdefault(case.get("kind"), case)
        if "forward" in first:
            first.pop("property", None)
        return list(first.values())

    def line(self, reds: int) -> str:
        """``64 of 70 reds: RuntimeError in prepare: ...``; ``reds`` are those of the run."""
        return f"{len(self.cases)} of {quantity(reds, 'red')}: {self.text}"


def symptoms(reds: Sequence[Mapping[str, Any]]) -> list[Symptom]:
    """Reds of a report, each with ``id``, ``kind``, ``status`` and ``reason``, by symptom: the most
    frequent first, else in the order of ``reds``."""
    groups: dict[tuple[str, str], Symptom] = {}
    for case in reds:
        fields = [str(case.get(name, "")) for name in ("id", "status", "reason")]
        text = symptom_of(*fields)
        groups.setdefault((fields[1], text), Symptom(text)).cases.append(case)
    return sorted(groups.values(), key=lambda symptom: -len(symptom.cases))
