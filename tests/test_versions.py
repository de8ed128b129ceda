"""One place states each version: whatever else states one differently is named in a line."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("versions", ROOT / "tools/versions.py")
assert spec is not None and spec.loader is not None
versions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(versions)

TABLE = versions.read()
INPUTS = TABLE["inputs"]
DEEPGEMM = INPUTS["deepgemm-src"]


def flake_lock() -> dict:
    """A flake.lock that holds the table's inputs, in the form that Nix writes."""
    nodes = {"root": {"inputs": {name: name for name in TABLE["inputs"]}}}
    for name, row in TABLE["inputs"].items():
        owner, repo = row["source"].split("/")
        locked = {key: row[key] for key in ("rev", "narHash", "lastModified")}
        nodes[name] = {"locked": {**locked, "type": "github", "owner": owner, "repo": repo}}
    return {"nodes": nodes, "root": "root", "version": 7}


@pytest.fixture
def tree(tmp_path):
    """The files that state versions, with a flake that agrees with the table."""
    for name in ("requirements", "docs", ".github", "megamoe/spec/contract.py", "toolchain.toml",
                 "pyproject.toml", "README.md", "tools/setup_env.sh"):  # fmt: skip
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        elif source.is_file():
            shutil.copy(source, target)
    (tmp_path / "flake.lock").write_text(json.dumps(flake_lock()))
    urls = [f"github:{row['source']}/{row.get('branch', row['rev'])}" for row in INPUTS.values()]
    (tmp_path / "flake.nix").write_text("\n".join([*urls, 'cuda = "12.9"; nix = "2.18";']))
    (tmp_path / "nix").mkdir()
    (tmp_path / "nix/revisions.nix").write_text(f'{{ rev = "{DEEPGEMM["rev"]}"; }}\n')
    assert versions.problems(tmp_path) == []
    return tmp_path


def change(tree: Path, name: str, old: str, new: str) -> None:
    path = tree / name
    text = path.read_text()
    assert old in text, f"{name} no longer says {old!r}"
    path.write_text(text.replace(old, new))


def test_this_tree_agrees():
    assert versions.problems(ROOT) == []


BASE_VERSION = next(iter(versions.locked_versions(ROOT)["numpy"]))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("tools/setup_env.sh", "3.11 3.12", "3.12", "tools/setup_env.sh, supported: 3.12"),
        ("pyproject.toml", ">=3.11", ">=3.10", "requires-python: >=3.10, but toolchain.toml"),
        ("pyproject.toml", "py311", "py312", "ruff's target: py312"),
        ("pyproject.toml", "torch>=2.11", "torch>=2.14", "torch 2.13.0, but pyproject.toml asks"),
        ("pyproject.toml", "torch>=2.11", "torch>=2.12", "has torch 2.11.0, which pyproject.toml"),
        ("pyproject.toml", '"ruff>=0.9"', '"pylint>=3"', "pylint is in no lock"),
        ("requirements/torch-cpu.txt", "torch==2.13.0+cpu", "torch==2.12.0+cpu", "2.12.0+cpu, but"),
        ("requirements/torch-cuda.txt", "torch==2.13.0", "torch==2.13.1", "torch-cuda.txt, torch"),
        ("requirements/torch-cuda.txt", "triton==3.7.1", "triton==3.7.0", "3.7.0 and 3.7.1"),
        ("requirements/torch-cpu.sha256", "-cp314-", "-cp315-", "3.11 3.12 3.13 3.15, but"),
        ("toolchain.toml", 'torch = "2.13.0"', 'torch = "2.14.0"', "toolchain.toml says 2.14.0"),
        ("README.md", "3.11 to 3.14", "3.11 to 3.15", "README.md, Pythons"),
        ("README.md", "torch 2.13.0", "torch 2.12.0", "README.md: torch 2.12.0, but the locks"),
        ("README.md", f"numpy {BASE_VERSION}", "numpy 2.4.5", "README.md: numpy 2.4.5, but"),
        ("README.md", "Triton 3.6.0", "Triton 3.5.0", "README.md: Triton 3.5.0"),
        ("docs/deep_gemm.md", "DeepGEMM 54e22612", "DeepGEMM 54e22613", "54e22613 is not in"),
        ("megamoe/spec/contract.py", "DeepGEMM 54e2261", "DeepGEMM 54e2262", "54e2262 is not in"),
        ("toolchain.toml", 'reason = """their image', 'why = """their image', "has no reason"),
        ("toolchain.toml", 'ci = "3.12"', 'ci = "3.10"', "no lock holds wheels for"),
        ("flake.nix", '"12.9"', '"12.8"', "flake.nix: version 12.8 is neither in"),
        ("flake.nix", '"12.9"', '"2.18"', "nothing asserts cuda 12.9 as toolchain.toml does"),
        ("flake.nix", "nixos-26.05", "nixos-unstable", "input nixpkgs is not github:NixOS/nixpkgs"),
        ("flake.nix", DEEPGEMM["rev"], "main", "input deepgemm-src is not github:deepseek-ai"),
        ("nix/revisions.nix", DEEPGEMM["rev"], "0" * 40, f"revision {'0' * 40} is not in"),
        ("nix/revisions.nix", DEEPGEMM["rev"], f"sha256-{'A' * 43}=", "neither in toolchain.toml"),
    ],
)  # fmt: skip
def test_a_version_changed_in_one_place_is_named(tree, name, old, new, message):
    change(tree, name, old, new)
    problems = versions.problems(tree)
    assert any(message in line for line in problems), problems


@pytest.mark.parametrize("name", TABLE["inputs"])
@pytest.mark.parametrize("field", ["rev", "narHash", "lastModified", "repo"])
def test_any_field_of_any_row_of_the_lock(tree, name, field):
    lock = flake_lock()
    lock["nodes"][name]["locked"][field] = 1 if field == "lastModified" else "other"
    (tree / "flake.lock").write_text(json.dumps(lock))
    (line,) = versions.problems(tree)
    assert line.startswith(f"flake.lock, {name}, {'source' if field == 'repo' else field}: ")


def test_an_input_that_the_table_lacks(tree):
    lock = flake_lock()
    lock["nodes"]["root"]["inputs"]["flake-utils"] = "flake-utils"
    lock["nodes"]["flake-utils"] = lock["nodes"]["fmt-src"]
    (tree / "flake.lock").write_text(json.dumps(lock))
    (line,) = versions.problems(tree)
    assert line.startswith("flake.lock, inputs: cutlass-src deepgemm-src flake-utils ")


def test_a_wheel_that_nix_fetches_must_be_a_locked_one(tree):
    """requirements/ writes digests in hexadecimal, Nix in base 64: they are the same bytes."""
    import base64

    digest = bytes.fromhex((ROOT / "requirements/test.txt").read_text().split("sha256:")[1][:64])
    sri = f"sha256-{base64.b64encode(digest).decode()}"
    (tree / "nix/wheels.nix").write_text(f'{{ a = "{sri}"; b = "{digest.hex()}"; }}\n')
    assert versions.problems(tree) == []
    change(tree, "nix/wheels.nix", digest.hex(), "0" * 64)
    (line,) = versions.problems(tree)
    assert line.startswith(f"nix/wheels.nix: {'0' * 64} is neither in toolchain.toml nor in")


def test_a_host_may_differ_where_it_is_named(tree):
    """docs/performance.md names the torch and the Triton of the GPU machine."""
    assert "torch 2.11.0" in (tree / "docs/performance.md").read_text()
    change(tree, "toolchain.toml", 'torch = "2.11.0"', "")
    assert any(
        "docs/performance.md: torch 2.11.0, but the locks and toolchain.toml" in line
        for line in versions.problems(tree)
    )
