"""The backward pass below the heads, which hand down the gradients of what they read."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from xmc.heads.head import HeadResult


def backward(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """One pass through everything below the heads' inputs, given the gradient of each head.

    The inputs are what each head read, [B, D] each, perhaps the same tensor.
    """
    if len(gradients) > 1 and inputs[0] is inputs[1]:
        gradients = [functools.reduce(operator.add, gradients)]
    # A frozen encoder has no use for a gradient.
    roots = [(x, d_x) for x, d_x in zip(inputs, gradients, strict=False) if x.requires_grad]
    if roots:
        torch.autograd.backward([x for x, _ in roots], [d_x for _, d_x in roots])


def pulled_back(result: HeadResult, reps: Tensor, pooled: Tensor) -> HeadResult:
    """A result on `reps` with its gradient in `pooled`, from which they were made."""
    if reps is pooled:
        return result
    if not pooled.requires_grad:
        return HeadResult(result.loss, torch.zeros_like(pooled))
    (d_pooled,) = torch.autograd.grad(reps, pooled, result.d_reps, retain_graph=True)
    return HeadResult(result.loss, d_pooled)
