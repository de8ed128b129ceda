"""A team: one worker for each rank of a process group, asked together.

Here: ``--ep N`` starts N of them on this machine. Under ``torchrun`` each process starts the
worker of its own rank, and the process group is that of ``torchrun``'s environment. A request with
``ranks``, a list with a request for each rank that is here, is answered by all of them at once. Any
other request is answered by the first.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from megamoe.worker.client import Worker
from megamoe.worker.session import PROCESS, Identity, Launch, Reply, WorkerError

PATIENCE: Final = 10.0
"""Seconds that the other ranks get once one has failed; then their processes are ended."""
RANK_ERROR: Final = "RankError: "
"""Start of the error of a rank whose group broke, or where another rank failed."""
NO_GROUP: Final = f"{RANK_ERROR}no process group"
"""Start of the error of a rank that did not find the others at its first call."""
OUTCOMES: Final = ("broken", "raised", "missing", "declined", "unwritten")
"""Keys of a reply that is no answer."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, and those of them that this process starts."""

    of: int
    here: tuple[int, ...]
    gpus: int = 0
    """GPUs of this machine; 0 on a CPU."""
    torchrun: bool = False
    """The process group is that of torchrun's environment."""

    @classmethod
    def on_this_machine(cls, count: int) -> Ranks:
        """``count`` ranks, all of them here."""
        return cls(count, tuple(range(count)))

    @classmethod
    def of_torchrun(cls, environment: Mapping[str, str]) -> Ranks | None:
        """The rank that ``torchrun`` gave this process; None outside of torchrun."""
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        return cls(int(environment["WORLD_SIZE"]), (int(environment["RANK"]),), torchrun=True)

    def launch(self, launch: Launch, rank: int) -> Launch:
        """How the worker of ``rank`` is started."""
        environment = dict(os.environ if launch.environment is None else launch.environment)
        if not self.torchrun:
            environment |= {
                "RANK": str(rank), "WORLD_SIZE": str(self.of), "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(self.of),
            }  # fmt: skip
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
        local = int(environment["LOCAL_RANK"])
        device = f"cuda:{local % max(1, self.gpus)}" if launch.device == "cuda" else launch.device
        return replace(launch, device=device, environment=environment)


class Team:
    """The workers of the ranks that are here, with the interface of one :class:`Worker`.

    When one rank fails and another waits for it, or ends, all processes are replaced at the next
    request, for a process group does not outlive one of its ranks. Under torchrun no group can be
    made again: then every further request is refused.
    """

    def __init__(self, launch: Launch, ranks: Ranks) -> None:
        self.ranks = ranks
        self._group = 0
        """The number of the process group; a new one gets a new store."""
        self._over = ""
        self._workers: list[Worker] = []
        try:
            for rank in ranks.here:
                self._workers.append(Worker(ranks.launch(launch, rank)))
        except BaseException:
            self.close()
            raise

    @property
    def folder(self) -> Path:
        return self._workers[0].folder

    @property
    def identity(self) -> Identity:
        first = self._workers[0].identity
        for worker in self._workers[1:]:
            worker.like = first
        return replace(first, ranks=self.ranks.of, here=self.ranks.here,
                       torchrun=self.ranks.torchrun)  # fmt: skip

    @property
    def sources(self) -> dict[str, str]:
        """The Python files that the processes of all ranks here imported."""
        return {path: sha for worker in self._workers for path, sha in worker.sources.items()}

    @property
    def like(self) -> Identity | None:
        return self._workers[0].like

    @like.setter
    def like(self, identity: Identity) -> None:
        for worker in self._workers:
            worker.like = identity

    def ask(self, request: Mapping[str, Any], seconds: float) -> Reply:
        """See :meth:`megamoe.worker.session.Session.ask`; with ``ranks``, ``{"ranks": [...]}``."""
        if "ranks" not in request:
            return self._workers[0].ask(request, seconds)
        if self._over:
            return {"ranks": [{"broken": self._over} for _ in self._workers], "took": 0.0}
        start = time.monotonic()
        replies = self._all(request["ranks"], seconds)
        dead = any(
            "broken" in reply or reply.get("lost")
            or str(reply.get("raised", "")).startswith(NO_GROUP)
            for reply in replies
        )  # fmt: skip
        # Under torchrun the broken process may be another host's: what is seen here is an echo.
        echo = any(str(reply.get("raised", "")).startswith(RANK_ERROR) for reply in replies)
        if dead or (echo and self.ranks.torchrun):
            self._anew()
        turn = {PROCESS: replies[0][PROCESS]} if PROCESS in replies[0] else {}
        return {"ranks": replies, "took": time.monotonic() - start, **turn}

    def retire(self) -> None:
        """Start no process and make no folder from here on."""
        for worker in self._workers:
            worker.retire()

    def close(self) -> None:
        """End every process."""
        self.retire()
        for worker in self._workers:
            worker.close()

    def _all(self, requests: list[dict[str, Any]], seconds: float) -> list[Reply]:
        """The replies of all ranks; a rank that waits for a failed one is ended."""
        failure_times: list[float] = []
        lock = threading.Lock()

        def is_over() -> bool:
            return bool(failure_times) and time.monotonic() > failure_times[0] + PATIENCE

        def ask(at: int) -> Reply:
            stage = self.folder / f"stage-{self.ranks.here[at]}"
            plain = {**requests[at]["plain"], "store": self._store(), "stage": str(stage)}
            worker = self._workers[at]
            worker.give_up = is_over
            reply = worker.ask({**requests[at], "plain": plain}, seconds)
            if any(key in reply for key in OUTCOMES):
                with lock:
                    failure_times.append(time.monotonic())
            if "broken" in reply:
                reply["stage"] = _read(stage)
            return reply

        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(ask, range(len(requests))))

    def _store(self) -> str | None:
        return None if self.ranks.torchrun else str(self.folder / f"group-{self._group}")

    def _anew(self) -> None:
        """No process of this group serves again."""
        self._group += 1
        for worker in self._workers:
            worker.end()
        if self.ranks.torchrun:
            self._over = "a rank failed earlier, and torchrun's process group ended with it"


def _read(path: Path) -> str:
    try:
        return path.read_text()[:40]
    except OSError:
        return ""


__all__ = ["Ranks", "Team", "WorkerError"]
