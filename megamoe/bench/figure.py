"""The plot: for each share, time by tokens above its floor, and the roofline."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from megamoe.bench.floor import FLOOR_BANDWIDTH, FLOOR_FLOPS, operations, weight_bytes
from megamoe.bench.rows import Row, share_of
from megamoe.golden import write_atomically

STYLES: Final = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"),
    ("#56B4E9", "P"),
)  # fmt: skip
"""Colours that colour-blind readers tell apart (Okabe and Ito's), each with a marker of its own."""


def check_drawable() -> None:
    """``ValueError`` where :func:`plot` could not draw; before a long run rather than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib; install it, or leave --plot out") from None


def plot(rows: Sequence[Row], path: Path) -> None:
    """A line of two panels for each share, as SVG; needs matplotlib."""
    check_drawable()
    from matplotlib import rc_context

    mine = [r for r in rows if not r.is_stage and r.best]
    if not mine:
        raise ValueError("nothing to plot: no row has a time")
    svg = io.BytesIO()
    with rc_context({"font.size": 9, "svg.hashsalt": "megamoe"}):
        draw(mine).savefig(svg, format="svg", metadata={"Date": None})
    write_atomically(path, svg.getvalue())


def draw(rows: Sequence[Row]) -> Any:
    """The figure of ``rows``, all of which have a time."""
    from matplotlib.figure import Figure

    shares = list(dict.fromkeys(r.share for r in rows))
    scopes = {r.what: r.scope for r in rows}
    styles = {
        what: {
            "color": STYLES[n % len(STYLES)][0], "marker": STYLES[n % len(STYLES)][1],
            "label": f"{what}: {scope}", "markersize": 5, "linewidth": 1.2,
            "zorder": 4 - n / 10,
        }
        for n, (what, scope) in enumerate(scopes.items())
    }  # fmt: skip
    figure = Figure(figsize=(10, 4 * len(shares) + 0.7), layout="constrained")
    for panels, share in zip(figure.subplots(len(shares), 2, squeeze=False), shares, strict=True):
        of_share = sorted((r for r in rows if r.share == share), key=lambda r: r.tokens)
        _time(panels[0], of_share, styles)
        _roofline(panels[1], of_share, styles)
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    return figure


def _time(axes: Any, rows: Sequence[Row], styles: dict[str, Any]) -> None:
    for what, style in styles.items():
        points = [(r.tokens, r.best) for r in rows if r.what == what]
        axes.plot(*_columns(points), **style)
    least = [(r.tokens, r.floor) for r in rows]
    axes.plot(*_columns(least), "k--", linewidth=1.2, label="floor")
    axes.set_xscale("log", base=2)
    tokens = sorted({r.tokens for r in rows})
    axes.set_xticks(tokens, [str(count) for count in tokens])
    axes.set(yscale="log", xlabel="tokens T", ylabel="microseconds", title=f"{rows[0].share}: time")
    axes.grid(alpha=0.3)


def _roofline(axes: Any, rows: Sequence[Row], styles: dict[str, Any]) -> None:
    """Peers stand above the same place as ours: the work is the same, whatever bytes they read."""
    share = share_of(rows[0].share)

    def intensity(row: Row) -> float:
        return operations(share, row.tokens) / weight_bytes(share, row.experts)

    for what, style in styles.items():
        points = [(intensity(r), r.tflops) for r in rows if r.what == what]
        axes.plot(*_columns(points), **style)
    places = {r.tokens: intensity(r) for r in rows}
    ridge = FLOOR_FLOPS / FLOOR_BANDWIDTH
    roof = [min(places.values()) / 1.5, ridge, max(*places.values(), ridge) * 1.5]
    heights = [min(FLOOR_BANDWIDTH * x, FLOOR_FLOPS) / 1e12 for x in roof]
    axes.plot(roof, heights, "k-", linewidth=1.2, label="roof: one H100, measured")
    axes.annotate(
        f"{FLOOR_FLOPS / 1e12:.0f} TFLOP/s", (roof[2], heights[2]), xytext=(0, 3),
        textcoords="offset points", ha="right", va="bottom",
    )  # fmt: skip
    axes.set(
        xscale="log", yscale="log", ylim=(None, 2.5 * heights[2]), ylabel="TFLOP/s",
        xlabel="operations per byte of FP4 weights touched", title=f"{share.name}: roofline",
    )  # fmt: skip
    _slope_text(axes, math.sqrt(roof[0] * roof[1]))
    _tokens_above(axes, places)
    axes.grid(alpha=0.3)


def _slope_text(axes: Any, x: float) -> None:
    """The bandwidth's name along its line."""
    axes.annotate(
        f"{FLOOR_BANDWIDTH / 1e12:.2f} TB/s", (x, FLOOR_BANDWIDTH * x / 1e12), xytext=(-2, 4),
        textcoords="offset points", rotation=math.degrees(math.atan(1)), rotation_mode="anchor",
        transform_rotates_text=True, ha="center", va="bottom",
    )  # fmt: skip


def _tokens_above(axes: Any, places: dict[int, float]) -> None:
    """T at its place along the top; those too near to one another share a tick."""
    near: list[tuple[float, list[int]]] = []
    for count, place in sorted(places.items(), key=lambda pair: pair[1]):
        if near and place / near[-1][0] < 1.35:
            near[-1][1].append(count)
        else:
            near.append((place, [count]))
    top = axes.secondary_xaxis("top")
    texts = [f"{c[0]}" if len(c) == 1 else f"{c[0]}-{c[-1]}" for _, c in near]
    top.set_xticks([place for place, _ in near], texts, fontsize=7)
    top.minorticks_off()
    axes.annotate(
        "T =", (0, 1), xytext=(0, 4), xycoords="axes fraction", textcoords="offset points",
        fontsize=7,
    )  # fmt: skip


def _columns(points: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [x for x, _ in points], [y for _, y in points]
