"""A side at work: a worker in its environment, which computes one case at a time."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
import torch

from megamoe.cases import KINDS, Case, kind_of
from megamoe.compare import disk
from megamoe.compare.backend_file import locate
from megamoe.compare.processes import CannotStart, clean_environment
from megamoe.compare.rejudge import NoBits, digest, stages
from megamoe.compare.sides import Ready
from megamoe.golden import regenerate
from megamoe.spec.tensors import WEIGHTS
from megamoe.worker.choice import AUTO
from megamoe.worker.client import Worker
from megamoe.worker.exchange import (
    BackendFailure,
    Caller,
    CallResult,
    Leftover,
    NoRoom,
    NotProvided,
    Refusal,
    WroteInput,
)
from megamoe.worker.session import Identity, Launch, WorkerError, contract_text

Array = npt.NDArray[Any]
InputMap = Mapping[str, Any]

COMPARABLE: Final = tuple(name for name in KINDS if kind_of(name).ask is not None)
"""Kinds of case that give tensors; an errors case gives none."""
LIMIT: Final = 1 << 30
"""Bytes of regenerated inputs that are kept for the next step."""
_FACTS: Final = ("python", "torch", "device", "numpy", "gpu")


class NoAnswer(Exception):
    """A case that a side gives no bits of; one line that says why."""


class NoOffer(NoAnswer):
    """The backend has no such callable, or declined; the second argument says which of its own."""

    def __init__(self, how: str, what: str) -> None:
        super().__init__(f"{how} {what}")
        self.what = what


@dataclass(frozen=True)
class Answer:
    """The output of one side for one case."""

    bits: dict[str, Array]
    digests: dict[str, str]
    reply: CallResult
    """The same as the suite's judge takes it."""


class Running:
    """A backend in the environment ``ready``. Use as a context manager, or close it."""

    def __init__(
        self, ready: Ready, backend: str, device: str, seconds: float, contract: str = AUTO
    ) -> None:
        """Start it, without waiting; :meth:`greet` does."""
        self.ready = ready
        self.seconds = seconds
        self.facts: dict[str, Any] = {}
        cwd = None if ready.cwd is None else str(ready.cwd)
        launch = Launch(
            backend=locate(backend, ready.front), device=device, contract=contract,
            argv=ready.argv, front=ready.front, cwd=cwd, environment=clean_environment(),
        )  # fmt: skip
        try:
            self.worker = Worker(launch)
        except WorkerError as error:
            disk.require_room(Path(tempfile.gettempdir()))
            raise CannotStart(f"{ready.argv[0]} cannot be started: {error}") from error
        self._identity: Identity | None = None

    @property
    def identity(self) -> Identity:
        """The backend's identity at the start."""
        if self._identity is None:
            self.greet()
        assert self._identity is not None
        return self._identity

    def greet(self) -> Running:
        """Wait until the backend is loaded. Raises :class:`CannotStart`, with the reason."""
        try:
            identity = self.worker.identity
        except WorkerError as error:
            text = str(error)
            disk.blame(text)
            what = f"backend {self.worker.launch.backend}"
            if text.startswith(f"{what}: ") and "while it was loaded" in text:
                # Its interpreter may have ended before there was a backend.
                why = text.removeprefix(f"{what}: ").replace("the backend ended its", "its")
                why = why.replace("its process (", "its process ended (")
                why = why.replace("while it was loaded", f"while {what} was loaded")
                text = f"{self.ready.argv[0]} did not start: {why}"
            raise CannotStart(text) from None
        self._identity = identity
        facts = {name: identity.facts[name] for name in _FACTS if name in identity.facts}
        self.facts = {
            "backend": identity.name, "accumulator": identity.accumulator,
            "contract": identity.contract, "contract_why": identity.why,
            "made_for": self.worker.launch.contract, **facts, **self.ready.facts,
        }  # fmt: skip
        return self

    def ask(self, case: Case, inputs: InputMap) -> Answer:
        """The bits of one case.

        Raises :class:`NoAnswer` for all that goes wrong with the backend, a crash and a hang
        included, and :class:`megamoe.compare.disk.DiskFull`.
        """
        try:
            reply, tensors = self._exchange(case, inputs)
        except NotProvided as missing:
            raise NoOffer("missing", str(missing)) from None
        except Refusal as why:
            raise NoOffer("declined", str(why)) from None
        except WroteInput as names:
            raise NoAnswer(f"wrote into input {names}") from None
        except Leftover as what:
            raise NoAnswer(f"left another {what}") from None
        except NoRoom as error:
            raise disk.full(str(error).partition(";")[0]) from error
        except (BackendFailure, NoBits) as error:
            disk.blame(str(error))
            text = str(error).removeprefix("the backend ").removesuffix("; run it alone")
            raise NoAnswer(text) from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk.cause_of(error) from error
            raise NoAnswer(f"took a file of its inputs or outputs away ({error})") from error
        bits = {name: tensor.numpy() for name, tensor in tensors.items()}
        return Answer(bits, {n: digest(t) for n, t in tensors.items()}, reply)

    def _exchange(self, case: Case, inputs: InputMap) -> tuple[CallResult, dict[str, torch.Tensor]]:
        ask = kind_of(case.kind).ask
        assert ask is not None
        with Caller(self.worker, self.seconds) as call:
            reply = ask(call, case, inputs)
        if call.loss:
            raise BackendFailure(f"left a process that is of no use ({call.loss})")
        buffers = {**reply.blank, **reply.inputs}
        parts = asdict(kind_of(case.kind).parts)
        return reply, stages(parts, inputs, reply.result, buffers)

    def close(self) -> None:
        """End the process, and the processes that it started."""
        self.worker.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def contract_lines(sides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line on the contract of each side, by its facts; one line where they share it."""
    by_name = {
        name: contract_text(facts["contract"], facts["contract_why"])
        for name, facts in sides.items()
        if "contract" in facts
    }
    if len(by_name) == len(sides) and len({*by_name.values()}) == 1:
        return [*by_name.values()][:1]
    return [f"{name}: {text}" for name, text in by_name.items()]


# --- inputs -----------------------------------------------------------------------------------


class Inputs:
    """Inputs of cases, computed again if they are not among the latest :data:`LIMIT` bytes."""

    def __init__(self) -> None:
        self._cache: dict[str, tuple[InputMap, int]] = {}

    def of(self, case: Case) -> InputMap:
        """The inputs of ``case`` by name."""
        entry = self._cache.pop(case.id, None)
        if entry is None:
            inputs = regenerate(case)
            entry = inputs, size_of(inputs)
        self._cache[case.id] = entry
        while sum(size for _, size in self._cache.values()) > LIMIT and len(self._cache) > 1:
            del self._cache[next(iter(self._cache))]
        return entry[0]


def size_of(inputs: InputMap) -> int:
    """Bytes of :func:`packed`, without a copy."""
    experts = used_experts(inputs)
    tensors = {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor)}
    return sum(
        t.nbytes // max(1, len(t)) * len(experts)
        if experts is not None and name in WEIGHTS
        else t.nbytes
        for name, t in tensors.items()
    )


def used_experts(inputs: InputMap) -> torch.Tensor | None:
    """Experts that an id names; None where there are no weights, or all may be used."""
    if "topk_ids" not in inputs or "w13_weight" not in inputs:
        return None
    ids = inputs["topk_ids"]
    return ids[(ids >= 0) & (ids < len(inputs["w13_weight"]))].unique()


def packed(inputs: InputMap) -> dict[str, torch.Tensor]:
    """The tensors; of the weights only the experts that an id names, and which they are."""
    tensors = {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor)}
    experts = used_experts(inputs)
    if experts is not None:
        tensors |= {name: tensors[name][experts] for name in WEIGHTS}
        tensors["experts"] = experts
    return tensors


def ids_of(case: Case, inputs: InputMap) -> Array | None:
    """Expert ids of a case's tokens, to name the expert of a slot."""
    ids = inputs.get("topk_ids")
    return None if ids is None or case.kind == "eplb" else ids.numpy()
