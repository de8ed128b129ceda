"""The store defends itself: no path leads out of golden/, nothing that was recorded is lost."""

import json
import os
import shutil
import sys
import threading

import pytest

from megamoe.cases import load_cases
from megamoe.cases.load import _NAME
from megamoe.golden import GoldenError, Store, bless, diff, make, record, recorded, verify
from megamoe.golden import candidates as acts
from megamoe.golden.computed import generator
from megamoe.golden.places import NAME, id_fault, inside, tensors_of
from tests.helpers.golden import case_by_name, content_of, make_golden, quiet


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_golden(tmp_path_factory.mktemp("original") / "golden")


@pytest.fixture
def root(original, tmp_path, monkeypatch):
    """golden/ beside a file that nobody may touch."""
    monkeypatch.delenv("CI", raising=False)
    (tmp_path / "victim").write_bytes(b"precious")
    return shutil.copytree(original, tmp_path / "golden")


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def refuses(root, match, act=None):
    """``act`` (bless) raises one line that matches, and no byte has changed, beside golden/ too."""
    before = content_of(root.parent)
    with pytest.raises(GoldenError, match=match) as error:
        (act or (lambda: bless(root, load_cases(root))))()
    assert content_of(root.parent) == before and "\n" not in str(error.value)


# --- paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["../victim", "/etc/passwd", "manifest.json", "", 3, None])
def test_a_path_in_the_manifest_is_not_followed(root, file):
    """The case is gone, so bless would delete its file."""
    record(root, [case_by_name(root, "map")], 1, quiet)
    edit(root / "manifest.json", lambda m: m["cases"]["staging/small"].update(file=file))
    text = (root / "cases/all.toml").read_text().replace('name = "small"', 'name = "other"')
    (root / "cases/all.toml").write_text(text)
    refuses(root, r"manifest.json: .*staging/small.*; restore golden/ from version control")


def test_a_path_in_a_candidate_is_not_followed(root):
    record(root, [case_by_name(root, "map")], 1, quiet)
    entry = root / "candidates/entries/eplb/map.json"
    edit(entry, lambda d: d["entry"].update(file="../../victim"))
    shutil.copy(root / "candidates/tensors/eplb/map.safetensors", root.parent / "victim")
    refuses(root, r"candidate eplb/map: map.json: its file is '../../victim', and can only be "
                  r"tensors/eplb/map.safetensors; delete it, and record")  # fmt: skip


def test_a_candidate_with_another_cases_name_is_not_taken_for_it(root):
    record(root, [case_by_name(root, "map")], 1, quiet)
    folder = root / "candidates/entries/eplb"
    shutil.copy(folder / "map.json", folder / "..json")
    refuses(root, "a case's id is KIND/NAME")


@pytest.mark.parametrize(
    "case_id", ["eplb/../x", "../x", "eplb/", "eplb", "x/y", "eplb/a/b", "eplb/.a", "eplb/a\n", ""]
)
def test_an_id_that_is_none_has_no_place(case_id):
    with pytest.raises(GoldenError, match="a case's id is KIND/NAME"):
        tensors_of(case_id)


def test_every_case_file_has_names_that_the_store_takes():
    assert NAME.pattern == _NAME.pattern and not id_fault("forward/a-1.5_b+c")


@pytest.mark.parametrize("link", ["tensors", "tensors/eplb", "candidates", "candidates/entries"])
def test_no_write_and_no_deletion_goes_through_a_link_out_of_golden(root, link):
    record(root, [case_by_name(root, "map")], 1, quiet)
    outside = root.parent / "outside"
    shutil.move(root / link, outside)
    (root / link).symlink_to(outside)
    refuses(root, "lies outside .*: a symbolic link leads there; put a folder in the link's place")


def test_record_writes_through_no_link(root):
    (root.parent / "outside").mkdir()
    (root / "candidates").symlink_to(root.parent / "outside")
    (error,) = record(root, [case_by_name(root, "map")], 1, quiet)
    assert "a symbolic link leads there" in error
    assert not any((root.parent / "outside").iterdir())


def test_a_link_that_is_a_golden_itself_is_replaced_and_not_written_through(root):
    record(root, [case_by_name(root, "map")], 1, quiet)
    path = root / "tensors/eplb/map.safetensors"
    path.unlink()
    path.symlink_to(root.parent / "victim")
    bless(root, load_cases(root))
    assert not path.is_symlink() and (root.parent / "victim").read_bytes() == b"precious"


def test_golden_itself_may_be_a_link(root):
    link = root.parent / "link"
    link.symlink_to(root)
    assert inside(link, link / "tensors/eplb/map.safetensors")
    assert record(link, load_cases(link), 1, quiet) == []
    assert len(bless(link, load_cases(link))) == 4


@pytest.mark.parametrize("machine", ["../../victim", "a/b", "A", ""])
def test_recorded_bits_lie_where_their_backend_and_machine_say(root, machine):
    data = {"schema": 1, "backend": "b", "machine_class": machine, "contract": "c", "cases": {},
            "fingerprint": {"sources": "", "options": "", "binaries": {}}}  # fmt: skip
    with pytest.raises(GoldenError, match=r"machine class .*: use a-z, 0-9 and -"):
        recorded.write(root / "recorded-candidates", data)
    path = root / "recorded-candidates/b/m.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(data))
    refuses(root, "by its backend and machine_class it is",
            lambda: recorded.bless(root, root / "recorded-candidates"))  # fmt: skip


# --- what is no file, or no tensor ------------------------------------------------------------


@pytest.mark.timeout(60)
def test_a_fifo_in_a_goldens_place_is_one_line(root):
    case = case_by_name(root, "map")
    path = root / tensors_of(case.id)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(GoldenError, match=r"case eplb/map: .* unreadable: .* is a fifo"):
        Store(root, make).load(case)
    (root / "manifest.json").unlink()
    os.mkfifo(root / "manifest.json")
    with pytest.raises(GoldenError, match=r"manifest.json cannot be read as JSON \(.* is a fifo"):
        verify(root, [case], 1, quiet)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["entries/eplb/map.json", "tensors/eplb/map.safetensors"])
def test_a_fifo_in_a_candidates_place_is_one_line(root, name):
    record(root, [case_by_name(root, "map")], 1, quiet)
    (root / "candidates" / name).unlink()
    os.mkfifo(root / "candidates" / name)
    refuses(root, r"candidate eplb/map: .* is a fifo, no regular file.*record")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["ids"].update(shape=[1]), "has 'ids' of another dtype or shape"),
        (lambda t: t["ids"].update(dtype="uint8"), "has 'ids' of another dtype or shape"),
        (lambda t: t.pop("ids"), "holds a tensor too many: 'ids'"),
        (lambda t: t.update(more=t["ids"]), "lacks 'more'"),
    ],
)
def test_tensors_that_are_not_those_of_the_manifest(root, change, message):
    edit(root / "manifest.json", lambda m: change(m["cases"]["eplb/map"]["tensors"]))
    with pytest.raises(GoldenError, match=f"case eplb/map: .*{message}, by the manifest; restore"):
        Store(root, make).load(case_by_name(root, "map"))


# --- acts at the same time, and acts that were killed -----------------------------------------


def test_what_is_recorded_while_bless_runs_is_kept(root, monkeypatch):
    """The same case again, and another: both wait, and neither is removed with what was taken."""
    record(root, [case_by_name(root, "map")], 1, quiet)
    real, recording = acts.write_atomically, []

    def meanwhile(path, content):
        if path.name == "manifest.json":
            cases = [case_by_name(root, "map"), case_by_name(root, "small")]
            thread = threading.Thread(target=record, args=(root, cases, 1, quiet))
            thread.start()
            thread.join(1)
            recording.append(thread)
        real(path, content)

    monkeypatch.setattr(acts, "write_atomically", meanwhile)
    assert bless(root, load_cases(root)) == ["eplb/map"]
    recording[0].join(60)
    assert sorted(acts.candidates(root)) == ["eplb/map", "staging/small"]
    assert (root / "candidates/.gitignore").is_file()
    assert diff(root, load_cases(root)) == []


def test_bless_bits_takes_what_it_read_and_nothing_else(root, monkeypatch):
    manifest = json.loads((root / "manifest.json").read_text())
    inputs = manifest["cases"]["forward/tiny"]["inputs"]
    data = {"schema": 1, "backend": "b", "machine_class": "m", "contract": manifest["contract"],
            "fingerprint": {"sources": "", "options": "", "binaries": {}},
            "cases": {"forward/tiny": {"inputs": inputs, "stages": {"y": "0"}}}}  # fmt: skip
    source, real, recording = root / "recorded-candidates", recorded.write_atomically, []
    read = recorded.write(source, data)

    def again():
        for more in ({"accumulator": "again"}, {"backend": "later"}):
            recorded.write(source, {**data, **more})

    def meanwhile(path, content):
        if path.is_relative_to(root / "recorded") and not recording:
            (source / "hand").mkdir()
            (source / "hand/m.json").write_text("put there by hand, without the lock")
            recording.append(threading.Thread(target=again))
            recording[0].start()
            recording[0].join(0.5)
        real(path, content)

    monkeypatch.setattr(recorded, "write_atomically", meanwhile)
    assert recorded.bless(root, source, take=True) == [root / "recorded/b/m.json"]
    recording[0].join(60)
    assert json.loads(read.read_text())["accumulator"] == "again"  # the same, recorded since
    assert (source / "later/m.json").is_file() and (source / "hand/m.json").is_file()


def test_bless_bits_removes_candidates_only_if_it_is_told_to(root):
    manifest = json.loads((root / "manifest.json").read_text())
    inputs = manifest["cases"]["forward/tiny"]["inputs"]
    data = {"schema": 1, "backend": "b", "machine_class": "m", "contract": manifest["contract"],
            "fingerprint": {"sources": "", "options": "", "binaries": {}},
            "cases": {"forward/tiny": {"inputs": inputs, "stages": {"y": "0"}}}}  # fmt: skip
    path = recorded.write(root / "recorded-candidates", data)
    for take in (False, True):
        assert path.exists()
        recorded.bless(root, root / "recorded-candidates", take=take)
    assert not path.exists()


def test_the_next_bless_clears_what_a_killed_one_left(root):
    record(root, [case_by_name(root, "map")], 1, quiet)
    leftovers = [root / folder / ".megamoe-999999999-a.tmp"
                 for folder in (".", "tensors/eplb", "candidates/entries/eplb")]  # fmt: skip
    survivors = [root.parent / ".megamoe-999999999-a.tmp", root / "tensors/.a.tmp"]
    for path in [*leftovers, *survivors]:
        path.write_bytes(b"half")
    bless(root, load_cases(root))
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in survivors)
    assert not (root / "candidates").exists()


# --- what made a golden -----------------------------------------------------------------------


def test_a_source_that_is_missing_does_not_pass_for_one_that_decides_nothing(monkeypatch):
    # The package exports a function of the module's name, so the module is asked for by name.
    monkeypatch.setattr(
        sys.modules["megamoe.golden.computed"], "SOURCES", ("cases/counter.py", "gone.py")
    )
    with pytest.raises(GoldenError, match=r"gone.py is missing from the package .*; install"):
        generator.__wrapped__()
