"""A backend over the ranks of a group: by its own messages, or by those of this project."""

from __future__ import annotations

from typing import Any

from megamoe.layer.expert_parallel import ExpertParallel
from megamoe.spec.problem import Output, Problem, provides


class OwnRanks:
    """A backend whose ``forward_group`` sends tokens between the ranks of ``group`` itself.

    Each call of the module is one ``forward_group(problem, group)``. The problem has the tokens of
    this rank and the weights of its own experts, in the checkpoint's layout. Its ids are physical
    ones of all ranks. Every rank makes each call, also with no tokens.
    """

    global_ids = True

    def __init__(self, backend: Any, group: Any) -> None:
        self.backend, self.group = backend, group
        self.name, self.accumulator = backend.name, backend.accumulator
        self.features = tuple(getattr(backend, "features", ()))
        for name in ("prepare", "eplb_map", "ready", "new_symm_buffer"):
            if provides(backend, name):
                setattr(self, name, getattr(backend, name))

    def forward(self, problem: Problem) -> Output:
        """``y`` (T, H) bfloat16 of this rank's tokens; collective."""
        out: Output = self.backend.forward_group(problem, self.group)
        return out


def spanning(backend: Any, group: Any) -> Any:
    """``backend``, able to serve a module over ``group``.

    It stays itself if it sets ``global_ids``. Its ``forward_group`` is used if it has one. For any
    other backend :class:`ExpertParallel` sends the rows; ``NotImplementedError`` where it cannot.
    """
    if getattr(backend, "global_ids", False):
        return backend
    if provides(backend, "forward_group"):
        return OwnRanks(backend, group)
    return ExpertParallel(backend, group)


__all__ = ["OwnRanks", "spanning"]
