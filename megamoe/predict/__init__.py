"""Predicted bits: the whole forward on a CPU, as a named kernel's tensor core adds.

A *model* (:mod:`megamoe.predict.model`) is a unit of :mod:`megamoe.oracle.units`, the order in
which a kernel chains it over K, and the silu tables that a GPU gave. :func:`predict` computes the
layer by it under a contract. A prediction is a claim about a machine, and no judgement: what a
correct kernel may return is the oracle's to say.
"""

from megamoe.predict.forward import Linears, Prediction, predict
from megamoe.predict.model import HOPPER_TRITON, MODELS, SM100, Model, model

__all__ = [
    "HOPPER_TRITON",
    "MODELS",
    "SM100",
    "Linears",
    "Model",
    "Prediction",
    "model",
    "predict",
]
