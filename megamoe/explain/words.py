"""Causes in lines for a person: the part of a batch that is wrong, and the deviations that fit."""

from __future__ import annotations

from typing import Any, Final

from megamoe.explain import overflow
from megamoe.printable import quantity

Plain = dict[str, Any]
_ALTERNATIVES: Final = 6
"""Deviations that are shown of those that explain the same values."""
_RULES: Final = 4
"""Rules for the batch that are shown."""
_WOULD: Final = 3
"""Deviations that are shown of those that only give zeros."""
HAS_THEM: Final = '`explain --json` has them, under "causes"'
"""Where a person finds what a line leaves out."""
_TOO_FEW: Final = 2
"""Decisions that several deviations give by chance."""
_TOO_FEW_OF_CHANNELS: Final = 7
"""The same where the channels were chosen too."""
_APART: Final = "which this data cannot tell apart"


def causes(description: Plain, label: str = "cause", *, every: bool = False) -> list[str]:
    """What is wrong in an output that :func:`megamoe.explain.explain` was given.

    A rule for the whole batch by which slots are lost is the cause; what one token shows of it
    comes after it. ``label`` stands for ``cause`` where another cause is named already. ``every``:
    also the causes and rules that are left out for a person.
    """
    batch = description.get("batch") or {"rules": []}
    lines, step_label = [], label
    if batch["rules"] and batch["is_lost"]:
        lines += _alternatives(label, batch["rules"], _RULES, every)
        each = "each explains" if len(batch["rules"]) > 1 else "explains"
        lines.append(f"  {each} exactly the {_wrong(batch)} outside")
        step_label = f"seen at token {description['token']} as"
    elif batch["rules"]:
        lines += _alternatives("where", batch["rules"], _RULES, every)
        lines.append(f"  {_exactly(batch)}")
    elif batch.get("wrong", 0) < batch.get("tokens", 0):
        no_rule = "; no known rule gives exactly these" if batch["wrong"] > 1 else ""
        lines.append(f"where: {_counts(batch)} outside{no_rule}")
    lines += [f"  {batch[note]}" for note in ("near", "before", "again") if batch.get(note)]
    for step in description["actual"]["explanations"]:
        lines += explanation(step, step_label, every)
    return lines


def explanation(step: Plain, label: str = "cause", every: bool = False) -> list[str]:
    """The explanation of the wrong values of one step between two stages."""
    lines = _explanation(step, label, every)
    for one in step.get("refuted_by", ()):
        lines += _refutation(one["case"], one["ways"])
    if not step["exact"] and not step["follows"]:
        lines += [f"  {line}" for line in overflow.lines(step["overflow"])]
    if step["not_tried"]:
        lines.append(
            f"  ({step['not_tried']} deviations of linear 1 were not tried on so large a layer: "
            "show l2_acts and l2_acts_sf for these)"
        )
    return lines


def _explanation(step: Plain, label: str, every: bool) -> list[str]:
    differing, exact, partial = step["differing"], step["exact"], step["partial"]
    verdict = f"none of {step['tried']} known deviations explains"
    wrong = f"{quantity(differing, 'wrong value')} of {step['of']} {step['compared']}"
    if partial:
        more = "" if partial[0]["contradicts"] else "; in part:"
        lines = [f"{label}: unknown; {verdict} all {wrong}{more}"]
        return lines + [f"  {_in_part(way, differing)}" for way in partial]
    if step["alone"]:
        return _alone(step, label)
    if not exact:
        return [] if step["follows"] else [f"{label}: unknown; {verdict} the {wrong}"]
    all_of = f"all {wrong}" if differing > 1 else f"the {wrong}"
    if step["follows"]:
        return [f"  explains {all_of} too"]
    ways = alternatives(exact, every)
    others = len(step["tried_on"])
    more = f", and of {quantity(others, 'more wrong token')} that " if others else ""
    more += ("was tried" if others == 1 else "were tried") if others else ""
    if not is_certain(step):
        is_wrong = "is" if step["decisions"] == 1 else "are"
        each = "each gives" if len(ways) > 1 else "gives"
        return [
            f"{label}: unknown; {step['evidence']} {is_wrong} wrong: too little to tell a cause",
            *_alternatives("may be", ways, _ALTERNATIVES, every),
            f"  {each} {all_of}{more}",
        ]
    each = "each explains" if len(ways) > 1 else "explains"
    lines = [*_alternatives(label, ways, _ALTERNATIVES, every), f"  {each} {all_of}{more}"]
    return lines + _hedge(step)


def _hedge(step: Plain) -> list[str]:
    """What makes a cause of ``y`` weak that holds in some slots only: they were chosen to fit."""
    exact = step["exact"]
    if step.get("step") != "y" or step.get("is_placed") or not all(way["where"] for way in exact):
        return []
    text = "  the slots were chosen so that it fits: weaker than a cause of all slots"
    repeats = [way["repeats"] for way in exact]
    if all(repeats):
        text += (
            f"; their scale bytes repeat every {quantity(max(repeats), 'group')}, so further "
            "orders of them give the same values"
        )
    return [text]


def _refutation(case: str, ways: list[Plain]) -> list[str]:
    """Deviations that a case refutes which passes."""
    them, more = "it" if len(ways) == 1 else "them", len(ways) - _ALTERNATIVES
    rest = (
        [f'    and {more} more (`explain --json` has them, under "refuted_by")'] if more > 0 else []
    )
    return [
        f"  left out, since {case} passes, and would be red with {them}:",
        *(f"    {_way(way)}" for way in ways[:_ALTERNATIVES]), *rest,
    ]  # fmt: skip


def is_clear(step: Plain) -> bool:
    """Whether one deviation explains the step, by enough values."""
    return len(step["exact"]) == 1 and is_certain(step)


def is_named(step: Plain) -> bool:
    """The same, where others may give the same zeros."""
    return len(apart(step["exact"])) == 1 and is_certain(step)


def is_certain(step: Plain) -> bool:
    """Whether enough is wrong to tell a cause: more than two decisions; more than seven of one that
    holds in some channels only."""
    is_choice = any(way.get("channels") for way in step["exact"])
    return bool(step["decisions"] > (_TOO_FEW_OF_CHANNELS if is_choice else _TOO_FEW))


def _alone(step: Plain, label: str) -> list[str]:
    """Deviations that fit one token by chance: other wrong tokens say that they are no cause."""
    lines = [f"{label}: unknown; none of {step['tried']} known deviations explains all "
             f"{quantity(1 + len(step['tried_on']), 'wrong token')} that were tried"]  # fmt: skip
    for way in step["alone"][:_ALTERNATIVES]:
        fits, fails = (_tokens(way[which]) for which in ("holds_on", "fails_on"))
        lines.append(f"  {_way(way)}: fits {fits}, but not {fails}")
    return lines


def read_from(description: Plain) -> str:
    """The tokens of which :func:`causes` speaks: "all 9 tokens", "tokens 3 and 5"."""
    batch = description.get("batch") or {"rules": []}
    if batch["rules"]:
        return f"all {batch['tokens']} tokens"
    others = [at for step in description["actual"]["explanations"] for at in step["tried_on"]]
    return _tokens(list({description["token"], *others}))


def _tokens(tokens: list[int]) -> str:
    """As "token 3", "tokens 3, 5 and 8"."""
    *first, last = map(str, sorted(tokens))
    return f"tokens {', '.join(first)} and {last}" if first else f"token {last}"


def _alternatives(label: str, ways: list[str], most: int, every: bool) -> list[str]:
    """One line where one thing fits, else a line for each."""
    if len(ways) == 1:
        return [f"{label}: {ways[0]}"]
    more = 0 if every else len(ways) - most
    rest = [f"  and {more} more ({HAS_THEM})"] if more > 0 else []
    rows = ways if every else ways[:most]
    return [f"{label}: one of these {len(ways)}, {_APART}:", *(f"  {w}" for w in rows), *rest]


def _wrong(batch: Plain) -> str:
    that = "that is" if batch["wrong"] == 1 else "that are"
    return f"{batch['wrong']} of {quantity(batch['tokens'], 'token')} {that}"


def _exactly(batch: Plain) -> str:
    if not batch.get("has_idle_rows"):
        return f"exactly the {_wrong(batch)} outside"
    has = "has" if len(batch["rules"]) == 1 else "each has"
    return (
        f"{has} the {_wrong(batch)} outside; in the others of these rows the cause changes nothing "
        "that was compared"
    )


def _counts(batch: Plain) -> str:
    """As "token 4 only: 1 of 31 tokens, 2 of 93 slots"."""
    text = f"{batch['which']}: {batch['wrong']} of {quantity(batch['tokens'], 'token')}"
    if batch["wrong_slots"]:
        text += f", {batch['wrong_slots']} of {quantity(batch['slots'], 'slot')}"
    return text


def alternatives(exact: list[Plain], every: bool = False) -> list[str]:
    """The deviations; those with the same codes, and those that give the same zeros, as one
    line."""
    groups: dict[Any, list[Plain]] = {}
    zeros: dict[str, list[Plain]] = {}
    for way in exact:
        zeros.setdefault(way.get("same_as", ""), []).append(way)
    for k, way in enumerate(apart(exact)):
        groups.setdefault(way.get("alike", ("alone", k)), []).append(way)
    out = []
    for ways in groups.values():
        if len(ways) == 1:
            others = zeros.get(ways[0]["what"], [])
            out.append(_way(ways[0]) + _as_would(ways[0], others, None if every else _WOULD))
            continue
        names = [way["what"].split(" ") for way in ways]
        same = 0
        while len({name[same] if same < len(name) else "" for name in names}) == 1:
            same += 1
        same -= names[0][same - 1] in ("by", "is", "to")  # a word that each one keeps
        rests = [" ".join(name[same:]) for name in names]
        what = " ".join([*names[0][:same], "; or ".join(rests)])
        whole = {**ways[0], "what": what, "formula": ""}
        out.append(f"{_way(whole)} (this data cannot tell these apart)")
    return out


def apart(exact: list[Plain]) -> list[Plain]:
    """The deviations without those that only give the same zeros as another one."""
    names = {way["what"] for way in exact}
    return [way for way in exact if way.get("same_as") not in names]


def _as_would(head: Plain, ways: list[Plain], most: int | None) -> str:
    """As " (as would be if the last 128 of K are lost)"."""
    if not ways:
        return ""
    phrases = [way["what"] if way["stage"] == head["stage"] else f"{way['what']} ({way['stage']})"
            for way in ways]  # fmt: skip
    few = phrases[:most]
    more = len(phrases) - len(few)
    rest = f"; or in {quantity(more, 'more way')}: {HAS_THEM}" if more > 0 else ""
    return f" (as would be if {'; if '.join(few)}{rest})"


def _way(way: Plain) -> str:
    where = "".join(f", {way[place]}" for place in ("where", "channels") if way.get(place))
    formula = f": {way['formula']}" if way.get("formula") else ""
    spares = ""
    if way.get("right_at"):
        first, last = way["right_at"]
        spares = f", but not at channels {first} to {last}, which are right"
    return f"{way['stage']}: {way['what']}{formula}{where}{spares}"


def _in_part(way: Plain, differing: int) -> str:
    """A deviation that gives some of the wrong values; what refutes it, if right values do."""
    text = f"{_way(way)}: explains {way['explains']} of {differing}"
    if not way["contradicts"]:
        return f"{text}; {way['unexplained']} left unexplained"
    values = "value that is right" if way["contradicts"] == 1 else "values that are right"
    return f"refuted: {text}, but would change {way['contradicts']} {values}"


__all__ = ["HAS_THEM", "alternatives", "apart", "causes", "explanation", "is_certain", "is_clear",
           "is_named", "read_from"]  # fmt: skip
