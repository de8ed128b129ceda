"""What ``tools/sanitize.sh`` concludes from the logs; the sanitizer here is a script."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.backends.triton.tiles import FEW, OVERLAPPED, few_tile, overlapped_tile
from megamoe.cases import load_cases, select

SCRIPT = Path(__file__).parents[1] / "tools/sanitize.sh"
HAZARDS = SCRIPT.with_name("hazards.py")
spec = importlib.util.spec_from_file_location("hazards", HAZARDS)
hazards = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hazards)

# Writes the log that it was asked for, then runs what it was given.
SANITIZER = """#!/bin/sh
log=$(echo "$6" | sed 's/%p/1/')
{write}
shift 6
exec "$@"
"""


@pytest.fixture
def sanitize(tmp_path):
    def run(write, *, gpu=True, check=0, sanitizer=True, tools="memcheck racecheck"):
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(SANITIZER.replace("{write}", write))
        python = tmp_path / "python"
        python.write_text(
            f'#!/bin/sh\n[ "$1" = -c ] && exit {int(not gpu)}\n'
            f'[ "$1" = tools/hazards.py ] && exec {sys.executable} {HAZARDS} "$2"\n'
            f'echo "$MODE $@" >>calls\nexit {check}\n'
        )
        for path in (tool, python):
            path.chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "SANITIZE_CASES": "forward/a,property/b-*"}
        environment["SANITIZE_TOOLS"] = tools
        environment["COMPUTE_SANITIZER" if sanitizer else "CUDA_HOME"] = str(
            tool if sanitizer else tmp_path / "none"
        )
        return subprocess.run(
            ["sh", str(SCRIPT), "MODE=x", str(python)], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


CLEAN = 'echo "========= ERROR SUMMARY: 0 errors" >$log'
HAZARDLESS = 'echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" >$log'
DIRTY = 'echo "========= ERROR SUMMARY: 3 errors" >$log'


@pytest.mark.parametrize("write", [CLEAN, HAZARDLESS])
def test_clean_logs_of_both_tools_are_green(sanitize, tmp_path, write):
    ran = sanitize(write)
    assert ran.returncode == 0, ran.stderr
    assert "sanitize: memcheck: 1 processes, no error" in ran.stdout
    assert "set aside (tools/hazards.py says why), 0 others" in ran.stdout
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2
    assert calls[0].startswith("x -m megamoe check --backend triton --device cuda --tier full ")
    assert "--case forward/a,property/b-* " in calls[0]


@pytest.mark.parametrize(
    ("write", "check", "message"),
    [
        (DIRTY, 0, "memcheck found errors; see out/sanitize/memcheck"),
        (CLEAN, 1, ""),  # a case is red
        (":", 0, "memcheck wrote no summary in out/sanitize/memcheck: nothing was checked"),
    ],
)
def test_an_error_a_red_case_and_silence_are_not_green(sanitize, write, check, message):
    ran = sanitize(write, check=check)
    assert ran.returncode == 1 and message in ran.stderr


def test_what_is_missing_is_said_in_one_line(sanitize):
    ran = sanitize(CLEAN, gpu=False)
    assert ran.returncode == 2
    assert ran.stderr == "sanitize: torch finds no NVIDIA GPU here; run this where one is\n"
    if not Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        ran = sanitize(CLEAN, sanitizer=False)
        assert ran.returncode == 2 and ran.stderr.startswith("sanitize: no compute-sanitizer; ")
        assert ran.stderr.count("\n") == 1


def test_its_cases_take_every_tile_and_switch_of_both_families():
    default = re.search(r"SANITIZE_CASES:-([^}]*)}", SCRIPT.read_text()).group(1)
    globs = default.replace("\\\n", "")
    cases = load_cases(SCRIPT.parents[1] / "golden")
    assert all(select(cases, glob=one) for one in globs.split(","))
    few, overlapped, tiles = set(), set(), set()
    for case in select(cases, glob=globs):
        if "top_k" not in case.params or "family" not in case.params:
            continue
        p = case.params
        rows, experts = p["tokens"] * p["top_k"], p["experts"]
        crowded = overlapped_tile(rows, experts, p["hidden"])
        tiles.add(crowded or few_tile(rows, experts, p["intermediate"], processors=132))
        wide = "wide-weight-scales" in case.name
        switches = {f"fast {p['fast_math']}", f"clamp {p['clamp'] != 'none'}", f"wide {wide}"}
        (overlapped if crowded else few).update(switches)
    assert tiles == {*FEW, *OVERLAPPED}
    every = {f"{switch} {on}" for switch in ("fast", "clamp", "wide") for on in (True, False)}
    assert few == overlapped == every


REPORT = (
    "========= Error: Race reported between Read access at linear1+0x120 in overlapped.py:{first}\n"
    "=========     and Write access at linear1+0x6fa0 in overlapped.py:{second} [2 hazards]\n"
    "=========\n"
)


def line_of(start, file="overlapped.py"):
    lines = (hazards.KERNELS / file).read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.strip().startswith(start))


HEAD, CALL = line_of("def linear1("), line_of("gl.warp_specialize(")


@pytest.fixture
def judge(tmp_path, capsys):
    def run(*reports, summary=None):
        log = tmp_path / "1.txt"
        count = len(reports) if summary is None else summary
        end = f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)"
        log.write_text("".join(reports) + end + "\n")
        return hazards.main([str(log)]), capsys.readouterr()

    return run


def at(first, second):
    return REPORT.format(first=first, second=second)


def test_only_what_racecheck_blames_on_triton_s_hand_over_is_set_aside(judge):
    code, output = judge(at(HEAD, CALL), at(HEAD, HEAD))
    assert code == 0 and "2 reports" in output.out
    ours = line_of("a0 = decoded(")
    code, output = judge(at(HEAD, CALL), at(HEAD, ours))
    assert code == 1
    assert "1 reports" in output.out and "1 others" in output.out
    assert f"overlapped.py:{ours}" in output.err and f"overlapped.py:{CALL}" not in output.err


def test_races_on_sums_that_an_mbarrier_orders_and_torch_s_own_are_set_aside(judge):
    load = line_of("word = pieces.index(", "handover.py")
    store = line_of("sums.index(box).slice(", "handover.py")
    sums = at(load, store).replace("overlapped.py", "handover.py")
    torch = (
        "========= Error: Race reported between Read access at void at::native::reduce_kernel"
        "<(int)512, (int)1>(T3)+0xe4f0\n=========\n"
    )
    code, output = judge(sums, torch, summary=2)
    assert code == 0 and "1 reports" in output.out and "1 in torch's own" in output.out
    elsewhere = at(load, line_of("def hand_over(", "handover.py"))
    code, output = judge(elsewhere.replace("overlapped.py", "handover.py"))
    assert code == 1 and "1 others" in output.out


@pytest.mark.parametrize(
    "report",
    [
        at(10**6, HEAD),  # a line that is not there
        at(HEAD, line_of("def _product(")),  # a function of ours that the kernel calls
        "========= Error: Potential RAW hazard detected at __shared__ 0x0\n",
        "========= Warning: Race reported nowhere\n",
    ],
)
def test_any_other_report_is_left(judge, report):
    code, output = judge(at(HEAD, CALL), report)
    assert code == 1 and "1 reports" in output.out and "1 others" in output.out


def test_a_report_that_is_not_understood_is_missed_in_the_sum(judge):
    code, output = judge(at(HEAD, CALL), summary=2)
    assert code == 1 and "tells of 2 reports, the log has 1" in output.err


def test_an_error_that_racecheck_only_counts_is_red(sanitize):
    ran = sanitize(DIRTY, tools="racecheck")
    assert ran.returncode == 1 and "tells of 3 reports, the log has 0" in ran.stderr
