"""Dense float64 truths, written without a look at the code under test.

Everything here is the textbook expression on full matrices: no tiles, no sparse forms.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def dense_weight(weight: Tensor, index: Tensor, in_features: int) -> Tensor:
    """[L, D] float64 matrix with weight[l, k] at column index[l // G, k], entry by entry."""
    num_labels, fan_in = weight.shape
    group = num_labels // index.shape[0]
    dense = np.zeros((num_labels, in_features))
    columns = index.to(torch.int64).numpy()
    values = weight.detach().double().numpy()
    for label in range(num_labels):
        for k in range(fan_in):
            dense[label, columns[label // group, k]] += values[label, k]
    return torch.from_numpy(dense)


def at_index(dense: Tensor, index: Tensor) -> Tensor:
    """The [L, F] entries of an [L, D] matrix that index names."""
    group = dense.shape[0] // index.shape[0]
    return torch.stack([dense[row, index[row // group].long()] for row in range(len(dense))])


def dense_targets(indptr: Tensor, indices: Tensor, num_labels: int) -> Tensor:
    """[B, L] float64 of zeros and ones from CSR rows."""
    targets = torch.zeros(len(indptr) - 1, num_labels, dtype=torch.float64)
    for row in range(len(indptr) - 1):
        for label in indices[int(indptr[row]) : int(indptr[row + 1])].tolist():
            targets[row, label] = 1
    return targets


def loss_sum(scores: Tensor, targets: Tensor, loss: str) -> Tensor:
    """Sum over all entries of a float64 [B, L] block, differentiable."""
    if loss == "bce":
        return -(
            targets * torch.nn.functional.logsigmoid(scores)
            + (1 - targets) * torch.nn.functional.logsigmoid(-scores)
        ).sum()
    assert loss == "squared_hinge"
    sign = torch.where(targets > 0, 1.0, -1.0)
    return torch.relu(1 - sign * scores).square().sum()


def loss_and_grads(
    x: Tensor,
    dense: Tensor,
    bias: Tensor,
    targets: Tensor,
    loss: str,
    grad_scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scaled loss and its autograd gradients in x [B, D], dense [L, D] and bias [L].

    A dtype other than float64 is for the naive code that ours may not be worse than.
    """
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in (x, dense, bias)]
    scores = leaves[0] @ leaves[1].T + leaves[2]
    value = grad_scale * loss_sum(scores, targets.to(dtype), loss)
    return value.detach(), *torch.autograd.grad(value, leaves)


def optimizer(kind: str, params: list, *, lr: float, **options) -> torch.optim.Optimizer:
    """The optimizer of torch for an update rule; params may be groups."""
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=lr, betas=options["betas"], eps=options["eps"])
    if kind == "adagrad":
        return torch.optim.Adagrad(params, lr=lr, eps=options["eps"])
    momentum = options["momentum"] if kind == "momentum" else 0.0
    return torch.optim.SGD(params, lr=lr, momentum=momentum)


def topk(scores: Tensor, k: int, excluded: list[list[int]]) -> tuple[list, list]:
    """Per row the k best (score, label) by a full sort: falling score, rising label."""
    all_scores, all_labels = [], []
    for row, values in enumerate(scores.tolist()):
        banned = set(excluded[row])
        ranked = sorted((-v, label) for label, v in enumerate(values) if label not in banned)[:k]
        padding = k - len(ranked)
        all_scores.append([-v for v, _ in ranked] + [-np.inf] * padding)
        all_labels.append([label for _, label in ranked] + [-1] * padding)
    return all_scores, all_labels
