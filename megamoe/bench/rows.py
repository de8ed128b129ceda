"""The results of a run: rows, a table of them, and a JSON file that names their origin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
from rich.table import Table

from megamoe import environment
from megamoe.bench import timing
from megamoe.bench.floor import (
    FLOOR_BANDWIDTH,
    FLOOR_FLOPS,
    SHARES,
    Share,
    operations,
    stage_floor,
    weight_bytes,
)
from megamoe.golden import write_atomically
from megamoe.worker import serve
from megamoe.worker.session import checked_fingerprint

VERSIONS: Final = ("torch", "triton", "sgl-deep-gemm", "humming-kernels")
"""Distributions whose versions a file names, installed or not."""

LAUNCH: Final = 4.0
"""Microseconds of a launch that does nothing: a stage alone is not compared with a floor below."""
_FLOOR: Final = {"bytes_per_second": FLOOR_BANDWIDTH, "operations_per_second": FLOOR_FLOPS}


@dataclass(frozen=True)
class Row:
    """One measurement of one step, in microseconds.

    ``experts`` is the number of the share's experts in use. ``floor`` is that of the whole forward.
    ``events`` and ``graph`` are the device's time for eager launches and for a replay; ``host`` is
    the host's time for the launch.
    """

    share: str
    tokens: int
    what: str
    scope: str
    floor: float
    experts: int
    events: float | None = None
    graph: float | None = None
    tflops: float | None = None
    note: str = ""
    host: float | None = None

    @property
    def best(self) -> float | None:
        """The shorter of the graph's time and that of eager launches."""
        return min((t for t in (self.graph, self.events) if t is not None), default=None)

    @property
    def is_stage(self) -> bool:
        return self.scope.startswith("stage")

    @property
    def own_floor(self) -> float | None:
        """``floor``, or that of the stage alone; None for a stage without one."""
        if not self.is_stage:
            return self.floor
        stage = self.scope.removeprefix("stage ")
        return stage_floor(stage, share_of(self.share), self.tokens, self.experts)

    @property
    def ratio(self) -> float | None:
        """The best time in floors; None without one, and where a launch alone takes longer."""
        least = self.own_floor
        if self.best is None or least is None or least < LAUNCH:
            return None
        return self.best / least

    def line(self) -> str:
        """A line of progress: the step, and its time or the reason why there is none."""
        head = f"{self.share} T={self.tokens} {self.what}, {self.scope}: "
        if self.best is None:
            return f"{head}failed, {self.note}"
        times = "" if self.ratio is None else f", {self.ratio:.2f} x floor"
        return f"{head}{self.best:.1f} us{times}{f' ({self.note})' if self.note else ''}"


def share_of(name: str) -> Share:
    """The share that rows call ``name``."""
    for share in SHARES.values():
        if share.name == name:
            return share
    raise ValueError(f"{name!r} is none of the shares {[s.name for s in SHARES.values()]}")


def rate(row: Row) -> float | None:
    """TFLOP/s at the row's best time; None without one, and for a stage, which does only a part."""
    if row.is_stage or row.best is None:
        return None
    return operations(share_of(row.share), row.tokens) / row.best / 1e6


def table(rows: Sequence[Row]) -> Table:
    """Rows for a terminal; times in microseconds."""
    view = Table(
        "share", "T", "what", "timed", "floor", "host", "events", "graph", "x floor", "TFLOP/s",
        "note",
    )  # fmt: skip
    for r in rows:
        view.add_row(
            r.share, str(r.tokens), r.what, r.scope, _number(r.own_floor),
            _number(r.host), _number(r.events), _number(r.graph),
            "" if r.ratio is None else f"{r.ratio:.2f}",
            f"{r.tflops:.0f}" if r.tflops and not r.is_stage else "",
            r.note,
        )  # fmt: skip
    return view


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def provenance(command: str, backend: Any = None) -> dict[str, Any]:
    """Date, machine, versions, command and floor of a run, and the identity of ``backend``."""

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    machine = environment.provenance(serve.facts("cuda" if torch.cuda.is_available() else "cpu"))
    for name in ("torch", "triton", "numpy"):  # among `versions`, or of no account
        machine.pop(name, None)
    record: dict[str, Any] = {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine,
        "revision": environment.revision(),
        "versions": {name: version_of(name) for name in VERSIONS},
        "floor": _FLOOR,
        "timing": f"median; {timing.FLUSH_BYTES >> 20} MiB written before every repeat, "
        f"at least {timing.AHEAD} times before a replay",
    }
    if backend is not None:
        record["backend"] = {"name": backend.name}
        if (identity := checked_fingerprint(serve.fingerprint(backend))) is not None:
            record["backend"] |= {name: identity[name] for name in ("sources", "options")}
    return record


def save(rows: Sequence[Any], path: Path, origin: dict[str, Any]) -> None:
    """Rows, of :class:`Row` or of :class:`.ranks.RankRow`, and their :func:`provenance` as JSON; an
    existing file is replaced whole."""
    document = {**origin, "rows": [asdict(r) for r in rows]}
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())


def load(path: Path) -> list[Row]:
    """The rows of a file that :func:`save` wrote."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if any("ranks" in row for row in data["rows"]):
            raise ValueError("its rows are those of --ep, which --from cannot draw")
        rows = [_row(dict(row)) for row in data["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no rows of `megamoe bench --json`: {error}") from error
    if data.get("floor", _FLOOR) != _FLOOR:
        raise ValueError(f"{path}: its floor is {data['floor']}, that of this version {_FLOOR}")
    return rows


def _row(entry: dict[str, Any]) -> Row:
    names = {f.name for f in fields(Row)}
    arguments = {name: value for name, value in entry.items() if name in names}
    if "experts" in entry:
        return Row(**arguments)
    # An older file. Where the floor is of bytes it tells the experts; where it is of operations,
    # all were touched: that takes more than a hundred rows an expert.
    share = share_of(entry["share"])
    experts = entry["floor"] * 1e-6 * FLOOR_BANDWIDTH / weight_bytes(share, 1)
    row = Row(**arguments, experts=min(share.experts, round(experts)))
    return replace(row, tflops=rate(row))  # its own was the graph's, and of stages too
