"""One call of a backend, from the judge's side: inputs go into files, outputs come out of them.

The judge keeps its own tensors; the worker gets a copy. After the call the files hold the inputs as
the call left them, and every byte is compared with the judge's own.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megamoe.spec.problem import Problem
from megamoe.spec.tensors import ACTIVATIONS, SHARED_WEIGHTS, WEIGHTS
from megamoe.worker.answers import LIMIT, Opaque, refuse, refuse_rank, result_of
from megamoe.worker.files import TensorFile, Tensors, kind_of, new_path, write
from megamoe.worker.outcomes import (
    BackendFailure,
    Leftover,
    Missing,
    NoOutput,
    NoRoom,
    NotProvided,
    Refusal,
    WroteInput,
)
from megamoe.worker.session import APART, PROCESS, Session


@dataclass(frozen=True)
class CallResult:
    """The outcome of a call."""

    result: Any
    """A tensor, a mapping or a tuple of them; :class:`Opaque` in place of anything else."""
    blank: Tensors = field(default_factory=dict)
    """Tensors that the call was given to write into."""
    inputs: Tensors = field(default_factory=dict)
    """Inputs that it may write into, as they are afterwards."""
    fingerprint: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further data from an act of megamoe in the worker."""


class Caller:
    """Calls of one case: they share a time limit, and files of weights that do not change."""

    def __init__(self, session: Session, seconds: float, fingerprint: bool = False) -> None:
        self.session = session
        self.fingerprint = fingerprint
        """The backend's is wanted after each forward: it may have compiled something."""
        self.budget = self.limit = seconds
        self.loss = ""
        """The reason why the process of the last answer is of no use; another process gives the
        next answer."""
        self.process, self.calls = 0, (0, 0)
        """The process of the last answer by its number, and the first and the last call of this
        case among all that it has had. A process that ended in the case had no later one."""
        self._case = secrets.token_hex(8)
        """Tells the calls of this case from those of others."""
        self._weights: TensorFile | None = None
        self._cache: tuple[tuple[torch.Tensor, ...], list[int]] = (), []

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._forget()

    @property
    def device(self) -> str:
        """The device of the backend: ``cpu`` or ``cuda``, with an optional number."""
        return self.session.identity.device

    def forward(self, problem: Problem) -> CallResult:
        """``forward(problem)``. ``problem`` is on the CPU."""
        request = {"call": "forward", "plain": plain_of(problem), "fingerprint": self.fingerprint}
        return self._with_problem(problem, request)

    def act(
        self, name: str, problem: Problem | None = None, apart: bool = False, **plain: Any
    ) -> CallResult:
        """An act of :mod:`megamoe.layer.acts` with the backend, in the worker; ``apart`` with a
        ``problem``: in a new process, in which nothing else is called."""
        if problem is None:
            return self._exchange({"call": name, "plain": plain}, [], ())
        request = {"call": name, "plain": plain_of(problem) | plain}
        return self._with_problem(problem, request | ({APART: True} if apart else {}))

    def call(
        self, name: str, inputs: Tensors, blank: Tensors | None = None, own: Sequence[str] = (),
        after: Tensors | None = None,
    ) -> CallResult:  # fmt: skip
        """``backend.name(*inputs, *blank, *after)``; it may write into ``own`` and ``blank``.

        ``blank`` says dtypes and shapes; the worker's own tensors hold other bytes.
        """
        blanks = {f"blank.{n}": (kind_of(t), list(t.shape)) for n, t in (blank or {}).items()}
        after = after or {}
        arguments = [*inputs, *blanks, *after]
        request = {"call": name, "arguments": arguments, "blank": blanks}
        with self._file({**inputs, **after}) as file:
            return self._exchange(request, [file], own)

    def _with_problem(self, problem: Problem, request: dict[str, Any]) -> CallResult:
        rows = {name: getattr(problem, name) for name in ACTIVATIONS}
        if problem.shared_output is not None:
            rows["shared_output"] = problem.shared_output
        with self._file(rows) as file:
            return self._exchange(request, [file, self._weights_of(problem)], ())

    def _weights_of(self, problem: Problem) -> TensorFile:
        lacking = [n for n in problem.features if not self.session.identity.provides(n)]
        if lacking:
            raise Missing(f"feature {lacking[0]}")
        weights = {name: getattr(problem, name) for name in WEIGHTS}
        weights |= dict(zip(SHARED_WEIGHTS, problem.shared_weights, strict=False))
        weights |= problem.expert_factors
        ids = problem.topk_ids
        live = (ids >= 0) & (ids < problem.num_experts)
        experts = ids[live].unique().tolist()
        cache, their = self._cache
        same = their == experts and len(cache) == len(weights)
        same = same and all(map(operator.is_, cache, weights.values()))
        if self._weights is None or not same:
            self._forget()
            rows = experts if len(experts) < problem.num_experts else None
            partly = {} if rows is None else dict.fromkeys(WEIGHTS, rows)
            self._weights = write(self.session.folder, weights, partly)
            self._cache = (*weights.values(),), experts
        return self._weights

    def _forget(self) -> None:
        if self._weights is not None:
            self._weights.path.unlink(missing_ok=True)
            self._weights = None

    @contextmanager
    def _file(self, tensors: Tensors) -> Iterator[TensorFile]:
        file = write(self.session.folder, tensors, {})
        try:
            yield file
        finally:
            file.path.unlink(missing_ok=True)

    def each_rank(
        self, call: str, ranks: Sequence[tuple[Problem, Mapping[str, Any]]], beside: Tensors
    ) -> list[CallResult]:
        """One call of megamoe's on every rank that is here, at the same time.

        ``ranks``: for each the problem with its own tokens and the weights of its own experts, and
        plain data. ``beside`` are further tensors for all. Raises the error of the rank that failed
        first, which names it.
        """
        groups: list[list[TensorFile]] = []
        requests, outs = [], []
        try:
            for problem, plain in ranks:
                rows = {name: getattr(problem, name) for name in ACTIVATIONS}
                weights = {name: getattr(problem, name) for name in WEIGHTS}
                experts = [e for e in range(problem.num_experts) if plain["used"][e]]
                partly = (
                    {} if len(experts) == problem.num_experts else dict.fromkeys(WEIGHTS, experts)
                )
                groups.append([])
                groups[-1].append(write(self.session.folder, {**rows, **beside}, {}))
                groups[-1].append(write(self.session.folder, weights, partly))
                out = new_path(self.session.folder)
                request = {"call": call, "plain": plain_of(problem) | dict(plain)}
                requests.append(self._request(request, groups[-1], out))
                outs.append(out)
            reply = self._ask({"call": call, "ranks": requests, "out": str(outs[0])})
            if "ranks" not in reply:
                refuse(reply, self.session.folder)
            replies = reply["ranks"]
            refuse_rank(replies, self.session, self.session.folder)
            return [
                self._outcome(each, files, (), out)
                for each, files, out in zip(replies, groups, outs, strict=True)
            ]
        finally:
            for path in (*(s.path for files in groups for s in files), *outs):
                path.unlink(missing_ok=True)

    def _exchange(
        self, request: dict[str, Any], files: Sequence[TensorFile], own: Sequence[str]
    ) -> CallResult:
        out = new_path(self.session.folder)
        try:
            reply = self._ask(self._request(request, files, out))
            return self._outcome(reply, files, own, out)
        finally:
            with suppress(OSError):
                out.unlink()

    def _request(
        self, request: dict[str, Any], files: Sequence[TensorFile], out: Path
    ) -> dict[str, Any]:
        """The message of a call with the tensors of ``files``."""
        size = sum(t.nbytes for file in files for t in file.own.values())
        return request | {
            "case": self._case,
            "inputs": {str(file.path): file.places for file in files}, "out": str(out),
            "used": {name: rows for file in files for name, rows in file.subsets.items()},
            "limit": max(LIMIT, size),
        }  # fmt: skip

    def _ask(self, request: dict[str, Any]) -> Mapping[str, Any]:
        """The reply within the time that the case has left."""
        if self.budget <= 0:
            text = f"no result within {self.limit:g} s for all calls of the case"
            raise BackendFailure(f"{text}; give it more with --timeout")
        reply = self.session.ask(request, self.budget)
        self.budget -= reply.get("took", 0.0)
        self.loss = reply.get("lost") or self.loss
        if PROCESS in reply:
            process, number = reply[PROCESS]
            first = self.calls[0] if process == self.process else number
            self.process, self.calls = process, (first, number)
        return reply

    def _outcome(
        self, reply: Mapping[str, Any], files: Sequence[TensorFile], own: Sequence[str], out: Path
    ) -> CallResult:
        """The outcome of a reply; raises for one without outputs or with side effects."""
        if "broken" not in reply:
            wrong = [(file, n) for file in files for n in file.changes() if n not in own]
            if wrong:
                raise WroteInput(
                    ", ".join(n for _, n in wrong), wrong[0][0].first_change(wrong[0][1])
                )
        refuse(reply, self.session.folder)
        if reply["changed"]:
            raise Leftover("; ".join(reply["changed"]))
        if "otherwise" in reply:
            raise BackendFailure(reply["otherwise"])
        result, blank = result_of(reply, out)
        inputs = {n: file.tensor(n) for file in files for n in own if n in file.own}
        fields = {"form", "shown", "places", "lost", "fingerprint", "changed", "id", "took",
                  PROCESS}  # fmt: skip
        extra = {k: v for k, v in reply.items() if k not in fields}
        return CallResult(result, blank, inputs, reply.get("fingerprint"), extra)


def plain_of(problem: Problem) -> dict[str, Any]:
    """The fields of a problem that are no tensors."""
    return {k: v for k, v in vars(problem).items() if not isinstance(v, torch.Tensor)}


__all__ = [
    "BackendFailure", "CallResult", "Caller", "Leftover", "Missing", "NoOutput", "NoRoom",
    "NotProvided", "Opaque", "Refusal", "WroteInput",
]  # fmt: skip
