"""One benchmark run: rows, a table, a JSON file and a roofline plot."""

from __future__ import annotations

import gc
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megamoe.bench import timing
from megamoe.bench.floor import SHARES, Share, floor, operations
from megamoe.bench.peers import PEERS
from megamoe.experts import packed_weights

VERSIONS = ("torch", "triton", "sgl-deep-gemm", "humming-kernels")


@dataclass(frozen=True)
class Row:
    """One thing timed once; microseconds."""

    share: str
    tokens: int
    what: str
    scope: str
    floor: float
    events: float | None = None
    graph: float | None = None
    tflops: float | None = None
    note: str = ""


def measure(
    backend: Any, shares: Sequence[str], tokens: Sequence[int], peers: Sequence[str], repeats: int
) -> list[Row]:
    """Time ``backend`` (with ``run``) and ``peers`` for every share and token count."""
    rows = []
    for name in shares:
        share = SHARES[name]
        for count in tokens:
            rows += _one(backend, share, count, peers, repeats)
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def _one(backend: Any, share: Share, tokens: int, peers: Sequence[str], repeats: int) -> list[Row]:
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    device = torch.device("cuda")
    hidden = torch.randn(tokens, share.hidden, generator=generator, device=device).bfloat16()
    order = torch.rand(tokens, share.experts, generator=generator, device=device)
    ids = order.argsort(1)[:, : share.top_k].contiguous()
    weights = torch.rand(tokens, share.top_k, generator=generator, device=device)
    least = floor(share, tokens, len(ids.unique()))
    flops = operations(share, tokens)

    def row(what: str, scope: str, step: Any) -> Row:
        events = timing.events(step, repeats)
        try:
            graph, note = timing.graph(step, repeats), ""
        except Exception as error:
            graph, note = None, f"no CUDA graph: {_line(error)}"
        rate = flops / (graph or events) / 1e6
        return Row(share.name, tokens, what, scope, least, events, graph, rate, note)

    rows = [row(backend.name, scope, step) for scope, step in
            _own_steps(backend, share, hidden, ids, weights, generator)]  # fmt: skip
    for peer in peers:
        scope, make = PEERS[peer]
        try:
            rows.append(row(peer, scope, make(share, hidden, ids, weights)))
        except Exception as error:
            rows.append(Row(share.name, tokens, peer, scope, least, note=_line(error)))
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _own_steps(
    backend: Any, share: Share, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor,
    generator: torch.Generator,
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """The whole forward of ``backend``, then its stages; their memory goes with the iterator."""
    tokens = hidden.shape[0]
    packed = packed_weights(backend, *_random_weights(share, generator))
    buffer = backend.new_symm_buffer(
        None, hidden.device, share.experts, tokens, share.top_k, share.hidden, share.intermediate
    )
    y = torch.empty_like(hidden)
    staged = [t[:tokens] for t in (buffer.x, buffer.x_sf, buffer.topk_idx, buffer.topk_weights)]
    options: dict[str, Any] = {"activation_clamp": 10.0, "fast_math": True}

    def prepare() -> None:
        backend.prepare(hidden, weights, ids, *staged)

    def whole() -> None:
        prepare()
        backend.run(y, packed, buffer, tokens, **options)

    yield "whole forward", whole
    yield "stage staging", prepare
    if hasattr(backend, "stages"):
        for stage, launch in backend.stages(y, packed, buffer, tokens, **options):
            yield f"stage {stage}", launch


def _random_weights(share: Share, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Checkpoint layout: any nibbles, scales of real models' size."""
    e, h, i = share.experts, share.hidden, share.intermediate

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(
            low, high, shape, generator=generator, device="cuda", dtype=torch.uint8
        )

    return (
        draw(0, 256, e, 2 * i, h // 2),
        draw(116, 121, e, 2 * i, h // 32),
        draw(0, 256, e, h, i // 2),
        draw(116, 121, e, h, i // 32),
    )


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def provenance(command: str) -> dict[str, Any]:
    """Machine, versions and command of this run."""

    def found(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    made: dict[str, Any] = {
        "command": command,
        "python": platform.python_version(),
        "versions": {name: found(name) for name in VERSIONS},
        "timing": f"median; {timing.FLUSH_BYTES >> 20} MiB written before every repeat",
    }
    if torch.cuda.is_available():
        made["gpu"] = torch.cuda.get_device_name()
        made["cuda"] = torch.version.cuda
    return made


def table(rows: Sequence[Row]) -> Table:
    """Rows for a terminal; times in microseconds."""
    made = Table(
        "share", "T", "what", "timed", "floor", "events", "graph", "x floor", "TFLOP/s", "note"
    )
    for r in rows:
        whole = not r.scope.startswith("stage")
        best = r.graph or r.events
        made.add_row(
            r.share, str(r.tokens), r.what, r.scope, f"{r.floor:.0f}" if whole else "",
            _number(r.events), _number(r.graph),
            f"{best / r.floor:.2f}" if best and whole else "",
            f"{r.tflops:.0f}" if r.tflops and whole else "",
            r.note,
        )  # fmt: skip
    return made


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def save(rows: Sequence[Row], path: Path, command: str) -> None:
    """Rows and provenance as JSON; an existing file is replaced at the end, not before."""
    made = {**provenance(command), "rows": [asdict(r) for r in rows]}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(made, indent=1) + "\n")
    partial.replace(path)


def plot(rows: Sequence[Row], path: Path) -> None:
    """A roofline: time by T on two logarithmic axes, the floor below; SVG. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib; install it, or leave --plot out") from None
    shares = list(dict.fromkeys(r.share for r in rows))
    figure = Figure(figsize=(6.5 * len(shares), 4.5), layout="constrained")
    for axes, share in zip(figure.subplots(1, len(shares), squeeze=False)[0], shares, strict=True):
        mine = [r for r in rows if r.share == share and not r.scope.startswith("stage")]
        for what in dict.fromkeys(r.what for r in mine):
            points = [
                (r.tokens, best) for r in mine if r.what == what and (best := r.graph or r.events)
            ]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=what)
        least = dict(sorted((r.tokens, r.floor) for r in mine))
        axes.plot(list(least), list(least.values()), "k--", label="floor")
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds", title=share)
        axes.legend()
    figure.savefig(path, format="svg")
