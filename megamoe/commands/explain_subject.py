"""What ``megamoe explain`` is asked about: a case, or a stored problem."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megamoe.cases import Case, kind_of
from megamoe.cases.stored import is_stored, load
from megamoe.commands.shared import forward_case
from megamoe.explain import FromCase, FromProblem, Source
from megamoe.golden import Store, make, regenerate
from megamoe.spec.contract import Contract
from megamoe.spec.problem import Problem
from megamoe.suite.at_hand import GoldenNow


class Subject:
    """A case or a stored problem; the whole problem is drawn only if somebody needs it."""

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
        self.case = forward_case(root, name, "explain")
        self.name = self.case.id
        plain = not is_stored(self.case) and not kind_of(self.case.kind).features(self.case)
        if plain and FromCase.can_make(self.case):
            self.source = FromCase(self.case)
        else:
            self.source = FromProblem(self.problem)

    @property
    def only_y(self) -> bool:
        """The stages before ``y`` are not followed."""
        return isinstance(self.source, FromProblem) and self.problem.only_y

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
