"""The report in a real headless Chromium: opened from the disk, found, driven by keys, printed."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megamoe.report.page import page
from tests.helpers import chromium, results

RESULTS = {"run": results.run, "ab": results.ab, "bisect": results.bisect}

EVERYTHING = {
    "run": [
        ".red #verdict h1", "#counts li.fail b", "#toolchain dl", "#grid td .chip.bad",
        "#grid td .chip.pass", "#f1.failure.fail", "#f4.failure.error", ".failure .breaks",
        ".failure .command code", ".copy", ".failure .worst", "figure.map img",
        "figure.histogram svg path.out", "figure.histogram svg path.in", ".rank li b", ".legend",
        "#unjudged li", "#cases tr.pass", "#cases tr.fail a", "#cases tr.not-provided",
        "#filter", ".keys kbd",
    ],
    "ab": ["#verdict h1", "#sides dl", "#comparison tr.moved th", "#comparison td.first",
           "#comparison tr.error", "#comparison tr.identical"],
    "bisect": ["#verdict h1", "#found dl", "svg.walk .good circle", "svg.walk .bad path",
               "svg.walk .skip path", "svg.walk .flaky path", "svg.walk .left", "tr.skip",
               "tr.flaky", "tr.bad"],
}  # fmt: skip

HIDDEN = """[...document.querySelectorAll(%r)].filter(e => !e.checkVisibility() ||
    e.getBoundingClientRect().width === 0 || e.getBoundingClientRect().right <= 0).length"""

CONTRAST = """(() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = (c) => {
    const [r, g, b] = c.map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c.slice(0, 3);
    }
    return rgb(getComputedStyle(document.documentElement).colorScheme === 'dark' ? '0 0 0'
                                                                               : '255 255 255');
  };
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || e.closest('script, style') ||
        ![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    const style = getComputedStyle(e);
    const ink = rgb(e.closest('svg') ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${e.tagName}.${e.className} ${e.textContent}`);
  }
  return low;
})()"""
"""Texts whose contrast with what is behind them is below 4.5 : 1 (WCAG 2 AA)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Chromium]:
    path = chromium.find()
    if path is None:
        reason = "no Chromium on the path, and MEGAMOE_CHROMIUM does not name one"
        if os.environ.get("MEGAMOE_REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"{reason}, although MEGAMOE_REQUIRE_CHROMIUM=1")
        pytest.skip(reason)
    with chromium.Chromium(path) as chrome:
        yield chrome


@pytest.fixture
def opened(browser: chromium.Chromium, tmp_path: Path) -> Any:
    """``opened(kind)``: the report of that kind, as a person opens it, in a window of its own."""

    def open_(kind: str, **more: Any) -> chromium.Chromium:
        file = tmp_path / f"{kind}.html"
        file.write_bytes(page(kind, RESULTS[kind]() | more))
        browser.media()
        browser.width(1280)
        browser.open(file)
        return browser

    return open_


@pytest.mark.parametrize("kind", RESULTS)
def test_everything_is_there_and_can_be_seen(kind: str, opened: Any) -> None:
    browser = opened(kind)
    for selector in EVERYTHING[kind]:
        count = browser.js(f"document.querySelectorAll({selector!r}).length")
        assert count, f"{selector} is missing"
        assert browser.js(HIDDEN % selector) == 0, f"{selector} cannot be seen"


@pytest.mark.parametrize("kind", RESULTS)
def test_it_asks_for_nothing_and_complains_of_nothing(kind: str, opened: Any) -> None:
    browser = opened(kind)
    browser.js("new Promise(done => setTimeout(done, 200))")
    assert browser.complaints() == []
    (only,) = browser.requests()
    assert only.startswith("file:///") and only.endswith(f"{kind}.html")


def test_what_a_backend_says_does_not_run_even_if_it_were_markup(opened: Any) -> None:
    """The policy of the page is the second wall: the first is that everything is escaped."""
    browser = opened("run")
    assert browser.js("document.querySelectorAll('script').length") == 1
    browser.js(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s); })()"
    )
    assert browser.js("window.ran") is None
    assert any("Content Security Policy" in line for line in browser.complaints())


def test_every_map_is_a_picture_of_its_cells(opened: Any) -> None:
    browser = opened("run")
    sizes = browser.js(
        "[...document.querySelectorAll('.map img')].map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert sizes and all(width > 1 and height > 0 for width, height in sizes)
    assert [64, 9] in sizes, "9 tokens in lines of their own"
    assert browser.js("[...document.querySelectorAll('.map img')].every(i => i.alt)")


def test_links_lead_somewhere(opened: Any) -> None:
    dead_links = "[...document.links].filter(a => !document.querySelector(a.getAttribute('href')))"
    assert opened("run").js(f"{dead_links}.length") == 0
    assert opened("run").js("document.links.length") > 5
    twice = "(i => i.length - new Set(i).size)([...document.querySelectorAll('[id]')].map(e=>e.id))"
    assert opened("run").js(twice) == 0


def test_the_keyboard_reaches_everything(opened: Any) -> None:
    browser = opened("run")
    here = "document.activeElement"
    browser.press("Tab")
    assert browser.js(f"{here}.textContent") == "Skip to the findings"
    assert browser.js(f"{here}.getBoundingClientRect().left") >= 0, "it shows when it has focus"
    browser.press("Enter")
    assert browser.js(f"{here}.id") == "main"

    folds = "[...document.querySelectorAll('.failure details')].map(d => d.open)"
    browser.press("e")
    assert browser.js(folds) == [False] * 4
    browser.press("j")
    browser.press("j")
    assert browser.js(f"{here}.id") == "f2" and browser.js(folds) == [True, True, False, False]
    browser.press("k")
    assert browser.js(f"{here}.id") == "f1"
    browser.press("Tab")
    assert browser.js(f"{here}.tagName") == "SUMMARY"
    browser.press("Enter")
    assert browser.js(folds)[0] is False, "a fold is a button"

    browser.press("/")
    assert browser.js(f"{here}.id") == "filter"
    for letter in "jek":
        browser.press(letter)
    assert browser.js("filter.value") == "jek", "letters in the field are no commands"
    assert browser.js("found.textContent") == "0 of 6"
    browser.js("filter.value = 'fail'; filter.dispatchEvent(new Event('input'))")
    rows = "[...document.querySelectorAll('#cases tbody tr')].filter(r => r.checkVisibility())"
    assert browser.js(f"{rows}.length") == 3 and browser.js("found.textContent") == "3 of 6"
    browser.press("Escape")
    assert browser.js(f"{here}.id") != "filter"
    assert browser.complaints() == []


def test_a_link_to_a_folded_failure_unfolds_it(opened: Any) -> None:
    browser = opened("run")
    browser.press("e")
    browser.js("document.querySelector('#cases tr.error a').click()")
    browser.js("new Promise(done => setTimeout(done, 50))")
    assert browser.js("document.querySelector('#f4 details').open")
    assert browser.js("document.activeElement.id") == "f4"


def test_the_command_that_explains_a_failure_can_be_copied(opened: Any) -> None:
    browser = opened("run")
    browser.js("document.querySelector('#f2 .next .copy').click()")
    browser.js("new Promise(done => setTimeout(done, 100))")
    label = browser.js("document.querySelector('#f2 .next .copy').textContent")
    assert label in ("copied", "selected")
    if label == "selected":
        assert browser.js("getSelection().toString()").startswith("megamoe explain forward/")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", RESULTS)
def test_every_text_can_be_read_in_both_schemes(kind: str, scheme: str, opened: Any) -> None:
    browser = opened(kind)
    browser.media(scheme=scheme)
    ground = browser.js("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 22, 27)"}[scheme]
    assert browser.js(CONTRAST) == []


def test_on_paper_nothing_is_folded_and_nothing_is_for_clicking(opened: Any) -> None:
    browser = opened("run")
    browser.press("e")
    visibility = "document.querySelector('#f1 .map img').checkVisibility()"
    assert not browser.js(visibility)
    browser.media("print", "dark")
    assert browser.js(visibility), "a closed fold is open on paper, without a script too"
    for clicked in (".copy", ".filter", ".keys", "nav"):
        assert not browser.js(f"document.querySelector('{clicked}').checkVisibility()"), clicked
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.js(CONTRAST) == []
    browser.media()
    paper = browser.pdf()
    assert paper.startswith(b"%PDF") and len(paper) > 20_000
    assert not browser.js(visibility), "and folded again afterwards"


def many(count: int, apart: bool) -> list[Any]:
    """Cases of a run, and ``count`` more fails: of three symptoms, or ``apart``: of one each."""
    report = results.run()
    bad = [case for case in report["cases"] if case["status"] == "fail"]
    for i in range(count):
        case = copy.deepcopy(bad[i % len(bad)])
        case["id"] = f"{case['kind']}/a-case-with-a-name-of-usual-length-{i}-h7168-i3072"
        if apart:
            name = "".join(chr(97 + int(digit)) for digit in str(i))
            case["reason"] = f"stage {name} has a reason of some length; {case['reason']}"
        report["cases"].append(case)
    return list(report["cases"])


def test_failures_of_one_symptom_are_one_with_a_count(opened: Any) -> None:
    browser = opened("run", cases=many(100, apart=False))
    assert browser.js("document.querySelectorAll('.failure').length") == 4
    counts = "[...document.querySelectorAll('.many')].map(e => e.textContent).join()"
    assert browser.js(counts) == "× 35,× 34,× 34"
    assert browser.js("document.querySelector('#failures h2').textContent") == (
        "Failures 104 of 4 symptoms"
    )
    dead_links = "[...document.links].filter(a => !document.querySelector(a.getAttribute('href')))"
    assert browser.js(f"{dead_links}.length") == 0
    assert browser.js("document.querySelectorAll('#cases tr.fail a').length") == 103


@pytest.mark.parametrize("apart", [False, True])
def test_a_hundred_failures_are_less_than_ten_pages_of_paper(apart: bool, opened: Any) -> None:
    browser = opened("run", cases=many(100, apart))
    assert 1 < browser.pdf().count(b"/Type /Page\n") < 10
    browser.media("print")
    pictures = "[...document.querySelectorAll('.map img')].filter(e => e.checkVisibility()).length"
    assert browser.js(pictures) >= 4, "some have pictures on paper"
    later = "[...document.querySelectorAll('.later %s')].filter(e => e.checkVisibility()).length"
    assert browser.js(later % ".next code") == (101 if apart else 1), "what explains it is there"
    assert browser.js(later % ":is(.stage, .how, .breaks)") == 0, "the rest of it is not"
    hints = "[...document.querySelectorAll('.hint.paper')].map(e => e.textContent).join(' ')"
    assert "the first 3 have pictures, the others a line" in browser.js(hints)
    assert "all cases (106) is not printed" in browser.js(hints)


def test_at_390_pixels_nothing_is_cut_and_the_legend_can_be_read(opened: Any) -> None:
    browser = opened("run", cases=many(20, apart=False))
    browser.width(390)
    beyond = """[...document.querySelectorAll('body *')].filter(e => e.checkVisibility() &&
        e.getBoundingClientRect().width && e.getBoundingClientRect().right > innerWidth + 1 &&
        !e.closest('.jump')).map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""
    assert browser.js(beyond) == []
    hidden = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth)"
    assert browser.js(f"{hidden}.length") == 0, "no table scrolls sideways"
    legend = browser.js("document.querySelector('.legend').textContent")
    assert "bars are logarithmic" in legend
    size = "parseFloat(getComputedStyle(document.querySelector('.legend span')).fontSize)"
    assert browser.js(size) > 11
    sizes = """[...document.querySelectorAll('.hist text')].map(e =>
        parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"""
    assert min(browser.js(sizes)) > 8, "numbers of a histogram can be read"
    kinds = "[...document.querySelectorAll('#grid td:not(:empty)')].map(e => e.dataset.kind)"
    assert browser.js(kinds) and all(browser.js(kinds)), "each cell says its kind"


@pytest.mark.parametrize("kind", RESULTS)
@pytest.mark.parametrize("width", [380, 718])
def test_a_narrow_window_or_paper_does_not_scroll_sideways(
    kind: str, width: int, opened: Any
) -> None:
    browser = opened(kind)
    browser.width(width)
    assert browser.js("document.documentElement.scrollWidth") <= width


def test_it_reads_without_its_script(opened: Any) -> None:
    """What only the script can do is not even offered."""
    browser = opened("run")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.reload")
        browser._until(lambda: browser.events[-1]["method"] == "Page.frameStoppedLoading")
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
        assert browser.js(HIDDEN % "#verdict h1, #f1 .map img, #cases tr.pass") == 0
        controls = "[...document.querySelectorAll('.copy, .filter, .keys')]"
        assert browser.js(f"{controls}.filter(e => e.checkVisibility()).length") == 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
