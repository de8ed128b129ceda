"""The reds of a run by symptom, at its end: one picture for each symptom and kind."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.console import Console

from megamoe.cases import Case
from megamoe.cases.forms import LAWS
from megamoe.judge import BAD, CRASH, IN_LAW, Symptom, Verdict, picture, symptoms
from megamoe.printable import counted
from megamoe.spec.stages import STAGES
from megamoe.suite.telling import smallest

PICTURES: Final = 20
"""Pictures that a run shows, and fails whose details it keeps for a report."""
ALL_PICTURES: Final = 10**9
"""``--pictures all``: a picture of every red, with every wrong stage."""
NAMED: Final = 3
"""Cases of a symptom that are named without a picture."""
OWN_FAULTS: Final = (
    "NameError", "UnboundLocalError", "AttributeError", "ImportError", "ModuleNotFoundError",
    "SyntaxError", "IndentationError", "TypeError",
)  # fmt: skip
"""Exceptions that a smaller problem does not explain: the line that raised them does."""
REDUCED: Final = ("the backend raised", CRASH)
"""Words of an error that a smaller problem may explain."""
CALL: Final = "in _called"
"""The end of a place in the worker's own line that calls the backend."""
FORWARDS: Final = ("forward", "property")
"""Kinds whose cases ``reduce`` takes; ``explain`` takes them and staging."""
OUTLIVES: Final = "something outlives a call (a flag, a buffer, a cache)"
"""The conclusion from a red among other cases that is green alone."""
_OF_VERDICT: Final = tuple(Verdict.__dataclass_fields__)


def show(
    report: Mapping[str, Any], console: Console, pictures: int = PICTURES,
    cases: Sequence[Case] = (),
) -> None:  # fmt: skip
    """Print the reds of ``report``, each symptom once, with at most ``pictures`` pictures in all;
    then what was shortened. Nothing where nothing is red. Where there are several reds, a picture
    shows the first wrong stage only, unless ``pictures`` is :data:`ALL_PICTURES`, and the first
    red of a symptom says what its case is there for, if it is among ``cases``."""
    breaks = {case.id: case.breaks for case in cases}
    reds = _reds(report)
    if not reds:
        return
    found = symptoms(reds)
    if len(reds) > 1:
        several = (
            f"{len(found)} symptoms; one fault can show several"
            if len(found) > 1
            else "one symptom"
        )
        _say(console, f"{len(reds)} reds show {several}. N stands for a number.\n")
    drawn: list[Mapping[str, Any]] = []
    left, every = pictures, pictures >= ALL_PICTURES
    brief = len(reds) > 1 and not every
    for symptom in found:
        here = symptom.cases if every else symptom.pictured[: max(0, left)]
        left, drawn = left - len(here), [*drawn, *here]
        if len(reds) > 1 or not here:
            kinds = Counter(case["kind"] for case in symptom.cases)
            of = ", ".join(f"{kind} {n}" for kind, n in kinds.items())
            _say(console, f"{symptom.line(len(reds))}  [{of}]")
        for case in here:
            _say(console, f"\n{_indented(_picture(report, case, brief))}")
            if case is here[0] and len(reds) > 1 and case["id"] in breaks:
                _say(console, f"  if it fails: {breaks[case['id']]}")
        others = [case["id"] for case in symptom.cases if case not in here]
        if others:
            more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
            before = "\n  also " if here else "  "
            _say(console, f"{before}{', '.join(others[:NAMED])}{more}")
        _say(console, "")
    stages = any(sum(f["outside"] > 0 for f in case["findings"]) > 1 for case in drawn)
    line = left_out(report, reds, len(drawn), pictures, brief and stages)
    if line:
        _say(console, f"{line}\n")


def _picture(report: Mapping[str, Any], case: Mapping[str, Any], brief: bool) -> str:
    verdict = Verdict.from_dict({k: v for k, v in case.items() if k in (*_OF_VERDICT, "id")})
    return picture(verdict, report["backend"], report.get("options", ""), brief)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def left_out(
    report: Mapping[str, Any], reds: Sequence[Mapping[str, Any]], shown: int, pictures: int,
    brief: bool = False,
) -> str:  # fmt: skip
    """What is not shown of the reds, and the options that show it; empty where all is shown."""
    unmapped = sum(bool(case.get("shortened")) for case in reds)
    said = []
    if shown < len(reds):
        said.append(f"the pictures of {len(reds) - shown} of {counted(len(reds), 'red')}")
    if brief:
        said.append("all but the first wrong stage in each picture")
    if unmapped:
        said.append(f"the maps of {counted(unmapped, 'red')} in a report")
    if not said:
        return ""
    alone = _command(report, "check", f"--backend {_backend(report)} --case ID")
    whole = "`--pictures all` shows all, " if pictures else ""
    return f"left out: {', '.join(said)}\n  {whole}`{alone}` shows one case"


def show_next(
    report: Mapping[str, Any], console: Console, cases: Sequence[Case] = (),
    alone: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Print the command to go on with, the last line of a run with a red: for the most frequent
    symptom that a command can follow, on the red that tells causes apart best. ``cases``: those of
    the run; a red that is not among them keeps its place in the report. ``alone``: the status of
    some reds where they ran again, alone. Those that pass so are named before."""
    found, known = symptoms(_reds(report)), {case.id: case for case in cases}
    after = [name for name, status in (alone or {}).items() if status == "pass"]
    for name in after:
        _say(console, f"{name} passes alone, in a fresh process: {OUTLIVES}")
    if after and next(iter(alone or {})) == after[0]:  # of the most frequent symptom
        words = f"{after[0]} --after --backend {_backend(report)}"
        _say(console, f"next: {_command(report, 'reduce', words)}")
        return
    for symptom in found:
        for case in symptom.pictured:
            place = own_fault(case)
            if place:
                _mend(report, console, place, case)
                return
        chosen = chosen_of(symptom, known)
        if chosen is not None:
            verb = _verb(next(c for c in symptom.cases if c["id"] == chosen), known.get(chosen))
            words = f"{chosen} --backend {_backend(report)}"
            _say(console, f"next: {_command(report, verb, words)}")
            return
        wrong = symptom.pictured[0]
        if wrong["status"] == "error" or wrong["kind"] == "property":  # its reason says all
            _mend(report, console, "this" if len(found) == 1 else f"this ({_reason(wrong)})", wrong)
            return
    if found:
        _say(console, f"next: megamoe show {found[0].pictured[0]['id']}")


def chosen_of(symptom: Symptom, known: Mapping[str, Case]) -> str | None:
    """The id of the red of a symptom that a command can follow: the one that tells causes apart
    best. None where there is no such command."""
    verbs = {case["id"]: _verb(case, known.get(case["id"])) for case in symptom.cases}
    explained = [name for name, verb in verbs.items() if verb == "explain"]
    best = smallest(known[name] for name in explained if name in known)
    first = next((case["id"] for case in symptom.pictured if verbs[case["id"]]), None)
    return best.id if best is not None else first


def _reason(case: Mapping[str, Any]) -> str:
    """The reason of a red, of a fail the first part."""
    reason = str(case["reason"]).removeprefix(f"case {case['id']}: ")
    return reason.partition("; ")[0] if case["status"] == "fail" else reason


def _mend(report: Mapping[str, Any], console: Console, what: str, case: Mapping[str, Any]) -> None:
    words = f"--backend {_backend(report)} --case {case['id']}"
    _say(console, f"next: mend {what}, then: {_command(report, 'check', words)}")


def _reds(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [case for case in report["cases"] if case["status"] in BAD]


def _verb(case: Mapping[str, Any], known: Case | None) -> str:
    """``explain`` for a wrong stage or a wrong staged tensor, ``reduce`` for an exception in a
    forward; else nothing. A broken law and an exception in a variant of one are neither: both verbs
    make one call of the problem itself, which is right. ``explain`` follows MXFP4 alone; ``reduce``
    takes every format."""
    wrong = "explain"
    if known is not None and known.params.get("weight_format", "mxfp4") != "mxfp4":
        wrong = "reduce"
    if case["kind"] == "staging":
        return "explain" if case["status"] == "fail" else ""
    if case["kind"] not in FORWARDS:
        return ""
    if case["status"] == "error":
        reason = case["reason"]
        of_forward = any(words in reason for words in REDUCED) and IN_LAW not in reason
        return "reduce" if of_forward else ""
    return wrong if any(_is_of_forward(f) for f in case["findings"]) else ""


def _is_of_forward(finding: Mapping[str, Any]) -> bool:
    """Whether a finding is of the forward against its golden, and not of a law."""
    return finding["stage"] in STAGES and finding["text"].partition(":")[0] not in LAWS


def own_fault(case: Mapping[str, Any]) -> str:
    """What to mend where the backend's code is wrong whatever the problem is: ``FILE, line N, in
    NAME``. If that line is the worker's call, the backend's arguments are wrong."""
    reason = case["reason"].partition(IN_LAW)[0]
    found = re.search(r"raised (\w+): .*\((.+, line \d+.*)\)$", reason, re.DOTALL)
    if case["status"] != "error" or found is None or found[1] not in OWN_FAULTS:
        return ""
    return "the arguments of the backend's method" if found[2].endswith(CALL) else found[2]


def _backend(report: Mapping[str, Any]) -> str:
    return shlex.quote(report["backend"])


def _command(report: Mapping[str, Any], verb: str, words: str) -> str:
    return f"megamoe {verb} {words}{report.get('options', '')}"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
