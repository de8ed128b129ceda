"""What reaches a terminal, and what happens when nobody reads any more."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.live import Live
from rich.table import Table
from rich.text import Text

from megamoe.commands.main import CLOSED_PIPE, main
from megamoe.commands.work import Work
from megamoe.compare import ab, bisect
from megamoe.console import NO_WIDTH, Console
from megamoe.printable import all_printable, guard, printable
from megamoe.worker.link import Link

EVIL = "a\x1b[2Jb\x9bc\rd\u202ee\ud800f\u2028g\u200eh\x7f"
PLAIN = "a?[2Jb?c?d?e?f?g?h?"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_control_characters_are_replaced_one_for_one() -> None:
    assert printable(EVIL) == PLAIN
    assert printable("a\n\tb") == "a??b"
    assert printable("a\n\tb", lines=True) == "a\n\tb"
    assert printable("größer, 大, e\u0301, a\u00a0b") == "größer, 大, e\u0301, a\u00a0b"
    assert all_printable({EVIL: [EVIL, 3, None, {"x": EVIL}]}) == {
        PLAIN: [PLAIN, 3, None, {"x": PLAIN}]
    }


def test_what_is_printed_in_the_guard_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with guard():
        print(EVIL)
        print(EVIL, file=sys.stderr)
    assert capsys.readouterr() == (f"{PLAIN}\n", f"{PLAIN}\n")


def test_colours_stay_and_texts_change_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    with guard():
        console = Console(width=60)
        assert console.is_terminal
        table = Table("head", title="\x1b[31mtitle")
        table.add_row(Text(EVIL, style="bold"))
        console.print(table)
        console.print("\x1b[31mred", style="green", markup=False, highlight=False)
        with Live(Text("live"), console=console, transient=True):
            print("\x1b[2Jbeside")
    output = out.getvalue()
    assert "\x1b[1m" in output and "\x1b[32m" in output, "its own styles"
    assert "\x1b[2J" not in output and "\x1b[31m" not in output
    assert "a?[2Jb?c" in output and "?[31mred" in output


@pytest.mark.parametrize(("columns", "is_whole"), [("", True), ("60", False)])
def test_a_pipe_has_no_width_unless_columns_says_so(
    columns: str, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console = Console(file=io.StringIO())
    table = Table("head")
    table.add_row("word " * 60)
    console.print(table, "word " * 60)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert (sum("word" in line for line in lines) == 2) is is_whole


def test_a_terminal_has_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "")
    assert Console(file=Terminal()).width < NO_WIDTH


def test_no_command_gives_a_width() -> None:
    """So that :class:`Console` decides for each of them."""
    sources = Path(main.__code__.co_filename).parents[1].rglob("*.py")
    assert [path.name for path in sources if re.search(r"Console\(width", path.read_text())] == []


def test_no_module_makes_another_console() -> None:
    names = [
        path.name
        for path in Path(main.__code__.co_filename).parents[1].rglob("*.py")
        if re.search(r"^from rich.console import .*\bConsole\b", text := path.read_text(), re.M)
        and re.search(r"(?<!\w)Console\(", text)
    ]
    assert names == []


def test_an_answer_of_a_worker_is_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    link = Link.__new__(Link)
    monkeypatch.setattr(link, "event", lambda until: {"said": '{"raised": "\\u001b[2J"}'})
    assert link.next_answer(1.0) == {"raised": "?[2J"}


def test_an_error_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--case", "\x1b[2Jx"]) == 2
    output = capsys.readouterr().err
    assert "\x1b" not in output and output.count("\n") == 1


# --- a pipe that nobody reads ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "verb", [["list"], ["list", "-k", "eplb/no-tokens"], ["contract", "list"]], ids=" ".join
)
def test_a_closed_pipe_ends_a_verb_without_a_word(
    verb: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(verb) == CLOSED_PIPE == 141
    assert capsys.readouterr().err == ""


def test_an_error_that_nobody_reads_keeps_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stderr", closed)
        assert main(["list", "--case", "no-such"]) == 2


def test_without_any_output_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `>&-` in a shell: Python has no stdout then."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["list"]) == 0


# --- commits --------------------------------------------------------------------------------------


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "kernel.cu").write_text("1")
    git("add", ".")
    who = ("-c", "user.name=n", "-c", "user.email=e")
    git(*who, "commit", "-q", "-m", "faster\x1b[2J\x1b]0;title\x07")
    return tmp_path


def test_a_subject_of_a_commit_is_printable(repo: Path) -> None:
    assert bisect._subject(repo, "HEAD") == "faster?[2J?]0;title?"


def test_untracked_files_are_no_uncommitted_changes(repo: Path) -> None:
    tail = "; a revision is compared without them (`this` has them)"
    assert ab.describe(repo) == ""
    (repo / "notes.txt").write_text("x")
    assert ab.describe(repo) == f"{repo} has untracked files (notes.txt){tail}"
    for i in range(3):
        (repo / f"a{i}").write_text("x")
    assert ab.describe(repo) == f"{repo} has untracked files (a0, a1, a2, ...){tail}"
    (repo / "kernel.cu").write_text("2")
    both = "uncommitted changes and untracked files (a0, a1, a2, ...)"
    assert ab.describe(repo) == f"{repo} has {both}{tail}"
    for path in (*repo.glob("a*"), repo / "notes.txt"):
        path.unlink()
    assert ab.describe(repo) == f"{repo} has uncommitted changes{tail}"


def test_work_shows_a_line_on_a_terminal_and_none_elsewhere(capsys) -> None:
    for is_terminal in (True, False):
        console = Console(file=io.StringIO(), width=80, force_terminal=is_terminal)
        with Work("running the whole problem", console) as work:
            work.say("a result")
            work.now("reducing: try 7")
            work.say("another")
        assert isinstance(console.file, io.StringIO)
        output = console.file.getvalue()
        assert ("running the whole problem" in output) == is_terminal
        assert ("reducing: try 7" in output) == is_terminal
        assert capsys.readouterr().out == "a result\nanother\n", "results go to stdout"
