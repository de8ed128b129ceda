"""The examples: a right kernel, a wrong one with its page, and what `init` writes."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megamoe.commands import init
from megamoe.commands.main import main
from tests.helpers import history
from tests.helpers.command import megamoe
from tools import examples

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "examples"
TEMPLATES = ROOT / "megamoe/commands/templates"
pytestmark = pytest.mark.usefixtures("warm")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A copy of the examples, as the current folder."""
    for path in FOLDER.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def timeless(text):
    return re.sub(r"\b\d+(\.\d+)? s\b", "N s", text)


# --- the kernels --------------------------------------------------------------------------------

SOME = (
    "forward/expert-block-edge-t0", "forward/token-block-edge-t9", "forward/clamp-*-not-rounded*",
    "forward/infinite-hidden-value-with-clamp", "eplb/wide-ids-not-cast-to-int32-first",
    "eplb/replica-hash-differs-r3", "eplb/identity-map-int*", "staging/rows-lost-or-repeated-at-t0",
    "staging/padding-rows-keep-their-experts-0-of-3", "errors/staging-takes-*",
    "staging/outlier-channels-crush-their-group",
)  # fmt: skip
"""What a first draft failed, and each callable; the whole quick tier takes over a minute."""


def test_the_kernel_is_right(here):
    cases = ",".join(SOME)
    process = megamoe("check", "-v", "--backend", "kernel.py:Kernel", "--case", cases, "-n", "1")
    assert process.returncode == 0, process.stdout
    kinds = {line.split()[2].partition("/")[0] for line in process.stdout.splitlines()
              if re.match(r"\[\d+/\d+\] pass ", line)}  # fmt: skip
    assert kinds == {"forward", "eplb", "staging", "errors"}


def test_the_kernel_needs_torch_and_nothing_else():
    """`Problem` is imported for a type checker only."""
    tree = ast.parse((FOLDER / "kernel.py").read_text())
    tree.body = [
        node for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]  # fmt: skip
    modules = set()
    for node in ast.walk(tree):
        modules |= {a.name for a in node.names} if isinstance(node, ast.Import) else set()
        modules |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    assert modules == {"__future__", "torch", "typing"}


def test_the_outputs_of_the_page_are_real(here, monkeypatch):
    monkeypatch.setenv("COLUMNS", examples.WIDTH)

    def run(*arguments):
        return megamoe(*arguments, COLUMNS=examples.WIDTH)

    page = examples.PAGE.read_text()
    assert page.count("$ megamoe ") == 3
    assert timeless(examples.renewed(page, run)) == timeless(page)


def test_the_wrong_kernel_has_one_mistake_and_the_page_shows_the_mend():
    wrong, right = (
        (FOLDER / f"{name}.py").read_text().partition("\nfrom __future__")[2]
        for name in ("wrong_kernel", "kernel")
    )
    mended = wrong.replace('name = "wrong-kernel"', 'name = "my-kernel"')
    blocks = re.findall(r"```python\n +# \w+\.py\n(.*?)```", examples.PAGE.read_text(), re.DOTALL)
    before, after = blocks
    assert mended.count(before) == 1 and mended.replace(before, after) == right


# --- init ---------------------------------------------------------------------------------------


def test_init_writes_the_example_and_a_workflow(tmp_path, capsys):
    assert main(["init", str(tmp_path / "new")]) == 0
    output = capsys.readouterr().out
    assert "variable MEGAMOE" in output and f"    {init.source()}\n" in output
    assert output.endswith(f"next: megamoe check --backend {tmp_path}/new/kernel.py:Kernel\n")
    files = {p.relative_to(tmp_path / "new") for p in tmp_path.rglob("*") if p.is_file()}
    assert {str(p) for p in files} == {*init.TARGETS.values()}
    kernel = (tmp_path / "new/kernel.py").read_bytes()
    assert kernel == (FOLDER / "kernel.py").read_bytes() == (TEMPLATES / "kernel.py").read_bytes()


def test_the_test_that_init_writes_passes_and_can_fail(tmp_path):
    assert main(["init", str(tmp_path)]) == 0
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_shapes.py"]
    right = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert right.returncode == 0 and "4 passed" in right.stdout, right.stdout
    text = (tmp_path / "kernel.py").read_text()
    (tmp_path / "kernel.py").write_text(f"{text}\n_right = forward\n"
                                        "def forward(p): return -_right(p)['y']\n")  # fmt: skip
    wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 1 and "4 failed" in wrong.stdout, wrong.stdout


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("https://me:key@example.com/o/megamoe.git", "git+https://example.com/o/megamoe.git@{}"),
        ("/a/folder", "git+https://HOST/OWNER/megamoe@COMMIT"),
        ("", "git+https://HOST/OWNER/megamoe@COMMIT"),
    ],
)
def test_init_says_what_pip_installs_megamoe_from(tmp_path, origin, expected):
    commits = history.commit_all(tmp_path / "clone", [("first", {"file": "text"})])
    if origin:
        command = ["git", "-C", str(tmp_path / "clone"), "remote", "add", "origin", origin]
        subprocess.run(command, check=True)
    assert init.source(tmp_path / "clone") == expected.format(commits[0])
    assert init.source(tmp_path) == "git+https://HOST/OWNER/megamoe@COMMIT"


@pytest.mark.parametrize("there", [*init.TARGETS.values()])
def test_init_never_overwrites_and_writes_all_or_nothing(tmp_path, capsys, there):
    (tmp_path / there).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / there).write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert f"{there} is there already; nothing was written" in capsys.readouterr().err
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert [p.read_text() for p in files] == ["mine"]


def test_init_takes_no_file_for_a_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["init", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def _of_init():
    return (TEMPLATES / "workflow.yml").read_text(), 3


def _of_the_page():
    page = (ROOT / "docs/ci.md").read_text()
    return re.search(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1], 5


@pytest.mark.parametrize("workflow", [_of_init, _of_the_page])
def test_a_workflow_for_users_is_valid_and_has_the_pins_of_ours(workflow, tmp_path):
    text, actions = workflow()
    ours = "".join(p.read_text() for p in (ROOT / ".github/workflows").glob("*.yml"))
    pins = re.findall(r"uses: (\S+@[0-9a-f]{40} # v\S+)", text)
    assert len(pins) == text.count("uses:") == actions and all(pin in ours for pin in pins)
    assert "MEGAMOE: ${{ vars.MEGAMOE }}" in text  # a default would be a name on somebody's index
    if importlib.util.find_spec("check_jsonschema") is None:
        pytest.skip("check-jsonschema is not installed: the workflow is not validated")
    (tmp_path / "workflow.yml").write_text(text)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema",
               "vendor.github-workflows", str(tmp_path / "workflow.yml")]  # fmt: skip
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
