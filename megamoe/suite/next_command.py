"""The command to go on with after a run with reds: the last line of ``megamoe check``."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from rich.console import Console

from megamoe.cases import Case
from megamoe.cases.forms import LAWS
from megamoe.judge import BAD, CRASH, HANG, IN_LAW, Symptom, symptoms
from megamoe.spec.stages import STAGES, STEPS
from megamoe.suite.earlier import LAST, earlier, line_of
from megamoe.suite.origins import alike_before, line_beside, own_fault, what_raises
from megamoe.suite.telling import size, smallest

REDUCIBLE: Final = ("the backend raised", CRASH, HANG)
"""Words of an error that a smaller problem may explain."""
ALL_CALLS: Final = "for all calls of the case"
"""Words of a case whose calls are slow together: no single one of them hangs."""
DEFAULT_TIMEOUT: Final = 120.0
"""Seconds of ``--timeout`` where nobody asks for others."""
INPUT: Final = "wrote into input"
"""Words of a red whose outputs nobody looked at."""
FORWARDS: Final = ("forward", "property")
"""Kinds whose cases ``reduce`` takes; ``explain`` takes them and staging."""
MOST: Final = 3
"""Sorts of wrong outputs that have a line each."""
LONGEST_SYMPTOM: Final = 100
"""Characters of a symptom in a line with a command."""
ENOUGH: Final = 4
"""Wrong elements of a stage; of fewer, ``explain`` can seldom tell a cause."""
FEW: Final = 10
"""Cases of a pattern whose green says little: all quick cases are the next command."""
OUTLIVES: Final = "something outlives a call (a flag, a buffer, a cache, memory that nobody wrote)"
"""The conclusion from a red among other cases that is green alone."""


def show_next(
    lines: Sequence[str], console: Console, alone: Mapping[str, str] | None = None,
    is_folded: bool = False,
) -> None:  # fmt: skip
    """Print ``lines``, those of :func:`lines_of`, as the last of a run. ``alone``: the status of
    some reds where they ran again, alone. If some pass, that is said before, unless the report
    ``is_folded`` and has said it."""
    if (names := passing(alone)) and not is_folded:
        say(console, _passing_line(names))
    for line in lines:
        say(console, line)


def lines_of(
    report: Mapping[str, Any], cases: Sequence[Case], alone: Mapping[str, str]
) -> list[str]:
    """The command to go on with after a run with a red, or after a green one of few cases: for the
    most frequent symptom that a command can follow, on the red that tells causes apart best. None
    where many cases are green. Exceptions and wrong outputs seldom have one cause, nor have wrong
    outputs of two steps: each sort has a line, which names its most frequent symptom, and
    ``explain`` stands first. ``cases``: those of the run; a red that is not among them keeps its
    place in the report. ``alone``: see :func:`show_next`."""
    reds, by_id = reds_of(report), {case.id: case for case in cases}
    if not reds:
        return _wider(report)
    groups = symptoms(reds)
    sorts = [(sort, _first_alone(sort, alone, by_id)) for sort in _sorts(groups)]
    if sorts and _passes(sorts[0][1]):  # what outlives a call may be the cause of all that is red
        sorts = [s for s in sorts if s is sorts[0] or (s[1] and not _passes(s[1]))]
    this = len(groups) == 1 or len(sorts) > 1
    offers = [
        Offer(sort[0], _after(report, red[0], [*by_id])) if red and _passes(red)
        else _offer(report, sort, by_id, this)
        for sort, red in sorts
    ]  # fmt: skip
    if len(offers) < 2:
        return [line for offer in offers for line in offer.lines]
    offers.sort(key=lambda offer: (" explain " not in offer.lines[-1], " show " in offer.lines[-1]))
    return [line for offer in offers for line in offer.full_lines(len(reds))]


def _wider(report: Mapping[str, Any]) -> list[str]:
    """After a green of few cases that a pattern names: all quick cases."""
    count = sum(case["status"] == "pass" for case in report["cases"])
    if not report.get("case") or not 0 < count <= FEW:
        return []
    words = f"--backend {backend_of(report)}"
    return [f"next: all quick cases: {command(report, 'check', words)}"]


class Offer(NamedTuple):
    """What to do next about a symptom."""

    symptom: Symptom
    lines: list[str]
    """The last begins with ``next: ``."""

    def full_lines(self, reds: int) -> list[str]:
        """The lines, of which the last names the symptom; ``reds`` are those of the run."""
        count, _, text = self.symptom.line(reds).partition(": ")
        text = textwrap.shorten(text, LONGEST_SYMPTOM, placeholder=" ...")
        command = self.lines[-1].removeprefix("next: ")
        return [*self.lines[:-1], f"next: for {count} ({text}): {command}"]


def _sorts(groups: Sequence[Symptom]) -> list[list[Symptom]]:
    """The symptoms of exceptions, and at most :data:`MOST` sorts of wrong outputs, the most
    frequent first. Wrong outputs that a command can follow are sorted by the step that computes
    the first wrong stage: two stages of one step seldom have two causes. All others are one
    sort."""
    sorts: dict[str, list[Symptom]] = {}
    for symptom in groups:
        key = str(symptom.cases[0]["status"])
        if key == "fail" and any(_verb(case, None) for case in symptom.cases):
            stage = symptom.text.partition(":")[0]
            key = f"of {next((step for step in STEPS if stage in step), stage)}"
        sorts.setdefault(key, []).append(symptom)
    wrong = [key for key, sort in sorts.items() if sort[0].cases[0]["status"] == "fail"]
    return [sort for key, sort in sorts.items() if key not in wrong[MOST:]]


def _first_alone(
    sort: Sequence[Symptom], alone: Mapping[str, str], by_id: Mapping[str, Case]
) -> tuple[str, str] | None:
    """The first red of a sort that ran again, alone, and its status there. If it passes, the
    smallest of those that pass: ``reduce --after`` calls it many times."""
    names = {case["id"] for symptom in sort for case in symptom.cases}
    runs = [(name, status) for name, status in alone.items() if name in names]
    if not runs or runs[0][1] != "pass":
        return runs[0] if runs else None
    passes = [{"id": name} for name, status in runs if status == "pass"]
    return smallest_id(passes, by_id), "pass"


def _passes(red: tuple[str, str] | None) -> bool:
    return red is not None and red[1] == "pass"


def _after(report: Mapping[str, Any], name: str, order: Sequence[str]) -> list[str]:
    """What to do with a red that passes alone; ``order``: the ids in the order of the run. If one
    other case ran, which passed, that is the earlier case: the run was the one that ``reduce
    --after`` names. Earlier reds that raised at the same line are to be tried first, else the last
    cases before it in its process."""
    case = next(case for case in report["cases"] if case["id"] == name)
    others = [case for case in report["cases"] if case["id"] != name]
    reds = reds_of(report)
    beside = line_beside(case, reds)
    line, before = line_of(case, report["cases"]), earlier(case, report["cases"])
    is_alone = bool(line) and not before  # in its process, so the other case has no part in it
    if len(others) == 1 and others[0]["status"] == "pass" and not is_alone:
        first = others[0]["id"]
        again = f"--backend {backend_of(report)} --case {first},{name} --in-order"
        next_line = f"next: mend what {first} leaves behind, then: "
        return [*beside, f"{next_line}{command(report, 'check', again)}"]
    history = [f"{name} ran in {line}"] if line else []
    first = alike_before(case, reds, order) or before[-LAST:]
    option = f" --first {shlex.quote(','.join(first))}" if first else ""
    words = f"{name} --after{option} --backend {backend_of(report)}"
    return [*beside, *history, f"next: {command(report, 'reduce', words)}"]


def _offer(
    report: Mapping[str, Any], sort: Sequence[Symptom], by_id: Mapping[str, Case], this: bool
) -> Offer:
    """What to do next about the first symptom of a sort that a command can follow. ``this``: that
    word says which symptom is meant; otherwise a line without a command names it."""
    for symptom in sort:
        for case in symptom.examples:
            place = own_fault(case)
            if place:
                return Offer(symptom, _mend(report, place, case))
        choice = choice_of(symptom, by_id)
        if choice is not None:
            verb = _verb(next(c for c in symptom.cases if c["id"] == choice), by_id.get(choice))
            words = f"{choice} --backend {backend_of(report)}{_hang_limit(symptom)}"
            return Offer(symptom, [f"next: {command(report, verb, words)}"])
        wrong = symptom.examples[0]
        if wrong["kind"] == "ep":
            return Offer(symptom, _over_ranks(report, smallest_id(symptom.cases, by_id)))
        says_all = wrong["kind"] == "property" or INPUT in wrong["reason"]
        if wrong["status"] == "error" or says_all:
            what = what_raises(wrong) or ("this" if this else f"this ({_reason(wrong)})")
            return Offer(symptom, _mend(report, what, wrong))
    return Offer(sort[0], [f"next: megamoe show {sort[0].examples[0]['id']}"])


def choice_of(symptom: Symptom, by_id: Mapping[str, Case]) -> str | None:
    """The id of the red of a symptom that a command can follow: the one that tells causes apart
    best, of problems to reduce the smallest. None where there is no such command."""
    verbs = {case["id"]: _verb(case, by_id.get(case["id"])) for case in symptom.cases}
    names = [name for name, verb in verbs.items() if verb == "explain" and name in by_id]
    wrong = {case["id"]: wrong_tokens(case) for case in symptom.cases}
    outside = {case["id"]: _most_outside(case) for case in symptom.cases}
    names = [name for name in names if outside[name] >= ENOUGH] or names
    best = smallest((by_id[name] for name in names), wrong)
    if best is not None:
        return best.id
    cases = [case for case in symptom.cases if verbs[case["id"]] == "reduce"]
    if cases and not any(verb == "explain" for verb in verbs.values()):
        return smallest_id(cases, by_id)
    return next((case["id"] for case in symptom.examples if verbs[case["id"]]), None)


def smallest_id(reds: Sequence[Mapping[str, Any]], by_id: Mapping[str, Case]) -> str:
    """The id of the smallest of some reds; of the first where their sizes are not known."""
    ids = [str(red["id"]) for red in reds]
    return min((n for n in ids if n in by_id), key=lambda n: size(by_id[n]), default=ids[0])


def _most_outside(case: Mapping[str, Any]) -> int:
    """The most wrong elements of a stage of a red."""
    return max((f["outside"] for f in case.get("findings", ()) if _is_of_forward(f)), default=0)


def wrong_tokens(case: Mapping[str, Any]) -> set[int]:
    """The tokens of a red with an element outside, of all stages."""
    of_forward = (f for f in case.get("findings", ()) if _is_of_forward(f))
    return {int(row) for finding in of_forward for row in finding["rows"]}


def reds_of(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cases of a report that are red."""
    return [case for case in report["cases"] if case["status"] in BAD]


def _over_ranks(report: Mapping[str, Any], name: str) -> list[str]:
    """A case over ranks: one rank alone tells whether the fault is between ranks; if it is red
    there too, the cases without ranks are the simpler ones."""
    ranks = re.search(r" --ep (\d+)", report.get("options", ""))
    options = re.sub(r" --ep \d+", "", report.get("options", ""))
    words = f"megamoe check --backend {backend_of(report)}"
    if ranks is None or int(ranks[1]) != 1:
        return [
            "if this passes, the fault is between ranks; if not, it is in the layer of each:",
            f"next: {words} --case {name} --ep 1{options}",
        ]
    if "forward" in report.get("callables", ()):
        return [
            "one rank is enough for this, so the fault is in the layer:",
            f"next: {words} --kind forward{options}",
        ]
    return [f"next: megamoe show {name}"]


def _hang_limit(symptom: Symptom) -> str:
    """The option that keeps ``reduce`` to the least limit that a hang of the run had; empty where
    that is the default."""
    matches = [re.search(rf"{HANG} ([\d.]+) s", case["reason"]) for case in symptom.cases]
    limits = [float(each[1]) for each in matches if each is not None]
    return f" --timeout {min(limits):g}" if limits and min(limits) < DEFAULT_TIMEOUT else ""


def _reason(case: Mapping[str, Any]) -> str:
    """The reason of a red, of a fail the first part."""
    reason = str(case["reason"]).removeprefix(f"case {case['id']}: ")
    return reason.partition("; ")[0] if case["status"] == "fail" else reason


def _mend(report: Mapping[str, Any], what: str, case: Mapping[str, Any]) -> list[str]:
    words = f"--backend {backend_of(report)} --case {case['id']}"
    return [f"next: mend {what}, then: {command(report, 'check', words)}"]


def _verb(case: Mapping[str, Any], definition: Case | None) -> str:
    """``explain`` for a wrong stage or a wrong staged tensor, ``reduce`` for an exception, a crash
    or a hang in a forward; else nothing. A broken law and an exception in a variant of one are
    neither: both verbs make one call of the problem itself, which is right. A problem without
    tokens is as small as it gets. ``explain`` follows MXFP4 alone; ``reduce`` takes all formats."""
    wrong = "explain"
    if definition is not None and definition.params.get("weight_format", "mxfp4") != "mxfp4":
        wrong = "reduce"
    if case["kind"] == "staging":
        return "explain" if case["status"] == "fail" else ""
    if case["kind"] not in FORWARDS:
        return ""
    if case["status"] == "error":
        reason = case["reason"]
        of_forward = any(words in reason for words in REDUCIBLE)
        is_least = definition is not None and definition.params.get("tokens") == 0
        return "reduce" if of_forward and not is_least and not _is_of_law(reason) else ""
    return wrong if any(_is_of_forward(f) for f in case.get("findings", ())) else ""


def _is_of_law(reason: str) -> bool:
    """Whether an error is of the further calls of a law."""
    return IN_LAW in reason or ALL_CALLS in reason


def _is_of_forward(finding: Mapping[str, Any]) -> bool:
    """Whether a finding is of the forward against its golden, and not of a law."""
    return finding["stage"] in STAGES and finding["text"].partition(":")[0] not in LAWS


def passing(alone: Mapping[str, str] | None) -> list[str]:
    """The reds that passed when they ran again, alone."""
    return [name for name, status in (alone or {}).items() if status == "pass"]


def _passing_line(names: Sequence[str]) -> str:
    """What it means that these reds pass alone, in one line."""
    if len(names) == 1:
        return f"{names[0]} passes alone, in a fresh process: {OUTLIVES}"
    return f"{', '.join(names)} pass, each alone in a fresh process: {OUTLIVES}"


def backend_of(report: Mapping[str, Any]) -> str:
    """The backend of a report, as a word of a command."""
    return shlex.quote(report["backend"])


def command(report: Mapping[str, Any], verb: str, words: str) -> str:
    """A command with the options of the run."""
    return f"megamoe {verb} {words}{report.get('options', '')}"


def say(console: Console, text: str) -> None:
    """Print a line as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
