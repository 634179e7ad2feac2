"""The contract between a trainer and what stands on top of the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from xmc.distributed.collectives import World, scatter_sum, sum_
from xmc.types import SparseLabels


@dataclass(frozen=True)
class HeadResult:
    """What one pass of a head returns.

    Gradient scale: both fields belong to the **global mean loss** of the optimizer step, whatever
    the number of chunks it is computed in. Summing results over the chunks gives the whole.
    """

    loss: Tensor  # [] float32
    d_reps: Tensor  # [B, D], the loss's gradient with respect to the representations

    def __add__(self, other: HeadResult) -> HeadResult:
        """The result of the sum of two losses on the same rows."""
        return HeadResult(self.loss + other.loss, self.d_reps + other.d_reps)

    def summed(self, counts: Sequence[int], world: World) -> HeadResult:
        """From results of each rank's labels on the rows of all, the whole of this rank's rows.

        `counts` are the rows of every rank. Sends the loss, and to each rank
        the d_reps of its rows.
        """
        return HeadResult(sum_(self.loss, world), scatter_sum(self.d_reps, counts, world))


class Head(Protocol):
    """Loss and gradient of a batch of representations; the head's own weights are its business.

    On several ranks each brings rows of its own, perhaps none, and all call together: the loss is
    that of all rows, the gradient that of the caller's.
    """

    def loss_and_grad(
        self,
        reps: Tensor,  # [B, D], detached
        labels: SparseLabels,  # B rows
        *,
        num_rows: int | None = None,
        update: bool = True,
        weight: float = 1.0,
    ) -> HeadResult:
        """Return the loss and `d_reps` of these rows.

        Args:
            num_rows: rows of the whole optimizer step, on all ranks, over which the mean is taken
                (default: those of this call).
            update: False keeps the gradient of the head's weights for a later call of the same
                step; True applies it together with what was kept.
            weight: factor of the loss, and so of every gradient, that of the head's own weights
                included: heads with weights w and 1 - w train on the weighted sum of losses.
        """
        ...
