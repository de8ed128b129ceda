"""The command line of ``megamoe contract``."""

from __future__ import annotations

from typing import Any


def add(commands: Any, command: Any) -> None:
    """Add ``contract`` to the command line."""
    about = "revisions of the numerics contract, and which build follows which"
    c = commands.add_parser("contract", help=about, description=about)
    acts = c.add_subparsers(required=True, metavar="VERB")
    command(acts, "list", "the revisions, with the builds that follow each", "contract.run_list")
    s = command(acts, "show", "every clause: its value and how it is known", "contract.run_show")
    s.add_argument("revision", metavar="REV", help="a revision, or a build such as `vllm 0.27.0`")
    d = command(
        acts, "diff", "the clauses that differ, and what a golden would show", "contract.run_diff"
    )
    d.add_argument("left", metavar="A", help="a revision, or a build such as `vllm 0.27.0`")
    d.add_argument("right", metavar="B")
    d.add_argument("--verbose", "-v", action="store_true",
                   help="name every case that only one of the two has")  # fmt: skip
    d = command(
        acts,
        "detect",
        "which build of the kernel a package or a folder holds",
        "contract.run_detect",
    )
    d.add_argument("what", nargs="?", metavar="PACKAGE | DIR",
                   help="default: what is installed here; nothing is imported")  # fmt: skip
