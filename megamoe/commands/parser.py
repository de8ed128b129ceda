"""The parser of the command line: argparse, with mistakes said in words that help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, Final

from megamoe.commands import UsageError
from megamoe.suggest import hint

_OPTION: Final = re.compile(r"--?[A-Za-z]")
"""How an option begins; a negative number does not."""


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are a :class:`UsageError` of one line.

    argparse names a missing argument before it names an option that it does not know. A misspelt
    option is both, so unknown options and verbs are looked for first.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **{**more, "allow_abbrev": False})

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        unknown = _unknown_option(self, args or ())
        if unknown:
            self.error(f"unknown option {unknown}{hint(unknown, self._option_string_actions)}")
        verbs = verbs_of(self)
        if verbs and not args:
            self.error(f"name a verb: {', '.join(verbs)}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = hint(str(value), map(str, action.choices or ()))
            if isinstance(action, argparse._SubParsersAction):
                known = ", ".join(action.choices)
                raise UsageError(
                    f"unknown verb {value!r}{near or f'; known: {known}'}; see `{self.prog} --help`"
                ) from None
            error.message += near
            raise


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The verbs of a parser, or of a verb, with their parsers; empty if it has none."""
    for action in parser._actions:  # argparse has no public way to ask
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _unknown_option(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """The first option that the parser does not have; empty if it has all.

    Words after a verb are that verb's, and words after the script of ``capture`` are the script's.
    """
    ends = bool(verbs_of(parser)) or any(a.nargs == argparse.REMAINDER for a in parser._actions)
    flags = parser._option_string_actions
    left = iter(words)
    for word in left:
        if word == "--":
            break
        if not _OPTION.match(word) or " " in word:
            if ends:
                break
            continue
        name = word.partition("=")[0]
        action = flags.get(name) or (None if word.startswith("--") else flags.get(word[:2]))
        if action is None:
            return name
        if action.nargs is None and word in flags:
            next(left, None)  # its value
    return ""
