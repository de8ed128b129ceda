"""``megamoe explain``: what is asked for, found and printed."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from megamoe.cases import Case, kind_of
from megamoe.cases.stored import is_stored, load
from megamoe.commands.shared import backend_of, contract_of, forward_case, root_of
from megamoe.console import Console
from megamoe.explain import FromCase, FromProblem, Source, explain
from megamoe.explain.show import show
from megamoe.golden import GoldenError, Store, make, regenerate
from megamoe.judge import forward_bits, judge_forward
from megamoe.spec.accumulators import SM100_MXF8F6F4
from megamoe.spec.contract import Contract
from megamoe.spec.contract import contract as find_contract
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import STAGES
from megamoe.suite import at_hand
from megamoe.suite.at_hand import GoldenNow
from megamoe.worker import exchange

Rows = Mapping[str, np.ndarray[Any, Any]]


class _Subject:
    """A case or a stored problem; the whole problem is made only if somebody needs it."""

    def __init__(self, name: str, root: Path) -> None:
        self.root = root
        self.case: Case | None = None
        self.observed: Mapping[str, torch.Tensor] = {}
        self.about: Mapping[str, Any] = {}
        self._problem: Problem | None = None
        if Path(name).suffix == ".safetensors":
            stored = load(Path(name))
            self._problem, self.observed, self.about = (
                stored.problem, stored.observed, stored.about,
            )  # fmt: skip
            self.name = name
            self.source: Source = FromProblem(stored.problem)
            return
        self.case = forward_case(root, name)
        self.name = self.case.id
        plain = not is_stored(self.case) and not kind_of(self.case.kind).features(self.case)
        if plain and FromCase.can_make(self.case):
            self.source = FromCase(self.case)
        else:
            self.source = FromProblem(self.problem)

    @property
    def problem(self) -> Problem:
        if self._problem is None:
            assert self.case is not None
            self._problem = Problem(**regenerate(self.case))
        return self._problem

    def golden(self, accumulator: str, contract: Contract) -> Any:
        """The stored golden where there is one of every token, else what the oracle says now."""
        if self.case is not None and self.case.rows is None:
            return Store(self.root, make, contract).load(self.case)
        return GoldenNow(self.problem, accumulator, contract)


def run(a: argparse.Namespace) -> int:
    """Find the element, and print its life."""
    if a.actual and a.backend:
        raise ValueError("--actual and --backend both say what was got; give one")
    if a.top < 1:
        raise ValueError("--top: give a number from 1 on")
    subject = _Subject(a.subject, root_of(a))
    if not subject.source.tokens:
        raise ValueError(f"{subject.name} has no tokens: there is no element to explain")
    actual, claimed, revision = _actual(a, subject)
    contract = find_contract(revision)
    if subject.case is not None and revision not in subject.case.revisions:
        of = ", ".join(subject.case.revisions)
        raise ValueError(
            f"contract {revision} does not know {subject.name}, which is of {of}; ask for one with "
            "--contract"
        )
    known = claimed or subject.about.get("accumulator", SM100_MXF8F6F4.name)
    class_name = a.accumulator or known
    token, channel = a.token, a.channel
    if actual is not None and (token is None or channel is None):
        token, channel = _worst(subject, actual, class_name, contract, token, channel)
    token, channel = token or 0, channel or 0
    rows = None
    if actual is not None and 0 <= token < subject.source.tokens:
        rows = {name: tensor[token] for name, tensor in actual.items()}
    started = time.perf_counter()
    said = explain(subject.source, token, channel, class_name, rows, a.top, contract=contract)
    said = {"case": subject.name, **said, "golden": _golden(subject, said, contract)}
    said["seconds"] = round(time.perf_counter() - started, 3)
    if a.json:
        text = json.dumps(_finite(said), indent=1) + "\n"
        if a.json == "-":
            sys.stdout.write(text)
        else:
            Path(a.json).write_text(text, encoding="utf-8")
    else:
        console = Console(width=None if sys.stdout.isatty() else 150)
        show(said, console)
        console.print(f"\ncomputed in {said['seconds']:.2f} s", highlight=False)
    return 0


def _actual(a: argparse.Namespace, subject: _Subject) -> tuple[Rows | None, str, str]:
    """What was got, all tokens, as bits, None where nobody says; the class and the contract."""
    asked = contract_of(a).revision
    if a.backend:
        with backend_of(a) as (worker, settings):
            try:
                got = at_hand.run(subject.problem, worker, settings.timeout)
                return got, worker.identity.accumulator, worker.identity.contract
            except exchange.NoOutput as error:
                raise ValueError(f"{subject.name}: {error.why}") from error
    tensors = dict(subject.observed)
    if a.actual:
        try:
            loaded = load_file(a.actual)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{a.actual}: cannot be read as safetensors: {error}") from error
        named = {n.removeprefix("observed."): t for n, t in loaded.items()}
        tensors = {n: t for n, t in named.items() if n in STAGES}
        if "y" not in tensors:
            raise ValueError(f"{a.actual}: has no tensor y; it has {', '.join(sorted(loaded))}")
    if not tensors:
        return None, "", asked
    return forward_bits(tensors, subject.problem), "", asked


def _worst(
    subject: _Subject, actual: Rows, class_name: str, contract: Contract, token: int | None,
    channel: int | None,
) -> tuple[int, int]:  # fmt: skip
    """The element that the judge calls the worst; (0, 0) where nothing is outside."""
    judged = judge_forward(
        actual, subject.golden(class_name, contract), class_name, subject.problem
    )
    worst = [f.worst for f in judged.findings if f.worst is not None]
    at = worst[0] if worst else None
    element = next((w for w in worst if w.stage == "y"), None)
    if token is None:
        token = at.token if at is not None else 0
    if channel is None:
        channel = element.channel if element is not None and element.token == token else 0
    return token or 0, channel or 0


def _golden(subject: _Subject, said: Mapping[str, Any], contract: Contract) -> str:
    """Whether the store says the same of this element."""
    case = subject.case
    if case is None:
        return ""
    try:
        stored = Store(subject.root, make, contract).load(case)
    except GoldenError as error:
        return str(error)
    rows = list(range(case.params["tokens"])) if case.rows is None else case.rows
    if "y" not in stored.full or said["token"] not in rows:
        return "the store holds digests of this token, or nothing"
    bits = int(stored.full["y"][rows.index(said["token"]), said["channel"]])
    if f"0x{bits:04x}" != said["y"]["bits"]:
        raise GoldenError(
            f"case {case.id}: the store has 0x{bits:04x} for this element, explain computes "
            f"{said['y']['bits']}; run `megamoe golden verify --case {case.id}`"
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
