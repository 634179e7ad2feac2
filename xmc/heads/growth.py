"""How much a label wants each input: the gradient of its dense weights, tile by tile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xmc.nn.regrow import group_score
from xmc.nn.rewire import Growth
from xmc.types import SparseLabels
from xmc_kernels.fan_in import fan_in_linear

_TILE = 2**20  # numbers of [B, C] scores or [C, D] gradients held at a time


def growth_scores(
    reps: Tensor,  # [B, D]
    labels: SparseLabels,  # B rows
    weight: Tensor,  # [L, F]
    index: Tensor,  # [L/G, F]; [L/G, P] uint8 with a pattern
    bias: Tensor | None,  # [L]
    *,
    loss: str,
    pattern: tuple[int, int] | None = None,
    scale: Tensor | None = None,  # [L] float32, of float8 weights
    smoothing: float = 0.0,
    positive_weight: Tensor | None = None,  # [L]
) -> Growth:
    """|dL/dW_dense| for `rewire_` (RigL), L being the loss summed over labels, mean over rows.

    For a linear layer that is `|dL/dscores.T @ reps|`, in groups its mean over the G labels.
    `smoothing` and `positive_weight` as in `xmc_kernels.classifier.classifier_step_`. The whole set
    of tiles costs one GEMM over B x L x D and the sparse scores; at most 2^20 numbers of scores and
    as many of gradient exist at a time ([B, G] and [G, D] at least).

    Raises ValueError on an unknown loss or a number of label rows that does not match.
    """
    if loss not in _GRADIENTS:
        raise ValueError(f"expected a loss of {', '.join(_GRADIENTS)}, got {loss!r}")
    num_rows, in_features = reps.shape
    if len(labels) != num_rows:
        raise ValueError(f"expected labels of {num_rows} rows to match reps, got {len(labels)}")
    group_size = weight.shape[0] // index.shape[0]
    width = max(1, _TILE // (max(num_rows, in_features) * group_size))
    x = reps.to(torch.promote_types(reps.dtype, torch.float32))
    x_mean = x / num_rows

    def tile(start: int, stop: int) -> Tensor:
        first, last = start * group_size, stop * group_size
        label_bias, label_scale, factor = (
            None if t is None else t[first:last] for t in (bias, scale, positive_weight)
        )
        scores = fan_in_linear(
            *(x, weight[first:last], index[start:stop], label_bias),
            pattern=pattern,
            scale=label_scale,
        )
        gradient = _gradient_(scores, *labels.tile(first, last), loss, smoothing, factor)
        return group_score(gradient.T @ x_mean, group_size)

    @torch.no_grad()
    def growth(start: int, stop: int) -> Tensor:
        if stop - start <= width:
            return tile(start, stop)
        out = x.new_empty(stop - start, in_features)
        for first in range(start, stop, width):
            last = min(first + width, stop)
            out[first - start : last - start] = tile(first, last)
        return out

    return growth


def _gradient_(
    scores: Tensor,  # [B, C]
    rows: Tensor,  # [n]
    positives: Tensor,  # [n]
    loss: str,
    smoothing: float,
    positive_weight: Tensor | None,  # [C]
) -> Tensor:  # [B, C]
    """Gradient of the loss in the scores, which are overwritten."""
    gained = scores[rows, positives]
    of_positive, of_negative = _GRADIENTS[loss]
    wanted = of_positive(gained.clone())
    if smoothing:
        wanted = (1 - smoothing) * wanted + smoothing * of_negative(gained)
    if positive_weight is not None:
        wanted *= positive_weight[positives]
    gradient = of_negative(scores)
    gradient[rows, positives] = wanted
    return gradient


# Of a score whose target is 1, and of one whose target is 0; both overwrite the scores.
_GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # sigmoid(s) - y; for y = 1 without the cancellation of sigmoid(s) - 1
    "bce": (lambda s: s.neg_().sigmoid_().neg_(), torch.sigmoid_),
    # of max(0, 1 - y s)^2, y = 1 or -1
    "squared_hinge": (
        lambda s: s.neg_().add_(1).clamp_(min=0).mul_(-2),
        lambda s: s.add_(1).clamp_(min=0).mul_(2),
    ),
}
