"""What ``--case`` and ``-k`` mean: one syntax in every verb, in the environment and under pytest.

A pattern is words with commas between them. A word is a glob over the whole id (``kind/name``) or
the whole name: ``*`` is any text, ``?`` one character, ``[ab]`` one of these; a word without them
is one case. A case is chosen if a word matches it. A word after ``!`` takes cases away; where all
words do, they take away from all cases. The order of words does not matter.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final, Protocol, TypeVar

from megamoe.cases.kind import CaseError
from megamoe.printable import quantity
from megamoe.suggest import follow, nearest


class CaseLike(Protocol):
    """What a pattern looks at: a case, or a line of its file."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=CaseLike)

HELP: Final = (
    "cases whose id or name matches: globs with commas between them, !GLOB takes away, as "
    "'forward/*,!*-t384'"
)
MARKS: Final = "*?,!"
"""Characters of a pattern that an expression of pytest's own ``-k`` cannot have."""
PROBLEM_SUFFIX: Final = ".safetensors"
"""The end of the name of a stored problem's file."""
MOST_NAMES: Final = 6
"""Cases of a pattern that a refusal names."""


def matching(cases: Iterable[N], pattern: str) -> list[N]:
    """The cases that ``pattern`` means, in their order.

    Raises :class:`CaseError` for an empty word, a word that matches no case, and a pattern that
    leaves none.
    """
    cases = list(cases)
    selection: set[str] = set()
    exclusions: set[str] = set()
    words = [word.strip() for word in pattern.split(",")]
    for word in words:
        glob = word.removeprefix("!")
        if not glob:
            raise CaseError(f"pattern {pattern!r} has an empty word; write globs with a comma "
                            "between two")  # fmt: skip
        matches = {c.id for c in cases if fnmatchcase(c.id, glob) or fnmatchcase(c.name, glob)}
        if not matches:
            raise CaseError(_unknown(cases, glob))
        (exclusions if word.startswith("!") else selection).update(matches)
    if all(word.startswith("!") for word in words):
        selection = {c.id for c in cases}
    rest = [c for c in cases if c.id in selection - exclusions]
    if not rest:
        raise CaseError(f"pattern {pattern!r} takes away every case that it chooses")
    return rest


def in_order(cases: Iterable[N], pattern: str | None) -> list[N]:
    """``cases`` in the order of the words of ``pattern``, each of which must be one case.

    Raises :class:`CaseError` for no pattern, and for a word that is none of the cases.
    """
    if not pattern:
        raise CaseError("--in-order needs the cases by name, as in --case 'forward/a,forward/b'")
    cases = list(cases)
    return [one_of(cases, word.strip()) for word in pattern.split(",")]


def one_of(cases: Iterable[N], name: str) -> N:
    """The one case with this id (``kind/name``) or name.

    Raises :class:`CaseError` for an unknown name, for a pattern, and for a name that several kinds
    have.
    """
    cases = list(cases)
    matches = [c for c in cases if c.id == name] or [c for c in cases if c.name == name]
    if not matches and any(mark in name for mark in MARKS):
        raise CaseError(_several(name, [c.id for c in matching(cases, name)]))
    if not matches:
        raise CaseError(_unknown(cases, name, "has the id or name"))
    if len(matches) > 1:
        ids = ", ".join(c.id for c in matches)
        raise CaseError(
            f"case {name!r} is the name of {len(matches)}: {ids}; give one of these ids"
        )
    return matches[0]


def _several(pattern: str, ids: list[str]) -> str:
    more = f" and {len(ids) - MOST_NAMES} more" if len(ids) > MOST_NAMES else ""
    names = f"{quantity(len(ids), 'case')}: {', '.join(ids[:MOST_NAMES])}{more}"
    return (
        f"one case is needed here, and the pattern {pattern!r} matches {names}; name one of "
        f"them: the last line of `megamoe check --backend B --case {shlex.quote(pattern)}` names "
        "the red to take"
    )


def _of_one_word(count: int, glob: str, lacks: str) -> str:
    """What to type for the cases that have the word ``glob`` in their ids."""
    if lacks == "matches":
        return f"to mean the {count} cases with {glob} in their ids, write '*{glob}*' in quotes"
    return f"{count} cases have {glob} in their ids: `megamoe list '*{glob}*'` shows them"


def _unknown(cases: Sequence[N], glob: str, lacks: str = "matches") -> str:
    if glob.endswith(PROBLEM_SUFFIX):
        return (
            f"unknown case: {glob!r} is the name of a stored problem's file, and no case; "
            f"`megamoe replay {shlex.quote(glob)} --backend B` judges it"
        )
    near_glob = _nearest_glob(cases, glob)
    if near_glob:
        text = f"unknown case: nothing {lacks} {glob!r}; did you mean '{near_glob}'?"
        return follow(text, "`megamoe list` shows all")
    inside = [c for c in cases if glob in c.id]
    near_case = inside[0] if len(inside) == 1 else _nearest(cases, glob)
    if len(inside) > 1:
        of_them = _of_one_word(len(inside), glob, lacks)
    else:
        of_them = "`megamoe list` shows all" if near_case else _of_words(cases, glob)
    more = f"; did you mean {near_case.id if '/' in glob else near_case.name}?" if near_case else ""
    return follow(f"unknown case: nothing {lacks} {glob!r}{more}", of_them)


def _of_words(cases: Sequence[N], glob: str) -> str:
    """How to list the cases with the rarest word of ``glob`` that ids have, else those of its kind,
    else all."""
    kind, _, name = glob.rpartition("/")
    words = re.findall(r"[^*?\[\]/ -]{3,}", name)
    counts = {word: n for word in words if (n := sum(word in c.id for c in cases))}
    if counts:
        word = min(counts, key=lambda word: counts[word])
        shows = "it" if counts[word] == 1 else "them"
        text = f"{quantity(counts[word], 'case')} with {word} in the id"
        return f"`megamoe list '*{word}*'` shows {shows}: {text}"
    of_kind = sum(c.id.startswith(f"{kind}/") for c in cases)
    if kind and of_kind:
        return f"`megamoe list '{kind}/*'` shows the {quantity(of_kind, 'case')} of this kind"
    return "`megamoe list` shows all, `megamoe list '*WORD*'` those with a word in the id"


def _nearest_glob(cases: Sequence[N], glob: str) -> str:
    """``glob`` with each word that no id has replaced by the nearest that one has; empty if that
    matches no case, and for a ``glob`` without marks."""
    if not any(mark in glob for mark in "*?["):
        return ""
    words = {word for c in cases for word in re.split("[/-]", c.id)}

    def replacement(match: re.Match[str]) -> str:
        word = match[0]
        return word if any(word in one for one in words) else nearest(word, sorted(words)) or word

    near_glob = re.sub(r"[^*?\[\]/-]+", replacement, glob)
    matches = any(fnmatchcase(c.id, near_glob) or fnmatchcase(c.name, near_glob) for c in cases)
    return near_glob if matches else ""


def _nearest(cases: Sequence[N], glob: str) -> N | None:
    """The case whose name is most like that in ``glob``: of its kind, if it names one."""
    kind, _, name = glob.rpartition("/")
    of_kind = {c.name: c for c in cases if c.id.startswith(f"{kind}/")} if kind else {}
    names = of_kind or {c.name: c for c in cases}
    return names.get(nearest(name, names))
