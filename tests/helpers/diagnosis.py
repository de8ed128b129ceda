"""What ``explain`` says of the eager backend, into which a test has planted a fault."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from megamoe.backends import eager
from megamoe.commands.explain_subject import Subject, element_of
from megamoe.explain import FromProblem, explain
from megamoe.explain.others import of_all_tokens
from megamoe.spec.contract import CONTRACTS
from megamoe.suite.at_hand import judge, run
from tests.helpers.local import Local


def report_of(p, token=None, shows=None):
    """What ``explain`` says of the eager backend now, by default of the worst token. ``shows``: the
    stages that it returns, by default all."""
    session = Local(eager.EagerBackend())
    findings, stages = judge(p, session)[0].findings, run(p, session)
    if shows is not None:
        findings = [finding for finding in findings if finding.stage in shows]
        stages = {name: stages[name] for name in shows}
    of_class, contract = session.identity.accumulator, CONTRACTS[session.identity.contract]
    token, channel = element_of(findings, None, token, None)
    rows, source = {name: stage[token] for name, stage in stages.items()}, FromProblem(p)
    report = explain(source, token, channel or 0, of_class, rows, contract=contract)
    return report | of_all_tokens(
        report["actual"], stages, token, source, p, findings, of_class, contract
    )


@cache
def of_case(name):
    return Subject(f"forward/{name}", Path("golden")).problem
