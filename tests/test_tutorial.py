"""docs/tutorial.md does what it shows, and the README shows the kernel that the tour copies."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from megamoe.commands.main import main

pytestmark = pytest.mark.usefixtures("warm")
ROOT = Path(__file__).resolve().parents[1]
KERNEL = ROOT / "docs/examples/my_kernel.py"
STATUS = {"RED": 1, "GREEN": 0}


def session(page):
    """(command, lines shown after it) of each ``console`` block."""
    out = []
    for block in re.findall(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, *lines = part.splitlines()
            out.append((command, lines))
    return out


def plain(line):
    """A line without the time that it names, and without spaces at its end."""
    return re.sub(r"\d+(\.\d+)? s\b", "TIME s", line).rstrip()


def missing(expected, output):
    """The first line shown that was not printed in its place; None if each was.

    ``...`` stands for any lines. Without it a line must follow the one before at once.
    """
    at, anywhere = 0, False
    for line in map(plain, expected):
        if line == "...":
            anywhere = True
            continue
        try:
            place = output.index(line, at)
        except ValueError:
            return line
        if place > at and not anywhere:
            return line
        at, anywhere = place + 1, False
    return None if anywhere or at == len(output) else output[at]


def run(command, capsys):
    """Exit status and printed lines, of standard output, of a command of the page."""
    words = shlex.split(command)
    if words[0] != "megamoe":
        subprocess.run(words, check=True, timeout=30)
        return 0, []
    status = main(words[1:])
    return status, [plain(line) for line in capsys.readouterr().out.splitlines()]


def test_the_tour_shows_what_its_commands_print(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs/examples").mkdir(parents=True)
    shutil.copy(KERNEL, tmp_path / "docs/examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    steps = session((ROOT / "docs/tutorial.md").read_text())
    assert len(steps) == 10
    for command, expected in steps:
        before = (tmp_path / "my_kernel.py").read_bytes() if "sed" in command else b""
        status, output = run(command, capsys)
        assert missing(expected, output) is None, (command, output)
        colours = [word for line in expected if (word := line.partition(":")[0]) in STATUS]
        colour = colours[-1] if colours else ""
        assert status == STATUS.get(colour, status), command
        if "sed" in command:
            assert (tmp_path / "my_kernel.py").read_bytes() != before, command
    assert (tmp_path / "my_kernel.py").read_bytes() == KERNEL.read_bytes()


@pytest.mark.parametrize(
    ("expected", "output", "wrong"),
    [
        (["a", "b"], ["a", "b"], None),
        (["took 3.5 s"], ["took TIME s"], None),
        (["...", "b"], ["a", "b"], None),
        (["b"], ["a", "b"], "b"),
        (["a"], ["a", "b"], "b"),
        (["a", "..."], ["a", "b"], None),
        (["b", "...", "a"], ["a", "b"], "b"),
        (["...", "c"], ["a", "b"], "c"),
    ],
)
def test_a_line_that_is_not_printed_is_seen(expected, output, wrong):
    assert missing(expected, output) == wrong


def test_the_readme_shows_the_kernel():
    assert f"```python\n{KERNEL.read_text()}```" in (ROOT / "README.md").read_text()


def test_the_red_of_the_readme_is_real(tmp_path, monkeypatch, capsys):
    """The line that the README plants, the case that it names, and what was printed."""
    page = (ROOT / "README.md").read_text().partition("## A red")[2]
    (planted,) = re.findall(r"```python\n(.*)\n```", page)
    text = KERNEL.read_text()
    right = "gate, up = gate.fmin(bound), up.fmax(-bound).fmin(bound)"
    assert text.count(right) == 1
    (tmp_path / "my_kernel.py").write_text(text.replace(right, planted))
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```\n\$ megamoe (.*?)\n(.*?)```", page, re.DOTALL):
        main(shlex.split(block[0]))
        output = [plain(line) for line in capsys.readouterr().out.splitlines()]
        for line in filter(None, block[1].splitlines()):
            assert plain(line) in output
