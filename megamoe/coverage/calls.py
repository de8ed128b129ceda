"""One forward call for coverage: ids of all tokens, and weights expert by expert.

A case at a real model's sizes has gigabytes of weights. Here an expert's weights are computed on
demand, so that a few experts can stand for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from megamoe.cases import Case, kind_of
from megamoe.cases.forms import act_of
from megamoe.cases.kind import Inputs
from megamoe.cases.recipes import EXTRAS, forward_problem, hidden_states, routing
from megamoe.cases.stored import inputs_of, is_stored
from megamoe.cases.weights import expert_weights
from megamoe.oracle.mlp import Weights
from megamoe.spec.features import Activation
from megamoe.spec.formats import F32, U16
from megamoe.spec.forms import bits
from megamoe.spec.problem import Problem
from megamoe.spec.tensors import ACTIVATIONS, WEIGHTS

WHOLE: Final = 24 << 20
"""Bytes of hidden states and weights up to which a case's problem is computed as a whole."""


@dataclass(frozen=True)
class Call:
    """``T`` tokens, ``K`` slots, ``J`` tokens whose rows are judged."""

    hidden: int
    inter: int
    experts: int
    capacity: int
    ids: npt.NDArray[np.int64]
    """(T, K)."""
    weights: F32
    """(T, K) routing weights."""
    rows: npt.NDArray[np.int64]
    """(J,) tokens."""
    states: U16
    """(J, H) bfloat16 bits."""
    act: Activation
    combine_dtype: str
    features: tuple[str, ...]
    expert: Callable[[int], Weights]
    """Weights of one expert."""
    forms: Mapping[str, tuple[str, bool]]
    """Input by name -> dtype, and whether it is contiguous."""
    shared: Weights | None = None
    output: U16 | None = None
    """(J, H): the output of a shared expert outside of the kernel."""
    problem: Problem | None = None
    """The same for the judged rows, if the problem was computed as a whole."""

    @property
    def live(self) -> npt.NDArray[np.bool_]:
        """(T, K) slots that take part."""
        return self.ids >= 0

    @classmethod
    def of(cls, problem: Problem, rows: list[int] | None = None) -> Call:
        """A problem whose tensors are at hand; ``rows``: those that are judged, all by default."""
        tokens = np.arange(problem.num_tokens) if rows is None else np.asarray(rows, np.int64)
        narrow = problem if rows is None else problem.at_rows(torch.from_numpy(tokens))
        shared = tuple(t.numpy() for t in problem.shared_weights)
        routed = [getattr(problem, name) for name in WEIGHTS]

        def expert(at: int) -> Weights:
            w13, w13_sf, w2, w2_sf = (t[at].numpy() for t in routed)
            return w13, w13_sf, w2, w2_sf

        return cls(
            problem.hidden_size,
            problem.intermediate_size,
            problem.num_experts,
            problem.max_num_tokens,
            problem.topk_ids.numpy().astype(np.int64),
            problem.topk_weights.float().numpy(),
            tokens,
            bits(narrow.hidden_states.contiguous()),
            problem.act,
            problem.combine_dtype,
            problem.features,
            expert,
            forms_of(vars(problem)),
            (shared[0], shared[1], shared[2], shared[3]) if shared else None,
            None if narrow.shared_output is None else bits(narrow.shared_output),
            narrow,
        )

    @classmethod
    def of_case(cls, case: Case, shallow: bool = False) -> Call:
        """The call of a forward or property case; ``shallow``: without its hidden states."""
        if is_stored(case):
            return cls.of(Problem(**inputs_of(case)), case.rows)
        p = case.params
        tokens = np.arange(p["tokens"])
        recipe = p.get("routing_recipe", {})
        ids, weights = routing(case.seed, tokens, p["experts"], p["top_k"], recipe)
        rows = tokens if case.rows is None else np.asarray(case.rows, np.int64)
        size = p["hidden"], p["intermediate"]
        features = kind_of(case.kind).features(case)
        expert_count = len(np.unique(ids[ids >= 0]))
        needs = 2 * len(tokens) * size[0] + 2 * expert_count * size[0] * size[1]
        whole = needs <= WHOLE or {"nvfp4", "shared-expert", "shared-output"} & {*features}
        if whole and not shallow:
            return cls.of(forward_problem(case), case.rows)

        def expert(at: int) -> Weights:
            return expert_weights(case.seed, at, *size, p.get("weights_recipe", {}))

        state_rows = np.zeros(0, np.int64) if shallow else rows
        states = hidden_states(case.seed, state_rows, size[0], p.get("hidden_recipe", {}))
        return cls(
            *size,
            p["experts"],
            p["capacity"],
            ids,
            weights,
            rows,
            states,
            act_of(p),
            p.get(EXTRAS[3], "bf16"),
            features,
            expert,
            {},
        )


def forms_of(inputs: Inputs) -> dict[str, tuple[str, bool]]:
    """dtype and contiguity of the activations among the inputs."""
    return {
        name: (str(inputs[name].dtype).removeprefix("torch."), bool(inputs[name].is_contiguous()))
        for name in ACTIVATIONS
        if isinstance(inputs.get(name), torch.Tensor)
    }


def form_classes(forms: Mapping[str, tuple[str, bool]], params: Mapping[str, Any]) -> set[str]:
    """``topk_ids int32``, ``hidden_states strided``: from the tensors and from the case."""
    out = {f"{name} {dtype}" for name, (dtype, _) in forms.items()}
    out |= {f"{name} strided" for name, (_, contiguous) in forms.items() if not contiguous}
    for key, name in (("ids_dtype", "topk_ids"), ("weights_dtype", "topk_weights")):
        out |= {f"{name} {params[key]}"} if key in params else set()
    return out
