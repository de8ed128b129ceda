"""Builds of the kernel by their headers, and the command ``megamoe contract``."""

import dataclasses
import hashlib
import sys
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import pytest

from megamoe.cases import load_cases
from megamoe.commands import contract as verb
from megamoe.commands.main import main
from megamoe.spec import builds
from megamoe.spec.builds import BUILDS, HEADERS, KERNEL, Build, build_of, detect, installed_packages
from megamoe.spec.contract import BASE, REVISIONS, Clause

ROOT = Path(__file__).resolve().parents[1]
REVISION_NAMES = {"2026-06", "2026-09", "2026-11", "sgl"}
PATHS = [header.path for header in HEADERS]


def texts(word: str, **others: str) -> dict[str, str]:
    """Path -> text of the six headers; `others` by the first part of the path."""
    return {path: others.get(path.split("/")[0], word) for path in PATHS}


def build(name: str, files: dict[str, str], **fields) -> Build:
    hashes = {p: hashlib.sha256(t.encode()).hexdigest()[:16] for p, t in files.items()}
    return Build(name, **{"revision": BASE.revision, "differs": {}, "notes": ()} | fields,
                 hashes=hashes)  # fmt: skip


OLD = texts("old")
NEW = texts("new", ptx="old")
ASIDE = texts("old", layout="aside", scheduler="aside")


@pytest.fixture(autouse=True)
def table(request, monkeypatch):
    """A table of our own, but for the tests that look at the real one."""
    if "real" not in request.fixturenames:
        entries = (
            build("old 1", OLD),
            build("old 2", OLD),
            build("new 1", NEW, revision="2099-01", differs={"precise_silu": "g*(1/d)"}),
            build("side 1", ASIDE, differs={"precise_silu": "g*(1/d)"}, notes=("a note",)),
        )
        monkeypatch.setattr(builds, "BUILDS", {b.name: b for b in entries})


@pytest.fixture
def real():
    """The table as it is shipped."""


def package(root: Path, files: dict[str, str], nested: str = "include/deep_gemm") -> Path:
    for path, text in files.items():
        (root / nested / path).parent.mkdir(parents=True, exist_ok=True)
        (root / nested / path).write_text(text)
    return root


# --- the table ----------------------------------------------------------------------------------


def test_the_real_table(real):
    assert len(BUILDS) == 34  # names are unique, or reading the table would have raised
    for b in BUILDS.values():
        assert list(b.hashes) == PATHS
        assert all(len(h) == 16 and int(h, 16) >= 0 for h in b.hashes.values()), b.name
        assert b.revision in REVISION_NAMES
    assert len({b.hashes[KERNEL] for b in BUILDS.values()}) == 17
    assert KERNEL == "impls/sm100_fp8_fp4_mega_moe.cuh"
    assert {h.path for h in HEADERS if not h.bits} == {
        "layout/mega_moe.cuh", "scheduler/mega_moe.cuh",
    }  # fmt: skip
    assert all(h.why for h in HEADERS)


def test_one_set_of_headers_stands_once(real):
    tables = tomllib.loads((ROOT / "megamoe/spec/builds.toml").read_text())["headers"]
    assert len({tuple(t["sha256"]) for t in tables}) == len(tables)


def test_a_difference_is_one(real):
    """Where the revision and the clause are written down, the build's value is another."""
    for b in BUILDS.values():
        for clause, value in b.differs.items():
            base = getattr(REVISIONS.get(b.revision), clause, None)
            assert base is None or base.value != value, (b.name, clause)


def test_a_name_in_two_sets_is_refused():
    text = "file = []\n" + '[[headers]]\nbuilds = ["a 1"]\nrevision = "r"\nsha256 = []\n' * 2
    with pytest.raises(ValueError, match="has a 1 twice"):
        builds._read(text)


def test_the_table_is_in_a_wheel():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "*.toml" in data["package-data"]["megamoe.spec"]


@pytest.mark.parametrize("name", ["vllm 0.24.0", "vllm==0.24.0", "vllm-0.24.0", "vLLM 0.24.0"])
def test_a_build_is_found_by_its_name(real, name):
    assert build_of(name).name == "vllm 0.24.0"
    assert build_of("sgl_deep_gemm-0.2.3.post2").name == "sgl-deep-gemm 0.2.3.post2"
    assert build_of("vllm 0.2.4.0") is None and build_of("2026-06") is None


# --- detect -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", ["include/deep_gemm", "deep_gemm/include/deep_gemm",
                                    "third_party/deep_gemm/include/deep_gemm", "."])  # fmt: skip
def test_all_six_headers_at_any_depth(tmp_path, nested):
    detection = detect(package(tmp_path, OLD, nested))
    assert [b.name for b in detection.builds] == ["old 1", "old 2"]
    assert detection.exact and detection.same_bits and not detection.differing
    assert detection.description == "old 1, old 2"
    assert detection.where == tmp_path / nested


def test_another_schedule_has_the_same_bits_and_says_so(tmp_path):
    detection = detect(package(tmp_path, OLD | {"scheduler/mega_moe.cuh": "mine"}))
    assert [b.name for b in detection.builds] == ["old 1", "old 2"]
    assert detection.same_bits and not detection.exact
    assert detection.description.startswith(
        "the bits of old 1, old 2; scheduler/mega_moe.cuh is another"
    )


def test_a_header_that_decides_bits_outweighs_those_that_do_not(tmp_path):
    """Two of the schedule differ from `old`, one that decides bits from `side`."""
    detection = detect(package(tmp_path, texts("old", layout="x", scheduler="y")))
    assert detection.same_bits and len(detection.differing) == 2
    # At one header that decides bits, the other files choose between `old` and `side`.
    detection = detect(package(tmp_path, ASIDE | {"mma/sm100.cuh": "x"}))
    assert [b.name for b in detection.builds] == ["side 1"] and not detection.same_bits
    assert [h.path for h in detection.differing] == ["mma/sm100.cuh"]


def test_the_nearest_build(tmp_path):
    detection = detect(package(tmp_path, NEW | {KERNEL: "mine"}))
    assert not detection.exact and not detection.same_bits
    assert detection.description == (
        f"none of the builds known here; the nearest is new 1, but {KERNEL} is another"
    )


def test_a_missing_header_is_said_to_be_missing(tmp_path):
    files = {path: text for path, text in NEW.items() if path != "common/math.cuh"}
    detection = detect(package(tmp_path, files))
    assert detection.hashes["common/math.cuh"] == "" and not detection.same_bits
    assert detection.description.endswith("the nearest is new 1, but common/math.cuh is missing")


def test_none_of_them(tmp_path):
    detection = detect(package(tmp_path, texts("mine")))
    assert detection.builds == () and detection.differing == HEADERS
    assert not detection.exact and not detection.same_bits
    assert detection.description.startswith("none of the builds known here: not one")


def test_two_copies_are_one_if_they_are_equal(tmp_path):
    package(tmp_path, OLD, "a")
    package(tmp_path, OLD, "b")
    assert detect(tmp_path).where == tmp_path / "a"
    package(tmp_path, NEW, "b")
    with pytest.raises(ValueError, match=r"several sets .* name one of \S+/a, \S+/b$"):
        detect(tmp_path)


def test_no_headers_and_no_folder_are_one_line(tmp_path):
    package(tmp_path, {"common/math.cuh": "x"})
    with pytest.raises(ValueError, match=r"^\S+ has no MegaMoE headers \(no impls/.*name") as error:
        detect(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^\S+ is no folder; name"):
        detect(tmp_path / "none")


# --- installed ----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The only folder that is looked in for packages."""
    monkeypatch.setattr(
        builds, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)])
    )
    for name in builds.PACKAGES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def importable(root: Path, name: str) -> Path:
    (root / name).mkdir()
    (root / name / "__init__.py").write_text("raise RuntimeError('imported')")
    return root / name


def test_nothing_is_installed(path):
    assert installed_packages() == {}


def test_packages_are_found_and_not_imported(path):
    package(importable(path, "deep_gemm"), OLD)
    importable(path, "sgl_deep_gemm")
    third = package(importable(path, "vllm"), NEW, "third_party/deep_gemm/include/deep_gemm")
    assert installed_packages() == {
        "deep_gemm": path / "deep_gemm",
        "sgl_deep_gemm": path / "sgl_deep_gemm",
        "vllm": third / "third_party/deep_gemm",
    }
    assert not set(builds.PACKAGES) & set(sys.modules)


def test_a_vllm_without_its_own_deep_gemm_is_left_out(path):
    importable(path, "vllm")
    assert installed_packages() == {}


def test_a_stand_in_is_no_package(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deep_gemm", ModuleType("deep_gemm"))
    assert sys.modules["deep_gemm"].__spec__ is None
    assert installed_packages() == {}


# --- megamoe contract ---------------------------------------------------------------------------


def test_list(real, capsys):
    assert main(["contract", "list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in REVISION_NAMES | set(REVISIONS))
    assert "vllm 0.27.0, 0.27.1" in out and "precise_silu = g*(1/d)" in out


def test_list_has_a_revision_that_no_build_follows(monkeypatch, capsys):
    monkeypatch.setattr(builds, "BUILDS", {})
    assert main(["contract", "list"]) == 0
    assert BASE.revision in capsys.readouterr().out


@pytest.mark.parametrize("revision", REVISIONS)
def test_show(revision, capsys):
    assert main(["contract", "show", revision]) == 0
    out = capsys.readouterr().out
    clauses = [f.name for f in dataclasses.fields(BASE) if f.name != "revision"]
    assert all(name in out for name in clauses)
    assert REVISIONS[revision].precise_silu.value in out


def test_show_of_a_build_has_its_difference(capsys):
    assert main(["contract", "show", "side-1"]) == 0
    out = capsys.readouterr().out
    assert "g*(1/d)" in out and f"differs from {BASE.revision}" in out
    assert f"revision: {BASE.revision}, but precise_silu = g*(1/d)" in out
    assert "note: a note" in out


def test_diff(monkeypatch, capsys):
    other = dataclasses.replace(
        BASE, revision="2099-01", requant_exponent_min=Clause(105, "made up [for this]")
    )
    monkeypatch.setitem(verb.CONTRACTS, "2099-01", other)
    assert main(["contract", "diff", BASE.revision, "2099-01"]) == 0
    out = capsys.readouterr().out
    assert "requant_exponent_min" in out and "105" in out and "l2_acts_sf" in out
    assert "precise_silu" not in out
    assert main(["contract", "diff", "2099-01", "new 1"]) == 0
    out = capsys.readouterr().out
    assert "precise_silu" in out and "requant" not in out
    assert main(["contract", "show", "2099-01"]) == 0
    assert "made up [for this]" in capsys.readouterr().out


def test_diff_names_a_few_cases_of_one_side_and_all_of_them_with_verbose(capsys):
    diff = ["contract", "diff", "sgl-sm90", "w4a16"]
    assert main(diff) == 0
    short = capsys.readouterr().out
    assert main([*diff, "--verbose"]) == 0
    names = [line.strip() for line in capsys.readouterr().out.splitlines()]
    every = [case.id for case in load_cases() if "sgl-sm90" in case.revisions]
    assert {*every} <= {*names} and not {*every} <= {*short.split()}
    assert f"and {len(every) - 3} more; --verbose names all" in short


def test_diff_of_the_same(capsys):
    assert main(["contract", "diff", BASE.revision, "old 1"]) == 0
    assert "have the same clauses, with the same values" in capsys.readouterr().out


def test_every_clause_says_what_a_golden_shows():
    clauses = {f.name for f in dataclasses.fields(BASE)} - {"revision"}
    assert clauses <= set(verb.EFFECTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "1999"], "unknown revision or build '1999'; revisions: 2026-06"),
        (["show", "2099-01"], "revision 2099-01, which new 1 follows, has no clauses written down"),
        (["diff", "2026-06", "new 1"], "revision 2099-01, which new 1 follows"),
        (["diff", "2026-06"], "B is missing; see `megamoe contract diff --help`"),
        (["detect", "no_such_package"], "neither a folder nor a package"),
        (["detect"], "none of deep_gemm, sgl_deep_gemm, vllm is installed here; name a folder"),
        ([], "name a verb: list, show, diff, detect; see `megamoe contract --help`"),
    ],
)
def test_misuse_is_one_line(path, arguments, message, capsys):
    assert main(["contract", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err and len(output.err.splitlines()) == 1 and not output.out


def test_detect_a_folder(tmp_path, capsys):
    package(tmp_path, ASIDE)
    assert main(["contract", "detect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: side 1",
        f"  headers: {tmp_path}/include/deep_gemm",
        f"  revision: {BASE.revision}, but precise_silu = g*(1/d)",
        "  note: a note",
    ]


def test_detect_says_what_was_overlooked(tmp_path, capsys):
    package(tmp_path, OLD | {"layout/mega_moe.cuh": "mine"})
    assert main(["contract", "detect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "  differs: layout/mega_moe.cuh (no bit depends on it: " in out
    assert f"  revision: {BASE.revision}\n" in out


def test_detect_of_an_unknown_kernel_exits_1(tmp_path, capsys):
    package(tmp_path, OLD | {KERNEL: "mine"})
    assert main(["contract", "detect", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"  differs: {KERNEL} (decides bits: " in out and "revision:" not in out
    package(tmp_path, texts("mine"))
    assert main(["contract", "detect", str(tmp_path)]) == 1
    assert "differs:" not in capsys.readouterr().out


def test_detect_without_headers_is_misuse(tmp_path, capsys):
    assert main(["contract", "detect", str(tmp_path)]) == 2
    assert "has no MegaMoE headers" in capsys.readouterr().err


def test_detect_what_is_installed(path, capsys):
    package(importable(path, "deep_gemm"), OLD)
    importable(path, "sgl_deep_gemm")
    assert main(["contract", "detect"]) == 0
    out = capsys.readouterr().out
    assert "deep_gemm: old 1, old 2\n" in out and "sgl_deep_gemm: " in out
    assert main(["contract", "detect", "deep-gemm"]) == 0
    assert capsys.readouterr().out.startswith("deep-gemm: old 1, old 2\n")
    assert main(["contract", "detect", "sgl_deep_gemm"]) == 2
