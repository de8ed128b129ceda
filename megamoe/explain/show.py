"""A life for the terminal, in tables."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megamoe.spec.forms import BF16

Plain = dict[str, Any]


def show(description: Plain, console: Console) -> None:
    """Print every number of :func:`megamoe.explain.explain`, stage by stage."""
    y = description["y"]
    if description["masked_slots"]:
        console.print(f"slots without part: {description['masked_slots']}", highlight=False)
    if not description["slots"]:
        console.print("no slot takes part: y is zero", highlight=False)
        return
    _linear1(description, console)
    _slots(description, console)
    _linear2(description, console)
    _combine(description, console)
    _why(description["why"], y, console)
    if description.get("actual"):
        _actual(description["actual"], console)


def _heading(text: str, console: Console) -> None:
    console.print(f"\n[bold]{text}[/bold]", highlight=False)


def _linear1(description: Plain, console: Console) -> None:
    slot = description["followed"]
    top = slot["activation"]
    what = "the wrong value" if slot["is_wrong"] else "the largest contribution"
    if slot["of_byte"]:
        what = "which sets amax of the wrong scale byte's group"
    _heading(
        f"Linear 1 to the code: intermediate channel {top['i']} of slot {slot['slot']} "
        f"({_expert(slot)}), {what}",
        console,
    )
    table = _table("sum", "k", "hidden", "x code", "x scale", "weight", "w scale", "product")
    for name in ("gate", "up"):
        for p in top[name]["products"]:
            table.add_row(
                name, str(p["k"]), f"{_num(p['hidden_value'])} {p['hidden']}",
                f"{_num(p['x_value'])} {p['x']}", _scale(p["x_sf"]),
                f"{_num(p['weight'])} 0x{p['weight_code']:x}", _scale(p["weight_sf"]),
                _num(p["product"]),
            )  # fmt: skip
    console.print(table)
    lines = []
    for name in ("gate", "up"):
        s = top[name]
        blocks = ", ".join(f"block {b['group']}: {_num(b['sum'])}" for b in s["blocks"])
        lines += [
            (f"{name} blocks", f"{s['block_count']} of 32 products; largest {blocks}"),
            (f"{name} sum", _sum_line(s)),
            (f"{name} bf16", f"{bits(s['bf16'])}, {allowance(s['bf16'])}"),
        ]
    group = top["group"]
    clamp = "none" if description["clamp"] is None else _num(description["clamp"])
    form = "fast" if description["fast_math"] else "precise"
    scales = (description["alpha"], description["beta"])
    gated = "silu" if description["activation"] == "swiglu" else description["activation"]
    if scales != (1.0, 0.0):
        gated += f" of {scales[0]:g} and {scales[1]:g}"
    low, high = group["exponent_allowed"]
    lines += [
        (f"clamp {clamp}", f"gate {bits(top['gate_clamped'])}, up {bits(top['up_clamped'])}"),
        (f"{gated} ({form})", f"{_num(top['silu'])}, allowed {_ends(top['silu_allowed'])}"),
        ("a", f"{gated} x up {_num(top['up_value'])} x routing weight "
              f"{_num(slot['routing_weight'])} = {_num(top['a'])}, allowed "
              f"{_ends(top['a_interval'])}"),
        ("amax", f"{_num(group['amax'])} of channels {group['first']} to {group['first'] + 31}, "
                 f"set by {group['set_by']}; x fl32(1/448) = {_num(group['amax_over_448'])}"),
        ("exponent", f"{_scale(group['exponent'])}, allowed {low} to {high}"),
        ("code", f"{top['code']} = {_num(top['value'])}, allowed "
                 f"{' to '.join(top['codes_allowed'])}"),
    ]  # fmt: skip
    _pairs(lines, console)


def _expert(slot: Plain) -> str:
    """-1 is the fused shared expert, which has a slot after the last one."""
    return "shared expert" if slot["expert"] < 0 else f"expert {slot['expert']}"


def _sum_line(s: Plain) -> str:
    model = "" if s["model"] is None else f", modelled {_num(s['model'])}"
    return f"exact {_num(s['exact'])}{model}, allowed {_ends(s['interval'])}"


def _slots(description: Plain, console: Console) -> None:
    _heading("Every slot: its largest contribution, then linear 2", console)
    table = _table("slot", "expert", "weight", "i", "gate", "up", "a", "amax by", "exponent",
                   "code", "open codes", "linear 2 exact", "modelled", "row bf16",
                   "ULPs open")  # fmt: skip
    ulps = {part["slot"]: part["row_ulps"] for part in description["why"]["slots"]}
    for s in description["slots"]:
        top, two = s["largest"], s["linear2"]
        table.add_row(
            str(s["slot"]), _expert(s).removeprefix("expert "), _num(s["routing_weight"]),
            str(top["i"]),
            _num(top["gate_clamped"]["value"]), _num(top["up_clamped"]["value"]), _num(top["a"]),
            str(top["group"]["set_by"]), str(top["group"]["exponent"]), top["code"],
            str(s["undecided_codes"]), _num(two["exact"]),
            "" if two["model"] is None else _num(two["model"]), two["row"]["bits"],
            str(ulps[s["slot"]]),
        )  # fmt: skip
    console.print(table)


def _linear2(description: Plain, console: Console) -> None:
    _heading("Linear 2's largest contributions", console)
    table = _table("slot", "i", "code", "scale", "weight", "w scale", "product", "share of |sum|")
    for s in description["slots"]:
        for c in s["linear2"]["contributions"]:
            table.add_row(
                str(s["slot"]), str(c["i"]), f"{_num(c['value'])} {c['code']}", _scale(c["sf"]),
                f"{_num(c['weight'])} 0x{c['weight_code']:x}", _scale(c["weight_sf"]),
                _num(c["product"]), f"{c['share']:.1%}",
            )  # fmt: skip
    console.print(table)


def _combine(description: Plain, console: Console) -> None:
    rows = (
        ""
        if description["combine_dtype"] == "bf16"
        else f", rows as {description['combine_dtype']}"
    )
    _heading(f"Combine, in fp32 from zero{rows}", console)
    table = _table("slot", "row", "running sum")
    for step in description["combine"]:
        table.add_row(str(step["slot"]), _num(step["row"]), _num(step["sum"]))
    console.print(table)
    more = description["added_after"]
    addend = "" if more is None else f", plus {bits(more)} in bfloat16"
    console.print(f"y = bfloat16 of it{addend}: {bits(description['y'])}", highlight=False)


def _why(why: Plain, y: Plain, console: Console) -> None:
    _heading(f"The interval: {allowance(y)}, {why['ulps']} ULP wide", console)
    wide = [part for part in why["slots"] if part["width"]]
    if not wide:
        console.print("every sum is exact in this class: nothing is open", highlight=False)
        return
    table = _table("slot", "linear 2 open by", "of accumulation", "of codes", "open codes",
                   "open exponents", "row ULPs")  # fmt: skip
    for part in wide:
        table.add_row(
            str(part["slot"]), _num(part["width"]), _num(part["from_accumulation"]),
            _num(part["from_codes"]), str(part["undecided_codes"]), str(part["open_exponents"]),
            str(part["row_ulps"]),
        )  # fmt: skip
    console.print(table)
    for part in wide:
        for swing in part["largest_swings"][:1]:
            low, high = swing["codes"]
            console.print(
                f"slot {part['slot']}: code {swing['i']} ({low} to {high}) moves linear 2 by "
                f"{_num(swing['swing'])}: {swing['cause']}", highlight=False, soft_wrap=True,
            )  # fmt: skip


def _actual(actual: Plain, console: Console) -> None:
    low, high = actual["allowed"]
    condition = ", given the codes that were shown" if actual["given_the_codes_shown"] else ""
    verdict = "[red]outside[/red]" if actual["outside"] else "[green]inside[/green]"
    within = f"{low} to {high}"
    if BF16.text(int(low, 16)) == "nan":
        within = "NaN, and any NaN is right"
    _heading(f"The output: y is {actual['y']}, {verdict}: {within}{condition}", console)
    table = _table("stage", "outside", "of", "worst")
    for s in actual["stages"]:
        worst = "" if s["worst"] is None else s["worst"]["line"].partition(" at ")[2]
        table.add_row(s["stage"], str(s["outside"]), str(s["of"]), worst)
    console.print(table)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in names:
        table.add_column(name, justify="left" if name in ("sum", "stage", "worst") else "right")
    return table


def _pairs(lines: list[tuple[str, str]], console: Console) -> None:
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        console.print(f"  {name:<{width}}  {text}", highlight=False, soft_wrap=True)


def _num(value: float) -> str:
    return f"{value:.7g}"


def _ends(ends: list[float]) -> str:
    return _num(ends[0]) if ends[0] == ends[1] else f"{ends[0]:.9g} to {ends[1]:.9g}"


def bits(number: Plain) -> str:
    """A value and its bits."""
    return f"{_num(number['value'])} ({number['bits']})"


def allowance(number: Plain) -> str:
    """The bits that the class allows."""
    low, high = number["allowed"]
    return "one value allowed" if low == high else f"allowed {low} to {high}"


def _scale(byte: int) -> str:
    return f"2^{byte - 127} ({byte})"
