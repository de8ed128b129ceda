"""A room that can be called: ``megamoe.judge`` and ``megamoe.cases`` are rooms and functions.

The public API has two functions with the names of rooms. ``import megamoe.judge.verdict`` binds
``megamoe.judge`` to the room, whatever was there before, so the room itself answers the call.
Python's data model provides for this: the class of a module may be replaced.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import inspect


class CallableRoom(ModuleType):
    """A room; a call of it is a call of the function of the same name in :mod:`megamoe.api`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self)(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        import inspect  # costs more than the rest of the room, and is rarely asked for

        return inspect.signature(_function(self))


def _function(room: ModuleType) -> Any:
    return getattr(import_module("megamoe.api"), room.__name__.rpartition(".")[2])


def make_callable(name: str) -> None:
    """Let the room of this full name answer calls. A room says this at the end of itself."""
    sys.modules[name].__class__ = CallableRoom
