"""The judge's side of a worker: starts it, asks it, says in one line why it gave no answer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Final

from megamoe.worker.choice import Choice, NoChoice, choose, needs_restart
from megamoe.worker.process import Process, ProcessEnd
from megamoe.worker.session import (
    APART,
    PROCESS,
    Identity,
    Launch,
    Reply,
    WorkerError,
    changes,
    checked_fingerprint,
    identity_of,
)

PROTOCOL: Final = 1
"""The prefix of answers, as in ``serve.py``, which may belong to another megamoe."""
GRACE: Final = 1.0
"""Seconds from the limit until the process is killed: it leaves its stack behind meanwhile."""
LOOK: Final = 0.5
"""Seconds between two looks at whether an answer is still wanted."""


class _GivenUp(Exception):
    """Nobody wants the answer any more."""


class Worker:
    """A :class:`~megamoe.worker.session.Session` of one worker process.

    A process that ended, hung, is spoiled or was left in another state is replaced at the next
    request. Use as a context manager, or close it.
    """

    def __init__(
        self, launch: Launch, like: Identity | None = None, numbers: Iterator[int] | None = None
    ) -> None:
        """Start it, without waiting for the backend; ``identity`` waits.

        ``like``: the identity of another worker of the same run. This one must have the same.
        ``numbers``: those of the run's processes, which its workers share.
        """
        self.launch = launch
        self._state: Mapping[str, Any] = {}
        self.like = like
        self._restart: Choice | None = None
        """The contract for which the backend was created again, if the judge chose it."""
        self._identity: Identity | None = None
        self._calls: set[str] = set()
        """The callables of which this process has had a call."""
        self._cases: set[str] = set()
        """The cases of which this process has had a call."""
        self._numbers = count(1) if numbers is None else numbers
        self._number = self._count = 0
        """The number of this process, and of its last call; 0 before its first call."""
        self._apart: Worker | None = None
        """The worker of one request that asks for a process of its own."""
        self.give_up: Callable[[], bool] = lambda: False
        """Whether the wait for an answer is over before its time, since another rank failed."""
        self.sources: dict[str, str] = {}
        """The Python files that its processes imported, by path, as ``sources.py`` tells them."""
        self._process = Process(launch)

    @property
    def folder(self) -> Path:
        return self._process.folder

    @property
    def identity(self) -> Identity:
        if self._identity is None:
            self._identity = self._await_start()
        return self._identity

    def ask(self, request: Mapping[str, Any], seconds: float) -> Reply:
        """See :meth:`megamoe.worker.session.Session.ask`; ``changed`` lists the parts of its state
        that it changed."""
        if request.get(APART):
            return self._ask_apart({k: v for k, v in request.items() if k != APART}, seconds)
        try:
            self._bury()
            identity = self.identity
        except WorkerError as error:
            return {"broken": str(error)}
        start = time.monotonic()
        # A number that no earlier call can know, so that none answers for a later one.
        number = secrets.token_hex(8)
        message = {**request, "id": number, "seconds": seconds}
        self._cases.add(message.pop("case", ""))  # the judge's own: the worker need not know it
        self._number, self._count = self._number or next(self._numbers), self._count + 1
        turn = {PROCESS: [self._number, self._count]}
        reply = self._answer(message, seconds)
        took = time.monotonic() - start
        fresh = request["call"] not in self._calls
        self._calls.add(request["call"])
        folder = Path(request["out"]).parent
        if "broken" in reply:
            self.end()
            self._process.remakes(folder)
            return reply | turn
        state = reply.pop("state", None)
        self._add_sources(reply.pop("sources", None))
        if fresh and isinstance(state, dict):  # variables that a first call adds are its set-up
            variables = {k: v for k, v in state.items() if k.startswith("variable ")}
            self._state = {**variables, **self._state}
        reply["changed"] = changes(self._state, state)
        try:
            answer = {**reply.pop("identity", {})}
            answer["fingerprint"] = checked_fingerprint(reply.get("fingerprint"))
            otherwise = identity.differs(answer)
            if otherwise:
                reply["otherwise"] = f"the backend now says {otherwise}"
        except WorkerError as error:
            reply["otherwise"] = f"the backend's {error}"
        is_spoiled = "otherwise" in reply or reply["changed"] or reply.get("lost")
        if is_spoiled or self._process.remakes(folder):
            self.end()
        return {**reply, **turn, "took": took}

    def _ask_apart(self, request: Mapping[str, Any], seconds: float) -> Reply:
        """The answer of a new process, which has had no call and gets no other one."""
        try:
            with Worker(self.launch, self.identity) as worker:
                self._apart = worker
                if self._process.is_retired:
                    worker.retire()
                reply = worker.ask(request, seconds)
                self._add_sources(worker.sources)
        except WorkerError as error:
            return {"broken": str(error)}
        finally:
            self._apart = None
        return {k: v for k, v in reply.items() if k != PROCESS}  # no other case can depend on it

    def retire(self) -> None:
        """Start no process and make no folder from here on."""
        self._process.retire()
        apart = self._apart  # a worker that is made from here on is told by its maker
        if apart is not None:
            apart.retire()

    def close(self) -> None:
        """End the process, all that it started, and the folder."""
        self.retire()
        apart = self._apart
        if apart is not None:
            apart.close()
        self._process.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the start, and the identity --------------------------------------------------------------

    def _start(self) -> None:
        self._process.start(self.launch)
        self._calls, self._cases = set(), set()
        self._number = self._count = 0

    def _await_start(self) -> Identity:
        """Wait until the backend is loaded."""
        spec, seconds = self.launch.backend, self.launch.seconds
        late = f"backend {spec}: not loaded within {seconds:g} s, last seen in "
        try:
            if not self._process.is_there:
                self._start()
            answer = self._process.next_answer(seconds + GRACE)
            if self._needs_restart(answer):
                self.end()
                self._start()
                answer = self._process.next_answer(seconds + GRACE)
            return self._identity_of(answer)
        except ProcessEnd as end:
            text = f"backend {spec}: {end} while it was loaded"
            if self._is_late(self._process.began, seconds):
                text = late + self._process.last_frame()
        except TimeoutError:
            text = late + self._process.last_frame()
        except (WorkerError, NoChoice) as error:
            text = str(error)
            if not text.startswith((f"backend {spec}:", "unknown backend")):
                text = f"backend {spec}: {text}"
        self.end()
        raise WorkerError(text)

    def _needs_restart(self, answer: Reply) -> bool:
        """Whether the backend was created for another contract than the chosen one; then it starts
        again."""
        request, ready = self.launch.contract, answer.get("ready")
        if ready is None or answer.get("protocol") != PROTOCOL:
            return False
        try:
            choice = self._choose(ready)
        except NoChoice:
            return False  # there is more to say of such a backend
        if not needs_restart(ready, request, choice):
            return False
        self._restart, self.launch = choice, replace(self.launch, contract=choice.revision)
        return True

    def _choose(self, ready: Mapping[str, Any]) -> Choice:
        """The contract to judge under: that of the run, if it has begun."""
        if self.like is not None:
            return Choice(self.like.contract, self.like.why)
        choice = choose(ready, self.launch.contract)
        return self._restart or choice

    def _identity_of(self, answer: Reply) -> Identity:
        if answer.get("protocol") != PROTOCOL:
            raise WorkerError(
                f"its worker speaks protocol {answer.get('protocol')}, this megamoe {PROTOCOL}; "
                "use the serve.py of this megamoe"
            )
        if "error" in answer:
            text = str(answer["error"])
            own = text.startswith("BackendError: ")
            text = text.removeprefix("BackendError: ") if own else f"loading it raised {text}"
            if self._restart is not None:
                text += (
                    f"; it was asked for contract {self._restart.revision} ({self._restart.why}); "
                    "let it name its `contracts`"
                )
            raise WorkerError(text)
        identity = identity_of(answer["ready"], answer["state"], self._choose(answer["ready"]))
        if self.like is None:
            self.like = identity
        otherwise = self.like.differs({**answer["ready"], "fingerprint": identity.fingerprint})
        if otherwise:
            raise WorkerError(f"a new process of it says {otherwise}")
        self._state = identity.state
        self._add_sources(answer["ready"].get("sources"))
        return identity

    def _add_sources(self, digests: Any) -> None:
        """Keep the digest of each file as the first process told it; a worker of an earlier megamoe
        tells none."""
        for path, digest in digests.items() if isinstance(digests, dict) else ():
            if isinstance(digest, str):
                self.sources.setdefault(path, digest)

    def _answer(self, request: dict[str, Any], seconds: float) -> Reply:
        start = time.monotonic()
        try:
            self._process.say(request)
            until = start + seconds + GRACE
            while True:
                reply = self._next_answer(until)
                if reply.get("id") == request["id"]:
                    return reply
        except _GivenUp:
            return {
                "broken": "its process was ended, since another rank had failed",
                "waited": True,
            }
        except ProcessEnd as end:
            if not self._is_late(start, seconds):
                return {"broken": self._crash_text(end)}
        except TimeoutError:
            pass
        text = f"no result within {seconds:g} s, its process was ended, last seen in "
        return {"broken": f"{text}{self._process.last_frame()}; give it more with --timeout"}

    def _crash_text(self, end: ProcessEnd) -> str:
        """How the process ended, where, and what to do if another case had run in it before."""
        place = self._process.last_frame() if "Fatal Python error" in self._process.trace() else ""
        alone = "; run it alone" if len(self._cases) > 1 else ""
        return f"{end}{f', last seen in {place}' if place else ''}{alone}"

    @staticmethod
    def _is_late(start: float, seconds: float) -> bool:
        """Whether a process that ended just now had used up its time.

        Its own watchdog, which writes its stack at that moment without stopping the thread that
        it reads, can crash it.
        """
        return time.monotonic() - start >= seconds

    def _next_answer(self, until: float) -> Reply:
        """The next answer; looks now and then whether the wait is to end."""
        while True:
            rest = until - time.monotonic()
            try:
                return self._process.next_answer(min(rest, LOOK))
            except TimeoutError:
                if rest <= LOOK:
                    raise
            if self.give_up():
                raise _GivenUp

    def _bury(self) -> None:
        """A process that has ended since its last answer is no fault of the next call."""
        if self._identity is not None and not self._process.is_alive():
            self._identity, self._process.is_there = None, False

    def end(self) -> None:
        """End the process now. The next request gets another."""
        self._identity = None
        self._process.end()
