"""The Python files that a kernel imports are part of what was judged: a merge compares them."""

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megamoe.cases import Case
from megamoe.cases.shards import ShardError
from megamoe.commands.main import main
from megamoe.suite.merge import merge
from megamoe.worker.sources import Sources, top_of
from tests.helpers.reports import whole

SELECTION = [Case(f"eplb/c{i}", "eplb", "full", "x", i, {}, Path("a.toml")) for i in range(3)]
PACKAGE = {
    "__init__.py": "from .layer import Kernel\n",
    "layer.py": """
class Kernel:
    name, accumulator = "kernel", "fp32"

    def eplb_map(self, *given):
        from . import late
        raise NotImplementedError
""",
    "late.py": "",
    "unused.py": "",
}


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def package(tmp_path):
    """A kernel in a package: its class is in another file than the one that is named."""
    folder = tmp_path / "ragged"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    return folder


def imported(monkeypatch, *files, name="megamoe_backend_x.y"):
    for at, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        module = ModuleType("y")
        module.__file__ = str(file)
        monkeypatch.setitem(sys.modules, f"{name}{at}", module)


# --- what a worker tells ----------------------------------------------------------------------


def test_a_report_has_the_files_that_were_imported_at_the_start_and_in_a_call(package, tmp_path):
    out = tmp_path / "out.json"
    spec = f"{package}/__init__.py:Kernel"
    case = "eplb/identity-map-int32"
    assert main(["check", "--backend", spec, "--case", case, "--json", str(out), "--quiet"]) == 2
    assert json.loads(out.read_text())["modules_sha256"] == {
        name: sha(package / name) for name in ("late.py", "layer.py")
    }


def test_each_file_is_told_once(monkeypatch, package):
    sources = Sources(f"{package}/__init__.py:Kernel")
    monkeypatch.setitem(sys.modules, "stand_in", object())  # has no __dict__
    imported(monkeypatch, package / "layer.py")
    assert sources.fresh() == {"layer.py": sha(package / "layer.py")}
    assert sources.fresh() == {}
    imported(monkeypatch, package / "layer.py", package / "late.py")
    assert list(sources.fresh()) == ["late.py"]


def test_files_of_the_whole_repository_count_and_what_is_installed_in_it_does_not(
    monkeypatch, package, tmp_path
):
    (tmp_path / ".git").touch()  # as in a worktree, where it is a file
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "env"))
    sources = Sources(f"{package}/__init__.py:Kernel")
    env, packages = tmp_path / "env/lib", tmp_path / "x/site-packages"
    imported(
        monkeypatch, tmp_path / "ops/sums.py", env / "json.py", packages / "torch.py",
        package / "__init__.py", package / "fast.so", tmp_path.parent / "elsewhere.py",
    )  # fmt: skip
    imported(monkeypatch, tmp_path / "megamoe/judge.py", name="megamoe.judge")
    assert list(sources.fresh()) == ["../ops/sums.py"]


def test_the_limit_is_the_repository_then_the_outermost_package_then_the_folder(package, tmp_path):
    inner = package / "kernels"
    inner.mkdir()
    assert top_of(inner / "a.py") == inner
    (inner / "__init__.py").touch()
    assert top_of(inner / "a.py") == package
    (tmp_path / ".git").mkdir()
    assert top_of(inner / "a.py") == tmp_path
    installed = tmp_path / "site-packages/kernel"
    assert top_of(installed / "a.py") == installed


def test_a_backend_of_a_name_has_none(monkeypatch):
    assert Sources("eager").fresh() == {}


# --- what a merge does with them --------------------------------------------------------------


def shards(*modules):
    return [
        whole([case.id], **({} if digests is None else {"modules_sha256": digests}))
        for case, digests in zip(SELECTION, modules, strict=False)
    ]


def merged(*modules):
    return merge(
        shards(*modules), SELECTION[: len(modules)], [f"{i + 1}.json" for i in range(len(modules))]
    )


def test_two_shards_of_one_package_whose_imported_file_differs_do_not_merge():
    with pytest.raises(ShardError) as error:
        merged({"layer.py": "a", "same.py": "c"}, {"layer.py": "b", "same.py": "c"})
    assert str(error.value) == (
        "reports differ in modules_sha256: layer.py is a in 1.json, b in 2.json "
        "(a Python file that the kernel imported); run them alike"
    )


def test_the_same_code_merges_and_a_file_that_one_shard_alone_loaded_is_no_difference():
    assert merged({"layer.py": "a"}, {"layer.py": "a"})["modules_sha256"] == {"layer.py": "a"}
    both = merged({"layer.py": "a"}, {"layer.py": "a", "late.py": "c"})
    assert both["modules_sha256"] == {"late.py": "c", "layer.py": "a"}


def test_every_two_shards_are_compared_also_in_what_the_first_has_not_loaded():
    with pytest.raises(ShardError, match=r"late\.py is a in 2\.json, b in 3\.json"):
        merged({}, {"late.py": "a"}, {"late.py": "b"})


def test_reports_of_earlier_versions_merge_with_one_another_alone():
    assert "modules_sha256" not in merged(None, None)
    with pytest.raises(ShardError, match=r"nothing in 1\.json, 1 file in 2\.json"):
        merged(None, {"layer.py": "a"})
