"""``megamoe completion``: a script for bash, zsh or fish, made from the parsers of all verbs."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_FILE: Final = re.compile(r"FILE|DIR|PATH|REPORT|RESULT|SCRIPT|\.\w+$")
"""A metavar of this form stands for a path."""
_EPILOG: Final = {
    "bash": "complete -F _megamoe megamoe",
    "zsh": "complete -F _megamoe megamoe",
    "fish": "",
}


def run(a: argparse.Namespace) -> int:
    """Print the script. It needs no megamoe when it runs."""
    from megamoe.commands.main import whole_parser  # which imports this module by name

    words = list(_words(whole_parser(), ()))
    print((_fish if a.shell == "fish" else _bash)(words, a.shell))
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
    is_path: bool


@dataclass(frozen=True)
class Words:
    """All that may stand after one verb, or after a verb and its act."""

    verb: tuple[str, ...]
    acts: dict[str, str]
    """Verbs or acts, with their help."""
    options: tuple[Option, ...]


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
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        options.append(
            Option(
                tuple(action.option_strings), (action.help or "").replace("%%", "%"),
                action.nargs != 0, choices, bool(_FILE.search(metavar)),
            )
        )  # fmt: skip
    yield Words(verb, acts, tuple(options))
    for name, sub in below.items():
        yield from _words(sub, (*verb, name))


# --- bash, and zsh by its emulation of bash ---------------------------------------------------


def _bash(words: list[Words], shell: str) -> str:
    acts = sorted({" ".join(w.verb) for w in words if w.verb})
    lines = [
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
                lines.append(f"    {flags}) {_reply(o.choices, o.is_path)}; return ;;")
    lines += ["  esac", '  case "$at" in']
    for w in words:
        names = [*w.acts, *(flag for o in w.options for flag in o.flags)]
        plain = [o for o in w.options if not o.flags]
        names += [choice for o in plain for choice in o.choices]
        paths = any(o.is_path for o in plain)
        lines.append(f"    {shlex.quote(' '.join(w.verb))}) {_reply(tuple(names), paths)} ;;")
    lines += ["  esac", "}", _EPILOG[shell]]
    head = ["autoload -U +X bashcompinit && bashcompinit"] if shell == "zsh" else []
    return "\n".join([*head, *lines])


def _reply(words: tuple[str, ...], paths: bool) -> str:
    listed = f" -W {shlex.quote(' '.join(words))}" if words else ""
    files = " -f" if paths or not words else ""
    return f'COMPREPLY=($(compgen{files}{listed} -- "$cur"))'


# --- fish -------------------------------------------------------------------------------------


def _fish(words: list[Words], shell: str) -> str:
    lines = ["complete -c megamoe -f"]
    for w in words:
        seen = [f"__fish_seen_subcommand_from {name}" for name in w.verb]
        if w.acts:
            seen.append(f"not __fish_seen_subcommand_from {' '.join(w.acts)}")
        when = f" -n {shlex.quote('; and '.join(seen))}" if seen else ""
        for name, text in w.acts.items():
            lines.append(f"complete -c megamoe{when} -a {name} -d {shlex.quote(text)}")
        for o in w.options:
            line = f"complete -c megamoe{when}"
            for flag in o.flags:
                line += f" -{'l' if flag.startswith('--') else 's'} {flag.lstrip('-')}"
            line += " -r" if o.flags and o.takes else ""
            line += " -F" if o.is_path or (o.flags and o.takes and not o.choices) else ""
            line += f" -a {shlex.quote(' '.join(o.choices))}" if o.choices else ""
            lines.append(line + (f" -d {shlex.quote(o.help)}" if o.help else ""))
    return "\n".join(lines)
