"""The judgement of a side's bits by the goldens: its own contract's verdict, and the contracts that
fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megamoe.cases import Case, kind_of
from megamoe.compare.running import Answer, Running
from megamoe.compare.stages import BEYOND, unsigned
from megamoe.golden import GoldenError, Store, digest_of, make, rows_of
from megamoe.judge import BadOutput, GoldenLacks, Verdict, judge_forward
from megamoe.spec.contract import CONTRACTS
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import TENSORS
from megamoe.suite.runner import Runner, right_by_others

Array = npt.NDArray[Any]


class Judge:
    """The suite's judge, for the output of one call of a side."""

    def __init__(self, root: Path) -> None:
        self._stores = {name: Store(root, make, c) for name, c in CONTRACTS.items()}

    def verdict(
        self, case: Case, inputs: Mapping[str, Any], answer: Answer, side: Running
    ) -> tuple[Verdict, dict[str, int]]:
        """The golden's verdict, and how many elements of each stage are outside.

        It is that of the side's contract alone; :meth:`right_under` asks the others. A property
        case is judged as the forward it makes: its law takes more calls than one. Raises
        :class:`megamoe.golden.GoldenError` if there is no usable golden, and
        :class:`megamoe.judge.BadOutput` if the output breaks the contract.
        """
        store = self._stores[side.identity.contract]
        golden = store.load(case, digest_of(inputs))
        judge = kind_of(case.kind).judge_outcome
        assert judge is not None
        try:
            runner = Runner(side.worker, store)
            verdict = judge(runner, case, golden, inputs, answer.reply)
        except (GoldenError, BadOutput, MemoryError):
            raise
        except GoldenLacks as error:
            raise GoldenError(str(error)) from error
        except Exception as error:
            raise GoldenError(f"case {case.id}: {type(error).__name__}: {error}") from error
        outside: dict[str, int] = {}
        for finding in verdict.findings:
            if finding.outside:
                outside[finding.stage] = finding.outside
            elif BEYOND.name not in answer.bits:
                outside.setdefault(finding.stage, 1)
        if BEYOND.name in answer.bits:
            outside[BEYOND.name] = int((answer.bits[BEYOND.name] != 0).sum())
        return verdict, outside

    def full_verdict(
        self, case: Case, inputs: Mapping[str, Any], answer: Answer, side: Running
    ) -> Verdict:
        """See :meth:`verdict`; a fail also names the other contracts under which the output is
        right."""
        verdict, _ = self.verdict(case, inputs, answer, side)
        if verdict.status != "fail":
            return verdict
        mine, accumulator = side.identity.contract, side.identity.accumulator
        right = self.right_under(case, inputs, answer.bits, accumulator, {mine: verdict})
        return right_by_others(case, verdict, CONTRACTS[mine], right)

    def right_under(
        self, case: Case, inputs: Mapping[str, Any], bits: Mapping[str, Array], accumulator: str,
        verdicts: Mapping[str, Verdict] | None = None,
    ) -> list[str]:  # fmt: skip
        """Revisions, the oldest first; none where the bits are wrong or cannot be judged.

        ``bits``: integers by stage, as a side kept them. ``verdicts``: of revisions that have
        judged them already. Each golden is asked once, also where revisions share it.
        """
        verdicts = verdicts or {}
        keys = {name: self._key(case, name) for name in case.revisions}
        by_key = {keys[name]: v.status == "pass" for name, v in verdicts.items() if name in keys}
        for name, key in keys.items():
            if key not in by_key:
                by_key[key] = self._is_right(case, inputs, bits, self._stores[name], accumulator)
        return [name for name, key in keys.items() if by_key[key]]

    def _key(self, case: Case, revision: str) -> str:
        """The key of its golden; a name of its own if there is none."""
        try:
            return self._stores[revision].key(case)
        except GoldenError:
            return f"no golden under {revision}"

    def _is_right(
        self, case: Case, inputs: Mapping[str, Any], bits: Mapping[str, Array], store: Store,
        accumulator: str,
    ) -> bool:  # fmt: skip
        plain = {name: _unsigned(name, array) for name, array in bits.items()}
        if plain.pop(BEYOND.name, np.zeros(1)).any():
            return False
        try:
            golden: Any = store.load(case, digest_of(inputs))
            golden.brief = True
            if kind_of(case.kind).is_forward:
                part = rows_of(Problem(**inputs), case.rows)
                mine = {n: a if case.rows is None else a[case.rows] for n, a in plain.items()}
                verdict = judge_forward(mine, golden, accumulator, part, case.rows)
                return not any(finding.bad for finding in verdict.findings)
            names = [name for name in golden.names() if name in plain]
            return bool(names) and all(
                golden.matches(name, plain[name])
                or (name in golden.full and np.array_equal(plain[name], golden.full[name]))
                for name in names
            )
        except (GoldenError, GoldenLacks, BadOutput, KeyError, ValueError):
            return False


def _unsigned(name: str, array: Array) -> Array:
    """A stage's bits as goldens have them."""
    form = TENSORS[name].form if name in TENSORS else None
    is_signed = form is None or not (form.signed_zero or form.width == 8)
    return array if is_signed else unsigned(array)
