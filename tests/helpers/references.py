"""Samples whose reference log-probs are computed, and the model that computes them."""

import torch
from torch import nn

import flexpatch
from flexpatch import Tree, lay_out
from flexpatch.models import tiny_model

# Lengths out of order, so that packing reorders them; different numbers of answers.
TREES = [
    Tree.of([5, 6], [7]),
    Tree.of(list(range(3, 30)), [8, 9, 10], [8, 11], [12]),
    Tree.of([5, 6, 7], [9] * 9, [10, 11]),
    Tree.of([20], [21, 22], [23, 24, 25]),
]
LAYOUTS = [lay_out(tree, i) for i, tree in enumerate(TREES)]


def model(dtype: torch.dtype = torch.float64, backend: str = "auto", seed: int = 0) -> nn.Module:
    return flexpatch.apply(tiny_model("llama", dtype=dtype, seed=seed), backend=backend)
