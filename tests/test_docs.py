"""The pages name what is there: modules, files, links, and the rooms with what they import."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BESIDE = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")]
PAGES = [ROOT / "README.md", *BESIDE, *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
EVERY = pytest.mark.parametrize("page", PAGES, ids=NAMES)
ROOMS = sorted(path.parent.name for path in (ROOT / "megamoe").glob("*/__init__.py"))
UP = {("judge", "golden"), ("layer", "backends")}
"""Arrows of docs/development.md that go up; it names both."""


@EVERY
def test_every_path_is_there(page):
    paths = re.findall(
        r"(?<![\w/.])((?:megamoe|tests|tools)/(?:[\w/-]*\w\.(?:py|toml|json|sh)|[\w/]*/(?!\w)))",
        page.read_text(),
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


@EVERY
def test_every_dotted_name_is_there(page):
    for name in sorted(set(re.findall(r"(?<![\w/.-])megamoe(?:\.[a-z]\w*)+", page.read_text()))):
        pkgutil.resolve_name(name)


@EVERY
def test_every_link_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_first_page_leads_to_every_other():
    """By links and paths, from the README on."""
    pages, queue = set(), [ROOT / "README.md"]
    while queue:
        page = queue.pop()
        pages.add(page)
        text = page.read_text()
        near = [page.parent / link for link in re.findall(r"\]\(([^)#\s]+\.md)", text)]
        near += [ROOT / path for path in re.findall(r"docs/[\w/-]+\.md", text)]
        if "docs/decisions/" in text:
            near += (ROOT / "docs/decisions").glob("*.md")
        queue += [p.resolve() for p in near if p.is_file() and p.resolve() not in pages]
    assert sorted(set(PAGES) - pages) == []


# --- the rooms --------------------------------------------------------------------------------


def table():
    """Room -> those that it may import, by docs/development.md, from the top down."""
    text = (ROOT / "docs/development.md").read_text().partition("## Where to add")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| (.+) \|$", text, re.MULTILINE)
    return {
        room: set(ROOMS) - {room} if cell == "all rooms" else set(re.findall(r"`(\w+)`", cell))
        for room, cell in rows
    }


def imported(room):
    """Rooms whose modules ``room`` imports, for types only or not."""
    out = set()
    for path in (ROOT / "megamoe" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{a.name}" for a in node.names]
            out |= {n.split(".")[1] for n in names if n.startswith("megamoe.")}
    return out & set(ROOMS) - {room}


def test_every_room_is_in_the_table():
    assert sorted(table()) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_table_says(room):
    # A kind's record names types of the rooms above it.
    types = {"golden", "judge", "worker"} if room == "cases" else set()
    assert imported(room) - types <= table()[room]


def test_arrows_go_down_but_for_two():
    order = list(table())
    arrows = {(room, other) for room, others in table().items() for other in others}
    assert {(a, b) for a, b in arrows if order.index(b) < order.index(a)} == UP


# --- the words --------------------------------------------------------------------------------


def test_the_glossary_is_in_the_order_of_the_alphabet():
    text = (ROOT / "docs/glossary.md").read_text()
    words = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[1:]
    assert len(words) > 60 and words == sorted(words, key=str.lower)


def test_the_contract_page_has_every_revision_and_every_clause_that_differs():
    from megamoe.spec.contract import BASE, REVISIONS

    text = (ROOT / "docs/contract.md").read_text()
    assert [name for name in REVISIONS if f"| `{name}` |" not in text] == []
    differing = {name for c in REVISIONS.values() for name in BASE.differences(c)}
    # staging_exponent_max stands beside its minimum as `_max`.
    assert sorted(n for n in differing if n not in text) == ["staging_exponent_max"]


def test_counts_of_cases_are_those_of_the_tree():
    """Counts of other days stand beside a date, and are not looked at here."""
    from megamoe.cases import golden_root, load_entries
    from megamoe.golden.documents import manifest_of
    from megamoe.spec.features import DIALECT_FORMATS

    entries = load_entries()
    forward = {entry.id for entry in entries if entry.kind == "forward"}
    points = dict.fromkeys(forward, True)
    for key, golden in manifest_of(golden_root())["cases"].items():
        name = key.partition("@")[0]
        if name in forward:
            points[name] &= bool(golden["zero_freedom"])
    readme = (ROOT / "README.md").read_text()
    assert f"It has {len(entries)} cases." in readme
    assert f"*zero freedom*: {sum(points.values())} of the {len(forward)} forward cases" in readme
    goldens = (ROOT / "docs/goldens.md").read_text()
    # A case of a dialect begins with the name of its format.
    dialects = tuple(f"forward/{name}-" for name in DIALECT_FORMATS)
    of_megamoe = [name for name in forward if not name.startswith(dialects)]
    assert re.search(rf"kernel, all {len(of_megamoe)}\s+forward cases under each", goldens)


def test_the_layer_in_order_has_the_values_of_the_newest_contract():
    """Its numbers are clauses; its form of the scale byte is what eager computes."""
    import torch

    from megamoe.layer.staging import ue8m0_ceil
    from megamoe.spec.contract import NEWEST

    text = (ROOT / "docs/layer.md").read_text()
    floor, low, high = (
        NEWEST.staging_amax_floor.value, NEWEST.staging_exponent_min.value,
        NEWEST.staging_exponent_max.value,
    )  # fmt: skip
    assert f"contract `{NEWEST.revision}`" in text and floor == float("1e-4")
    assert "max(max |h|, 1e-4)" in text and f"below {low} becomes {low}. An infinite `s`" in text
    assert f"such power, and gives {high}." in text
    floor_r = NEWEST.requant_exponent_min.value
    assert f"a result below {floor_r} becomes {floor_r}." in text
    assert "max((bits(a) + 0x1FFFFF >> 23), 113) - 8" in text
    a = torch.cat(
        [
            torch.rand(9999) * 2.0 ** torch.arange(-90, 9).repeat(101),
            448.0 * 2.0 ** torch.arange(-22, 9),
        ]
    )
    byte = ((a.view(torch.int32).long() + 0x1FFFFF) >> 23).clamp_min(113) - 8
    assert torch.equal(byte, ue8m0_ceil(a / 448).long().clamp_min(105))
    assert (NEWEST.routing_weight.value, NEWEST.bf16_before_requant.value) == ("activation", False)
    assert (NEWEST.gate_clamped_below.value, NEWEST.clamp_drops_nan.value) == (False, True)
    assert NEWEST.combine_order.value == "ascending-slot"


def test_the_layer_in_order_says_what_an_infinity_gives_and_how_far_exp_may_err():
    import numpy as np

    from megamoe.oracle.elementary import EXPF_ULPS, fast_exp_ulps
    from megamoe.oracle.groups import scaled_codes
    from megamoe.oracle.staging import quantize
    from megamoe.oracle.swiglu import requant_exponent
    from megamoe.spec.contract import NEWEST
    from megamoe.spec.formats import bf16_round

    text = " ".join((ROOT / "docs/layer.md").read_text().split())
    values = np.zeros((1, 32), np.float32)
    values[0, :4] = [np.inf, -np.inf, 2.0**119, 2.0**117]
    codes, byte = quantize(bf16_round(values), NEWEST)
    assert (byte.tolist(), codes[0, :4].tolist()) == ([[254]], [0x7E, 0xFE, 0x02, 0x00])
    assert "has the byte 254" in text and "2^119 becomes 0x02, and all from 2^117 down" in text
    byte = requant_exponent(np.array([[np.inf]], np.float32), NEWEST)
    assert byte == 247 and scaled_codes(values, byte, NEWEST)[0, :2].tolist() == [0x7E, 0xFE]
    assert "An infinite `a` gives 247, and the infinity itself becomes 0x7E or 0xFE" in text
    gate = np.array([-3.21875])
    assert fast_exp_ulps(gate) == 2 + np.floor(1.173 * np.abs(gate))
    assert f"| `exp(-gate)` | {EXPF_ULPS:.0f} ulp | `2 + floor(1.173 abs(gate))` ulp |" in text
    product = np.float32(3.21875) * np.float32(np.log2(np.e))
    power = np.float32(2.0 ** np.float64(product))
    off = abs(float(power) - np.exp(3.21875)) / np.spacing(power)
    assert off > EXPF_ULPS and "errs by more than 2 ulp at some gates, such as -3.21875" in text
