"""``megamoe completion``: a script for bash, zsh or fish, from the parsers of all verbs."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megamoe.cases import KINDS, load_entries
from megamoe.spec.contract import CONTRACTS
from megamoe.worker.choice import AUTO
from megamoe.worker.known import available

_FILE: Final = re.compile(r"FILE|DIR|PATH|REPORT|RESULT|SCRIPT|PYTHON|SUB|LEFT|RIGHT|SIDE|\.\w+$")
"""A metavar of this form stands for a path."""
_OFFERS: Final = {
    "backend": "backend", "left_backend": "backend", "right_backend": "backend", "case": "case",
    "subject": "case", "among": "case", "contract": "contract", "revision": "contract",
}  # fmt: skip
"""Name of an argument -> what may stand there. Nothing is offered for a number or a text."""
_EPILOG: Final = {
    "bash": "complete -F _megamoe megamoe",
    "zsh": "complete -F _megamoe megamoe",
}


def run(a: argparse.Namespace) -> int:
    """Print the script. It needs no megamoe when it runs: the names are those of now."""
    from megamoe.commands.main import whole_parser  # which imports this module by name

    words = list(_words(whole_parser(), ()))
    ids = [entry.id for entry in load_entries(Path(a.golden) if a.golden else None)]
    print(_fish(words, ids) if a.shell == "fish" else _bash(words, ids, a.shell))
    return 0


@dataclass(frozen=True)
class Option:
    """What may follow on the command line."""

    flags: tuple[str, ...]
    """Empty for a positional argument."""
    help: str
    takes: bool
    """A value follows."""
    choices: tuple[str, ...]
    offer: str
    """backend, case, contract or path; empty if nothing is known of the value."""
    name: str
    """Of the argument in the parser."""


@dataclass(frozen=True)
class Words:
    """All that may stand after one verb, or after a verb and its act."""

    verb: tuple[str, ...]
    acts: dict[str, str]
    """Verbs or acts, with their help."""
    options: tuple[Option, ...]

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(flag for option in self.options for flag in option.flags)

    @property
    def plain(self) -> list[Option]:
        """The positional arguments."""
        return [option for option in self.options if not option.flags]


def _words(parser: argparse.ArgumentParser, verb: tuple[str, ...]) -> Iterator[Words]:
    acts: dict[str, str] = {}
    options = []
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:  # argparse has no public way to ask
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
            acts = {str(c.dest): c.help or "" for c in action._choices_actions}
            continue
        choices = tuple(map(str, action.choices or ()))
        options.append(
            Option(
                tuple(action.option_strings), (action.help or "").replace("%%", "%"),
                action.nargs != 0, choices, _offer(verb, action), action.dest,
            )
        )  # fmt: skip
    yield Words(verb, acts, tuple(options))
    for name, sub in below.items():
        yield from _words(sub, (*verb, name))


def _offer(verb: tuple[str, ...], action: argparse.Action) -> str:
    if verb == ("contract", "diff") and action.dest in ("left", "right"):
        return "contract"
    if action.dest in _OFFERS:
        return _OFFERS[action.dest]
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    return "path" if _FILE.search(metavar) else ""


# --- bash, and zsh by its emulation of bash ---------------------------------------------------

_FUNCTIONS: Final = """\
_megamoe_path() {{
  compopt -o filenames 2>/dev/null
  local IFS=$'\\n'
  COMPREPLY+=($(compgen -f -- "$cur"))
}}
_megamoe_backend() {{
  compopt -o filenames 2>/dev/null
  COMPREPLY+=($(compgen -W {backends} -- "$cur"))
  local IFS=$'\\n'
  COMPREPLY+=($(compgen -f -X '!*.py' -- "$cur") $(compgen -d -- "$cur"))
}}
_megamoe_contract() {{
  COMPREPLY+=($(compgen -W {contracts} -- "$cur"))
}}
_megamoe_case() {{
  case "$cur" in
    */*) COMPREPLY+=($(compgen -W {cases} -- "$cur")) ;;
    *) COMPREPLY+=($(compgen -W {kinds} -- "$cur")); compopt -o nospace 2>/dev/null ;;
  esac
}}"""


def _bash(words: list[Words], ids: Sequence[str], shell: str) -> str:
    acts = sorted({" ".join(w.verb) for w in words if w.verb})
    functions = _FUNCTIONS.format(
        backends=_quoted(available()), contracts=_quoted([AUTO, *CONTRACTS]), cases=_quoted(ids),
        kinds=_quoted([f"{kind}/" for kind in KINDS]),
    )  # fmt: skip
    lines = [
        *functions.splitlines(),
        "_megamoe() {",
        '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" at="" i',
        "  COMPREPLY=()",
        "  for ((i = 1; i < COMP_CWORD && i < 3; i++)); do",
        '    case "${at:+$at }${COMP_WORDS[i]}" in',
        f'      {"|".join(map(shlex.quote, acts))}) at="${{at:+$at }}${{COMP_WORDS[i]}}" ;;',
        "    esac",
        "  done",
        '  case "$at:$prev" in',
    ]
    for w in words:
        for o in w.options:
            if o.flags and o.takes:
                flags = "|".join(
                    f"{shlex.quote(' '.join(w.verb) + ':' + flag)}" for flag in o.flags
                )
                lines.append(f"    {flags}) {_reply(o.choices, o.offer)}; return ;;")
    lines += ["  esac", '  case "$at:$cur" in']
    for w in words:
        offers = dict.fromkeys(o.offer for o in w.plain if o.offer)
        verb = " ".join(w.verb)
        if "subject" in (o.name for o in w.plain):  # a stored problem's file, too
            offers["path"] = None
        if offers:
            lines.append(f"    {shlex.quote(f'{verb}:-')}*) {_reply(w.flags, '')} ;;")
            lines.append(f"    {shlex.quote(f'{verb}:')}*) {'; '.join(map(_call, offers))} ;;")
            continue
        names = (*w.acts, *w.flags, *(choice for o in w.plain for choice in o.choices))
        lines.append(f"    {shlex.quote(f'{verb}:')}*) {_reply(names, '')} ;;")
    lines += ["  esac", "}", _EPILOG[shell]]
    head = ["autoload -U +X bashcompinit && bashcompinit"] if shell == "zsh" else []
    return "\n".join([*head, *lines])


def _quoted(words: Sequence[str]) -> str:
    return shlex.quote(" ".join(words))


def _call(offer: str) -> str:
    return f"_megamoe_{offer}"


def _reply(words: Sequence[str], offer: str) -> str:
    if words:
        return f'COMPREPLY=($(compgen -W {_quoted(words)} -- "$cur"))'
    return _call(offer) if offer else ":"


# --- fish -------------------------------------------------------------------------------------


def _fish(words: list[Words], ids: Sequence[str]) -> str:
    values = {
        "backend": f"{' '.join(available())} (__fish_complete_suffix .py)",
        "case": "$__megamoe_cases",
        "contract": " ".join([AUTO, *CONTRACTS]),
    }
    lines = ["complete -c megamoe -f", f"set -g __megamoe_cases {' '.join(map(shlex.quote, ids))}"]
    for w in words:
        conditions = [f"__fish_seen_subcommand_from {name}" for name in w.verb]
        if w.acts:
            conditions.append(f"not __fish_seen_subcommand_from {' '.join(w.acts)}")
        when = f" -n {shlex.quote('; and '.join(conditions))}" if conditions else ""
        for name, text in w.acts.items():
            lines.append(f"complete -c megamoe{when} -a {name} -d {shlex.quote(text)}")
        for o in w.options:
            line = f"complete -c megamoe{when}"
            for flag in o.flags:
                line += f" -{'l' if flag.startswith('--') else 's'} {flag.lstrip('-')}"
            if o.flags and o.takes:
                line += " -r" if o.offer == "path" else " -x"
            line += " -F" if o.offer == "path" else ""
            value = " ".join(o.choices) or values.get(o.offer, "")
            line += f" -a {shlex.quote(value)}" if value else ""
            lines.append(line + (f" -d {shlex.quote(o.help)}" if o.help else ""))
    return "\n".join(lines)
