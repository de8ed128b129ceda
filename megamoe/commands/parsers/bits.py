"""The command line of ``megamoe bits``."""

from __future__ import annotations

from typing import Any

from megamoe.commands.options import add_case, add_contract, add_jobs


def add(acts: Any, command: Any) -> None:
    """The parsers of both, among the acts of ``golden``."""
    r = command(acts, "record-bits", "a backend's own bits, if three runs agree", "bits.run_record")
    r.set_defaults(backend_is="here", folders=("out",))
    r.add_argument("--backend", required=True, help="a name, or path/to/file.py:OBJECT_OR_FACTORY")
    r.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_contract(r)
    add_case(r, "for a trial: such a file cannot be blessed")
    r.add_argument("--out", metavar="DIR", help="default: golden/recorded-candidates")
    add_jobs(r)
    b = command(
        acts, "bless-bits", "make them recorded goldens; refuses where CI is set", "bits.run_bless"
    )
    b.add_argument("--from", dest="source", metavar="DIR",
                   help="default: golden/recorded-candidates")  # fmt: skip
