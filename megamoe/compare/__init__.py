"""After a red: the same cases in two environments (``ab``), or in many until one is to blame."""

from megamoe.compare.commands import add

__all__ = ["add"]
