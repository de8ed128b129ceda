"""Which cases a pattern means, in verbs and under pytest; what `list`, `show`, `doctor` say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megamoe.cases import Case, CaseError, golden_root, load_cases
from megamoe.cases.pattern import matching
from megamoe.commands import doctor
from megamoe.commands.main import main
from megamoe.commands.show import MEANINGS, _words
from megamoe.suite import plugin

IDS = ("eplb/a-t1", "eplb/b-t2", "forward/a-t1", "forward/c", "layout/d")
CASES = [Case(i, i.partition("/")[0], "quick", "b", 1, {}, Path("x.toml")) for i in IDS]


@pytest.mark.parametrize(
    ("pattern", "ids"),
    [
        ("eplb/*", "eplb/a-t1 eplb/b-t2"),
        ("a-t1", "eplb/a-t1 forward/a-t1"),
        ("forward/a-t1", "forward/a-t1"),
        ("layout/d, eplb/*", "eplb/a-t1 eplb/b-t2 layout/d"),
        ("eplb/*,!*-t2", "eplb/a-t1"),
        ("!*-t2,eplb/*", "eplb/a-t1"),
        ("!eplb/*", "forward/a-t1 forward/c layout/d"),
        ("!eplb/*,!c", "forward/a-t1 layout/d"),
        ("?-t[12]", "eplb/a-t1 eplb/b-t2 forward/a-t1"),
    ],
)
def test_what_a_pattern_means(pattern: str, ids: str) -> None:
    assert [case.id for case in matching(CASES, pattern)] == ids.split()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("eplb", r"nothing matches 'eplb'; to mean the 2 cases with eplb in .*'\*eplb\*'"),
        ("x", "nothing matches 'x'; `megamoe list`"),
        ("xyz", r"`megamoe list '\*WORD\*'` those with a word in the id"),
        ("eplb/none*", r"`megamoe list 'eplb/\*'` shows the 2 cases of this kind"),
        ("*plb-zzz*", r"`megamoe list '\*plb\*'` shows them: 2 cases with plb in the id"),
        ("EPLB/*", r"nothing matches 'EPLB/\*'"),
        ("eplb/*,x", "nothing matches 'x'"),
        ("eplb/*,!x", "nothing matches 'x'"),
        ("eplb/*,", "has an empty word"),
        ("!", "has an empty word"),
        ("", "has an empty word"),
        ("eplb/*,!eplb/*", "takes away every case"),
    ],
)
def test_a_pattern_that_means_nothing_is_said(pattern: str, message: str) -> None:
    with pytest.raises(CaseError, match=message):
        matching(CASES, pattern)


def list_ids(*arguments: str, capsys: Any) -> list[str]:
    assert main(["list", *arguments]) == 0
    return [line.partition("\t")[0] for line in capsys.readouterr().out.splitlines()]


def test_k_is_case_and_may_be_repeated(capsys: Any) -> None:
    expected = list_ids("--case", "layout/*,eplb/no-tokens", capsys=capsys)
    assert "eplb/no-tokens" in expected and len(expected) > 5
    assert list_ids("-k", "layout/*", "--case", "eplb/no-tokens", capsys=capsys) == expected


@pytest.mark.parametrize("verb", ["check", "list", "coverage", "ab", "bisect"])
def test_every_verb_with_cases_has_both_names(verb: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert "--case PATTERN, -k PATTERN" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("act", ["record", "verify", "record-bits"])
def test_every_act_with_cases_has_both_names(act: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["golden", act, "--help"])
    assert "--case PATTERN, -k PATTERN" in " ".join(capsys.readouterr().out.split())


# --- under pytest ---------------------------------------------------------------------------------


def config(keyword: str, case: str | None = None) -> Any:
    option = SimpleNamespace(keyword=keyword, megamoe_case=case)
    return SimpleNamespace(option=option, getoption=lambda n, d=None: getattr(option, n, d))


@pytest.mark.parametrize("keyword", ["eplb/*", "eplb/a,eplb/b", "!a", "eplb/?"])
def test_a_pattern_after_k_of_pytest_chooses_cases(keyword: str) -> None:
    pytest_config = config(keyword)
    plugin.pytest_configure(pytest_config)
    assert (pytest_config.option.keyword, pytest_config.option.megamoe_case) == ("", keyword)
    items = [SimpleNamespace(fixturenames=names, add_marker=lambda mark: None)
             for names in (("megamoe_case",), ("tmp_path",))]  # fmt: skip
    rest: list[Any] = []
    pytest_config.hook = SimpleNamespace(pytest_deselected=lambda items: rest.extend(items))
    selection: Any = list(items)
    plugin.pytest_collection_modifyitems(pytest_config, selection)
    assert selection == items[:1] and rest == items[1:], "other tests do not run beside"


@pytest.mark.parametrize("keyword", ["", "eplb and not large", "test_case[eplb/a]"])
def test_an_expression_of_pytest_stays_one(keyword: str) -> None:
    pytest_config = config(keyword)
    plugin.pytest_configure(pytest_config)
    assert (pytest_config.option.keyword, pytest_config.option.megamoe_case) == (keyword, None)


def test_two_patterns_under_pytest_are_one_too_many() -> None:
    with pytest.raises(pytest.UsageError, match="give one"):
        plugin.pytest_configure(config("eplb/*", "layout/*"))


# --- list and show --------------------------------------------------------------------------------


def test_list_as_json(capsys: Any) -> None:
    assert main(["list", "--json", "-k", "eplb/no-tokens,layout/*"]) == 0
    entries = json.loads(capsys.readouterr().out)
    first = next(entry for entry in entries if entry["id"] == "eplb/no-tokens")
    assert set(first) == {"id", "kind", "tier", "breaks", "file", "seed", "params"}
    assert (first["params"]["tokens"], first["file"]) == (0, "eplb-maps.toml")
    assert {entry["kind"] for entry in entries} == {"eplb", "layout"}


def show(pattern: str, capsys: Any) -> dict[str, Any]:
    assert main(["show", pattern, "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    return dict(one)


def test_show_says_all_of_a_case(capsys: Any) -> None:
    one = show("forward/tiny-activations-floored-2e-24", capsys)
    assert one["sizes"]["hidden"] == 256 and one["params"]["weights_recipe"]["kind"] == "carrier"
    assert one["judged"].startswith("bitwise: zero freedom") and one["needs"] == ["forward"]
    assert one["contracts"] == ["2026-06", "2026-09", "2026-11", "sgl"]
    assert [g["contracts"] for g in one["goldens"]] == [["2026-06", "sgl"], ["2026-09", "2026-11"]]
    for golden in one["goldens"]:
        assert (golden_root() / golden["file"]).is_file()
    assert main(["show", one["id"]]) == 0
    text = capsys.readouterr().out
    for word in (one["id"], one["breaks"], "hidden 256", "kind carrier", "zero freedom", "2026-09",
                 "tier quick", f"--case {one['id']}"):  # fmt: skip
        assert word in text, word


def test_show_of_other_kinds(capsys: Any) -> None:
    assert main(["show", "--json", "errors/*,property/*,forward/nvfp4*,staging/*,layout/*"]) == 0
    entries = json.loads(capsys.readouterr().out)
    by_kind = {one["kind"]: one for one in entries}
    assert by_kind["errors"]["judged"].startswith("error:") and not by_kind["errors"]["goldens"]
    assert by_kind["property"]["judged"].startswith(f"law {by_kind['property']['params']['law']}")
    assert any("nvfp4" in one["needs"] for one in entries)
    names = {re.split(r"[:, ]", one["judged"])[0] for one in entries}
    assert names <= {"bitwise", "staged", "law", "error", "end-to-end"}, "the names of a verdict"
    assert any("else end-to-end and statistic: each value" in one["judged"] for one in entries)
    assert main(["show", "no-such"]) == 2
    assert "nothing matches 'no-such'" in capsys.readouterr().err


def test_show_promises_no_stage_of_a_format_that_shows_only_y(capsys: Any) -> None:
    assert show("forward/w4a16-bell-fast", capsys)["judged"].startswith(
        "end-to-end: each value of y"
    )
    assert show("forward/bell-h256-i128-drifts", capsys)["judged"].startswith("staged, if")


def test_show_says_what_the_words_of_a_recipe_mean(capsys: Any) -> None:
    assert main(["show", "forward/clamp-10-bell-misapplied,forward/bell-h256-i128-drifts"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ +weights_recipe +w13_scale 122 to 123, w2_scale 119 to 120$", text, re.M)
    for word in ("w13_scale", "w2_scale", "bell", "envelope", "capacity"):
        assert re.search(rf"^ +{word}: +{re.escape(MEANINGS[word])}$", text, re.M), word
    assert "octaves:" not in text, "these cases have no such word"
    assert main(["show", "forward/scale-bytes-*"]) == 0
    assert "gate_scale 136 in steps of -1, up_scale " in capsys.readouterr().out


def test_each_word_that_show_explains_is_in_some_recipe() -> None:
    there = {word for case in load_cases() for word in _words(case.params)}
    assert set(MEANINGS) <= there


# --- doctor ---------------------------------------------------------------------------------------


def diagnosis(monkeypatch: pytest.MonkeyPatch, capsys: Any, *more: str, **programs: str) -> Any:
    """`doctor --json` where the named programs print this, and all others are not there."""
    names = {sys.executable: "python"}  # its file may be called python3
    monkeypatch.setattr(
        doctor, "_output", lambda c: programs.get(names.get(c[0], Path(c[0]).name), "")
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda n: f"/bin/{n}" if n in programs else None)
    monkeypatch.delenv("MEGAMOE_CHROMIUM", raising=False)
    code = main(["doctor", "--json", *more])
    report = json.loads(capsys.readouterr().out)
    return code, report["ok"], {line["name"]: line for line in report["lines"]}


def test_doctor_where_nothing_but_python_is(monkeypatch: Any, capsys: Any) -> None:
    code, ok, lines = diagnosis(monkeypatch, capsys)
    assert (code, ok) == (0, True), "eager needs none of what is missing"
    for name in ("chromium", "nix", "torch-index", "gpu"):
        assert lines[name]["state"] == "missing", name
    assert {lines[n]["state"] for n in ("python", "torch", "numpy", "goldens", "eager")} == {"ok"}
    assert "cases" in lines["goldens"]["said"]


def test_doctor_where_all_is(monkeypatch: Any, capsys: Any) -> None:
    kernel = SimpleNamespace(
        same_bits=True, description="deep_gemm is vllm 0.33.0, contract 2026-11"
    )
    monkeypatch.setattr("megamoe.spec.builds.installed_packages", lambda: {"deep_gemm": Path("/x")})
    monkeypatch.setattr("megamoe.spec.builds.detect", lambda folder: kernel)
    gpu = {"nvidia-smi": "NVIDIA H100, 570.1"}
    programs = {"chromium": "Chromium 1", "nix": "nix 2", "python": "torch (2.13.0+cpu)", **gpu}
    code, _, lines = diagnosis(monkeypatch, capsys, **programs)
    assert code == 0
    assert "2026-11" in lines["deep_gemm"]["said"] and lines["deep_gemm"]["state"] == "ok"
    assert lines["torch-index"]["state"] == "ok" and lines["chromium"]["said"].startswith(
        "Chromium 1"
    )
    kernel.same_bits = False
    _, _, lines = diagnosis(monkeypatch, capsys, **gpu)
    assert lines["deep_gemm"]["state"] == "wrong"
    assert "NVIDIA H100, 570.1" in lines["gpu"]["said"]


@pytest.mark.parametrize(("version", "state"), [("2.8.0", "wrong"), ("2.18.1", "ok")])
def test_doctor_sees_a_nix_that_is_too_old(
    monkeypatch: Any, capsys: Any, version: str, state: str
) -> None:
    _, _, lines = diagnosis(monkeypatch, capsys, nix=f"nix (Nix) {version}")
    assert lines["nix"]["state"] == state
    assert ("2.18" in lines["nix"]["mend"]) == (state == "wrong")
    minimum = (golden_root().parent / "nix/minimum.nix").read_text()
    assert f'nix = "{doctor.OLDEST_NIX[0]}.{doctor.OLDEST_NIX[1]}"' in minimum


def test_doctor_without_goldens_is_no_success(
    monkeypatch: Any, capsys: Any, tmp_path: Path
) -> None:
    code, ok, lines = diagnosis(monkeypatch, capsys, "--golden", str(tmp_path))
    assert (code, ok, lines["goldens"]["state"]) == (1, False, "wrong")
    assert "--golden DIR" in lines["goldens"]["mend"]


def test_doctor_runs_where_torch_is_not() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from megamoe.commands.main import main; sys.exit(main(['doctor']))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PATH": "/nowhere", "PIP_NO_INDEX": "1"},
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    assert "cannot run here" in process.stdout and "wrong    torch" in process.stdout
    assert "wrong    eager" in process.stdout and "ok       numpy" in process.stdout
