"""The parser of the command line: argparse, with mistakes said in words that help."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Sequence
from typing import Any, Final

from megamoe.commands import UsageError
from megamoe.suggest import follow, hint

_OPTION: Final = re.compile(r"--?[A-Za-z]")
"""How an option begins; a negative number does not."""
_REQUIRED: Final = "the following arguments are required: "
"""How argparse begins to say what lacks. A parser's default ``example`` is what to type instead."""
KERNEL: Final = re.compile(r"\.py(:\w*)?$")
"""How the file of a backend ends, with its class or without."""
_BACKEND: Final = re.compile(rf"{KERNEL.pattern}|^[^:*?[]+:[A-Za-z_]\w*$")
"""The same, or the class of a package. Where a side of a comparison may stand, a word with a colon
can be another thing, so :data:`KERNEL` alone decides."""


class _Once(argparse._StoreAction):
    """An option that stands twice with two values is a mistake: the last would win in silence."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        assert isinstance(parser, Parser)
        first = parser.options.setdefault(self.dest, values)
        if option_string and first != values:
            advice = ""
            if self.dest == "backend" and isinstance(first, str):
                advice = f"; to compare two backends: {_sides_of(first, values)}"
            elif self.dest == "kind":
                advice = f"; for several kinds: {_kinds((first, values))}"
            parser.error(f"{option_string} stands twice, with {first} and with {values}{advice}")
        super().__call__(parser, namespace, values, option_string)


def _sides_of(left: str, right: str) -> str:
    return f"`megamoe ab this this --left-backend {left} --right-backend {right}`"


def _kinds(names: Sequence[str]) -> str:
    """What chooses the cases of several kinds; ``--case`` alone would take all tiers."""
    return f"--case '{','.join(f'{name}/*' for name in names)}' --tier quick"


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are a :class:`UsageError` of one line.

    argparse names a missing argument before it names an option that it does not know. A misspelt
    option is both, so unknown options and verbs are looked for first.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **{**more, "allow_abbrev": False})
        self.options: dict[str, Any] = {}
        """The values of the options that :class:`_Once` has stored, by ``dest``."""
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str) -> Any:
        missing = message.removeprefix(_REQUIRED)
        example = self.get_default("example")
        if example and missing != message:
            both = missing.removesuffix(", ...").replace(", ", " and ")
            raise UsageError(f"name {both}, as in `{self.prog} {example}`")
        if missing != message:
            action = next((a for a in self._actions if missing in a.option_strings), None)
            are = "are" if ", " in missing else "is"
            more = f": {action.help}" if action and action.help else ""
            message = f"{missing.replace(', ', ' and ')} {are} missing{more}"
        raise UsageError(follow(message, f"see `{self.prog} --help`"))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it; a word too many is named with the verb that does not take it."""
        arguments, rest = self.parse_known_args(args, namespace)
        if rest:
            parser, words = _last_parser(self, args or ())
            options = parser._option_string_actions
            if "--backend" in options and _is_name_of_backend(rest[0]):
                raise UsageError(_no_case(parser, rest[0], _read(parser, words)[1]))
            advice = "; cases stand after --case" if "--case" in options else ""
            parser.error(f"unexpected {rest[0]!r}{advice}")
        return arguments

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.options.clear()
        unknown, plain = _read(self, args or ())
        if unknown:
            self.error(f"unknown option {unknown}{self._suggestion(unknown)}")
        verbs = verbs_of(self)
        if verbs and not args:
            self.error(f"name a verb: {', '.join(verbs)}")
        sides = self.get_default("sides")
        option = self._option_string_actions.get("--backend")
        backends = list(filter((KERNEL if sides else _BACKEND).search, plain))
        if option and option.required and not any(w.startswith("--backend") for w in args):
            backends += filter(_is_name_of_backend, plain)
        if backends and option:
            raise UsageError(
                _no_side(self, backends) if sides else _no_case(self, backends[0], plain)
            )
        arguments, rest = super().parse_known_args(args, namespace)
        return arguments, self._rest(arguments, rest)

    def _suggestion(self, unknown: str) -> str:
        if unknown in ("--case", "-k") and any(a.metavar == "CASE" for a in self._actions):
            return f"; the case stands without an option: `{self.prog} CASE`"
        return hint(unknown, self._option_string_actions)

    def _rest(self, arguments: argparse.Namespace, rest: list[str]) -> list[str]:
        """What is left of words that nobody took: a parser with ``bare`` takes them as patterns.
        The argparse of Python 3.11 takes no optional word that stands after an option."""
        bare = getattr(arguments, "bare", None)
        if bare is None or any(word.startswith("-") for word in rest):
            return rest
        words = filter(None, [getattr(arguments, bare), *rest])
        setattr(arguments, bare, ",".join(words) or None)
        return []

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = hint(str(value), map(str, action.choices or ()))
            if isinstance(action, argparse._SubParsersAction):
                names = ", ".join(action.choices)
                text = f"unknown verb {value!r}{near or f'; known: {names}'}"
                raise UsageError(follow(text, f"see `{self.prog} --help`")) from None
            names = ", ".join(map(str, action.choices or ()))
            several = str(value).split(",")
            if action.dest == "kind" and {*several} <= {*(action.choices or ())}:
                error.message = f"it takes one kind; for several: {_kinds(several)}"
                raise
            error.message = follow(f"{value!r} is not known{near}", f"known: {names}")
            raise


def _last_parser(parser: Parser, words: Sequence[str]) -> tuple[Parser, Sequence[str]]:
    """That of the verb, or of the act of a verb, that ``words`` begin with; and the other words."""
    for n, word in enumerate(words):
        below = verbs_of(parser).get(word)
        if not isinstance(below, Parser):
            return parser, words[n:]
        parser = below
    return parser, ()


def _is_name_of_backend(word: str) -> bool:
    """Whether a backend of megamoe's own has this name."""
    from megamoe.worker import known  # only a mistake asks

    return word in {*known.BUILTINS, *known.KERNELS}


def _no_case(parser: argparse.ArgumentParser, backend: str, words: Sequence[str]) -> str:
    """The message for a backend where a case or a file is meant. ``words``: all that the command
    line has without an option."""
    plain = [a for a in parser._actions if not a.option_strings and a.nargs != "*"]
    rest = [shlex.quote(word) for word in words if word != backend]
    rest = rest or [str(action.metavar) for action in plain]
    is_no = "no case" if parser._get_positional_actions() else "unexpected"
    if any("." in str(action.metavar) for action in plain):
        is_no = "no stored problem"
    spec = _with_class(backend)
    line = " ".join([parser.prog, *rest, "--backend", shlex.quote(spec)])
    return f"{backend} is {is_no}; a backend stands after --backend: `{line}`"


def _with_class(backend: str) -> str:
    """The value of ``--backend`` for a file that is given without its class, or with it."""
    from megamoe.commands.early_backend import specs  # only a mistake asks

    file = backend.removesuffix(":")
    return (*specs(file), f"{file}:CLASS")[0] if backend.endswith((".py", ":")) else backend


def _no_side(parser: Parser, backends: Sequence[str]) -> str:
    """The message for backends' files where the sides of a comparison are meant."""
    two = (*backends, "FILE.py:CLASS")[:2]
    left, right = map(_with_class, two)
    return (
        f"{backends[0]} is a backend, and {parser.get_default('sides')} are environments; to "
        f"compare two backends in this one: {_sides_of(left, right)}"
    )


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The verbs of a parser, or of a verb, with their parsers; empty if it has none."""
    for action in parser._actions:  # argparse has no public way to ask
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _read(parser: argparse.ArgumentParser, words: Sequence[str]) -> tuple[str, list[str]]:
    """The first option that the parser does not have, empty if it has all; and the words that are
    neither an option nor its value.

    Words after a verb are that verb's, and words after the script of ``capture`` are the script's.
    """
    ends = bool(verbs_of(parser)) or any(a.nargs == argparse.REMAINDER for a in parser._actions)
    flags = parser._option_string_actions
    rest, plain, of_option = iter(words), [], False
    for word in rest:
        if word == "--":
            break
        if not _OPTION.match(word) or " " in word:
            if of_option:
                continue
            if ends:
                break
            plain.append(word)
            continue
        name = word.partition("=")[0]
        action = flags.get(name) or (None if word.startswith("--") else flags.get(word[:2]))
        if action is None:
            return name, plain
        if action.nargs is None and word in flags:
            next(rest, None)  # its value
        of_option = action.nargs in ("+", "*")  # all words up to the next option are its values
    return "", plain
