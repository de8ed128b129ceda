"""A static site of published kernels: a page a kernel, a page a case, a badge a contract.

It needs no server and no network; each page has the style and the policy of the report
(:mod:`megamoe.report.page`). What a result file says is text everywhere, never markup.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from megamoe.files import write_atomically
from megamoe.kernels import results
from megamoe.kernels.registry import Kernel, kernels
from megamoe.kernels.results import Result
from megamoe.report.page import environment, frame
from megamoe.report.views import SIGN

_FILL: Final = {"green": "#1b6e3c", "red": "#b3261e", "grey": "#5a6270"}
"""White text on each has a contrast of more than 4.5 : 1."""
_GLYPH: Final = 6.6
"""Pixels of one letter of a badge, at 11 pixels in height."""


def write(judgements: Sequence[Result], folder: Path) -> list[Path]:
    """Write the site of these results into ``folder``; returns the files, the index first.

    ``ValueError`` where ``folder`` is a file. Other files in the folder stay as they are.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder")
    pages = site(judgements)
    for name, content in pages.items():
        write_atomically(folder / name, content)
    return [folder / name for name in pages]


def site(judgements: Sequence[Result]) -> dict[str, bytes]:
    """File name to content: ``index.html`` first, then kernels, cases and badges."""
    env, common = environment(), frame()

    def page(template: str, colour: str, **context: Any) -> bytes:
        html = env.get_template(template).render(**common, colour=colour, **context)
        return html.encode("utf-8")

    rows = [_row(one, kind) for one in judgements for kind in one.kinds]
    names = {one.kernel.name for one in judgements}
    colours = [row["verdict"] for row in rows]
    colour = "red" if "red" in colours else "green" if "green" in colours else "grey"
    verdict = f"{len(names)} of {len(kernels())} published kernels judged"
    out = {
        "index.html": page("site_index.html", colour, verdict=verdict, rows=rows,
                           missing=[k for k in kernels() if k not in names])
    }  # fmt: skip
    for one in kernels().values():
        own = [result for result in judgements if result.kernel.name == one.name]
        if own:
            out[f"kernel-{one.name}.html"] = page("site_kernel.html", **_kernel(one, own))
            for contract in sorted({result.contract for result in own}):
                out[badge_file(one.name, contract)] = badge(one.name, contract, own)
    for case in sorted({case["id"] for one in judgements for case in one.cases}):
        out[case_file(case)] = page("site_case.html", **_case(case, judgements))
    return out


def badge(kernel: str, contract: str, own: Sequence[Result]) -> bytes:
    """An SVG: the kernel, the contract, and the counts over all results of the two."""
    counts = _sum([one for one in own if one.contract == contract])
    left, right = f"{kernel} · {contract}", results.summary(counts)
    widths = [round(len(text) * _GLYPH) + 12 for text in (left, right)]
    svg = environment().get_template("site_badge.svg").render(
        left=left, right=right, first=widths[0], second=widths[1],
        fill=_FILL[results.verdict(counts)],
    )  # fmt: skip
    return svg.encode("utf-8")


def badge_file(kernel: str, contract: str) -> str:
    """The file name of a badge."""
    return f"badge-{kernel}-{_name(contract)}.svg"


def case_file(case: str) -> str:
    """The file name of a case's page."""
    return f"case-{_name(case)}.html"


def _name(text: str) -> str:
    """``text`` as a part of a file name; a digest tells texts apart that would look the same."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", text.replace("/", "--"))[:120]
    if plain == text.replace("/", "--") and "--" not in text:
        return plain
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _row(one: Result, kind: str) -> dict[str, Any]:
    part = one.of_kind(kind)
    return {
        "kernel": one.kernel.name, "contract": one.contract, "kind": kind,
        "verdict": results.verdict(part.counts), "counts": results.summary(part.counts),
        "version": results.judged_version(one), "machine": one.machine, "file": one.file,
    }  # fmt: skip


def _kernel(one: Kernel, own: Sequence[Result]) -> dict[str, Any]:
    counts = _sum(own)
    return {
        "verdict": f"{one.name}: {results.summary(counts)}", "colour": results.verdict(counts),
        "kernel": one, "own": [{**_facts(result), "cases": _cases(result)} for result in own],
        "badges": sorted({badge_file(one.name, result.contract) for result in own}),
    }  # fmt: skip


def _facts(one: Result) -> dict[str, Any]:
    return {
        "file": one.file, "contract": one.contract, "command": one.command,
        "machine": one.machine, "device": one.device, "versions": one.versions,
        "counts": results.summary(one.counts), "verdict": results.verdict(one.counts),
    }  # fmt: skip


def _cases(one: Result) -> list[dict[str, str]]:
    """Those that did not pass first; each with a sign, so that colour is never alone."""
    order = sorted(one.cases, key=lambda case: (case["status"] == "pass", case["id"]))
    return [{**case, "sign": _sign(case["status"]), "page": case_file(case["id"])}
            for case in order]  # fmt: skip


def _case(case: str, judgements: Sequence[Result]) -> dict[str, Any]:
    rows = [
        {**entry, **_facts(one), "kernel": one.kernel.name, "sign": _sign(entry["status"])}
        for one in judgements for entry in one.cases if entry["id"] == case
    ]  # fmt: skip
    counts = dict.fromkeys(judgements[0].counts, 0)
    for row in rows:
        counts[row["status"]] += 1
    return {
        "verdict": f"{case}: {results.summary(counts)}", "colour": results.verdict(counts),
        "case": case, "rows": rows,
    }  # fmt: skip


def _sum(own: Sequence[Result]) -> dict[str, int]:
    return {status: sum(one.counts[status] for one in own) for status in own[0].counts}


def _sign(status: str) -> str:
    return SIGN.get(status, "–")
