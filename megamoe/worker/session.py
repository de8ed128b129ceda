"""The judge's view of a backend: its start, its identity, and its calls."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from megamoe.printable import printable
from megamoe.spec.accumulators import CLASSES, FP32
from megamoe.spec.contract import NEWEST
from megamoe.suggest import follow, hint
from megamoe.worker.choice import AUTO, Choice, choose

START_SECONDS: Final = 300.0
"""Seconds for the import of torch and the creation of the backend."""
APART: Final = "apart"
"""The key of a request that a new process is to answer, which has had no call and gets no other.
The judge's own: the worker need not know it."""
PROCESS: Final = "process"
"""The key of a reply for the number of the process that gave it, and the number of the call among
all that this process has had. The judge's own: the worker knows neither."""
METHODS: Final = ("forward", "prepare", "eplb_map", "transform_weights", "forward_group")
"""A backend offers at least one of these."""

MODULES: Final = {
    "backends": "megamoe.backends",
    "acts": "megamoe.layer.acts",
    "problem": "megamoe.spec.problem",
}
"""The modules of megamoe that a worker needs for a backend with a name, an act, and a problem's
class."""

Reply = dict[str, Any]


class WorkerError(ValueError):
    """The backend cannot be loaded, or the object is no backend; one line."""


@dataclass(frozen=True)
class Launch:
    """The start of a worker."""

    backend: str
    device: str = "cpu"
    contract: str = AUTO
    """The revision that it is to compute; auto: see :mod:`.choice`."""
    argv: tuple[str, ...] = (sys.executable,)
    """A command that ends in a Python interpreter; words before it enter an environment."""
    front: tuple[str, ...] = ()
    """Put first on the import path."""
    cwd: str | None = None
    environment: Mapping[str, str] | None = None
    """None: this process's own."""
    threads: int = 0
    """Threads of torch; 0: torch's own choice."""
    seconds: float = START_SECONDS
    """Seconds until the backend is loaded."""


FOLDS_SCALES: Final = "folds_scales"
"""The flag of a backend that multiplies each code by its scale factor first, in bfloat16."""


@dataclass(frozen=True)
class Identity:
    """A backend's description of itself, at the start."""

    name: str
    accumulator: str
    callables: tuple[str, ...]
    contract: str = NEWEST.revision
    """The revision that it is judged under."""
    contracts: tuple[str, ...] | None = None
    """The contracts that it names; None: it names none."""
    why: str = ""
    """The reason for the contract; empty if the user asked for it."""
    fingerprint: Mapping[str, Any] | None = None
    """``sources``, ``options``, and the ``binaries`` that were compiled so far."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Its environment: python, torch, device, processor, and gpu, capability, cuda with CUDA."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """The state of its process before the first call."""
    batch_invariant: bool = True
    """False: it says that a token's bits may depend on how many tokens are beside it."""
    ranks: int = 0
    """Ranks of the process group that it runs over; 0: it runs on no group."""
    here: tuple[int, ...] = ()
    """The ranks whose workers this run started: all of them but under ``torchrun``."""
    torchrun: bool = False

    @property
    def device(self) -> str:
        return str(self.facts.get("device", "cpu"))

    @property
    def contract_line(self) -> str:
        """``contract 2026-09 (the backend says so)``."""
        return contract_text(self.contract, self.why)

    def provides(self, name: str) -> bool:
        """Whether the backend offers the callable ``name``."""
        return name in self.callables

    @property
    def digest(self) -> str:
        """A short digest of everything in the identity that decides a verdict; each verdict holds
        it."""
        build = self.fingerprint or {}
        parts = [self.name, self.accumulator, *self.callables, self.contract,
                build.get("sources"), build.get("options")]  # fmt: skip
        parts += [] if self.batch_invariant else ["not batch-invariant"]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def differs(self, answer: Mapping[str, Any]) -> str:
        """The difference of a later answer; empty if there is none."""
        for name in ("name", "accumulator"):
            if answer.get(name) != getattr(self, name):
                return f"{name} {answer.get(name)!r}, but said {getattr(self, name)!r} at the start"
        if answer.get("callables") != list(self.callables):
            return f"that it offers {answer.get('callables')}, at the start {list(self.callables)}"
        computes = None if self.contracts is None else list(self.contracts)
        if answer.get("contracts") != computes:
            return f"that it computes contracts {answer.get('contracts')}, at the start {computes}"
        steady = answer.get("batch_invariant", True)
        if steady is not self.batch_invariant:
            return f"batch_invariant {steady}, but said {self.batch_invariant} at the start"
        now = answer.get("fingerprint")
        if self.fingerprint is not None and now is not None:
            for name in ("sources", "options"):
                if now.get(name) != self.fingerprint[name]:
                    return f"another fingerprint: its {name} changed while it ran"
        return ""


def contract_text(revision: str, why: str) -> str:
    """``contract 2026-09 (the backend says so)``; without a reason if the user asked for it."""
    return f"contract {revision} ({why})" if why else f"contract {revision}"


class Session(Protocol):
    """The place where a backend answers: a worker of one judge, or a worker that judges share."""

    @property
    def identity(self) -> Identity:
        """The identity of the backend. Raises :class:`WorkerError` if it cannot be loaded."""

    @property
    def folder(self) -> Path:
        """The folder of the files of requests and answers."""

    def ask(self, request: Mapping[str, Any], seconds: float) -> Reply:
        """The answer within ``seconds``; ``{"broken": why}`` if there is none."""


def complaint(
    name: Any, accumulator: Any, callables: Any, kind: str, choices: Sequence[str] = METHODS
) -> str:
    """The reason why an object of type ``kind`` is no backend, in one line; empty if it is one."""
    if not isinstance(name, str) or not name:
        return f'{_fault("name", name, kind)}; write name = "mine", or another name, in {kind}'
    if not isinstance(accumulator, str) or accumulator not in CLASSES:
        suggestion = hint(accumulator, CLASSES) if isinstance(accumulator, str) else ""
        others = ", ".join(one for one in CLASSES if one != FP32.name)
        line = f'write accumulator = "{FP32.name}" in {kind}, or another class: {others}'
        return follow(f"{_fault('accumulator', accumulator, kind)}{suggestion}", line)
    if not callables:
        return f"{kind} has nothing to judge; write a method in it: {', '.join(choices)}"
    return ""


def _fault(attribute: str, value: Any, kind: str) -> str:
    """What is wrong with an attribute; a worker sends what is no string as a list of its text."""
    if value is None:
        return f"{kind} has no `{attribute}`"
    text = value[0] if isinstance(value, list) and value else repr(value)
    return f"`{attribute}` of {kind} is {text}"


def identity_of(
    ready: Mapping[str, Any], state: Mapping[str, Any], request: str | Choice = AUTO
) -> Identity:
    """The identity from a worker's first answer.

    ``request`` is the contract of the request, or an earlier choice. Raises :class:`WorkerError` if
    the answer is that of no backend, and :class:`.choice.NoChoice` if the backend computes no
    contract that can be judged.
    """
    callables = [name for name in ready["callables"] if name in METHODS]
    wrong = complaint(ready["name"], ready["accumulator"], callables, ready["type"])
    if wrong := wrong or ready.get("misfit", ""):
        raise WorkerError(wrong)
    choice = request if isinstance(request, Choice) else choose(ready, request)
    contracts = ready.get("contracts")
    return Identity(
        ready["name"], ready["accumulator"], tuple(ready["callables"]), choice.revision,
        None if contracts is None else tuple(contracts), choice.why,
        checked_fingerprint(ready["fingerprint"]), ready["facts"], state,
        ready.get("batch_invariant", True) is not False,
    )  # fmt: skip


def checked_fingerprint(fingerprint: Any) -> dict[str, Any] | None:
    """A backend's ``fingerprint()``, if it has the form; None where the backend has none.

    ``{"sources": str, "options": str, "binaries": {specialisation: sha256}}``, the binaries being
    those compiled so far. :class:`WorkerError` for another form.
    """
    if fingerprint is None:
        return None
    if isinstance(fingerprint, Mapping) and "raised" in fingerprint:
        raise WorkerError(f"fingerprint() raised {fingerprint['raised']}")
    binaries = fingerprint.get("binaries") if isinstance(fingerprint, Mapping) else None
    right = (
        isinstance(fingerprint, Mapping)
        and isinstance(fingerprint.get("sources"), str)
        and isinstance(fingerprint.get("options"), str)
        and isinstance(binaries, Mapping)
        and all(isinstance(v, str) for pair in binaries.items() for v in pair)
    )
    if not right or not isinstance(binaries, Mapping):
        raise WorkerError(
            "fingerprint() must return sources and options as strings and binaries as a mapping "
            f"of strings; it returned {str(fingerprint)[:120]}"
        )
    return {
        "sources": fingerprint["sources"],
        "options": fingerprint["options"],
        "binaries": dict(binaries),
    }


def changes(before: Mapping[str, Any], now: Any) -> list[str]:
    """The names of the parts of the state that a call changed."""
    if not isinstance(now, Mapping):
        return [f"state of the process ({now})"]
    out = []
    for name in sorted({*before, *now}):
        if before.get(name) == now.get(name):
            continue
        has_values = not name.startswith("variable ")
        out.append(f"{name} ({before.get(name)}, now {now.get(name)})" if has_values else name)
    return out


def last_frame(stack: str, own: str = "") -> str:
    """The innermost frame in the file ``own``, else the innermost of all: of the main thread, which
    a watchdog's stack lists last, or of the thread that crashed."""
    lines = stack.splitlines()
    threads = [i for i, line in enumerate(lines) if line.endswith("(most recent call first):")]
    frames = [line.strip() for line in lines[threads[-1] + 1 :]] if threads else []
    mine = [frame for frame in frames if own and frame.startswith(f'File "{own}",')]
    return printable((mine or frames)[0][:300]) if frames else "code that leaves no trace"
