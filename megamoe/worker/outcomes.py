"""The reasons why a call gives nothing to judge, each with the sentence for a person."""

from __future__ import annotations


class NoOutput(Exception):
    """A call gave nothing to judge; ``why`` is a sentence of one line."""

    sentence = "{}"

    @property
    def why(self) -> str:
        return self.sentence.format(self)


class NotProvided(NoOutput):
    """The backend, the run or the machine lacks what the case needs; the message says it."""


class Missing(NotProvided):
    """The backend lacks the callable or the feature; the message names it."""

    sentence = "the backend has no {}"


class Refusal(NoOutput):
    """The backend raised ``NotImplementedError``: it cannot do this here, and says why."""

    sentence = "the backend declined: {}"


class BackendFailure(NoOutput):
    """The backend raised, or its process gave no answer; one line."""


class WroteInput(NoOutput):
    """The backend wrote into inputs that are not its own; the message names them. ``element`` says
    what changed in the first of them, or nothing."""

    sentence = "the backend wrote into input {}"

    def __init__(self, names: str, element: str = "") -> None:
        super().__init__(names)
        self.element = element

    @property
    def why(self) -> str:
        return super().why + (f"; {self.element}" if self.element else "")


class Leftover(NoOutput):
    """The backend left its process in another state; the message says which."""

    sentence = "the backend left another {}; a call must leave its process as it was"


class NoRoom(ValueError):
    """The folder of exchanged files is full: no backend's fault."""
