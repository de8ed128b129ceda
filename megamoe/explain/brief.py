"""A life in a few lines for the terminal: the cause first, then the worst element."""

from __future__ import annotations

from typing import Any, Final

from rich.console import Console

from megamoe.explain.show import allowed, bits, explanation
from megamoe.printable import counted

Plain = dict[str, Any]
AT_MOST: Final = 4
"""Rules for the batch that are shown."""


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
        f"accumulator class {said['accumulator']}",
        f"y = {bits(y)}, {allowed(y)}",
        *golden,
    ]


def _departure(said: Plain) -> list[str]:
    actual, token = said["actual"], said["token"]
    at, worst = actual["parts_at"], actual["worst"]
    if at is None:
        return [f"{said['case']}: every stage of token {token} is inside (y at channels "
                f"{_channels(said)})"]  # fmt: skip
    lines = [f"{said['case']}: the first wrong stage is {at['stage']} ({at['where']})"]
    for explained in actual["explanations"]:
        lines += explanation(explained)
    lines += _batch(said.get("batch"))
    if worst is not None:
        lines.append(worst["line"])
    wrong = [
        f"{s['stage']} {s['outside']} of {s['of']}"
        + (f" at channels {_channels(said)}" if s["stage"] == "y" else "")
        for s in actual["stages"] if s["outside"]
    ]  # fmt: skip
    return [*lines, f"outside at token {token}: {', '.join(wrong)}"]


def _batch(batch: Plain | None) -> list[str]:
    """Where in the batch the fault is."""
    if batch is None or not batch["rules"]:
        return []
    rules, is_lost = batch["rules"], batch["is_lost"]
    be = "is" if batch["wrong"] == 1 else "are"
    wrong = f"{batch['wrong']} of {counted(batch['tokens'], 'token')} {be} outside"
    if len(rules) == 1:
        return [f"in the batch: {rules[0]}" if is_lost else
                f"in the batch: {wrong}, exactly those of {rules[0]}"]  # fmt: skip
    return [f"in the batch, {wrong}; each of these fits, this data cannot tell them apart:",
            *(f"  {rule}" for rule in rules[:AT_MOST])]  # fmt: skip


def _channels(said: Plain) -> str:
    """The channels whose ``y`` is compared: those of the tile, as ``0 to 127``."""
    y = next(s for s in said["actual"]["stages"] if s["stage"] == "y")
    first = said["channel"] // y["of"] * y["of"]
    return f"{first} to {first + y['of'] - 1}"
