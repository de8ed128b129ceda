"""``megamoe report``: what it says of a run, an A/B and a bisection, however little there is."""

from __future__ import annotations

import copy
import io
import json
import re
import struct
import zlib
from base64 import b64decode
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from megamoe.commands.main import main
from megamoe.judge.verdict import Worst
from megamoe.report import compared, covered, draw, failures, terminal, views, words
from megamoe.report.page import environment, page
from megamoe.report.read import read
from tests.helpers import results
from tests.helpers.schemas import schemas

RESULTS = {"run": results.run, "ab": results.ab, "bisect": results.bisect}


def letters(number: int) -> str:
    """A symptom of its own: digits would not tell it from another."""
    return "".join(chr(97 + int(digit)) for digit in str(number))


def write(folder: Path, data: Any) -> Path:
    path = folder / "result.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def render(kind: str, result: Any) -> str:
    console = Console(file=io.StringIO(), width=150)
    terminal.show(kind, result, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_failure_says_which_worker_process_it_ran_in_and_after_which_cases() -> None:
    result = copy.deepcopy(results.run())
    cases = {case["id"]: case for case in result["cases"]}
    cases[results.POINT] |= {"process": 3, "calls": [5, 5]}
    cases[results.STAGED] |= {"process": 3, "calls": [4, 4]}
    line = f"worker process 3, after 1 case: {results.STAGED}"
    assert f"\nran in: {line}\nalone:" in render("run", result)
    assert f"ran in {line}</p>" in page("run", result).decode()


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RESULTS)
def test_the_kind_of_result_is_told_from_its_keys(kind: str, tmp_path: Path) -> None:
    assert read(write(tmp_path, RESULTS[kind]()))[0] == kind


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "result.json is empty; `megamoe check --json FILE` writes one"),
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ("{}", "is not a result"),
        ('{"kind": "ab"}', "is not a result"),
        ('{"cases": [], "counts": 3}', "is not a result"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_result_is_refused_in_one_line(
    content: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(write(tmp_path, content))]) == 2
    message = capsys.readouterr().err
    assert what in message and message.count("\n") == 1


def test_misuse_of_the_output_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, results.ab())
    for out, what in ((tmp_path, "is a directory"), (path, "is the result itself")):
        assert main(["report", str(path), "-o", str(out)]) == 2
        assert what in capsys.readouterr().err
    assert json.loads(path.read_text()) == json.loads(json.dumps(results.ab()))
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_control_characters_do_not_reach_a_reader(tmp_path: Path) -> None:
    """They would let a backend's message write over the terminal, or turn a line round."""
    data = results.ab() | {"headline": "a\x1b[2Jb\ud800c\u202ed", "key\x00": "x" * 5000}
    clean = read(write(tmp_path, data))[1]
    assert clean["headline"] == "a?[2Jb?c?d"
    assert len(clean["key?"]) < 2100 and "3000 more characters" in clean["key?"]
    assert "\x1b" not in render("ab", clean)


# --- a run ------------------------------------------------------------------------------------


def test_the_verdict_comes_from_the_cases_and_not_from_the_counts() -> None:
    result = results.run()
    assert views.view(result)["verdict"].startswith("RED: 4 of 5 judged cases did not pass in ")
    result["counts"] = {"pass": 6}
    view = views.view(result)
    assert view["colour"] == "red" and "the verdict is of the list" in view["warnings"][0]


@pytest.mark.parametrize(
    ("statuses", "colour"),
    [(["pass", "skip"], "green"), (["pass", "error"], "red"), (["skip"], "grey"), ([], "grey"),
     (["pass", "odd"], "red"), (["pass", None], "red")],
)  # fmt: skip
def test_only_passes_are_green(statuses: list[Any], colour: str) -> None:
    cases = [{"id": f"forward/{i}", "status": s} for i, s in enumerate(statuses)]
    view = views.view({"counts": {}, "cases": cases})
    assert view["colour"] == colour
    assert len(view["failures"]) == sum(s not in ("pass", "skip") for s in statuses)


def test_failures_of_one_kind_and_symptom_are_folded() -> None:
    def red(name: str, reason: str, **more: Any) -> dict[str, Any]:
        return {"id": name, "kind": name[:4], "status": "error", "reason": reason, **more}

    cases = [red("eplb/a", "lost 3 rows", shortened=True), red("eplb/b", "lost 5 rows"),
             red("eplb/c", "lost all"), red("layo/a", "lost 7 rows")]  # fmt: skip
    view = views.view({"counts": {}, "cases": cases})
    assert view["failing"] == 4
    folds = [(f["id"], f["same"], f["shortened"]) for f in view["failures"]]
    assert folds == [("eplb/b", ["eplb/a"], False), ("eplb/c", [], False), ("layo/a", [], False)]
    anchors = {c["id"]: c["anchor"] for c in view["cases"]}
    assert anchors == {"eplb/a": "f1", "eplb/b": "f1", "eplb/c": "f2", "layo/a": "f3"}
    assert "also eplb/a: lost N rows" in render("run", {"counts": {}, "cases": cases})


def test_a_failure_without_its_map_says_so() -> None:
    case = {"id": "eplb/a", "kind": "eplb", "status": "fail", "reason": "x", "shortened": True}
    result = {"counts": {}, "cases": [case]}
    assert b"kept the maps of its first fails only" in page("run", result)
    assert "kept the maps of its first fails only (--pictures N)" in render("run", result)


def test_a_backend_that_is_not_batch_invariant_is_named() -> None:
    facts = dict(dict(views.facts({"batch_invariant": False}))["Backend"])
    assert facts["batch-invariant"] == "no, by its own word"
    assert "batch-invariant" not in dict(dict(views.facts({}))["Backend"])


def test_the_commands_to_go_on_with_and_the_digests_of_the_backend_are_there() -> None:
    result = results.run() | {
        "next": ["next: megamoe explain forward/a --backend k.py:K"], "fingerprint": None,
        "file_sha256": "12ab", "modules_sha256": {"sums.py": "34cd"},
    }  # fmt: skip
    html = page("run", result).decode()
    assert "next: <code>megamoe explain forward/a --backend k.py:K</code> <button" in html
    assert "\nnext: megamoe explain forward/a --backend k.py:K\n" in render("run", result)
    facts = dict(dict(views.facts(result))["Backend"])
    assert (facts["sha256 of its file"], facts["sha256 of sums.py"]) == ("12ab", "34cd")


def test_one_shard_is_not_the_whole_run() -> None:
    assert "shard 1/4 only" in views.view(results.run() | {"shard": "1/4"})["warnings"][0]


def test_a_failure_has_what_is_needed_to_go_on() -> None:
    view = views.view(results.run())
    point = next(f for f in view["failures"] if f["id"] == results.POINT)
    assert point["command"] == (
        "megamoe check --backend path/to/faulty.py:Faulty --case forward/token-block-edge-t9 "
        "--golden 'my golden'"
    )
    assert point["breaks"] and ("tokens", "9") in point["sizes"]
    (y,) = point["stages"]
    assert (y["name"], y["outside"]) == ("y", 65)
    tokens, experts, _ = y["ranks"]
    assert tokens == {"name": "tokens", "shown": [("2", 64), ("0", 1)], "left": 0, "note": ""}
    assert experts["note"] == "; an element of y counts for each expert of its token"
    assert y["widths"] == "The envelope is one value for every element."
    assert "token 0 channel 0" in y["worst"] and "NaN on one side" in y["worst"]
    assert len(y["map"]["cells"]) == 9


def test_each_failure_has_the_line_that_check_would_end_with() -> None:
    """Had it judged this case alone: ``explain`` where that can name a cause."""
    steps = {f["id"]: f["next"] for f in views.view(results.run())["failures"]}
    more = " --backend path/to/faulty.py:Faulty --golden 'my golden'"
    for name in (results.POINT, results.STAGED, results.STAGING):
        assert steps.pop(name) == {"words": "next:", "command": f"megamoe explain {name}{more}"}
    (of_eplb,) = steps.values()
    assert of_eplb["words"].startswith("next: mend ")
    odd = {"counts": {}, "cases": [{"id": "forward/a", "status": "odd"}]}
    assert views.view(odd)["failures"][0]["next"] == {}, "nobody knows what it means"
    assert render("run", odd) and page("run", odd)
    line = "megamoe show forward/a, without a colon"
    assert failures.split(line) == {"words": line, "command": ""}


def test_the_map_shows_where() -> None:
    (y,) = views.view(results.run())["failures"][1]["stages"]
    cells = y["map"]["cells"]
    assert {i for i, line in enumerate(cells) if any(line)} == {0, 2}
    assert cells[0][0] == 8, "a NaN"
    wrong = [i for i, c in enumerate(cells[2]) if c]
    step = y["detail"]["map"]["channel_step"]
    assert wrong == list(range(64 // step, 128 // step))


def test_the_grid_counts_every_case_once() -> None:
    view = views.view(results.run())
    kinds = view["grid"]["kinds"]
    assert kinds == ["staging", "eplb", "forward", "errors", "layout"]
    chips = [chip for row in view["grid"]["rows"] for cell in row["cells"] for chip in cell]
    texts = sorted((c["state"], c["label"], c["text"]) for c in chips)
    assert texts == [
        ("bad", "", "✗ 1/1"), ("bad", "", "✗ 1/1"), ("bad", "I 128", "✗ 2/2"),
        ("none", "I 128", "– 1"), ("pass", "", "✓ 1"),
    ]  # fmt: skip
    linked = {c["anchor"] for c in chips if c["state"] == "bad"}
    assert linked < {f["anchor"] for f in view["failures"]}


def test_a_result_of_before_there_were_details_has_the_judges_map() -> None:
    result = results.run()
    for case in result["cases"]:
        case.pop("details", None)
        case.pop("sizes", None)
    failures = views.view(result)["failures"]
    tall = next(f for f in failures if f["id"] == results.STAGING)["stages"][0]
    assert tall["detail"] is None and tall["map"]["caption"].endswith("elements are outside")
    assert sum(map(any, tall["map"]["cells"])) == 1
    assert b"no shape" in page("run", result)


def test_bars_go_from_far_below_to_far_above() -> None:
    detail = {"below": {"1": 3, "7": 1}, "above": {"2": 4}, "inside": 9, "nan": 2, "zero": 0}
    assert draw.bars(detail) == [
        ("out", "≥ 64", 1), ("out", "16–63", 0), ("out", "8–15", 0), ("out", "4–7", 0),
        ("out", "2–3", 0), ("out", "1", 3), ("in", "inside", 9), ("out", "1", 0),
        ("out", "2–3", 4), ("nan", "NaN", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(("length", "step"), [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 4),
                                              (7, 5), (34, 5)])  # fmt: skip
def test_a_bar_holds_what_its_label_says(length: int, step: int) -> None:
    """Bit length 6 is 32 to 63 ULPs, 7 is 64 to 127."""
    smallest = 1 << (length - 1)
    label = draw.STEPS[draw.step_of(length)][0]
    low = int(re.findall(r"\d+", label)[0])
    assert draw.step_of(length) == step and low <= smallest


def test_the_png_is_one() -> None:
    rows = [[0, 1, 2], [8, 7, 6]]
    data = b64decode(draw.png(rows).partition(",")[2])
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        name, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            name + body
        )
        chunks[name] = body
        at += 12 + size
    assert struct.unpack(">IIB", chunks[b"IHDR"][:9]) == (3, 2, 4)
    assert zlib.decompress(chunks[b"IDAT"]) == bytes([0, 0x01, 0x20, 0, 0x87, 0x60])


# --- A/B and bisection ------------------------------------------------------------------------


def test_ab_leads_with_what_moved() -> None:
    view = compared.ab(results.ab())
    assert (view["verdict"], view["colour"]) == (results.ab()["headline"], "red")
    assert [c["status"] for c in view["cases"]] == ["moved", "error", "identical"]
    assert view["cases"][0]["more"] == ["judged by its golden: left pass, right fail"]
    assert compared.ab({"cases": [{"status": "identical"}]})["colour"] == "green"
    assert compared.ab({"cases": [{"status": "error"}]})["colour"] == "grey"
    assert compared.ab({"cases": []})["colour"] == "grey", "nothing compared is not the same"


def test_every_key_of_a_comparison_has_words() -> None:
    """A person who has not read the schema reads them in a table."""
    ab, bisect = (schemas()[name]["properties"] for name in ("ab", "bisect"))
    heads = {"cases", "steps", "headline", "left", "right", "subject", "first_bad", "last_good",
             "worst"}  # fmt: skip
    keys = {*ab, *ab["left"]["properties"], *bisect, *Worst.__dataclass_fields__} - heads
    assert keys <= {*words.FIELDS}
    for kind in RESULTS:
        names = re.findall("<dt>(.*?)</dt>", page(kind, RESULTS[kind]()).decode())
        assert names and not [name for name in names if "_" in name]
    assert (
        "<dt>of a later version</dt>"
        in page("ab", results.ab() | {"of_a_later_version": 3}).decode()
    ), "nothing is kept from the reader"


def test_the_walk_is_ordered_as_the_search_implies() -> None:
    steps = results.bisect()["steps"]
    places, has_positions = draw.order(steps)
    assert not has_positions
    points = [(s["rev"][:2], p) for s, p in zip(steps, places, strict=True)
              if s["verdict"] in ("good", "bad")]  # fmt: skip
    assert sorted(points) == sorted(points, key=lambda j: j[1])
    placed_steps = [step | {"position": int(step["rev"][:2])} for step in steps]
    places, has_positions = draw.order(placed_steps)
    assert has_positions and places[:3] == [0, 1, 31 / 63]


def test_a_bisection_that_found_nothing_says_so() -> None:
    view = compared.bisect({"steps": [{"verdict": "skip"}]})
    assert (view["verdict"], view["colour"]) == ("No first bad one was found", "grey")


# --- every kind -------------------------------------------------------------------------------


def _cut(value: Any) -> Any:
    """Every result that lacks one key, or has something else there, one after the other."""
    if isinstance(value, dict):
        for key in value:
            yield {k: v for k, v in value.items() if k != key}
            for odd in (None, [], {}, "odd", -1, [None], {"a": None}):
                yield {**value, key: odd}
            for below in _cut(value[key]):
                yield {**value, key: below}
    elif isinstance(value, list) and value:
        yield from ([below, *value[1:]] for below in _cut(value[0]))
        yield [7, *value[1:]]


@pytest.mark.parametrize("kind", RESULTS)
def test_whatever_is_missing_there_is_a_report(kind: str) -> None:
    result = copy.deepcopy(RESULTS[kind]())
    if kind == "run":  # one case with everything, so that it stays quick
        result["cases"] = [c for c in result["cases"] if c["id"] == results.STAGED]
        result["cases"][0]["findings"] = result["cases"][0]["findings"][:1]
        result["cases"][0]["findings"][0]["grid"] = [[1, 0, 1]]
    whole = {"run": views.view, "ab": compared.ab, "bisect": compared.bisect}[kind]
    count = 0
    for count, less in enumerate(_cut(result)):
        whole(less)
        if count % 7 == 0:
            assert page(kind, less).endswith(b"</html>")
            render(kind, less)
    assert count > 50


@pytest.mark.parametrize("kind", RESULTS)
def test_what_a_result_says_is_never_markup(kind: str) -> None:
    text = page(kind, RESULTS[kind]()).decode()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert text.count("<script>") == 1


@pytest.mark.parametrize("kind", RESULTS)
def test_the_file_names_no_other(kind: str) -> None:
    text = page(kind, RESULTS[kind]()).decode()
    assert not re.search(r"https?:|url\(|@import|<link|<iframe|src=\"(?!data:image/png)", text)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("kind", RESULTS)
def test_the_terminal_says_the_same(kind: str) -> None:
    out = render(kind, RESULTS[kind]())
    whole = {"run": views.view, "ab": compared.ab, "bisect": compared.bisect}[kind]
    assert out.startswith(whole(RESULTS[kind]())["verdict"])
    for text in {
        "run": [
            "alone:  megamoe check",
            "next: megamoe explain forward/",
            "tokens  2: 64, 0: 1",
            "1 ULP above",
            draw.SCALE,
            "9 tokens down",
        ],
        "ab": ["l2_acts *", "identical: 1 of 3 cases", "it ended"],
        "bisect": ["first bad: 41a", "does not build", "older"],
    }[kind]:
        assert text in out


def four_hundred() -> dict[str, Any]:
    """400 cases that failed, each with three stages of noise, the largest map there can be."""
    result = results.run()
    case = next(c for c in result["cases"] if c["id"] == results.STAGED)
    stage, detail = case["findings"][0], case["details"][0]
    cases = []
    for i in range(400):
        random = Random(i)
        noise = ["".join(random.choices(".1248acz", k=64)) for _ in range(48)]
        detail["map"] |= {"cells": noise, "rows": 48, "row_step": 1}
        three = [({**stage, "stage": n}, {**detail, "stage": n}) for n in ("x", "l2_acts", "y")]
        cases.append(case | {
            "id": f"forward/case-{i}", "reason": f"{letters(i)} {case['reason']}",
            "findings": [f for f, _ in three],
            "details": copy.deepcopy([d for _, d in three]),
        })  # fmt: skip
    return result | {"cases": cases, "counts": {"fail": 400}}


def test_four_hundred_failures_stay_below_two_mebibytes(tmp_path: Path) -> None:
    path, out = write(tmp_path, four_hundred()), tmp_path / "report.html"
    assert main(["report", str(path), "-o", str(out)]) == 0
    text = out.read_text()
    assert out.stat().st_size < 2 << 20
    assert text.count('class="failure fail') + text.count("failure brief") == 400
    assert "left out to keep this file below 2 MiB" in text
    assert text.count("--case forward/case-399") == 1, "the last one's command is there too"


def test_a_thousand_long_lines_stay_below_two_mebibytes() -> None:
    """Nothing is silently lost: the page says how many are in the JSON only."""
    long, raw = "ü" * 900, "<" * 2000
    cases = [
        {"id": f"forward/{i}-{long}", "status": "error", "reason": letters(i) + raw}
        for i in range(3000)
    ]
    html = page("run", {"counts": {}, "cases": cases}).decode()
    assert len(html.encode()) < 2 << 20
    assert "further failures are in the JSON only" in html
    assert "RED: 3000 of 3000" in html


def test_one_thing_is_said_in_the_singular() -> None:
    left_out = environment().get_template("parts.html").module.left_out
    assert "1 more case is left out" in left_out(1, "case")
    assert "2 more cases are left out" in left_out(2, "case") and not left_out(0, "case")
    one = {"hits": 1, "calls": 1, "dimensions": [{"name": "d", "entered": 1}]}
    traffic = covered.view({"traffic": one})["traffic"]
    assert traffic["summary"].startswith("1 captured call enters 1 class;")


def test_a_map_without_details_is_labelled_by_tokens() -> None:
    finding = {"shape": [4, 2], "grid": [[3, 1, 5]], "tokens": [0, 8, 63, 64]}
    token_map = failures._map(finding, None)
    assert token_map is not None and (token_map["first"], token_map["last"]) == ("0", "64")
    usual = failures._map({**finding, "tokens": []}, None)
    assert usual is not None and (usual["first"], usual["last"]) == ("0", "3")
