"""A life in a few lines for the terminal: the cause first, then the worst element."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console

from megamoe.explain.show import allowance, bits
from megamoe.explain.words import HAS_THEM, alternatives, causes, is_named
from megamoe.judge import TO_CATCH
from megamoe.printable import quantity

Plain = dict[str, Any]
_MOST: Final = 3
"""Deviations and rules that are named, where no more fit."""


def brief(description: Plain, console: Console) -> None:
    """Print the few lines of :func:`megamoe.explain.explain` that name a cause, or the value."""
    lines = _value(description) if description.get("actual") is None else _departure(description)
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _value(life: Plain) -> list[str]:
    y = life["y"]
    golden = [f"golden: {life['golden']}"] if life.get("golden") else []
    return [
        f"{life['case']}: y at token {life['token']} channel {life['channel']}, "
        f"accumulator class {life['accumulator']} ({life['accumulator_from']})",
        f"y = {bits(y)}, {allowance(y)}",
        *golden,
    ]


def _departure(description: Plain) -> list[str]:
    actual, token = description["actual"], description["token"]
    at, worst = actual["parts_at"], actual["worst"]
    if at is None:
        return [f"{description['case']}: every stage of token {token} is inside (y at channels "
                f"{_channels(description)})"]  # fmt: skip
    is_told = all(is_named(step) for step in actual["explanations"][:1])
    lines = [f"{description['case']}: the first wrong stage is {at['stage']} ({at['where']})"]
    if description.get("right_under_class"):
        right = " or ".join(description["right_under_class"])
        lines.append(f"the claim may be wrong: this output is right under {right}; "
                     f"{description['accumulator']} is claimed")  # fmt: skip
    original = description.get("original")
    if original is None:
        lines += causes(description)
    else:
        whole = f"{original['read_from']} of {original['case']}"
        lines.append(f"read from {whole}, which was reduced to this file:")
        lines += [*original["shown"], *_alone(description)]
    lines += _of_choice(description)
    if worst is not None:
        lines.append(worst["line"])
        if worst.get("means") and not is_told:
            lines.append(f"  {worst['means']}")
    wrong = [
        f"{s['stage']} {s['outside']} of {s['of']}"
        + (f" at channels {_channels(description)}" if s["stage"] == "y" else "")
        for s in actual["stages"] if s["outside"]
    ]  # fmt: skip
    rest = actual.get("y_elsewhere")
    if rest and any(s["stage"] == "y" and s["outside"] for s in actual["stages"]):
        wrong[-1] += f" and {rest['outside']} of {rest['of']} at its other channels"
    lines.append(f"outside at token {token}: {', '.join(wrong)}")
    if description.get("batch", {}).get("tiles"):
        lines.append(f"  of all tokens: {description['batch']['tiles']}")
    lines += [f"  all of {s['stage']} in {s['channels']}"
              for s in actual["stages"] if s.get("channels")]  # fmt: skip
    if description.get("breaks") and (not is_told or description.get("right_under_class")):
        lines.append(f"{TO_CATCH}: {description['breaks']}")
    if description["accumulator_from"].startswith("assumed"):
        lines.append(
            f"accumulator class {description['accumulator']}: {description['accumulator_from']}"
        )
    return lines


def _of_choice(description: Plain) -> list[str]:
    """A chosen element of ``y`` that is right, or a chosen stage that is right at this token."""
    choice, actual = description.get("choice"), description["actual"]
    if not choice:
        return []
    if choice["stage"] in (None, "y") and choice["has_channel"] and not actual["outside"]:
        y = next(s for s in actual["stages"] if s["stage"] == "y")
        condition = ", given the codes that were shown" if actual["given_the_codes_shown"] else ""
        element = f"y at token {description['token']} channel {description['channel']}"
        return [
            f"{element}: right{condition}; "
            f"channels {_channels(description)} of this token: {y['outside']} of {y['of']} outside"
        ]
    stage = next((s for s in actual["stages"] if s["stage"] == choice["stage"]), None)
    if stage is not None and not stage["outside"]:
        at = f" at channels {_channels(description)}" if stage["stage"] == "y" else ""
        return [f"{stage['stage']} of token {description['token']}: right, 0 of {stage['of']} "
                f"outside{at}"]  # fmt: skip
    return []


def _alone(description: Plain) -> list[str]:
    """Why the cause of a reduced file is that of the whole."""
    steps = description["actual"]["explanations"]
    fit = [way for step in steps for way in alternatives(step["exact"])]
    rules = description.get("batch", {"rules": []})["rules"]
    if not fit and not rules:
        return ["this file alone has too few values to tell the cause"]
    start = "this file alone has too few values to tell the cause: "
    names = fit + rules
    if len(names) <= _MOST:
        return [f"{start}what fits is", *(f"  {name}" for name in names)]
    several = [quantity(len(of), noun) for of, noun in ((fit, "deviation"), (rules, "rule")) if of]
    return [f"{start}{' and '.join(several)} fit ({HAS_THEM})"]


def _channels(description: Plain) -> str:
    """The channels whose ``y`` is compared: those of the tile, as ``0 to 127``."""
    y = next(s for s in description["actual"]["stages"] if s["stage"] == "y")
    first = description["channel"] // y["of"] * y["of"]
    return f"{first} to {first + y['of'] - 1}"
