"""The reds of a run by symptom, at its end: one picture for each symptom and kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console

from megamoe.cases import Case
from megamoe.judge import TO_CATCH, Symptom, Verdict, picture, symptoms
from megamoe.printable import quantity
from megamoe.suite.next_command import (
    OUTLIVES,
    backend_of,
    choice_of,
    command,
    passing,
    reds_of,
    say,
)

PICTURES: Final = 20
"""Pictures that a run shows, and fails whose details it keeps for a report."""
ALL_PICTURES: Final = 10**9
"""``--pictures all``: a picture of every red, with every wrong stage."""
NAME_LIMIT: Final = 3
"""Cases of a symptom that are named without a picture."""
FOLD_LIMIT: Final = 5
"""Symptoms that get a line where most reds pass alone."""
WIDTH: Final = 90
"""Characters of such a line's text."""
_OF_VERDICT: Final = tuple(Verdict.__dataclass_fields__)


def show(
    report: Mapping[str, Any], console: Console, pictures: int = PICTURES,
    cases: Sequence[Case] = (), alone: Mapping[str, str] | None = None,
) -> bool:  # fmt: skip
    """Print the reds of ``report``, each symptom once, with at most ``pictures`` pictures in all;
    then what was shortened. Nothing where nothing is red. Where there are several reds, a picture
    shows the first wrong stage only, unless ``pictures`` is :data:`ALL_PICTURES`, and the first
    red of a symptom says what its case is there for, if it is among ``cases``.

    ``alone``: the status of some reds where they ran again, alone. Where most reds pass so, that
    comes first, and symptoms are lines without pictures, since they may all follow from it.
    Returns whether this was so."""
    by_id = {case.id: case for case in cases}
    reds = reds_of(report)
    if not reds:
        return False
    groups = symptoms(reds)
    if len(reds) > NAME_LIMIT and pictures < ALL_PICTURES and _most_pass(groups, alone or {}):
        _fold(report, console, groups, alone or {})
        return True
    if len(reds) > 1:
        several = (
            f"{len(groups)} symptoms; one fault can show several"
            if len(groups) > 1
            else "one symptom"
        )
        say(console, f"{len(reds)} reds show {several}.{_of_n(groups)}\n")
    drawings: list[Mapping[str, Any]] = []
    budget, every = pictures, pictures >= ALL_PICTURES
    brief = len(reds) > 1 and not every
    for symptom in groups:
        # The picture is that of the case that the next command names, so that both can be compared.
        few = symptom.cases if every else symptom.examples_with(choice_of(symptom, by_id))
        here = few if every else few[: max(0, budget)]
        budget, drawings = budget - len(here), [*drawings, *here]
        if len(reds) > 1 or not here:
            kinds = Counter(case["kind"] for case in symptom.cases)
            of = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
            say(console, f"{symptom.line(len(reds))}  [{of}]")
        for case in here:
            say(console, f"\n{_indented(_picture(report, case, brief))}")
            # Why a case is there is said of its values; an exception has a line of its own.
            explains = case is here[0] and case["status"] == "fail" and case["id"] in by_id
            if explains and len(reds) > 1:
                say(console, f"  {TO_CATCH}: {by_id[case['id']].breaks}")
        others = [case["id"] for case in symptom.cases if case not in here]
        if others:
            more = f" and {len(others) - NAME_LIMIT} more" if len(others) > NAME_LIMIT else ""
            before = "\n  also " if here else "  "
            say(console, f"{before}{', '.join(others[:NAME_LIMIT])}{more}")
        say(console, "")
    stages = any(sum(f["outside"] > 0 for f in case["findings"]) > 1 for case in drawings)
    line = omissions(report, reds, len(drawings), pictures, brief and stages)
    if line:
        say(console, f"{line}\n")
    return False


def _of_n(groups: Sequence[Symptom]) -> str:
    """What N means, if a symptom has it."""
    has_n = any(re.search(r"\bN\b", symptom.text) for symptom in groups)
    return " N stands for a number." if has_n else ""


def _most_pass(groups: Sequence[Symptom], alone: Mapping[str, str]) -> bool:
    """Whether the symptoms of the reds that pass alone have more than half of all reds."""
    names = passing(alone)
    of_them = [s for s in groups if any(case["id"] in names for case in s.cases)]
    reds = sum(len(symptom.cases) for symptom in groups)
    return sum(len(symptom.cases) for symptom in of_them) > reds / 2


def _fold(
    report: Mapping[str, Any], console: Console, groups: Sequence[Symptom],
    alone: Mapping[str, str],
) -> None:  # fmt: skip
    """A line for each of the most frequent symptoms, and how to see more."""
    reds = sum(len(symptom.cases) for symptom in groups)
    passes, total = len(passing(alone)), quantity(len(groups), "symptom")
    say(console, f"{reds} reds; {_ran_again(len(alone), passes)}: {OUTLIVES}")
    stay = [case for s in groups for case in s.cases if alone.get(case["id"], "pass") != "pass"]
    how_many = "all" if all(_has_several_calls(case) for case in stay) else "most"
    say(console, f"That can be the cause of {how_many}. They show {total}.{_of_n(groups)}")
    most = len(groups) if len(groups) <= FOLD_LIMIT + 1 else FOLD_LIMIT  # a line for one is no gain
    for symptom in groups[:most]:
        kinds = Counter(case["kind"] for case in symptom.cases)
        of = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
        text = symptom.text if len(symptom.text) <= WIDTH else f"{symptom.text[:WIDTH]}..."
        say(console, f"{len(symptom.cases):>5}  {text}  [{of}]")
        for case in (case for case in symptom.cases if case["id"] in alone):
            say(console, f"       {case['id']} {_how_alone(case, alone[case['id']])}")
    if len(groups) > most:
        rest = sum(len(symptom.cases) for symptom in groups[most:])
        say(console, f"{rest:>5}  reds of {len(groups) - most} further symptoms")
    every = [case for symptom in groups for case in symptom.cases]
    say(console, f"{omissions(report, every, 0, PICTURES)}\n")


def _ran_again(count: int, passes: int) -> str:
    """How many of the reds that ran again passed."""
    if count == 1:
        return "the one that ran again, alone in a fresh process, passed"
    each = "that ran again, each alone in a fresh process"
    return (
        f"all {count} {each}, passed" if passes == count else f"{passes} of {count} {each}, passed"
    )


def _has_several_calls(case: Mapping[str, Any]) -> bool:
    """Whether a case makes several calls in one process: then one can spoil another."""
    return bool(case["kind"] == "property")


def _how_alone(case: Mapping[str, Any], status: str) -> str:
    """What a red did alone, after its name."""
    if status == "pass":
        return "passes alone"
    if _has_several_calls(case):
        return "is red alone too: its law makes several calls, and one call can spoil another"
    return "is red alone too: no earlier case is needed"


def _picture(report: Mapping[str, Any], case: Mapping[str, Any], brief: bool) -> str:
    verdict = Verdict.from_dict({k: v for k, v in case.items() if k in (*_OF_VERDICT, "id")})
    return picture(verdict, report["backend"], report.get("options", ""), brief)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def omissions(
    report: Mapping[str, Any], reds: Sequence[Mapping[str, Any]], drawings: int, pictures: int,
    brief: bool = False,
) -> str:  # fmt: skip
    """What is not shown of the reds, and the options that show it; empty where all is shown."""
    missing_maps = sum(bool(case.get("shortened")) for case in reds)
    parts = []
    if drawings < len(reds):
        parts.append(f"the pictures of {len(reds) - drawings} of {quantity(len(reds), 'red')}")
    if brief:
        parts.append("all but the first wrong stage in each picture")
    if missing_maps:
        parts.append(f"the maps of {quantity(missing_maps, 'red')} in a report")
    if not parts:
        return ""
    alone = command(report, "check", f"--backend {backend_of(report)} --case ID")
    whole = "`--pictures all` shows all, " if pictures else ""
    return f"left out: {', '.join(parts)}\n  {whole}`{alone}` shows one case"
