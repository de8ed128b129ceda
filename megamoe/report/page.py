"""The report as one HTML file that needs nothing else: no network, no script to be read at all.

The page's content security policy lets in its own style and script, by digest, and pictures that
stand in the page. What a result says is text everywhere, never markup.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import jinja2
from markupsafe import Markup

import megamoe
from megamoe.judge import TO_CATCH
from megamoe.printable import quantity
from megamoe.report import compared, covered, draw, read, views
from megamoe.report.read import View

LIMIT: Final = 2 << 20
"""Bytes that no report exceeds."""
_FAILURES: Final = 1_400_000
_TABLE: Final = 260_000
"""Bytes for failures drawn in full, and for each list of what comes in a line; 0.2 MB is left."""
OPEN: Final = 12
"""Failures that are unfolded when the page opens."""
PAPER: Final = 3
"""Failures with pictures on paper; later ones are a line there."""

_T = TypeVar("_T")

_TEMPLATES: Final = Path(__file__).parent / "templates"


def page(kind: str, result: read.Result) -> bytes:
    """The whole file of a result of this kind, UTF-8, at most :data:`LIMIT` bytes."""
    env = environment()
    view = {
        "run": views.view, "ab": compared.ab, "bisect": compared.bisect, "coverage": covered.view,
    }[kind](result)  # fmt: skip
    parts = {
        "run": _run_parts, "ab": _ab_parts, "bisect": _bisect_parts, "coverage": _coverage_parts,
    }[kind](env, view)  # fmt: skip
    html = env.get_template(f"{kind}.html").render(**view, **parts, **frame(), legend=draw.legend())
    return html.encode("utf-8")


def environment() -> jinja2.Environment:
    """The templates of this room; every text is escaped, and an unknown name is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    env.filters["seconds"] = lambda s: "" if s is None else f"{s:.2f} s" if s < 10 else f"{s:.0f} s"
    env.filters["quantity"] = quantity
    env.globals.update(png=draw.png, histogram=draw.histogram, scale=draw.SCALE, to_catch=TO_CATCH)
    return env


def frame() -> dict[str, Any]:
    """What ``base.html`` needs on each page: style, script, their digests, and the version."""
    style, script = ((_TEMPLATES / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return {
        "version": megamoe.__version__, "style": Markup(style), "script": Markup(script),
        "style_digest": _digest(style), "script_digest": _digest(script),
    }  # fmt: skip


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _run_parts(env: jinja2.Environment, view: View) -> dict[str, Any]:
    """Failures in full while there is room, then a line each, then a count; and the case table."""
    macros: Any = env.get_template("parts.html").module
    failures = view["failures"]
    items = [(f, i < OPEN, i >= PAPER) for i, f in enumerate(failures)]
    full, rest = fit(items, lambda one: macros.failure(*one), _FAILURES)
    brief, excess = fit(failures[len(failures) - rest :], macros.brief, _TABLE)
    anchors = {f["anchor"] for f in failures[: len(failures) - excess]}
    lost_cases = sum(1 + len(f["same"]) for f in failures[len(failures) - excess :])
    table, remainder = fit(view["cases"], lambda c: macros.row(c, anchors), _TABLE)
    kinds = view["grid"]["kinds"]
    shapes = view["grid"]["rows"]
    rows, hidden = fit(shapes, lambda r: macros.shape(r, anchors, kinds), _TABLE // 2)
    return {
        "full": full, "brief": brief, "lost": lost_cases, "paper": PAPER,
        "brief_count": rest - excess, "table": table, "unlisted": remainder,
        "shapes": rows, "hidden_shapes": hidden,
    }  # fmt: skip


def _ab_parts(env: jinja2.Environment, view: View) -> dict[str, Any]:
    macros: Any = env.get_template("parts.html").module
    table, remainder = fit(view["cases"], macros.compared, _FAILURES)
    return {"table": table, "unlisted": remainder}


def _bisect_parts(env: jinja2.Environment, view: View) -> dict[str, Any]:
    macros: Any = env.get_template("parts.html").module
    steps = list(enumerate(view["steps"], 1))
    table, remainder = fit(steps, lambda s: macros.step(*s), _FAILURES // 4)
    rows, rest = fit(view["moved"], macros.compared, _FAILURES // 2)
    return {
        "table": table, "unlisted": remainder, "moved_table": rows, "moved_left": rest,
    }  # fmt: skip


def _coverage_parts(env: jinja2.Environment, view: View) -> dict[str, Any]:
    macros: Any = env.get_template("parts.html").module
    rows, remainder = fit(view["dimensions"], macros.dimension_row, _TABLE)
    classes, rest = fit(view["dimensions"], macros.dimension, _FAILURES)
    return {"rows": rows, "unlisted": remainder, "classes": classes, "folded": rest}


def fit(items: Sequence[_T], draw_one: Callable[[_T], Markup], budget: int) -> tuple[Markup, int]:
    """As many items, from the first on, as ``budget`` bytes hold; and how many are left over."""
    pieces: list[Markup] = []
    for item in items:
        piece = draw_one(item)
        budget -= len(piece.encode("utf-8"))
        if budget < 0:
            break
        pieces.append(piece)
    return Markup("").join(pieces), len(items) - len(pieces)
