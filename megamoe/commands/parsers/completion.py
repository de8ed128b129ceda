"""The command line of ``megamoe completion``."""

from __future__ import annotations

from typing import Any, Final

SHELLS: Final = ("bash", "zsh", "fish")


def add(commands: Any, command: Any) -> None:
    """The parser of ``completion``."""
    c = command(commands, "completion", "print a script that completes megamoe's words in a shell",
                "completion.run")  # fmt: skip
    c.add_argument("shell", choices=SHELLS, help='bash and zsh: eval "$(megamoe completion bash)"; '
                   "fish: megamoe completion fish | source")  # fmt: skip
