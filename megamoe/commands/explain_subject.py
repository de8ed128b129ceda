"""What ``megamoe explain`` is asked about: a case, or a stored problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from megamoe.cases import Case, kind_of
from megamoe.cases.stored import is_stored, load
from megamoe.cases.stored_names import title
from megamoe.commands.shared import forward_case
from megamoe.explain import FromCase, FromProblem, Source
from megamoe.golden import Store, make, regenerate
from megamoe.judge import Finding
from megamoe.judge.elements import TILE
from megamoe.spec.contract import Contract
from megamoe.spec.problem import Problem
from megamoe.suite.at_hand import GoldenNow
from megamoe.worker.session import Session


class Subject:
    """A case or a stored problem; the whole problem is drawn only if somebody needs it."""

    def __init__(self, name: str, root: Path) -> None:
        self.root = root
        self.case: Case | None = None
        self.output: Mapping[str, torch.Tensor] = {}
        self.about: Mapping[str, Any] = {}
        self.again: npt.NDArray[Any] | None = None
        """``y`` (T, H) as bits, of a second call of the backend; None where nobody made one."""
        self.session: Session | None = None
        """Where the backend answers, if one was named."""
        self._problem: Problem | None = None
        if Path(name).suffix == ".safetensors":
            record = load(Path(name))
            self._problem, self.output, self.about = (
                record.problem, record.outputs, record.about,
            )  # fmt: skip
            self.name, self.title = name, title(name, record.about)
            self.source: Source = FromProblem(record.problem)
            return
        self.case = forward_case(root, name, "explain")
        self.name = self.title = self.case.id
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


def element_of(
    findings: Sequence[Finding], stage: str | None, token: int | None, channel: int | None
) -> tuple[int | None, int | None]:
    """Token and channel of ``y`` to look at: of the worst element of ``stage``, or of the first
    wrong stage, where they are not given. None where nothing is outside."""
    wrong = [f for f in findings if f.worst is not None]
    first = next((f.worst for f in wrong if f.stage == (stage or f.stage)), None)
    if token is None and first is not None:
        token = first.token
    y = next((f for f in wrong if f.stage == "y"), None)
    if channel is None and y is not None and y.worst is not None:
        tiles = [tile for row, tile, _ in y.grid if row == token]  # its worst lies in one of them
        channel = y.worst.channel if y.worst.token == token else tiles[0] * TILE if tiles else None
    return token, channel
