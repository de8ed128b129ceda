"""``megamoe explain``: chooses the element, computes its life, and prints it."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from megamoe.commands import explain_apart, explain_larger, explain_staging
from megamoe.commands.explain_subject import Subject, element_of
from megamoe.commands.shared import (
    among_others,
    any_case,
    backend_of,
    contract_of,
    further_options,
    of_a_law,
    read_output,
    root_of,
)
from megamoe.commands.work import Work
from megamoe.console import Console
from megamoe.explain import explain
from megamoe.explain.brief import brief
from megamoe.explain.others import of_all_tokens
from megamoe.explain.show import show
from megamoe.explain.unwritten import garbage, repeat_note
from megamoe.explain.words import causes, is_named
from megamoe.golden import GoldenError, Store, make
from megamoe.judge import forward_bits, judge_forward
from megamoe.judge.judgements import Judgement
from megamoe.spec.accumulators import FP32, FP32_ORDERED, classes_of
from megamoe.spec.contract import Contract
from megamoe.spec.contract import contract as find_contract
from megamoe.spec.stages import STAGES
from megamoe.suite import at_hand
from megamoe.worker import exchange

Rows = Mapping[str, np.ndarray[Any, Any]]


def run(a: argparse.Namespace) -> int:
    """Find the element, and print its life."""
    with ExitStack() as stack:
        return _run(a, stack)


def _run(a: argparse.Namespace, stack: ExitStack) -> int:
    """The same; ``stack`` ends the backend's process."""
    if Path(a.subject).suffix != ".safetensors":
        case = any_case(root_of(a), a.subject)
        if case.kind == "staging":
            diagnosis, lines = explain_staging.run(a, case)
            if not _json(a, diagnosis):
                print("\n".join(lines))
            return 0
    subject = Subject(a.subject, root_of(a))
    if not subject.source.tokens:
        raise ValueError(f"{subject.name} has no tokens: there is no element to explain")
    if a.token is not None and not 0 <= a.token < subject.source.tokens:
        raise ValueError(
            f"token {a.token} is not there; the case has {subject.source.tokens}, from 0 on"
        )
    if a.full and subject.only_y:
        weights = subject.problem.weight_format.upper()
        raise ValueError(f"--full: with {weights} weights y alone is followed; leave it out")
    actual, claim, revision = _actual(a, subject, stack)
    contract = find_contract(revision)
    if subject.case is not None and revision not in subject.case.revisions:
        of = ", ".join(subject.case.revisions)
        raise ValueError(
            f"contract {revision} does not know {subject.name}, which is of {of}; ask for one with "
            "--contract"
        )
    class_name, why = _class_of(a, claim, subject)
    if a.stage and a.stage not in (actual or ()):
        raise ValueError(f"--stage {a.stage}: " + (
            "there is no output to look at; name one with --backend or --actual" if actual is None
            else f"the output does not show it; it has {', '.join(actual)}"
        ))  # fmt: skip
    token, channel, findings = a.token, a.channel, None
    if actual is not None:
        golden = subject.golden(class_name, contract)
        judgement = judge_forward(actual, golden, class_name, subject.problem)
        token, channel = element_of(judgement.findings, a.stage, token, channel)
        findings = judgement.findings
        stages = [name for name in STAGES if name in actual]
        if not a.json and not _is_wrong(a, subject, judgement, stages):
            return 0
    token, channel = token or 0, channel or 0
    rows = None
    if actual is not None and 0 <= token < subject.source.tokens:
        rows = {name: tensor[token] for name, tensor in actual.items()}
    start = time.perf_counter()
    with Work("trying known mistakes" if rows else "computing the element"):
        diagnosis = explain(
            subject.source, token, channel, class_name, rows, a.top, contract=contract,
            stage=a.stage,
        )  # fmt: skip
        breaks = subject.case.breaks if subject.case is not None else ""
        wide = _wider(subject, actual, class_name, contract)
        diagnosis = {"case": subject.name, "breaks": breaks, "right_under_class": wide, **diagnosis,
                "golden": _golden(subject, diagnosis, contract),
                "accumulator_from": why,
                "choice": {"stage": a.stage, "has_channel": a.channel is not None}}  # fmt: skip
        if actual is not None and findings is not None:
            diagnosis |= of_all_tokens(
                diagnosis["actual"], actual, token, subject.source, subject.problem, findings,
                class_name, contract,
            )  # fmt: skip
            if subject.again is not None and "batch" in diagnosis:
                again = repeat_note(subject.problem, actual["y"], subject.again)
                diagnosis["batch"]["again"] = again
            if subject.case is not None and subject.session is not None:
                explain_apart.tell_apart(
                    subject.case, diagnosis, subject.session, class_name, contract, subject.root
                )
    diagnosis["seconds"] = round(time.perf_counter() - start, 3)
    diagnosis["original"] = _original(subject.about, diagnosis)
    if not _json(a, {"causes": causes(diagnosis, every=True) if actual else [], **diagnosis}):
        console = Console()
        brief({**diagnosis, "case": subject.title}, console)
        hint = ""
        if subject.case is not None and explain_larger.is_short(subject.case, diagnosis):
            hint = explain_larger.line(a, subject.case, diagnosis, subject.session)
        if hint:
            console.print(hint, markup=False, highlight=False, soft_wrap=True)
        if a.full:
            show(diagnosis, console)
            console.print(f"\ncomputed in {diagnosis['seconds']:.2f} s", highlight=False)
        else:
            more = _more(actual is not None, subject.only_y)
            console.print(f"more: {more}", highlight=False, soft_wrap=True)
    return 0


def _wider(
    subject: Subject, actual: Mapping[str, Any] | None, claim: str, contract: Contract
) -> list[str]:
    """The classes under which a case that was made to show a wrong claim is right."""
    case = subject.case
    if actual is None or case is None or not case.name.startswith("claims-"):
        return []
    out = []
    for name in classes_of("mxfp4"):
        if name != claim:
            judgement = judge_forward(actual, subject.golden(name, contract), name, subject.problem)
            out += [] if any(finding.bad for finding in judgement.findings) else [name]
    return out


def _class_of(a: argparse.Namespace, claim: str, subject: Subject) -> tuple[str, str]:
    """The accumulator class, and whose word it is."""
    if a.accumulator:
        return a.accumulator, "by --accumulator"
    if claim:
        return claim, "the backend's"
    if "accumulator" in subject.about:
        return str(subject.about["accumulator"]), "as the file says"
    format_ = subject.problem.weight_format if subject.only_y else "mxfp4"
    widest = FP32 if FP32.name in classes_of(format_) else FP32_ORDERED
    return widest.name, (
        "assumed, since nobody named one: it takes every kernel that adds in fp32 or wider; "
        "--accumulator names another"
    )


def _json(a: argparse.Namespace, diagnosis: Mapping[str, Any]) -> bool:
    """Write what is said for machines; False where nobody asked for it."""
    if not a.json:
        return False
    text = json.dumps(_finite(diagnosis), indent=1) + "\n"
    if a.json == "-":
        sys.stdout.write(text)
    else:
        Path(a.json).write_text(text, encoding="utf-8")
    return True


def _original(about: Mapping[str, Any], diagnosis: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cause that `reduce` read from the whole problem, where the reduced one fits several."""
    actual, causes = diagnosis["actual"], about.get("causes")
    rules = diagnosis.get("batch", {"rules": []})["rules"]
    is_plain = actual and all(is_named(step) for step in actual["explanations"])
    if not isinstance(causes, list) or not causes or (is_plain and len(rules) < 2):
        return None
    return {
        "case": str(about.get("reduced_from")),
        "causes": [str(line) for line in about.get("every_cause", causes)],
        "shown": [str(line) for line in causes],
        "read_from": str(about.get("causes_read_from", "a token")),
    }


def _more(has_output: bool, only_y: bool) -> str:
    other = f"{'' if only_y else '--stage, '}--token and --channel choose another element"
    if not has_output:
        other = "--backend B or --actual FILE says where an output is wrong, and why"
    return other if only_y else f"--full shows every number behind this element; {other}"


def _is_wrong(
    a: argparse.Namespace, subject: Subject, judgement: Judgement, stages: list[str]
) -> bool:
    """Whether an element is there to explain; if not, says so in one line."""
    bad = [finding for finding in judgement.findings if finding.bad]
    targets = [
        finding
        for finding in bad
        if finding.outside and finding.stage == (a.stage or finding.stage)
    ]
    if targets or a.full:
        return True
    if not bad:
        case = subject.case
        if case is not None and case.kind == "property":  # what is red is the law, not this call
            raise ValueError(of_a_law(case, a.backend, "explain"))
        print(
            f"PASS {subject.title}: every stage is inside ({', '.join(stages)}); nothing to explain"
        )
        if case is not None and a.backend:
            print(f"  {among_others(case.id, a.backend, further_options(a))}")
    elif any(finding.outside for finding in bad):
        wrong = ", ".join(finding.stage for finding in bad if finding.outside)
        print(f"{subject.title}: stage {a.stage} is inside; outside: {wrong}")
    else:
        print(f"FAIL {subject.title}: {bad[0].text}; no single element is outside, so there is "
              "none to explain")  # fmt: skip
    return False


def _actual(
    a: argparse.Namespace, subject: Subject, stack: ExitStack
) -> tuple[Rows | None, str, str]:
    """The output, all tokens, as bits, None where nobody names one; the class and the contract."""
    revision = contract_of(a).revision
    if a.backend:
        worker, settings = stack.enter_context(backend_of(a))
        subject.session = worker
        with Work(f"{a.backend} runs {subject.name}"):
            try:
                bits = at_hand.run(subject.problem, worker, settings.timeout)
                if garbage(subject.problem, bits["y"]).any():
                    subject.again = at_hand.run(subject.problem, worker, settings.timeout)["y"]
                return bits, worker.identity.accumulator, worker.identity.contract
            except exchange.NoOutput as error:
                raise ValueError(f"{subject.name}: {error.why}") from error
    tensors = dict(subject.output)
    if a.actual:
        output = read_output(a.actual)
        stages = {n.removeprefix("observed."): t for n, t in output.items()}
        tensors = {n: t for n, t in stages.items() if n in STAGES}
        if "y" not in tensors:
            raise ValueError(
                f"{a.actual}: has no tensor y; it has {', '.join(sorted(output))}; write y "
                "(T, H) bfloat16, and any stages, with safetensors.torch.save_file"
            )
    if not tensors:
        return None, "", revision
    return forward_bits(tensors, subject.problem), "", revision


def _golden(subject: Subject, diagnosis: Mapping[str, Any], contract: Contract) -> str:
    """Whether the store says the same of this element."""
    case = subject.case
    if case is None:
        return ""
    try:
        golden = Store(subject.root, make, contract).load(case)
    except GoldenError as error:
        return str(error)
    rows = list(range(case.params["tokens"])) if case.rows is None else case.rows
    if "y" not in golden.full or diagnosis["token"] not in rows:
        return "the store holds digests of this token, or nothing"
    bits = int(golden.full["y"][rows.index(diagnosis["token"]), diagnosis["channel"]])
    if f"0x{bits:04x}" != diagnosis["y"]["bits"]:
        raise GoldenError(
            f"case {case.id}: the store has 0x{bits:04x} for this element, explain computes "
            f"{diagnosis['y']['bits']}; run `megamoe golden verify --case {case.id}`"
        )
    return "the store has the same bits"


def _finite(value: Any) -> Any:
    """NaN and infinities as strings: JSON has no numbers for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return value
