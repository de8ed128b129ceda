"""The benchmark without a GPU: its floor, its rows, its files. Times are never asserted."""

from __future__ import annotations

import io
import json

import pytest

from megamoe.bench import SHARES, Row, floor, plot, save, table
from megamoe.cli import main


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


ROWS = [
    Row("DeepSeek-V4-Flash", 1, "triton", "whole forward", 25.0, 60.0, 50.0, 6.0),
    Row("DeepSeek-V4-Flash", 8, "triton", "whole forward", 100.0, 160.0, None, 9.0, "no graph"),
    Row("DeepSeek-V4-Flash", 1, "absent", "whole forward", 25.0, note="No module named 'absent'"),
]  # fmt: skip


def test_a_peer_that_is_missing_is_a_row_that_says_why():
    from rich.console import Console

    out = io.StringIO()
    Console(width=200, file=out).print(table(ROWS))
    lines = out.getvalue().splitlines()
    assert any("absent" in line and "No module named" in line for line in lines)
    assert any("50.0" in line and "2.00" in line for line in lines)


def test_the_file_holds_rows_and_provenance(tmp_path):
    save(ROWS, tmp_path / "b.json", "megamoe bench --tokens 1")
    made = json.loads((tmp_path / "b.json").read_text())
    assert made["command"] == "megamoe bench --tokens 1"
    assert made["versions"]["torch"][0].isdigit()
    assert [r["graph"] for r in made["rows"]] == [50.0, None, None]
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_the_plot_is_an_svg_or_says_what_is_missing(tmp_path):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="--plot needs matplotlib"):
            plot(ROWS, tmp_path / "b.svg")
    else:
        plot(ROWS, tmp_path / "b.svg")
        assert "<svg" in (tmp_path / "b.svg").read_text()


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
