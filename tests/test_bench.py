"""The benchmark without a GPU: its floor, its rows, its files. Times are never asserted."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from megamoe import bench
from megamoe.bench import SHARES, Row, Share, floor, load, measure, plot, provenance, save, table
from megamoe.bench import timing as clock
from megamoe.bench.peers import PEERS
from megamoe.commands.main import main
from megamoe.spec.models import MODELS
from tests.helpers.schemas import valid

MEASURED = Path(__file__).parents[1] / "docs" / "performance"


@pytest.mark.parametrize(
    ("share", "tokens", "experts", "microseconds"),
    [("flash", 1, 6, 25), ("flash", 64, 32, 131), ("flash", 2048, 32, 442),
     ("flash", 8192, 32, 1767), ("pro", 1, 6, 65), ("pro", 64, 48, 516), ("pro", 2048, 48, 1160),
     ("pro", 8192, 48, 4639)],
)  # fmt: skip
def test_the_floor_is_bytes_for_few_tokens_and_operations_for_many(
    share, tokens, experts, microseconds
):
    """Published figures of the same card, rounded to a microsecond."""
    assert floor(SHARES[share], tokens, experts) == pytest.approx(microseconds, abs=1)


def test_every_model_of_the_shape_table_has_a_share():
    assert {s.name.lower() for s in SHARES.values()} == set(MODELS)


ROWS = [
    Row("DeepSeek-V4-Flash", 1, "triton", "whole forward", 25.0, 6, 60.0, 50.0, 6.0),
    Row("DeepSeek-V4-Flash", 1, "triton", "stage linear1", 25.0, 6, 40.0, 30.0),
    Row("DeepSeek-V4-Flash", 8, "triton", "whole forward", 100.0, 24, 160.0, None, 9.0, "no graph"),
    Row("DeepSeek-V4-Flash", 1, "absent", "whole forward", 25.0, 6, note="No module 'absent'"),
    Row("DeepSeek-V3", 8, "triton", "whole forward", 200.0, 28, 310.0, 300.0, 8.0),
]  # fmt: skip


def test_a_peer_that_is_missing_is_a_row_that_says_why():
    from rich.console import Console

    out = io.StringIO()
    Console(width=200, file=out).print(table(ROWS))
    lines = out.getvalue().splitlines()
    assert any("absent" in line and "No module" in line for line in lines)
    assert any("50.0" in line and "2.00" in line for line in lines)


def test_a_line_of_progress_says_how_long_or_why_not():
    assert [row.line() for row in ROWS[:4]] == [
        "DeepSeek-V4-Flash T=1 triton, whole forward: 50.0 us, 2.00 x floor",
        "DeepSeek-V4-Flash T=1 triton, stage linear1: 30.0 us, 1.83 x floor",
        "DeepSeek-V4-Flash T=8 triton, whole forward: 160.0 us, 1.60 x floor (no graph)",
        "DeepSeek-V4-Flash T=1 absent, whole forward: failed, No module 'absent'",
    ]


def test_a_stage_has_a_floor_of_its_own():
    def of(stage: str, tokens: int, experts: int) -> float | None:
        return Row("DeepSeek-V4-Flash", tokens, "triton", f"stage {stage}", 0.0, experts).own_floor

    whole = floor(SHARES["flash"], 8192, 32)
    assert of("linear1", 8192, 32) + of("linear2", 8192, 32) == pytest.approx(whole)
    assert of("linear1", 8192, 32) == pytest.approx(2 * of("linear2", 8192, 32))
    # 4096 values of 2 bytes to 4096 codes and 128 scale bytes; seven rows of 2 bytes.
    assert of("staging", 8192, 32) == pytest.approx(8192 * 12416 / 3.07e6)
    assert of("combine", 8192, 32) == pytest.approx(8192 * 4096 * 14 / 3.07e6)
    assert of("dispatch", 8192, 32) is None  # another implementation may have none


def test_a_stage_that_takes_less_than_a_launch_is_not_compared_with_its_floor():
    staging = Row("DeepSeek-V4-Flash", 1, "triton", "stage staging", 25.0, 6, 5.0)
    assert staging.ratio is None and staging.line().endswith("stage staging: 5.0 us")


# --- files ------------------------------------------------------------------------------------


class Standin:
    """A backend of little work on a CPU."""

    name = "standin"

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def fingerprint(self):
        return {"sources": "a digest", "options": "none", "binaries": {"a kernel": "a digest"}}

    def new_symm_buffer(self, group, device, sizes):
        if self.broken == "buffer":
            raise MemoryError
        names = ("x", "x_sf", "topk_idx", "topk_weights")
        return SimpleNamespace(**{name: [0] * sizes.max_num_tokens for name in names})

    def prepare(self, hidden, weights, ids, *staged):
        assert [len(s) for s in staged] == [len(hidden)] * 4

    def run(self, y, weights, buffer, tokens, *, activation_clamp, fast_math):
        y.zero_()

    def stages(self, y, weights, buffer, tokens, **options):
        yield "all of it", y.zero_
        if self.broken == "stage":
            raise ValueError("what is\nwrong")


def test_the_file_holds_rows_and_what_made_them(tmp_path):
    save(ROWS, tmp_path / "b.json", provenance("megamoe bench --tokens 1", Standin()))
    document = json.loads((tmp_path / "b.json").read_text())
    valid("bench", document)
    assert document["command"] == "megamoe bench --tokens 1"
    assert document["versions"]["torch"][0].isdigit()
    assert {"sgl-deep-gemm", "humming-kernels"} < set(document["versions"])
    assert document["backend"] == {"name": "standin", "sources": "a digest", "options": "none"}
    assert document["floor"]["bytes_per_second"] == bench.FLOOR_BANDWIDTH
    assert document["date"].endswith("+00:00")
    assert {"megamoe", "revision", "python"} < set(document)
    assert [r["graph"] for r in document["rows"]] == [50.0, 30.0, None, None, 300.0]
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_rows_come_back_as_they_were(tmp_path):
    save(ROWS, tmp_path / "b.json", provenance("megamoe bench"))
    assert load(tmp_path / "b.json") == ROWS


@pytest.mark.parametrize("name", ["h100", "h200"])
def test_a_row_s_floor_is_that_of_the_experts_it_touched(name):
    """The older file, of the H100, does not say how many; the floor does."""
    for row in load(MEASURED / f"{name}.json"):
        share = bench.rows.share_of(row.share)
        assert floor(share, row.tokens, row.experts) == pytest.approx(row.floor)
        assert row.experts <= min(share.experts, row.tokens * share.top_k)


@pytest.mark.parametrize(
    ("text", "message"),
    [("not JSON", "holds no rows"), ("{}", "holds no rows"), ("[]", "holds no rows"),
     ('{"rows": [{"share": "DeepSeek-V3", "experts": 1}]}', "holds no rows"),
     ('{"rows": [{"share": "nobody\'s"}]}', "nobody's"),
     ('{"rows": [], "floor": {"bytes_per_second": 1}}', "its floor is")],
)  # fmt: skip
def test_a_file_of_anything_else_is_refused_in_one_line(tmp_path, capsys, text, message):
    (tmp_path / "b.json").write_text(text)
    assert main(["bench", "--from", str(tmp_path / "b.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_from_a_file_the_table_is_made_again_without_a_gpu(tmp_path, capsys):
    save(ROWS, tmp_path / "b.json", provenance("megamoe bench"))
    assert main(["bench", "--from", str(tmp_path / "b.json")]) == 0
    assert "DeepSeek-V3" in capsys.readouterr().out
    assert main(["bench", "--from", str(tmp_path / "b.json"), "--json", "c.json"]) == 2
    assert "--from times nothing" in capsys.readouterr().err
    assert main(["bench", "--from", str(tmp_path / "absent.json")]) == 2


def test_the_plot_is_an_svg_or_says_what_is_missing(tmp_path, capsys):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="--plot needs matplotlib"):
            plot(ROWS, tmp_path / "b.svg")
        # Before anything is timed, and before a GPU is looked for.
        assert main(["bench", "--plot", str(tmp_path / "b.svg")]) == 2
        assert "matplotlib" in capsys.readouterr().err
    else:
        for name in ("b.svg", "c.svg"):
            plot(ROWS, tmp_path / name)
        assert "<svg" in (tmp_path / "b.svg").read_text()
        assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "c.svg").read_bytes()


def test_the_roofline_has_every_point_at_or_below_its_roof():
    pytest.importorskip("matplotlib")
    rows = [r for r in load(MEASURED / "h100.json") if r.best and not r.is_stage]
    from megamoe.bench.figure import draw

    panels = draw(rows).axes
    assert [p.get_title() for p in panels] == [
        f"{share}: {what}" for share in ("DeepSeek-V4-Flash", "DeepSeek-V4-Pro")
        for what in ("time", "roofline")
    ]  # fmt: skip
    for panel in panels[1::2]:
        *peers, roof = panel.get_lines()
        assert "roof" in roof.get_label()
        assert len({line.get_marker() for line in peers}) == len(peers)
        assert len(peers) == len({r.what for r in rows})
        for line in peers:
            for x, y in zip(*line.get_data(), strict=True):
                assert y <= min(bench.FLOOR_BANDWIDTH * x, bench.FLOOR_FLOPS) / 1e12


def test_the_host_s_time_is_until_the_step_returns_the_median(monkeypatch):
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    moments = iter([0.0, 5e-6, 1.0, 1.0 + 9e-6, 2.0, 2.0 + 7e-6])
    monkeypatch.setattr(clock, "perf_counter", lambda: next(moments))
    assert clock.host(lambda: None, 3) == pytest.approx(7.0)


# --- a run ------------------------------------------------------------------------------------


class Device:
    """A GPU that takes 90 us for a flush, and a host that takes ``host`` us to hand a step over.

    The step is of 10 us. Times are of the device; the host begins with each repeat's first flush.
    """

    def __init__(self, host):
        self.now, self.free, self.host = 0.0, 0.0, host
        self.flushes = [0]
        self.cuda = SimpleNamespace(Event=lambda **_: Moment(self), synchronize=self.synchronize)
        self.uint8 = None

    def empty(self, *_, **__):
        return SimpleNamespace(zero_=self.flush)

    def flush(self):
        self.flushes[-1] += 1
        self.free += 90

    def step(self):
        self.now += self.host
        self.free = max(self.free, self.now) + 10

    def synchronize(self):
        self.now = self.free = 0.0
        self.flushes.append(0)


class Moment:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = self.device.free

    def query(self):
        return self.device.now >= self.at

    def elapsed_time(self, end):
        return (end.at - self.at) / 1e3


@pytest.mark.parametrize(
    ("host", "ahead", "flushes", "took"),
    [(50, True, [4, 4, 4], 10), (800, True, [4, 8, 16, 16, 16], 10), (200, False, [1, 1, 1], 120),
     (10**4, True, [4, 8, 16, 32, 64, 64, 64], 10**4 - 64 * 90 + 10)],
    ids=["as usual", "a slow host is given a start", "not asked for", "an end to it"],
)  # fmt: skip
def test_a_slow_host_is_not_in_a_replay_s_time(monkeypatch, host, ahead, flushes, took):
    device = Device(host)
    monkeypatch.setattr(clock, "torch", device)
    warming = iter(range(3))

    def step():
        if next(warming, None) is None:
            device.step()

    assert clock.events(step, 3, ahead=ahead) == pytest.approx(took)
    assert device.flushes[:-1] == flushes


@pytest.fixture
def tiny(monkeypatch):
    """A small share, and a clock: all takes 7 microseconds, a graph 5 and the host 3."""
    monkeypatch.setitem(SHARES, "tiny", Share("Tiny", 256, 128, 4, 2))

    def ticks(step, repeats):
        step()
        return 7.0

    def graph(step, repeats):
        step()
        return 5.0

    monkeypatch.setattr(clock, "events", ticks)
    monkeypatch.setattr(clock, "graph", graph)
    monkeypatch.setattr(clock, "host", lambda step, repeats: 3.0)
    return monkeypatch


def test_a_run_has_a_row_for_all_that_was_timed_and_for_what_could_not_be(tiny):
    def broken(*_):
        raise RuntimeError("the first line\nand a second")

    tiny.setitem(PEERS, "works", ("two products only", lambda *_: lambda: None))
    tiny.setitem(PEERS, "broken", ("whole forward", broken))
    rows = list(measure(Standin(), ["tiny"], [1, 3], ["broken", "works"], 1, "cpu"))
    assert [(r.tokens, r.what, r.scope) for r in rows] == [
        (tokens, *rest) for tokens in (1, 3) for rest in (
            ("standin", "whole forward"), ("standin", "stage staging"),
            ("standin", "stage all of it"), ("broken", "whole forward"),
            ("works", "two products only"),
        )
    ]  # fmt: skip
    whole, staging, _, failure, peer = rows[:5]
    assert (whole.host, whole.events, whole.graph, whole.experts) == (3.0, 7.0, 5.0, 2)
    assert whole.best == 5.0
    assert math.isclose(whole.tflops, 2 * 6 * 256 * 128 / 5e6)
    assert peer.tflops == whole.tflops
    assert staging.tflops is None
    assert (failure.best, failure.tflops) == (None, None)
    assert failure.note == "RuntimeError: the first line"


def test_the_peers_fail_into_rows_where_there_is_no_gpu(tiny):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    rows = list(measure(Standin(), ["tiny"], [2], sorted(PEERS), 1, "cpu"))[3:]
    assert [r.what for r in rows] == sorted(PEERS)
    assert all(r.note and r.best is None for r in rows)


def test_what_cannot_be_captured_keeps_its_time_of_eager_launches(tiny):
    def graph(step, repeats):
        raise RuntimeError("cannot be captured")

    tiny.setattr(clock, "graph", graph)
    row = next(measure(Standin(), ["tiny"], [1], [], 1, "cpu"))
    assert (row.best, row.graph) == (7.0, None)
    assert row.note == "no CUDA graph: RuntimeError: cannot be captured"


@pytest.mark.parametrize(
    ("broken", "notes"),
    [("buffer", ["MemoryError"]), ("stage", ["", "", "", "ValueError: what is"])],
)  # fmt: skip
def test_what_fails_of_the_backend_is_a_row_too_and_the_run_goes_on(tiny, broken, notes):
    tiny.setitem(PEERS, "works", ("two products only", lambda *_: lambda: None))
    rows = list(measure(Standin(broken), ["tiny"], [1], ["works"], 1, "cpu"))
    assert [r.note for r in rows] == [*notes, ""]


def test_a_run_cut_off_leaves_the_rows_that_it_had(tiny, tmp_path, capsys):
    from megamoe.commands import bench as cli

    def stop(*_):
        raise KeyboardInterrupt

    tiny.setitem(PEERS, "stops", ("whole forward", stop))
    tiny.setattr("megamoe.commands.parsers.bench.SHARES", ("tiny",))
    tiny.setattr("megamoe.commands.parsers.bench.PEERS", ("stops",))
    tiny.setattr(cli, "_check_device", lambda device: None)
    tiny.setattr(cli, "load_backend", lambda *_: Standin())
    tiny.setattr(bench, "measure", lambda *a: measure(*a, "cpu"))
    command = ["bench", "--share", "tiny", "--tokens", "1", "--json", str(tmp_path / "b.json")]
    assert main([*command, "--peers", "stops"]) == 130
    assert [r.what for r in load(tmp_path / "b.json")] == ["standin"] * 3
    assert len(capsys.readouterr().err.splitlines()) == 4  # a row each, and that it was stopped
    tiny.setattr(cli, "load_backend", lambda *_: Standin("buffer"))
    assert main([*command, "--peers"]) == 1
    assert "failed, MemoryError" in capsys.readouterr().err


def test_a_dry_run_lists_what_would_be_timed(capsys):
    assert main(["bench", "--dry-run", "--share", "pro", "--tokens", "1", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("DeepSeek-V4-Pro T=1: triton,")


def test_without_a_gpu_it_says_so_in_one_line(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["bench"]) == 2
    assert "megamoe: error:" in capsys.readouterr().err
