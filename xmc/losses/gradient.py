"""Losses whose gradients come with their value, as differentiable functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Compute = Callable[[Sequence[Tensor], Sequence[bool]], tuple[Tensor, ...]]
"""From the tensors, and which of them want a gradient, to the loss and a gradient for each.

What is returned in the place of a gradient that is not wanted does not matter.
"""


def differentiable(compute: Compute, *tensors: Tensor) -> Tensor:
    """`compute(tensors)[0]`, differentiable once, computed together with its gradients.

    Backward hands the gradients over, scaled in place: no second copy of them exists. Where the
    graph is kept and backward runs again, they are computed again.
    """
    if not torch.is_grad_enabled():  # a Function would be told that tensors want gradients
        tensors = tuple(tensor.detach() for tensor in tensors)
    loss: Tensor = _WithGradients.apply(compute, *tensors)
    return loss


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, *tensors: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[1:]
        loss, *gradients = compute(tensors, wanted)
        ctx.compute, ctx.gradients = compute, gradients
        ctx.save_for_backward(*tensors)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            with torch.no_grad():
                _, *gradients = ctx.compute([t.detach() for t in tensors], wanted)
        results: list[Tensor | None] = []
        for tensor, gradient, want in zip(tensors, gradients, wanted, strict=True):
            if not want:
                results.append(None)
                continue
            result = gradient.to(tensor.dtype).mul_(upstream[0].detach().to(tensor.dtype))
            if torch.is_grad_enabled():  # create_graph=True
                result = _WithoutGraph.apply(result, tensor)
            results.append(result)
        return None, *results


class _WithoutGraph(torch.autograd.Function):
    """A gradient that depends on a tensor, and raises when its derivative is asked for."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, tensor: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "expected one differentiation of a tiled loss, got a second: its gradients are "
            "computed with its value and have no graph"
        )
