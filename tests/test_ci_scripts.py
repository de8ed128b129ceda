"""ci/: a shard that says what made it, a merge that proves a whole, one line for what is wrong."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given

from ci import merge
from megamoe.cases import load_cases, select, shards
from megamoe.spec.contract import NEWEST
from megamoe.suite import provenance
from tests.helpers.mutated import many, mutated
from tests.helpers.reports import whole

ROOT = Path(__file__).resolve().parents[1]
CASE = "eplb/identity-map-*"
SELECTION = select(load_cases(ROOT / "golden"), None, "full", CASE)
GOLDENS = provenance.digest(ROOT / "golden", provenance.GOLDENS)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(0o755)
    return path


def one_line(stream: str) -> str:
    (line,) = stream.splitlines()
    return line


# --- shard.sh ------------------------------------------------------------------------------------

# Answers the set-up's questions, then plays `megamoe check` with exit status $CHECK.
PYTHON = """
case "$*" in
*version_info*) echo 3.12.1 ;;
*find_spec*) ;;
*get_device_capability*) echo "$FOUND" ;;
*'-m megamoe check'*)
    echo "$*" >"$CALLS"
    [ "$CHECK" = crash ] && exit 2
    while [ $# -gt 0 ]; do
        case $1 in --json | --junit) echo new >"$2" ;; esac
        shift
    done
    exit "$CHECK" ;;
esac
"""


@pytest.fixture
def shard(tmp_path):
    python = script(tmp_path / "python", PYTHON)

    def run(*arguments, check="0", gpu="none", **settings):
        base = {"PATH": os.environ["PATH"], "MEGAMOE_PYTHON": str(python), "CHECK": check}
        base |= {"FOUND": gpu, "CALLS": str(tmp_path / "calls"), "OUT": str(tmp_path / "out")}
        return subprocess.run(
            [ROOT / "ci/shard.sh", *arguments], cwd=tmp_path, env=base | settings,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((), {}, "say which of how many, as in: ci/shard.sh 1 4"),
        (("1", "x"), {}, "'x' is not a number from 1 on"),
        (("0", "2"), {}, "'0' is not a number from 1 on"),
        (("3", "2"), {}, "there is no shard 3 of 2"),
        (("1", "2"), {"DEVICE": "tpu"}, "DEVICE=tpu is neither cpu nor cuda"),
        (("1", "2"), {"TIER": "half"}, "TIER=half is neither quick nor full"),
        (("1", "2"), {"JOBS": "many"}, "JOBS=many is not a number from 1 on"),
        (("1", "2"), {"ARCH": "hopper"}, "ARCH=hopper is no architecture such as sm90"),
        (("1", "2"), {"ARCH": "sm90"}, "ARCH=sm90 is about a GPU: set DEVICE=cuda"),
        (("1", "2"), {"DEVICE": "cuda"}, "torch finds no CUDA device: does nvidia-smi"),
        (("1", "2"), {"DEVICE": "cuda", "ARCH": "sm100", "gpu": "sm90"}, "the GPU here is sm90"),
        (("1", "2"), {"OUT": "/dev/null/x"}, "OUT=/dev/null/x: cannot be made"),
        (("1", "2"), {"MEGAMOE_PYTHON": "/no/python"}, "MEGAMOE_PYTHON=/no/python does not run"),
    ],
)
def test_misuse_of_a_shard_is_one_line_and_exit_2(shard, arguments, settings, message):
    ran = shard(*arguments, **settings)
    # mkdir has its own word before ours.
    assert ran.returncode == 2 and message in ran.stderr.splitlines()[-1]
    assert len(ran.stderr.splitlines()) == 1 + ("OUT" in settings)


def test_a_shard_passes_on_what_it_was_asked(shard, tmp_path):
    ran = shard("2", "3", BACKEND="mine.py:B", DEVICE="cuda", ARCH="sm90", gpu="sm90",
                TIER="quick", CASE="eplb/a *", JOBS="5")  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    call = (tmp_path / "calls").read_text()
    for option in ("--backend mine.py:B", "--device cuda", "--tier quick", "--shard 2/3", "-n 5",
                   "--case eplb/a *", f"--json {tmp_path}/out/result.json"):  # fmt: skip
        assert option in call


@pytest.mark.parametrize(
    ("count", "check", "code"),
    [
        ("2", "0", 0),
        ("2", "1", 1),  # a red case
        ("2", "2", 0),  # nothing provided here: the merge knows the other shards
        ("1", "2", 2),  # there are no others
        ("2", "crash", 2),
    ],
)
def test_what_the_exit_status_of_a_shard_means(shard, count, check, code):
    ran = shard("1", count, check=check)
    assert ran.returncode == code
    assert ("the merge decides" in ran.stdout) == (count == "2" and check == "2")


def test_results_of_an_earlier_run_never_pass_for_this_ones(shard, tmp_path):
    for name in (*provenance.FILES, provenance.NAME):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("old")
    assert shard("1", "2", check="crash").returncode == 2
    assert list((tmp_path / "out").iterdir()) == []


# --- provenance ----------------------------------------------------------------------------------


def test_a_digest_sees_a_byte_a_name_and_no_cache(tmp_path):
    def digest():
        return provenance.digest(tmp_path, ["pkg/**/*.py"])

    (tmp_path / "pkg/__pycache__").mkdir(parents=True)
    (tmp_path / "pkg/a.py").write_text("1")
    first = digest()
    (tmp_path / "pkg/__pycache__/b.py").write_text("1")
    assert digest() == first
    (tmp_path / "pkg/a.py").write_text("2")
    second = digest()
    (tmp_path / "pkg/a.py").rename(tmp_path / "pkg/b.py")
    assert len({first, second, digest()}) == 3


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_revision_is_the_commit_and_says_when_the_tree_is_another(tmp_path, monkeypatch):
    monkeypatch.delenv("MEGAMOE_REVISION", raising=False)

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments],
                       cwd=tmp_path, check=True, capture_output=True)  # fmt: skip

    assert provenance.revision(tmp_path) == "unknown"
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    commit = provenance.revision(tmp_path)
    assert len(commit) == 40
    (tmp_path / "new").write_text("")
    assert provenance.revision(tmp_path) == f"{commit}-modified"
    (tmp_path / "unpacked").mkdir()
    assert provenance.revision(tmp_path / "unpacked") == "unknown"
    monkeypatch.setenv("MEGAMOE_REVISION", "abc")
    assert provenance.revision(tmp_path) == "abc"


def test_the_digests_cover_the_code_the_goldens_and_the_pins():
    for patterns, name in (
        (provenance.CODE, "megamoe/judge/elements.py"),
        (provenance.GOLDENS, "golden/manifest.json"),
        (provenance.GOLDENS, "golden/durations.json"),
        (provenance.TOOLCHAIN, "requirements/torch-cuda.txt"),
        (provenance.TOOLCHAIN, "toolchain.toml"),
    ):
        root = ROOT / "golden" if patterns is provenance.GOLDENS else ROOT
        assert any(ROOT / name in root.glob(pattern) for pattern in patterns), name


# --- merge ---------------------------------------------------------------------------------------


def write(
    folder: Path, index: int, count: int, ids=None, status="pass", result=None, **more
) -> Path:
    """A folder as ci/shard.sh leaves it; ``result`` and ``more`` replace what its result and its
    provenance say."""
    if ids is None:
        ids = [c.id for c in shards.shard(SELECTION, index, count, {})]
    request = {"backend": "eager", "device": "cpu", "tier": "full", "kind": None, "case": CASE}
    request |= {"shard": f"{index}/{count}"}
    result = whole(ids, status, **request, contract=NEWEST.revision) | (result or {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "junit.xml").write_text("<testsuites/>")
    document = {
        "format": 1, **request, "revision": "r",
        "digests": {"code": "c", "goldens": GOLDENS, "toolchain": "t"},
        "versions": {"torch": "2.13.0"}, "machine": {"gpu": f"GPU {index}", "class": "x"},
        "files": {name: provenance.sha256(folder / name) for name in provenance.FILES},
    }  # fmt: skip
    document |= more
    (folder / provenance.NAME).write_text(json.dumps(document))
    return folder


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Two whole shards."""
    monkeypatch.setattr(shards, "durations", lambda root: {})
    return [write(tmp_path / str(i), i, 2) for i in (1, 2)]


def merged(tmp_path, folders) -> int:
    return merge.main(["--out", str(tmp_path / "out"), *map(str, folders)])


def test_two_shards_make_a_whole(two, tmp_path):
    assert merged(tmp_path, two) == 0
    out = tmp_path / "out"
    result = json.loads((out / "result.json").read_text())
    assert [c["id"] for c in result["cases"]] == [c.id for c in SELECTION]
    assert result["counts"]["pass"] == len(SELECTION) and result["counts"]["fail"] == 0
    record = json.loads((out / "provenance.json").read_text())
    assert record["revision"] == "r" and [s["shard"] for s in record["shards"]] == ["1/2", "2/2"]
    assert f'tests="{len(SELECTION)}"' in (out / "junit.xml").read_text()
    page = (out / "summary.md").read_text()
    assert "eager on cpu: GREEN" in page and "| 2/2 | 1 | 1 | GPU 2 |" in page
    assert f"Revision r; contract {NEWEST.revision}; torch 2.13.0." in page


def test_a_red_case_is_exit_1_and_stands_in_the_summary(two, tmp_path):
    write(two[1], 2, 2, status="fail")
    assert merged(tmp_path, two) == 1
    page = (tmp_path / "out/summary.md").read_text()
    case_id = shards.shard(SELECTION, 2, 2, {})[0].id
    assert "RED: 1 of 2" in page and f"| `{case_id}` | off \\| 1 |" in page


def test_nothing_judged_anywhere_is_not_green(two, tmp_path):
    for i in (1, 2):
        write(tmp_path / str(i), i, 2, status="not-provided")
    assert merged(tmp_path, two) == 2


FIRST, SECOND = (c.id for c in sorted(SELECTION, key=lambda c: c.id))


def broken(name, two):
    """Break the two shards in the way of that name."""
    a, b = two
    match name:
        case "lost shard":
            return [a]
        case "shard twice":
            return [a, b, write(b.parent / "again", 2, 2)]
        case "two cuts":
            return [a, b, write(b.parent / "third", 3, 3)]
        case "lost case":
            write(b, 2, 2, ids=[])
        case "doubled case":
            write(b, 2, 2, ids=[FIRST, SECOND])
        case "foreign case":
            write(b, 2, 2, ids=[SECOND, "eplb/other"])
        case "edited result":
            (b / "result.json").write_text((b / "result.json").read_text().replace("pass", "fail"))
        case "other goldens":
            return [write(f, i, 2, digests={"goldens": "g"}) for i, f in enumerate(two, 1)]
        case "no result":
            (b / "result.json").unlink()
        case "no provenance":
            (b / provenance.NAME).unlink()
        case "no junit":
            (b / "junit.xml").unlink()
        case "half a result":
            (b / "result.json").write_text('{"cases": [')
        case "another json":
            (b / "result.json").write_text("[1]")
        case "another format":
            write(b, 2, 2, format=2)
        case "no folder":
            return [a, b.parent / "nowhere"]
        case "none":
            return []
    return two


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        (
            "lost shard",
            1,
            f"shard 2/2 is missing, and with it 1 case: {SECOND}; run BACKEND=eager "
            "DEVICE=cpu TIER=full CASE='eplb/identity-map-*' ci/shard.sh 2 2",
        ),
        ("shard twice", 1, "shard 2/2 came twice: "),
        ("two cuts", 1, "shards of 2 and of 3: two cuts make no whole"),
        ("lost case", 1, f"1 case lost: {SECOND}"),
        ("doubled case", 1, f"1 case judged twice: {FIRST}"),
        ("foreign case", 1, "1 case not in this selection: eplb/other"),
        ("edited result", 1, "2/result.json was changed after it was made"),
        ("other goldens", 1, "merge at their revision, r"),
        ("no result", 2, "2/result.json is missing: did that shard end?"),
        ("no provenance", 2, "2/provenance.json is missing"),
        ("no junit", 2, "2/junit.xml is missing"),
        ("half a result", 2, "2/result.json is no JSON"),
        ("another json", 2, "2/result.json is no report of `megamoe check --json`"),
        ("another format", 2, "2/provenance.json is not of format 1"),
        ("no folder", 2, "nowhere is no folder; name those that ci/shard.sh wrote"),
        ("none", 2, "name the folders that ci/shard.sh wrote"),
    ],
)
def test_no_whole_is_one_line_and_no_result(two, tmp_path, capsys, name, code, message):
    assert merged(tmp_path, two) == 0
    capsys.readouterr()
    assert merged(tmp_path, broken(name, two)) == code
    assert message in one_line(capsys.readouterr().err)
    assert list((tmp_path / "out").iterdir()) == [], "the earlier merge must not pass for this one"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "s"}, "shards differ in revision: r in"),
        ({"revision": "r-modified"}, "shards differ in revision: r in"),
        ({"backend": "triton"}, "shards differ in backend: eager in"),
        ({"device": "cuda"}, "shards differ in device: cpu in"),
        ({"tier": "quick"}, "shards differ in tier: full in"),
        ({"case": None}, f"shards differ in case: {CASE} in"),
        ({"digests": {"code": "d", "goldens": GOLDENS, "toolchain": "t"}}, "digests.code: c in"),
        ({"digests": {"code": "c", "goldens": GOLDENS, "toolchain": "u"}}, "digests.toolchain: t"),
        ({"digests": {"code": "c", "goldens": "g", "toolchain": "t"}}, "digests.goldens: "),
        ({"versions": {"torch": "2.11.0"}}, "versions.torch: 2.13.0 in"),
        ({"versions": {"torch": "2.13.0", "nvcc": "13.0"}}, "versions.nvcc: None in"),
    ],
)
def test_shards_of_other_code_or_another_toolchain_do_not_mix(
    two, tmp_path, capsys, changes, message
):
    write(two[1], 2, 2, **changes)
    assert merged(tmp_path, two) == 1
    line = one_line(capsys.readouterr().err)
    assert message in line and line.endswith("run them alike, from one commit")


def edit_provenance(folder, change) -> None:
    """Edit what the provenance of ``folder`` says, by hand."""
    path = folder / provenance.NAME
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"backend": "triton"}, "2: backend is 'triton' in result.json, 'eager' in provenance"),
        ({"shard": "1/2"}, "2: shard is '1/2' in result.json, '2/2' in provenance.json"),
        ({"accumulator": "exact"}, "reports differ in accumulator: fp32 in "),
        ({"goldens": {"manifest_sha256": "h"}}, "reports differ in goldens.manifest_sha256: g in "),
        ({"counts": {"pass": 2}}, "2/result.json counts 2 x pass, and holds 1 such cases"),
    ],
)
def test_results_of_other_judgements_do_not_mix(two, tmp_path, capsys, result, message):
    write(two[1], 2, 2, result=result)
    assert merged(tmp_path, two) == 1
    line = one_line(capsys.readouterr().err)
    assert message in line


def test_a_run_that_was_stopped_and_an_unknown_status_are_no_result(two, tmp_path, capsys):
    write(two[1], 2, 2, status="not-run")
    assert merged(tmp_path, two) == 1
    assert "2/result.json: its run was stopped before 1 case" in capsys.readouterr().err
    write(two[1], 2, 2, status="passed")
    assert merged(tmp_path, two) == 1
    assert f"2/result.json: case {SECOND} has status 'passed'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(files=["result.json"]), "files is a list of 1; it must be an object"),
        (lambda p: p["files"].pop("junit.xml"), "files has no junit.xml"),
        (lambda p: p.update(shard=2), "shard is 2; it must be a string"),
        (lambda p: p.update(digests=None), "digests is None; it must be an object"),
        (lambda p: p.update(format=True), "is not of format 1"),
    ],
)
def test_a_provenance_of_another_form_is_one_line(two, tmp_path, capsys, change, message):
    edit_provenance(two[1], change)
    assert merged(tmp_path, two) == 2
    line = one_line(capsys.readouterr().err)
    assert "2/provenance.json" in line and message in line


@pytest.mark.slow
def test_whatever_stands_in_a_provenance(two, tmp_path, capsys):
    path = two[1] / provenance.NAME

    @many
    @given(mutated(json.loads(path.read_text())))
    def holds(document):
        path.write_text(json.dumps(document))
        code = merged(tmp_path, two)
        err = capsys.readouterr().err
        assert code == 0 or (code in (1, 2) and one_line(err).startswith("merge: "))

    holds()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", [*provenance.FILES, provenance.NAME])
def test_a_fifo_is_one_line(two, tmp_path, capsys, name):
    (two[1] / name).unlink()
    os.mkfifo(two[1] / name)
    assert merged(tmp_path, two) == 2
    assert f"2/{name} is a fifo, no regular file" in one_line(capsys.readouterr().err)


def test_a_merge_never_takes_the_place_of_a_shard(two, tmp_path, capsys):
    assert merge.main(["--out", str(two[0]), *map(str, two)]) == 2
    assert "is a shard's folder; name another" in one_line(capsys.readouterr().err)
    assert merged(tmp_path, two) == 0  # nothing of it was deleted


def test_a_result_is_written_whole_and_last(two, tmp_path, monkeypatch):
    real, names = merge.write_atomically, []

    def write_one(path, content):
        names.append(path.name)
        if path.name == "result.json":
            raise OSError("disk full")
        real(path, content)

    monkeypatch.setattr(merge, "write_atomically", write_one)
    assert merged(tmp_path, two) == 2
    assert names[-1] == "result.json" and not (tmp_path / "out/result.json").exists()


def test_the_page_does_not_call_a_digest_a_signature(two, tmp_path):
    """Whoever edits a result and its digest is not found out; docs/ci.md must say so."""
    path = two[1] / "result.json"
    path.write_text(path.read_text().replace("1.5", "9.5"))
    assert merged(tmp_path, two) == 1
    edit_provenance(two[1], lambda p: p["files"].update({"result.json": provenance.sha256(path)}))
    assert merged(tmp_path, two) == 0
    page = " ".join((ROOT / "docs/ci.md").read_text().split())
    assert "Whoever can edit a result can write its new digest too. Nothing is signed" in page


# --- toolchain.sh --------------------------------------------------------------------------------


def toolchain(tmp_path, *arguments, nix="", **settings):
    """Run it with nothing on PATH but what it needs, and a Nix of that version."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "dirname", "sed", "sort", "head"):
        path = shutil.which(tool)
        assert path is not None
        (tools / tool).symlink_to(path)
    if nix:
        script(tools / "nix", f'[ "$1" = --version ] && echo "nix (Nix) {nix}" || echo "nix: $*"\n')
    return subprocess.run(
        ["/bin/sh", ROOT / "ci/toolchain.sh", *arguments], env={"PATH": str(tools)} | settings,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("nix", "settings", "output"),
    [
        ("2.28.3", {}, f"develop {ROOT}#cpu --command sh -c echo ran\n"),
        ("2.18.0", {"DEVICE": "cuda"}, f"develop {ROOT}#default --command sh -c echo ran\n"),
        ("2.28.3", {"MEGAMOE_PYTHON": "/p"}, "toolchain: /p\nran\n"),
        ("2.8.0", {"MEGAMOE_PYTHON": "/p"}, "toolchain: /p\nran\n"),
        ("", {}, "toolchain: no Nix here; the locks in requirements/\nran\n"),
    ],
)
def test_which_toolchain_a_command_gets(tmp_path, nix, settings, output):
    ran = toolchain(tmp_path, "sh", "-c", "echo ran", nix=nix, **settings)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith(output)


@pytest.mark.parametrize("nix", ["2.8.0", "2.17.9", "1.11.16"])
def test_a_nix_that_is_too_old_is_named(tmp_path, nix):
    ran = toolchain(tmp_path, "true", nix=nix)
    assert ran.returncode == 2
    assert f"Nix {nix} is too old: install 2.18 or newer" in one_line(ran.stderr)
