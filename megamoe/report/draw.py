"""Pictures without a library: a map as a small PNG, histogram and walk as SVG.

SVG takes its colours from the page's style by class, so that light, dark and print look right. The
map's one hue with rising opacity does the same for a PNG, which is ten times smaller.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from markupsafe import Markup, escape

from megamoe.printable import quantity
from megamoe.report import read, words

HUE: Final = (214, 48, 44)
NAN_HUE: Final = (124, 77, 255)
STEPS: Final = (("1", 95), ("2–3", 130), ("4–7", 160), ("8–15", 190), ("16–63", 222), ("≥ 64", 255))
"""ULPs of a shade and of a bar, and the shade's opacity of 255."""
SCALE: Final = "bars are logarithmic: each doubling of a count is one step"
"""What is said where a bar is drawn, on the page and in the terminal."""
_LEVELS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"
_SIGN, _NAN = 7, 8
"""Palette entries; 0 is clear, 1 to 6 are :data:`STEPS`."""


def step_of(length: int) -> int:
    """Index into :data:`STEPS` of ULPs of this bit length (1 is one ULP, 2 is two and three)."""
    return max(0, length - 1 if length <= 4 else 4 if length <= 6 else 5)


# --- the map ----------------------------------------------------------------------------------


def level_rows(cells: Sequence[Any]) -> list[list[int]]:
    """Palette entries of a detail's map (:mod:`megamoe.judge.detail`); rows of one length."""
    lines = [line for line in cells if isinstance(line, str)]
    width = max(map(len, lines), default=0)
    return [[_ENTRIES.get(c, 0) for c in line.ljust(width, ".")] for line in lines]


def _entry(length: int) -> int:
    if length in (0, 35):
        return _NAN if length else _SIGN
    return 1 + step_of(length)


_ENTRIES: Final = {c: _entry(length) for length, c in enumerate(_LEVELS)}


def share_rows(grid: Sequence[Any], rows: int, tiles: int, most_rows: int = 48) -> list[list[int]]:
    """The same from a finding's grid of counts, for a result that has no details."""
    rows, tiles = min(rows, 1 << 20), min(tiles, 1 << 10)
    if rows < 1 or tiles < 1:
        return []
    down = -(-rows // most_rows)
    cells = [[0] * tiles for _ in range(-(-rows // down))]
    for entry in grid:
        whole = isinstance(entry, list) and len(entry) == 3 and all(type(v) is int for v in entry)
        if whole and 0 <= entry[0] < rows and 0 <= entry[1] < tiles:
            cells[entry[0] // down][entry[1]] += max(0, entry[2])
    most = max(1, max(max(line) for line in cells))
    return [[0 if not c else 1 + 5 * c // most for c in line] for line in cells]


def png(rows: Sequence[Sequence[int]]) -> str:
    """A ``data:`` address of an indexed PNG, one pixel a cell, four bits a pixel."""
    palette = [(0, 0, 0, 0), *((*HUE, alpha) for _, alpha in STEPS), (*HUE, 60), (*NAN_HUE, 255)]
    raw = bytearray()
    for row in rows:
        padded = [*row, 0]
        raw.append(0)
        raw += bytes(padded[i] << 4 | padded[i + 1] for i in range(0, len(row), 2))
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 4, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", b"".join(bytes(c[:3]) for c in palette)),
        (b"tRNS", bytes(c[3] for c in palette)),
        (b"IDAT", zlib.compress(bytes(raw), 9)),
        (b"IEND", b""),
    )
    out = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    return "data:image/png;base64," + base64.b64encode(out).decode()


def legend() -> Markup:
    """The map's shades, drawn once a page; each is a piece of text, so that they wrap."""
    shades = [(label, HUE, alpha) for label, alpha in STEPS]
    shades += [("NaN on one side", NAN_HUE, 255), ("sign of zero", HUE, 60)]
    return Markup("").join(
        Markup(
            '<span><svg viewBox="0 0 14 12" width="14" height="12" aria-hidden="true"><rect '
            'width="14" height="12" fill="rgb{}" fill-opacity="{:.2f}"/></svg> {}</span>'
        ).format(hue, alpha / 255, label)
        for label, hue, alpha in shades
    )


# --- the histogram ----------------------------------------------------------------------------


def bars(detail: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(class, label, elements) from far below the envelope to far above, then NaN and sign."""
    out = []
    for side in ("below", "above"):
        sums = [0] * len(STEPS)
        for length, count in read.tally(detail, side):
            sums[step_of(int(length) if length.isdecimal() else 1)] += count
        part = [("out", label, n) for (label, _), n in zip(STEPS, sums, strict=True)]
        while part and not part[-1][2]:
            part.pop()
        out += part if side == "above" else part[::-1]
        if side == "below":
            out.append(("in", "inside", read.count(detail, "inside")))
    for key, label in (("zero", "±0"), ("nan", "NaN")):
        if read.count(detail, key):
            out.append((key, label, read.count(detail, key)))
    return out


def histogram(detail: Mapping[str, Any]) -> Markup:
    """Elements by distance from the envelope, in ULPs; see :data:`SCALE`."""
    bins = bars(detail)
    top = max(1, *(n.bit_length() for _, _, n in bins))
    wide, high = 46, 64
    out = []
    for i, (kind, label, n) in enumerate(bins):
        tall = max(2, round(high * n.bit_length() / top)) if n else 0
        x, y = i * wide, 14 + high - tall
        if n:
            out.append(f'<path class="{kind}" d="M{x + 5} {y}h{wide - 10}v{tall}h-{wide - 10}z"/>')
            out.append(f'<text x="{x + wide // 2}" y="{y - 3}">{short(n)}</text>')
        out.append(f'<text class="k" x="{x + wide // 2}" y="{high + 26}">{label}</text>')
    middle = next(i for i, bar in enumerate(bins) if bar[0] == "in")
    text = ", ".join(f"{label} {n}" for _, label, n in bins if n)
    width, base = max(len(bins), middle + 3) * wide, high + 40
    ends = f'<text class="k s" x="2" y="{base}">ULP below</text>' if middle else ""
    if len(bins) > middle + 1 and bins[middle + 1][0] == "out":
        ends += f'<text class="k s" x="{(middle + 1) * wide + 5}" y="{base}">ULP above</text>'
    return Markup(
        f'<svg class="hist{" wide" if len(bins) > 8 else ""}" viewBox="0 0 {width} {base + 4}"'
        f' width="{width}" height="{base + 4}"'
        f' role="img" aria-label="Elements by ULPs from the envelope: {text}">'
        f'<path class="axis" d="M0 {14 + high}.5h{width}"/>{"".join(out)}{ends}</svg>'
    )  # fmt: skip


def short(n: int) -> str:
    """``1234567`` as ``1.2M``."""
    for limit, unit in ((10**9, "G"), (10**6, "M"), (10**4, "k")):
        if n >= limit:
            return f"{n / (limit if unit != 'k' else 1000):.3g}{unit}"
    return str(n)


# --- the walk ---------------------------------------------------------------------------------

_MARKS: Final = {
    "good": '<circle cx="{x}" cy="{y}" r="6"/>',
    "bad": '<path d="M{x} {y}m-6-6h12v12h-12z"/>',
    "skip": '<path d="M{x} {y}m0-7l7 7l-7 7l-7-7z"/>',
    "flaky": '<path d="M{x} {y}m0-7l7 13h-14z"/>',
}


def order(steps: Sequence[Mapping[str, Any]]) -> tuple[list[float], bool]:
    """Place of each step in history, 0 to 1, and whether the result itself says so.

    A result whose steps have no ``position`` still tells most: a search narrows from both ends, so
    each step lies between the nearest good and the nearest bad of the steps before it.
    """
    for key in ("position", "index"):
        places = [read.number(step, key) for step in steps]
        numbers = [g for g in places if g is not None]
        if steps and len(numbers) == len(steps):
            low, span = min(numbers), max(numbers) - min(numbers)
            return [(g - low) / span if span else 0.5 for g in numbers], True
    line: list[int] = []
    good, bad = -1, 0  # places in the line of the nearest ones
    for i, step in enumerate(steps):
        verdict = read.text(step, "verdict")
        at = good + 1 if verdict == "good" else bad if verdict == "bad" else (good + 1 + bad) // 2
        line.insert(at, i)
        good = at if verdict == "good" else good
        bad = at if verdict == "bad" else bad + 1
    span = max(1, len(line) - 1)
    return [line.index(i) / span for i in range(len(steps))], False


def walk(steps: Sequence[Mapping[str, Any]]) -> Markup:
    """The search as a picture: history from left to right, one step a line, what is left shaded."""
    if not steps:
        return Markup("")
    places, _ = order(steps)
    left, wide, line = 14, 380, 26
    xs = [left + round(place * wide) for place in places]
    low, high = left - 8, left + wide + 8
    out = []
    for i, (step, x) in enumerate(zip(steps, xs, strict=True)):
        y = 30 + i * line
        verdict = read.text(step, "verdict", "unknown")
        if low <= high:
            out.append(f'<path class="left" d="M{low} {y - 9}h{high - low}v18h-{high - low}z"/>')
        if i:
            out.append(f'<path class="line" d="M{xs[i - 1]} {y - line}L{x} {y}"/>')
        if verdict == "good":
            low = max(low, x)
        elif verdict == "bad":
            high = min(high, x)
    for i, (step, x) in enumerate(zip(steps, xs, strict=True)):
        y = 30 + i * line
        verdict = read.text(step, "verdict", "unknown")
        mark = _MARKS.get(verdict, _MARKS["skip"]).format(x=x, y=y)
        rev, subject = read.text(step, "rev")[:12], read.text(step, "subject")
        word = words.STATUS.get(verdict, verdict)
        caption = f"{i + 1}. {word} {rev} {subject if len(subject) < 45 else subject[:44] + '…'}"
        kind = verdict if verdict in _MARKS else "skip"
        out.append(f'<g class="{kind}">{mark}</g>')
        out.append(f'<text x="{left + wide + 24}" y="{y + 4}">{escape(caption)}</text>')
    height, width = 30 + len(steps) * line, left + wide + 470
    ends = f'<text class="k" x="{left - 8}" y="12">older</text>'
    ends += f'<text class="k e" x="{left + wide + 8}" y="12">newer</text>'
    return Markup(
        f'<svg class="walk" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="The search, {quantity(len(steps), "step")}; the table below says the same">'
        f"{ends}{''.join(out)}</svg>"
    )
