"""A life in a few lines for the terminal: the cause first, then the worst element."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console

from megamoe.explain.show import allowed, bits
from megamoe.explain.words import HAS_THEM, alternatives, causes, is_named
from megamoe.judge import TO_CATCH
from megamoe.printable import counted

Plain = dict[str, Any]
_NAMED: Final = 3
"""Deviations and rules that are named, where no more fit."""


def brief(said: Plain, console: Console) -> None:
    """Print the few lines of :func:`megamoe.explain.explain` that name a cause, or the value."""
    lines = _value(said) if said.get("actual") is None else _departure(said)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _value(said: Plain) -> list[str]:
    y = said["y"]
    golden = [f"golden: {said['golden']}"] if said.get("golden") else []
    return [
        f"{said['case']}: y at token {said['token']} channel {said['channel']}, "
        f"accumulator class {said['accumulator']} ({said['accumulator_from']})",
        f"y = {bits(y)}, {allowed(y)}",
        *golden,
    ]


def _departure(said: Plain) -> list[str]:
    actual, token = said["actual"], said["token"]
    at, worst = actual["parts_at"], actual["worst"]
    if at is None:
        return [f"{said['case']}: every stage of token {token} is inside (y at channels "
                f"{_channels(said)})"]  # fmt: skip
    is_told = all(is_named(step) for step in actual["explanations"][:1])
    lines = [f"{said['case']}: the first wrong stage is {at['stage']} ({at['where']})"]
    if said.get("right_under_class"):
        right = " or ".join(said["right_under_class"])
        lines.append(f"the claim may be wrong: this output is right under {right}; "
                     f"{said['accumulator']} is claimed")  # fmt: skip
    original = said.get("original")
    if original is None:
        lines += causes(said)
    else:
        whole = f"{original['read_from']} of {original['case']}"
        lines.append(f"read from {whole}, which was reduced to this file:")
        lines += [*original["shown"], *_alone(said)]
    if worst is not None:
        lines.append(worst["line"])
        if worst.get("means") and not is_told:
            lines.append(f"  {worst['means']}")
    wrong = [
        f"{s['stage']} {s['outside']} of {s['of']}"
        + (f" at channels {_channels(said)}" if s["stage"] == "y" else "")
        for s in actual["stages"] if s["outside"]
    ]  # fmt: skip
    lines.append(f"outside at token {token}: {', '.join(wrong)}")
    if said.get("batch", {}).get("tiles"):
        lines.append(f"  of all tokens: {said['batch']['tiles']}")
    lines += [f"  all of {s['stage']} in {s['channels']}"
              for s in actual["stages"] if s.get("channels")]  # fmt: skip
    if said.get("breaks") and (not is_told or said.get("right_under_class")):
        lines.append(f"{TO_CATCH}: {said['breaks']}")
    if said["accumulator_from"].startswith("assumed"):
        lines.append(f"accumulator class {said['accumulator']}: {said['accumulator_from']}")
    return lines


def _alone(said: Plain) -> list[str]:
    """Why the cause of a reduced file is that of the whole."""
    steps = said["actual"]["explanations"]
    fit = [way for step in steps for way in alternatives(step["exact"])]
    rules = said.get("batch", {"rules": []})["rules"]
    if not fit and not rules:
        return ["this file alone has too few values to tell the cause"]
    start = "this file alone has too few values to tell the cause: "
    names = fit + rules
    if len(names) <= _NAMED:
        return [f"{start}what fits is", *(f"  {name}" for name in names)]
    several = [counted(len(of), noun) for of, noun in ((fit, "deviation"), (rules, "rule")) if of]
    return [f"{start}{' and '.join(several)} fit ({HAS_THEM})"]


def _channels(said: Plain) -> str:
    """The channels whose ``y`` is compared: those of the tile, as ``0 to 127``."""
    y = next(s for s in said["actual"]["stages"] if s["stage"] == "y")
    first = said["channel"] // y["of"] * y["of"]
    return f"{first} to {first + y['of'] - 1}"
