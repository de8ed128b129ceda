"""Results of published kernels: what is refused, the table of the docs, and the static site."""

from __future__ import annotations

import copy
import json
import os
import re
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megamoe.commands.main import main
from megamoe.kernels import results
from megamoe.report.site import badge_file, case_file, site, write
from tests.helpers import chromium
from tests.helpers.schemas import valid

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "docs/kernels/results").glob("*.json"))
NASTY = "<script>alert(1)</script>\u202e"


def result(**more):
    """A result of the remap with one pass, one fail and one skip."""
    cases = [
        {"id": f"eplb/{name}", "kind": "eplb", "status": status, "reason": NASTY}
        for name, status in (("a", "pass"), ("b", "fail"), ("c", "skip"))
    ]
    document = {
        "backend": "vllm-eplb", "contract": "2026-06", "device": "cuda",
        "options": " --device cuda", "tier": "full", "kind": "eplb", "case": None, "cases": cases,
        "versions": {"megamoe": "0.1.0", "vllm": "0.24.0"},
        "machine": {"processor": "x86_64", "gpu": NASTY, "driver": "580"},
        "fingerprint": {"sources": "00", "options": "vllm 0.24.0"},
    }  # fmt: skip
    return {**copy.deepcopy(document), **more}


@pytest.fixture
def read(tmp_path):
    def write_and_read(name="one.json", **more):
        (tmp_path / name).write_text(json.dumps(result(**more)))
        return results.read(tmp_path / name)

    return write_and_read


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_each_result_of_the_docs_is_valid(file):
    results.read(file)
    valid("kernel", json.loads(file.read_text()))


def test_the_table_of_the_docs_is_that_of_the_results():
    text = (ROOT / "docs/kernels.md").read_text()
    part = text.partition("<!-- results -->\n")[2].partition("<!-- end of results -->")[0]
    assert part.strip() == results.markdown(results.read_all(FILES)).strip()


@pytest.mark.parametrize(
    ("more", "message"),
    [({"machine": {}}, "the provenance lacks machine; it is refused"),
     ({"machine": {"gpu": ""}}, "lacks machine"),
     ({"versions": {"vllm": "0.24.0"}}, "lacks versions of megamoe"),
     ({"contract": " "}, "lacks contract"),
     ({"versions": {"megamoe": "1"}, "fingerprint": None}, "lacks the version of vllm"),
     ({"options": None}, "needs versions, machine and options"),
     ({"cases": [{"id": "a", "kind": "eplb", "status": "ok"}]}, "status"),
     ({"backend": "eager"}, "'eager' is no kernel")],
)  # fmt: skip
def test_a_result_without_provenance_is_refused_with_one_line(
    read, tmp_path, capsys, more, message
):
    with pytest.raises(ValueError, match=re.escape(message)):
        read(**more)
    assert main(["kernels", "--results", str(tmp_path / "one.json")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_key_that_lacks_is_named(tmp_path):
    for key in ("versions", "machine", "options", "cases"):
        document = result()
        del document[key]
        (tmp_path / "one.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match=f"{key}"):
            results.read(tmp_path / "one.json")


def test_two_results_of_one_name_are_refused(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "one.json").write_text(json.dumps(result()))
    with pytest.raises(ValueError, match=r"two results are named one\.json"):
        results.read_all([tmp_path / folder / "one.json" for folder in "ab"])


@pytest.mark.parametrize(
    ("counts", "colour"),
    [({"pass": 2, "fail": 1}, "red"), ({"pass": 2, "error": 1}, "red"), ({"pass": 1}, "green"),
     ({"skip": 3}, "grey"), ({"not-provided": 1}, "grey"), ({"pass": 1, "not-run": 1}, "grey"),
     ({"pass": 1, "skip": 1}, "green"), ({}, "grey")],
)  # fmt: skip
def test_a_skip_is_no_pass(counts, colour):
    assert results.verdict(counts) == colour


def test_the_command_says_what_the_run_took(read):
    one = read(case="eplb/a", fingerprint={"sources": "0", "options": "vllm 1 (wheel), Triton's "
                                           "interpreter"})  # fmt: skip
    assert one.command == (
        "MEGAMOE_VLLM_WHEEL=FILE.whl TRITON_INTERPRET=1 megamoe check --backend vllm-eplb "
        "--kind eplb --case eplb/a --device cuda"
    )
    one = read(case="eplb/a", fingerprint={"sources": "0", "options": "MEGAMOE_TORCH_FAST_ACCUM=1"})
    assert one.command.startswith("MEGAMOE_TORCH_FAST_ACCUM=1 megamoe check --backend vllm-eplb")
    one = read(environment={"HUMMING_COMPILER": "nvcc"})
    assert one.command.startswith("HUMMING_COMPILER=nvcc megamoe check --backend vllm-eplb")
    with pytest.raises(ValueError, match="environment"):
        read(environment={"HUMMING_COMPILER": 1})


# --- the site --------------------------------------------------------------------------------


def test_each_link_of_the_site_leads_to_a_page(read):
    pages = site([read(), read("two.json", contract="2026-09")])
    for name, content in pages.items():
        for link in re.findall(r'href="([^"#]+)"', content.decode()):
            assert unescape(link) in pages, (name, link)
    assert {case_file(f"eplb/{name}") for name in "abc"} < set(pages)
    assert {badge_file("vllm-eplb", c) for c in ("2026-06", "2026-09")} < set(pages)


def test_nothing_of_a_result_is_markup(read):
    for name, content in site([read()]).items():
        assert b"<script>alert" not in content, name
        assert "\u202e" not in content.decode()


def test_files_have_names_of_their_own(read):
    ids = ["eplb/../../a", "eplb/a b", "eplb/a-b", "eplb--a-b", "é/" + "x" * 300]
    names = {case_file(one) for one in ids}
    assert len(names) == len(ids)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) for name in names)


def test_a_badge_shows_the_counts_of_its_contract_alone(read):
    green = read("two.json", contract="2026-09", cases=[result()["cases"][0]])
    pages = site([read(), green])
    red, one = (pages[badge_file("vllm-eplb", c)] for c in ("2026-06", "2026-09"))
    texts = ElementTree.fromstring(one).iter("{http://www.w3.org/2000/svg}text")
    assert [t.text for t in texts] == ["vllm-eplb · 2026-09", "1 pass"]
    assert b"1 pass, 1 fail, 1 skip" in red and b"#b3261e" in red and b"#1b6e3c" in one


def test_the_verb_writes_the_site(tmp_path, capsys):
    assert main(["kernels", "--report", str(tmp_path / "out")]) == 2
    assert "--report needs --results" in capsys.readouterr().err
    command = ["kernels", "--results", *map(str, FILES), "--report"]
    assert main([*command, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/index.html").read_text().startswith("<!doctype html>")
    (tmp_path / "file").touch()
    assert main([*command, str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_the_site_in_a_browser(read, tmp_path):
    path = chromium.find()
    if path is None:
        message = "no Chromium on the path, and MEGAMOE_CHROMIUM does not name one"
        if os.environ.get("MEGAMOE_REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"{message}, although MEGAMOE_REQUIRE_CHROMIUM=1")
        pytest.skip(message)
    from tests.test_report_browser import CONTRAST

    files = write([read()], tmp_path / "out")
    with chromium.Chromium(path) as browser:
        for file in files:
            browser.open(file)
            if file.suffix == ".html":
                assert browser.js("document.querySelector('h1').checkVisibility()"), file
                assert browser.js(CONTRAST) == [], file
            else:
                assert browser.js("document.documentElement.tagName") == "svg"
            assert browser.complaints() == [], file
        browser.open(files[0])
        target = browser.js("document.querySelector('tbody a').href")
        assert Path(target).name == "kernel-vllm-eplb.html"
